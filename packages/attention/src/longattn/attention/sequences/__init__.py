"""Sequences that are packed, padded or turned by their positions."""
