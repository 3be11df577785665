"""`Pattern`: who sees whom, as a count. `Restrict`, and the canonical strings.

A pattern knows nothing of lengths, tensors or devices. It answers two questions that must agree: `count(h, i, j)`, the boring
elementwise meaning, and `plan(rectangle)`, the same in strides. Its canonical string is JSON, `["name",{spec}]`, and back.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np

from longattn.patterncache.index import Rectangle, Rows
from longattn.patterncache.listed import listed_branches
from longattn.patterncache.plan import Band, Branch, Counts, Plan, make_plan

_REGISTRY: dict[str, type[Pattern]] = {}

_HOME = {"dilated": "dilated", "full": "window", "window": "window"}
"""Submodule of each pattern of ours, so that a string can be read before anybody imported its class."""


class Pattern(ABC):
    """counts[h, i, j] = how many times query position i of global head h sees key position j.

    To write one's own: subclass, name it (`class Mine(Pattern, name="mine")`), give `count`, `to_spec`, `from_spec`, `causal` and
    `with_causal`. `branches` may stay: the default lists the visible rows of any pattern, exactly, without strides.
    """

    name: ClassVar[str]
    causal: bool

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            taken = _REGISTRY.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"name must not be taken by another pattern, got {name!r} (registered by {taken.__qualname__})"
                )
            cls.name = name
            _REGISTRY[name] = cls

    @property
    def positional(self) -> bool:
        """Whether meaning depends on positions; then queries that outnumber keys need `q_start`. Default True."""
        return True

    @abstractmethod
    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """Elementwise over broadcast global heads h, query positions i, key positions j. The meaning, read by eye."""

    @abstractmethod
    def with_causal(self, causal: bool) -> Self:
        """The same pattern with its causal field replaced."""

    @abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """JSON values from which `from_spec` rebuilds this pattern."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The pattern that `to_spec` described."""

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Branches whose counts add up to this pattern's. The default lists rows."""
        yield from listed_branches(self.counts, rectangle)

    def counts(self, rectangle: Rectangle) -> Counts:
        """(heads, queries, keys) int64, dense: for tests, oracles and small sizes."""
        h = rectangle.heads.positions()[:, None, None]
        i = rectangle.query_positions()[None, :, None]
        j = rectangle.key_positions()[None, None, :]
        found = self.count(h, i, j, rectangle.num_heads)
        return np.array(np.broadcast_to(found, rectangle.shape), dtype=np.int64)

    def plan(self, rectangle: Rectangle) -> Plan:
        """This pattern in strides, for one rectangle. `plan.counts() == pattern.counts(rectangle)`, always."""
        return make_plan(rectangle, self.branches(rectangle))

    def canonical(self) -> str:
        """The canonical string: equal for equal patterns, and `parse_pattern` reads it back. Kept with the pattern."""
        kept = self.__dict__.get("_canonical")
        if kept is None:
            kept = spec_text([self.name, self.to_spec()])
            object.__setattr__(self, "_canonical", kept)
        return kept


def spec_text(value: object) -> str:
    """Compact JSON with sorted keys, by plain string operations, so that torch.compile can trace a pattern made in traced code."""
    if isinstance(value, dict):
        return "{" + ",".join([f'"{name}":{spec_text(value[name])}' for name in sorted(value)]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([spec_text(entry) for entry in value]) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.isidentifier():
        return f'"{value}"'
    return str(value) if isinstance(value, int) else json.dumps(value)


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """The pattern of a canonical string.

    Raises:
        ValueError: text is not `["name",{spec}]`, or no pattern of that name is registered in this process.
    """
    try:
        name, spec = json.loads(text)
    except ValueError as error:
        raise ValueError(f"pattern must be a canonical string '[\"name\",{{...}}]', got {text!r}") from error
    return build_pattern(name, spec)


def build_pattern(name: str, spec: dict[str, Any]) -> Pattern:
    """The pattern registered under `name`, from its spec."""
    if name in _HOME:
        import_module(f"longattn.patterncache.{_HOME[name]}")
    if name not in _REGISTRY:
        raise ValueError(
            f"pattern must name one of {sorted({*_REGISTRY, *_HOME})} (import the module that defines yours), got {name!r}"
        )
    return _REGISTRY[name].from_spec(spec)


def check_pattern_type(name: str, value: object) -> Pattern:
    """Return `value`, or raise TypeError that names the parameter."""
    if not isinstance(value, Pattern):
        raise TypeError(f"{name} must be a Pattern such as Dilated or Window, got {value!r} ({type(value).__name__})")
    return value


def check_causal(value: object) -> bool:
    """Return `value`, or raise TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"causal must be True or False, got {value!r} ({type(value).__name__})")
    return value


@dataclass(frozen=True)
class Restrict(Pattern, name="restrict"):
    """counts of `a` where `b` sees at all, else 0: `b` filters, and never adds.

    Args:
        a: the pattern whose multiplicities count.
        b: the pattern that must also see the pair.
    """

    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        check_pattern_type("a", self.a)
        check_pattern_type("b", self.b)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether either part is causal."""
        return self.a.causal or self.b.causal

    @property
    def positional(self) -> bool:
        """Whether either part is positional."""
        return self.a.positional or self.b.positional

    def with_causal(self, causal: bool) -> Restrict:
        """Both parts with their causal field replaced."""
        return Restrict(self.a.with_causal(causal), self.b.with_causal(causal))

    def count(self, h: Rows, i: Rows, j: Rows, num_heads: int) -> Counts:
        """counts of a where b > 0."""
        return np.where(self.b.count(h, i, j, num_heads) > 0, self.a.count(h, i, j, num_heads), 0)

    def to_spec(self) -> dict[str, Any]:
        """Both parts, as [name, spec]."""
        return {name: [part.name, part.to_spec()] for name, part in (("a", self.a), ("b", self.b))}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Restrict:
        """From [name, spec] of both parts."""
        return cls(build_pattern(*spec["a"]), build_pattern(*spec["b"]))

    def branches(self, rectangle: Rectangle) -> Iterator[Branch]:
        """Where b is a band, a's branches within it; else listed."""
        band = getattr(self.b, "band", None)
        if band is None:
            yield from super().branches(rectangle)
            return
        for branch in self.a.branches(rectangle):
            yield from restrict_band(branch, band)


def restrict_band(branch: Branch, band: Band) -> Iterator[Branch]:
    """`branch` seen through `band`: one branch, or none, or one per tile where tiles differ."""
    tighter = band if branch.band is None else branch.band & band
    if tighter == Band():
        yield branch
        return
    narrowed = replace(branch, band=tighter)
    if narrowed.uniform:
        q_step, k_step = narrowed.steps
        nearest = narrowed.offset - (narrowed.k.count - 1) * k_step
        farthest = narrowed.offset + (narrowed.q.count - 1) * q_step
        if tighter.covers(nearest, farthest):
            yield replace(branch, band=None)
        elif not tighter.misses(nearest, farthest):
            yield narrowed
        return
    for tile in range(branch.q.tiles):
        alone = replace(branch, q=branch.q.tile_range(tile, 1), k=branch.k.tile_range(tile, 1))
        if alone.uniform:
            yield from restrict_band(alone, band)
        else:
            yield replace(alone, band=tighter)
