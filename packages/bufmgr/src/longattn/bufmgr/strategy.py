"""How a request is served: four strategies in one table, read from the top; the first row that fits is taken.

    strategy        when                                                        what
    bucketed        under 1 MiB, reuse "high", prefer_bucketed                  size classes, 8 to a doubling
    numa_aware      over 16 MiB, prefer_numa, more than one node                a block that is placed on nodes (numa/)
    fragment_aware  more than twice the type's typical size                     the tightest free block up to 1/8 larger
    direct          everything else                                             a block of the size asked for

The two rows in the middle are the ones that `lightweight` leaves out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from longattn.bufmgr.spec import MIB, BufferConfig

_LINE = 64
_PAGE = 4096
_CLASSES_PER_DOUBLING = 8


class Strategy(enum.Enum):
    """How a request for host memory is served."""

    BUCKETED = "bucketed"
    NUMA_AWARE = "numa_aware"
    FRAGMENT_AWARE = "fragment_aware"
    DIRECT = "direct"

    __hash__ = object.__hash__  # as BufferType's: Enum's own is a Python call


class _Row(NamedTuple):
    strategy: Strategy
    lightweight: bool
    fits: Callable[[BufferConfig, int, int], bool]


def _fits_buckets(config: BufferConfig, nbytes: int, nodes: int) -> bool:
    return config.prefer_bucketed and config.reuse_frequency == "high" and nbytes < MIB


def _fits_a_node(config: BufferConfig, nbytes: int, nodes: int) -> bool:
    return config.prefer_numa and nodes > 1 and nbytes > 16 * MIB


def _is_unusually_large(config: BufferConfig, nbytes: int, nodes: int) -> bool:
    return nbytes > 2 * config.typical_size_mb * MIB


def _always(config: BufferConfig, nbytes: int, nodes: int) -> bool:
    return True


_TABLE = (
    _Row(Strategy.BUCKETED, True, _fits_buckets),
    _Row(Strategy.NUMA_AWARE, False, _fits_a_node),
    _Row(Strategy.FRAGMENT_AWARE, False, _is_unusually_large),
    _Row(Strategy.DIRECT, True, _always),
)


def choose_strategy(config: BufferConfig, nbytes: int, *, lightweight: bool, nodes: int) -> Strategy:
    """Return the first strategy of the table that fits a request of `nbytes` on a machine with so many NUMA nodes."""
    for row in _TABLE:
        if (row.lightweight or not lightweight) and row.fits(config, nbytes, nodes):
            return row.strategy
    raise AssertionError("the last row fits everything")


def block_size(nbytes: int) -> int:
    """Return the size of the block that serves `nbytes`: whole cache lines, from 64 KiB on whole pages."""
    step = _LINE if nbytes < 16 * _PAGE else _PAGE
    return -(-nbytes // step) * step


def size_class(nbytes: int) -> int:
    """Return the smallest size class of at least `nbytes`: at most 1/8 more than the whole lines or pages it takes."""
    step = max((1 << max(nbytes, 1).bit_length() - 1) // _CLASSES_PER_DOUBLING, _LINE)
    return block_size(-(-nbytes // step) * step)


def block_bounds(strategy: Strategy, nbytes: int) -> tuple[int, int]:
    """Return (the size of a new block, the largest free block that may serve) for a request of 1 byte or more."""
    if strategy is Strategy.BUCKETED:
        size = size_class(nbytes)
        return size, size
    size = block_size(nbytes)
    return size, size + size // 8 if strategy is Strategy.FRAGMENT_AWARE else size
