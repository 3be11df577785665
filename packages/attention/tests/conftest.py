"""Every test starts with an empty pattern cache and an empty memory pool; torch computes in one thread."""

import gc
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from longattn.bufmgr import get_global_memory_pool, reset_global_memory_pool
from longattn.patterncache import reset_global_pattern_cache

_modules_before = 0


def collect_garbage() -> None:
    """Garbage of earlier tests would free its leases in this one. What a test made torch import stays, and is not walked again."""
    global _modules_before
    gc.collect()
    if len(sys.modules) > _modules_before + 50:
        _modules_before = len(sys.modules)
        gc.freeze()


@pytest.fixture(autouse=True)
def _fresh():
    collect_garbage()
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
