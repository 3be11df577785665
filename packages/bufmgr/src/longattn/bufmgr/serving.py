"""How a manager serves a request on the slow path: strategy, pressure, a lease, profile, and what is readied beforehand."""

# A manager's own book, profile and strategies are read by the classes above this one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from longattn.bufmgr.checks import check_whole
from longattn.bufmgr.leasing.book import LeaseBook
from longattn.bufmgr.leasing.cache import BlockCache
from longattn.bufmgr.leasing.debug import Inspector
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.profile import Profile
from longattn.bufmgr.leasing.scope import innermost_scope
from longattn.bufmgr.leasing.slots import SlotTable
from longattn.bufmgr.log import LOGGER
from longattn.bufmgr.memory.allocator import Allocator
from longattn.bufmgr.memory.arena import ArenaAllocator
from longattn.bufmgr.memory.pressure import Cleanup, PressureGauge
from longattn.bufmgr.memory.statistics import StatisticsAllocator
from longattn.bufmgr.numa.placer import Placer
from longattn.bufmgr.numa.system_calls import Policy
from longattn.bufmgr.pool import MemoryPool, get_global_memory_pool
from longattn.bufmgr.report import Reports
from longattn.bufmgr.request import BufferRequest, resolve_request
from longattn.bufmgr.spec import BufferConfig, BufferType, parse_type
from longattn.bufmgr.strategy import Strategy, block_bounds, choose_strategy

_PREALLOCATED_TYPES = (BufferType.QUERY, BufferType.KEY, BufferType.VALUE, BufferType.OUTPUT)


class RequestServer(SlotTable, Reports):
    """Serves checked requests for buffers of ten types; the options are those of AttentionBufferManager, checked."""

    def __init__(
        self,
        configs: dict[BufferType, BufferConfig],
        *,
        enable_reuse: bool,
        enable_preallocation: bool,
        enable_profiling: bool,
        lightweight: bool,
        upstream: Allocator | None,
        cleanup: Cleanup,
        debug: bool,
        numa: Policy,
        name: str,
        adaptive_cache: bool,
        device_pools: bool,
    ) -> None:
        self.configs = configs
        self.enable_reuse = enable_reuse
        self.enable_preallocation = enable_preallocation
        self.enable_profiling = enable_profiling
        self.lightweight = lightweight
        self.debug = debug
        self.name = name
        self.adaptive_cache = adaptive_cache
        self.device_pools = device_pools
        self._upstream = upstream
        self._gauge = PressureGauge(cleanup)
        caches = {
            kind: BlockCache(
                config.max_cached_buffers if enable_reuse else 0, config.max_cached_bytes, adapts=adaptive_cache
            )
            for kind, config in configs.items()
        }
        source = get_global_memory_pool() if upstream is None else upstream
        self._host = StatisticsAllocator(source)
        self._placer = Placer(self._host, numa)
        # Where nothing is ever placed, blocks take the shorter way.
        blocks = self._host if lightweight or self._placer.inactive else self._placer
        inspector = Inspector(poison=debug) if debug or not lightweight else None
        super().__init__(LeaseBook(blocks, caches, inspector), slow_path_only=enable_profiling)
        self._book.name = name
        self._book.device_pools = {} if device_pools else None
        if isinstance(source, MemoryPool):
            source.add_borrower(self._book)
        self._profile = self._book.profile = Profile(timeline=not lightweight) if enable_profiling else None
        self.watch_request: Callable[[Lease], None] | None = None  # sees each request while a step is learned
        self._strategies = dict.fromkeys(Strategy, 0)
        self._prepared_shapes: set[BufferRequest] = set()
        # Buffers may outlive the manager; the book then gives their memory back as they die.
        weakref.finalize(self, self._book.close).atexit = False

    def _strategy(self, kind: BufferType, nbytes: int) -> Strategy:
        config = self.configs[kind]
        return choose_strategy(config, nbytes, lightweight=self.lightweight, nodes=self._placer.choices)

    def _serve_request(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease | None]:
        if self._profile is None:
            tensor, slot = super()._serve_request(request, kind, zero)
        else:
            # torch's profiler shows these under its own operations.
            with torch.profiler.record_function(f"bufmgr::allocate {kind.value}"):
                started = time.perf_counter_ns()
                tensor, slot = super()._serve_request(request, kind, zero)
                nanoseconds = time.perf_counter_ns() - started
            serial = -1 if slot is None else slot.serial
            self._profile.note(kind, request.nbytes, nanoseconds, serial)
        scope = innermost_scope(self) if self.open_scopes else None
        if scope is not None and slot is not None:
            scope.add(tensor, slot)
        if self.watch_request is not None and slot is not None and slot.block is not None:
            self.watch_request(slot)
        if self.enable_preallocation and kind is BufferType.QUERY and len(request.shape) == 4:
            self._prepare_once(request)
        return tensor, slot

    def _make(self, request: BufferRequest, kind: BufferType, zero: bool) -> tuple[torch.Tensor, Lease]:
        config = self.configs[kind]
        pinned = config.pinned and request.device.type == "cpu" and torch.cuda.is_available()
        strategy = self._strategy(kind, request.nbytes)
        if request.device.type == "cpu" and request.nbytes and not pinned:
            self._strategies[strategy] += 1
            share = self._gauge.share_to_give_back()
            if share:
                self._book.shrink_caches()
                freed = self._book.give_back(int(self._book.free_bytes() * share))
                LOGGER.debug("cleanup: memory is short; gave back %d bytes", freed)
        bounds = block_bounds(strategy, request.nbytes)
        try:
            tensor, lease = self._book.lease(request, kind, bounds=bounds, zero=zero, pinned=pinned)
            if strategy is Strategy.NUMA_AWARE and lease.block is not None:
                self._placer.place(lease.block)
        except (MemoryError, torch.OutOfMemoryError) as error:
            tensor = None  # or the traceback would keep it in use
            error.add_note(self.memory_summary())
            raise
        lease.zeroes = config.zero_init
        return tensor, lease

    def _segments(self) -> list[dict[str, Any]]:
        source = self._host.upstream
        if isinstance(source, MemoryPool):
            return source.memory_snapshot()
        return source.snapshot() if isinstance(source, ArenaAllocator) else []

    def _prepare_once(self, request: BufferRequest) -> None:
        if request not in self._prepared_shapes:
            self._prepared_shapes.add(request)
            self._prepare(request, _PREALLOCATED_TYPES[1:])

    def _prepare(self, request: BufferRequest, kinds: Sequence[BufferType]) -> int:
        ready = 0
        if request.device.type == "cpu" and request.nbytes > 0:
            ready = self._put_free((kind, request.nbytes) for kind in kinds)
        LOGGER.debug("preallocation: %d of %d buffers of %s are ready", ready, len(kinds), request.describe())
        return ready

    def _put_free(self, requests: Iterable[tuple[BufferType, int]]) -> int:
        bounds = ((kind, block_bounds(self._strategy(kind, nbytes), nbytes)) for kind, nbytes in requests)
        return self._book.put_free((kind, size) for kind, (size, _) in bounds)

    def ready(self, requests: Iterable[tuple[BufferType, int]]) -> int:
        """Ready memory for requests of so many bytes, which may be in use at once; return how many have it. Types keep up to four times
        their max_cached_buffers for it, until memory gets short. Raises MemoryError.
        """
        requests = list(requests)
        for kind, count in Counter(kind for kind, _ in requests).items():
            self._book.caches[kind].widen(count)
        return self._put_free(requests)

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
        shape = [check_whole(name, size) for name, size in sizes.items()]
        return self._prepare(resolve_request(shape, dtype, device), _PREALLOCATED_TYPES)

    def clear_cache(self, type: BufferType | str | None = None) -> None:  # noqa: A002
        """Give the free memory of one type, or of all, back to the upstream. Buffers in use are not touched."""
        kind = None if type is None else parse_type(type)
        freed = self._book.clear(kind)
        LOGGER.debug("cleanup: %s gave back %d bytes", "all types" if kind is None else kind.name, freed)

    def check_valid(self) -> None:
        """Assert the invariants of caches, leases and counters; for tests."""
        self._book.check_valid()
