"""The tiled rows: what they skip, how much memory they work in, and that their two orders agree. Values are in test_rows."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longattn.kernels import attend
from longattn.kernels.dispatch.call import Call
from longattn.kernels.eager import grouping
from longattn.kernels.eager import tiled as torch_tiled
from longattn.kernels.eager.tiles import Tile
from longattn.kernels.testing import Case, assert_near
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Restrict, Span, Strided, Window

LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
ROWS = pytest.mark.parametrize("name", ["tiled", "tiled_k_major"])
Rows = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Rows, bool]]:
    """(query rows, key rows) and whether it has a mask, of every tile that a row computes, in its order; tiles are 4 by 4."""
    found: list[tuple[Rows, bool]] = []

    def watch(module: ModuleType, name: str) -> None:
        compute = getattr(module, name)

        def watched(q: torch.Tensor, k: torch.Tensor, tile: Tile, call: Call) -> object:
            rows = [tuple(index.rows().ravel().tolist()) for index in (tile.q, tile.k)]
            found.append(((rows[0], rows[1]), tile.seen is not None))
            return compute(q, k, tile, call)

        monkeypatch.setattr(module, name, watched)

    monkeypatch.setattr(torch_tiled, "TILE", 4)
    watch(grouping, "masked_scores")
    watch(torch_tiled, "masked_scores")
    watch(torch_tiled, "scores_and_slope")
    return found


def expected_tiles(pattern: Pattern, n: int) -> list[tuple[Rows, bool]]:
    """What the meaning of the plan's branches says: DENSE without a mask, TRIANGLE with one, SKIP not at all."""
    found = []
    for branch in pattern.plan(Rectangle(2, Span(0, n), Span(0, n))).branches:
        for t, (q, k) in enumerate(zip(branch.q.rows(), branch.k.rows(), strict=True)):
            shown = torch.ones(len(q), len(k), dtype=torch.bool)
            if branch.visible is not None:
                shown = torch.tensor(branch.visible[t if len(branch.visible) > 1 else 0])
            for a in range(0, len(q), 4):
                for b in range(0, len(k), 4):
                    part = shown[a : a + 4, b : b + 4]
                    if part.any():
                        rows = (tuple(q[a : a + 4].tolist()), tuple(k[b : b + 4].tolist()))
                        found.append((rows, not bool(part.all())))
    return found


PATTERNS = [
    Full(),
    Full(causal=True),
    Window(6),
    Window(5, sinks=2),
    Window(3, causal=False),
    LONGNET,
    LISTED,
    BlockSparse(8, [[True, False, True], [False, True, True], [True, True, True]], causal=True),
]


@ROWS
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tiles_are_those_of_the_plan(name: str, pattern: Pattern, visited: list[tuple[Rows, bool]]):
    """Each tile that shows a pair once, with a mask only where one is needed; no other; forward and backward."""
    data = Case(pattern, (22, 22), batch=1).tensors()
    q = data.q.requires_grad_()
    out = attend(q, data.k, data.v, pattern, backend=name).out
    expected = sorted(expected_tiles(pattern, 22))
    assert sorted(visited) == expected
    visited.clear()
    out.sum().backward()
    assert sorted(visited) == expected


@pytest.mark.parametrize(("causal", "kinds"), [(False, (36, 0)), (True, (15, 6))])
def test_kinds_are_counted(causal: bool, kinds: tuple[int, int], visited: list[tuple[Rows, bool]]):
    """24 tokens in tiles of 4: 36 dense, or 15 dense, 6 triangles and 15 skipped."""
    data = Case(Full(causal), (24, 24), batch=1).tensors()
    attend(data.q, data.k, data.v, Full(causal), backend="tiled")
    masked = [has_mask for _, has_mask in visited]
    assert (masked.count(False), masked.count(True)) == kinds


def test_orders(visited: list[tuple[Rows, bool]]):
    """Q-major: a q tile stays while keys stream; K-major: a key tile stays while queries stream."""
    data = Case(Full(), (12, 12), batch=1).tensors()
    for name, stays in (("tiled", 0), ("tiled_k_major", 1)):
        visited.clear()
        attend(data.q, data.k, data.v, Full(), backend=name)
        resident = [rows[stays] for rows, _ in visited]
        assert resident == sorted(resident) and len(resident) == 9
        assert [rows[1 - stays] for rows, _ in visited] == sorted({rows[1 - stays] for rows, _ in visited}) * 3


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("options", [{}, {"mask": "+hqk", "padding": True}, {"prior": True, "dropout_p": 0.3}], ids=str)
def test_orders_agree(pattern: Pattern, options: dict[str, Any]):
    """Out, lse and gradients of Q-major are those of K-major."""
    results = []
    for name in ("tiled", "tiled_k_major"):
        case = Case(pattern, (300, 300), batch=1, head_dim=4, **options) if isinstance(pattern, Full) else Case(
            pattern, (22, 22), group=2, **options
        )  # fmt: skip
        data = case.tensors()
        q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
        state = attend(q, k, v, pattern, prior=data.prior, attention_mask=data.mask, key_padding_mask=data.padding,
                       dropout_p=case.dropout_p, seed=1, backend=name)  # fmt: skip
        results.append((state.out, state.lse, *torch.autograd.grad(state.out, (q, k, v), data.grad_out)))
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, 2e-5, 2e-5, "order")


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that any operation inside the row makes, `(batch, N, ...)` accumulators by themselves."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.scratch, self.whole = length, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longattn":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}  # fmt: skip
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                if x.dim() >= 3 and x.shape[1] == self.length:
                    self.whole += x.untyped_storage().nbytes()
                else:
                    self.scratch = max(self.scratch, x.untyped_storage().nbytes())
        return found


def memory(name: str, pattern: Pattern, n: int, backward: bool) -> tuple[int, float]:
    """(bytes of the largest scratch, bytes of all accumulators in units of q) of a call with `n` tokens."""
    q, k, v = (torch.randn(1, n, 1, 64, requires_grad=backward) for _ in range(3))
    state = None if not backward else attend(q, k, v, pattern, backend=name)
    cotangents = torch.ones(1, n, 1, 64), torch.ones(1, n, 1)
    with Largest(n) as seen:
        if state is None:
            attend(q, k, v, pattern, backend=name)
        else:
            torch.autograd.grad([state.out, state.lse], [q, k, v], cotangents)
    return seen.scratch, seen.whole / q.untyped_storage().nbytes()


@ROWS
@pytest.mark.parametrize("pattern", [Full(causal=True), Dilated((1024, 2048), (1, 2))], ids=str)
def test_working_memory_is_a_tile(name: str, pattern: Pattern):
    """However long the sequence: scratch is a tile's scores; beyond it only out and lse, or dq, dk, dv and numbers a row."""
    for backward, most in ((False, 1.1), (True, 3.1)):
        short, long = (memory(name, pattern, n, backward) for n in (1024, 2048))
        assert short[0] == long[0] <= torch_tiled.TILE**2 * 4
        assert long[1] <= most
