"""`python -m benchmarks.book_figures`: `examples/stream_book.py` over a million bytes of Python's documentation and sources.

The text is read twice in processes of their own: once to its end, and once killed twice (SIGKILL) and started again. Losses must be equal to the
last bit. Rows of `results/book-figures.csv`: bytes of keys and values, the growth of resident memory, CPU time, losses. With `--png FILE` also the plot.
"""

import argparse
import csv
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import record
from benchmarks.figures import Figure, append

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "stream_book.py"
TOKENS, TRAIN = 1_000_000, 200
KILLS = (0.3, 0.6)
"""Shares of the text that are saved when the reader is killed."""
_MIB = 1 << 20


def command(tokens: int, state: Path, *options: str) -> list[str]:
    """The example's command line."""
    here = [sys.executable, str(EXAMPLE), "--library", "--tokens", str(tokens), "--train", str(TRAIN)]
    return [*here, "--state", str(state), *options]


def losses(state: Path) -> list[dict[str, str]]:
    """The rows that the example wrote beside its state."""
    with state.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def saved_rows(state: Path) -> int:
    """Pieces that a state has saved; 0 where there is none."""
    import torch

    return len(torch.load(state, weights_only=True)["rows"]) if state.exists() else 0


def killed(tokens: int, state: Path) -> list[int]:
    """Read the text in a process that is killed each time so much of it is saved; the pieces that were saved then."""
    pieces, lost = -(-tokens // 512), []
    for share in KILLS:
        process = subprocess.Popen(command(tokens, state), stdout=subprocess.DEVNULL)
        while process.poll() is None and saved_rows(state) < share * pieces:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lost.append(saved_rows(state))
    subprocess.run(command(tokens, state), check=True, stdout=subprocess.DEVNULL)
    return lost


def figures(tokens: int, png: Path | None) -> Iterator[Figure]:
    """Read, kill, read on, and compare."""
    with TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole.state", Path(folder) / "again.state"
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command(tokens, whole, *([] if png is None else ["--png", str(png)])), check=True)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        at = killed(tokens, again)
        rows, resumed = losses(whole), losses(again)
    setting = f"LongNet, 2 layers of 64, {tokens} bytes, {TRAIN} steps of training, piece 512"
    same = [_read(a) == _read(b) for a, b in zip(rows, resumed, strict=True)]
    beside = f"killed when {at[0]} and {at[1]} of {len(rows)} pieces were saved"
    yield Figure(
        "pieces with another position or loss after two kills", setting, "count", same.count(False), beside, most=0
    )
    tenth = len(rows) // 10
    beside = "read at the borders of pieces, of which all but a last shorter one are borders of segments"
    yield Figure("keys and values held at most", setting, "bytes", max(int(row["held_bytes"]) for row in rows), beside)
    peaks = [int(row["peak_resident_bytes"]) for row in rows]
    beside = f"{peaks[tenth] / _MIB:.0f} MiB after a tenth"
    yield Figure(
        "growth of the resident peak after the first tenth", setting, "MiB", (peaks[-1] - peaks[tenth]) / _MIB, beside
    )
    for name, part in (("first", rows[:tenth]), ("last", rows[-tenth:])):
        yield Figure(
            f"mean loss of the {name} tenth",
            setting,
            "nats a byte",
            sum(float(row["loss"]) for row in part) / len(part),
        )
    yield Figure("CPU time, reading and training", setting, "s", seconds)


def _read(row: dict[str, str]) -> tuple[Any, ...]:
    return row["position"], row["loss"]


def main() -> int:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    append("book-figures", figures(options.tokens, options.png), record.surroundings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
