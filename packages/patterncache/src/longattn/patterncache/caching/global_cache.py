"""The process-wide cache, and the environment variables that set it up."""

from __future__ import annotations

import os
import threading
from typing import Any

from longattn.patterncache.caching.cache import PatternCache
from longattn.patterncache.caching.device_tier import DeviceTier
from longattn.patterncache.spans import shortened

_GLOBAL: PatternCache | None = None
_TIER = DeviceTier()
_GLOBAL_LOCK = threading.Lock()
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _number_from_environment(name: str, default: int | None) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} must be an integer >= 0, got {shortened(text)}")
    return int(text)


def _profiling_from_environment() -> bool:
    text = os.environ.get("PATTERN_CACHE_ENABLE_PROFILING", "").strip() or "0"
    if text.lower() not in _SWITCH:
        raise ValueError(f"PATTERN_CACHE_ENABLE_PROFILING must be one of {', '.join(_SWITCH)}, got {shortened(text)}")
    return _SWITCH[text.lower()]


def _settings_from_environment() -> dict[str, Any]:
    size = _number_from_environment("PATTERN_CACHE_MAX_SIZE", 1000)
    most = _number_from_environment("PATTERN_CACHE_GROW_TO", None)
    assert size is not None
    if most is not None and most < size:
        raise ValueError(f"PATTERN_CACHE_GROW_TO must be at least PATTERN_CACHE_MAX_SIZE, {size}, got {most}")
    return {
        "max_size": size,
        "max_bytes": _number_from_environment("PATTERN_CACHE_MAX_BYTES", None),
        "enable_profiling": _profiling_from_environment(),
        "grow_to": most,
    }


def _device_bytes_from_environment() -> int | None:
    return _number_from_environment("PATTERN_CACHE_DEVICE_MAX_BYTES", None)


def get_global_pattern_cache() -> PatternCache:
    """The process-wide cache that every forward uses unless told otherwise.

    Made when first asked for, with `PATTERN_CACHE_MAX_SIZE` (default 1000), `PATTERN_CACHE_MAX_BYTES` (no limit), `PATTERN_CACHE_GROW_TO`
    (it does not grow) and `PATTERN_CACHE_ENABLE_PROFILING` (0) from the environment.

    Raises:
        ValueError: a variable is no integer >= 0, or no yes or no, or less than it must be; it is named.
    """
    global _GLOBAL
    if _GLOBAL is None:
        with _GLOBAL_LOCK:
            if _GLOBAL is None:
                settings, device_bytes = _settings_from_environment(), _device_bytes_from_environment()
                _TIER.configure(device_bytes)
                _GLOBAL = PatternCache(**settings)  # pyright: ignore[reportConstantRedefinition]
    return _GLOBAL


def get_global_device_tier() -> DeviceTier:
    """The process-wide tier of device tensors. `PATTERN_CACHE_DEVICE_MAX_BYTES` (no limit) is read as the variables of the cache are.

    Raises:
        ValueError: a variable is garbage; it is named.
    """
    get_global_pattern_cache()
    return _TIER


def reset_global_pattern_cache() -> None:
    """Empty the process-wide cache and read the environment again. It stays the same object, so modules that hold it see the reset.

    Raises:
        ValueError: a variable is garbage; it is named, and the cache stays as it was.
    """
    settings, device_bytes = _settings_from_environment(), _device_bytes_from_environment()
    get_global_pattern_cache().configure(**settings)
    _TIER.configure(device_bytes)
