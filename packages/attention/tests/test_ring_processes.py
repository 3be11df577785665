"""Schedules over gloo processes: one spawn per world and test, each with a hard timeout."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
# Rank 0 starts torch in two seconds; a world of 4 on 2 cores takes longer.
HARD_TIMEOUT = 900 if NIGHTLY else 240


def run_world(cases: Sequence[str], world: int, folder: Path) -> dict[str, list[str]]:
    """{case: what each rank reported} of one world; a rank that never came to a case says so."""
    files = os.pathsep.join(str(HERE / f"ring_process_{name}.py") for name in cases)
    script = [sys.executable, str(HERE / "ring_process_worker.py"), files, str(world)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    ranks = [
        subprocess.Popen(
            [*script, str(rank), str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(world)
    ]
    output = []
    try:
        for rank in ranks:
            output.append(rank.communicate(timeout=HARD_TIMEOUT)[0].decode(errors="replace")[-3000:])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    reports = [json.loads(p.read_text()) if (p := folder / f"{n}.json").exists() else {} for n in range(world)]
    assert all(reports), "\n".join(output)
    names = list(dict.fromkeys(name for report in reports for name in report))
    found = {name: [report.get(name, "never came to it") for report in reports] for name in names}
    if any(rank.returncode for rank in ranks):
        found["all ranks end well"] = output
    return found


def check_world(cases: Sequence[str], world: int, folder: Path) -> None:
    """Assert that every case passed on every rank."""
    found = run_world(cases, world, folder)
    failed = [
        f"{name}, rank {rank}:\n{text}" for name, texts in found.items() for rank, text in enumerate(texts) if text
    ]
    assert not failed, "\n".join(failed)
    assert len(found) > 3


@pytest.mark.slow
# Two ranks are the case of the other file.
@pytest.mark.parametrize("world", [1, 2, 3, 4] if NIGHTLY else [1, 3, 4])
def test_every_engine_equals_local(world, tmp_path):
    """Every pattern, layout and engine, with every option: out, lse and gradients are Local's on this rank's rows."""
    check_world(["engines"], world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4] if NIGHTLY else [2])
def test_traffic_overlap_and_training(world, tmp_path):
    """Bytes counted are bytes sent; computing overlaps sending; training, sharding and checkpoints give one process's numbers."""
    check_world(["traffic", "training"], world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4] if NIGHTLY else [2])
def test_positions_and_lengths_are_of_the_whole(world, tmp_path):
    """Every option of every module, plain and as DTensors, equals Local on the whole sequence or is refused by name."""
    check_world(["extents"], world, tmp_path)
