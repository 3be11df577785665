"""`python -m tools.measure_rates`: the figures of speed that are shipped for this processor, into `dispatch/shipped/<processor>.json`.

Every row that runs here, each dtype, head sizes 64 and 128, forward and backward, every form of plan, in CPU time of one thread: some
minutes. Where the file is there, the dtypes that are measured are put in.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longattn.kernels.dispatch import rates
from longattn.kernels.dispatch.capability import dtype_name
from longattn.kernels.dispatch.probing import TINY, numbers_of, seconds_of
from longattn.kernels.dispatch.processor import processor
from longattn.kernels.dispatch.table import TableRow, backends, row
from longattn.kernels.dispatch.work import Work, work_of
from longattn.kernels.state import FLOATS
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Span, Window

HEAD_DIMS = (64, 128)
THREADS = (1, 2)
"""Numbers of threads that the figures are taken for: rows spread over two as well as over one, over many they may not."""
_PATIENCE = 0.1
FOLDER = Path(rates.__file__).with_name("shipped")


def blocks(count: int, hidden: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A random mask of blocks with its diagonal."""
    mask = np.random.default_rng(0).random((count, count)) >= hidden
    return mask | np.eye(count, dtype=bool)


PROBLEMS: dict[str, tuple[Pattern, int, int, int]] = {
    "dense": (Full(), 1024, 1024, 2),
    "causal": (Full(causal=True), 2048, 2048, 1),
    "band": (Window(256), 4096, 4096, 1),
    "strided": (Dilated((1024, 2048, 4096), (1, 2, 4)), 4096, 4096, 1),
    "listed": (BlockSparse(128, blocks(32, 0.9)), 4096, 4096, 1),
    "short": (Full(causal=True), 8192, 4, 2),
}
"""Form -> (pattern, keys, queries, heads)."""


def work(form: str, head_dim: int) -> Work:
    """The work of a problem, which must be of that form."""
    pattern, keys, queries, heads = PROBLEMS[form]
    plan = pattern.plan(Rectangle(heads, Span(keys - queries, queries), Span(0, keys)))
    found = work_of(plan, 1, head_dim)
    if found.form != form:
        raise ValueError(f"PROBLEMS[{form!r}] must be of its form, is {found.form}")
    return found


def measured(of: TableRow, dtype: torch.dtype) -> rates.Numbers:
    """One row and dtype."""
    found: rates.Numbers = {}
    for direction in ("forward", "backward") if of.capability.backward else ("forward",):
        overhead = _seconds(of, dtype, Full(), TINY, 1, HEAD_DIMS[0], direction)
        known: dict[str, float] = {}
        for form, (pattern, keys, queries, heads) in PROBLEMS.items():
            for head_dim in HEAD_DIMS:
                taken = _seconds(of, dtype, pattern, keys, heads, head_dim, direction, queries)
                known |= numbers_of(work(form, head_dim), direction, taken, overhead)
        found[direction] = known
    return found


def _seconds(*asked: Any) -> float:
    return seconds_of(*asked, clock=time.process_time, patience=_PATIENCE)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m tools.measure_rates", description=main.__doc__)
    parser.add_argument("--dtypes", nargs="+", default=[dtype_name(dtype) for dtype in FLOATS])
    parser.add_argument("--into", type=Path, default=FOLDER)
    arguments = parser.parse_args(argv)
    path = arguments.into / f"{processor()}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    table |= {"processor": processor(), "torch": rates.torch_version(), "threads": list(THREADS)}
    table |= {"date": datetime.now(UTC).date().isoformat()}
    torch.set_num_threads(1)
    for of in map(row, backends("cpu")):
        if of.prepare is not None and (failed := of.prepare()) is not None:
            raise SystemExit(f"{of.name}: {failed}")
        name = f"{of.name} {of.revision()[0]}" if of.revision is not None else of.name
        for dtype in of.capability.dtypes_on("cpu"):
            if dtype_name(dtype) in arguments.dtypes:
                table["rows"].setdefault(name, {})[dtype_name(dtype)] = found = measured(of, dtype)
                print(name, dtype_name(dtype), found, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
