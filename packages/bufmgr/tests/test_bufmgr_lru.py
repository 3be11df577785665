"""The shelf of free blocks against a plain list."""

from hypothesis import given
from hypothesis import strategies as st

from longattn.bufmgr import Block
from longattn.bufmgr.lru import LruShelf


def block(nbytes: int) -> Block:
    return Block(memoryview(bytearray(nbytes)), zeroed=True)


@given(
    st.integers(0, 4),
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from(["put", "put", "take", "clear"]), st.integers(1, 6)), max_size=60),
)
def test_shelf_is_a_bounded_list(max_buffers: int, max_bytes: int, steps: list[tuple[str, int]]):
    """Whatever is done, the shelf holds, returns and evicts exactly what a list in order of use does."""
    shelf, model = LruShelf(max_buffers, max_bytes), list[Block]()
    for step, size in steps:
        if step == "put":
            new = block(size)
            gone = []
            if max_buffers == 0 or size > max_bytes:
                gone = [new]
            else:
                model.append(new)
                while len(model) > max_buffers or sum(b.nbytes for b in model) > max_bytes:
                    gone.append(model.pop(0))
            assert shelf.put(new) == gone
        elif step == "take":
            fitting = [b for b in model if b.nbytes == size]
            assert shelf.holds(size) == bool(fitting)
            assert shelf.take(size) is (fitting[-1] if fitting else None)
            model = [b for b in model if not fitting or b is not fitting[-1]]
        else:
            assert shelf.clear() == model
            model = []
        assert shelf.blocks() == model
        assert (len(shelf), shelf.nbytes) == (len(model), sum(b.nbytes for b in model))
        shelf.check_valid()
