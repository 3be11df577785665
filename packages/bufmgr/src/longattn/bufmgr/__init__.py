"""Typed, reusable buffers for attention and other models: who owns memory.

Nothing here imports torch until a name is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from longattn.bufmgr.learning import ExpectedRequest, StepLearner
    from longattn.bufmgr.leasing.debug import OutstandingBuffer
    from longattn.bufmgr.leasing.scope import BufferScope
    from longattn.bufmgr.leasing.slots import PreparedSlot
    from longattn.bufmgr.manager import AttentionBufferManager, create_attention_buffer_manager
    from longattn.bufmgr.memory.adaptors import (
        FailureCallbackAllocator,
        LimitingAllocator,
        LoggingAllocator,
        PoisoningAllocator,
    )
    from longattn.bufmgr.memory.allocator import Allocator, Block, SystemAllocator, TensorAllocator
    from longattn.bufmgr.memory.arena import ArenaAllocator
    from longattn.bufmgr.memory.pressure import MemoryReading, read_device_memory
    from longattn.bufmgr.memory.statistics import Statistics, StatisticsAllocator
    from longattn.bufmgr.memory.traces import AllocationTrace, RecordingAllocator, TraceEvent
    from longattn.bufmgr.metrics import prometheus_text
    from longattn.bufmgr.numa.placement import Placement, migrate, numa_policy, read_placement
    from longattn.bufmgr.numa.placer import NumaAllocator
    from longattn.bufmgr.numa.topology import NumaNode, NumaTopology, numa_topology
    from longattn.bufmgr.planning.lifetimes import Lifetime
    from longattn.bufmgr.planning.memory_plan import MemoryPlan, plan_memory
    from longattn.bufmgr.pool import MemoryPool, get_global_memory_pool, reset_global_memory_pool
    from longattn.bufmgr.spec import DEFAULT_CONFIGS, BufferConfig, BufferType
    from longattn.bufmgr.strategy import Strategy
    from longattn.bufmgr.tiers import TieredBuffer, TieredBuffers

__all__ = [
    "BufferType",
    "BufferConfig",
    "DEFAULT_CONFIGS",
    "AttentionBufferManager",
    "create_attention_buffer_manager",
    "MemoryPool",
    "get_global_memory_pool",
    "reset_global_memory_pool",
    "Allocator",
    "TensorAllocator",
    "Block",
    "SystemAllocator",
    "StatisticsAllocator",
    "LimitingAllocator",
    "Statistics",
    "PreparedSlot",
    "BufferScope",
    "OutstandingBuffer",
    "Strategy",
    "ArenaAllocator",
    "LoggingAllocator",
    "FailureCallbackAllocator",
    "MemoryReading",
    "read_device_memory",
    "PoisoningAllocator",
    "RecordingAllocator",
    "TraceEvent",
    "AllocationTrace",
    "prometheus_text",
    "NumaAllocator",
    "Placement",
    "migrate",
    "numa_policy",
    "read_placement",
    "NumaNode",
    "NumaTopology",
    "numa_topology",
    "plan_memory",
    "MemoryPlan",
    "Lifetime",
    "TieredBuffers",
    "TieredBuffer",
    "StepLearner",
    "ExpectedRequest",
]

if not TYPE_CHECKING:
    _HOMES = {
        "BufferType": "spec",
        "BufferConfig": "spec",
        "DEFAULT_CONFIGS": "spec",
        "AttentionBufferManager": "manager",
        "create_attention_buffer_manager": "manager",
        "MemoryPool": "pool",
        "get_global_memory_pool": "pool",
        "reset_global_memory_pool": "pool",
        "Allocator": "memory.allocator",
        "TensorAllocator": "memory.allocator",
        "Block": "memory.allocator",
        "SystemAllocator": "memory.allocator",
        "StatisticsAllocator": "memory.statistics",
        "LimitingAllocator": "memory.adaptors",
        "Statistics": "memory.statistics",
        "PreparedSlot": "leasing.slots",
        "BufferScope": "leasing.scope",
        "OutstandingBuffer": "leasing.debug",
        "Strategy": "strategy",
        "ArenaAllocator": "memory.arena",
        "LoggingAllocator": "memory.adaptors",
        "FailureCallbackAllocator": "memory.adaptors",
        "MemoryReading": "memory.pressure",
        "read_device_memory": "memory.pressure",
        "PoisoningAllocator": "memory.adaptors",
        "RecordingAllocator": "memory.traces",
        "TraceEvent": "memory.traces",
        "AllocationTrace": "memory.traces",
        "prometheus_text": "metrics",
        "NumaAllocator": "numa.placer",
        "Placement": "numa.placement",
        "migrate": "numa.placement",
        "numa_policy": "numa.placement",
        "read_placement": "numa.placement",
        "NumaNode": "numa.topology",
        "NumaTopology": "numa.topology",
        "numa_topology": "numa.topology",
        "plan_memory": "planning.memory_plan",
        "MemoryPlan": "planning.memory_plan",
        "Lifetime": "planning.lifetimes",
        "TieredBuffers": "tiers",
        "TieredBuffer": "tiers",
        "StepLearner": "learning",
        "ExpectedRequest": "learning",
    }

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("longattn-bufmgr")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
