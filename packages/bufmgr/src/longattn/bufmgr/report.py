"""Statistics of a manager: counters, profiles, and the same figures under the names that torch's and RMM's allocators use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longattn.bufmgr.leasing import guard
from longattn.bufmgr.leasing.book import LeaseBook
from longattn.bufmgr.leasing.debug import OutstandingBuffer, describe_lease
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.leasing.profile import Event, Profile
from longattn.bufmgr.memory.statistics import Statistics, StatisticsAllocator
from longattn.bufmgr.numa.placer import Placer
from longattn.bufmgr.spec import MIB, BufferType
from longattn.bufmgr.strategy import Strategy
from longattn.bufmgr.timeline import save_timeline

_HOLDERS_SHOWN = 5


def manager_stats(book: LeaseBook) -> dict[str, Any]:
    """Return the counters of every type and their sums; see AttentionBufferManager.get_stats."""
    book.settle(blocking=True)
    types = {kind.value: _type_stats(book, kind) for kind in BufferType}
    names = (
        "cache_hits", "cache_misses", "evictions", "outstanding", "cached_buffers", "cached_bytes", "released_in_use",
        "slow_requests", "slots_in_use", "limit_misses",
    )  # fmt: skip
    stats: dict[str, Any] = {name: sum(entry[name] for entry in types.values()) for name in names}
    stats["cache_hit_rate"] = _rate(stats["cache_hits"], stats["cache_misses"])
    stats["reference_counts"] = "exact" if guard.fresh_counts() is not None else "unavailable"
    stats["types"] = types
    return stats


def _type_stats(book: LeaseBook, kind: BufferType) -> dict[str, Any]:
    counts, cache = book.counts[kind], book.caches[kind]
    free = cache.blocks()
    hits = counts.hits + cache.slot_hits
    return {
        "cache_hits": hits,
        "cache_misses": counts.misses,
        "cache_hit_rate": _rate(hits, counts.misses),
        "from_torch": counts.from_torch,
        "released_in_use": counts.released_in_use,
        "slow_requests": counts.slow_requests,
        "slots_in_use": counts.slots_in_use,
        "limit_misses": cache.limit_misses,
        "max_buffers": cache.max_buffers,
        "evictions": cache.evictions,
        "outstanding": counts.leases - len(cache.free_slots()),
        "cached_buffers": len(free),
        "cached_bytes": sum(block.nbytes for block in free),
    }


def _rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 0.0


def torch_style_stats(statistics: Statistics, free_bytes: int, free_count: int) -> dict[str, int]:
    """Return the figures of one device in the keys of torch.cuda.memory_stats.

    reserved_bytes, segment: memory taken from the upstream, and in how many blocks. allocated_bytes, allocation: the part
    in use; current only, because a buffer that is dropped makes no call. All are "...all...".
    """
    stats: dict[str, int] = {}
    for name, unit in (("reserved_bytes", "bytes"), ("segment", "count")):
        current, peak, total = (getattr(statistics, f"{kind}_{unit}") for kind in ("current", "peak", "total"))
        figures = {"current": current, "peak": peak, "allocated": total, "freed": total - current}
        stats |= {f"{name}.all.{key}": value for key, value in figures.items()}
    stats["allocated_bytes.all.current"] = statistics.current_bytes - free_bytes
    stats["allocation.all.current"] = statistics.current_count - free_count
    return stats


def summary(title: str, devices: Mapping[str, Statistics]) -> str:
    """Return a table as text: one line for each device, in MiB and blocks."""
    lines = [f"{title:<14}{'now MiB':>12}{'peak MiB':>12}{'total MiB':>12}{'blocks':>9}"]
    for name, s in devices.items():
        mib = [value / MIB for value in (s.current_bytes, s.peak_bytes, s.total_bytes)]
        lines.append(f"{name:<14}{mib[0]:>12.2f}{mib[1]:>12.2f}{mib[2]:>12.2f}{s.current_count:>9}")
    return "\n".join(lines)


def memory_report(
    title: str, devices: Mapping[str, Statistics], books: Sequence[LeaseBook], segments: Sequence[Mapping[str, Any]]
) -> str:
    """Return what to know when memory runs out, as text: totals, the largest holders, fragmentation, and what to do.

    segments: as `memory_snapshot` returns them.
    """
    leases = [lease for book in books for kind in BufferType for lease in book.outstanding(kind)]
    free = sum(book.free_bytes() for book in books)
    lines = [summary(title, devices), "", *_holders(leases)]
    pieces = [b["size"] for segment in segments for b in segment["blocks"] if b["state"] == "inactive"]
    lines.append(f"free for reuse: {free / MIB:.2f} MiB in caches")
    if segments:
        largest = max(pieces, default=0)
        lines[-1] += (
            f"; arena: {sum(pieces) / MIB:.2f} MiB in {len(pieces)} pieces, the largest {largest / MIB:.2f} MiB"
        )
    return "\n".join([*lines, *_advice(leases, free, debugging=any(book.inspector for book in books))])


def _holders(leases: Sequence[Lease]) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for lease in leases:
        buffer = describe_lease(lease)
        where = "" if buffer.note is None else f", from {buffer.note.site}"
        what = f"{buffer.type} {buffer.shape} {str(buffer.dtype).removeprefix('torch.')} on {buffer.device}"
        groups.setdefault((what, where), []).append(buffer.nbytes)
    total = sum(lease.nbytes for lease in leases)
    lines = [f"in use: {total / MIB:.2f} MiB in {len(leases)} buffers" + (", the largest holders:" if leases else "")]
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))
    lines += [
        f"{sum(sizes) / MIB:>12.2f} MiB in {len(sizes)} of {what}{where}"
        for (what, where), sizes in largest[:_HOLDERS_SHOWN]
    ]
    if len(largest) > _HOLDERS_SHOWN:
        lines.append(f"{'':>12} and {len(largest) - _HOLDERS_SHOWN} other kinds of buffers")
    return lines


def _advice(leases: Sequence[Lease], free: int, *, debugging: bool) -> list[str]:
    lines: list[str] = []
    released = [lease for lease in leases if lease.released]
    if released:
        nbytes = sum(lease.nbytes for lease in released)
        lines.append(
            f"- deallocated while a view, a second name or autograd referenced them: {nbytes / MIB:.2f} MiB "
            f"(buffers: {len(released)}); they return when those references are dropped"
        )
    if free:
        lines.append(f"- clear_cache(), or empty_cache() of the pool, gives {free / MIB:.2f} MiB back to the system")
    if leases and not debugging:
        lines.append("- AttentionBufferManager(debug=True) names the line that allocated each buffer")
    return ["what to do:", *lines] if lines else []


class Reports:
    """The statistics that a manager offers."""

    lightweight: bool
    _book: LeaseBook
    _host: StatisticsAllocator
    _placer: Placer
    _profile: Profile | None
    _strategies: dict[Strategy, int]

    def outstanding(self) -> list[OutstandingBuffer]:
        """Return the buffers in use, the oldest first; with `debug` or without `lightweight`, also the line that allocated each."""
        leases = [lease for kind in BufferType for lease in self._book.outstanding(kind)]
        return [describe_lease(lease) for lease in sorted(leases, key=lambda lease: lease.serial)]

    def timeline(self) -> list[Event]:
        """Return the last 10,000 allocations and ends of buffers in order: with enable_profiling, and without lightweight."""
        return [] if self._profile is None else self._profile.timeline()

    def save_timeline(self, path: Path | str) -> None:
        """Write the timeline as a trace for Perfetto and chrome://tracing (.json), as a picture (.png, needs matplotlib), or as a snapshot that
        torch's viewer opens (.pickle: pytorch.org/memory_viz, or `python -m torch.cuda._memory_viz`), which also has the arena's segments.

        Raises ValueError for another ending, and without enable_profiling or with lightweight, which keep no timeline.
        """
        if self._profile is None or self.lightweight:
            raise ValueError(
                "manager must have enable_profiling=True and lightweight=False to keep a timeline, "
                f"got {self._profile is not None} and {self.lightweight}"
            )
        save_timeline(self.timeline(), path, self._segments())

    def get_stats(self) -> dict[str, Any]:
        """Return the counters.

        cache_hits, cache_misses: requests served with and without reuse; together all that succeeded.
        cache_hit_rate: 0 to 1. evictions: blocks that left because of a limit. outstanding: buffers in use.
        cached_buffers, cached_bytes: free now. released_in_use: calls of `deallocate` that emptied no handle because a
        second name, a view or autograd still referenced the buffer, or because reference_counts is "unavailable"; each such
        buffer returns with its last owner, and until then the next request needs other memory. slow_requests: requests that took
        the slow path, some microseconds more each; slots_in_use: requests for which a buffer of the same request was still in
        use, as where a loop holds two at once: another slot served them, or, where all were in use, the slow path. limit_misses: misses that a cache of up to four times the buffers would have served;
        types have `max_buffers`, the limit at this moment (see adaptive_cache). reference_counts: "exact",
        or "unavailable" where this Python or torch has none to trust: then there are no slots, and every request takes
        the slow path. types: the same for each type, by its name in lower case, and
        `from_torch`, the misses that torch served itself. strategies: how often each was chosen (slots' hits choose
        none). numa: nodes with memory, policy, whether it is active or why not (`inactive`), how often blocks were placed, and how
        often the kernel did not take a policy back. device_pools: bytes that torch's pool of each CUDA device holds (`reserved_bytes`) and
        has in use (`allocated_bytes`), empty without that option. With enable_profiling also profile: for each type `count`, `bytes` and `time` (seconds in allocate).
        """
        stats = manager_stats(self._book)
        stats["strategies"] = {strategy.value: count for strategy, count in self._strategies.items()}
        stats["numa"] = self._placer.as_dict()
        stats["device_pools"] = {
            str(device): {
                f"{part}_bytes": sum(segment[key] for segment in segments)
                for part, key in (("reserved", "total_size"), ("allocated", "allocated_size"))
            }
            for device, pool in (self._book.device_pools or {}).items()
            for segments in [pool.snapshot()]
        }
        if self._profile is not None:
            stats["profile"] = self._profile.as_dict()
        return stats

    def memory_stats(self) -> dict[str, int]:
        """Return host memory in the keys of torch.cuda.memory_stats."""
        stats = self.get_stats()
        return torch_style_stats(self._host.statistics, stats["cached_bytes"], stats["cached_buffers"])

    def memory_summary(self) -> str:
        """Return text for a person whose memory runs out: totals, the largest holders, fragmentation, and what to do.

        A MemoryError of `allocate`, or torch.OutOfMemoryError, carries it as a note, which tracebacks show.
        """
        self._book.settle(blocking=True)
        return memory_report("manager", {"cpu": self._host.statistics}, [self._book], self._segments())

    def _segments(self) -> list[dict[str, Any]]:
        """Return the segments of the arena that this manager takes its blocks from, if it takes them from one."""
        return []

    def reset_peak_memory_stats(self) -> None:
        """Start the peaks of memory_stats again from what is held now."""
        self._host.restart_peaks()
