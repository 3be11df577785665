"""AttentionBufferManager: typed, reusable buffers over the process-wide pool."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from longattn.bufmgr.allocator import Allocator
from longattn.bufmgr.book import LeaseBook, block_size
from longattn.bufmgr.gate import ForkableLock
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.lru import LruShelf
from longattn.bufmgr.pool import get_global_memory_pool
from longattn.bufmgr.request import BufferRequest, resolve_request
from longattn.bufmgr.spec import BufferConfig, BufferType, merge_configs, parse_type

_PREPARED = (BufferType.QUERY, BufferType.KEY, BufferType.VALUE, BufferType.OUTPUT)


class AttentionBufferManager:
    """Leases buffers by type and reuses their memory when nothing can see it any more.

    custom_configs: rows that replace those of DEFAULT_CONFIGS. Default none.
    enable_reuse: keep returned memory, within the type's limits. Default True.
    enable_preallocation: the first QUERY buffer of a (batch, seq, heads, head_dim) also readies KEY, VALUE and OUTPUT
        of that shape. Default False.
    enable_profiling: get_stats() has a `profile` entry. Default False.
    lightweight: keep safety and plain counters only. Default True. (Call sites and slower strategies, which False
        adds, are not there yet: today both are the same.)
    upstream: where blocks come from. Default: the global memory pool.

    Host memory is recycled here. On an accelerator torch's caching allocator recycles; there, on "meta" and for size
    zero the manager adds types, checks and counts. Inside torch.compile it steps aside. Safe to use from any thread.

        manager = AttentionBufferManager()
        scores = manager.allocate(BufferType.SCORES, (8, 128, 128))
        manager.deallocate(scores, BufferType.SCORES)   # scores is empty now, its memory is free
    """

    def __init__(
        self,
        custom_configs: Mapping[BufferType, BufferConfig] | None = None,
        enable_reuse: bool = True,
        enable_preallocation: bool = False,
        enable_profiling: bool = False,
        lightweight: bool = True,
        *,
        upstream: Allocator | None = None,
    ) -> None:
        flags = {
            "enable_reuse": enable_reuse,
            "enable_preallocation": enable_preallocation,
            "enable_profiling": enable_profiling,
            "lightweight": lightweight,
        }
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if upstream is not None and not isinstance(upstream, Allocator):
            raise TypeError(f"upstream: expected an Allocator (allocate and deallocate), got {upstream!r}")
        self.configs = merge_configs(custom_configs)
        self.enable_reuse = enable_reuse
        self.enable_preallocation = enable_preallocation
        self.enable_profiling = enable_profiling
        self.lightweight = lightweight
        shelves = {
            kind: LruShelf(config.max_cached_buffers if enable_reuse else 0, config.max_cached_bytes)
            for kind, config in self.configs.items()
        }
        self._book = LeaseBook(get_global_memory_pool() if upstream is None else upstream, shelves)
        self._profile = {kind: [0, 0, 0] for kind in BufferType}  # count, bytes, nanoseconds
        self._profile_lock = ForkableLock()
        self._prepared_shapes: set[BufferRequest] = set()
        # Buffers may outlive the manager; the book then gives their memory back as they die.
        weakref.finalize(self, self._book.close).atexit = False

    def allocate(
        self,
        type: BufferType | str,  # noqa: A002 - the name in the public signature
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        zero_init: bool | None = None,
    ) -> torch.Tensor:
        """Return a contiguous buffer without gradient.

        type: a BufferType, or its name. shape: whole numbers, 0 allowed. dtype: default torch's default dtype.
        device: default the current device context, else CPU. zero_init: default what the type's config says; False
        leaves whatever the memory held.

        Raises TypeError or ValueError naming the parameter, MemoryError for sizes that cannot be had (the accelerator's
        own torch.OutOfMemoryError there). After an error nothing is leased.
        """
        kind = parse_type(type)
        if zero_init is None:
            zero_init = self.configs[kind].zero_init
        elif not isinstance(zero_init, bool):
            raise TypeError(f"zero_init: expected True, False or None, got {zero_init!r}")
        return self._lease(kind, shape, dtype, device, zero_init)

    def deallocate(self, tensor: torch.Tensor, type: BufferType | str) -> None:  # noqa: A002
        """Give a buffer back under the type it was allocated as.

        If the caller's own reference is all that sees it, the tensor becomes empty (shape (0,)) and its memory is free
        at once. If a view, another name, a numpy array or autograd sees it too, nothing is touched, and the memory
        returns when the last of them dies. Dropping every reference without this call returns it as well.

        Raises ValueError for a view, a tensor from elsewhere, another type and a second release; TypeError for no tensor.
        """
        if torch.compiler.is_compiling():
            return
        self._book.release(tensor, parse_type(type), sys.getrefcount(tensor))

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None, role: str = "temp"
    ) -> torch.Tensor:
        """Return an uninitialised buffer for a kernel: `allocate` with zero_init=False; `role` names the type."""
        return self._lease(parse_type(role, "role"), shape, dtype, device, False)

    def release(self, tensor: torch.Tensor, role: str = "temp") -> None:
        """Give back what `empty` returned for this role: `deallocate` under a kernel's name for it."""
        if torch.compiler.is_compiling():
            return
        self._book.release(tensor, parse_type(role, "role"), sys.getrefcount(tensor))

    def _lease(
        self,
        kind: BufferType,
        shape: Sequence[int],
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        zero: bool,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a graph owns its memory
            make = torch.zeros if zero else torch.empty
            return make(shape, dtype=dtype, device=device)
        started = time.perf_counter_ns() if self.enable_profiling else 0
        request = resolve_request(shape, dtype, device)
        pinned = self.configs[kind].pinned and request.device.type == "cpu" and torch.cuda.is_available()
        tensor = self._book.lease(request, kind, zero=zero, pinned=pinned)
        if self.enable_profiling:
            self._note(kind, request.nbytes, time.perf_counter_ns() - started)
        if self.enable_preallocation and kind is BufferType.QUERY and len(request.shape) == 4:
            self._prepare_once(request)
        return tensor

    def _note(self, kind: BufferType, nbytes: int, nanoseconds: int) -> None:
        with self._profile_lock:
            row = self._profile[kind]
            row[0] += 1
            row[1] += nbytes
            row[2] += nanoseconds

    def _prepare_once(self, request: BufferRequest) -> None:
        if request not in self._prepared_shapes:
            self._prepared_shapes.add(request)
            self._prepare(request, _PREPARED[1:])

    def preallocate_buffers(
        self,
        batch_size: int,
        seq_len: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> int:
        """Ready one buffer each of QUERY, KEY, VALUE and OUTPUT of (batch, seq, heads, head_dim); never SCORES.

        The next allocate of that size is a hit, its pages written to already. Returns how many of the four are ready:
        0 without reuse, on devices where torch recycles and for size zero; fewer than 4 where one is over its type's
        max_cached_mb. Raises TypeError or ValueError naming the parameter, and MemoryError, after which what was
        readied so far stays.
        """
        sizes = {"batch_size": batch_size, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if isinstance(size, bool) or not hasattr(size, "__index__"):
                raise TypeError(f"{name}: expected a whole number, got {size!r}")
            if size < 0:
                raise ValueError(f"{name}: expected 0 or more, got {size!r}")
        return self._prepare(resolve_request(tuple(sizes.values()), dtype, device), _PREPARED)

    def _prepare(self, request: BufferRequest, kinds: Sequence[BufferType]) -> int:
        ready = 0
        if request.device.type == "cpu" and request.nbytes > 0:
            ready = sum(self._book.put_free(kind, block_size(request.nbytes)) for kind in kinds)
        LOGGER.debug("preallocation: %d of %d buffers of %s are ready", ready, len(kinds), request.describe())
        return ready

    def clear_cache(self, type: BufferType | str | None = None) -> None:  # noqa: A002
        """Give the free memory of one type, or of all, back to the upstream. Buffers in use are not touched."""
        kind = None if type is None else parse_type(type)
        freed = self._book.clear(kind)
        LOGGER.debug("cleanup: %s gave back %d bytes", "all types" if kind is None else kind.name, freed)

    def get_stats(self) -> dict[str, Any]:
        """Return the counters.

        cache_hits, cache_misses: requests served with and without reuse; together all that succeeded.
        cache_hit_rate: 0 to 1. evictions: blocks that left because of a limit. outstanding: buffers in use.
        cached_buffers, cached_bytes: free now. types: the same for each type, by its name in lower case, and
        `from_torch`, the misses that torch served itself. With enable_profiling also profile: for each type `count`,
        `bytes` and `time` (seconds spent in allocate).
        """
        self._book.settle(blocking=True)
        types = {kind.value: self._type_stats(kind) for kind in BufferType}
        names = ("cache_hits", "cache_misses", "evictions", "outstanding", "cached_buffers", "cached_bytes")
        stats: dict[str, Any] = {name: sum(entry[name] for entry in types.values()) for name in names}
        stats["cache_hit_rate"] = _rate(stats["cache_hits"], stats["cache_misses"])
        stats["types"] = types
        if self.enable_profiling:
            with self._profile_lock:
                stats["profile"] = {
                    kind.value: {"count": row[0], "bytes": row[1], "time": row[2] * 1e-9}
                    for kind, row in self._profile.items()
                }
        return stats

    def _type_stats(self, kind: BufferType) -> dict[str, Any]:
        counts, shelf = self._book.counts[kind], self._book.shelves[kind]
        return {
            "cache_hits": counts.hits,
            "cache_misses": counts.misses,
            "cache_hit_rate": _rate(counts.hits, counts.misses),
            "from_torch": counts.from_torch,
            "evictions": shelf.evictions,
            "outstanding": counts.outstanding,
            "cached_buffers": len(shelf),
            "cached_bytes": shelf.nbytes,
        }

    def check_valid(self) -> None:
        """Assert the invariants of shelves, leases and counters; for tests."""
        self._book.check_valid()


def _rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 0.0


def create_attention_buffer_manager(
    enable_reuse: bool = True,
    enable_preallocation: bool = False,
    lightweight: bool = True,
    enable_profiling: bool = False,
    custom_configs: Mapping[BufferType, BufferConfig] | None = None,
    *,
    upstream: Allocator | None = None,
) -> AttentionBufferManager:
    """Return a manager; the arguments are those of AttentionBufferManager."""
    return AttentionBufferManager(
        custom_configs, enable_reuse, enable_preallocation, enable_profiling, lightweight, upstream=upstream
    )
