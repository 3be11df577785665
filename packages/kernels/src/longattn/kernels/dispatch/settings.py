"""The present values of environment variables. Every call reads them, so without os.environ's encoding of names and values."""

from __future__ import annotations

import os
from typing import Any

# On POSIX os.environ keeps bytes, by the encoded name; elsewhere, and where that is no longer so, it is read itself.
_values: Any = getattr(os.environ, "_data", os.environ)
_encode: Any = getattr(os.environ, "encodekey", str)


class Setting:
    """An environment variable that may change while the process runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._key = _encode(name)

    def raw(self) -> object:
        """The variable's value in whatever form it is kept, None where it is not set: equal for equal values."""
        return _values.get(self._key)

    def value(self) -> str:
        """The variable's value, "" where it is not set."""
        raw = self.raw()
        return "" if raw is None else os.fsdecode(raw)  # type: ignore[arg-type]


NATIVE = Setting("LONGATTN_NATIVE")
"""Level of the native row, or 0: none. See `native.building`."""

CHOICE = Setting("LONGATTN_CHOICE")
"""How a row is preferred among those that can serve. See `dispatch.choosing`."""


def raw_settings() -> tuple[object, object]:
    """What of these variables a choice depends on, as `Setting.raw` gives it."""
    return NATIVE.raw(), CHOICE.raw()
