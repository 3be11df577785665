"""Sequences of different lengths: packed, jagged, and padded on the left."""

import pytest
import torch

from longattn.attention import Ring, pattern_attention
from longattn.attention.schedules.documents import documents_of, query_spans
from longattn.attention.sequences.varlen import aligned_attention, jagged_attention
from longattn.patterncache import BlockLayout, Dilated, Full, Span, Window

PATTERNS = {
    "full": Full(causal=True),
    "dilated": Dilated((4, 8), (1, 2), causal=True),
    "dilated both ways": Dilated((4, 8), (1, 2)),
    "window": Window(3, sinks=1),
    "blocks": BlockLayout("bigbird", 4, 0.3, 4, 1, causal=True),
}


def attention(q, k, v, **options):
    """Out and lse."""
    return pattern_attention(q, k, v, return_lse=True, **options)


def tensors(*shape, count=3):
    """Random, float64, with gradients."""
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("nq", [13, 5, 1])
def test_left_padding_is_as_if_it_were_not_there(name, nq):
    """Out, lse and gradients of each element are those of its own tokens alone; padded queries see nothing."""
    starts, lengths = torch.tensor([4, 0, 13, 4, 9]), 13
    (q,), (k, v) = tensors(5, nq, 2, 8, count=1), tensors(5, lengths, 2, 8, count=2)
    with torch.no_grad():
        for b, start in enumerate(starts):
            k[b, :start] = v[b, :start] = float("nan")
    out, lse = aligned_attention(attention, q, k, v, starts, pattern=PATTERNS[name])
    grads = torch.autograd.grad(out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), (q, k, v))
    for b, start in enumerate(starts.tolist()):
        hidden = max(0, min(nq, start - (lengths - nq)))
        assert not out[b, :hidden].any() and (lse[b, :hidden] == -torch.inf).all()
        if hidden == nq:
            continue
        alone = [q[b : b + 1, hidden:], k[b : b + 1, start:], v[b : b + 1, start:]]
        expected, expected_lse = attention(*alone, pattern=PATTERNS[name])
        torch.testing.assert_close((out[b, hidden:], lse[b, hidden:]), (expected[0], expected_lse[0]))
        loss = expected.square().sum() + expected_lse.masked_fill(expected_lse == -torch.inf, 0).sum()
        for found, whole in zip(torch.autograd.grad(loss, (q, k, v)), grads, strict=True):
            torch.testing.assert_close(whole[b], found[b])


def test_queries_beside_padded_keys_are_not_padding():
    """Cross attention: `Full()` with q_start=0 hides padded keys and no query, as the mask of padding does."""
    (q,), (k, v) = tensors(2, 6, 2, 8, count=1), tensors(2, 9, 2, 8, count=2)
    starts = torch.tensor([4, 0])
    hidden = torch.arange(9) < starts[:, None]
    for options in ({"pattern": Full()}, {"pattern": Full(causal=True), "is_causal": False}):
        found = attention(q, k, v, positions_start=starts, q_start=0, **options)
        torch.testing.assert_close(found, attention(q, k, v, key_padding_mask=hidden, **options))
    out, lse = attention(q, k, v, pattern=Full(causal=True), positions_start=starts, q_start=0)
    assert not out[0, :4].any() and (lse[0, :4] == -torch.inf).all()


def test_left_padding_takes_masks_and_a_place():
    """attention_mask, key_padding_mask and q_start count rows as they stand."""
    q, k, v = tensors(2, 9, 2, 8)
    mask, holes = torch.rand(2, 1, 9, 9) > 0.3, torch.rand(2, 9) > 0.8
    starts = torch.tensor([3, 0])
    options = {"pattern": PATTERNS["dilated"]}
    found, _ = aligned_attention(attention, q, k, v, starts, attention_mask=mask, key_padding_mask=holes, **options)
    expected, _ = attention(
        q[:1, 3:], k[:1, 3:], v[:1, 3:], attention_mask=mask[:1, :, 3:, 3:], key_padding_mask=holes[:1, 3:], **options
    )
    torch.testing.assert_close(found[0, 3:], expected[0])
    middle, _ = aligned_attention(attention, q[:, 4:6], k, v, starts, q_start=4, **options)
    whole, _ = aligned_attention(attention, q, k, v, starts, **options)
    torch.testing.assert_close(middle, whole[:, 4:6])
    bias = torch.randn(9, dtype=torch.float64)
    biased, _ = aligned_attention(attention, q, k, v, starts, attention_mask=bias, **options)
    expected, _ = attention(q[:1, 3:], k[:1, 3:], v[:1, 3:], attention_mask=bias[3:], **options)
    torch.testing.assert_close(biased[0, 3:], expected[0])


@pytest.mark.parametrize("name", PATTERNS)
def test_jagged_is_each_sequence_alone(name):
    """Out, lse and gradients, an empty sequence included."""
    lengths = (5, 0, 9, 1)
    singles = [tensors(n, 2, 8) for n in lengths]
    nested = [
        torch.nested.nested_tensor([s[at].detach() for s in singles], layout=torch.jagged, requires_grad=True)
        for at in range(3)
    ]
    out, lse = jagged_attention(attention, *nested, pattern=PATTERNS[name])
    assert out.layout is torch.jagged and out.shape[2:] == (2, 8)
    out.values().square().sum().backward()
    at = 0
    for n, single in zip(lengths, singles, strict=True):
        if not n:
            continue
        expected, expected_lse = attention(*(x[None] for x in single), pattern=PATTERNS[name])
        torch.testing.assert_close(out.values()[at : at + n], expected[0])
        torch.testing.assert_close(lse.values()[at : at + n], expected_lse[0])
        for tensor, whole in zip(single, nested, strict=True):
            torch.testing.assert_close(
                whole.grad.values()[at : at + n],
                torch.autograd.grad(expected.square().sum(), tensor, retain_graph=True)[0],
            )
        at += n


def test_packed_queries_are_the_last_of_their_documents():
    """As positions, empty documents included."""
    assert query_spans((0, 2, 2, 5), (0, 4, 7, 10)) == (Span(2, 2), Span(7, 0), Span(7, 3))
    assert documents_of(Full(), torch.tensor([0, 3, 5]), 5).cu_seqlens == (0, 3, 5)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("schedule", [None, Ring(size=3, layout="zigzag")], ids=str)
def test_packed_documents_are_each_alone(name, schedule):
    """Positions restart; also with queries that are the last of each document's, and on a ring."""
    q, k, v = tensors(1, 15, 2, 8)
    cu = torch.tensor([0, 4, 4, 13, 15])
    out, lse = attention(q, k, v, pattern=PATTERNS[name], cu_seqlens=cu, schedule=schedule)
    for low, high in ((0, 4), (4, 13), (13, 15)):
        expected = attention(*(x[:, low:high] for x in (q, k, v)), pattern=PATTERNS[name])
        torch.testing.assert_close((out[:, low:high], lse[:, low:high]), expected)
    if schedule is None:
        rows = [2, 3, 10, 11, 12, 14]
        late, _ = attention(q[:, rows], k, v, pattern=PATTERNS[name], cu_seqlens=cu, cu_seqlens_q=[0, 2, 2, 5, 6])
        torch.testing.assert_close(late, out[:, rows])
        torch.testing.assert_close(
            torch.autograd.grad(late.square().sum(), k), torch.autograd.grad(out[:, rows].square().sum(), k)
        )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    "ends", [{"cu_seqlens": [0, 5, 5, 13]}, {"cu_seqlens": [0, 5, 5, 13], "cu_seqlens_q": [0, 2, 2, 6]}]
)
def test_documents_under_a_ring(layout, ends):
    """Borders of documents and of shards cut each other as they like; queries may be the last of each document."""
    (q,), (k, v) = tensors(1, ends.get("cu_seqlens_q", [13])[-1], 2, 8, count=1), tensors(1, 13, 2, 8, count=2)
    results = []
    for schedule in (Ring(size=3, layout=layout), None):
        out, lse = attention(q, k, v, pattern=PATTERNS["dilated"], schedule=schedule, **ends)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.rand(3, 2, 9, 13) > 0.3}, {"q_start": 2}])
def test_padding_left_in_its_place_is_padding_cut_off(options):
    """What is computed with every row in its place, as with dropout, is what is computed without the padding; sinks and holes too."""
    (q,), (k, v) = tensors(3, 9, 2, 8, count=1), tensors(3, 13, 2, 8, count=2)
    starts, holes = torch.tensor([7, 0, 4]), torch.rand(3, 13) > 0.8
    options = {
        "pattern": PATTERNS["dilated"],
        "key_padding_mask": holes,
        "sink_logits": torch.randn(2).double(),
    } | options
    results = []
    for rate in (0.0, 1e-12):  # So small that nothing is dropped.
        out, lse = attention(q, k, v, positions_start=starts, dropout_p=rate, seed=1, **options)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        results.append([out, lse, *torch.autograd.grad(loss, (q, k, v))])
    torch.testing.assert_close(*results)


def test_dropout_differs_between_groups_of_padding():
    """Elements of one content but other padding do not drop alike; a seed decides."""
    q, k, v = (x.detach()[:, -4:].repeat(2, 3, 1, 1) for x in tensors(1, 4, 1, 8))
    starts = torch.tensor([4, 8])
    options = {"pattern": Full(causal=True), "dropout_p": 0.5, "positions_start": starts}
    first, second, other = (pattern_attention(q, k, v, **options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(first[0, 8:], first[1, 8:])


X = torch.zeros(2, 4, 1, 8)
ONE = torch.zeros(1, 4, 1, 8)
NESTED = torch.nested.nested_tensor([torch.zeros(2, 1, 8)], layout=torch.jagged)


def asked(*tensors, **options):
    """A call that will be refused."""
    return pattern_attention(*tensors, Full(), **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: documents_of(Full(), [0, 3], 5), ValueError, "cu_seqlens must end with the packed length 5, got 3"),
        (lambda: documents_of(Full(), [1, 5], 5), ValueError, "cu_seqlens must begin with 0"),
        (lambda: query_spans((0, 3), (0, 2, 3)), ValueError, "cu_seqlens_q must have as many entries as cu_seqlens"),
        (
            lambda: query_spans((0, 3), (0, 2)),
            ValueError,
            "no document more queries than keys, got 3 and 2 in document 0",
        ),
        (lambda: asked(X, X, X, cu_seqlens=[0, 4]), ValueError, r"q must be packed as \(1, total, heads, head_dim\)"),
        (lambda: asked(ONE, ONE, ONE, cu_seqlens_q=[0, 4]), ValueError, "cu_seqlens must be given with cu_seqlens_q"),
        (
            lambda: asked(ONE[:, :2], ONE, ONE, cu_seqlens=[0, 4]),
            ValueError,
            "cu_seqlens_q must end with the packed length 2",
        ),
        (
            lambda: asked(ONE, ONE, ONE, cu_seqlens=[0, 4], q_start=0),
            ValueError,
            "q_start must be None where cu_seqlens",
        ),
        (lambda: asked(ONE, ONE, ONE, cu_seqlens="04"), TypeError, "cu_seqlens must be a sequence of integers"),
        (
            lambda: asked(X, X, X, cu_seqlens=[0, 4], positions_start=torch.zeros(2).long()),
            ValueError,
            "positions_start must be None where cu_seqlens is given",
        ),
        (
            lambda: asked(NESTED, NESTED, NESTED, q_start=0),
            ValueError,
            "q_start must be None for jagged nested tensors",
        ),
        (lambda: jagged_attention(attention, X, X, X), TypeError, "q must be a jagged nested tensor"),
        (lambda: aligned_attention(attention, X, X, X, [0, 1]), TypeError, "positions_start must be an integer tensor"),
        (
            lambda: aligned_attention(attention, X, X, X, torch.zeros(2)),
            TypeError,
            "positions_start must be an integer",
        ),
        (lambda: aligned_attention(attention, X, X, X, torch.zeros(3).long()), ValueError, r"must have shape \(2,\)"),
        (lambda: aligned_attention(attention, X, X, X, torch.tensor([0, 5])), ValueError, r"must lie in \[0, 4\]"),
        (
            lambda: aligned_attention(attention, X, X[:, :2], X[:, :2], torch.tensor([0, 1]), pattern=Window(2)),
            ValueError,
            "q_start must be given",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, words):
    """By its parameter."""
    with pytest.raises(error, match=words):
        call()
