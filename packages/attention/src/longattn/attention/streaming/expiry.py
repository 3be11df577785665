"""`ExpiryTable`: until which position each key of a stream is needed, for each kv head."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longattn.patterncache import Pattern, Span

Positions = npt.NDArray[np.int64]

_BLOCK = 4096


class ExpiryTable:
    """The last query position that sees each key, by `Pattern.last_queries`, looked up in blocks of keys.

    Args:
        pattern: causal. num_heads, kv_heads: a kv head's key is needed as long as any of its query heads sees it.
    """

    def __init__(self, pattern: Pattern, num_heads: int, kv_heads: int) -> None:
        self.pattern, self.num_heads, self.kv_heads = pattern, num_heads, kv_heads
        self._start = 0
        self._last: Positions = np.empty((kv_heads, 0), np.int64)

    def last_queries(self, start: int, count: int) -> Positions:
        """(kv_heads, count) int64 for the keys start .. start + count; a key that no query sees has -1.

        Raises:
            ValueError: the pattern means nothing at one of them.
        """
        blocks: list[Positions] = []
        while count:
            at = start - self._start
            if not 0 <= at < self._last.shape[1]:
                self._look_up(start, count)
                at = start - self._start
            block = self._last[:, at : at + count]
            blocks.append(block)
            start, count = start + block.shape[1], count - block.shape[1]
        return np.concatenate(blocks, axis=1) if blocks else self._last[:, :0]

    def most_held(self, length: int, max_rewind: int = 0) -> int:
        """Keys that a kv head holds at most while a stream of `length` tokens is read one by one."""
        most = 0
        last = np.minimum(self.last_queries(0, length) + max_rewind, length - 1)
        for head in last:
            written = np.flatnonzero(head >= np.arange(length))
            change = np.bincount(written, minlength=length + 1) - np.bincount(head[written] + 1, minlength=length + 1)
            most = max(most, int(change.cumsum().max(initial=0)))
        return most

    def _look_up(self, start: int, count: int) -> None:
        """Make the block that holds `start`: whole, where the pattern means something at all of it."""
        begin = start // _BLOCK * _BLOCK
        try:
            last = self.pattern.last_queries(Span(begin, _BLOCK), self.num_heads)
        except ValueError:
            # Past an end, such as that of the last document, a block is as long as the call.
            begin = start
            last = self.pattern.last_queries(Span(start, count), self.num_heads)
        self._start = begin
        self._last = last.reshape(self.kv_heads, -1, last.shape[1]).max(axis=1)
