"""What every row that lowers a plan asks of it: in which order its rows are written, and which heads are served alike.

Row classes stay with the rows, which need different ones: the native row periodic sets of keys for each class, the Triton rows runs that a
block of rows streams.
"""
