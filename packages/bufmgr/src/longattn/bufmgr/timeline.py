"""A timeline of buffers as a file: a picture (PNG), or a trace that Perfetto and chrome://tracing open (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from longattn.bufmgr.leasing.profile import Event
from longattn.bufmgr.spec import MIB, BufferType


def bytes_in_use(events: Sequence[Event]) -> Iterator[tuple[Event, dict[str, int]]]:
    """Yield each event with the bytes in use of each type after it, of the buffers whose allocation is among the events."""
    alive: set[int] = set()
    in_use = {kind.value: 0 for kind in BufferType}
    for event in events:
        if not event.ended:
            alive.add(event.buffer)
            in_use[event.type] += event.nbytes
        elif event.buffer in alive:
            alive.remove(event.buffer)
            in_use[event.type] -= event.nbytes
        yield event, in_use.copy()


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """Return the events in Chrome's trace format: a counter track of the bytes in use by type, a slice for each call of
    `allocate`, and an async slice from each buffer's allocation to its end (or to the last event).

    Source: "Trace Event Format", Google, sections Counter, Complete and Async Events.
    """
    rows: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "longattn.bufmgr"}}]
    alive: dict[int, Event] = {}
    for event, in_use in bytes_in_use(events):
        microseconds = event.seconds * 1e6
        place = {"pid": 1, "tid": 1, "ts": microseconds}
        rows.append({"ph": "C", "name": "bytes in use", **place, "args": in_use})
        if not event.ended:
            alive[event.buffer] = event
            duration = event.nanoseconds * 1e-3
            call = {**place, "ts": microseconds - duration, "dur": duration}
            rows.append({"ph": "X", "name": f"allocate {event.type}", **call, "args": {"bytes": event.nbytes}})
            rows.append({"ph": "b", "cat": "buffer", "id": event.buffer, "name": event.type, **place})
        elif alive.pop(event.buffer, None) is not None:
            rows.append({"ph": "e", "cat": "buffer", "id": event.buffer, "name": event.type, **place})
    end = events[-1].seconds * 1e6 if events else 0.0
    rows += [
        {"ph": "e", "cat": "buffer", "id": event.buffer, "name": event.type, "pid": 1, "tid": 1, "ts": end}
        for event in alive.values()
    ]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def save_timeline(events: Sequence[Event], path: Path | str) -> None:
    """Write a timeline; the name's ending chooses the form, .json or .png.

    Raises ValueError for another ending, ModuleNotFoundError where a PNG needs matplotlib (extra `png`) and it is missing.
    """
    ending = Path(path).suffix
    if ending == ".json":
        Path(path).write_text(json.dumps(chrome_trace(events)), encoding="utf-8")
    elif ending == ".png":
        _draw(events, path)
    else:
        raise ValueError(f"path must end in .json or .png, got {str(path)!r}")


def _draw(events: Sequence[Event], path: Path | str) -> None:
    figure = import_module("matplotlib.figure").Figure(figsize=(9.0, 4.8), layout="constrained")
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.subplots()
    states = list(bytes_in_use(events))
    seconds = [event.seconds for event, _ in states]
    names = [kind.value for kind in BufferType if any(in_use[kind.value] for _, in_use in states)]
    if names:
        heights = [[in_use[name] / MIB for _, in_use in states] for name in names]
        axes.stackplot(seconds, *heights, labels=names, step="post")
        axes.legend(fontsize="small", loc="upper left")
    axes.set(title="buffers in use", xlabel="seconds", ylabel="MiB")
    canvas.print_png(str(path))
