"""Attention over a ring buffer: constant memory, every token exact. Public names are those of `longattn.attention`."""
