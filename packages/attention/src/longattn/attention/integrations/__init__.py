"""Other libraries: transformers, xFormers, and the factory in xFormers style."""
