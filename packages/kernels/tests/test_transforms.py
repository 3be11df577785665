"""torch.func's transforms, autocast, FLOP counts, forward mode and meta tensors, on `attend`."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from longattn.kernels import AttentionState, attend, backends, fused_attention
from longattn.kernels.dispatch.table import row, twice_differentiable
from longattn.kernels.testing import Case, assert_near
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Restrict, Span, Strided, Window

LONGNET = Dilated((4, 8), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(5), Dilated((4,), (2,))), Strided(4))
ROWS = pytest.mark.parametrize("name", backends("cpu"))
IN_FLOAT64 = [name for name in backends("cpu") if torch.float64 in row(name).capability.dtypes_on("cpu")]
Q, K = (torch.randn(3, 2, n, h, 4, generator=torch.Generator().manual_seed(h)) for n, h in ((9, 4), (11, 2)))
BIAS = torch.randn(3, 2, 1, 9, 11, generator=torch.Generator().manual_seed(1))
PADDING = torch.rand(3, 2, 11, generator=torch.Generator().manual_seed(2)) < 0.3
# The call's further arguments, and how vmap maps each.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "mask of all": ({"attention_mask": BIAS[0] > 0}, {}),
    "mask of each": ({"attention_mask": BIAS[:, 0, 0] > 0}, {"attention_mask": 0}),
    "bias of all": ({"attention_mask": BIAS[0, 0, 0]}, {}),
    "bias of each": ({"attention_mask": BIAS}, {"attention_mask": 0}),
    "padding of all": ({"key_padding_mask": PADDING[0]}, {}),
    "padding of each": ({"key_padding_mask": PADDING}, {"key_padding_mask": 0}),
    "sinks of each": ({"sink_logits": BIAS[:, 0, 0, :4, 0]}, {"sink_logits": 0}),
    "dropout": ({"dropout_p": 0.4, "seed": 3}, {}),
}


def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], name: str) -> torch.Tensor:
    state = attend(q, k, v, LONGNET, backend=name, **options)
    return state.out.square().sum() + state.lse.masked_fill(state.lse == -torch.inf, 0).sum()


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ["sdpa", "gather"])
@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 0, 0)], ids=["all", "queries", "keys"])
def test_vmap_is_a_loop(kind: str, name: str, mapped: tuple[int | None, ...]):
    """Values, and per-sample gradients, whatever else is mapped. A row that cannot says so both ways."""
    options, dims = OPTIONS[kind]
    inputs = [x if dim == 0 else x[0] for x, dim in zip((Q, K, K[..., :3] + 1), mapped, strict=True)]
    axes = {key: dims.get(key) for key in options}
    values = {key: value for key, value in options.items() if isinstance(value, torch.Tensor)}
    rest = {key: value for key, value in options.items() if key not in values}

    def out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, some: dict[str, Any]) -> torch.Tensor:
        return attend(q, k, v, LONGNET, backend=name, **some, **rest).out

    def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, some: dict[str, Any]) -> Any:
        return grad(lambda *qkv: loss(*qkv, {**some, **rest}, name), argnums=(0, 1, 2))(q, k, v)

    in_dims = (*mapped, {key: axes[key] for key in values})
    # Inside a transform any bias may be differentiated.
    refused = (kind == "dropout" and name == "sdpa") or (kind.startswith("bias") and name != "gather")
    for function in (out, gradients):
        if refused:
            with pytest.raises(ValueError, match="is not supported"):
                vmap(function, in_dims=in_dims)(*inputs, values)
            continue
        got = vmap(function, in_dims=in_dims)(*inputs, values)
        each = []
        for n in range(3):
            qkv = [x[n] if dim == 0 else x for x, dim in zip(inputs, mapped, strict=True)]
            each.append(function(*qkv, {key: x[n] if axes[key] == 0 else x for key, x in values.items()}))
        expected = torch.stack(each) if function is out else [torch.stack(parts) for parts in zip(*each, strict=True)]
        torch.testing.assert_close(got if function is out else list(got), expected, atol=1e-5, rtol=1e-5)


@ROWS
def test_func_grad_vjp_and_jacrev(name: str):
    """All are what autograd says."""
    q, k = Q[0], K[0]
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    expected = torch.autograd.grad(loss(*leaves, {}, name), leaves)
    torch.testing.assert_close(grad(lambda *x: loss(*x, {}, name), argnums=(0, 1, 2))(q, k, k), expected)
    value, pull = vjp(lambda *x: loss(*x, {}, name), q, k, k)
    torch.testing.assert_close(pull(torch.ones_like(value)), expected)
    # jacrev maps the backward op over cotangents.
    rows = jacrev(lambda x: attend(x, k, k, LONGNET, backend=name).out[0, 5].sum(-1))(q)
    for h, line in enumerate(rows):
        (one,) = torch.autograd.grad(attend(leaves[0], k, k, LONGNET, backend=name).out[0, 5, h].sum(), leaves[0])
        assert_near(line, one, 1e-5, 1e-5, "jacobian")


def test_gradients_of_bias_sinks_and_prior_by_func():
    """Tensors beside q, k and v are differentiated too, also mapped."""
    q, k, bias = Q[0], K[0], BIAS[0]

    def root(b: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        prior = AttentionState(out, torch.zeros(out.shape[:3]))
        return attend(q, k, k, Full(), attention_mask=b, sink_logits=sinks, prior=prior).out.square().sum()

    inputs = [bias, torch.zeros(4), torch.ones_like(q)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(root(*leaves), leaves)
    torch.testing.assert_close(grad(root, argnums=(0, 1, 2))(*inputs), expected)
    stacked = [torch.stack([x, x + 1]) for x in inputs]
    mapped = vmap(grad(root, argnums=(0, 1, 2)))(*stacked)
    torch.testing.assert_close([x[0] for x in mapped], list(expected), atol=1e-5, rtol=1e-5)


def test_vmap_and_the_seed():
    """As torch does for its own random calls: "same" drops alike, "different" does not, and by default it raises."""
    same_inputs = Q[:1].expand(3, *Q.shape[1:])

    def dropped(q: torch.Tensor) -> torch.Tensor:
        return attend(q, q, q, Full(), dropout_p=0.5).out

    alike = vmap(dropped, randomness="same")(same_inputs)
    assert torch.equal(alike[0], alike[1])
    other = vmap(dropped, randomness="different")(same_inputs)
    assert not torch.equal(other[0], other[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(same_inputs)


@ROWS
@pytest.mark.parametrize("which", ["q", "v", "bias", "prior"])
def test_forward_mode_is_refused(name: str, which: str):
    """By dual levels and by func.jvp: a tangent is never dropped without a word."""
    q, k = Q[0], K[0]

    def call(x: torch.Tensor) -> torch.Tensor:
        prior = AttentionState(x, torch.zeros(x.shape[:3])) if which == "prior" else None
        bias = x[0, :, :, 0].sum() * torch.zeros(9, 11) if which == "bias" else None
        return attend(x if which == "q" else q, k, x[:, :1].expand(2, 11, 4, 4)[:, :, :2] if which == "v" else k, Full(),
                      attention_mask=bias, prior=prior, backend=name).out  # fmt: skip

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(forward_ad.make_dual(q, torch.ones_like(q)))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (q,), (torch.ones_like(q),))
    with forward_ad.dual_level():
        assert attend(q, k, k, Full(), backend=name).out.isfinite().all()


@pytest.mark.parametrize("name", [name for name in backends("cpu") if name not in twice_differentiable()])
def test_second_derivatives_by_func_are_refused(name: str):
    def first(q: torch.Tensor) -> torch.Tensor:
        return grad(lambda x: attend(x, x, x, Full(), backend=name).out.square().sum())(q).sum()

    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        grad(first)(Q[0])


@ROWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype):
    """q, k and v are cast, float64 is not; out is the state's float32; gradients come in the dtypes of the inputs."""
    q = Q[0].clone().requires_grad_()
    half = q.detach().to(dtype).requires_grad_()
    expected = attend(half, half, half, LONGNET, backend=name)
    with torch.autocast("cpu", dtype):
        state = attend(q, half, q, LONGNET, backend=name)
        wide = attend(*(q.double(),) * 3, LONGNET, backend=name if name in IN_FLOAT64 else None)
    assert torch.equal(state.out, expected.out) and state.out.dtype == state.lse.dtype == torch.float32
    assert wide.out.dtype == torch.float64
    root = state.out.square().sum()
    (mine,) = torch.autograd.grad(root, q)
    assert mine.dtype == torch.float32 and mine.isfinite().all()
    with torch.autocast("cpu", dtype, enabled=False), pytest.raises(TypeError, match="k must have the dtype of q"):
        attend(q, half, q, LONGNET, backend=name)
    both = torch.autograd.grad(expected.out.square().sum(), half)
    with torch.autocast("cpu", dtype):
        inside = torch.autograd.grad(attend(half, half, half, LONGNET, backend=name).out.square().sum(), half)
    assert inside[0].dtype == dtype and torch.equal(inside[0], both[0])


PATTERNS: list[Pattern] = [
    Full(),
    Full(causal=True),
    LONGNET,
    Window(3, sinks=1),
    LISTED,
    BlockSparse(4, torch.eye(5).bool()),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["sdpa", "gather"])
def test_flops(pattern: Pattern, name: str):
    """Forward: two products of 2 D a visible pair, whoever computes; backward: five, three of them over q's head_dim."""
    data = Case(pattern, (19, 19), batch=2, kv_heads=1, group=3, head_dim=8, value_head_dim=6).tensors()
    q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
    pairs = int((pattern.counts(Rectangle(3, Span(0, 19), Span(0, 19)))).sum()) * 2
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, pattern, backend=name).out
    assert counter.get_total_flops() == 2 * (8 + 6) * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (3 * 8 + 2 * 6) * pairs


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.1}, {"mask": "bhqk"}, {"mask": "+hqk"}, {"padding": True}], ids=str
)
def test_meta(options: dict[str, Any]):
    """Shapes and dtypes without data, whatever is asked, forward and backward."""
    case = Case(LONGNET, (9, 11), kv_heads=2, group=2, device="cpu", **options)
    data = case.tensors()
    q, k, v, mask, padding = (None if x is None else x.to("meta") for x in (data.q, data.k, data.v, data.mask, data.padding))  # fmt: skip
    assert q is not None and k is not None and v is not None
    if mask is not None and mask.is_floating_point():
        mask.requires_grad_()
    state = attend(q.requires_grad_(), k, v, LONGNET, attention_mask=mask, key_padding_mask=padding,
                   dropout_p=case.dropout_p, sink_logits=torch.zeros(4, device="meta"))  # fmt: skip
    assert state.out.device.type == "meta" and state.out.shape == q.shape and state.lse.shape == q.shape[:3]
    leaves = [q] if mask is None or not mask.requires_grad else [q, mask]
    assert [g.shape for g in torch.autograd.grad(state.out.sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sm_scale", [None, 0.3])
def test_fused_attention_is_dense_attention(causal: bool, sm_scale: float | None):
    """(batch, heads, seq, head_dim), values and gradients; grouped heads; causal is bottom-right."""
    leaves = [torch.randn(2, h, 12, 8, requires_grad=True) for h in (4, 2, 2)]
    mine = fused_attention(*leaves, causal=causal, sm_scale=sm_scale)
    options = {"is_causal": causal, "scale": sm_scale, "enable_gqa": True}
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
    assert_near(mine, theirs, 1e-5, 1e-5, "out")
    weights = torch.randn(2, 4, 12, 8)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weights) for x in (mine, theirs)), strict=True):
        assert_near(a, b, 1e-4, 1e-4, "gradient")
    tail = fused_attention(leaves[0][:, :, -5:], *leaves[1:], causal=causal, sm_scale=sm_scale)
    assert_near(tail, mine[:, :, -5:], 1e-5, 1e-5, "tail")
    half = fused_attention(*(x.bfloat16() for x in leaves), causal)
    assert half.dtype == torch.bfloat16 and half.shape == (2, 4, 12, 8)


def test_fused_attention_names_a_bad_argument():
    q = torch.randn(1, 2, 4, 8)
    for arguments, error, words in (
        ((q, q, q, 1), TypeError, "causal must be None, True or False, got 1"),
        ((q, q, q, None), TypeError, "causal must be True or False, got None"),
        ((q, q, [1.0]), TypeError, "v must be a torch.Tensor"),
        ((q[0], q, q), ValueError, "q must have shape"),
        ((q, q[:, :, :3], q[:, :, :3], True), ValueError, "queries outnumber keys"),
        ((q, q, q, False, "x"), TypeError, "sm_scale must be None or a number"),
    ):
        with pytest.raises(error, match=words):
            fused_attention(*arguments)
