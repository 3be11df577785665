"""The public names, and that naming them is all that loads torch."""

import subprocess
import sys

import pytest

import longattn.bufmgr


def test_public_names():
    """A new export shows in review."""
    expected = {
        "BufferType", "BufferConfig", "DEFAULT_CONFIGS", "AttentionBufferManager", "create_attention_buffer_manager",
        "MemoryPool", "get_global_memory_pool", "reset_global_memory_pool", "Allocator", "TensorAllocator", "Block",
        "SystemAllocator", "StatisticsAllocator", "LimitingAllocator", "Statistics", "PreparedSlot",
        "BufferScope", "OutstandingBuffer", "Strategy", "ArenaAllocator", "LoggingAllocator", "FailureCallbackAllocator",
        "MemoryReading", "read_device_memory", "PoisoningAllocator", "RecordingAllocator", "TraceEvent",
        "AllocationTrace", "prometheus_text", "NumaAllocator", "Placement", "migrate", "numa_policy", "read_placement",
        "NumaNode", "NumaTopology", "numa_topology", "plan_memory", "MemoryPlan", "Lifetime", "TieredBuffers", "TieredBuffer",
        "StepLearner", "ExpectedRequest",
    }  # fmt: skip
    assert set(longattn.bufmgr.__all__) == expected
    assert expected <= set(dir(longattn.bufmgr))
    assert all(getattr(longattn.bufmgr, name).__name__ == name for name in expected - {"DEFAULT_CONFIGS"})


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BufferTypo'"):
        longattn.bufmgr.BufferTypo  # pyright: ignore[reportAttributeAccessIssue]


def test_import_is_lazy():
    """Importing the package loads no torch; importing the manager makes no pool."""
    code = (
        "import sys, longattn.bufmgr; assert 'torch' not in sys.modules;"
        "from longattn.bufmgr import AttentionBufferManager;"
        "from longattn.bufmgr import pool; assert pool._global_pool is None"
    )
    subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], check=True)
