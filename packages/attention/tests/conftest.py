"""Every test starts with an empty pattern cache and an empty memory pool; torch computes in one thread."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from longattn.bufmgr import get_global_memory_pool, reset_global_memory_pool
from longattn.patterncache import reset_global_pattern_cache


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()
    reset_global_pattern_cache()
    reset_global_memory_pool()


@pytest.fixture
def pool_leases(_fresh: None) -> Callable[[], tuple[int, int]]:
    """How many bytes of the global pool are in use since the test began, and how many buffers were asked for."""

    def read() -> tuple[int, int]:
        stats = get_global_memory_pool().get_stats()
        return stats["total_allocated"] - stats["cached_bytes"] - before, stats["allocation_count"]

    # Other files' tests may have left something in use, in modules that live as long as the process.
    before = 0
    before, _ = read()
    return read


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors here are small: more threads would only wait for one another."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)
