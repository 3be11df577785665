"""Projections, layers and the LongNet model."""
