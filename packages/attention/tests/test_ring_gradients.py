"""The backward of a schedule: one merged out and lse for all rectangles, sums in float32, and what torch's transforms make of it."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longattn.attention import Local, PatternAttention, Ring, pattern_attention
from longattn.attention.schedules import driver
from longattn.attention.schedules.layouts import LAYOUTS
from longattn.kernels import reference_attention
from longattn.patterncache import Dilated, Full, Rectangle, Span, Window

LONGNET = Dilated((6, 12, 24), (1, 2, 4), causal=True)
RINGS = [Ring(size=4, layout=layout) for layout in LAYOUTS]


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def saved_bytes(schedule, length=240):
    """Bytes that one forward keeps for backward."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = [randn(1, length, 2, 8, dtype=torch.float32, seed=n).requires_grad_() for n in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        pattern_attention(*inputs, Full(), schedule=schedule)
    return sum(kept.values())


@pytest.mark.parametrize("size", [1, 4, 16])
def test_what_is_saved_does_not_grow_with_the_ring(size):
    """q, k, v, out and lse, whatever the number of ranks."""
    assert saved_bytes(Ring(size=size)) == saved_bytes(Local()) == 4 * (4 * 240 * 2 * 8 + 240 * 2)


@pytest.mark.parametrize("pattern", [Full(), LONGNET])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_gradients_are_summed_in_float32(pattern, layout):
    """bfloat16 over 16 steps: dq, dk and dv within 1.5 of Local's own error. Summed in bfloat16, dk and dv would be 2 to 3 times off."""
    inputs = [randn(2, 192, 4, 16, dtype=torch.bfloat16, seed=n) for n in range(3)]
    weights = randn(2, 192, 4, 16, seed=7)
    truth = [x.double().requires_grad_() for x in inputs]
    counts = pattern.counts(Rectangle(4, Span(0, 192), Span(0, 192)))
    expected = torch.autograd.grad((reference_attention(*truth, counts).out * weights).sum(), truth)

    def errors(schedule):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = pattern_attention(*leaves, pattern, schedule=schedule)
        found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)
        return [(a.double() - b).square().mean().sqrt() for a, b in zip(found, expected, strict=True)]

    for name, ring, local in zip("qkv", errors(Ring(size=16, layout=layout)), errors(Local()), strict=True):
        assert ring <= 1.5 * local, f"d{name}: {ring / local:.2f} times Local's error"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_delta_is_made_once_for_a_shard(dtype, monkeypatch):
    """Four shards of four steps: four times, and each rectangle is given it."""
    made, given = [], []
    real, computed = driver.minus_delta_of, driver.rectangle_gradients
    monkeypatch.setattr(driver, "minus_delta_of", lambda *x: made.append(real(*x)) or made[-1])

    def counted(*arguments, part, **options):
        given.append(part.minus_delta)
        return computed(*arguments, part=part, **options)

    monkeypatch.setattr(driver, "rectangle_gradients", counted)
    leaves = [randn(1, 32, 2, 4, dtype=dtype, seed=n).requires_grad_() for n in range(3)]
    pattern_attention(*leaves, Full(), schedule=RINGS[0]).sum().backward()
    assert len(made) == 4 and [sum(x is delta for x in given) for delta in made] == [4] * 4


@pytest.mark.parametrize("shape", [(19,), (1, 19), (2, 1, 19), (2, 1, 1, 19), (2, 2, 1, 19), (1, 1)])
@pytest.mark.parametrize("ring", RINGS)
def test_the_gradient_of_a_mask_without_rows(ring, shape):
    """A bias that all queries share is every rank's: its gradient is the sum, of the oracle's size and sign."""
    x = [randn(2, 19, 2, 4, seed=n) for n in range(3)]
    bias = randn(*shape, seed=5).requires_grad_()
    weights = randn(2, 19, 2, 4, seed=7)
    counts = LONGNET.counts(Rectangle(2, Span(0, 19), Span(0, 19)))
    out = pattern_attention(*x, LONGNET, schedule=ring, attention_mask=bias)
    true = reference_attention(*x, counts, bias=bias).out
    torch.testing.assert_close(out, true)
    found, expected = (torch.autograd.grad((y * weights).sum(), bias)[0] for y in (out, true))
    torch.testing.assert_close(found, expected)
    assert shape == (1, 1) or found.abs().max() > 1e-2


@pytest.mark.parametrize("ring", RINGS)
def test_vmap_and_per_sample_gradients(ring):
    """vmap, and vmap of grad, are a loop."""
    stacked = randn(3, 2, 19, 2, 4)
    k = randn(2, 19, 2, 4, seed=1)

    def loss(q):
        return pattern_attention(q, k, k, LONGNET, schedule=ring).square().sum()

    for function in (lambda q: pattern_attention(q, k, k, LONGNET, schedule=ring), grad(loss)):
        torch.testing.assert_close(vmap(function)(stacked), torch.stack([function(q) for q in stacked]))


@pytest.mark.parametrize("schedule", [Local(), *RINGS])
def test_second_derivatives_and_tangents_are_refused(schedule):
    """By autograd, by torch.func and by forward mode: never computed wrongly."""
    x = randn(1, 9, 2, 4).requires_grad_()

    def loss(q):
        return pattern_attention(q, q, q, Full(), schedule=schedule).square().sum()

    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    if schedule == Local():
        # Float64 is served by a row that has them.
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(grad(lambda q: grad(loss)(q).sum())(x.detach()), second)
    else:
        with pytest.raises(NotImplementedError, match="second derivatives are not supported under Ring"):
            first.sum().backward()
        with pytest.raises(NotImplementedError, match="second derivatives are not supported under Ring"):
            grad(lambda q: grad(loss)(q).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("ring", RINGS)
def test_a_compiled_ring_is_one_op(ring):
    """fullgraph: one scheduled op forward, one backward, gradients right at a second length; func.grad inside compile too."""
    torch._dynamo.reset()
    attention = PatternAttention(LONGNET, schedule=ring)
    ops = []

    def backend(graph, inputs):
        ops.extend(str(n.target) for n in graph.graph.nodes if "longattn" in str(n.target))
        return graph.forward

    torch.compile(attention, backend=backend, fullgraph=True)(*(randn(1, 20, 2, 4),) * 3)
    assert ops == ["longattn.scheduled_attend"]
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    inner = torch.compile(lambda q: grad(lambda x: attention(x, x, x).square().sum())(q), backend="aot_eager")
    for length in (20, 23):
        x = randn(1, length, 2, 4).requires_grad_()
        found, expected = compiled(x, x, x), attention(x, x, x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], wanted)
        torch.testing.assert_close(inner(x.detach()), wanted)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"dropout_p": 0.3, "seed": 3}, {"padding": True}, {"terms": True}], ids=str
)
def test_opcheck(options):
    """torch's own checks of the op: schema, autograd registration, fakes, and that compiled code agrees."""
    from longattn.kernels.ops.arguments import OpArguments, OpTensors

    q, k, v = (randn(2, 11, 2, 4, seed=n).requires_grad_() for n in range(3))
    bias = randn(11, 11).requires_grad_() if "bias" in options else None
    seed = torch.tensor(3) if "seed" in options else None
    padding = torch.rand(2, 11) < 0.3 if "padding" in options else None
    added = torch.rand(2, 12, dtype=torch.float64).requires_grad_() if "terms" in options else None
    asked = OpArguments(LONGNET.canonical(), [], [], [2, 0, 2], scale=None, dropout_p=options.get("dropout_p", 0.0),
                  needs_grad=True, bias_grad=bias is not None, by_distance_grad=added is not None,
                  softcap=2.0 * (added is not None), backend="", deterministic=False, out_dtype=q.dtype, env="",
                  schedule=Ring(size=3, layout="striped").canonical())  # fmt: skip
    arguments = (*OpTensors(q, k, v, bias, added, None, padding, seed), *asked)
    torch.library.opcheck(torch.ops.longattn.scheduled_attend.default, arguments)


@pytest.mark.parametrize("schedule", [Local(), RINGS[1]])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing(schedule, p):
    """Recomputed in backward, with the same seed: the same gradients."""
    x = randn(1, 20, 2, 4).requires_grad_()

    def block(q):
        return pattern_attention(q.sin(), q, q, LONGNET, dropout_p=p, schedule=schedule).cos()

    results = []
    for function in (block, lambda q: checkpoint(block, q, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(function(x).square().sum(), x)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ring", RINGS)
def test_flops_are_those_of_local(ring):
    """A ring computes what Local computes, forward and backward."""
    counted = []
    for schedule in (Local(), ring):
        x = randn(2, 20, 2, 4).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            pattern_attention(x, x, x, Window(5), schedule=schedule).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_meta_tensors_have_shapes():
    """Shapes and dtypes without data, under a ring."""
    x = torch.empty(2, 9, 2, 4, device="meta", requires_grad=True)
    out, lse = pattern_attention(x, x, x, LONGNET, schedule=RINGS[0], return_lse=True)
    assert out.shape == x.shape and lse.shape == x.shape[:3] and out.device.type == "meta"
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_autocast():
    """q, k and v are cast as torch casts for its own attention."""
    x = randn(1, 12, 2, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = pattern_attention(x, x, x, LONGNET, schedule=RINGS[0])
    half = x.bfloat16()
    assert torch.equal(out, pattern_attention(half, half, half, LONGNET, schedule=RINGS[0]))
