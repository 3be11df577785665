"""`examples/train_bytes.py` and `examples.quality` in small: they run, and a run that was stopped goes on with the same bits."""

import csv
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

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


KILLED = """
import os, signal, sys
script, *words = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
import train_bytes
train_bytes.torch.set_num_threads(1)
train_bytes.bar = lambda step, *rest: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else str(step)
train_bytes.main(words)
"""


def test_a_killed_run_goes_on_with_its_bits(
    train_bytes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Eight steps; and eight of which a process was killed in the fifth, one past its checkpoint: the same losses to the last bit, and a picture."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_bytes.main([*SMALL, "--steps", "8", "--out", str(whole)])
    words = [*SMALL, "--steps", "8", "--save-every", "2", "--out", str(parts)]
    command = [sys.executable, "-c", KILLED, str(ROOT / "examples" / "train_bytes.py"), *words]
    died = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert len(torch.load(parts.with_suffix(".pt"), weights_only=True)["losses"]) == 4
    # What was drawn from torch's generator in between must not matter.
    torch.rand(7)
    train_bytes.main([*words, "--resume"])
    assert rows(whole.with_suffix(".csv")) == rows(parts.with_suffix(".csv"))
    assert len(rows(whole.with_suffix(".csv"))) == 8 and "8/8" in capsys.readouterr().out
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


@pytest.mark.parametrize("equal", ["parameters", "flops"])
def test_a_run_of_each_kind_makes_a_row(equal: str, tmp_path: Path):
    """Every family trains, at equal parameters, or at no more work than a narrower one's eighth of the keys; a row says what came out."""
    from examples.quality.families import FAMILIES
    from examples.quality.rows import Rows
    from examples.quality.tasks import TASKS
    from examples.quality.training import Plan, run

    plan = Plan(length=64, width=16, steps=2, equal=equal)
    runs = [("recall", family) for family in FAMILIES] + [(task, "dense") for task in TASKS]
    file = Rows(tmp_path / "rows.csv")
    for task, family in runs:
        file.append(asdict(run(task, family, 0, 1e-3, plan, lambda line: None)))
    assert file.finished({"task": "recall", "family": "dense", "rate": 1e-3, "seed": 0})
    assert not file.finished({"task": "recall", "family": "dense", "rate": 1e-3, "seed": 1})
    assert all(row["commit"] and row["cpu_model"] and row["date"] for row in rows(tmp_path / "rows.csv"))
    written = {row["family"]: row for row in rows(tmp_path / "rows.csv")}
    assert len(rows(tmp_path / "rows.csv")) == len(runs) and set(written) == set(FAMILIES)
    assert all(0 <= float(row["accuracy"]) <= 1 and row["steps"] == "2" for row in written.values())
    widths = {family: int(row["width"]) for family, row in written.items()}
    if equal == "parameters":
        assert set(widths.values()) == {16} and len({row["parameters"] for row in written.values()}) == 1
        assert int(written["dense"]["flops"]) > int(written["window"]["flops"])
    else:
        assert widths["dense"] < widths["window"] <= widths["islands"]
        assert all(0.5 < int(row["flops"]) / int(written["window"]["flops"]) < 1.3 for row in written.values())


def test_chosen_blocks_are_those_that_score_best():
    """A block of keys is seen by the queries that like it, and hidden from those that like it least."""
    from examples.quality.families import BestBlocks

    q, k, v = torch.zeros(3, 1, 16, 1, 4)
    q[0, 8:, 0, 0] = torch.tensor([-10.0] * 4 + [10.0] * 4)
    k[0, 4:8, 0, 0] = 10.0
    v[0, 4:8, 0, 1] = 1.0
    out = BestBlocks(4, 1).attend(q, k, v)
    assert out[0, 13, 0, 1] == pytest.approx(1.0, abs=1e-3)
    assert out[0, 11, 0, 1] == 0


def torchrun(script: str, *words: str, ranks: int, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """An example under torchrun, which starts failed workers again so many times."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    command += ["--nnodes", "1", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += [str(ROOT / "examples" / script), *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def train_mesh(folder: Path, *words: str, ranks: int = 1) -> list[float]:
    """The losses of `examples/train_mesh.py` under torchrun, which starts failed workers again once."""
    run = torchrun("train_mesh.py", "--out", str(folder), *words, ranks=ranks, restarts=1)
    assert ("exitcode: -9" in run.stderr) == ("--kill-at" in words)
    with (folder / "losses.csv").open(newline="") as file:
        return [float(loss) for _, loss in csv.reader(file)]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_a_killed_worker_changes_no_loss(tmp_path: Path):
    """torchrun starts the workers again, they go on from the checkpoint: the same bits. A mesh (2, 2, 2) has the losses of one process."""
    whole = train_mesh(tmp_path / "whole", "--cp", "2", ranks=2)
    killed = train_mesh(tmp_path / "killed", "--cp", "2", "--kill-at", "5", ranks=2)
    assert killed == whole
    assert train_mesh(tmp_path / "one") == pytest.approx(whole, abs=1e-12)
    mesh = train_mesh(tmp_path / "mesh", "--dp", "2", "--cp", "2", "--tp", "2", ranks=8)
    assert mesh == pytest.approx(whole, abs=1e-12)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_a_ring_learns_what_one_process_learns(train_bytes: ModuleType, tmp_path: Path):
    """The context over two processes: the same losses, and a checkpoint with which one process goes on."""
    one, ring = tmp_path / "one", tmp_path / "ring"
    train_bytes.main([*SMALL, "--steps", "6", "--out", str(one)])
    torchrun("train_bytes.py", *SMALL, "--steps", "4", "--out", str(ring), ranks=2)
    train_bytes.main([*SMALL, "--steps", "6", "--resume", "--out", str(ring)])
    ours, theirs = ([float(row["loss"]) for row in rows(path.with_suffix(".csv"))] for path in (one, ring))
    assert ours == pytest.approx(theirs, abs=1e-4) and len(ours) == 6
