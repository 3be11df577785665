"""Traces of allocation: every block that an allocator hands out and takes back, recorded, stored and replayed."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from longattn.bufmgr.checks import check_kind, check_whole, describe
from longattn.bufmgr.memory.allocator import Allocator, Block, check_block, check_upstream
from longattn.bufmgr.memory.statistics import Statistics, StatisticsAllocator

Action = Literal["allocate", "deallocate", "refuse"]


class TraceEvent(NamedTuple):
    """One call: seconds since the recording began, what happened, the block's number in the trace, and its bytes.

    A refused request has block -1. Blocks are numbered from 0 in the order in which they were handed out.
    """

    seconds: float
    action: Action
    block: int
    nbytes: int


class RecordingAllocator:
    """Records every call; `trace()` returns what was recorded so far.

    max_events: most events kept, default 1,000,000. What happens later is not recorded; `lost_events` counts it.
    """

    def __init__(self, upstream: Allocator, *, max_events: int = 1_000_000) -> None:
        check_upstream(upstream)
        self.upstream = upstream
        self.max_events = check_whole("max_events", max_events)
        self._events: list[TraceEvent] = []
        self.lost_events = 0
        self._began = time.perf_counter()
        self._serials = itertools.count()
        self._numbers: dict[int, int] = {}  # id of a block that is out -> its number

    def __reduce__(self) -> tuple[type[RecordingAllocator], tuple[Allocator], dict[str, int]]:
        return type(self), (self.upstream,), {"max_events": self.max_events}

    def allocate(self, nbytes: int) -> Block:
        """Return the upstream's block. Raises the upstream's MemoryError, and records that."""
        try:
            block = self.upstream.allocate(nbytes)
        except MemoryError:
            self._record("refuse", -1, nbytes)
            raise
        number = next(self._serials)
        self._numbers[id(block)] = number
        self._record("allocate", number, block.nbytes)
        return block

    def deallocate(self, block: Block) -> None:
        """Give the block to the upstream."""
        check_block(block)
        nbytes = block.nbytes
        number = self._numbers.pop(id(block), None)
        self.upstream.deallocate(block)
        if number is not None:
            self._record("deallocate", number, nbytes)

    def trace(self) -> AllocationTrace:
        """Return the events so far."""
        return AllocationTrace(self._events.copy())

    def _record(self, action: Action, number: int, nbytes: int) -> None:
        if len(self._events) < self.max_events:
            self._events.append(TraceEvent(time.perf_counter() - self._began, action, number, nbytes))
        else:
            self.lost_events += 1


class AllocationTrace:
    """Events of an allocator, in order: `RecordingAllocator.trace` makes one, `load` reads one from a file.

    Raises TypeError for what is no TraceEvent.
    """

    def __init__(self, events: Iterable[TraceEvent]) -> None:
        self.events = _check_events(events)

    def save(self, path: Path | str) -> None:
        """Write the trace as CSV with a header: seconds, action, block, nbytes."""
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(TraceEvent._fields)
            writer.writerows((f"{event.seconds:.9f}", *event[1:]) for event in self.events)

    @classmethod
    def load(cls, path: Path | str) -> AllocationTrace:
        """Return the trace of a file that `save` wrote. Raises ValueError that names the line that is no event."""
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, list[str]())
            if header != list(TraceEvent._fields):
                expected = ",".join(TraceEvent._fields)
                raise ValueError(f"path must be a trace with the header {expected}, got {describe(header)}")
            return cls(_parse(row, number) for number, row in enumerate(rows, start=2))

    def replay(self, allocator: Allocator) -> Statistics:
        """Make the calls of the trace at an allocator; return what a StatisticsAllocator counts meanwhile.

        Refused requests are left out. Blocks that the trace never gives back are given back after the count. Raises the
        allocator's MemoryError, and ValueError for a block that comes back without being out; no block stays out then.
        """
        counted = StatisticsAllocator(allocator)
        out: dict[int, Block] = {}
        try:
            for event in self.events:
                if event.action == "allocate":
                    if event.block in out:
                        raise ValueError(f"events must hand out block {event.block} once at a time, got it twice")
                    out[event.block] = counted.allocate(event.nbytes)
                elif event.action == "deallocate":
                    if event.block not in out:
                        raise ValueError(f"events must give back blocks that are out, got block {event.block}")
                    counted.deallocate(out.pop(event.block))
            return replace(counted.statistics)
        finally:
            for block in out.values():
                counted.deallocate(block)


def _check_events(events: object) -> tuple[TraceEvent, ...]:
    is_scalar = getattr(events, "ndim", 1) == 0  # a tensor that has the method of an iterable, and yet is none
    if not isinstance(events, Iterable) or is_scalar:
        raise TypeError(f"events must be TraceEvents, got {describe(cast('object', events))}")
    checked = tuple(cast("Iterable[TraceEvent]", events))
    for event in checked:
        check_kind("events", event, TraceEvent, "TraceEvents")
    return checked


def _parse(row: list[str], line: int) -> TraceEvent:
    for action in get_args(Action):
        if len(row) == len(TraceEvent._fields) and row[1] == action:
            try:
                return TraceEvent(float(row[0]), action, int(row[2]), int(row[3]))
            except ValueError:
                break
    raise ValueError(f"lines[{line}] must be seconds, action, block and nbytes, got {describe(row)}")
