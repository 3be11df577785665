"""Every test starts with an empty pattern cache and an empty memory pool; torch computes in one thread."""

import gc
from collections.abc import Iterator

import pytest
import torch

from longattn.bufmgr import reset_global_memory_pool
from longattn.patterncache import reset_global_pattern_cache


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()
    reset_global_pattern_cache()
    reset_global_memory_pool()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors here are small: more threads would only wait for one another."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)
