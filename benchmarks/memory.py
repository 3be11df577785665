"""Peak memory of one call, measured in a process that has run nothing else.

`ResidentPeak` reads this process's resident size. `growth_in_fresh_process` starts `python -m benchmarks.memory`, which
prepares one side of an experiment, loads what a first call loads by running a tiny problem, and then measures one call.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.experiment import Experiment, Side, find

_KIB = 1024


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * _KIB
    return None


def _trim() -> None:
    """Have glibc return freed blocks: those it keeps are resident, would serve the next call and hide its memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class ResidentPeak:
    """Growth of this process's resident memory above the moment `start` was called (Linux).

    1. `start()` gives what malloc keeps back to the system, remembers the resident size and resets the kernel's
       high-water mark.
    2. The caller runs what it wants to know about, touching whatever memory that takes.
    3. `growth()` is the high-water mark less the remembered size, in bytes, and may be read again later.
    """

    def __init__(self) -> None:
        self._base: int | None = None

    def start(self) -> None:
        """Take the resident size now as zero."""
        _trim()
        self._base = _status_bytes("VmRSS")
        try:
            # 5 resets VmHWM to the present resident size; without the right to do so the mark of the start-up stays,
            # which lies below anything worth measuring here.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def growth(self) -> int | None:
        """Bytes of growth since `start`, at least 0; None on a system without /proc."""
        peak = _status_bytes("VmHWM")
        if self._base is None or peak is None:
            return None
        return max(0, peak - self._base)


def growth_in_fresh_process(experiment: Experiment, side: Side, threads: int, quick: bool) -> float | None:
    """Peak resident growth of one call of one side, as a multiple of the bytes of its inputs q, k and v.

    The upstream gradient dO is made before the measurement starts and is not counted; outputs and gradients are.

    Args:
        experiment: what to run; it is found again in the new process by its case and key.
        side: "ours" or "peer".
        threads: torch threads of the new process.
        quick: whether the experiment belongs to the quick list.

    Returns:
        The ratio, or None where the system does not tell resident memory.

    Raises:
        RuntimeError: the process failed; the message ends with the last line it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.memory", experiment.labels.case, experiment.key, side]
    command += ["--threads", str(threads)] + (["--quick"] if quick else [])
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"memory of {experiment.key} ({side}): exit {done.returncode}: {last}")
    ratio = json.loads(done.stdout.splitlines()[-1])["ratio"]
    return None if ratio is None else float(ratio)


def main() -> None:
    """Measure one side of one experiment in this process and print {"ratio": ...}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=main.__doc__)
    parser.add_argument("case")
    parser.add_argument("key")
    parser.add_argument("side", choices=["ours", "peer"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    path = find(arguments.case, arguments.key, quick=arguments.quick).prepare(arguments.side)
    path.first_call()
    peak = ResidentPeak()
    peak.start()
    path.call()
    growth = peak.growth()
    print(json.dumps({"ratio": None if growth is None else growth / path.input_bytes}))


if __name__ == "__main__":
    main()
