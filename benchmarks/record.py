"""A measured experiment as a row of CSV: what was compared, the figures, the targets, and where and when."""

import csv
import io
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.experiment import Labels, Targets
from benchmarks.harness import WAITING, Outcome

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Surroundings:
    """Where and when rows were measured; `commit` ends in -dirty if files other than results differ from it."""

    cpu_model: str
    cores: int
    torch: str
    threads: int
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """The columns, in order. Times are milliseconds; `*_cpu_ms` is summed over threads.

    `ratio_cpu` and `ratio_wall` are the peer's median over ours: above 1, ours is faster. `our_growth` and
    `peer_growth` are peak memory of a fresh process over q+k+v. `verdict` is `met`, `missed: ...` or empty without a
    target. `waiting` says what threads that wait for work did when a sample began (`harness.WAITING`).
    """

    case: str
    variant: str
    peer: str
    dtype: str
    seq_len: int
    causal: bool
    direction: str
    our_cpu_ms: float
    our_cpu_p20: float
    our_cpu_p80: float
    peer_cpu_ms: float
    peer_cpu_p20: float
    peer_cpu_p80: float
    ratio_cpu: float
    our_wall_ms: float
    peer_wall_ms: float
    ratio_wall: float
    pairs: int
    our_growth: float | None
    peer_growth: float | None
    target_ratio: float | None
    target_growth: float | None
    verdict: str
    where: Surroundings
    waiting: str


def surroundings() -> Surroundings:
    """This machine, this torch, this commit, today (UTC)."""
    return Surroundings(
        cpu_model=cpu_model(),
        cores=os.cpu_count() or 1,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
    )


def cpu_model() -> str:
    """The processor's name as the kernel tells it, with family and model: a rented machine's "AMD EPYC" may be any generation.

    The architecture where the kernel does not tell.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in told:
        return platform.machine()
    generation = " ".join(
        f"{part} {told[key]}" for part, key in (("family", "cpu family"), ("model", "model")) if key in told
    )
    return f"{told['model name']} {generation}".rstrip()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    # Rows written a minute ago must not make the next ones dirty.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def verdict(outcome: Outcome, targets: Targets) -> str:
    """`met`, or `missed:` with what was missed; empty if the row has no target."""
    missed = []
    if targets.ratio is not None and outcome.ratio < targets.ratio:
        missed.append(f"ratio {outcome.ratio:.2f} < {targets.ratio:g}")
    if targets.growth is not None and outcome.our_growth is not None and outcome.our_growth > targets.growth:
        missed.append(f"growth {outcome.our_growth:.2f} > {targets.growth:g}")
    if targets.most_ms is not None and outcome.ours.cpu > targets.most_ms:
        missed.append(f"{outcome.ours.cpu:.2f} ms > {targets.most_ms:g}")
    if missed:
        return "missed: " + ", ".join(missed)
    measured = (
        targets.ratio is not None
        or targets.most_ms is not None
        or (targets.growth is not None and outcome.our_growth is not None)
    )
    return "met" if measured else ""


def make_row(labels: Labels, targets: Targets, outcome: Outcome, where: Surroundings) -> Row:
    """Put labels, figures, targets and surroundings together, rounded for reading."""
    ours, peer = outcome.ours, outcome.peer
    return Row(
        **asdict(labels),
        our_cpu_ms=round(ours.cpu, 2),
        our_cpu_p20=round(ours.cpu_p20, 2),
        our_cpu_p80=round(ours.cpu_p80, 2),
        peer_cpu_ms=round(peer.cpu, 2),
        peer_cpu_p20=round(peer.cpu_p20, 2),
        peer_cpu_p80=round(peer.cpu_p80, 2),
        ratio_cpu=round(outcome.ratio, 3),
        our_wall_ms=round(ours.wall, 2),
        peer_wall_ms=round(peer.wall, 2),
        ratio_wall=round(peer.wall / ours.wall, 3),
        pairs=ours.samples,
        our_growth=None if outcome.our_growth is None else round(outcome.our_growth, 3),
        peer_growth=None if outcome.peer_growth is None else round(outcome.peer_growth, 3),
        target_ratio=targets.ratio,
        target_growth=targets.growth,
        verdict=verdict(outcome, targets),
        where=where,
        waiting=WAITING,
    )


def cells(row: "DataclassInstance") -> dict[str, object]:
    """A row's cells by column, in order; those of its surroundings in their place."""
    flat: dict[str, object] = {}
    for name, value in asdict(row).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def append(row: "DataclassInstance", path: Path) -> None:
    """Append a dataclass as one row to a CSV file, under a header if the file is new.

    The line reaches the file in one write and is on disk when this returns, so that a run which is stopped keeps every
    row it has shown, and two runs do not mix theirs.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(cells(row))
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        header = file.readline().decode().rstrip("\n")
        if header and header.split(",") != columns:
            raise ValueError(f"{path.name} must have the columns {','.join(columns)}, got {header}")
        text = io.StringIO()
        # Unix line ends: the file is read in reviews.
        writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
        if not header:
            writer.writeheader()
        writer.writerow(cells(row))
        # Opened for appending: the position of the write is the end, whatever was read.
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def is_recorded(labels: Labels, where: Surroundings, path: Path) -> bool:
    """Whether the file holds a row of this experiment from this commit, processor, torch, number of threads and way of waiting.

    Changes that are not committed all look alike: after an edit in a dirty checkout, old rows count as recorded.
    """
    if not path.exists():
        return False
    columns = {key: str(value) for key, value in {**asdict(labels), **asdict(where)}.items() if key != "date"}
    columns["waiting"] = WAITING
    rows = csv.DictReader(path.read_text().splitlines())
    return any(columns.items() <= row.items() for row in rows)
