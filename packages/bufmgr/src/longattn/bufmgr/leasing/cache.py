"""Free memory kept for reuse, bounded in count and bytes, evicting exactly the least recently used.

The life of a block here:
1. `put` stamps it as the latest used; `take` removes and returns the latest used one of the wanted size, which is most
   likely in the processor's caches.
2. A lease may be kept open as a slot (`add_slot`): it keeps its block, in use or free, until it is closed.
3. Over a limit, the oldest slots in use are closed first: they become ordinary leases, which costs no memory. Then the
   free block or slot that was used longest ago is evicted. A slot is used when it is handed out and when it is released.
Slots in use count towards the limits, because they become free without a call. So free memory is bounded at every moment.
4. The sizes of what the limit of buffers evicted last are remembered, three times as many as the limit. A miss of such a size is one
   that a larger cache would have served: it is counted, and a cache that adapts raises its limit by one for it.
This module takes no lock and calls no upstream; the cache's owner does both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from operator import attrgetter, index

from longattn.bufmgr.leasing.guard import FREE
from longattn.bufmgr.leasing.lease import Lease, UseCounter
from longattn.bufmgr.memory.allocator import Block

_used = attrgetter("used")
_MOST_GROWTH = 4  # a cache that adapts keeps at most so many times the buffers of its policy
_MOST_SIZES = 4096


class BlockCache:
    """Free blocks and slots of one type (or of all types, in a pool).

    max_buffers: most blocks and slots kept. max_bytes: most bytes of them; a larger block is not kept. adapts: raise
    max_buffers, up to four times, as misses show that it is too low; `shrink` sets it back.
    """

    def __init__(self, max_buffers: int, max_bytes: int, *, adapts: bool) -> None:
        self.max_buffers = max_buffers
        self.max_bytes = max_bytes
        self.limit_misses = 0
        self._adapts = adapts
        self._policy_buffers = max_buffers
        self._evicted_sizes: deque[int] = deque(maxlen=min((_MOST_GROWTH - 1) * index(max_buffers), _MOST_SIZES))
        self.evictions = 0
        self.slots: list[Lease] = []
        self.nbytes = 0
        self.clock = UseCounter()
        self._own_stamps = 0
        self._blocks: dict[int, Block] = {}  # stamp -> block, least recently used first

    def stamp(self) -> int:
        """Count a use that is no slot's hit; return its stamp."""
        self._own_stamps += 1
        self.clock.now += 1
        return self.clock.now

    @property
    def slot_hits(self) -> int:
        """How often slots were handed out again so far."""
        return self.clock.now - self._own_stamps

    def free_slots(self) -> list[Lease]:
        """Return the free slots, the least recently used first."""
        return sorted((slot for slot in self.slots if slot.is_free()), key=_used)

    def blocks(self) -> list[Block]:
        """Return what is free, slots included, the least recently used first."""
        stamped = [(slot.used, slot.block) for slot in self.free_slots()] + list(self._blocks.items())
        return [block for _, block in sorted(stamped, key=lambda pair: pair[0]) if block is not None]

    def free_bytes(self, least: int = 0) -> int:
        """Return the bytes of what is free, slots included, in blocks of `least` bytes or more."""
        return sum(block.nbytes for block in self.blocks() if block.nbytes >= least)

    def admits(self, size: int) -> bool:
        """Return whether a block of `size` bytes would be kept at all."""
        return self.max_buffers > 0 and size <= self.max_bytes

    def count_free(self, size: int) -> int:
        """Return how many free blocks of exactly `size` bytes are here."""
        return sum(block.nbytes == size for block in self.blocks())

    def widen(self, buffers: int) -> None:
        """Raise the limit to so many buffers, at most to four times the policy's; `shrink` sets it back."""
        self.max_buffers = max(self.max_buffers, min(buffers, _MOST_GROWTH * self._policy_buffers))

    def take(self, size: int, most: int, settle: Callable[[], None]) -> Block | None:
        """Remove and return the latest used free block of `size` bytes, else the smallest of up to `most`, or None.

        If no block outside a slot fits, a fitting free slot is closed; `settle` must then bring its block to `put`.
        """
        block = self._take_block(size, most)
        if block is None:
            fitting = [slot for slot in self.slots if slot.block is not None and size <= slot.block.nbytes <= most]
            for slot in sorted(fitting, key=_used, reverse=True):
                if slot.is_free():
                    self.close_slot(slot)
                    settle()
                    block = self._take_block(size, most)
                    if block is not None:
                        break
        return block

    def _take_block(self, size: int, most: int) -> Block | None:
        fitting = [(block.nbytes, -stamp) for stamp, block in self._blocks.items() if size <= block.nbytes <= most]
        if not fitting:
            return None
        return self._remove(-min(fitting)[1])

    def note_miss(self, size: int) -> None:
        """Count a miss of a size that the limit of buffers evicted not long ago, and raise the limit if the cache adapts."""
        if size in self._evicted_sizes:
            self._evicted_sizes.remove(size)
            self.limit_misses += 1
            if self._adapts and self.max_buffers < _MOST_GROWTH * self._policy_buffers:
                self.max_buffers += 1

    def shrink(self) -> list[Block]:
        """Set the limit back to the policy's; return the blocks that are evicted for it."""
        self.max_buffers = self._policy_buffers
        return self.trim()

    def put(self, block: Block) -> list[Block]:
        """Keep a free block; return the blocks that are evicted for it."""
        if self.max_buffers == 0:  # nothing is ever kept here, so nothing was evicted
            return [block]
        if block.nbytes > self.max_bytes:
            self.evictions += 1
            return [block]
        self._blocks[self.stamp()] = block
        self.nbytes += block.nbytes
        return self.trim()

    def add_slot(self, lease: Lease) -> list[Block]:
        """Keep a lease open as a slot; return the blocks that are evicted for it."""
        assert lease.block is not None
        lease.used = self.stamp()
        alike = (slot for slot in self.slots if slot.nbytes == lease.nbytes and slot.serves(lease.request, lease.kind))
        first = next(alike, None)
        lease.siblings = deque[Lease]() if first is None else first.siblings
        lease.siblings.append(lease)
        self.slots.append(lease)
        self.nbytes += lease.block.nbytes
        return self.trim()

    def close_slot(self, slot: Lease) -> None:
        """Turn a slot into an ordinary lease. If it was free, it ends now."""
        if slot in self.slots:
            assert slot.block is not None
            self.slots.remove(slot)
            self.nbytes -= slot.block.nbytes
        slot.close_slot()

    def trim(self) -> list[Block]:
        """Evict until the limits hold; return the evicted blocks. (A slot's block returns as its lease ends.)"""
        evicted: list[Block] = []
        while len(self._blocks) + len(self.slots) > self.max_buffers or self.nbytes > self.max_bytes:
            over_count = self.nbytes <= self.max_bytes
            in_use = [slot for slot in self.slots if slot.owners.value != FREE and not slot.is_free()]
            if in_use:
                self.close_slot(min(in_use, key=_used))
            else:
                before = self.nbytes
                evicted += self.evict_oldest()
                self.evictions += 1
                if over_count:
                    self._evicted_sizes.append(before - self.nbytes)
        return evicted

    def evict_oldest(self, least: int = 0) -> list[Block]:
        """Evict the least recently used free block or slot of `least` bytes or more; return it if it is a block.

        A slot's block returns as its lease ends.
        """
        in_order = sorted(self.slots, key=_used)
        slot = next((s for s in in_order if s.block is not None and s.block.nbytes >= least and s.is_free()), None)
        oldest = next((stamp for stamp, block in self._blocks.items() if block.nbytes >= least), None)
        if slot is not None and (oldest is None or slot.used < oldest):
            slot.keep = False
            self.close_slot(slot)
        elif oldest is not None:
            return [self._remove(oldest)]
        return []

    def clear(self, *, close_all: bool = False) -> list[Block]:
        """Evict everything that is free; with `close_all`, also close the slots in use."""
        blocks = list(self._blocks.values())
        self.nbytes -= sum(block.nbytes for block in blocks)
        self._blocks.clear()
        for slot in list(self.slots):
            free = slot.is_free()
            if free or close_all:
                slot.keep = slot.keep and not free
                self.close_slot(slot)
        return blocks

    def _remove(self, stamp: int) -> Block:
        block = self._blocks.pop(stamp)
        self.nbytes -= block.nbytes
        return block

    def check_valid(self) -> None:
        """Assert the invariants: the sum is right, the limits hold, stamps are in order and of the past."""
        blocks = list(self._blocks.values())
        assert len(blocks) + len(self.slots) <= self.max_buffers
        slotted = [slot.block for slot in self.slots if slot.block is not None]
        assert self.nbytes == sum(block.nbytes for block in blocks + slotted) <= self.max_bytes
        assert list(self._blocks) == sorted(self._blocks)
        assert all(slot.is_slot and not slot.ended for slot in self.slots)
        assert all(stamp <= self.clock.now for stamp in [*self._blocks, *(slot.used for slot in self.slots)])
        assert len({id(block) for block in blocks + slotted}) == len(blocks) + len(slotted)
