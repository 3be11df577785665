"""The dispatch table: what a row declares, which one serves, and calls that were looked up before."""
