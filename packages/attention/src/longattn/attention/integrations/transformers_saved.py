"""Which pattern a model of transformers has: kept in its configuration, so that a checkpoint says what it was trained with.

A configuration's entry `attn_implementation` is what transformers reads when it loads one: an unregistered name is refused there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

import torch

from longattn.patterncache import Full, Pattern, parse_pattern
from longattn.patterncache.spans import shortened

IMPLEMENTATION = "longattn"
"""The `attn_implementation` of models whose configuration says the pattern."""

FIELD = "longattn_pattern"
"""The entry of a configuration: a canonical string, or canonical strings by layer."""

_LAYER = "_longattn_pattern"
"""Attribute of a layer that `use_pattern` gave a pattern of its own."""

_PARSED: dict[str, Pattern] = {}
"""Patterns by canonical string: a graph finds one here, where it could not read the string."""

_called: ContextVar[set[int] | None] = ContextVar("longattn_layers_called", default=None)


def record(config: Any, name: str, pattern: Pattern) -> None:
    """Write name and pattern into a configuration.

    Raises:
        ValueError: a checkpoint was loaded that says another pattern.
    """
    saved_text, text = config.__dict__.get(FIELD), pattern.canonical()
    # Loading takes the name out of the configuration: where it is there, this process wrote both, and a name may be registered anew.
    if saved_text == text and config.__dict__.get("attn_implementation") == name:
        return
    if saved_text not in (None, text) and "attn_implementation" not in config.__dict__:
        raise ValueError(
            f"{name!r} must be registered for the pattern that the checkpoint was saved with, {saved_text}, got {text}; "
            f"register_with_transformers({{{name!r}: parse_pattern(...)}}) restores it, use_pattern(model, pattern) sets another"
        )
    setattr(config, FIELD, text)
    config.attn_implementation = name


def assign(config: Any, entry: str | dict[str, str]) -> None:
    """Write what `use_pattern` was given into a configuration and those within it."""
    setattr(config, FIELD, entry)
    config.attn_implementation = IMPLEMENTATION
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            assign(getattr(config, name), entry)


def parsed(canonical: str) -> Pattern:
    """`parse_pattern`, once for each string."""
    if canonical not in _PARSED:
        _PARSED[canonical] = parse_pattern(canonical)
    return _PARSED[canonical]


def of_layer(module: torch.nn.Module) -> str | None:
    """The canonical string that `set_layer` gave a layer, or None."""
    return getattr(module, _LAYER, None)


def set_layer(module: torch.nn.Module, canonical: str | None) -> None:
    """Give a layer its pattern; None: it has none of its own."""
    if canonical is None:
        module.__dict__.pop(_LAYER, None)
        return
    parsed(canonical)
    setattr(module, _LAYER, canonical)


def pattern_of_layer(module: torch.nn.Module) -> Pattern:
    """The pattern of a layer of a model under `IMPLEMENTATION`.

    Raises:
        ValueError: the configuration has none, or several, and layers do not say which is theirs.
    """
    text = of_layer(module)
    if text is None:
        text = getattr(getattr(module, "config", None), FIELD, None)
    if not isinstance(text, str):
        raise ValueError(
            f"config.{FIELD} must be one pattern unless use_pattern(model) is called once after loading, got {shortened(text)} "
            f"in the configuration of {type(module).__name__}"
        )
    return parsed(text)


def patterns_of_model(config: Any) -> Iterable[Pattern]:
    """Every pattern that a layer may have."""
    entry = getattr(config, FIELD, None)
    if entry is None:
        raise ValueError(
            f"config.{FIELD} must be a pattern or patterns by layer under {IMPLEMENTATION!r}, got None: "
            f"use_pattern(model, pattern) sets it"
        )
    if isinstance(entry, str):
        return (parsed(entry),)
    return (Full(), *(parsed(text) for text in entry.values()))


def note_call(module: torch.nn.Module) -> None:
    """Record for a running `calls()` that a layer called its attention function."""
    if torch.compiler.is_compiling():
        return
    called = _called.get()
    if called is not None:
        called.add(id(module))


@contextmanager
def calls() -> Generator[set[int], None, None]:
    """The ids of layers that call their attention function inside the block, as a set that grows."""
    layer_ids: set[int] = set()
    token = _called.set(layer_ids)
    try:
        yield layer_ids
    finally:
        _called.reset(token)


def matches(key: int | str, name: str) -> bool:
    """Whether a layer's name is that of a key: the first number in it, or a shell pattern."""
    if isinstance(key, str):
        return fnmatchcase(name, key)
    return next((int(part) for part in name.split(".") if part.isdigit()), None) == key
