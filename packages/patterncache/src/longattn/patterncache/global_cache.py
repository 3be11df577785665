"""The process-wide cache, and the environment variables that set it up."""

from __future__ import annotations

import os
import threading

from longattn.patterncache.cache import PatternCache

_GLOBAL: PatternCache | None = None
_GLOBAL_LOCK = threading.Lock()
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _size_from_environment() -> int:
    text = os.environ.get("PATTERN_CACHE_MAX_SIZE", "").strip() or "1000"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"PATTERN_CACHE_MAX_SIZE must be an integer >= 0, got {text!r}")
    return int(text)


def _profiling_from_environment() -> bool:
    text = os.environ.get("PATTERN_CACHE_ENABLE_PROFILING", "").strip() or "0"
    if text.lower() not in _SWITCH:
        raise ValueError(f"PATTERN_CACHE_ENABLE_PROFILING must be one of {', '.join(_SWITCH)}, got {text!r}")
    return _SWITCH[text.lower()]


def get_global_pattern_cache() -> PatternCache:
    """The process-wide cache that every forward uses unless told otherwise.

    Made when first asked for, with `PATTERN_CACHE_MAX_SIZE` (default 1000) and `PATTERN_CACHE_ENABLE_PROFILING` (default 0) from the
    environment.

    Raises:
        ValueError: a variable is no integer >= 0, or no yes or no; it is named.
    """
    global _GLOBAL
    if _GLOBAL is None:
        with _GLOBAL_LOCK:
            if _GLOBAL is None:
                settings = {"max_size": _size_from_environment(), "enable_profiling": _profiling_from_environment()}
                _GLOBAL = PatternCache(**settings)
    return _GLOBAL


def reset_global_pattern_cache() -> None:
    """Empty the process-wide cache and read the environment again. It stays the same object, so modules that hold it see the reset.

    Raises:
        ValueError: a variable is garbage; it is named, and the cache stays as it was.
    """
    size, profiling = _size_from_environment(), _profiling_from_environment()
    get_global_pattern_cache().configure(size, None, profiling)
