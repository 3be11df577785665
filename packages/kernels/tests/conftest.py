"""Memory is poisoned in every test of this package."""

from collections.abc import Iterator

import pytest

from longattn.kernels.testing import poisoned_memory


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield
