"""Which branches of a plan one launch takes, for which heads, and the tables of each launch, kept with the plan on its device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longattn.kernels.lowering.head_classes import HeadClass, head_classes
from longattn.kernels.lowering.write_order import WriteOrder
from longattn.kernels.triton.decode_tables import decode_tables, is_single, sees_all_heads
from longattn.kernels.triton.joblist import JobTables, job_tables, pack, packed_sizes
from longattn.kernels.triton.row_classes import gathered
from longattn.patterncache import Branch, Plan


@dataclass(frozen=True)
class Pass:
    """One launch over some branches of a plan.

    Attributes:
        branches: its branches. unique: whether a key met twice is streamed once, with a multiplicity.
        fresh: no row that it writes was written by an earlier pass.
    """

    branches: tuple[Branch, ...]
    unique: bool
    fresh: bool


@dataclass(frozen=True)
class Passes:
    """All launches of a plan, in order; `complete`: every row is written, and written before it is merged onto."""

    launches: tuple[Pass, ...]
    complete: bool


def query_passes(plan: Plan) -> Passes:
    """How queries own a plan: in one launch over row classes where that wastes nothing, else branch by branch.

    Without bands, classes meet unique keys. With bands and different steps, rows of a class lie so far apart that its diagonal tiles
    are mostly empty; there branches whose rows do not overlap share a launch, and later ones merge onto what is there.
    """
    passes: Passes | None = plan.derived.get("triton passes")
    if passes is None and len(plan.branches) == 1:
        (branch,), (heads, queries, _) = plan.branches, plan.rectangle.shape
        # No query row stands in two tiles.
        complete = branch.heads.length * branch.q.tiles * branch.q.count == heads * queries
        passes = plan.derived["triton passes"] = Passes((Pass(plan.branches, unique=False, fresh=True),), complete)
    if passes is None and is_single(plan, plan.branches):
        complete = sees_all_heads(plan)
        unique = all(branch.band is None for branch in plan.branches) and not gathered(plan.branches)
        passes = plan.derived["triton passes"] = Passes((Pass(plan.branches, unique, fresh=True),), complete)
    if passes is None:
        banded = any(branch.band is not None for branch in plan.branches)
        alike = len({branch.q.step for branch in plan.branches}) <= 1
        together = not banded or alike or gathered(plan.branches)
        passes = plan.derived["triton passes"] = _in_phases(plan, together, not banded and not gathered(plan.branches))
    return passes


def _in_phases(plan: Plan, together: bool, unique: bool) -> Passes:
    order = WriteOrder(plan, len(plan.branches))
    phases: list[list[Branch]] = []
    for branch in plan.branches:
        at = (branch.heads.positions()[:, None], branch.q.rows().reshape(1, -1))
        first = order.write(at, 0 if together else None)
        phase = 0 if together else first
        phases += [[] for _ in range(phase + 1 - len(phases))]
        phases[phase].append(branch)
    launches = [
        Pass(tuple(branches), unique and len(branches) > 1, phase == 0) for phase, branches in enumerate(phases)
    ]
    return Passes(tuple(launches), order.complete)


def packable(plan: Plan, members: int) -> bool:
    """Whether the heads that share a kv head are in the same branches, so that they can be rows of one tile."""
    if members == 1 or all(branch.heads.length == plan.rectangle.shape[0] for branch in plan.branches):
        return True
    classes = head_classes(plan.rectangle.shape[0], plan.branches, members)
    return all(
        len({tuple(id(b) for m, b in alike.branches if m == member) for member in range(members)}) == 1
        for alike in classes
    )


@dataclass(frozen=True)
class DeviceTables:
    """`JobTables` on a device, each table flat; `count` jobs.

    Attributes:
        copied: recorded after the copy, where there was one. streams: those that waited for it.
    """

    jobs: Tensor
    entries: Tensor
    weights: Tensor
    rows: Tensor
    count: int
    listed: bool
    copied: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set[int])

    def use_on(self, stream: int) -> None:
        """Order a launch on the current stream, of this number, after the copy, and the end of their memory after the launch; once a stream."""
        if self.copied is None or stream in self.streams:
            return
        current = torch.cuda.current_stream(self.jobs.device)
        current.wait_event(self.copied)
        self.jobs.record_stream(current)
        self.streams.add(stream)


def tables_on(
    plan: Plan, key: tuple[object, ...], device: torch.device, build: Callable[[], JobTables]
) -> DeviceTables:
    """The tables that `build` makes, copied to the device once and kept with the plan, so that later calls neither copy nor wait.

    Raises:
        RuntimeError: a CUDA graph is being captured, and there are none yet.
    """
    cache: dict[tuple[object, ...], DeviceTables] = plan.derived.setdefault("triton tables", {})
    tables = cache.get((key, device))
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if tables is None and captured:
        raise RuntimeError(
            "the row triton must have served a call of these lengths, pattern and options before a CUDA graph captures one: its tables cannot "
            "be copied to the device inside; make the call once before the capture"
        )
    if tables is None:
        (tables,) = copied([build()], device)
        cache[key, device] = tables
    if captured:
        retain_for_graph(tables)
    elif tables.copied is not None:
        tables.use_on(torch.cuda.current_stream(device).cuda_stream)
    return tables


def copied(launches: Sequence[JobTables], device: torch.device) -> list[DeviceTables]:
    """The tables of all launches in one copy, which nobody waits for; outside of any pool that belongs to a CUDA graph."""
    packed = [pack(tables) if tables.packed is None else tables.packed for tables in launches]
    host = torch.from_numpy(packed[0] if len(packed) == 1 else np.concatenate(packed))
    memory, event = (host, None) if device.type == "cpu" else _to_device(host, device)
    parts = memory.split_with_sizes([size for tables in launches for size in packed_sizes(tables)])
    return [
        DeviceTables(jobs, entries, weights.view(torch.float32), rows, len(tables.jobs), tables.listed, event)
        for tables, jobs, entries, weights, rows in zip(launches, *(parts[at::4] for at in range(4)), strict=True)
    ]


def _to_device(host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
    """The copy over pinned memory, and what is recorded after it: other streams must wait for it. torch gives pinned memory back only once the copy is over, and orders the copy by the current stream.

    torch.compile(mode="reduce-overhead") lets memory of the current thread come from a graph's pool, where nothing may stay; that of another
    thread does not.
    """
    stream = torch.cuda.current_stream(device)

    def copy() -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            memory, event = host.pin_memory().to(device, non_blocking=True), torch.cuda.Event()
            event.record(stream)
            return memory, event

    if "torch._inductor.cudagraph_trees" not in sys.modules:
        return copy()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy).result()


def retain_for_graph(tables: DeviceTables) -> None:
    """Keep tables that a CUDA graph captures until the process ends: it reads them at each replay, and nobody is told when it is gone."""
    _CAPTURED[id(tables)] = tables


_CAPTURED: dict[int, DeviceTables] = {}


def query_tables(plan: Plan, number: int, block: tuple[int, int], pack: int = 1, parts: int = 1) -> JobTables:
    """Tables of the `number`-th launch where queries own; packed, of the heads that share a kv head as one owner."""
    launch = query_passes(plan).launches[number]
    tables = decode_tables(plan, launch.branches, block[1], pack, parts)
    if tables is not None:
        return tables
    classes = head_classes(plan.rectangle.shape[0], launch.branches, pack)
    if pack > 1:
        classes = [HeadClass(alike.owners, [(m, b) for m, b in alike.branches if m == 0]) for alike in classes]
    listed, size = gathered(launch.branches), (max(1, block[0] // pack), block[1])
    return job_tables(classes, own_keys=False, unique=launch.unique, listed=listed, block=size, parts=parts)


def key_tables(plan: Plan, members: int, block: tuple[int, int]) -> JobTables:
    """Tables of the one launch where keys own."""
    listed = gathered(plan.branches)
    unique = not listed and all(branch.band is None for branch in plan.branches)
    # Owners are kv heads, each with the branches of all its query heads.
    classes = head_classes(plan.rectangle.shape[0], plan.branches, members)
    return job_tables(classes, own_keys=True, unique=unique, listed=listed, block=block)
