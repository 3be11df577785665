"""Patterns from and for other libraries."""
