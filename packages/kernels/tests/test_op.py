"""The opaque ops as torch sees them: schema, fakes, autograd, and what happens inside."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longattn.kernels import AttentionState, attend, backends
from longattn.kernels.dispatch.call import GradientPart
from longattn.kernels.dispatch.environment import find_environment
from longattn.kernels.dispatch.table import row
from longattn.kernels.ops.arguments import Cotangents, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import attend_rectangle, rectangle_gradients
from longattn.kernels.state import minus_delta_of
from longattn.kernels.testing import Case
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Restrict, Strided, Window

LONGNET = Dilated((4, 8), (1, 2), causal=True)
ROWS = pytest.mark.parametrize("name", backends("cpu"))
IN_FLOAT64 = [name for name in backends("cpu") if torch.float64 in row(name).capability.dtypes_on("cpu")]
CASES = [
    Case(LONGNET, (9, 12), batch=2, kv_heads=1, group=2, head_dim=4),
    Case(
        Restrict(Restrict(Window(5), Dilated((4,), (2,))), Strided(4)),
        (9, 9),
        batch=1,
        mask="bhqk",
        padding=True,
        head_dim=4,
    ),
    Case(Full(), (5, 3), batch=1, layouts=("heads_first",) * 5, head_dim=4),
    Case(LONGNET, (9, 9), batch=1, head_dim=6, value_head_dim=4),
]
VARIANTS = [
    Case(LONGNET, (9, 9), batch=1, group=2, head_dim=4, mask="+hqk"),
    Case(LONGNET, (9, 9), batch=2, head_dim=4, mask="+k", padding=True, dtype=torch.bfloat16),
    Case(Window(4), (9, 9), batch=2, head_dim=4, dropout_p=0.4),
    Case(BlockSparse(4, np.eye(3, dtype=bool)), (9, 9), batch=1, head_dim=4, mask="bk", dropout_p=0.2),
    Case(LONGNET, (9, 9), batch=1, head_dim=4, prior=True),
]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops, and looks inside them: every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.made: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longattn":
            self.calls.append((func, args))
            with self:
                # Its kernel, with this mode on again.
                found = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        else:
            found = func(*args, **(kwargs or {}))
        self.made += [
            (str(func), x.dtype) for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)
        ]
        return found


def record(case: Case, name: str | None, backward: bool = True) -> Recorder:
    data = case.tensors()
    q, k, v = (x.detach().requires_grad_(backward) for x in (data.q, data.k, data.v))
    mask = data.mask
    if backward and mask is not None and mask.is_floating_point() and (name is None or row(name).capability.bias_grad):
        mask.requires_grad_()
    with Recorder() as seen:
        state = attend(
            q,
            k,
            v,
            case.pattern,
            attention_mask=mask,
            key_padding_mask=data.padding,
            prior=data.prior,
            dropout_p=case.dropout_p,
            seed=case.seed,
            backend=name,
        )
        if backward:
            torch.autograd.grad([state.out, state.lse], [q, k, v], [data.grad_out, data.grad_lse])
    return seen


@ROWS
@pytest.mark.parametrize(
    "case", [*CASES, *VARIANTS], ids=lambda case: f"{case.pattern} {case.mask} {case.dropout_p} {case.prior}"
)
def test_opcheck(name: str, case: Case):
    """Schema, fakes and autograd registration of both ops hold on real calls: masks, bias, dropout, padding, a prior."""
    if case.dropout_p and not row(name).capability.dropout:
        pytest.skip("dropout is not supported")
    calls = record(case, name).calls
    if case.prior:
        calls += record(case, name, backward=False).calls
        assert OpTensors(*calls[-1][1][: len(OpTensors._fields)]).prior_out is not None, "no prior reached the op"
    assert {str(func) for func, _ in calls} == {"longattn.attend.default", "longattn.attend_backward.default"}
    for func, args in calls:
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        # The raw op has no gradient through a prior.
        graded = () if given.get("prior_out") is not None else ("q", "k", "v")
        fresh = [
            x.detach().requires_grad_(name in graded) if isinstance(x, torch.Tensor) else x for name, x in given.items()
        ]
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(func, tuple(fresh), test_utils=tests)


@pytest.mark.parametrize("name", IN_FLOAT64)
@pytest.mark.parametrize("pattern", [LONGNET, Full(), Window(3, sinks=1), CASES[1].pattern], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(name: str, pattern: Pattern, masked: bool):
    """Numerical derivatives of out and lse in q, k and v."""
    data = Case(
        pattern, (5, 6), batch=1, kv_heads=1, group=2, head_dim=2, dtype=torch.float64, mask="qk" if masked else None
    ).tensors()

    def outputs(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = attend(*qkv, pattern, attention_mask=data.mask, backend=name)
        return state.out, state.lse.masked_fill(state.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in (data.q, data.k, data.v)], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("prior", [False, True])
def test_fakes(dtype: torch.dtype, where: str, prior: bool):
    """Shapes, dtypes and devices without data, forward and backward."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = "meta" if where == "meta" else "cpu"

    def check() -> None:
        q = torch.empty(2, 9, 4, 8, dtype=dtype, device=device, requires_grad=True)
        k = torch.empty(2, 11, 2, 8, dtype=dtype, device=device, requires_grad=True)
        v = torch.empty(2, 11, 2, 5, dtype=dtype, device=device, requires_grad=True)
        state = attend(q, k, v, LONGNET, prior=AttentionState.empty(q.detach()[..., :5]) if prior else None)
        assert (state.out.shape, state.out.dtype, state.out.device) == ((*q.shape[:3], 5), wide, q.device)
        assert (state.lse.shape, state.lse.dtype, state.lse.device) == (q.shape[:3], wide, q.device)
        grads = torch.autograd.grad(state.out.sum(), (q, k, v))
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, dtype) for x in (q, k, v)]
        assert attend(q, k, k, LONGNET, out_dtype=torch.float16).out.dtype == torch.float16

    if where == "meta":
        check()
    else:
        with FakeTensorMode():
            check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.pattern))
@pytest.mark.parametrize("prior", [False, True])
def test_the_gather_row_makes_no_float64(dtype: torch.dtype, case: Case, prior: bool):
    """MPS has none: no operation inside the row, forward or backward, may make one."""
    case = replace(case, dtype=dtype, prior=prior)
    for backward in (False, True):
        made = record(case, "gather", backward).made
        assert "aten.exp_.default" in {name for name, _ in made}
        assert not [name for name, dtype in made if dtype == torch.float64]


def test_the_recorder_looks_inside():
    """The proof above can fail: a float64 call shows its float64 tensors."""
    made = record(Case(LONGNET, (8, 8), dtype=torch.float64), "gather").made
    assert torch.float64 in {dtype for _, dtype in made}


@ROWS
def test_inference_mode_and_no_grad(name: str):
    """Both give what a graded call gives."""
    q = torch.randn(1, 12, 2, 4, requires_grad=True)
    expected = attend(q, q, q, LONGNET, backend=name)
    with torch.inference_mode():
        assert torch.equal(attend(q, q, q, LONGNET, backend=name).out, expected.out)
    with torch.no_grad():
        assert torch.equal(attend(q, q, q, LONGNET, backend=name).out, expected.out)


@ROWS
@pytest.mark.parametrize("wanted", ["out", "lse"])
@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_one_gradient_at_a_time(name: str, wanted: str, leaf: int):
    """Only out or only lse has a cotangent; only one of q, k, v wants a gradient."""
    data = Case(LONGNET, (9, 9)).tensors()
    every = [x.clone().requires_grad_() for x in (data.q, data.k, data.v)]
    alone = [x.clone().requires_grad_(at == leaf) for at, x in enumerate((data.q, data.k, data.v))]

    def gradient(qkv: list[torch.Tensor]) -> torch.Tensor:
        root = getattr(attend(*qkv, LONGNET, backend=name), wanted)
        (found,) = torch.autograd.grad(root.clamp(min=-50).square().sum(), qkv[leaf])
        return found

    assert torch.equal(gradient(alone), gradient(every))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", backends("cpu"))
def test_gradients_of_one_rectangle_of_several(name, dtype):
    """They are in float32, from a delta that was made before; dq is perhaps added to the sum so far. A second, bound call gives the same."""
    if dtype not in row(name).capability.dtypes_on("cpu"):
        pytest.skip(f"{name} does not serve {dtype}")
    q, k, v, grad, dq = (torch.randn(1, 24, 2, 8, generator=torch.Generator().manual_seed(n)) for n in range(5))
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    spans = [0, 24, 1]
    arguments = OpArguments(
        LONGNET.canonical(), spans, spans, [2, 0, 2], None, 0.0, True, False, name, False, dtype, ""
    )
    tensors, environment = OpTensors(q, k, v), find_environment("")
    out, lse = attend_rectangle(tensors, arguments, environment)
    cotangents = Cotangents(grad, torch.randn_like(lse), out, lse)
    whole = rectangle_gradients(cotangents, tensors, arguments, environment)
    minus_delta = minus_delta_of(*cotangents[:3])
    # What delta is made of is not read again, but by torch's kernel, which takes no delta.
    unread = {"grad_lse": torch.full_like(lse, torch.nan), "out": torch.full_like(out, torch.nan)}
    read = cotangents if name == "sdpa" else cotangents._replace(**unread)
    for _ in range(2):
        for total in (None, dq.clone()):
            part = GradientPart(minus_delta, total)
            found = rectangle_gradients(read, tensors, arguments, environment, part=part)
            assert {x.dtype for x in found[:3]} == {torch.float32}
            added = 0 if total is None or found[0] is not total else dq
            for gradient, expected in zip((found[0] - added, *found[1:3]), whole, strict=False):
                torch.testing.assert_close(
                    gradient, expected.float(), atol=2e-5 if dtype == torch.float32 else 3e-2, rtol=2e-2
                )
