"""The examples of streams, `many_streams.py` and `stream_book.py`, run, small, and what they show holds."""

import importlib.util
from pathlib import Path
from types import ModuleType

from tests.workspace import ROOT


def example(name: str) -> ModuleType:
    """The module of an example's file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_many_streams_are_each_what_they_are_alone() -> None:
    """Eight streams in three rows: equal to their own runs, in memory that does not depend on their lengths."""
    decode = example("many_streams").decode
    short, long = (decode(streams=8, rows=3, longest=n) for n in (40, 120))
    assert short["error"] < 1e-4 and long["error"] < 1e-4
    assert long["longest"] > 2 * short["longest"] and long["bytes"] == short["bytes"]
    for measured in (short, long):
        assert measured["grown_by"] == measured["pages_left"] == 0 < measured["most_pages_held"] <= measured["pages"]


def test_a_killed_reader_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped twice between savings: the losses of a run that was never stopped, and memory that does not grow."""
    book = example("stream_book")
    text, model = book.made_text(1500), book.small_model()
    whole = book.read(model, text, tmp_path / "whole.state", piece=100, save_every=4)
    for pieces in (6, 5, None):
        rows = book.read(model, text, tmp_path / "killed.state", piece=100, save_every=4, pieces=pieces)
    assert [(row["position"], row["loss"]) for row in whole] == [(row["position"], row["loss"]) for row in rows]
    assert max(row["held_bytes"] for row in whole[:6]) >= max(row["held_bytes"] for row in whole[6:])
