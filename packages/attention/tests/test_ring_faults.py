"""A rank that dies, raises, stops or is waited for too long: no hang, no wrong number, no abort; and how it goes on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longattn.attention import GroupError
from longattn.attention.schedules import notices
from longattn.attention.schedules.group_calls import HEADERS, Exchange, GroupCalls
from longattn.attention.schedules.waiting import PendingWorks

HERE = Path(__file__).parent
SECONDS = 3.0
HARD_TIMEOUT = 240
Fault = tuple[str, str, str, int]
"""(engine, fault, phase, step)."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"),
    pytest.mark.timeout(10 * HARD_TIMEOUT),
]


def run_lives(folder: Path, world: int, lives: Sequence[Sequence[Fault]]) -> str:
    """Start the ranks once for each life; their reports are below the folder. What they wrote last."""
    asked = [",".join("/".join(map(str, fault)) for fault in life) for life in lives]
    command = [sys.executable, str(HERE / "ring_fault_worker.py"), str(world), str(folder), str(SECONDS), *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        # An interrupt that is not heeded takes four times the seconds.
        output = process.communicate(timeout=HARD_TIMEOUT + 10 * SECONDS * sum(map(len, lives)))[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = output.decode(errors="replace")[-4000:]
    assert process.returncode == 0, text
    return text


def check(folder: Path, world: int, lives: Sequence[Sequence[Fault]]) -> None:
    """Everything that is promised of faults on the last rank, one after the other, in each life."""
    text = run_lives(folder, world, lives)
    for life, faults in enumerate(lives):
        killed = faults[-1][1] == "kill"
        place = folder / str(life)
        statuses = json.loads((place / "statuses.json").read_text())
        assert statuses == [0] * (world - 1) + [-signal.SIGKILL if killed else 0], (faults, statuses, text)
        reports = [json.loads((place / f"{rank}.json").read_text()) for rank in range(world - killed)]
        for number, fault in enumerate(faults):
            check_fault(world, fault, [report[number] for report in reports])


def check_fault(world: int, fault: Fault, reports: list[Any]) -> None:
    """What each rank saw of one."""
    _, kind, _, step = fault
    survivors = reports[: world - 1]
    assert all(report["before"] for report in reports), (fault, reports)
    for report in survivors:
        # A rank whose messages were all there before the fault may end well; it never has a wrong number.
        assert report["right"] is not False, (fault, reports)
        assert report["right"] or report["error"] in ("GroupError", "KeyboardInterrupt"), (fault, reports)
        # An interrupt does not wait for the message that is waited for.
        assert report.get("while asleep", True), (fault, reports)
    if kind == "pause":
        assert all(report["right"] for report in reports), (fault, reports)
    elif kind == "raise" and step:
        # Not by timeout: the failing rank says so.
        texts = [report["text"] for report in survivors if not report["right"]]
        assert all(f"rank {world - 1} failed in call" in text for text in texts), (fault, reports)
    elif step == 0:
        interrupted = kind == "interrupt"
        errors = ["KeyboardInterrupt" if interrupted and rank == 0 else "GroupError" for rank in range(world - 1)]
        assert [report.get("error") for report in survivors] == errors, (fault, reports)
        to_blame = 0 if interrupted else world - 1
        blamed = {report["rank"] for report in survivors if report["error"] == "GroupError"}
        assert blamed <= {to_blame}, (fault, reports)
    if kind != "kill":
        for report in reports:
            after = [report[name] for name in ("after reset", "anew", "kept", "comm")]
            assert after == [True, True, [0, 0], 0], (fault, reports)


# Those that do not end a rank come first: one start of two ranks serves all. The rest is nightly, and `nox -s faults`.
DEFAULT: list[Fault] = [
    ("ulysses", "raise", "forward", 1),
    ("ring", "stop", "forward", 0),
    ("all_gather", "interrupt", "backward", 0),
    ("zigzag", "pause", "forward", 1),
    ("ring", "kill", "backward", 2),
]


def of_engine(world: int, engine: str) -> list[Fault]:
    """Every fault at every step of every phase. Engines that gather have one rectangle."""
    steps = range((world if engine in ("ring", "zigzag") else 1) + 1)
    kinds = ("raise", "stop", "pause", "interrupt", "kill")
    return [(engine, kind, phase, step) for kind in kinds for phase in ("forward", "backward") for step in steps]


def test_a_rank_fails(tmp_path):
    """The others raise GroupError within the timeout, or end well; after a reset, and in a new group, every number is right."""
    check(tmp_path, 2, [DEFAULT])


def test_a_message_that_cannot_be_posted_names_its_rank():
    """The rank that it is for or from, where the ones before it were posted; and not the first of all."""

    def post(receives, sends, tag):
        for peer, _ in (*receives, *sends):
            if peer == 2:
                raise RuntimeError("Connection closed by peer")
            yield object()

    calls: Any = SimpleNamespace(
        place=SimpleNamespace(post=post), posted={}, number=1, first_tag=GroupCalls.first_tag,
        error=lambda what, rank, step: GroupError(what, rank=rank, step=step),
    )  # fmt: skip
    for peers in ([1, 2], [0, 2]):
        parcels = [(peer, torch.zeros(1)) for peer in peers]
        for sends, receives in ((parcels, []), ([], parcels), (parcels[:1], parcels)):
            with pytest.raises(GroupError, match="rank 2 is gone: a message could not be posted: Conn") as caught:
                Exchange(calls, "header", sends, receives, HEADERS)
            assert caught.value.rank == 2


def test_a_notice_names_the_rank_that_is_gone(monkeypatch):
    """Rank 2 has noticed that rank 3 is gone: rank 0, which waits for rank 1, names rank 3; a rank that is blamed itself names none."""
    store = dist.HashStore()
    monkeypatch.setattr(notices, "_store_of", lambda place: store)

    def calls_of(rank):
        place: Any = SimpleNamespace(rank=rank, size=4, name="0", timeout=60.0)
        calls = GroupCalls(place)
        calls.timeout, calls._notice_key = 60.0, "key"
        return calls

    calls_of(2)._tell_others(GroupError("rank 3 is gone", rank=3))
    for rank, named in ((0, 3), (3, None)):
        never: Any = PendingWorks([(1, torch.zeros(1), None)])
        with pytest.raises(GroupError, match="rank 2 failed in call 0 .*: rank 3 is gone") as caught:
            calls_of(rank).await_job(never, "header")
        assert caught.value.rank == named


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ring", "zigzag", "all_gather", "ulysses"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_fault_at_every_step(world, engine, tmp_path):
    """The same for every engine, fault, phase and step."""
    faults = of_engine(world, engine)
    lives = [[fault] for fault in faults if fault[1] == "kill"]
    check(tmp_path, world, [*lives, [fault for fault in faults if fault[1] != "kill"]])
