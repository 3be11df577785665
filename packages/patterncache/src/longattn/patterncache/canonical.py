"""Canonical strings of patterns: JSON, `["name",{spec}]`, and the classes that are registered by name."""

from __future__ import annotations

import json
from dataclasses import fields
from operator import index
from typing import TYPE_CHECKING, Any

from longattn.patterncache.spans import shortened

if TYPE_CHECKING:
    from longattn.patterncache.pattern import Pattern

_REGISTRY: dict[str, type[Pattern]] = {}


def register(name: str, pattern_class: type[Pattern]) -> None:
    """Let strings that begin with `name` mean this class.

    Raises:
        ValueError: another class has that name.
    """
    taken = _REGISTRY.get(name)
    if taken is not None and taken.__qualname__ != pattern_class.__qualname__:
        raise ValueError(
            f"name must not be taken by another pattern, got {shortened(name)} (registered by {taken.__qualname__})"
        )
    _REGISTRY[name] = pattern_class


def fields_of(pattern: Any) -> dict[str, Any]:
    """The fields of a pattern that is a dataclass, by name. `asdict` copies values, which torch 2.11 does not trace."""
    return {field.name: getattr(pattern, field.name) for field in fields(pattern)}


def registered(name: str) -> type[Pattern]:
    """The class of a name. Those of this package are registered once any of them is imported."""
    if not isinstance(name, str) or name not in _REGISTRY:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"pattern must name one of {sorted(_REGISTRY)} (import the module that defines yours), got {shortened(name)}"
        )
    return _REGISTRY[name]


def build_pattern(name: str, spec: dict[str, Any]) -> Pattern:
    """The pattern registered under `name`, from its spec."""
    return registered(name).from_spec(spec)


def spec_text(value: Any) -> str:
    """Compact JSON with sorted keys, by plain string operations, so that torch.compile can trace a pattern made in traced code."""
    if isinstance(value, dict):
        return "{" + ",".join([f'"{name}":{spec_text(value[name])}' for name in sorted(value)]) + "}"  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([spec_text(entry) for entry in value]) + "]"  # pyright: ignore[reportUnknownVariableType]
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    if isinstance(value, int):
        # A pattern is a constant of a compiled graph: `index` and `hex` turn a symbolic number into one, so another value is compiled again.
        return str(index(value))
    return str(float.fromhex(value.hex())) if isinstance(value, float) else json.dumps(value)
