"""The patterns of this package, and their registry."""
