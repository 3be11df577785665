"""The timeline: when each buffer began and ended, as a trace for Perfetto and as a picture."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.cuda import _memory_viz

from longattn.bufmgr import ArenaAllocator, AttentionBufferManager


def worked() -> AttentionBufferManager:
    """A manager that allocated two buffers, and got the first one back."""
    manager = AttentionBufferManager(enable_profiling=True, lightweight=False)
    first = manager.allocate("scores", (1024,), torch.float32)
    second = manager.allocate("temp", (256,), torch.float32)
    del first
    view = second[1:]
    del second
    manager.kept = view  # pyright: ignore[reportAttributeAccessIssue]
    return manager


def test_events_are_beginnings_and_ends():
    """A buffer ends when its last reference does: the view keeps the second one."""
    events = worked().timeline()
    assert [(event.type, event.nbytes, event.ended) for event in events] == [
        ("scores", 4096, False),
        ("temp", 1024, False),
        ("scores", 4096, True),
    ]
    assert events[0].buffer == events[2].buffer != events[1].buffer
    assert [event.seconds for event in events] == sorted(event.seconds for event in events)
    assert events[0].nanoseconds > 0 == events[2].nanoseconds


def test_a_trace_for_perfetto(tmp_path: Path):
    """Counters sum up, async slices come in pairs, complete slices lie inside the trace's time."""
    manager = worked()
    manager.save_timeline(tmp_path / "buffers.json")
    rows = json.loads((tmp_path / "buffers.json").read_text(encoding="utf-8"))["traceEvents"]
    assert all(row["ph"] in "MCXbe" and row["pid"] == 1 for row in rows)
    counters = [row["args"] for row in rows if row["ph"] == "C"]
    assert [(row["scores"], row["temp"]) for row in counters] == [(4096, 0), (4096, 1024), (0, 1024)]
    slices = {phase: {(row["id"], row["name"]) for row in rows if row["ph"] == phase} for phase in "be"}
    assert slices["b"] == slices["e"] and len(slices["b"]) == 2
    assert [row["args"]["bytes"] for row in rows if row["ph"] == "X"] == [4096, 1024]
    assert all(row["dur"] > 0 for row in rows if row["ph"] == "X")


def test_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra longattn-bufmgr[png]")
    worked().save_timeline(tmp_path / "buffers.png")
    empty = AttentionBufferManager(enable_profiling=True, lightweight=False)
    empty.save_timeline(str(tmp_path / "empty.png"))
    for name in ("buffers.png", "empty.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "buffers.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_a_snapshot_for_torchs_viewer(tmp_path: Path):
    """torch's own reader sums up what the arena holds, and follows the buffers."""
    manager = AttentionBufferManager(enable_profiling=True, lightweight=False, upstream=ArenaAllocator())
    held = manager.allocate("scores", (1 << 20,), torch.float32)
    manager.allocate("temp", (1 << 19,), torch.float32)
    manager.clear_cache()
    assert held.nbytes == 1 << 22
    manager.save_timeline(tmp_path / "buffers.pickle")
    snapshot = pickle.loads((tmp_path / "buffers.pickle").read_bytes())
    summary = _memory_viz.segsum(snapshot)
    assert "total_reserved: 6.0MiB" in summary and "total_allocated: 4.0MiB" in summary
    assert _memory_viz.trace(snapshot).count("MEM[") == 2
    actions = [(entry["action"], entry["frames"][0]["name"]) for entry in snapshot["device_traces"][0]]
    assert actions == [("alloc", "scores"), ("alloc", "temp"), ("free_requested", "temp"), ("free_completed", "temp")]


def test_what_has_no_timeline_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="enable_profiling=True and lightweight=False .* got True and True"):
        AttentionBufferManager(enable_profiling=True).save_timeline(tmp_path / "x.json")
    with pytest.raises(ValueError, match="path must end in .json, .png or .pickle, got 'x.svg'"):
        worked().save_timeline("x.svg")
