"""What a debugging manager adds: the call that allocated each buffer, how often its memory was lent, and poison.

Poison is 0xFF in every byte: NaN for floating dtypes, -1 for integers, True for bool. It is written when memory
comes back and checked before the memory is lent again, which shows a write in between, such as one through a raw pointer.
Both steps touch every byte, so debugging is slow.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch

from longattn.bufmgr.leasing.cache import BlockCache
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.memory.allocator import POISON, Block, block_bytes, fill_with_poison

_PACKAGE = str(PurePath(__file__).parent.parent) + os.sep


@dataclass(frozen=True)
class LeaseNote:
    """One loan: `serial` counts all of a manager's, `generation` those of this piece of memory, from 1; `site` is
    "file:line in function" of the call.
    """

    serial: int
    generation: int
    site: str

    def __str__(self) -> str:
        return f"lease {self.serial}, generation {self.generation} of its memory, from {self.site}"


@dataclass(frozen=True)
class OutstandingBuffer:
    """A buffer in use. `note` is set with `debug`; `released`: it was given back while something else referenced it."""

    type: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    released: bool
    note: LeaseNote | None


def describe_lease(lease: Lease) -> OutstandingBuffer:
    """Return the record of a lease."""
    request = lease.request
    note = lease.note if isinstance(lease.note, LeaseNote) else None
    return OutstandingBuffer(
        lease.kind.value, request.shape, request.dtype, request.device, request.nbytes, lease.released, note
    )


class Inspector:
    """Records loans, poisons memory that comes back, and checks the poison before memory is lent again.

    poison: whether to do the latter two.
    """

    def __init__(self, *, poison: bool) -> None:
        self._poison = poison
        self._serials = itertools.count(1)

    def note(self, lease: Lease) -> None:
        """Note the caller of the manager, and the generation of the memory."""
        generation = 1
        if lease.block is not None:
            lease.block.loans += 1
            generation = lease.block.loans
        lease.note = LeaseNote(next(self._serials), generation, _call_site())

    def poison(self, block: Block) -> None:
        """Write over memory that came back."""
        if self._poison:
            fill_with_poison(block)

    def check_poison(self, block: Block) -> None:
        """Raise RuntimeError if memory was written to after it came back. Fresh memory has no loans and is not checked."""
        if self._poison and block.loans and not bool((block_bytes(block) == POISON).all()):
            raise RuntimeError(
                f"a block of {block.nbytes} bytes was written to after it came back from its loan number {block.loans}"
            )


def _call_site() -> str:
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def check_leases(living: Sequence[Lease], index: Mapping[int, Lease], caches: Sequence[BlockCache]) -> None:
    """Assert that caches are valid, that the index holds exactly the living leases, each under its storage's address,
    that no block is free twice or both free and leased, and that the caches' slots are the leases that are slots.
    """
    for cache in caches:
        cache.check_valid()
    assert set(living) == set(index.values())
    assert all(index[lease.address] is lease for lease in living)
    leased = [id(lease.block) for lease in living if lease.block is not None and not lease.is_free()]
    free = [id(block) for cache in caches for block in cache.blocks()]
    assert len(set(leased + free)) == len(leased) + len(free)
    slots = {slot for cache in caches for slot in cache.slots}
    assert slots == {lease for lease in living if lease.is_slot}
