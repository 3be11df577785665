"""Streams under any causal pattern: a cache that holds what queries to come still see. Public names are those of `longattn.attention`."""
