"""`longattn explain`: every backend's verdict on one call."""

from __future__ import annotations

from argparse import Namespace

import torch

from longattn.attention.cli.patterns import pattern_of
from longattn.attention.cli.report import Report, Table
from longattn.kernels import explain


def run(options: Namespace) -> Report:
    """The rows of the dispatch table, each with its reasons or its expected time; status 1 where none serves."""
    kv_heads = options.kv_heads or options.heads
    found = explain(
        pattern_of(options),
        (options.batch, options.length, options.heads, options.head_dim),
        (options.batch, options.keys or options.length, kv_heads, options.head_dim),
        dtype=getattr(torch, options.dtype),
        device=options.device,
        architecture=options.architecture,
        attention_mask=options.mask,
        bias=options.bias,
        key_padding_mask=options.padding,
        dropout=options.dropout,
        requires_grad=options.backward,
        deterministic=options.deterministic,
        backend=options.backend,
        verbose=options.verbose or options.machine is not None,
        machine=options.machine,
    )
    expected = {name: (seconds, source) for name, seconds, source in found.expected}
    rows: list[tuple[str, ...]] = []
    for name, reasons in found.rows:
        seconds, source = expected.get(name, (None, ""))
        verdict = "chosen" if name == found.backend else "no" if reasons else "could serve"
        time = "" if seconds is None else f"{seconds * 1e3:.3g}"
        why = source if seconds is None else f"time expected from figures {source}"
        rows.append((name, verdict, time, "; ".join(reasons) or why))
    data = {
        "problem": str(found.problem),
        "backend": found.backend,
        "order": found.order,
        "rows": [
            {
                "backend": name,
                "reasons": list(reasons),
                "expected_seconds": expected.get(name, (None, ""))[0],
                "source": expected.get(name, (None, ""))[1],
            }
            for name, reasons in found.rows
        ],
        "traffic": None if found.traffic is None else str(found.traffic),
    }
    parts: list[Table | str] = [
        f"{found.problem}\norder: {found.order}",
        Table("", ("backend", "verdict", "CPU ms", "why"), rows),
    ]
    if found.traffic is not None:
        parts.append(f"on {found.traffic}")
    if found.backend is None:
        parts.append("no backend serves this call")
    return Report(data, parts, status=int(found.backend is None))
