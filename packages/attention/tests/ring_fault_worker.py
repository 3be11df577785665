"""Ranks that fail: `ring_fault_worker.py WORLD FOLDER SECONDS LIFE...`, a LIFE being ENGINE/FAULT/PHASE/STEP,...

Each life is one start of all ranks, forked from this process, which has loaded torch once. Of each of its faults, in order: every rank computes a call
that is right; then the last one meets FAULT at the STEP-th rectangle of PHASE ("forward", "backward"), or before its header where STEP is 0. What each rank
sees goes to FOLDER/LIFE/RANK.json, a list: the error, and whether results are right after a reset, and in a group made anew; how the ranks end goes to
FOLDER/LIFE/statuses.json.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from longattn.attention import AllGather, GroupError, PatternAttention, Ring, Schedule, Ulysses, Wiring, shard_sequence
from longattn.attention.schedules import driver
from longattn.attention.schedules.group_calls import GroupCalls
from longattn.patterncache import Dilated

# A process that a shell started in the background ignores interrupts; these are to be noticed.
signal.signal(signal.SIGINT, signal.default_int_handler)
WORLD, FOLDER, SECONDS = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
RANK = -1
"""Of this process, once it is forked; then FOLDER is that of its life."""
PATTERN = Dilated((6, 12, 12 * WORLD), (1, 2, 1), causal=True)
N = 12 * WORLD


def build(engine: str, seconds: float = 60.0) -> Schedule:
    """That engine, over all ranks."""
    kind = {"ring": Ring, "zigzag": Ring, "all_gather": AllGather, "ulysses": Ulysses}[engine]
    layout = "zigzag" if engine == "zigzag" else "contiguous"
    return kind(dist.group.WORLD, layout=layout, lengths=N, timeout=seconds)  # type: ignore[arg-type, call-arg]


def strike(fault: str) -> None:
    """The fault, on this rank."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise MemoryError("on purpose")
    elif fault in ("stop", "pause"):
        # Longer, or shorter, than the timeout; another process wakes this one.
        seconds = 2 * SECONDS if fault == "stop" else SECONDS / 4
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "interrupt":
        # The first rank is interrupted while it waits for this one, which goes on after that; or, where the interrupt waits for it, by itself.
        (asleep := FOLDER / "asleep").touch()
        deadline = time.monotonic() + 4 * SECONDS
        while asleep.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        asleep.unlink(missing_ok=True)


def interrupt_while_asleep() -> None:
    """Interrupt this process while the last rank sleeps."""
    while not (FOLDER / "asleep").exists():
        time.sleep(0.05)
    time.sleep(SECONDS / 6)  # so that this one waits for it
    signal.raise_signal(signal.SIGINT)


@contextmanager
def armed(fault: str, phase: str, step: int) -> Iterator[None]:
    """Strike at the STEP-th rectangle of PHASE, or before its header."""
    announce, count = GroupCalls.announce, [0]
    name = "attend_step" if phase == "forward" else "rectangle_gradients"
    real = getattr(driver, name)

    def announced(self: GroupCalls, fields: Any, *given: Any, **options: Any) -> Any:
        if fields.phase == phase and fields.step in ("", "keys", "to heads"):
            strike(fault)
        return announce(self, fields, *given, **options)

    def computed(*given: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            strike(fault)
        return real(*given, **options)

    with patch.object(GroupCalls, "announce", announced) if step == 0 else patch.object(driver, name, computed):
        yield


def call(module: PatternAttention, whole: list[torch.Tensor], schedule: Schedule) -> list[torch.Tensor]:
    """Output and gradients of this rank."""
    own = [shard_sequence(x, schedule)[0].requires_grad_() for x in whole]
    out = module(*own)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), own)]


def descriptors() -> int:
    """Open files and sockets of this process."""
    return len(os.listdir("/proc/self/fd"))


def meet(number: int) -> None:
    """The default group, new."""
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER}/meet{number}", rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60)
    )


def fail(number: int, engine: str, fault: str, phase: str, step: int) -> Iterator[dict[str, Any]]:
    """What this rank sees of one fault; first before the reset, and then after it."""
    schedule = build(engine)
    module = PatternAttention(PATTERN, schedule=schedule, wiring=Wiring(enable_buffer_manager=True))
    whole = [torch.randn(1, N, 2 * WORLD, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    leaves = [x.clone().requires_grad_() for x in whole]
    out = PatternAttention(PATTERN)(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]
    expected = [shard_sequence(x, schedule)[0] for x in expected]

    def right() -> bool:
        computed = call(module, whole, module.schedule)
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(computed, expected, strict=True))

    report: dict[str, Any] = {"before": right(), "right": None}
    gc.collect()
    before = descriptors(), threading.active_count()
    if RANK == 0 and fault == "interrupt":  # the others see its notice
        threading.Thread(target=interrupt_while_asleep, daemon=True).start()
    # Whoever is to be interrupted waits for longer than the interrupt takes on a busy machine; and whoever is to see a notice, than it takes.
    patient = fault == "interrupt" or (fault == "raise" and step > 0)
    module.schedule = build(engine, 60.0 if patient and RANK != WORLD - 1 else SECONDS)
    try:
        with armed(fault, phase, step) if RANK == WORLD - 1 else nullcontext():
            report["right"] = right()
    except (GroupError, MemoryError, KeyboardInterrupt) as error:
        report |= {"error": type(error).__name__, "rank": getattr(error, "rank", None), "text": str(error)}
        if isinstance(error, KeyboardInterrupt):
            report["while asleep"] = (FOLDER / "asleep").exists()
            (FOLDER / "asleep").unlink(missing_ok=True)
    yield report
    # Whoever failed, or not, comes here.
    schedule.reset(60.0)
    module.schedule = schedule
    report["after reset"] = right()
    gc.collect()
    report["kept"] = [max(0, descriptors() - before[0]), max(0, threading.active_count() - before[1])]
    report["comm"] = module.get_buffer_stats()["types"].get("comm", {}).get("active", 0)
    # The group made anew: an old name, and nothing of the old group.
    dist.destroy_process_group()
    meet(number)
    module.schedule = build(engine)
    report["anew"] = right()
    yield report


def await_survivors() -> None:
    """Until each has reported: one that leaves earlier would be gone for the others, too."""
    (FOLDER / f"reported{RANK}").touch()
    deadline = time.monotonic() + 60
    while not all((FOLDER / f"reported{rank}").exists() for rank in range(WORLD - 1)) and time.monotonic() < deadline:
        time.sleep(0.05)


def live(rank: int, folder: Path, faults: list[str]) -> None:
    """Meet, fail, say what was seen."""
    global RANK, FOLDER
    RANK, FOLDER = rank, folder
    torch.set_num_threads(1)
    meet(0)
    reports: list[dict[str, Any]] = []
    for number, asked in enumerate(faults, 1):
        engine, fault, phase, step = asked.split("/")
        reports.append({})
        for report in fail(number, engine, fault, phase, int(step)):
            reports[-1] = report
            (FOLDER / f"{RANK}.json").write_text(json.dumps(reports))
            if fault == "kill":
                await_survivors()
                return
    dist.destroy_process_group()


def start(rank: int, folder: Path, faults: list[str]) -> int:
    """The process of a rank, which ends with its life."""
    if process := os.fork():
        return process
    try:
        live(rank, folder, faults)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a rank never goes on as the process that starts the others
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Life after life."""
    for number, asked in enumerate(sys.argv[4:]):
        (folder := FOLDER / str(number)).mkdir()
        ranks = [start(rank, folder, asked.split(",")) for rank in range(WORLD)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
