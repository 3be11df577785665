"""What is measured once on a machine and kept in the cache folder: each in a file of its own, which says what it is for.

The folder's rules hold (see `cachefolder`): what others may write is not believed. What cannot be kept is not measured: a process that
measures anew each time would choose otherwise each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longattn.kernels import cachefolder
from longattn.kernels.dispatch.processor import processor

_MEASURE_LATER = "not measured yet: the first call does"

_believed: dict[tuple[Path, str], Any] = {}
"""What was read or kept in this process: files are asked once."""


def keep_measured(
    kind: str, key: tuple[str, ...], check: Callable[[Any], Any], measure: Callable[[], Any] | None
) -> Any:
    """What is kept under a key in the cache folder: measured and kept first where it is missing and `measure` is given.

    Args:
        kind: first part of the file's name. key: beside torch, processor and number of threads, what the value depends on.
        measure: gives what JSON can say; None: nothing is measured.
        check: the value of what a file says, or None where that is damaged: then the file is moved aside, with a warning.

    Returns:
        The value, or why there is none, as a str.
    """
    folder = cachefolder.cache_folder()
    if isinstance(folder, str):
        return folder
    known_by = [torch.__version__, processor(), f"{torch.get_num_threads()} threads", *key]
    name = f"{kind}-{hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:20]}.json"
    if (folder, name) in _believed:
        return _believed[folder, name]
    wrong = cachefolder.refusal_of(folder)
    if wrong is not None:
        return wrong
    try:
        value = _read(folder, name, check)
        if value is None:
            if measure is None:
                return _MEASURE_LATER
            wrong = cachefolder.unwritable(folder)
            if wrong is not None:
                return wrong
            text = json.dumps({"key": known_by, "value": measure()}, indent=1)
            value = _value(cachefolder.keep_text(folder, name, text), check)
    except OSError as problem:
        return f"the cache folder {folder} cannot be used: {problem}; LONGATTN_CACHE names another"
    if value is None:
        return f"what {folder / name} says is damaged"
    _believed[folder, name] = value
    return value


def _read(folder: Path, name: str, check: Callable[[Any], Any]) -> Any:
    text = cachefolder.read_text(folder, name)
    if text is None:
        return None
    value = _value(text, check)
    if value is None:
        cachefolder.set_aside(folder / name, "is damaged, so it is measured again")
    return value


def _value(text: str, check: Callable[[Any], Any]) -> Any:
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return check(said["value"]) if isinstance(said, dict) and "value" in said else None
