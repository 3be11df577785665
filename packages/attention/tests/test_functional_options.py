"""Dropout, bias, sinks, seeds and environments of `pattern_attention`: the same under every schedule, and against the oracle."""

import pytest
import torch

from longattn.attention import (
    Local,
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    attention_weights,
    pattern_attention,
)
from longattn.kernels import reference_attention
from longattn.kernels.dispatch.environment import Environment, TorchAllocator
from longattn.patterncache import Dilated, Full, PatternCache, Rectangle, Span, Window

PATTERNS = [Full(), Window(7, sinks=2), Dilated((6, 20), (1, 3), causal=True)]
RINGS = [Ring(size=3, layout=layout) for layout in ("contiguous", "zigzag", "striped")]


def qkv(length=23, heads=4, kv_heads=2):
    """float64 leaves with gradients."""
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def everything(inputs, pattern, **options):
    """out, lse and the gradients of all inputs."""
    leaves = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    out, lse = pattern_attention(*inputs, pattern, return_lse=True, **options)
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ring", RINGS)
def test_a_ring_drops_what_local_drops(pattern, ring):
    """One seed a call, positions of the whole sequence: out, lse and gradients are Local's."""
    inputs = qkv()
    expected = everything(inputs, pattern, dropout_p=0.3, seed=5, schedule=Local())
    torch.testing.assert_close(everything(inputs, pattern, dropout_p=0.3, seed=5, schedule=ring), expected)
    undropped = pattern_attention(*inputs, pattern, return_lse=True)
    assert not torch.allclose(expected[0], undropped[0])
    torch.testing.assert_close(expected[1], undropped[1])


@pytest.mark.parametrize("ring", RINGS)
def test_the_generator_gives_one_seed_a_call(ring):
    """However many shards there are: the calls after it see the same generator."""
    inputs, after = qkv(), []
    for schedule in (Local(), ring):
        torch.manual_seed(3)
        out = pattern_attention(*inputs, Full(), dropout_p=0.5, schedule=schedule)
        after.append((out, torch.rand(())))
    torch.testing.assert_close(*after)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("schedule", [Local(), *RINGS])
def test_a_floating_mask_is_added_and_has_a_gradient(pattern, schedule):
    """softmax(scale q k + bias + log counts) v; -inf hides; the bias broadcasts."""
    inputs = qkv(kv_heads=4)
    bias = torch.randn(1, 4, 23, 23, dtype=torch.float64)
    bias[..., 3, :] = bias[..., 5] = -torch.inf
    bias.requires_grad_()
    found = everything(inputs, pattern, attention_mask=bias, schedule=schedule)
    counts = pattern.counts(Rectangle(4, Span(0, 23), Span(0, 23)))
    state = reference_attention(*inputs, counts, bias=bias)
    loss = state.out.square().sum() + state.lse.masked_fill(state.lse == -torch.inf, 0).sum()
    grads = torch.autograd.grad(loss, [*inputs, bias])
    torch.testing.assert_close(found[:5], [state.out, state.lse, *grads[:3]])
    torch.testing.assert_close(found[5], grads[3].masked_fill(bias == -torch.inf, 0))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("schedule", [Local(), *RINGS])
def test_sinks_join_the_softmax_once(pattern, schedule):
    """exp(sink) is one more weight, of a value zero, whatever the number of steps; with gradient."""
    inputs = qkv(kv_heads=4)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out, lse = pattern_attention(*inputs, pattern, return_lse=True)
    expected_lse = torch.logaddexp(lse, sinks)
    expected = out * (lse - expected_lse).exp()[..., None]
    grads = torch.autograd.grad(expected.square().sum() + expected_lse.sum(), [*inputs, sinks])
    found = everything(inputs, pattern, sink_logits=sinks, schedule=schedule)
    torch.testing.assert_close(found, [expected, expected_lse, *grads])


def test_half_precision_with_sinks_is_rounded_once():
    """The state stays float32 until the sink is in."""
    q, k, v = (x.detach().to(torch.bfloat16) for x in qkv())
    sinks = torch.randn(4)
    found = pattern_attention(q, k, v, PATTERNS[2], sink_logits=sinks)
    exact = pattern_attention(q.double(), k.double(), v.double(), PATTERNS[2], sink_logits=sinks.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("schedule", [Local(), RINGS[0]])
def test_an_environments_cache_and_allocator_are_asked(schedule):
    """Plans from its cache, memory from its allocator, under any schedule."""

    class Counting(TorchAllocator):
        asked = 0

        def empty(self, shape, dtype, device, role):
            self.asked += 1
            return super().empty(shape, dtype, device, role)

    environment = Environment(cache := PatternCache(), allocator := Counting())
    inputs = qkv()
    found = pattern_attention(*inputs, PATTERNS[1], schedule=schedule, environment=environment)
    assert torch.equal(found, pattern_attention(*inputs, PATTERNS[1], schedule=schedule))
    assert len(cache) > 0 and allocator.asked > 0


def test_deterministic_reaches_the_rows():
    """A row that cannot is refused with its reason; on this device all can, and the bits are the same."""
    inputs = qkv()
    once, twice = (pattern_attention(*inputs, Full(), deterministic=True) for _ in range(2))
    assert torch.equal(once, twice)
    with pytest.raises(TypeError, match="deterministic must be None, True or False"):
        pattern_attention(*inputs, Full(), deterministic=1)  # type: ignore[call-overload]


def test_weights_take_a_floating_mask():
    """What `need_weights` shows is what was used, with a gradient."""
    bias = torch.randn(4, 23, 23, dtype=torch.float64)
    bias[:, 2] = bias[:, :, 4] = -torch.inf
    bias.requires_grad_()
    q, k, v = qkv(kv_heads=4)
    weights = attention_weights(q, k, PATTERNS[2], attention_mask=bias)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(pattern_attention(q, k, v, PATTERNS[2], attention_mask=bias), expected)
    (grad,) = torch.autograd.grad(weights.square().sum(), bias)
    assert grad.isfinite().all()
    module = MultiheadPatternAttention(32, 4, PATTERNS[2], dtype=torch.float64)
    _, shown = module(torch.randn(1, 23, 32, dtype=torch.float64), attention_mask=bias, need_weights=True)
    assert not shown[:, :, 2].any() and not shown[..., 4].any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sink_logits": torch.zeros(3)}, ValueError, "sink_logits must have shape"),
        ({"sink_logits": 0.5}, TypeError, "sink_logits must be a floating torch.Tensor"),
        ({"seed": 1.5, "dropout_p": 0.1}, TypeError, "seed must be None, an integer"),
        ({"attention_mask": torch.zeros(1, dtype=torch.int64)}, TypeError, "attention_mask must be bool"),
    ],
)
def test_a_bad_value_is_named(options, error, words):
    """Before anything is computed, or at the latest before anything is returned."""
    with pytest.raises(error, match=words):
        pattern_attention(*qkv(), Full(), **options)


def test_a_learned_temperature():
    """A parameter of a module, () or (heads,), also under a ring and in its weights; in float64 the number's results and its gradient."""
    q, k, v = torch.randn(3, 1, 11, 2, 4, dtype=torch.float64)
    for schedule in (None, Ring(size=3)):
        layer = PatternAttention(
            Dilated((4,), (1,)),
            softmax_scale=torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64)),
            schedule=schedule,
        )
        assert [name for name, _ in layer.named_parameters()] == ["softmax_scale"] and "a tensor (2,)" in repr(layer)
        for head, number in enumerate((0.3, 0.7)):
            plain = PatternAttention(Dilated((4,), (1,)), softmax_scale=number)
            found, weights = layer(q, k, v, need_weights=True)
            expected, its_weights = plain(q, k, v, need_weights=True)
            torch.testing.assert_close(found[:, :, head], expected[:, :, head])
            torch.testing.assert_close(weights[:, head], its_weights[:, head])
        scale = layer.softmax_scale
        (grad,) = torch.autograd.grad(layer(q, k, v).square().sum(), scale)
        counts = torch.from_numpy(Dilated((4,), (1,)).counts(Rectangle(2, Span(0, 11), Span(0, 11))))
        truth = reference_attention(q, k, v, counts, scale).out.square().sum()
        torch.testing.assert_close(grad, torch.autograd.grad(truth, scale)[0])
    buffered = PatternAttention(Dilated((4,), (1,)), softmax_scale=torch.tensor(0.3, dtype=torch.float64))
    assert "softmax_scale" in buffered.state_dict()
    jagged = torch.nested.nested_tensor([q[0, :5], q[0, 5:]], layout=torch.jagged)
    out = pattern_attention(jagged, jagged, jagged, Dilated((4,), (1,)), softmax_scale=buffered.softmax_scale)
    expected = pattern_attention(q[:, :5], q[:, :5], q[:, :5], Dilated((4,), (1,)), softmax_scale=0.3)
    torch.testing.assert_close(out.unbind()[0], expected[0])
