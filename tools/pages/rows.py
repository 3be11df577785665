"""Rows of `benchmarks/results`, as the pages show them: the newest of each experiment on each processor, and tables of cells."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

WITHOUT_FAMILY = "AMD EPYC"
"""What early rows call a processor. Several models share that name, so rows of different days are not put together."""


Cells = tuple[str, ...]

NOT_ATTENTION = {"share", "fma-peak", "functional", "local"}
"""Peers that are a share of our own time, a processor's peak, or the same call said otherwise."""


@dataclass(frozen=True)
class Measured:
    """Ours beside a peer. Times are milliseconds of CPU time over all threads; ratio is the peer's time over ours, above 1 ours is faster.

    Growth is peak memory above q, k and v, over their size; None where it was not measured.
    """

    case: str
    variant: str
    peer: str
    dtype: str
    seq_len: int
    causal: bool
    direction: str
    ours_ms: float
    peer_ms: float
    ratio: float
    growth: float | None
    peer_growth: float | None
    verdict: str
    processor: str
    threads: int
    date: str

    @property
    def experiment(self) -> tuple[object, ...]:
        """What was measured, and where; the newest row of it counts."""
        return (
            self.variant,
            self.peer,
            self.dtype,
            self.seq_len,
            self.causal,
            self.direction,
            self.processor,
            self.threads,
        )


def table(heads: Cells, lines: Iterable[Cells]) -> str:
    """A Markdown table; empty text where there are no lines."""
    body = [f"| {' | '.join(line)} |" for line in lines]
    if not body:
        return ""
    return "\n".join([f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *body]) + "\n"


def processor_of(row: dict[str, str]) -> str:
    """The processor's name; where the row does not tell the family, with its date."""
    model = row["cpu_model"]
    return f"{model} (family not recorded), {row['date']}" if model == WITHOUT_FAMILY else model


def records(name: str) -> list[dict[str, str]]:
    """The rows of a file as they stand."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measured(*cases: str) -> list[Measured]:
    """The comparisons of these files, newest of each experiment, in the files' order."""
    newest: dict[tuple[object, ...], Measured] = {}
    for case in cases:
        for row in _choices() if case == "choice" else map(_measured, records(case)):
            kept = newest.get(row.experiment)
            if kept is None or kept.date <= row.date:
                newest[row.experiment] = row
    return list(newest.values())


def processors(rows: list[Measured]) -> list[str]:
    """Processors with rows, the one with the newest first."""
    last = {row.processor: row.date for row in sorted(rows, key=lambda row: row.date)}
    return sorted(last, key=lambda name: (last[name], name), reverse=True)


def _measured(row: dict[str, str]) -> Measured:
    return Measured(
        case=row["case"],
        variant=row["variant"],
        peer=row["peer"],
        dtype=row["dtype"],
        seq_len=int(row["seq_len"]),
        causal=row["causal"] == "True",
        direction=row["direction"],
        ours_ms=float(row["our_cpu_ms"]),
        peer_ms=float(row["peer_cpu_ms"]),
        ratio=float(row["ratio_cpu"]),
        growth=float(row["our_growth"]) if row["our_growth"] else None,
        peer_growth=float(row["peer_growth"]) if row["peer_growth"] else None,
        verdict=row["verdict"],
        processor=processor_of(row),
        threads=int(row["threads"]),
        date=row["date"],
    )


def _choices() -> list[Measured]:
    """`choice.csv` has a row per contender: the one that a call takes, beside dense SDPA."""
    problems: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    named = ("problem", "dtype", "seq_len", "queries", "heads", "head_dim", "direction", "cpu_model", "date", "threads")
    for row in records("choice"):
        contenders = problems.setdefault(tuple(row[name] for name in named), {})
        contenders["ours" if row["chosen"] == "True" else row["contender"]] = row
    rows = []
    for contenders in problems.values():
        ours, dense = contenders.get("ours"), contenders.get("dense SDPA")
        if ours is None or dense is None or ours["queries"] != ours["seq_len"]:
            continue
        ours_ms, dense_ms = float(ours["cpu_ms"]), float(dense["cpu_ms"])
        rows.append(
            Measured(
                case="choice",
                variant=f"{ours['problem']} h{ours['heads']} d{ours['head_dim']}",
                peer="dense",
                dtype=ours["dtype"],
                seq_len=int(ours["seq_len"]),
                causal=ours["problem"] != "full",
                direction=ours["direction"],
                ours_ms=ours_ms,
                peer_ms=dense_ms,
                ratio=round(dense_ms / ours_ms, 3),
                growth=None,
                peer_growth=None,
                verdict="",
                processor=processor_of(ours),
                threads=int(ours["threads"]),
                date=ours["date"],
            )
        )
    return rows
