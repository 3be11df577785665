"""Auto-tuning: which tiles are quickest here, by trying."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from longattn.attention.ring_buffer.config import TileOrder
from longattn.attention.ring_buffer.tiles import TilingProcessor

SIZES = ("tile_size", "block_size", "head_tile_size", "prefill_size")


def settings_of(tiling: TilingProcessor) -> dict[str, Any]:
    """What tuning may change, by name."""
    return {name: getattr(tiling, name) for name in (*SIZES, "tile_order")}


def apply(tiling: TilingProcessor, settings: dict[str, Any]) -> None:
    """Set what `settings_of` returned."""
    for name, value in settings.items():
        setattr(tiling, name, value)


def candidates(tiling: TilingProcessor, heads: int, n: int) -> Iterator[dict[str, Any]]:
    """The present settings, then larger tiles, few or all heads at a time, both orders; none larger than n queries need."""
    settings = settings_of(tiling)
    yield settings
    for tile, head_tile, order in product((64, 128, 256), (settings["head_tile_size"], heads), TileOrder):
        if tile < 2 * n:
            sizes = {"tile_size": tile, "block_size": 2 * tile, "head_tile_size": head_tile}
            yield {**settings, **sizes, "prefill_size": max(settings["prefill_size"], 2 * tile), "tile_order": order}


def quickest(
    tiling: TilingProcessor, heads: int, n: int, call: Callable[[], object], rounds: int = 3
) -> dict[str, Any]:
    """Try each candidate `rounds` times in turn, keep and return the one whose best time is least. Results do not change."""
    all_settings = list({tuple(c.items()): c for c in candidates(tiling, heads, n)}.values())
    best_times = [float("inf")] * len(all_settings)
    for _ in range(rounds):
        for index, settings in enumerate(all_settings):
            apply(tiling, settings)
            start = time.perf_counter()
            call()
            best_times[index] = min(best_times[index], time.perf_counter() - start)
    best_settings = all_settings[best_times.index(min(best_times))]
    apply(tiling, best_settings)
    return best_settings
