"""In every test of this package: memory is poisoned, and torch computes in one thread."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from longattn.kernels.dispatch.prepared import LENGTHS, PREPARED
from longattn.kernels.testing import poisoned_memory


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors here are small: more threads would only wait for one another."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(autouse=True)
def rows_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests put rows of their own into the table, and name the one that must serve: figures of speed decide where a test says so."""
    monkeypatch.setenv("LONGATTN_CHOICE", "fixed")


@pytest.fixture
def native_level(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Sets the native row's level for one test, and returns its name."""

    def set_level(name: str) -> str:
        monkeypatch.setenv("LONGATTN_NATIVE", name)
        return name

    return set_level


@pytest.fixture(autouse=True)
def no_call_was_prepared() -> None:
    """Each test begins with calls that nobody looked up before: some put other rows into the table."""
    PREPARED.clear()
    LENGTHS.clear()


@pytest.fixture
def in_the_interpreter(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Runs the test's own file once more, where triton is imported to interpret: an environment variable decides before the import."""

    def run() -> None:
        options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
        command = [sys.executable, "-m", "pytest", *options, str(request.path)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        inside = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert inside.returncode == 0, inside.stdout[-6000:] + inside.stderr[-2000:]

    return run
