"""From patterns to strides: intervals of positions, runs of rows, bands, and lists where nothing strided is left."""
