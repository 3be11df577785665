"""What must be true of a book of leases at any moment, for tests and for whoever looks for a mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longattn.bufmgr.cache import BlockCache
from longattn.bufmgr.lease import Lease


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
