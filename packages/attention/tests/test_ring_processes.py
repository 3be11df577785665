"""Schedules over gloo processes: one start of the ranks per world, with a hard timeout."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
# Beside other work on two cores, two ranks take 75 s; four with all of the nightly product some 800 s of CPU.
HARD_TIMEOUT = 3600 if NIGHTLY else 500


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


CASES = {
    # Starting ranks takes longest: in the world that every run has, they run all cases one after the other.
    2: ["engines", "traffic", "training", "longnet", "extents", "heads", "faults"],
    1: ["engines", "traffic", "training", "extents"] if NIGHTLY else ["engines"],
    3: ["engines", "extents", "faults"],
    4: ["engines", "traffic", "training", "longnet", "extents", "heads", "faults"],
}


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
@pytest.mark.timeout(HARD_TIMEOUT + 60)
@pytest.mark.parametrize("world", [2, 1, *(pytest.param(world, marks=pytest.mark.nightly) for world in (3, 4))])
def test_what_holds_in_any_world(world, tmp_path):
    """Engines, traffic, training, LongNet, extents, heads and faults.

    1. Every pattern, layout and engine, with every option: out, lse and gradients are Local's on this rank's rows.
    2. Bytes counted are bytes sent; computing overlaps sending; training, sharding and checkpoints give one process's numbers.
    3. Data parallel and fully sharded training of a LongNet is training in one process.
    4. Every option of every module, plain and as DTensors, equals Local on the whole sequence or is refused by name.
    5. Sharded heads have their numbers among all.
    6. Where one rank differs or calls in another order, every rank raises GroupError, and is right after a reset.
    """
    check_world(CASES[world], world, tmp_path)
