"""All patterns of this package, by name, and `parse_pattern`, which reads the canonical string of any registered pattern.

The registry stands above what it registers: importing it imports every pattern, and importing any pattern imports it (the room's
`__init__`), so that an unpickled pattern combines and parses as any other.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

from longattn.patterncache.canonical import build_pattern
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_layout import BlockLayout
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.patterns.by_head import ByHead
from longattn.patterncache.patterns.combined import Intersection, Sum, Union
from longattn.patterncache.patterns.dilated import Dilated
from longattn.patterncache.patterns.documents import Documents
from longattn.patterncache.patterns.hierarchical import HierarchicalBlocks
from longattn.patterncache.patterns.periodic import Periodic
from longattn.patterncache.patterns.restrict import Restrict
from longattn.patterncache.patterns.strided import Strided
from longattn.patterncache.patterns.window import Full, Window
from longattn.patterncache.spans import check_kind, shortened

PATTERNS: tuple[type[Pattern], ...] = (
    BlockLayout,
    BlockSparse,
    ByHead,
    Dilated,
    Documents,
    Full,
    HierarchicalBlocks,
    Intersection,
    Periodic,
    Restrict,
    Strided,
    Sum,
    Union,
    Window,
)
"""Patterns that this package registers."""

MOST_DEPTH = 200
"""Brackets within brackets of a canonical string: about a hundred patterns within patterns."""

_KEPT_TEXT = 4096
"""Characters of the longest canonical string whose pattern is kept: a block mask's may be megabytes, and its plan is cached anyway."""


def parse_pattern(text: str) -> Pattern:
    """The pattern of a canonical string.

    Raises:
        TypeError: text is no str.
        ValueError: text is not `["name",{spec}]`, no pattern of that name is registered in this process, or its spec does not say one.
    """
    check_kind("text", text, str)
    return _parse_kept(text) if len(text) <= _KEPT_TEXT else _parse(text)


def _parse(text: str) -> Pattern:
    depth = _depth(text)
    if depth > MOST_DEPTH:
        raise ValueError(f"pattern must nest at most {MOST_DEPTH} brackets, got {depth}: {shortened(text)}")
    try:
        name, spec = json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"text must be a canonical string '[\"name\",{{...}}]', got {shortened(text)}") from error
    try:
        return build_pattern(name, spec)
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        TypeError,
    ) as error:  # what JSON of any other shape runs into
        raise ValueError(
            f"text must hold the spec of a pattern named {shortened(name)}, got {shortened(text)}: {str(error)[:200]}"
        ) from error


def _depth(text: str) -> int:
    """How deep brackets nest; those in texts count too, and names of patterns have none."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


_parse_kept = lru_cache(maxsize=4096)(_parse)
