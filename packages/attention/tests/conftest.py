"""Every test starts with an empty pattern cache and an empty memory pool."""

import gc

import pytest

from longattn.bufmgr import reset_global_memory_pool
from longattn.patterncache import reset_global_pattern_cache


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()
    reset_global_pattern_cache()
    reset_global_memory_pool()
