"""Slots: the short way hands out only what nobody sees, remembers nothing, and never more than the limits allow."""

import ctypes
import random
import threading
from typing import Any

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferConfig, BufferType, SystemAllocator
from longattn.bufmgr.leasing import guard
from longattn.bufmgr.leasing.guard import TAKEN, fresh_counts
from longattn.bufmgr.testing import FailingAllocator

TEMP, OUTPUT = BufferType.TEMP, BufferType.OUTPUT
SHAPE = (4, 8)


def test_a_dropped_buffer_comes_again_as_a_new_tensor():
    """Same memory, new handle: nothing that was done to the old one, except to its content, shows."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE).fill_(2.0)
    address = tensor.data_ptr()
    tensor.unsqueeze_(0).requires_grad_().mark = "mine"  # pyright: ignore[reportAttributeAccessIssue]
    tensor.sum().backward()
    del tensor
    again = manager.allocate(TEMP, SHAPE)
    assert (again.data_ptr(), again.shape, again.requires_grad, again.grad) == (address, SHAPE, False, None)
    assert not hasattr(again, "mark")
    assert manager.get_stats()["cache_hits"] == 1


@pytest.mark.parametrize("bad", [(4.0, 8), (True, 8), ("4", 8)])
def test_equal_keys_of_other_types_are_refused_after_a_hit_too(bad: Any):
    manager = AttentionBufferManager()
    for rows in (4, 1, 1):
        manager.allocate(TEMP, (rows, 8))
        manager.empty((rows, 8), torch.float32)
    with pytest.raises(TypeError, match=r"shape\[0\] must be a whole number"):
        manager.allocate(TEMP, bad)
    with pytest.raises(TypeError, match="zero_init"):
        manager.allocate(TEMP, SHAPE, zero_init=0)  # pyright: ignore[reportArgumentType]


def test_the_key_follows_torchs_defaults():
    """A default dtype or a device context that changed since the last hit is seen."""
    manager = AttentionBufferManager()
    for _ in range(2):
        assert manager.allocate(TEMP, SHAPE).dtype == torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert manager.allocate(TEMP, SHAPE).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert manager.allocate(TEMP, SHAPE).is_meta
        assert manager.empty(SHAPE, torch.float32).is_meta


def test_zeros_on_the_short_way():
    """OUTPUT is zero on every hit of `allocate`; `empty` leaves it, though both share the slot."""
    manager = AttentionBufferManager()
    for _ in range(3):
        assert not manager.allocate(OUTPUT, SHAPE).fill_(3.0).eq(0).any()
    assert not manager.allocate(OUTPUT, SHAPE).any()
    manager.allocate("output", SHAPE).fill_(5.0)
    assert manager.empty(SHAPE, torch.float32, role="output").unique().tolist() == [5.0]


@pytest.mark.parametrize("kind", [TEMP, OUTPUT])
def test_zeros_that_are_asked_for_or_declined_are_a_hit_too(kind: BufferType, monkeypatch: pytest.MonkeyPatch):
    """True and False overrule the type's own choice on the short way, None does not."""
    manager = AttentionBufferManager()
    manager.allocate(kind, SHAPE)
    monkeypatch.setattr(manager, "_serve", None)  # the long way
    for wanted, zeros in ((False, False), (True, True), (None, kind is OUTPUT), (False, False)):
        manager.allocate(kind, SHAPE).fill_(7.0)
        assert manager.allocate(kind, SHAPE, zero_init=wanted).unique().tolist() == [0.0 if zeros else 7.0]


@pytest.mark.parametrize("way", ["allocate", "empty", "acquire"])
def test_the_long_way_does_not_hold_a_slot_in_use(way: str, monkeypatch: pytest.MonkeyPatch):
    """Who finds a slot in use lets go of it first: else threads that wait would keep it from its next user."""
    manager = AttentionBufferManager()
    prepared = manager.prepare(TEMP, SHAPE)
    take = {
        "allocate": lambda: manager.allocate(TEMP, SHAPE),
        "empty": lambda: manager.empty(SHAPE, torch.float32),
        "acquire": prepared.acquire,
    }[way]
    take()
    held = take()
    (slot,) = manager._book.caches[TEMP].slots
    owners: list[int] = []
    serve = manager._serve_request
    monkeypatch.setattr(manager, "_serve_request", lambda *a: (owners.append(slot.owners.value), serve(*a))[1])
    assert take().data_ptr() != held.data_ptr()
    assert owners == [TAKEN]


def test_several_in_use_are_several_buffers():
    manager = AttentionBufferManager()
    for _ in range(3):
        held = [manager.allocate(TEMP, SHAPE).fill_(n) for n in range(15)]  # more than the limit of ten
        assert [tensor.unique().tolist() for tensor in held] == [[float(n)] for n in range(15)]
        assert manager.get_stats()["outstanding"] == 15
        manager.check_valid()
        held.clear()
    assert manager.get_stats()["cached_buffers"] == 10


def test_keys_do_not_pile_up():
    """Shapes that came once leave no trace beyond the limit."""
    manager = AttentionBufferManager({TEMP: BufferConfig(max_cached_buffers=3)})
    for n in range(1, 100):
        manager.allocate(TEMP, (n, 64))
    assert len(manager._slots) <= 3
    for _ in range(50):  # a key that goes from slot to slot
        held = [manager.allocate(TEMP, (8,)) for _ in range(2)]
        assert sum(len(slot.keys) for slot in manager._book.caches[TEMP].slots) <= 6
        del held
    manager.clear_cache()
    assert len(manager._slots) == 0


def test_prepared_slot():
    """`acquire` gives what allocate gives: a hit when the last one is gone, another buffer while it is not."""
    manager = AttentionBufferManager()
    slot = manager.prepare("output", SHAPE, torch.float32)
    first = slot.acquire().fill_(1.0)
    second = slot.acquire().fill_(2.0)
    assert (first.unique().tolist(), second.unique().tolist()) == ([1.0], [2.0])
    manager.deallocate(first, OUTPUT)
    address = second.data_ptr()
    del second
    third = slot.acquire()
    assert (third.data_ptr() == address, third.any().item()) == (True, False)
    manager.clear_cache()
    assert slot.acquire().shape == SHAPE
    with pytest.raises(ValueError, match="shape"):
        manager.prepare(TEMP, (-1,))
    manager.check_valid()


def test_slots_end_when_their_manager_does():
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    tensor = manager.allocate(TEMP, (256,), torch.uint8)
    manager.allocate(TEMP, (512,), torch.uint8)
    assert upstream.held_bytes == 768
    del manager
    assert upstream.held_bytes == 256
    del tensor
    assert upstream.held_bytes == 0


def test_without_counts_there_are_no_slots(monkeypatch: pytest.MonkeyPatch):
    """A free-threaded Python (its flag is faked here) has leases only; reuse works all the same."""
    monkeypatch.setattr("sys._is_gil_enabled", lambda: False, raising=False)
    monkeypatch.setattr("longattn.bufmgr.leasing.guard.fresh_counts", fresh_counts.__wrapped__)
    manager = AttentionBufferManager()
    manager.allocate(TEMP, SHAPE)
    manager.allocate(TEMP, SHAPE)
    assert (len(manager._slots), manager.get_stats()["cache_hits"]) == (0, 1)
    assert not manager._book.caches[TEMP].slots


@pytest.mark.parametrize("wrong", ["_OWNERS", "_OBJECT"])
def test_owners_that_are_not_where_torch_keeps_them_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch):
    """The word beside the storage is torch's own affair: read at another place, it fails the calibration."""
    assert fresh_counts.__wrapped__() is not None
    monkeypatch.setattr(f"longattn.bufmgr.leasing.guard.{wrong}", 16)
    assert fresh_counts.__wrapped__() is None


@pytest.mark.parametrize("has_object", [False, True])
def test_owners_that_torch_counts_otherwise_are_noticed(has_object: bool, monkeypatch: pytest.MonkeyPatch):
    """Of storages without a Python object, or of those with one, torch's own function says one more than the word beside the storage."""
    count = guard.storage_owners

    def other(address: int) -> int:
        flag = ctypes.c_uint32.from_address(address + guard._OBJECT).value & guard._HAS_OBJECT
        return count(address) + (bool(flag) == has_object)

    monkeypatch.setattr(guard, "storage_owners", other)
    assert fresh_counts.__wrapped__() is None


@pytest.mark.parametrize("field", guard.ReferenceCounts._fields)
def test_a_count_that_no_alias_raises_is_noticed(field: str, monkeypatch: pytest.MonkeyPatch):
    """Each of the four kinds of aliases must show in its own count: a version of torch where one does not is not trusted."""
    count = guard.count_all

    def constant(*arguments: Any) -> guard.ReferenceCounts:
        return count(*arguments)._replace(**{field: 7})

    monkeypatch.setattr(guard, "count_all", constant)
    assert fresh_counts.__wrapped__() is None


def test_a_storage_whose_python_object_is_kept_is_not_lent():
    """Asking for the storage makes it a Python object: while somebody has that, the slot is in use, and later it is not."""
    manager = AttentionBufferManager()
    address = manager.allocate(TEMP, SHAPE).data_ptr()
    storage = manager.allocate(TEMP, SHAPE).untyped_storage()
    assert storage.data_ptr() == address != manager.allocate(TEMP, SHAPE).data_ptr()
    assert not any(slot.is_free() for slot in manager._book.leases.values() if slot.address == storage._cdata)
    del storage
    slot = manager._slots[TEMP, SHAPE, torch.float32, None]
    for held in (slot, *manager._book.caches[TEMP].slots):
        assert held.is_free() and held.take() is not None
    # The slot that has the object for ever now is still found by its key.
    prepared = manager.prepare(TEMP, SHAPE)
    prepared.acquire().untyped_storage()
    at = {prepared.acquire().data_ptr() for _ in range(3)}
    assert (len(at), manager.get_stats()["cache_misses"]) == (1, 2)


def test_memory_moved_to_shared_memory_leaves_its_slot():
    """share_memory_ gives the storage other memory; the block is lent again, the slot is not."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(TEMP, SHAPE).fill_(4.0)
    tensor.share_memory_()
    other = manager.allocate(TEMP, SHAPE).fill_(5.0)
    assert tensor.unique().tolist() == [4.0]
    del tensor
    assert not manager.allocate(TEMP, SHAPE).is_shared()
    assert other.unique().tolist() == [5.0]
    manager.check_valid()


@pytest.mark.parametrize("through", ["keyed", "slot"])
def test_sixteen_threads_on_one_key(through: str):
    """No two of them ever hold one buffer: each finds its own mark after giving others time."""
    manager = AttentionBufferManager()
    slot = manager.prepare(TEMP, (2,), torch.float64)
    start, wrong = threading.Barrier(16), []

    def work(mark: float) -> None:
        start.wait()
        for turn in range(300):
            tensor = slot.acquire() if through == "slot" else manager.allocate(TEMP, (2,), torch.float64)
            tensor.fill_(mark)
            if tensor[1].item() != mark or tensor[0].item() != mark:
                wrong.append((mark, turn))

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    manager.check_valid()
    stats = manager.get_stats()
    assert (stats["outstanding"], stats["cache_hits"] + stats["cache_misses"]) == (0, 4800)


@pytest.mark.parametrize("through", ["keyed", "empty", "slot"])
@pytest.mark.parametrize("look", [lambda t: t[1:], lambda t: t.detach(), lambda t: t.untyped_storage(), lambda t: [t]])
def test_the_short_way_sees_every_watcher(look: Any, through: str):
    """Dropped but seen: the next buffer is another one; seen no more: it is the same again."""
    manager = AttentionBufferManager()
    prepared = manager.prepare(TEMP, SHAPE, torch.float32)

    def take() -> torch.Tensor:
        if through == "slot":
            return prepared.acquire()
        return manager.empty(SHAPE, torch.float32) if through == "empty" else manager.allocate(TEMP, SHAPE)

    for _ in range(3):
        take()
    tensor = take()
    address = tensor.data_ptr()
    watcher = look(tensor)
    del tensor
    other = take()
    assert other.data_ptr() != address
    del watcher
    assert take().data_ptr() == address


def test_slow_requests_are_counted_with_their_reason():
    """The first request has no slot; one beside a buffer in use meets its slot; a list as a shape is checked every time."""
    manager = AttentionBufferManager(upstream=SystemAllocator())

    def counts() -> tuple[int, int]:
        stats = manager.get_stats()
        assert stats["types"]["temp"]["slow_requests"] == stats["slow_requests"]
        return stats["slow_requests"], stats["slots_in_use"]

    first = manager.allocate(TEMP, (8, 4))
    assert counts() == (1, 0)
    manager.deallocate(first, TEMP)
    del first
    manager.allocate(TEMP, (8, 4))
    assert counts() == (1, 0)
    first, second = manager.allocate(TEMP, (8, 4)), manager.allocate(TEMP, (8, 4))
    assert counts() == (2, 1)
    del first, second
    manager.allocate(TEMP, [8, 4])
    assert counts() == (3, 1)
    slot = manager.prepare(TEMP, (8, 4))
    slot.acquire()
    slot.acquire()
    assert counts() == (4, 1)
    held = slot.acquire()
    assert slot.acquire().shape == held.shape
    assert counts() == (4, 2)  # the other buffer from before is free
    both = slot.acquire(), slot.acquire()
    assert len({tensor.data_ptr() for tensor in (held, *both)}) == 3
    assert counts() == (5, 3)


@pytest.mark.parametrize("through", ["keyed", "empty", "slot"])
@pytest.mark.parametrize("order", ["first taken first", "last taken first", "random"])
def test_several_of_one_request_never_take_the_slow_path_again(order: str, through: str):
    """As many as the type keeps, given back in any order: zeros where they are promised, every one apart, no request slow."""
    manager = AttentionBufferManager(upstream=SystemAllocator())
    prepared = manager.prepare(OUTPUT, SHAPE, torch.float32)
    take = {
        "keyed": lambda: manager.allocate(OUTPUT, SHAPE, torch.float32),
        "empty": lambda: manager.empty(SHAPE, torch.float32, role="output"),
        "slot": prepared.acquire,
    }[through]
    rng = random.Random(0)
    slow = 0
    for turn in range(20):
        held = [take() for _ in range(10)]
        assert through == "empty" or not any(tensor.any() for tensor in held)
        assert len({tensor.fill_(1.0).data_ptr() for tensor in held}) == 10
        slow = slow or manager.get_stats()["slow_requests"]
        places = {"first taken first": 0, "last taken first": -1}
        while held:
            place = places.get(order, rng.randrange(len(held)))
            if turn % 2:
                manager.deallocate(held.pop(place), OUTPUT)
            else:
                del held[place]
    assert (manager.get_stats()["slow_requests"], manager.get_stats()["cache_misses"]) == (slow, 10)
    manager.check_valid()


def test_a_key_that_leads_to_another_slot_goes_with_it():
    """One request in two forms has a slot for each; a form that meets its slot in use is known to the other one, which takes it along."""
    manager = AttentionBufferManager(upstream=SystemAllocator())
    held = manager.allocate(TEMP, SHAPE, torch.float32)
    manager.allocate(TEMP, SHAPE, torch.float32, "cpu")
    assert manager.allocate(TEMP, SHAPE, torch.float32).data_ptr() != held.data_ptr()
    assert manager.get_stats()["cache_misses"] == 2
    del held
    manager.clear_cache()
    assert len(manager._slots) == 0


def test_a_request_that_meets_its_slot_in_use_is_checked_no_less():
    """The key of the slot in use stands for checked arguments; what only equals it is checked anew."""
    manager = AttentionBufferManager(upstream=SystemAllocator())
    held = manager.allocate(TEMP, (2, 1))
    with pytest.raises(TypeError, match=r"shape\[1\] must be a whole number"):
        manager.allocate(TEMP, (2, True))
    with pytest.raises(TypeError, match=r"shape\[0\] must be a whole number"):
        manager.allocate(TEMP, (2.0, 1))  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        assert manager.allocate(TEMP, (2, 1)).device.type == "meta"
    assert manager.allocate(TEMP, (2, 1)).data_ptr() != held.data_ptr()


def test_over_the_limit_the_slot_used_longest_ago_is_closed_first():
    """Of slots in use: what is closed is an ordinary lease, and the others are still slots."""
    manager = AttentionBufferManager({TEMP: BufferConfig(max_cached_buffers=3)})
    held = [manager.allocate(TEMP, (n, 8)) for n in (1, 2, 3, 4)]
    slots = [lease for lease in manager._book.leases.values() if lease.is_slot]
    assert sorted(lease.request.shape for lease in slots) == [(2, 8), (3, 8), (4, 8)] and len(held) == 4


def test_a_lease_ends_with_the_last_owner_of_its_memory():
    manager = AttentionBufferManager(enable_reuse=False)
    tensor = manager.allocate(TEMP, SHAPE)
    view = tensor[0]
    (lease,) = manager._book.leases.values()
    del tensor
    assert not lease.ended
    del view
    assert lease.ended
