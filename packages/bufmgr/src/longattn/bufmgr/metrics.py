"""Counters of managers, pools and allocators in the text format that Prometheus reads (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from longattn.bufmgr.checks import check_kind, describe
from longattn.bufmgr.memory.statistics import StatisticsAllocator
from longattn.bufmgr.pool import MemoryPool
from longattn.bufmgr.report import Reports, torch_style_stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The content type under which to serve the text."""

Source = Reports | MemoryPool | StatisticsAllocator


class _Metric(NamedTuple):
    """A row of the tables below: the key in the statistics, the metric's name and kind, and what it counts."""

    key: str
    name: str
    kind: str
    text: str


_MEMORY = (
    _Metric("reserved_bytes.all.current", "reserved_bytes", "gauge", "Bytes of host memory taken from the upstream."),
    _Metric("reserved_bytes.all.peak", "reserved_peak_bytes", "gauge", "Most bytes taken from the upstream at once."),
    _Metric("reserved_bytes.all.allocated", "taken_bytes_total", "counter", "Bytes ever taken from the upstream."),
    _Metric("segment.all.current", "blocks", "gauge", "Blocks taken from the upstream."),
    _Metric("segment.all.peak", "blocks_peak", "gauge", "Most blocks taken from the upstream at once."),
    _Metric("segment.all.allocated", "taken_blocks_total", "counter", "Blocks ever taken from the upstream."),
    _Metric("allocated_bytes.all.current", "allocated_bytes", "gauge", "Bytes of the reserved ones that are in use."),
)
_TYPES = (
    _Metric("cache_hits", "cache_hits_total", "counter", "Requests served with memory that was free for reuse."),
    _Metric("cache_misses", "cache_misses_total", "counter", "Requests served with new memory."),
    _Metric("evictions", "evictions_total", "counter", "Free blocks that left a cache because of its limits."),
    _Metric("released_in_use", "released_in_use_total", "counter", "Releases of buffers that were still referenced."),
    _Metric("outstanding", "outstanding_buffers", "gauge", "Buffers in use."),
    _Metric("cached_bytes", "cached_bytes", "gauge", "Bytes that are free for reuse."),
)


def prometheus_text(sources: Mapping[str, Source]) -> str:
    """Return the counters of sources by name, for an HTTP handler to serve as CONTENT_TYPE.

    sources: managers, pools and StatisticsAllocators; the name is the label `source`. Raises TypeError for anything else.

        text = prometheus_text({"training": manager, "pool": get_global_memory_pool()})
    """
    check_kind("sources", sources, Mapping, "a mapping of names to managers, pools or StatisticsAllocators")
    memory = {name: _memory_stats(name, source) for name, source in sources.items()}
    types = {name: source.get_stats()["types"] for name, source in sources.items() if isinstance(source, Reports)}
    lines: list[str] = []
    for metric in _MEMORY:
        lines += _family(metric, ((f'source="{_escape(name)}"', stats[metric.key]) for name, stats in memory.items()))
    for metric in _TYPES:
        lines += _family(
            metric,
            (
                (f'source="{_escape(name)}",type="{kind}"', entry[metric.key])
                for name, entries in types.items()
                for kind, entry in entries.items()
            ),
        )
    return "".join(f"{line}\n" for line in lines)


def _memory_stats(name: str, source: Any) -> dict[str, int]:
    check_kind("sources", name, str, "named by strings")
    if isinstance(source, StatisticsAllocator):
        return torch_style_stats(source.statistics, 0, 0)
    if not isinstance(source, (Reports, MemoryPool)):
        raise TypeError(f"sources[{name!r}] must be a manager, a pool or a StatisticsAllocator, got {describe(source)}")
    return source.memory_stats()


def _family(metric: _Metric, samples: Iterator[tuple[str, int]]) -> Iterator[str]:
    name = f"longattn_bufmgr_{metric.name}"
    rows = [f"{name}{{{labels}}} {value}" for labels, value in samples]
    if rows:
        yield f"# HELP {name} {metric.text}"
        yield f"# TYPE {name} {metric.kind}"
        yield from rows


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
