"""`Wiring`: which memory and which cache a module uses, as flags; and what is built from them.

Each feature is an object with an upstream: a view of the global pattern cache, a lease on the global memory pool, a buffer manager
over it. `Resources` stacks them into the `Environment` that the kernels ask. Traced code asks none: a graph owns its memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from longattn.attention.cache_view import CacheProfile, PatternCacheView
from longattn.attention.validate import check_bool, check_type, refuse_unknown
from longattn.bufmgr import AttentionBufferManager, MemoryPool, get_global_memory_pool
from longattn.kernels import Environment

LIGHTWEIGHT_BYTES = 1 << 20
"""A lightweight pool leases nothing smaller: there a lease costs more than the page faults that it saves."""


class PoolFlags(TypedDict, total=False):
    """What every preset takes."""

    enable_memory_pool: bool
    lightweight_pool: bool
    enable_profiling: bool


class CacheFlags(PoolFlags, total=False):
    """What ring presets take as well."""

    use_pattern_cache: bool


class ResidentFlags(CacheFlags, total=False):
    """What RingDilatedAttentionV3 takes as well."""

    cache_on_gpu: bool


class ManagerFlags(PoolFlags, total=False):
    """What ImprovedDilatedAttentionV2 takes as well."""

    enable_buffer_manager: bool
    enable_buffer_reuse: bool
    enable_preallocation: bool


@dataclass(frozen=True)
class Wiring:
    """Which memory and which cache a module uses.

    Args:
        enable_memory_pool: lease scratch from the global memory pool. Default False: plain torch.
        lightweight_pool: lease only what has 1 MiB or more; the rest is plain torch. Default False. Acts with the pool.
        enable_profiling: statistics get a `profile` entry: count, bytes, time per key or role. Default False.
        use_pattern_cache: count this module's own hits and misses in the global pattern cache. Default False.
        cache_on_gpu: index tensors stay with their plan, on the device, as long as the plan is cached. Default False: made anew.
        enable_buffer_manager: outputs and scratch through a manager of the module's own. Default False.
        enable_buffer_reuse: that manager keeps what comes back. Default True. Acts with the manager.
        enable_preallocation: the first forward readies a query, key, value and output buffer. Default False. Acts with the manager.

    Raises:
        TypeError: a flag is not a bool, by name.
    """

    enable_memory_pool: bool = False
    lightweight_pool: bool = False
    enable_profiling: bool = False
    use_pattern_cache: bool = False
    cache_on_gpu: bool = False
    enable_buffer_manager: bool = False
    enable_buffer_reuse: bool = True
    enable_preallocation: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            check_bool(field.name, getattr(self, field.name))


FLAGS = frozenset(field.name for field in fields(Wiring))
"""The names of all flags."""


def split_flags(where: str, taken: frozenset[str], options: Mapping[str, Any]) -> tuple[Wiring, dict[str, Any]]:
    """(the flags among `options` as a Wiring, the other options).

    Raises:
        TypeError: an option that `where` does not take; for a flag that other presets take, the message says which it takes.
    """
    for name in options:
        if name in FLAGS and name not in taken:
            raise TypeError(f"{where} does not take {name}: of the flags it takes {', '.join(sorted(taken & FLAGS))}")
    refuse_unknown(where, {name: value for name, value in options.items() if name not in taken})
    wiring = Wiring(**{name: value for name, value in options.items() if name in FLAGS})
    return wiring, {name: value for name, value in options.items() if name not in FLAGS}


class ScratchPool:
    """Scratch from the global memory pool, outputs from torch. A block returns to the pool when nothing sees it any more.

    Args:
        least_bytes: smaller scratch comes from torch.
        profile: keep count, bytes and time per role.
    """

    def __init__(self, least_bytes: int = 0, *, profile: bool = False) -> None:
        self._upstream: MemoryPool = get_global_memory_pool()
        self._profile = CacheProfile() if profile else None
        self.least_bytes = least_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> Tensor:
        """Scratch of any content, or an output from torch."""
        nbytes = prod(shape) * dtype.itemsize
        if role == "output" or nbytes < self.least_bytes:
            return torch.empty(shape, dtype=dtype, device=device)
        if self._profile is None:
            return self._upstream.empty(shape, dtype, device, role)
        started = time.perf_counter()
        leased = self._upstream.empty(shape, dtype, device, role)
        self._profile.note(role, nbytes, time.perf_counter() - started)
        return leased

    def release(self, tensor: Tensor, role: str) -> None:
        """Nothing: the block returns with the last reference, which is about to go."""

    def get_stats(self) -> dict[str, Any]:
        """The global pool's statistics; with profiling also `profile`: {role: {count, bytes, time}} of this module."""
        stats = self._upstream.get_stats()
        return stats if self._profile is None else stats | {"profile": self._profile.as_dict()}


class PreparedManager:
    """A manager that readies the buffers of a forward's shape when the first output is asked for."""

    def __init__(self, manager: AttentionBufferManager) -> None:
        self._upstream = manager
        self._waiting = True
        # Bound as it is: the manager counts who sees the tensor, and a call in between would be one more.
        self.release = manager.release

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> Tensor:
        """The manager's, after the first output's shape has been prepared."""
        if self._waiting and role == "output" and len(shape) == 4:
            self._waiting = False
            batch, length, heads, head_dim = shape
            self._upstream.preallocate_buffers(batch, length, heads, head_dim, dtype, device)
        return self._upstream.empty(shape, dtype, device, role)


class Resources:
    """What a `Wiring` builds. A copy, pickled ones included, builds its own: memory and counters do not travel.

    Attributes:
        pattern_cache, memory_pool, buffer_manager: None where the flag is off.
        environment: what the kernels ask; None where every flag is off.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = check_type("wiring", wiring, Wiring, "None or a Wiring")
        profile = wiring.enable_profiling
        cached = wiring.use_pattern_cache or wiring.cache_on_gpu
        view = PatternCacheView(profile=profile, resident=wiring.cache_on_gpu) if cached else None
        self.pattern_cache = view if wiring.use_pattern_cache else None
        least = LIGHTWEIGHT_BYTES if wiring.lightweight_pool else 0
        self.memory_pool = ScratchPool(least, profile=profile) if wiring.enable_memory_pool else None
        self.buffer_manager: AttentionBufferManager | None = None
        allocator: ScratchPool | AttentionBufferManager | PreparedManager | None = self.memory_pool
        if wiring.enable_buffer_manager:
            manager = AttentionBufferManager(
                enable_reuse=wiring.enable_buffer_reuse,
                enable_preallocation=wiring.enable_preallocation,
                enable_profiling=profile,
            )
            allocator = PreparedManager(manager) if wiring.enable_preallocation else manager
            self.buffer_manager = manager
        self.environment = None if view is None and allocator is None else Environment(view, allocator)

    def __reduce__(self) -> tuple[Any, ...]:
        return Resources, (self.wiring,)


class WiredModule(nn.Module):
    """What modules show of their wiring."""

    _resources: Resources

    @property
    def use_pattern_cache(self) -> bool:
        """Whether the module has a `_pattern_cache`."""
        return self._resources.wiring.use_pattern_cache

    @property
    def enable_memory_pool(self) -> bool:
        """Whether the module has a `_memory_pool`."""
        return self._resources.wiring.enable_memory_pool

    @property
    def _pattern_cache(self) -> PatternCacheView | None:
        return self._resources.pattern_cache

    @property
    def _memory_pool(self) -> ScratchPool | None:
        return self._resources.memory_pool

    @property
    def buffer_manager(self) -> AttentionBufferManager:
        """The module's manager. Without one there is no such attribute."""
        if self._resources.buffer_manager is None:
            raise AttributeError("buffer_manager: enable_buffer_manager is off")
        return self._resources.buffer_manager

    def get_buffer_stats(self) -> dict[str, Any]:
        """The manager's statistics (`cache_hits cache_misses cache_hit_rate` and more); empty without one."""
        manager = self._resources.buffer_manager
        return {} if manager is None else manager.get_stats()

    def cleanup_buffers(self) -> None:
        """Give the manager's free buffers back; without one nothing happens. Buffers in use are not touched."""
        if self._resources.buffer_manager is not None:
            self._resources.buffer_manager.clear_cache()
