"""`python -m benchmarks.simulation_figures [measured | planned]`: the simulation of rings, held beside measured steps, and far past them.

"measured" appends to `results/simulation.csv`: predicted over measured seconds and bytes of a forward and backward on 2 and 4 gloo processes of this machine. The
prediction knows dense attention's FLOP a second of one process alone, what a message takes, how many cores there are, and the plans.
"planned" writes `results/simulation-planned.csv`: steps of 1M to 1G tokens on 8 to 1024 devices. Nothing there was run.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import record
from benchmarks.figures import Figure, append
from benchmarks.ring_figures import FIXED_MALLOC, ask
from benchmarks.simulation_rank import CALLS, HEAD_DIM, HEADS
from longattn.attention.schedules.simulation import ENGINES, Hardware, simulate
from longattn.attention.schedules.traffic import ScheduledCall
from longattn.kernels.interface import MACHINES
from longattn.patterncache import Dilated, Full, Pattern, Window

MODULE, LENGTH, MOST = "benchmarks.simulation_rank", 8192, 1.25
EFFICIENCY, LINK = 0.4, 50e9
"""Share of a device's peak, and bytes a second that it receives: what `longattn plan` assumes unless it is told."""
PLANNED = ((1 << 20, 8), (1 << 23, 32), (1 << 26, 128), (1 << 30, 1024))
DEVICES = ("A100", "H100", "B200", "MI300X")


def measured() -> Iterator[Figure]:
    """Each call on 2 and 4 processes."""
    alone, link = ask(1, "device", 2048, MODULE), ask(2, "link", 0, MODULE)
    assert isinstance(alone, dict) and isinstance(link, dict)
    cores, fixed_malloc = os.cpu_count() or 1, " ".join("=".join(pair) for pair in FIXED_MALLOC.items())
    for world in (2, 4):
        at = Hardware(**alone, **link, load=max(1.0, world / cores))
        steps, held = ask(world, "steps", LENGTH, MODULE), ask(world, "memory", LENGTH, MODULE, FIXED_MALLOC)
        assert isinstance(steps, list) and isinstance(held, list)
        for (name, engine, make), milliseconds, nbytes in zip(CALLS, steps, held, strict=True):
            call = ScheduledCall(make(LENGTH), LENGTH, world, HEADS, HEADS, HEAD_DIM, dtype=torch.float32)
            found = simulate(call, engine, at, backward=True)
            expected = 1e3 * found.seconds
            setting = f"{world} ranks on {cores} cores, {LENGTH} tokens, {name} causal, {engine}, forward+backward, float32, H={HEADS}, D={HEAD_DIM}"
            beside = f"{expected:.0f} ms predicted, {milliseconds:.0f} ms measured"
            yield Figure("predicted over measured", setting, "ratio", expected / milliseconds, beside, 1 / MOST, MOST)
            beside = (
                f"{found.memory / 2**20:.0f} MiB predicted, {nbytes / 2**20:.0f} MiB measured: resident, {fixed_malloc}"
            )
            yield Figure(
                "predicted over measured memory", setting, "ratio", found.memory / nbytes, beside, 1 / MOST, MOST
            )


def longnet(length: int) -> Dilated:
    """LongNet's geometric lists, from 2048 tokens to all of them."""
    segments, rates = [2048], [1]
    while segments[-1] < length:
        segments.append(min(length, segments[-1] * 4))
        rates.append(rates[-1] * 4)
    return Dilated(segments, rates, causal=True)


def planned() -> Iterator[dict[str, object]]:
    """The attention of one layer in training: batch 1, 32 heads of 128, 8 kv heads, bfloat16."""
    for length, ranks in PLANNED:
        patterns: dict[str, Pattern] = {
            "longnet": longnet(length),
            "window 4096": Window(4096),
            "full": Full(causal=True),
        }
        for name, pattern in patterns.items():
            call = ScheduledCall(pattern, length, ranks, 32, 8, 128)
            for engine in ENGINES:
                if (engine == "ulysses" and ranks > call.kv_heads) or (engine == "ring striped" and ranks > 128):
                    continue  # too few heads; stripes send every key to every rank, as all_gather does
                for device in DEVICES:
                    machine = MACHINES[device]
                    at = Hardware(EFFICIENCY * machine.peak[16], machine.levels[-1].bandwidth or 0.0, LINK)
                    found = simulate(call, engine, at, backward=True)
                    yield {
                        "pattern": name, "tokens": length, "device": device, "devices": ranks, "engine": engine,
                        "seconds": f"{found.seconds:.4g}", "compute_seconds": f"{found.compute:.4g}",
                        "transfer_seconds": f"{found.transfer:.4g}", "gib_a_device": f"{found.memory / 2**30:.4g}",
                        "received_gib": f"{found.received / 2**30:.4g}",
                    }  # fmt: skip


def write_planned() -> None:
    """Write the table anew, row by row."""
    with (record.RESULTS / "simulation-planned.csv").open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in planned():
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            file.flush()


def main() -> int:
    """Do what is asked for, by default both."""
    tasks = sys.argv[1:] or ["measured", "planned"]
    if "measured" in tasks:
        append("simulation", measured(), replace(record.surroundings(), threads=1))
    if "planned" in tasks:
        write_planned()
    return 0


if __name__ == "__main__":
    sys.exit(main())
