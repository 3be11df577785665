"""What LONGATTN_NATIVE says now. Every call asks, so it is read without os.environ's encoding of the name and the value."""

from __future__ import annotations

import os
from typing import Any

_NAME = "LONGATTN_NATIVE"
# On POSIX os.environ keeps bytes, by the encoded name; elsewhere, and where that is no longer so, it is asked itself.
_values: Any = getattr(os.environ, "_data", os.environ)
_key: Any = getattr(os.environ, "encodekey", str)(_NAME)


def raw_choice() -> object:
    """The variable's value in whatever form it is kept, None where it is not set: equal for equal values."""
    return _values.get(_key)


def choice() -> str:
    """The variable's value, "" where it is not set."""
    raw = raw_choice()
    return "" if raw is None else os.fsdecode(raw)  # type: ignore[arg-type]
