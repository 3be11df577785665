"""What every row that lowers a plan asks of it: in which order its rows are written, and which heads are served alike."""
