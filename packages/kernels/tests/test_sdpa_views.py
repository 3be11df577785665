"""The rows through torch's CUDA kernels: called as they want to be, on meta tensors, and why they refuse. Nothing runs on a GPU here."""

from typing import Any

import pytest
import torch

from longattn.kernels import explain
from longattn.kernels.call import Call
from longattn.kernels.dispatch import row
from longattn.kernels.environment import TorchAllocator
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Span, Window

ROWS = pytest.mark.parametrize("name", ["sdpa_views", "sdpa_views_cudnn"])


def empty_call(pattern: Pattern, length: int, kv_heads: int) -> Call:
    """A call on tensors without data: torch checks schemas and shapes of its CUDA kernels on them."""
    q, k, v = (torch.empty(2, length, h, 64, device="meta", dtype=torch.float16) for h in (4, kv_heads, kv_heads))
    plan = pattern.plan(Rectangle(4, Span(0, length), Span(0, length)))
    rest: dict[str, Any] = dict.fromkeys(("mask", "bias", "key_padding", "prior"))
    return Call(
        q, k, v, plan, scale=0.125, **rest, dropout_p=0.0, seed=0, out_dtype=torch.float32, deterministic=False,
        allocator=TorchAllocator(),
    )  # fmt: skip


@ROWS
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "pattern", [Full(), Full(causal=True), Dilated((32, 64), (1, 2), causal=True), Window(20)], ids=str
)
def test_shapes_go_through(name: str, pattern: Pattern, kv_heads: int):
    """Dense, causal and masked tiles reach torch's kernels with arguments that their schemas and shapes take, backward too."""
    call = empty_call(pattern, 70, kv_heads)
    out, lse = row(name).forward(call)
    assert (out.shape, lse.shape, lse.dtype) == (call.q.shape, call.q.shape[:3], torch.float32)
    grads = row(name).backward(call, torch.empty_like(out), None, out, lse, False)
    assert [g.shape for g in grads[:3] if g is not None] == [x.shape for x in (call.q, call.k, call.v)]


@ROWS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu"}, "device=cpu is not in {cuda}"),
        ({"dtype": torch.float32}, "dtype=float32 is not in {float16, bfloat16} on cuda"),
        ({"deterministic": True}, "deterministic=True is not supported on cuda"),
        ({"dropout": True}, "dropout is not supported"),
        ({"architecture": "sm_75"}, "architecture=sm_75 is not in"),
    ],
)
def test_reasons(name: str, options: dict[str, Any], words: str):
    asked: dict[str, Any] = {"dtype": torch.float16, "device": "cuda", **options}
    assert any(words in reason for reason in dict(explain(Full(), (1, 64, 4, 64), **asked).rows)[name])
