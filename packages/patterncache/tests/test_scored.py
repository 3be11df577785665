"""Block masks chosen by scores: what is chosen, both kinds of lists, and that nothing waits for the device."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import BlockSparse, Rectangle, Span

torch = pytest.importorskip("torch")


def scores_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans(), st.integers(1, 9))
def test_topk_takes_the_best_legal_blocks(seed, heads, q_blocks, k_blocks, causal, topk):
    """As a loop over rows would."""
    scores = scores_of(seed, heads, q_blocks, k_blocks)
    scores[:, :, 0] = -torch.inf
    found = BlockSparse.from_scores(scores, 4, topk=topk, causal=causal, keep_diagonal=False).mask
    for head, row in np.ndindex(heads, q_blocks):
        legal = [k for k in range(1, k_blocks) if not causal or k <= row]
        best = sorted(legal, key=lambda k: -scores[head, row, k].item())[:topk]
        assert torch.nonzero(found[head, row])[:, 0].tolist() == sorted(best)


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 1), st.booleans())
def test_topp_takes_the_fewest_that_reach_the_share(seed, q_blocks, k_blocks, topp, causal):
    """One block less would not do."""
    scores = scores_of(seed, q_blocks, k_blocks) * 3
    found = BlockSparse.from_scores(scores, 4, topp=topp, causal=causal, keep_diagonal=False).mask
    for row in range(q_blocks):
        weight = scores[row].clone()
        if causal:
            weight[row + 1 :] = -torch.inf
        weight = weight.softmax(-1)
        chosen = weight[found[row]].sort().values
        assert chosen.sum() >= topp - 1e-5 and chosen.numel() and chosen[1:].sum() < topp + 1e-5
        assert not causal or not found[row, row + 1 :].any()


@given(st.integers(0, 99), st.sampled_from([(3, 5, 5), (6, 6)]), st.booleans())
def test_lists_are_the_mask_both_ways(seed, shape, causal):
    """number[a] blocks, ascending, at the head of each row; the transposed ones are those of the transposed mask."""
    chosen = BlockSparse.from_scores(scores_of(seed, *shape), 4, topk=2, causal=causal)
    assert torch.diagonal(chosen.mask, dim1=-2, dim2=-1).all()
    for mask, (number, indices) in ((chosen.mask, chosen.forward_lists), (chosen.mask.mT, chosen.transposed_lists)):
        assert number.dtype == indices.dtype == torch.int32
        for at in np.ndindex(*mask.shape[:-1]):
            assert indices[at][: number[at]].tolist() == torch.nonzero(mask[at])[:, 0].tolist()


@pytest.mark.parametrize("choice", [{"topk": 3}, {"topp": 0.7}])
@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 8)])
def test_nothing_looks_at_a_value(choice, shape):
    """With tensors that have no values at all, which raise when asked for one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        chosen = BlockSparse.from_scores(torch.empty(shape), 16, causal=True, **choice)
        assert chosen.forward_lists[1].shape == chosen.transposed_lists[1].shape == shape
        chosen.to_block_mask(120)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_chosen_is_a_pattern_and_a_block_mask(causal):
    """Both show the same."""
    chosen = BlockSparse.from_scores(scores_of(0, 2, 4, 4), 8, topk=2, causal=causal)
    pattern = chosen.pattern()
    assert pattern == BlockSparse(8, chosen.mask.numpy(), causal)
    counts = pattern.counts(Rectangle(2, Span(0, 30), Span(0, 30)))
    mask = chosen.to_block_mask(30)
    dense = mask.to_dense()[0].numpy().astype(bool).repeat(8, -1).repeat(8, -2)[:, :30, :30]
    i, j = torch.arange(30)[:, None], torch.arange(30)
    np.testing.assert_array_equal(dense & mask.mask_mod(0, 0, i, j).numpy(), counts > 0)


@pytest.mark.parametrize(
    ("scores", "options", "error", "words"),
    [
        (np.ones((2, 2)), {"topk": 1}, TypeError, "scores must be a floating tensor"),
        (torch.ones(2, 2, dtype=torch.int64), {"topk": 1}, TypeError, "scores must be a floating tensor"),
        (torch.ones(2), {"topk": 1}, ValueError, "scores must be (q_blocks, k_blocks)"),
        (torch.ones(2, 2), {}, ValueError, "topk (or topp) must be given"),
        (torch.ones(2, 2), {"topk": 1, "topp": 0.5}, ValueError, "not both"),
        (torch.ones(2, 2), {"topk": 0}, ValueError, "topk must be an integer >= 1"),
        (torch.ones(2, 2), {"topp": 0}, ValueError, "topp must be in (0, 1], got 0"),
        (torch.ones(2, 2), {"topp": "all"}, TypeError, "topp must be a number"),
    ],
)
def test_a_bad_value_is_named(scores, options, error, words):
    """The message names the parameter."""
    with pytest.raises(error, match=re.escape(words)):
        BlockSparse.from_scores(scores, 4, **options)


def test_a_length_that_ends_elsewhere_is_refused():
    """A BlockMask has a length; the scores have blocks."""
    chosen = BlockSparse.from_scores(torch.ones(4, 4), 8, topk=1)
    with pytest.raises(ValueError, match="N must end in the last of"):
        chosen.to_block_mask(24)
