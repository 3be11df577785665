"""`BuildProfile`: what a cache knows of single keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from longattn.patterncache.caching.policy import Entry

PROFILED_KEYS = 10_000
"""Rows kept at most; the key whose first build is longest ago goes first."""


class BuildProfile:
    """Count, bytes and seconds per key, by `str(key)`. Called under the cache's lock."""

    def __init__(self) -> None:
        self._rows: dict[str, list[float]] = {}

    def note_build(self, key: Hashable, nbytes: int, seconds: float) -> None:
        """`key` has been built."""
        row = self._rows.setdefault(str(key), [0, 0, 0.0])
        row[0] += 1
        row[1] = nbytes
        row[2] += seconds
        if len(self._rows) > PROFILED_KEYS:
            del self._rows[next(iter(self._rows))]

    def note_hits(self, entry: Entry) -> None:
        """`entry` leaves; its hits stay in the profile."""
        row = self._rows.get(str(entry.key))
        if row is not None:
            row[0] += entry.hits

    def as_dict(self, entries: Iterable[Entry]) -> dict[str, dict[str, float]]:
        """{str(key): {count, bytes, time}}; hits of entries that are still in the cache are in the count."""
        rows = {key: {"count": row[0], "bytes": row[1], "time": row[2]} for key, row in self._rows.items()}
        for entry in entries:
            row = rows.get(str(entry.key))
            if row is not None:
                row["count"] += entry.hits
        return rows
