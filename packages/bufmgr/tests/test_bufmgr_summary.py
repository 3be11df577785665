"""What a person reads when memory runs out: who holds it, how it is fragmented, and what to do."""

import pytest
import torch

from longattn.bufmgr import ArenaAllocator, AttentionBufferManager, BufferType, LimitingAllocator, MemoryPool

MIB = 2**20
SCORES = BufferType.SCORES


def test_a_manager_names_the_largest_holders():
    """Buffers of one kind are one line, the largest first, with the line that allocated them where that is known."""
    manager = AttentionBufferManager(upstream=MemoryPool(), debug=True)
    held = [manager.allocate(SCORES, (MIB,), torch.uint8) for _ in range(3)]
    small = manager.allocate("temp", (MIB // 2,), torch.uint8)
    text = manager.memory_summary()
    assert "in use: 3.50 MiB in 4 buffers, the largest holders:" in text
    lines = [line.strip() for line in text.splitlines()]
    first = next(index for index, line in enumerate(lines) if line.startswith("3.00 MiB"))
    assert lines[first].startswith(f"3.00 MiB in 3 of scores ({MIB},) uint8 on cpu, from ")
    assert "test_bufmgr_summary.py" in lines[first]
    assert lines[first + 1].startswith(f"0.50 MiB in 1 of temp ({MIB // 2},) uint8")
    assert (len(held), small.nbytes) == (3, MIB // 2)


def test_advice_fits_the_state():
    """Only what would help is said."""
    manager = AttentionBufferManager(upstream=MemoryPool())
    assert "what to do" not in manager.memory_summary()
    manager.allocate(SCORES, (MIB,), torch.uint8)
    text = manager.memory_summary()
    assert "clear_cache(), or empty_cache() of the pool, gives 1.00 MiB back" in text
    assert "deallocated" not in text
    held = manager.allocate(SCORES, (MIB,), torch.uint8)
    view = held[1:]
    manager.deallocate(held, SCORES)
    text = manager.memory_summary()
    assert "deallocated while a view, a second name or autograd referenced them: 1.00 MiB (buffers: 1)" in text
    assert "debug=True" in text and "clear_cache" not in text
    assert view.numel() == MIB - 1


def test_more_kinds_than_are_shown():
    manager = AttentionBufferManager()
    held = [manager.allocate("temp", (size,), torch.uint8) for size in range(1, 9)]
    assert f"and {len(held) - 5} other kinds of buffers" in manager.memory_summary()


def test_a_pool_reports_its_managers_and_its_arena():
    """Fragmentation is the number of free pieces and the largest of them."""
    arena = ArenaAllocator()
    pool = MemoryPool(arena)
    manager = AttentionBufferManager(upstream=pool)
    tensor = manager.allocate(SCORES, (MIB,), torch.uint8)
    blocks = [arena.allocate(MIB) for _ in range(4)]
    for index in (0, 2):
        arena.deallocate(blocks[index])
    text = pool.memory_summary()
    assert f"1.00 MiB in 1 of scores {tuple(tensor.shape)} uint8 on cpu" in text
    assert "arena: 2.00 MiB in 2 pieces, the largest 1.00 MiB" in text
    assert "arena: 2.00 MiB in 2 pieces" in manager.memory_summary()


@pytest.mark.parametrize("through", ["manager", "pool"])
def test_an_out_of_memory_error_carries_it(through: str):
    """The note, which a traceback shows, is the summary at that moment."""
    limited = LimitingAllocator(ArenaAllocator(), 3 * MIB)
    source = MemoryPool(limited) if through == "pool" else AttentionBufferManager(upstream=limited)
    held = source.empty((2 * MIB,), torch.uint8, "cpu", "scores")
    with pytest.raises(MemoryError, match="no memory for a SCORES buffer of shape") as caught:
        source.empty((2 * MIB + 1,), torch.uint8, "cpu", "scores")
    (note,) = caught.value.__notes__
    assert f"2.00 MiB in 1 of scores {tuple(held.shape)} uint8 on cpu" in note
    assert note == source.memory_summary()
