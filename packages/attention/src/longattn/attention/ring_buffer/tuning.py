"""Auto-tuning: which tiles are quickest here, by trying, once: the choice is kept beside the kernels' figures of speed.

It is known by torch, processor, number of threads, the module's sizes and the shape of the call, and never changes results beyond rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast

from longattn.attention.ring_buffer.config import TileOrder
from longattn.attention.ring_buffer.tiles import TilingProcessor
from longattn.kernels.interface import keep_measured

logger = logging.getLogger("longattn.attention")

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


def tuned(
    tiling: TilingProcessor, heads: int, n: int, device: str, about: tuple[object, ...], call: Callable[[], object]
) -> dict[str, Any]:
    """Apply and return the settings that are kept for such calls, else the quickest ones, which are kept from now on.

    Args:
        device: of the call. Only those of CPUs are kept, and only where the cache folder can keep them; others are found anew.
        about: beside settings, heads and n, what the time of a call depends on.
    """
    now = settings_of(tiling)
    named = {name: _said(value) for name, value in now.items()}

    def measure() -> dict[str, Any]:
        return {name: _said(value) for name, value in quickest(tiling, heads, n, call).items()}

    settings = "settings are kept for CPUs alone"
    if device == "cpu":
        settings = keep_measured("tiles", (*map(str, (heads, n, named)), *map(str, about)), _checked, measure)
    if isinstance(settings, str):
        logger.info("tiles of a ring buffer are not kept: %s", settings)
        return quickest(tiling, heads, n, call)
    chosen = {name: TileOrder(value) if name == "tile_order" else value for name, value in settings.items()}
    apply(tiling, chosen)
    return chosen


def _said(value: Any) -> Any:
    return value.value if isinstance(value, TileOrder) else value


def _checked(settings: Any) -> dict[str, Any] | None:
    """What a file says, or None where that is no settings."""
    if not isinstance(settings, dict) or set(cast("dict[str, Any]", settings)) != {*SIZES, "tile_order"}:
        return None
    values = cast("dict[str, Any]", settings)
    fits = all(type(values[name]) is int and values[name] > 0 for name in SIZES)
    return values if fits and values["tile_order"] in {order.value for order in TileOrder} else None


def quickest(
    tiling: TilingProcessor, heads: int, n: int, call: Callable[[], object], rounds: int = 3
) -> dict[str, Any]:
    """Try each candidate `rounds` times in turn, apply and return the one whose best time is least; of equals the first."""
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
