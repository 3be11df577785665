"""Whether the kernels say what the oracle says on this device, gradients included. Nothing is timed before.

Lengths are such that programs take a second job and lists have several parts. On Hopper this is what catches a miscompiled product.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from longattn.kernels import attend
from longattn.kernels.cases import Case
from longattn.kernels.conformance import check_backend
from longattn.patterncache import Dilated, Full, Pattern, Restrict, Strided, Window

LONGNET = Dilated((64, 128), (1, 2))
PATTERNS: tuple[Pattern, ...] = (
    Full(causal=True),
    LONGNET,
    Window(40, sinks=3),
    Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4)),
)


def checks(dry: bool, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each check by name; one that finds something raises AssertionError."""
    types = (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        for deterministic in (False, True):
            for dim in (16,) if dry else (64, 128):
                for pattern in PATTERNS[: 2 if dry else 4]:
                    size: dict[str, Any] = {
                        "lengths": (70, 70) if dry else (333, 333),
                        "head_dim": dim,
                        "dtype": dtype,
                        "device": device,
                    }
                    case = Case(pattern, batch=1, kv_heads=1, group=2, **size)
                    kind = f"{name} D{dim} {'fixed' if deterministic else 'fast'} {pattern.canonical()[:40]}"
                    yield kind, lambda case=case, fixed=deterministic: _agree(case, fixed)
        options: dict[str, Any] = {
            "lengths": (70, 70) if dry else (200, 200),
            "head_dim": 16 if dry else 64,
            "dtype": dtype,
            "device": device,
        }
        kinds: tuple[tuple[str, dict[str, Any]], ...] = (
            ("dropout", {"dropout_p": 0.3}), ("mask", {"mask": "qk"}), ("bias", {"mask": "+qk"}), ("padding", {"padding": True}),
            ("prior", {"prior": True}), ("expanded cotangent", {"layouts": ("plain",) * 4 + ("expanded_dim",)}),
        )  # fmt: skip
        for kind, extra in kinds:
            case = Case(LONGNET, batch=2, kv_heads=1, **options, **extra)
            yield f"{name} {kind}", lambda case=case: _agree(case, False)
        decode = Case(Full(), batch=2, kv_heads=2, group=4, **{**options, "lengths": (1, 300 if dry else 9000)})
        yield f"{name} decode, split and merged", lambda case=decode: _agree(case, False)
    if not dry:
        for pattern in (Full(causal=True), Dilated((2048, 4096, 8192), (1, 2, 4))):
            yield (
                f"16384 tokens {pattern.canonical()[:40]}",
                lambda pattern=pattern: _agrees_with_torch_rows(pattern, device),
            )
        yield "a captured call", lambda: _captured(device)


def _agree(case: Case, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    check_backend("triton", case)


def _agrees_with_torch_rows(pattern: Pattern, device: str) -> None:
    """Long enough that every program takes a second job; the oracle would not fit, the row `sdpa` does."""
    q, k, v, grad = (torch.randn(1, 16384, 8, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
    results = []
    for backend in ("triton", "sdpa"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(leaves[0], leaves[1], leaves[2], pattern, backend=backend, out_dtype=q.dtype).out
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-2, atol=4e-2)


def _captured(device: str) -> None:
    """A call in a CUDA graph, after one warm-up that put its tables on the device: the same bits on replay."""
    q = torch.randn(1, 256, 2, 64, device=device, dtype=torch.bfloat16)
    expected = attend(q, q, q, Full(causal=True), backend="triton").out
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        got = attend(q, q, q, Full(causal=True), backend="triton").out
    graph.replay()
    assert torch.equal(got, expected), "a captured call gave other bits"
