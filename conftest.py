"""Hypothesis profiles for the whole workspace: `HYPOTHESIS_PROFILE` chooses one, `CI` turns the default to `ci`."""

import os

from hypothesis import HealthCheck, settings

# deadline=None: on a shared machine the first call of an operator is slow, and that is no failure.
# too_slow is about data generation on a busy machine, not about the code under test.
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=40,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
