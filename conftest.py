"""For every test of the workspace: Hypothesis profiles, the order, what the garbage collector looks at, and memory poisoned with NaN.

`HYPOTHESIS_PROFILE` chooses a profile; `CI` turns the default from `dev` to `ci`.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Workers of pytest-xdist share the cores: threads of their own would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests name the row that must serve, or take the first that can: by figures of speed another would on every machine. Tests of the choice
# itself take the setting away.
os.environ.setdefault("LONGATTN_CHOICE", "fixed")

# deadline=None: on a shared machine the first call of an operator is slow, and that is no failure.
# too_slow is about data generation on a busy machine, not about the code under test.
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=25,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """A path that is not there is an error before any worker starts: pytest-xdist would say that no tests ran, and not why."""
    if config.getoption("pyargs"):
        return
    missing = [
        argument for argument in config.args if not (config.invocation_params.dir / argument.split("::")[0]).exists()
    ]
    if missing:
        raise pytest.UsageError(
            f"no such file or folder, counted from {config.invocation_params.dir}: {', '.join(missing)}"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: the last one to end is then a short one, whoever runs it. Nightly ones are skipped by day."""
    if os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
        for item in items:
            if item.get_closest_marker("nightly") is not None:
                item.add_marker(pytest.mark.skip(reason="nightly: HYPOTHESIS_PROFILE=nightly"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end. The collector would walk all of their objects each time, which takes longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    """Poison fresh memory wherever kernels, whose kit does it, is installed: whoever reads before writing gets caught."""
    if importlib.util.find_spec("longattn.kernels") is None:
        yield
        return
    from longattn.kernels.testing import poisoned_memory

    with poisoned_memory():
        yield
