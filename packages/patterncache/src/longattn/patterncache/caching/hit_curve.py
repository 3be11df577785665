"""`HitCurve`: the hits that more room would have brought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longattn.patterncache.spans import shortened


@dataclass(frozen=True)
class HitCurve:
    """Hits by size, from the size of the cache up to eleven times that.

    Attributes:
        size: the cache's `max_size`, where the curve begins. Smaller sizes are not known: a hit does not say how close it was.
        hits: hits[j] with room for size + j entries.
        asked: hits and misses together.
        exact: whether these are the hits that a cache of that size would have had, had one thread asked and no build failed. So it
            is for policy "lru" without a limit in bytes, where a larger cache holds all that a smaller one holds. Else it is an
            estimate: keys that came back when at most j others had been evicted after them, as if nothing else had changed.
    """

    size: int
    hits: tuple[int, ...]
    asked: int
    exact: bool

    @classmethod
    def of_returns(
        cls, size: int, reach: int, hits: int, asked: int, returns: Mapping[int, int], exact: bool
    ) -> HitCurve:
        """From the counts of keys that came back, by place in the order of eviction; 1 is the newest, `reach` the oldest known."""
        curve = [hits]
        for place in range(1, reach + 1):
            curve.append(curve[-1] + returns.get(place, 0))
        return cls(size, tuple(curve), asked, exact)

    def least_within(self, gain: float) -> int:
        """The least size whose hit rate is at most `gain` below the best of the curve.

        Raises:
            TypeError, ValueError: gain is not a number from 0 to 1.
        """
        if isinstance(gain, bool) or not isinstance(gain, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"gain must be a number from 0 to 1, got {shortened(gain)}")
        if not 0 <= gain <= 1:
            raise ValueError(f"gain must be a number from 0 to 1, got {shortened(gain)}")
        enough = self.hits[-1] - gain * self.asked
        return self.size + next(j for j, hits in enumerate(self.hits) if hits >= enough)
