"""Block masks: planned in strides, restricted in strides, and never changed behind a plan's back."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.patterncache import (
    Affine,
    Band,
    BlockSparse,
    Dilated,
    Full,
    Listed,
    Pattern,
    Rectangle,
    Restrict,
    Span,
    Window,
    parse_pattern,
)
from longattn.patterncache.testing import block_sparse, check_pattern, patterns, rectangles

CHECKERS = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], bool)


def square(length: int, num_heads: int = 4) -> Rectangle:
    return Rectangle(num_heads, Span(0, length), Span(0, length))


def random_mask(*shape: int, density: float = 0.1) -> np.ndarray:
    mask = np.random.default_rng(0).random(shape) < density
    mask[..., np.arange(shape[-1]), np.arange(shape[-1])] = True
    return mask


@given(st.data(), rectangles())
def test_a_mask_per_head_keeps_every_promise(data: st.DataObject, rectangle: Rectangle):
    """Heads with masks of their own, alone and as a filter."""
    pattern = data.draw(block_sparse(rectangle.num_heads))
    check_pattern(pattern, rectangle)
    check_pattern(Restrict(data.draw(patterns(0)), pattern), rectangle)


@given(patterns(), block_sparse(), rectangles())
@example(Window(3, sinks=2), BlockSparse(2, np.tri(130, dtype=bool)), Rectangle(1, Span(3, 40, 5), Span(0, 30, 4)))
@example(Dilated((4,), (7,)), BlockSparse(1, np.ones((256, 256), bool), True), square(9))
@example(Dilated((6, 9), (2, 4), causal=True), BlockSparse(4, np.eye(64, dtype=bool)[::-1]), square(40))
def test_any_pattern_is_cut_into_blocks(pattern: Pattern, blocks: BlockSparse, rectangle: Rectangle):
    """Restrict(anything, BlockSparse), with block borders that fall anywhere."""
    check_pattern(Restrict(pattern, blocks), rectangle)


@given(block_sparse(), st.integers(1, 60), st.booleans(), rectangles())
def test_a_band_cuts_blocks(blocks: BlockSparse, size: int, causal: bool, rectangle: Rectangle):
    """Restrict(BlockSparse, Window), and twice: all bands left are uniform, so that one mask serves all tiles."""
    pattern = Restrict(Restrict(blocks, Window(size, causal=False)), Full(causal))
    check_pattern(pattern, rectangle)
    assert all(branch.uniform for branch in pattern.plan(rectangle).branches if branch.band)


def test_counts_written_out_by_hand():
    """Blocks of 2 over 5 positions: the last block is short; causal hides j > i inside the diagonal block too."""
    counts = BlockSparse(2, CHECKERS, causal=True).counts(square(5, 1))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(counts[0], expected)


def test_one_list_of_blocks_per_query_block():
    """Query blocks with as many key blocks share a branch, and each lists one number per key block."""
    plan = BlockSparse(4, CHECKERS[:2]).plan(Rectangle(2, Span(0, 8), Span(0, 12)))
    assert {(b.q.tiles, b.q.count, b.k.count) for b in plan.branches} == {(1, 4, 8), (1, 4, 4)}
    twice = next(b for b in plan.branches if b.k.count == 8)
    assert isinstance(twice.k, Listed) and twice.k.run == 4 and twice.k.starts.tolist() == [[0, 8]]
    assert plan.nbytes == 2 * 8


def test_the_diagonal_of_a_causal_mask_is_one_branch_of_triangles():
    """Past blocks are dense; the diagonal blocks stand first, affine and banded with one geometry."""
    plan = BlockSparse(16, random_mask(8, 8), causal=True).plan(square(128))
    diagonal, *past = plan.branches
    assert diagonal.band == Band(0, None) and diagonal.q == diagonal.k == Affine(0, 8, 16, 16, 1)
    assert all(branch.band is None for branch in past)


def test_neighbouring_blocks_are_one_run():
    """A lower triangle of blocks needs no list: each query block sees one run of keys."""
    plan = BlockSparse(16, np.tri(8, dtype=bool)).plan(square(128))
    assert plan.nbytes == 0 and len(plan.branches) == 8


def test_a_ragged_end_leaves_the_rest_in_blocks():
    """A short last block is a branch of its own; the whole blocks keep their runs."""
    plan = BlockSparse(16, random_mask(8, 8)).plan(square(121))
    assert {b.k.run for b in plan.branches if isinstance(b.k, Listed)} <= {16, 9}
    check_pattern(BlockSparse(16, random_mask(8, 8)), square(121))


@pytest.mark.parametrize(("causal", "most"), [(False, 90_000), (True, 50_000)])
def test_restricting_dilated_attention_holds_one_number_per_pair_of_blocks(causal: bool, most: int):
    """LongNet's 8192 tokens under 10 % of blocks of 64: no row list, a few tens of KB."""
    pattern = Restrict(Dilated((2048, 4096, 8192), (1, 2, 4), causal=causal), BlockSparse(64, random_mask(128, 128)))
    plan = pattern.plan(square(8192, 8))
    assert plan.nbytes <= most
    assert all(b.q.count > 1 and (isinstance(b.k, Affine) or b.k.run > 1) for b in plan.branches)


def test_the_plan_of_a_random_mask_holds_eight_bytes_per_block():
    """No padding: as many starts as allowed blocks at most, and a start per query tile at most."""
    mask = random_mask(256, 256)
    assert BlockSparse(64, mask).plan(square(256 * 64)).nbytes <= 8 * (mask.sum() + 256)


def test_heads_with_equal_masks_share_branches():
    """Evenly spaced heads are one strided span."""
    mask = np.stack([CHECKERS, ~CHECKERS, CHECKERS, ~CHECKERS])
    heads = {branch.heads for branch in BlockSparse(2, mask).plan(square(6)).branches}
    assert heads == {Span(0, 2, 2), Span(1, 2, 2)}


def test_a_mask_belongs_to_its_pattern():
    """Later writes to the caller's array are not seen, and nobody writes through the pattern."""
    mine = CHECKERS.copy()
    pattern = BlockSparse(2, mine)
    before, text = pattern.counts(square(6)), pattern.canonical()
    mine[:] = False
    np.testing.assert_array_equal(pattern.counts(square(6)), before)
    with pytest.raises(ValueError, match="read-only"):
        pattern.mask[0, 0] = False
    with pytest.raises(ValueError, match="WRITEABLE"):
        pattern.mask.flags.writeable = True
    assert pattern.canonical() == text == BlockSparse(2, CHECKERS).canonical()


@pytest.mark.parametrize("mask", [CHECKERS, CHECKERS[None], np.ones((1, 9), bool), random_mask(64, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_masks_are_equal_however_they_came(mask: np.ndarray, causal: bool):
    """Copies, lists, other memory orders, pickles, deep copies and strings are the same pattern with the same hash."""
    pattern = BlockSparse(3, mask, causal)
    same = (
        BlockSparse(np.int64(3), mask.tolist(), causal),
        BlockSparse(3, np.asfortranarray(mask), not causal).with_causal(causal),
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        parse_pattern(pattern.canonical()),
    )
    for other in same:
        assert other == pattern and hash(other) == hash(pattern) and other.canonical() == pattern.canonical()
        assert isinstance(other, BlockSparse) and not other.mask.flags.writeable
    others = (BlockSparse(2, mask, causal), BlockSparse(3, ~mask, causal), pattern.with_causal(not causal), Full())
    assert len({pattern, *others}) == 5 and not any(pattern == other for other in others)


def test_a_mask_of_torch_is_a_mask():
    """Tensors are array-likes."""
    torch = pytest.importorskip("torch")
    assert BlockSparse(2, torch.from_numpy(CHECKERS.copy())) == BlockSparse(2, CHECKERS)


def test_a_canonical_string_stays_small():
    """A million cells that follow a rule take a few KB; and a pattern prints in a line."""
    pattern = BlockSparse(64, np.tri(1024, dtype=bool))
    assert len(pattern.canonical()) < 8192
    assert repr(pattern) == "BlockSparse(block_size=64, mask=<(1024, 1024), 524800 of 1048576 True>, causal=False)"


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BlockSparse(0, CHECKERS), ValueError, "block_size must be an integer >= 1, got 0"),
        (lambda: BlockSparse(True, CHECKERS), TypeError, "block_size.*bool"),
        (lambda: BlockSparse(2.0, CHECKERS), TypeError, r"block_size.*got 2.0 \(float\)"),
        (lambda: BlockSparse("2", CHECKERS), TypeError, "block_size.*str"),
        (lambda: BlockSparse(2, CHECKERS.astype(int)), TypeError, "mask must be bool, got int64"),
        (lambda: BlockSparse(2, CHECKERS.astype(float).tolist()), TypeError, r"mask must be bool, got float64 \(list\)"),
        (lambda: BlockSparse(2, None), TypeError, "mask must be bool, got object"),
        (lambda: BlockSparse(2, [[True], [True, False]]), ValueError, "mask must be one array"),
        (lambda: BlockSparse(2, CHECKERS[0]), ValueError, r"mask must be .*got \(3,\)"),
        (lambda: BlockSparse(2, CHECKERS[None, None]), ValueError, r"mask must be .*got \(1, 1, 3, 3\)"),
        (lambda: BlockSparse(2, np.ones((0, 3), bool)), ValueError, "not empty"),
        (lambda: BlockSparse(2, np.ones((2, 3, 0), bool)), ValueError, "not empty"),
        (lambda: BlockSparse(2, CHECKERS, causal=1), TypeError, "causal must be True or False"),
        (lambda: parse_pattern('["block_sparse",{"block_size":1,"causal":false,"mask":"?","shape":[1,1]}]'), ValueError, "base64"),
        (lambda: parse_pattern(BlockSparse(2, CHECKERS).canonical().replace("[3,3]", "[9,9]")), ValueError, "81 bits"),
    ],
)  # fmt: skip
def test_a_bad_mask_is_named(build, error, words):
    """The message names the parameter, what was expected and what came."""
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("ask", [Pattern.plan, Pattern.counts])
@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: Restrict(Window(2), p), lambda p: Full() + p, lambda p: p & Full()]
)
@pytest.mark.parametrize(
    ("rectangle", "words"),
    [
        (
            Rectangle(2, Span(0, 7), Span(0, 6)),
            "queries must lie below 6, the length that mask .* covers .*got position 6",
        ),
        (Rectangle(2, Span(0, 2), (Span(0, 6), Span(3, 2, 4))), "keys must lie below 6.*got position 7"),
        (Rectangle(3, Span(0, 2), Span(0, 2)), "mask must have one entry per head, num_heads=3, got 2 heads"),
    ],
)
def test_a_rectangle_beyond_the_mask_is_refused(ask, wrap, rectangle: Rectangle, words: str):
    """Plans and counts refuse alike, within other patterns too."""
    with pytest.raises(ValueError, match=words):
        ask(wrap(BlockSparse(2, np.stack([CHECKERS] * 2))), rectangle)


def test_nothing_asked_beyond_the_mask_is_nothing_refused():
    """An empty span has no positions, wherever it starts."""
    assert BlockSparse(2, CHECKERS).plan(Rectangle(1, Span(100, 0), Span(0, 6))).empty
