"""Mutation testing: a seeded sample of small faults, each put into a copy of the source and held against the narrow tests of its target.

`python -m tools.mutants --help`; the nox session `mutants` runs it. Survivors are listed with a reason in `survivors.csv`.
"""
