"""Plans that look at single pairs, and masks that are compared pair by pair, say what that costs before they do much of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.patterncache import (
    BlockSparse,
    Dilated,
    Documents,
    Full,
    HierarchicalBlocks,
    Pattern,
    Periodic,
    Rectangle,
    Restrict,
    Span,
    Window,
    from_mask_mod,
)

LIMIT = "longattn.patterncache.planning.limits.MOST_PAIRS"
CELLS = "longattn.patterncache.interop.mask_answers.MOST_CELLS"
LISTING = HierarchicalBlocks(2, 2, 2) | HierarchicalBlocks(3, 2, 3)


def square(length, num_heads=1):
    return Rectangle(num_heads, Span(0, length), Span(0, length))


def three_masks(period):
    """Block masks whose borders never meet, within one another: every run of keys is cut again."""
    masks = [BlockSparse(size, np.indices((period // size + 1,) * 2).sum(axis=0) % 3 > 0) for size in (5, 7, 11)]
    return Restrict(Restrict(*masks[:2]), masks[2])


@pytest.mark.parametrize("pattern", [LISTING, Documents([0, 40], LISTING), LISTING + Full(), three_masks(40)], ids=str)
def test_a_plan_of_too_many_pairs_says_what_it_would_cost(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """An error that names limit, cost and way out; the same plan where it is allowed, by argument or by environment."""
    expected = pattern.counts(square(40))
    assert (pattern.plan(square(40)).counts() == expected).all()
    monkeypatch.setattr(LIMIT, 50)
    with pytest.raises(
        ValueError, match=r'at most 50 .* got at least \d+: about .* listed="allow".* LONGATTN_LISTED=allow'
    ):
        pattern.plan(square(40))
    assert (pattern.plan(square(40), listed="allow").counts() == expected).all()
    monkeypatch.setenv("LONGATTN_LISTED", "allow")
    assert (pattern.plan(square(40)).counts() == expected).all()
    with pytest.raises(ValueError, match="at most 50"):
        pattern.plan(square(40), listed="limit")


@pytest.mark.timeout(60)
def test_the_error_comes_before_the_work():
    """Days of listing are refused at once."""
    for pattern in (LISTING, LISTING + Full(), Documents([0, 1 << 20], LISTING)):
        with pytest.raises(ValueError, match="looked at one by one"):
            pattern.plan(square(1 << 20, 8))


def test_runs_that_masks_cut_again_count_more(monkeypatch: pytest.MonkeyPatch):
    """Three masks within one another are beyond a limit that one mask of as many cells is far below."""
    nested = three_masks(400)
    monkeypatch.setattr(LIMIT, 400 * 400)
    for alone in (nested.a.a, nested.a.b, nested.b):
        alone.plan(square(400))
    with pytest.raises(ValueError, match="looked at one by one"):
        nested.plan(square(400))


def test_a_plan_within_a_plan_is_allowed_what_the_outer_one_is(monkeypatch: pytest.MonkeyPatch):
    """A pattern of one's own may plan another; the answer counts for both."""

    class Borrowing(Pattern):
        causal = False

        def count(self, h, i, j, num_heads):
            return LISTING.count(h, i, j, num_heads)

        def branches(self, rectangle):
            yield from LISTING.plan(rectangle).branches

        def with_causal(self, causal):
            return self

        def to_spec(self):
            return {}

        @classmethod
        def from_spec(cls, spec):
            return cls()

    monkeypatch.setattr(LIMIT, 50)
    assert (Borrowing().plan(square(20), listed="allow").counts() == LISTING.counts(square(20))).all()
    with pytest.raises(ValueError, match="at most 50"):
        Borrowing().plan(square(20))


@pytest.mark.parametrize(
    "pattern", [Window(9, sinks=3), Dilated((64, 256), (1, 4)), BlockSparse(4, np.ones((16, 16), bool))]
)
def test_strides_are_not_limited(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """No pair of a strided plan is looked at; of a block mask those of its cells."""
    monkeypatch.setattr(LIMIT, 256)
    assert (pattern.plan(square(64)).counts() == pattern.counts(square(64))).all()


def test_another_value_is_named(monkeypatch: pytest.MonkeyPatch):
    """By argument always, by environment where it would decide."""
    with pytest.raises(ValueError, match=r"listed must be one of \('limit', 'allow'\), got 'always'"):
        Full().plan(square(4), listed="always")
    with pytest.raises(ValueError, match=r"listed must be one of"):
        from_mask_mod(lambda b, h, q, k: q >= k, 8, listed="no")
    monkeypatch.setenv("LONGATTN_LISTED", "yes")
    monkeypatch.setattr(LIMIT, 50)
    Full().plan(square(4))
    with pytest.raises(ValueError, match=r"LONGATTN_LISTED must be one of \('limit', 'allow'\), got 'yes'"):
        LISTING.plan(square(40))


@pytest.mark.parametrize(
    ("mask_mod", "looks", "expected"),
    [
        (lambda b, h, q, k: (q >= k) & (q - k < 5), r"what looks like Window\(size=5.* 0\.0 GiB", Window(5)),
        (lambda b, h, q, k: (q >= k) & (k % 7 < q % 5 + 1), "an arbitrary mask takes about", None),
    ],
)
def test_a_large_mask_says_what_it_will_cost(mask_mod, looks, expected, monkeypatch: pytest.MonkeyPatch):
    """And what it looks like; allowed, it is the same pattern as ever."""
    small = from_mask_mod(mask_mod, 60)
    monkeypatch.setattr(CELLS, 1000)
    with pytest.raises(ValueError, match=rf"at most 1000 .* 3600\. Comparing all of {looks}.*listed=\"allow\""):
        from_mask_mod(mask_mod, 60)
    assert small == from_mask_mod(mask_mod, 60, listed="allow")
    assert expected is None or small == expected
    monkeypatch.setenv("LONGATTN_LISTED", "allow")
    assert small == from_mask_mod(mask_mod, 60)


def test_a_large_mask_costs_nothing_before_it_is_refused():
    """A million tokens: some looks at each, and the answer."""
    asked = 0

    def mask_mod(b, h, q, k):
        nonlocal asked
        asked += np.broadcast(q, k).size
        return (q >= k) & (q - k < 100)

    with pytest.raises(ValueError, match=r"looks like Window\(size=100"):
        from_mask_mod(mask_mod, 1 << 20)
    assert asked < 100 << 20


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=2 * settings().max_examples)
def test_blocks_are_the_largest_that_say_a_mask(length, num_heads, size, causal, seed):
    """As trying every size from the largest on has it, causal or not."""
    blocks = np.random.default_rng(seed).random((num_heads, 40 // size, 40 // size)) < 0.6
    shown = blocks.repeat(size, axis=1).repeat(size, axis=2)[:, :length, :length]
    shown = shown & np.tri(length, dtype=bool) if causal else shown
    got = from_mask_mod(lambda b, h, q, k: shown[h, q, k], length, num_heads)
    if not isinstance(got, BlockSparse):
        assert isinstance(got, (Full, Window, Periodic, Documents))
        return
    for trial in (128, 64, 32, 16, 8, 4, 2, 1):
        corner = shown[:, ::trial, ::trial]
        some = np.logical_or.reduceat(
            np.logical_or.reduceat(shown, np.arange(0, length, trial), axis=1), np.arange(0, length, trial), axis=2
        )
        assert corner.shape == some.shape
        for is_causal in (False, True):
            candidate = BlockSparse(trial, some, causal=is_causal)
            if (candidate.counts(square(length, num_heads)) == shown).all():
                assert (got.block_size, got.causal) == (trial, is_causal)
                assert got == candidate
                return
