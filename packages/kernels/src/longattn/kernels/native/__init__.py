"""The native CPU row: one C++ source, compiled on the machine where it runs, behind one row of the dispatch table."""
