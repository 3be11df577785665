"""Free blocks kept for reuse: bounded in count and bytes, evicting exactly the least recently used.

The life of a block here:
1. `put` makes it the most recently used; while the shelf is over a limit, the least recently used leaves.
2. `take(size)` removes and returns the most recently used block of exactly that size (its pages are the warmest).
3. `clear` or `put` returns it to the caller as evicted; giving it to the upstream is the caller's work.
The shelf takes no lock and calls nobody: its owner does both.
"""

from __future__ import annotations

from collections import OrderedDict

from longattn.bufmgr.allocator import Block


class LruShelf:
    """Free blocks in order of use.

    max_buffers: most blocks kept. max_bytes: most bytes kept; a larger block is evicted as it is put.
    """

    def __init__(self, max_buffers: int, max_bytes: int) -> None:
        self.max_buffers = max_buffers
        self.max_bytes = max_bytes
        self.evictions = 0
        self._nbytes = 0
        self._by_age: OrderedDict[int, Block] = OrderedDict()  # serial -> block, least recently used first
        self._by_size: dict[int, OrderedDict[int, None]] = {}  # size -> serials, same order
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def nbytes(self) -> int:
        """Bytes of free blocks kept now."""
        return self._nbytes

    def holds(self, size: int) -> bool:
        """Return whether `take(size)` would find a block."""
        return size in self._by_size

    def take(self, size: int) -> Block | None:
        """Remove and return the most recently used block of exactly `size` bytes, or None."""
        serials = self._by_size.get(size)
        if serials is None:
            return None
        return self._remove(next(reversed(serials)))

    def put(self, block: Block) -> list[Block]:
        """Keep a free block and return the blocks that had to leave, the least recently used first."""
        if self.max_buffers == 0:  # nothing is ever kept here, so nothing was evicted
            return [block]
        if block.nbytes > self.max_bytes:
            self.evictions += 1
            return [block]
        serial = self._next_serial
        self._next_serial += 1
        self._by_age[serial] = block
        self._by_size.setdefault(block.nbytes, OrderedDict())[serial] = None
        self._nbytes += block.nbytes
        evicted = []
        while len(self._by_age) > self.max_buffers or self._nbytes > self.max_bytes:
            evicted.append(self._remove(next(iter(self._by_age))))
        self.evictions += len(evicted)
        return evicted

    def blocks(self) -> list[Block]:
        """Return the free blocks, the least recently used first."""
        return list(self._by_age.values())

    def clear(self) -> list[Block]:
        """Return every block, the least recently used first, and keep none."""
        blocks = self.blocks()
        self._by_age.clear()
        self._by_size.clear()
        self._nbytes = 0
        return blocks

    def _remove(self, serial: int) -> Block:
        block = self._by_age.pop(serial)
        serials = self._by_size[block.nbytes]
        del serials[serial]
        if not serials:
            del self._by_size[block.nbytes]
        self._nbytes -= block.nbytes
        return block

    def check_valid(self) -> None:
        """Assert the invariants: both indexes hold the same blocks, the sum is right, the limits hold."""
        assert len(self._by_age) <= self.max_buffers
        assert self._nbytes == sum(block.nbytes for block in self._by_age.values()) <= self.max_bytes
        assert list(self._by_age) == sorted(self._by_age)
        by_size = {serial: size for size, serials in self._by_size.items() for serial in serials}
        assert by_size == {serial: block.nbytes for serial, block in self._by_age.items()}
        assert len({id(block) for block in self._by_age.values()}) == len(self._by_age)
