"""For every test of the workspace: Hypothesis profiles, and fresh memory that is poisoned with NaN.

`HYPOTHESIS_PROFILE` chooses a profile; `CI` turns the default from `dev` to `ci`.
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Workers of pytest-xdist share the cores: threads of their own would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    """Poison fresh memory wherever kernels, whose kit does it, is installed: whoever reads before writing gets caught."""
    if importlib.util.find_spec("longattn.kernels") is None:
        yield
        return
    from longattn.kernels.testing import poisoned_memory

    with poisoned_memory():
        yield
