"""Typed, reusable buffers for attention and other models: who owns memory.

Nothing here imports torch until a name is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longattn.bufmgr.adaptors import LimitingAllocator, Statistics, StatisticsAllocator
    from longattn.bufmgr.allocator import Allocator, Block, SystemAllocator, TensorAllocator
    from longattn.bufmgr.manager import AttentionBufferManager, create_attention_buffer_manager
    from longattn.bufmgr.pool import MemoryPool, get_global_memory_pool, reset_global_memory_pool
    from longattn.bufmgr.spec import DEFAULT_CONFIGS, BufferConfig, BufferType

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
        "Allocator": "allocator",
        "TensorAllocator": "allocator",
        "Block": "allocator",
        "SystemAllocator": "allocator",
        "StatisticsAllocator": "adaptors",
        "LimitingAllocator": "adaptors",
        "Statistics": "adaptors",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
