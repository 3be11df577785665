"""Which tests come first: those that call the function with the fault, quick ones before slow ones.

A run without a fault records what each test calls and how long it takes. Every test still runs until one fails: what a test reads from a
cache that another filled is not recorded for it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest

from tools.mutants.mutant import Mutant


def place_of(qualname: str) -> str:
    """The functions and classes of a code object's name, as `Mutant.where` has them: nothing of locals, lambdas and comprehensions."""
    return ".".join(part for part in qualname.split(".") if not part.startswith("<"))


class Recorder:
    """A plugin of pytest that writes {test: [seconds, [file below `source` and function, ...]]}."""

    def __init__(self, source: Path, target: Path) -> None:
        self.prefix, self.target = f"{source}{os.sep}", target
        self.tests: dict[str, tuple[float, list[str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Record one test."""
        called: dict[CodeType, None] = {}

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                called[frame.f_code] = None

        begun = time.monotonic()
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            names = {
                f"{code.co_filename.removeprefix(self.prefix)} {place_of(code.co_qualname)}"
                for code in called
                if code.co_filename.startswith(self.prefix)
            }
            self.tests[item.nodeid] = (time.monotonic() - begun, sorted(names))

    def pytest_sessionfinish(self) -> None:
        """Write what was recorded."""
        self.target.write_text(json.dumps(self.tests), encoding="utf-8")


class Order:
    """A plugin of pytest that sorts tests for one fault and ends the process where a test takes ten times its time."""

    def __init__(self, recorded: Path, mutant: Mutant | None) -> None:
        self.tests: dict[str, tuple[float, list[str]]] = json.loads(recorded.read_text(encoding="utf-8"))
        self.place = "" if mutant is None else f"{mutant.file.split('/src/', 1)[1]} {mutant.where}"
        self.stderr = os.dup(2)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What calls the function with the fault comes first; what stands in a class or a module of itself is in no test's list."""

        def rank(item: pytest.Item) -> tuple[bool, float]:
            seconds, called = self.tests.get(item.nodeid, (0.0, []))
            return self.place not in called, seconds

        items.sort(key=rank)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """A test that hangs ends the process, with a traceback."""
        seconds, _ = self.tests.get(item.nodeid, (0.0, []))
        faulthandler.dump_traceback_later(10.0 + 10.0 * seconds, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
