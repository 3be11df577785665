"""A timeline of buffers as a file: a picture (PNG), a trace that Perfetto and chrome://tracing open (JSON), or a snapshot for torch's
viewer of memory (pickle).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from longattn.bufmgr.leasing.profile import Event
from longattn.bufmgr.spec import MIB, BufferType

_OUTSIDE = 1 << 48  # an address beyond all segments


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


def torch_snapshot(events: Sequence[Event], segments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what torch.cuda.memory._snapshot returns: segments with their blocks, and the trace of one device, the host.

    segments: as `memory_snapshot` returns them; each stretch of their pages that are held becomes one of torch's. Addresses are made
    up: segments follow one another, and buffers lie beyond them. A buffer's type stands where torch has the frames of its stack.
    """
    held: list[dict[str, Any]] = []
    start = 0
    for segment in segments:
        end = 0
        for block in segment["blocks"]:
            if block["state"] == "unmapped":
                continue
            address = start + block["offset"]
            if not held or address != end:
                held.append({"address": address, "stream": 0, "segment_type": "large", "blocks": [], "device": 0})
            end = address + block["size"]
            held[-1]["blocks"].append({"address": address, "requested_size": block["size"], "frames": [], **block})
        start += segment["total_size"]
    for part in held:
        in_use = sum(block["size"] for block in part["blocks"] if block["state"] == "active_allocated")
        total = sum(block["size"] for block in part["blocks"])
        part |= {"total_size": total, "allocated_size": in_use, "active_size": in_use}
    trace = [
        {
            "action": action,
            "addr": _OUTSIDE + event.buffer,
            "size": event.nbytes,
            "stream": 0,
            "time_us": int(event.seconds * 1e6),
        }
        | {"frames": [{"name": event.type, "filename": "longattn.bufmgr", "line": 0}]}
        for event in events
        for action in (("free_requested", "free_completed") if event.ended else ("alloc",))
    ]
    return {"segments": held, "device_traces": [trace]}


def save_timeline(events: Sequence[Event], path: Path | str, segments: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a timeline; the name's ending chooses the form, .json, .png or .pickle. segments: of a snapshot (.pickle).

    Raises ValueError for another ending, ModuleNotFoundError where a PNG needs matplotlib (extra `png`) and it is missing.
    """
    ending = Path(path).suffix
    if ending == ".json":
        Path(path).write_text(json.dumps(chrome_trace(events)), encoding="utf-8")
    elif ending == ".png":
        _draw(events, path)
    elif ending == ".pickle":
        Path(path).write_bytes(pickle.dumps(torch_snapshot(events, segments)))
    else:
        raise ValueError(f"path must end in .json, .png or .pickle, got {str(path)!r}")


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
