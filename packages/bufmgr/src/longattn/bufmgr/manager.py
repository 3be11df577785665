"""AttentionBufferManager: typed, reusable buffers over the process-wide pool."""

# torch's compiling flag is read at every call, where its public function would cost one more.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from sys import getrefcount

import torch
from torch import compiler, get_default_dtype

from longattn.bufmgr.checks import check_flag, check_kind
from longattn.bufmgr.leasing.guard import TAKEN
from longattn.bufmgr.leasing.scope import BufferScope
from longattn.bufmgr.leasing.slots import PreparedSlot, has_only_ints, traced_as
from longattn.bufmgr.memory.allocator import Allocator, check_upstream
from longattn.bufmgr.memory.pressure import Cleanup, check_cleanup
from longattn.bufmgr.numa.placement import check_policy
from longattn.bufmgr.numa.system_calls import Policy
from longattn.bufmgr.request import function_modes, resolve_request
from longattn.bufmgr.serving import RequestServer
from longattn.bufmgr.spec import BufferConfig, BufferType, merge_configs, parse_type
from longattn.bufmgr.strategy import Strategy


class AttentionBufferManager(RequestServer):
    """Leases buffers by type and reuses their memory when nothing references it any more.

    Args:
        custom_configs: rows that replace those of DEFAULT_CONFIGS. Default none.
        enable_reuse: keep returned memory, within the type's limits. Default True.
        enable_preallocation: the first QUERY buffer of a (batch, seq, heads, head_dim) also readies KEY, VALUE and OUTPUT
            of that shape. Default False.
        enable_profiling: get_stats() has a `profile` entry. Default False.
        lightweight: safety, plain counters and the two fast strategies (strategy.py). Default True. False adds call sites
            (`outstanding`), a timeline and the other strategies, and has no slots.
        upstream: where blocks come from. Default: the global memory pool.
        cleanup: how soon free memory goes back when memory gets short, "adaptive" (default) or "aggressive" (pressure.py).
        debug: call sites, and poison over memory that came back (debug.py). Slow. Default False.
        numa: where Strategy.NUMA_AWARE puts pages, "prefer" (default: the node of the thread that allocates, while it has room),
            "bind" (only there) or "interleave" (round all nodes). Inactive on one node, and with lightweight; `get_stats` says so.
        name: whose manager this is, a module's name say; `MemoryPool.accounts` lists managers by it. Default "".
        adaptive_cache: raise a type's max_cached_buffers, up to four times, as misses show that it is too low, and set it back when
            memory gets short. max_cached_mb stays. Default False.
        device_pools: buffers on CUDA come from a torch.cuda.MemPool of this manager, one a device, so that their memory is apart from that
            of other tensors and counted alone (get_stats). Default False.

    Host memory is recycled here. On an accelerator torch's caching allocator recycles; there, on "meta" and for size
    zero the manager adds types, checks and counts. Inside torch.compile and CUDA-graph capture it steps aside. Safe to
    use from any thread. A copy, pickled ones included, has the same options, no buffers, and counters at zero::

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
        cleanup: Cleanup = "adaptive",
        debug: bool = False,
        numa: Policy = "prefer",
        name: str = "",
        adaptive_cache: bool = False,
        device_pools: bool = False,
    ) -> None:
        flags = {
            "enable_reuse": enable_reuse,
            "enable_preallocation": enable_preallocation,
            "enable_profiling": enable_profiling,
            "lightweight": lightweight,
            "debug": debug,
            "adaptive_cache": adaptive_cache,
            "device_pools": device_pools,
        }
        for flag, value in flags.items():
            check_flag(flag, value)
        if upstream is not None:
            check_upstream(upstream)
        check_policy(numa, "numa")
        check_kind("name", name, str, "a string")
        super().__init__(
            merge_configs(custom_configs),
            upstream=upstream,
            cleanup=check_cleanup(cleanup),
            numa=numa,
            name=name,
            **flags,
        )

    def __reduce__(self) -> tuple[Callable[..., AttentionBufferManager], tuple[dict[BufferType, BufferConfig]]]:
        names = (
            "enable_reuse",
            "enable_preallocation",
            "enable_profiling",
            "lightweight",
            "cleanup",
            "debug",
            "numa",
            "name",
            "adaptive_cache",
            "device_pools",
        )
        options = {name: getattr(self, name) for name in names}
        return functools.partial(type(self), upstream=self._upstream, **options), (dict(self.configs),)

    @property
    def cleanup(self) -> Cleanup:
        """How soon free memory goes back when memory gets short."""
        return self._gauge.cleanup

    @property
    def numa(self) -> Policy:
        """Where the strategy NUMA_AWARE puts pages."""
        return self._placer.policy

    def _allocate_in_graph(
        self,
        type: BufferType | str,  # noqa: A002
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        zero_init: bool | None = None,
    ) -> torch.Tensor:
        zero = self.configs[parse_type(type)].zero_init if zero_init is None else zero_init
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)

    def _deallocate_in_graph(self, tensor: torch.Tensor, type: BufferType | str) -> None:  # noqa: A002
        pass

    @traced_as(_allocate_in_graph)
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

        Raises TypeError or ValueError naming the parameter, MemoryError for sizes that are not to be had (the accelerator's
        own torch.OutOfMemoryError there). After an error nothing is leased.
        """
        if compiler._is_compiling_flag:
            return self._allocate_in_graph(type, shape, dtype, device, zero_init)
        if zero_init is None or zero_init.__class__ is bool:  # the fast path of SlotTable.empty, with zeros
            key = (type, shape, get_default_dtype() if dtype is None else dtype, device)
            try:
                slot = self._slots[key]
            except (KeyError, TypeError):  # no such key; a list, or no shape at all, cannot be hashed
                pass
            else:
                if (shape is slot.seen_shape or has_only_ints(shape, slot)) and (
                    device is not None or not function_modes()
                ):
                    handle = slot.master.data
                    if slot.owners.value == TAKEN or slot.has_one_handle():
                        slot.handle_id = id(handle)
                        clock = slot.clock
                        clock.now = slot.used = clock.now + 1
                        if slot.zeroes if zero_init is None else zero_init:
                            handle.zero_()
                        return handle
                    del handle  # or this thread would keep the slot in use while it looks for another
                    handle = self._take_sibling(slot, key)
                    if handle is not None:
                        if slot.zeroes if zero_init is None else zero_init:
                            handle.zero_()
                        return handle
        kind = parse_type(type)
        if zero_init is None:
            zero_init = self.configs[kind].zero_init
        else:
            check_kind("zero_init", zero_init, bool, "True, False or None")
        return self._serve(kind, type, shape, dtype, device, zero_init)

    def allocate_like(
        self,
        type: BufferType | str,  # noqa: A002
        tensor: torch.Tensor,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        zero_init: bool | None = None,
    ) -> torch.Tensor:
        """Return a contiguous buffer of a tensor's shape; dtype and device are the tensor's unless given.

        Raises what `allocate` raises, and TypeError for what is no tensor.
        """
        check_kind("tensor", tensor, torch.Tensor, "a tensor")
        if tensor.is_nested:
            raise TypeError("tensor must have whole numbers as sizes, got a nested tensor")
        dtype, device = tensor.dtype if dtype is None else dtype, tensor.device if device is None else device
        return self.allocate(type, tensor.shape, dtype, device, zero_init)

    @traced_as(_deallocate_in_graph)
    def deallocate(self, tensor: torch.Tensor, type: BufferType | str) -> None:  # noqa: A002
        """Give a buffer back under the type it was allocated as.

        If nothing but the caller's own reference uses it, the tensor becomes empty (shape (0,)) and its memory is free
        at once. If a view, another name, a numpy array or autograd references it too, the tensor stays as it is, and the
        memory returns when the last of them dies. Dropping every reference without this call returns it as well.

        Raises ValueError for a view, a tensor from elsewhere, another type and a second release; TypeError for no tensor.
        """
        if compiler._is_compiling_flag:
            return
        kind = type if isinstance(type, BufferType) else parse_type(type)
        self._book.release(tensor, kind, getrefcount(tensor))

    def prepare(
        self,
        type: BufferType | str,  # noqa: A002
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        zero_init: bool | None = None,
    ) -> PreparedSlot:
        """Check a request now and return an object that hands out its buffers, faster than `allocate` does.

        The arguments are those of `allocate`, and so are the errors; the defaults of dtype and device are those of this moment.
        """
        kind = parse_type(type)
        if zero_init is not None:
            check_kind("zero_init", zero_init, bool, "True, False or None")
        zero = self.configs[kind].zero_init if zero_init is None else zero_init
        return PreparedSlot(self, resolve_request(shape, dtype, device), kind, zero)

    def scope(self) -> BufferScope:
        """Return a context: what is allocated inside is deallocated at its end (see BufferScope)."""
        return BufferScope(self)

    def strategy(self, type: BufferType | str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Strategy:  # noqa: A002
        """Return how a request for host memory would be served; see strategy.py."""
        return self._strategy(parse_type(type), resolve_request(shape, dtype, "cpu").nbytes)


def create_attention_buffer_manager(
    enable_reuse: bool = True,
    enable_preallocation: bool = False,
    lightweight: bool = True,
    enable_profiling: bool = False,
    custom_configs: Mapping[BufferType, BufferConfig] | None = None,
    *,
    upstream: Allocator | None = None,
    cleanup: Cleanup = "adaptive",
    debug: bool = False,
    numa: Policy = "prefer",
    name: str = "",
    adaptive_cache: bool = False,
    device_pools: bool = False,
) -> AttentionBufferManager:
    """Return a manager; the arguments are those of AttentionBufferManager."""
    return AttentionBufferManager(
        custom_configs,
        enable_reuse,
        enable_preallocation,
        enable_profiling,
        lightweight,
        upstream=upstream,
        cleanup=cleanup,
        debug=debug,
        numa=numa,
        name=name,
        adaptive_cache=adaptive_cache,
        device_pools=device_pools,
    )
