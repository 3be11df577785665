"""The Triton row seen from outside: what it declares and refuses, without a GPU and without importing triton."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from longattn.kernels import attend, explain
from longattn.kernels.dispatch import choosing
from longattn.kernels.dispatch import table as dispatch
from longattn.kernels.dispatch.table import RowFailure, row
from longattn.kernels.triton.availability import FAILURES, INTERPRETED
from longattn.kernels.triton.configurations import (
    ARCHITECTURES,
    HEAD_DIMS,
    KERNELS,
    TABLE,
    choose,
    table_architecture,
)
from longattn.patterncache import Dilated, Full, Window

SHAPE = (1, 4096, 8, 64)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where triton is installed, whether or not it is."""
    monkeypatch.setattr("longattn.kernels.triton.availability.missing", lambda: None)


def test_nothing_imports_triton_before_the_row_is_used():
    """The table, its reasons, the tables of jobs and the configurations need numpy and torch."""
    code = (
        "import sys, longattn.kernels as k, longattn.kernels.triton.passes, longattn.kernels.triton.configurations\n"
        "from longattn.patterncache import Full\n"
        "k.explain(Full(), (1, 8, 2, 16), device='cuda'), k.backends('cuda')\n"
        "print('triton' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.strip() == "False"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_86", "sm_89", "sm_90a", "sm_120", "gfx90a"])
def test_explain_speaks_of_architectures_that_are_not_here(architecture: str):
    """The row serves every one of them, training included."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "architecture": architecture}
    for pattern in (Full(causal=True), Window(512), Dilated((2048, 4096), (1, 2))):
        assert explain(pattern, SHAPE, **options, requires_grad=True, deterministic=True).backend == "triton"
    assert f"cuda {architecture}" in str(explain(Full(), SHAPE, **options))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "sm_75"}, "architecture=sm_75 is not in"),
        ({"architecture": "gfx1100"}, "architecture=gfx1100 is not in"),
        ({"q_shape": (1, 64, 2, 257)}, "head_dim=257 is over 256"),
        ({"dtype": torch.float64}, "dtype=float64 is not in {float16, bfloat16, float32} on cuda"),
        ({"device": "mps"}, "device=mps is not in {cuda"),
        ({"bias": True, "requires_grad": True}, "the gradient of a floating attention_mask (bias) is not supported"),
    ],
)
def test_reasons(options: dict[str, Any], words: str):
    """What it cannot do is a sentence, and another row serves."""
    asked: dict[str, Any] = {"q_shape": SHAPE, "dtype": torch.bfloat16, "device": "cuda", **options}
    found = explain(Full(), asked.pop("q_shape"), **asked)
    assert any(words in reason for reason in dict(found.rows)["triton"])
    assert found.backend != "triton"


@pytest.mark.parametrize("value", ["hopper", "sm90", "", 90])
def test_an_architecture_has_a_name(value: Any):
    with pytest.raises((ValueError, TypeError), match="architecture must be None or a name such as 'sm_90'"):
        explain(Full(), SHAPE, architecture=value)


@pytest.mark.skipif(INTERPRETED, reason="interpreting, the row serves CPU tensors")
def test_a_wrong_device_is_a_reason_and_no_traceback_of_triton():
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot serve this problem(?s:.*)triton: .*device=cpu is not in \{cuda\}"
    ):
        attend(q, q, q, Full(), backend="triton")


def test_a_compiler_that_fails_is_named_or_replaced(monkeypatch: pytest.MonkeyPatch):
    """Named, the failure is raised with its configuration; unnamed, the next row serves, and explain says why from then on."""
    said = "forward_kernel with {'BLOCK_M': 128} does not compile: PTXASError: too hot"

    def fail(*_: Any) -> Any:
        FAILURES.append(said)
        raise RowFailure(said)

    broken = dispatch.TableRow("triton", row("gather").capability, fail, fail, lambda: (FAILURES or [None])[0])
    chosen = row
    for module in (dispatch, choosing):
        monkeypatch.setattr(module, "row", lambda name: broken if name == "triton" else chosen(name))
    dispatch.explain_problem.cache_clear()
    q = torch.randn(1, 8, 2, 16)
    try:
        with pytest.raises(RowFailure, match="BLOCK_M"):
            attend(q, q, q, Full(), backend="triton")
        FAILURES.clear()
        assert attend(q, q, q, Full()).out.isfinite().all()
        found = explain(Full(), (1, 8, 2, 16), dtype=torch.float32)
        assert said in dict(found.rows)["triton"] and found.backend != "triton"
    finally:
        FAILURES.clear()
        dispatch.explain_problem.cache_clear()


def test_every_line_of_the_table_is_there_and_fits():
    """Each kernel, architecture, width and element size has a line; tiles are powers of two of at least 16 rows."""
    expected = {(k, a, d, s) for k in KERNELS for a in ARCHITECTURES for d in HEAD_DIMS for s in (2, 4)}
    assert set(TABLE) == expected
    for tile in TABLE.values():
        assert tile.owned >= 16 and tile.streamed >= 16 and not tile.owned & (tile.owned - 1)
        assert (
            not tile.chunk & (tile.chunk - 1)
            and not tile.streamed & (tile.streamed - 1)
            and tile.warps in (4, 8)
            and tile.stages >= 1
        )
    assert choose("forward", "sm_90", 72, 2)[1] == 128 and choose("forward", "sm_90", 1, 2)[1] == 16
    assert table_architecture("sm_86") == "sm_89" and table_architecture("sm_103") == "sm_100"
