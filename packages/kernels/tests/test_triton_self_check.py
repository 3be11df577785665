"""A kernel form checks itself once a device: what is kept, what is asked again, and who serves where it was wrong. No GPU, no triton."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longattn.kernels import cachefolder, explain
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.triton import paged_check, self_check
from longattn.kernels.triton.row import attend_pages
from longattn.kernels.triton.self_check import Form, forms_of, standing
from longattn.patterncache import Full

PROBLEM = AttentionProblem("cuda", torch.bfloat16, 8, 2, 72, key_padding=True, backward=True, deterministic=True)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Form]:
    """A device is here, and forms that run on it are written down; a new process each time `OUTCOMES` is cleared."""
    ran: list[Form] = []
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGATTN_SELF_CHECK", raising=False)
    monkeypatch.setattr(self_check, "OUTCOMES", {})
    monkeypatch.setattr(self_check, "_device_of", lambda architecture: torch.device("cuda", 0))
    monkeypatch.setattr(self_check, "describe", lambda device: "a card, driver 1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_check, "wrong", lambda form, device: ran.append(form) or "")
    return ran


def test_a_problem_needs_a_form_a_direction():
    forward, backward = forms_of(PROBLEM)
    assert str(forward) == "forward bfloat16 D128 grouped key_padding"
    assert str(backward) == "backward bfloat16 D128 grouped key_padding deterministic"


def test_score_terms_and_a_value_width_of_its_own_are_other_forms():
    """Each is compiled for itself."""
    problem = AttentionProblem("cuda", torch.float16, 8, 8, 192, value_head_dim=128, softcap=True, by_distance=True)
    assert str(*forms_of(problem)) == "forward float16 D256 DV128 softcap by_distance"


def test_pages_are_read_by_a_kernel_that_was_right(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    """Asked once for each form; one that was wrong leaves pages to torch, and LONGATTN_SELF_CHECK=0 asks nothing."""
    ran: list[str] = []
    monkeypatch.setattr(paged_check, "describe", self_check.describe)
    monkeypatch.setattr(paged_check, "wrong", lambda form, device, launch: ran.append(str(form)) or "")
    half: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    cache: Any = SimpleNamespace(keys=SimpleNamespace(dtype=torch.int8), widths=(64, 32))
    assert paged_check.passed(cache, half, attend_pages) and paged_check.passed(cache, half, attend_pages)
    assert ran == ["float16 over pages of int8 D64 DV32"]
    self_check.OUTCOMES.clear()
    assert paged_check.passed(cache, half, attend_pages) and len(ran) == 1
    cache.widths = (64, 64)
    monkeypatch.setattr(paged_check, "wrong", lambda form, device, launch: "out is 0.5 off")
    assert not paged_check.passed(cache, half, attend_pages)
    monkeypatch.setenv("LONGATTN_SELF_CHECK", "0")
    assert paged_check.passed(cache, half, attend_pages)


def test_what_was_right_is_kept_on_disk(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    """For this device and driver; another driver asks again. Without `run` nothing runs, and explain says so."""
    assert standing(PROBLEM, run=False).startswith("unchecked: forward bfloat16 D128") and not checked
    assert standing(PROBLEM, run=True) == "checked" and len(checked) == 2
    self_check.OUTCOMES.clear()
    assert standing(PROBLEM, run=True) == standing(PROBLEM, run=False) == "checked" and len(checked) == 2
    monkeypatch.setattr(self_check, "describe", lambda device: "a card, driver 2")
    assert standing(PROBLEM, run=True) == "checked" and len(checked) == 4


def test_what_was_wrong_refuses_and_runs_again_in_the_next_process(
    checked: list[Form], monkeypatch: pytest.MonkeyPatch
):
    ran: list[Form] = []
    monkeypatch.setattr(self_check, "wrong", lambda form, device: ran.append(form) or "out is 0.5 off")
    assert standing(PROBLEM, run=True) == standing(PROBLEM, run=True) == "failed: out is 0.5 off" and len(ran) == 1
    self_check.OUTCOMES.clear()
    assert standing(PROBLEM, run=True) == "failed: out is 0.5 off" and len(ran) == 2


def test_a_forged_outcome_is_not_believed(checked: list[Form], tmp_path: Path):
    assert standing(PROBLEM, run=True) == "checked"
    self_check.OUTCOMES.clear()
    for file in (tmp_path / "cache").glob("self-check-*.txt"):
        file.write_text("right: everything\n")
    assert standing(PROBLEM, run=True) == "checked" and len(checked) == 4


def test_a_disk_that_fails_costs_a_check_and_no_call(
    checked: list[Form], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A full one, or a file that cannot be read: a warning, and the next process checks again."""

    def fails(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cachefolder, "read_text", fails)
    monkeypatch.setattr(cachefolder, "keep_text", fails)
    assert standing(PROBLEM, run=True) == standing(PROBLEM, run=True) == "checked" and len(checked) == 2
    assert "are not kept in" in caplog.text and "No space left" in caplog.text
    self_check.OUTCOMES.clear()
    assert standing(PROBLEM, run=True) == "checked" and len(checked) == 4


def test_no_check_runs_while_a_graph_is_captured(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    """It would be captured too."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert standing(PROBLEM, run=True).startswith("unchecked") and not checked


def test_the_check_can_be_left_out(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LONGATTN_SELF_CHECK", "0")
    assert standing(PROBLEM, run=True) == "unchecked: LONGATTN_SELF_CHECK=0" and not checked


def test_explain_says_where_a_form_stands(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    """A wrong form is a reason, and another row serves."""
    monkeypatch.setattr("longattn.kernels.triton.availability.missing", lambda: None)
    asked = {"dtype": torch.bfloat16, "device": "cuda", "architecture": "sm_90"}
    assert "triton: chosen; unchecked: forward bfloat16 D64 did not run" in str(
        explain(Full(), (1, 64, 2, 64), **asked)
    )
    standing(AttentionProblem("cuda", torch.bfloat16, 2, 2, 64), run=True)
    assert "triton: chosen; checked" in str(explain(Full(), (1, 64, 2, 64), **asked))
    monkeypatch.setattr(self_check, "wrong", lambda form, device: "out is 0.5 off")
    self_check.OUTCOMES.clear()
    self_check.OUTCOMES[forms_of(AttentionProblem("cuda", torch.bfloat16, 2, 2, 64))[0], "a card, driver 1"] = (
        "out is 0.5 off"
    )
    found = explain(Full(), (1, 64, 2, 64), **asked)
    assert dict(found.rows)["triton"] == ("failed: out is 0.5 off",) and found.backend != "triton"


DENSE = {"dtype": torch.bfloat16, "device": "cuda", "architecture": "sm_90"}


def test_the_kernel_for_dense_tiles_is_off_until_it_was_right(checked: list[Form], monkeypatch: pytest.MonkeyPatch):
    """It has a form of its own, which refuses nothing: the other kernel serves meanwhile. explain says which does."""
    monkeypatch.setattr("longattn.kernels.triton.availability.missing", lambda: None)
    problem = AttentionProblem("cuda", torch.bfloat16, 2, 2, 64, architecture="sm_90")
    assert self_check.dense_standing(problem, run=False) is None and not checked
    assert "the warp-specialised one for dense tiles did not run on this device yet" in str(
        explain(Full(), (1, 8192, 2, 64), **DENSE)
    )
    assert self_check.dense_standing(problem, run=True) == "" and str(checked[0]) == "dense forward bfloat16 D64"
    assert "dense tiles by the warp-specialised kernel" in str(explain(Full(), (1, 8192, 2, 64), **DENSE))
    self_check.OUTCOMES.clear()
    monkeypatch.setattr(self_check, "known", lambda form, where: "out is 0.5 off" if "dense" in form.direction else "")
    found = explain(Full(), (1, 8192, 2, 64), **DENSE)
    assert found.backend == "triton" and "(the warp-specialised one for dense tiles failed: out is 0.5 off)" in str(
        found
    )


@pytest.mark.parametrize(
    ("options", "lengths"),
    [({}, (1, 8)), ({"key_padding_mask": True}, (1, 8192)), ({"dtype": torch.float32}, (1, 8192)), ({"dropout": True}, (1, 8192)),
     ({"architecture": "sm_80"}, (1, 8192))],
    ids=["few queries", "padding", "float32", "dropout", "Ampere"],
)  # fmt: skip
def test_explain_says_nothing_of_a_kernel_that_a_call_cannot_take(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], lengths: tuple[int, int]
):
    monkeypatch.setattr("longattn.kernels.triton.availability.missing", lambda: None)
    assert "warp-specialised" not in str(explain(Full(), (*lengths, 2, 64), **{**DENSE, **options}))


def test_without_a_check_the_kernel_for_dense_tiles_does_not_serve(
    checked: list[Form], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LONGATTN_SELF_CHECK", "0")
    q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="meta")
    assert not self_check.dense_passed(q, q) and not checked
