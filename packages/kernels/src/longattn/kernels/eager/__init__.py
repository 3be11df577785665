"""Rows in plain torch, which run on any device."""
