"""`python -m examples.quality`: predictions, then runs."""

from examples.quality import predictions

predictions.write()
