"""One module per case; each offers `experiments(quick)`. The table of cases is `benchmarks.run.CASES`."""
