"""The table: what rows declare, why they refuse, and `explain`, which needs neither data nor device."""

import itertools
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longattn.kernels
from longattn.kernels import Alibi, Capability, Softcap, attend, backends, explain
from longattn.kernels.dispatch import choosing
from longattn.kernels.dispatch import table as dispatch
from longattn.kernels.dispatch.table import row
from longattn.kernels.state import FLOATS
from longattn.patterncache import (
    BlockLayout,
    BlockSparse,
    Dilated,
    Full,
    Pattern,
    Restrict,
    Strided,
    Window,
)

LONGNET = Dilated((2048, 4096, 8192), (1, 2, 4), causal=True)
LISTED = Restrict(Restrict(Window(4), Dilated((4,), (2,))), Strided(4))
SHAPE = (2, 64, 8, 16)


def test_public_names():
    """A new export shows in review."""
    expected = {
        "AttentionProblem", "AttentionState", "Capability", "Explanation", "attend", "backends", "explain", "merge",
        "reference_attention",
    }  # fmt: skip
    assert expected <= set(longattn.kernels.__all__) <= set(dir(longattn.kernels))
    assert all(getattr(longattn.kernels, name) for name in longattn.kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'atend'"):
        longattn.kernels.atend  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", backends())
def test_every_row_declares_what_it_says(name: str):
    """A tolerance for each dtype, and only dtypes that the door lets in."""
    capability = row(name).capability
    dtypes = {d for listed in capability.dtypes.values() for d in listed}
    assert dtypes <= set(FLOATS) and dtypes <= set(capability.tolerance)
    assert all(0 < bound < 0.1 for pair in capability.tolerance.values() for bound in pair)


class NoTensors(TorchDispatchMode):
    """Fails where a tensor is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"explain called {func}")


DEVICES = ("cpu", "cuda", "mps", "cuda:3", torch.device("xpu"), None)
CUT = LONGNET & Dilated((4, 8), (1, 2))
"""Planned by cutting at every border of a segment, of which there are thousands for a thousand tokens: a million tokens, and once."""
PATTERNS = (
    Full(causal=True),
    Window(512, sinks=4),
    LONGNET,
    Restrict(LONGNET, Window(64)),
    LISTED,
    LONGNET | Window(9),
    LONGNET + LISTED,
    Restrict(LONGNET, BlockLayout("bigbird")),
)


@pytest.mark.parametrize(
    ("device", "pattern"), [*((device, pattern) for pattern in PATTERNS for device in DEVICES), ("cpu", CUT)], ids=str
)
@pytest.mark.timeout(300)
def test_explain_is_pure(device: Any, pattern: Pattern):
    """Ten million tokens on devices that are not here: no tensor, nothing that takes minutes, every row with its reasons."""
    length = 1_000_000 if pattern is CUT else 10_000_000
    with NoTensors():
        found = explain(pattern, (1, length, 8, 64), dtype=torch.bfloat16, device=device, requires_grad=True)
    assert [name for name, _ in found.rows] == list(backends())
    assert found.backend == next(name for name, reasons in found.rows if not reasons)
    lines = str(found).splitlines()
    assert lines[1].startswith("  order: fixed: ")
    assert all(f"{name}: " in line for name, line in zip(backends(), lines[2:], strict=True))


@pytest.mark.parametrize(
    "pattern",
    [Full(), Window(8, sinks=2), LONGNET, Dilated((5,), (3,)), LISTED, LONGNET | Window(4), Restrict(LONGNET, Window(4)),
     LONGNET + LISTED, LONGNET + Window(4), LONGNET & Window(4), BlockSparse(4, [[True] * 32] * 32), Restrict(LISTED, LONGNET)],
    ids=str,
)  # fmt: skip
def test_explain_knows_which_plans_list_rows(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """What a pattern says of itself, which a long rectangle goes by, is what its plan says."""
    short = explain(pattern, (1, 128, 2, 4)).problem.listed
    assert pattern.listing <= short
    monkeypatch.setattr("longattn.kernels.explaining._PLANNED_PAIRS", 0)
    assert explain(pattern, (1, 128, 2, 4)).problem.listed == short


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "mps", "dtype": torch.float64}, "dtype=float64 is not in {float16, bfloat16, float32} on mps"),
        ({"device": "cuda"}, "device=cuda is not in {cpu}"),
        ({"value_head_dim": 257}, "native: value_head_dim=257 is over 256"),
        ({"device": "cuda", "deterministic": True}, "deterministic=True is not supported on cuda"),
    ],
)
def test_explain_gives_reasons(options: dict[str, Any], words: str):
    assert words in str(explain(Full(), SHAPE, **options))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"attention_mask": True}, {"key_padding_mask": True}]
)
@pytest.mark.parametrize("pattern", [Full(), LISTED], ids=str)
def test_explain_names_the_row_that_attend_uses(
    options: dict[str, Any], pattern: Pattern, monkeypatch: pytest.MonkeyPatch
):
    """The same choice, seen from both doors."""
    served: list[str] = []
    chosen = choosing.select

    def watch(*args: Any, **kwargs: Any) -> Any:
        found = chosen(*args, **kwargs)
        served.append(found.name)
        return found

    monkeypatch.setattr("longattn.kernels.dispatch.prepared.select", watch)
    q = torch.randn(1, 8, 2, 4).to(options.get("dtype", torch.float32))
    masks = {
        "attention_mask": torch.ones(8, 8, dtype=torch.bool) if "attention_mask" in options else None,
        "key_padding_mask": torch.zeros(1, 8, dtype=torch.bool) if "key_padding_mask" in options else None,
    }
    attend(q, q, q, pattern, **masks)
    assert served == [explain(pattern, (1, 8, 2, 4), **options).backend]


NARROW = Capability(
    devices=("cpu",),
    dtypes={"cpu": (torch.float32,)},
    tolerance={torch.float32: (1e-5, 1e-5)},
    max_head_dim=8,
    listed=False,
    attention_mask=False,
    key_padding=False,
    gqa=False,
    backward=False,
    deterministic=("cuda",),
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A row that can do next to nothing, first in the table."""
    module = ModuleType("narrow_row")
    vars(module).update(CAPABILITY=NARROW, forward=row("gather").forward, backward=row("gather").backward)
    monkeypatch.setitem(sys.modules, "narrow_row", module)
    monkeypatch.setattr(dispatch, "TABLE", {"narrow": "narrow_row", **dispatch.TABLE})
    dispatch.explain_problem.cache_clear()
    yield
    dispatch.explain_problem.cache_clear()
    dispatch.row.cache_clear()


REFUSALS = [
    ({"dtype": torch.float64}, "dtype=float64 is not in {float32} on cpu"),
    ({"device": "cuda"}, "device=cuda is not in {cpu}"),
    ({"q_shape": (1, 8, 2, 9)}, "head_dim=9 is over 8"),
    ({"k_shape": (1, 8, 1, 8)}, "kv_heads=1 differs from heads=2 and grouped kv heads are not supported"),
    ({"pattern": LISTED}, "lists rows and only strided rows are supported"),
    ({"attention_mask": True}, "attention_mask is not supported"),
    ({"key_padding_mask": True}, "key_padding_mask is not supported"),
    ({"requires_grad": True}, "gradients are not supported"),
    ({"deterministic": True}, "deterministic=True is not supported on cpu"),
]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("options", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_a_declared_no_is_a_refusal_with_that_reason(options: dict[str, Any], words: str):
    """The next row serves, and the first says why it does not."""
    asked = {"pattern": Full(), "q_shape": (1, 8, 2, 8), "dtype": torch.float32, "device": "cpu", **options}
    found = explain(asked.pop("pattern"), asked.pop("q_shape"), asked.pop("k_shape", None), **asked)
    assert any(words in reason for reason in dict(found.rows)["narrow"])
    assert found.backend in backends()[1:]
    assert explain(Full(), (1, 8, 2, 8), dtype=torch.float32).backend == "narrow"


@pytest.mark.usefixtures("narrow")
def test_an_explicit_backend_serves_or_raises_with_all_reasons():
    """No silent change to another row; every reason, and every row, is in the message."""
    q = torch.randn(1, 8, 2, 16)
    mask = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="backend='narrow' cannot serve this problem") as caught:
        attend(q, q[:, :, :1], q[:, :, :1], LISTED, attention_mask=mask, backend="narrow", deterministic=True)
    words = ("head_dim=16", "kv_heads=1", "lists rows", "attention_mask is not", "deterministic=True", *backends())
    assert all(word in str(caught.value) for word in words)
    assert explain(Full(), SHAPE, backend="narrow").backend is None
    small = q[..., :8]
    assert attend(small, small, small, Full(), backend="narrow").out.isfinite().all()


@pytest.mark.usefixtures("narrow")
def test_a_forward_that_will_want_gradients_is_not_given_to_a_row_without():
    """What explain says of requires_grad, attend does."""
    q = torch.randn(1, 8, 2, 8, requires_grad=True)
    attend(q, q, q, Full()).out.sum().backward()
    assert q.grad is not None
    with pytest.raises(ValueError, match="gradients are not supported"):
        attend(q, q, q, Full(), backend="narrow")


@pytest.mark.usefixtures("narrow")
def test_no_row_at_all(monkeypatch: pytest.MonkeyPatch):
    """Where nothing fits, the message lists the table."""
    monkeypatch.setattr(dispatch, "TABLE", {"narrow": "narrow_row"})
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(ValueError, match=r"no backend fits this problem: (?s:.*)narrow: head_dim=16 is over 8"):
        attend(q, q, q, Full())


def test_capabilities_are_replaced_not_changed():
    """Frozen: a row cannot be talked into more."""
    assert replace(NARROW, gqa=True).gqa and not NARROW.gqa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [Full(), Window(3), Dilated((4, 8), (1, 2)) & Window(5)], ids=str)
def test_one_row_serves_whatever_may_be_asked(dtype: torch.dtype, pattern: Pattern):
    """Every option with every other, with gradients and without, for each dtype and kind of plan: `gather` refuses none."""
    names = ("attention_mask", "bias", "dropout", "key_padding_mask", "requires_grad", "deterministic")
    for given in itertools.product([False, True], repeat=len(names)):
        options: dict[str, Any] = dict(zip(names, given, strict=True))
        if options["attention_mask"] and options["bias"]:
            continue  # one argument, bool or floating
        for terms in (None, Softcap(3.0), Alibi(torch.ones(4))):
            found = explain(
                pattern, (1, 8, 4, 4), (1, 8, 2, 4), dtype=dtype, value_head_dim=6, score_terms=terms, **options
            )
            assert dict(found.rows)["gather"] == ()
