"""The arena: best fit, coalescing, and a bound on what is held, against a plain list of what must be there."""

import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.bufmgr import ArenaAllocator, AttentionBufferManager, Block, BufferType, MemoryPool
from longattn.bufmgr.memory import segment
from longattn.bufmgr.memory.allocator import private_mapping
from longattn.bufmgr.testing import check_allocator

MIB = 2**20


def fill(block: Block, value: int) -> None:
    torch.frombuffer(block.memory, dtype=torch.uint8).fill_(value)


def is_full_of(block: Block, value: int) -> bool:
    return bool((torch.frombuffer(block.memory, dtype=torch.uint8) == value).all())


def test_conforms():
    check_allocator(ArenaAllocator)
    check_allocator(lambda: ArenaAllocator(floor_bytes=0))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=40))
def test_against_a_list_of_blocks(steps: list[tuple[bool, int]]):
    """Blocks never overlap, fresh ones that claim zeros are zeros, and held memory stays within 2 % of the peak."""
    arena = ArenaAllocator(floor_bytes=0)
    held: list[tuple[Block, int]] = []
    peak = 0
    for turn, (give, size) in enumerate(steps):
        if give and held:
            block, value = held.pop(size % len(held))
            assert is_full_of(block, value)
            arena.deallocate(block)
        else:
            block = arena.allocate(size * 65536)
            assert not block.zeroed or is_full_of(block, 0)
            fill(block, turn % 200 + 1)
            held.append((block, turn % 200 + 1))
        peak = max(peak, sum(block.nbytes for block, _ in held))
        assert sum(block.nbytes for block, _ in held) == arena.in_use
        assert arena.held_bytes <= peak * 1.02
        arena.check_valid()
    assert all(is_full_of(block, value) for block, value in held)


def test_neighbours_that_come_back_serve_a_larger_block():
    """Three blocks of 1 MiB, given back in any order, are the place of one of 3 MiB: no new page is touched."""
    arena = ArenaAllocator()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        blocks = [arena.allocate(MIB) for _ in range(3)]
        for index in order:
            arena.deallocate(blocks[index])
        held = arena.held_bytes
        large = arena.allocate(3 * MIB)
        assert arena.held_bytes == held == 3 * MIB
        assert not large.zeroed
        arena.deallocate(large)


def test_best_fit():
    """Of two holes the tighter one is taken."""
    arena = ArenaAllocator()
    blocks = [arena.allocate(size * MIB) for size in (4, 1, 2, 1)]
    fill(blocks[2], 7)
    for index in (0, 2):
        arena.deallocate(blocks[index])
    assert is_full_of(arena.allocate(2 * MIB), 7)


def test_trim_gives_pages_back_and_unmaps():
    arena = ArenaAllocator()
    kept, gone = arena.allocate(MIB), arena.allocate(8 * MIB)
    fill(gone, 9)
    arena.deallocate(gone)
    assert (arena.dirty_bytes, arena.trim(), arena.dirty_bytes) == (8 * MIB, 8 * MIB, 0)
    again = arena.allocate(8 * MIB)
    assert again.zeroed and is_full_of(again, 0)
    arena.deallocate(again)
    arena.deallocate(kept)
    arena.trim()
    assert (arena.held_bytes, arena.mapped_bytes) == (0, 0)


def test_limit():
    arena = ArenaAllocator(limit_bytes=4 * MIB)
    block = arena.allocate(3 * MIB)
    with pytest.raises(MemoryError, match="would pass the limit of 4194304"):
        arena.allocate(2 * MIB)
    arena.deallocate(block)
    assert arena.allocate(4 * MIB).nbytes == 4 * MIB


def test_snapshot_tells_the_blocks():
    arena = ArenaAllocator()
    first, second = arena.allocate(MIB), arena.allocate(MIB)
    arena.deallocate(first)
    (segment,) = arena.snapshot()
    states = [(block["size"], block["state"]) for block in segment["blocks"]]
    assert states[:2] == [(MIB, "inactive"), (second.nbytes, "active_allocated")]


def test_buffers_over_one_segment_are_storages_of_their_own():
    """Views of one base would share a version counter; these do not, and each can be emptied."""
    manager = AttentionBufferManager(upstream=MemoryPool())
    x = torch.ones(2**18, requires_grad=True)
    first, second = (manager.allocate(BufferType.TEMP, (2**18,)).fill_(1.5) for _ in range(2))
    y = (x * first).sum()
    second.zero_()
    y.backward()
    assert x.grad is not None and x.grad.unique().tolist() == [1.5]


def test_caches_of_all_managers_give_before_the_system_does():
    """What one manager keeps for reuse becomes another's memory, before new pages are touched."""
    pool = MemoryPool(ArenaAllocator(floor_bytes=0))
    first, second = (AttentionBufferManager(upstream=pool) for _ in range(2))
    first.allocate(BufferType.SCORES, (2 * MIB,), torch.uint8)
    second.allocate(BufferType.KEY, (MIB,), torch.uint8)
    assert pool.get_stats()["arena"]["in_use"] == MIB
    assert (first.get_stats()["cached_bytes"], second.get_stats()["cached_bytes"]) == (0, MIB)
    pool.check_valid()


@pytest.mark.parametrize("seed", range(3))
def test_retained_memory_on_seeded_traces(seed: int):
    """Varying lengths through a manager: at no time is 10 % more held than was ever in use at once."""
    rng = random.Random(seed)
    pool = MemoryPool(ArenaAllocator(floor_bytes=0))
    manager = AttentionBufferManager(upstream=pool)
    peak = worst = 0
    for _ in range(60):
        length = rng.randrange(256, 2049)
        step = [manager.allocate(kind, (length, 8, 64)) for kind in ("query", "key", "value", "output")]
        step += [manager.allocate("scores", (length, rng.randrange(64, 512)))]
        rng.shuffle(step)
        peak = max(peak, sum(tensor.nbytes for tensor in step))
        stats = pool.get_stats()["arena"]
        worst = max(worst, stats["in_use"] + stats["dirty"])
        step.clear()
    assert worst <= 1.1 * peak


@pytest.mark.parametrize("first", [0, 6])
def test_the_end_of_a_run_that_needs_fewer_new_pages(first: int):
    """Two dirty pages at either end of eight: they are the place of a block of two, which takes no clean page."""
    page = segment.PAGE
    own = segment.Segment(private_mapping(8 * page), 8 * page)
    own.take(first * page, 2 * page)
    own.give(first * page, 2 * page)
    assert own.fit(2 * page) == (0, 8 * page, first * page) and own.fit(3 * page) == (
        page,
        8 * page,
        (5 if first else 0) * page,
    )
    assert own.fit(8 * page) == (6 * page, 8 * page, 0) and own.fit(9 * page) is None
    own.check_valid()


def refuse_mappings(monkeypatch: pytest.MonkeyPatch, allowed: list[int]) -> list[int]:
    """Let the system map only as much as the next entry of `allowed` says; return what was asked for."""
    asked: list[int] = []

    def mapping(nbytes: int):
        asked.append(nbytes)
        if nbytes > allowed[min(len(asked), len(allowed)) - 1]:
            raise OSError("refused on purpose")
        return private_mapping(nbytes)

    monkeypatch.setattr("longattn.bufmgr.memory.arena.private_mapping", mapping)
    return asked


def test_a_refused_mapping_leaves_free_segments_unmapped(monkeypatch: pytest.MonkeyPatch):
    """What is free as a whole goes back to the system; what is in use stays as it was, and is served from later."""
    refuse_mappings(monkeypatch, [MIB, 0, 0, MIB, 0])
    monkeypatch.setattr("longattn.bufmgr.memory.arena._SEGMENT_BYTES", MIB)
    arena = ArenaAllocator()
    kept = arena.allocate(MIB // 2)
    fill(kept, 3)
    other = arena.allocate(MIB // 4)
    fill(other, 4)
    arena.deallocate(other)
    with pytest.raises(MemoryError, match=f"the system refused {2 * MIB} bytes .*, after giving back {MIB // 4}"):
        arena.allocate(2 * MIB)
    assert (arena.mapped_bytes, arena.in_use, arena.dirty_bytes) == (MIB, MIB // 2, 0)
    assert is_full_of(kept, 3)
    again = arena.allocate(MIB // 4)
    assert again.zeroed and is_full_of(again, 0)
    arena.deallocate(again)
    arena.deallocate(kept)
    with pytest.raises(MemoryError, match=f"after giving back {3 * MIB // 4}"):
        arena.allocate(2 * MIB)
    assert (arena.mapped_bytes, arena.held_bytes) == (0, 0)
    arena.check_valid()


def test_a_mapping_that_fits_after_segments_were_unmapped(monkeypatch: pytest.MonkeyPatch):
    """A third try, after free segments went back, is made before the request is refused."""
    asked = refuse_mappings(monkeypatch, [MIB, MIB, 0, 2 * MIB])
    monkeypatch.setattr("longattn.bufmgr.memory.arena._SEGMENT_BYTES", MIB)
    arena = ArenaAllocator()
    arena.deallocate(arena.allocate(MIB))
    kept = arena.allocate(MIB)
    arena.deallocate(kept)
    large = arena.allocate(2 * MIB)
    fill(large, 5)
    assert (arena.mapped_bytes, arena.in_use, len(asked)) == (2 * MIB, 2 * MIB, 4)
    arena.check_valid()


def test_pages_that_the_system_would_not_clear_stay_dirty(monkeypatch: pytest.MonkeyPatch):
    """Where MADV_DONTNEED keeps the content (macOS), nothing is called clean, and no block claims zeros."""
    assert segment.DROPS_PAGES == (sys.platform == "linux")
    monkeypatch.setattr(segment, "DROPS_PAGES", False)
    arena = ArenaAllocator(floor_bytes=0)
    kept, other = arena.allocate(MIB), arena.allocate(MIB)
    fill(other, 6)
    arena.deallocate(other)
    assert (arena.trim(), arena.dirty_bytes) == (0, MIB)
    again = arena.allocate(MIB)
    assert not again.zeroed and is_full_of(again, 6)
    assert kept.nbytes == MIB
    arena.check_valid()


def flags_of(block: Block) -> list[str]:
    """The kernel's flags of the mapping that a block lies in."""
    address = torch.frombuffer(block.memory, dtype=torch.uint8).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        first, *rest = line.split()
        if "-" in first:
            low, high = (int(number, 16) for number in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return rest
    return []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="flags of mappings are Linux's")
@pytest.mark.parametrize(("huge_pages", "expected"), [(True, ["hg"]), (False, ["nh"]), (None, [])])
def test_huge_pages_are_asked_for_or_against(huge_pages: bool | None, expected: list[str]):
    """Or the system decides."""
    flags = flags_of(ArenaAllocator(huge_pages=huge_pages).allocate(MIB))
    if "rd" not in flags:
        pytest.skip("this kernel shows no flags of mappings")
    assert [flag for flag in flags if flag in ("hg", "nh")] == expected
