"""What patterns cost in quality: recall tasks at equal parameters and equal work. `python -m examples.quality --quick`."""
