"""torch.compile, torch.export and activation checkpointing on `attend`: one graph, few compilations, the same numbers."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longattn.kernels import attend
from longattn.kernels.dispatch.table import row
from longattn.kernels.ops.attend_op import LIBRARY
from longattn.kernels.testing import assert_near
from longattn.patterncache import BlockLayout, BlockSparse, Dilated, Full, Pattern, Restrict, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
TORCH_SAYS = pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated:DeprecationWarning"
)
"""Dynamo does so itself."""

LENGTHS = (17, 24, 32, 33, 40, 41, 48, 55, 64, 65, 72, 80, 81, 96, 97, 100, 112, 120, 127, 128)
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """No graph of another test counts."""
    torch._dynamo.reset()


def plain(q: torch.Tensor) -> torch.Tensor:
    return attend(q, q, q, LONGNET).out


def made_inside(q: torch.Tensor) -> torch.Tensor:
    pattern = Restrict(Dilated((8, 16), (1, 2)), Window(9))
    return attend(q, q, q, pattern, is_causal=True, softmax_scale=0.5).out


def masked(q: torch.Tensor) -> torch.Tensor:
    n = q.shape[1]
    # torch.linspace would compile anew for every n.
    bias = (torch.arange(n) / n).expand(n, n)
    first = attend(q, q, q, Window(4), attention_mask=bias > 0.1)
    return attend(q, q, q, Full(), attention_mask=bias, prior=first, sink_logits=q[0, 0, :, 0].detach()).out


def dropped(q: torch.Tensor) -> torch.Tensor:
    return attend(q, q, q, LONGNET, dropout_p=0.4, seed=5).out


def gradient(q: torch.Tensor) -> torch.Tensor:
    return grad(lambda x: attend(x, x, x, LONGNET).out.square().sum())(q)


def mapped(q: torch.Tensor) -> torch.Tensor:
    return vmap(lambda x: attend(x[None], x[None], x[None], LONGNET).out[0])(q)


@TORCH_SAYS
@pytest.mark.parametrize("function", [plain, made_inside, masked, dropped, gradient, mapped])
def test_any_length_in_two_compilations(function: Callable[[torch.Tensor], torch.Tensor]):
    """fullgraph, dynamic lengths: 20 of them in at most two graphs, each with eager's numbers and gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    graded = "grad" not in function.__name__ and function is not mapped
    for n in LENGTHS:
        q = torch.randn(2, n, 2, 4, requires_grad=graded)
        got, expected = compiled(q), function(q)
        assert_near(got, expected, 1e-6, 1e-6, f"{n}")
        assert got.abs().max() > 0
        if graded:
            grads = [torch.autograd.grad(x.square().sum(), q)[0] for x in (got, expected)]
            assert_near(*grads, 1e-5, 1e-5, f"gradient {n}")
    assert counter.frame_count <= 2


def mapped_gradient(q: torch.Tensor) -> torch.Tensor:
    return vmap(grad(lambda x: attend(x[None], x[None], x[None], LONGNET).out.square().sum()))(q)


def gradient_of_mapped(q: torch.Tensor) -> torch.Tensor:
    return grad(lambda y: mapped(y).square().sum())(q)


@TORCH_SAYS
@pytest.mark.parametrize("function", [mapped_gradient, gradient_of_mapped])
def test_what_torch_does_not_trace_is_right_or_raises(function: Callable[[torch.Tensor], torch.Tensor]):
    """A grad inside a vmap, or around one: torch 2.13 traces neither over a Function. Never zeros, as they once were."""
    q = torch.randn(2, 24, 2, 4)
    expected = function(q)
    try:
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(q)
    except (TorchDynamoException, RuntimeError):
        return
    assert_near(got, expected, 1e-6, 1e-6, "gradient")


def test_a_seed_drawn_inside_a_graph():
    """manual_seed repeats it, and each call draws anew."""

    def drawn(q: torch.Tensor) -> torch.Tensor:
        return attend(q, q, q, LONGNET, dropout_p=0.4).out

    compiled = torch.compile(drawn, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 32, 2, 4)
    torch.manual_seed(1)
    first, second = compiled(q), compiled(q)
    torch.manual_seed(1)
    assert torch.equal(compiled(q), first) and not torch.equal(first, second)


def test_a_block_mask_in_a_graph():
    """The mask of a pattern made outside travels as text."""
    blocks = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    q = torch.randn(1, 30, 2, 4)
    for is_causal in (None, True):
        mask, layout = BlockSparse(8, blocks), BlockLayout("bigbird", 8, window=8)
        for pattern in (mask, Restrict(LONGNET, mask), layout):

            def call(q: torch.Tensor, pattern: Pattern = pattern, is_causal: bool | None = is_causal) -> torch.Tensor:
                return attend(q, q, q, pattern, is_causal=is_causal).out

            # Compiled first: what the pattern keeps from an earlier call must not be needed.
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            assert_near(compiled(q), call(q), 1e-6, 1e-6, "out")


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """Real code around the op, forward and backward, at two lengths."""

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = torch.nn.functional.gelu(x @ w).unflatten(-1, (2, 4))
        return attend(q, q, q, LONGNET, key_padding_mask=x[..., 0] > 2).out.flatten(2) + x

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    w = torch.randn(8, 8, requires_grad=True)
    for n in (24, 33):
        x = torch.randn(2, n, 8)
        grads = []
        for function in (layer, compiled):
            out = function(x, w)
            grads += [out, *torch.autograd.grad(out.square().sum(), w)]
        assert_near(grads[2], grads[0], 1e-4, 1e-4, "out")
        assert_near(grads[3], grads[1], 1e-3, 1e-3, "gradient")


class Layer(torch.nn.Module):
    """One call of attend, for export."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return attend(q, k, k, LONGNET, key_padding_mask=padding).out


def test_export_with_a_dynamic_length():
    """One program for all lengths of queries and keys; the op is in it once."""

    def inputs(nq: int, nk: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, nq, 4, 8), torch.randn(2, nk, 2, 8), torch.rand(2, nk) < 0.2

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({1: length}, {1: length}, {1: length})
    program = torch.export.export(Layer(), inputs(24, 24), dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.longattn.attend.default]
    assert len(calls) == 1
    for n in (5, 24, 61):
        given = inputs(n, n)
        assert_near(program.module()(*given), Layer()(*given), 1e-6, 1e-6, "out")


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing(selective: bool, p: float, compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """Same gradients, dropout with its own seed included; with the op's results saved it runs once, without them twice."""
    runs = []
    served = row("gather").forward
    monkeypatch.setattr(
        "longattn.kernels.dispatch.prepared.select",
        lambda *_: type(row("gather"))(
            "gather", row("gather").capability, lambda call: (runs.append(1), served(call))[1], row("gather").backward
        ),
    )

    def block(q: torch.Tensor) -> torch.Tensor:
        return attend(q.sin(), q, q, LONGNET, dropout_p=p).out.cos()

    def save_attend(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        mine = op is torch.ops.longattn.attend.default
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(save_attend)

    def checkpointed(q: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, q, **options)

    if compiled:
        checkpointed = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    q = torch.randn(2, 20, 2, 4, requires_grad=True)
    results = []
    for function in (block, checkpointed):
        torch.manual_seed(3)
        runs.clear()
        out = function(q)
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    for got, expected in zip(*results[::-1], strict=True):
        assert_near(got, expected, 1e-6, 1e-6, "checkpoint")
    assert len(runs) == (1 if selective else 2)


def test_the_library_is_longattns():
    """Names that graphs, programs and policies refer to."""
    assert LIBRARY.ns == "longattn"
    assert {str(torch.ops.longattn.attend.default), str(torch.ops.longattn.attend_backward.default)} == {
        "longattn.attend.default",
        "longattn.attend_backward.default",
    }
