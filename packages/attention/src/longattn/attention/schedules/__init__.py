"""Schedules: in which order keys arrive, in one process or over process groups."""
