"""Measurements of longattn beside what others use; `python -m benchmarks.run` from the root of the checkout."""
