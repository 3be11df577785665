"""`examples/train_bytes.py` and `examples.quality` in small: they run, and a run that was stopped goes on with the same bits."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.workspace import ROOT

SMALL = [
    "--context",
    "96",
    "--d-model",
    "16",
    "--heads",
    "2",
    "--batch",
    "2",
    "--most-bytes",
    "20000",
    "--deterministic",
]


@pytest.fixture
def train_bytes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_bytes", ROOT / "examples" / "train_bytes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_is_the_run(train_bytes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Six steps, and three and three: the same losses to the last bit, in a table, and as a picture where there is matplotlib."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_bytes.main([*SMALL, "--steps", "6", "--out", str(whole)])
    train_bytes.main([*SMALL, "--steps", "3", "--out", str(parts)])
    # What was drawn from torch's generator in between must not matter.
    torch.rand(7)
    train_bytes.main([*SMALL, "--steps", "6", "--resume", "--out", str(parts)])
    assert (
        rows(whole.with_suffix(".csv")) == rows(parts.with_suffix(".csv")) and len(rows(whole.with_suffix(".csv"))) == 6
    )
    assert "6/6" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(train_bytes: ModuleType, tmp_path: Path):
    """Thirty steps over a text of two letters."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"ab" * 400)
    train_bytes.main([*SMALL, "--steps", "30", "--lr", "1e-2", "--data", str(text), "--out", str(tmp_path / "learnt")])
    losses = [float(row["loss"]) for row in rows(tmp_path / "learnt.csv")]
    assert losses[-1] < losses[0] / 2


def test_short_data_is_refused(train_bytes: ModuleType, tmp_path: Path):
    """By name."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"short")
    with pytest.raises(SystemExit, match="--data must hold more than --context=96 bytes, got 5"):
        train_bytes.main([*SMALL, "--data", str(text), "--out", str(tmp_path / "none")])


def test_the_predictions_are_what_the_patterns_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """predictions.csv, committed before the runs, is what its module writes today."""
    from examples.quality import predictions

    committed = predictions.PATH.read_text()
    monkeypatch.setattr(predictions, "PATH", tmp_path / "again.csv")
    predictions.write()
    assert (tmp_path / "again.csv").read_text() == committed


def test_a_run_of_each_kind_makes_a_row(tmp_path: Path):
    """Every family of patterns trains; a row says what came out."""
    from examples.quality.families import FAMILIES
    from examples.quality.tasks import TASKS
    from examples.quality.training import Plan, append, run

    plan = Plan(length=64, width=16, steps=2)
    for family in FAMILIES:
        append(tmp_path / "rows.csv", run("recall", family, 0, 1e-3, plan, lambda line: None))
    for task in TASKS:
        append(tmp_path / "rows.csv", run(task, "dense", 0, 1e-3, plan, lambda line: None))
    written = rows(tmp_path / "rows.csv")
    assert len(written) == len(FAMILIES) + len(TASKS) and {row["parameters"] for row in written} == {
        written[0]["parameters"]
    }
    assert all(0 <= float(row["accuracy"]) <= 1 and row["steps"] == "2" for row in written)
