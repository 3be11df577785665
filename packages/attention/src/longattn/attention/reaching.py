"""`ReachWarning`: a pattern leaves tokens of the sequence that it was called with apart, said once, with the call that mends it."""

from __future__ import annotations

import math
import warnings

from longattn.patterncache import Pattern


class ReachWarning(UserWarning):
    """A pattern leaves tokens in islands that no number of layers joins, or tokens that see only themselves."""


_JUDGED: set[tuple[str, int, int]] = set()
MOST_JUDGED = 4096
"""Lengths that are remembered as judged; then all are forgotten, and a warning may come again."""


def residues_budget(length: int, num_heads: int, causal: bool) -> float:
    """Keys a query that let heads share out all residues, and a window: the cheapest pattern that joins all tokens learns little (ADR 0096)."""
    return length / (2 * num_heads) + 64 if causal else length / num_heads + 128


def warn_apart(pattern: Pattern, length: int, num_heads: int) -> None:
    """Warn of tokens that stand apart, once for each pattern, length and number of heads. Patterns that list rows are not judged."""
    key = pattern.canonical(), length, num_heads
    if key in _JUDGED:
        return
    if len(_JUDGED) == MOST_JUDGED:
        _JUDGED.clear()
    _JUDGED.add(key)
    if pattern.listing:
        return
    verdict = pattern.lint(length, num_heads, follow=False)
    if verdict.islands <= 1 and not verdict.starved:
        return
    apart = [f"{verdict.islands} islands of tokens that no depth joins"] * (verdict.islands > 1)
    apart += [f"{verdict.starved} tokens that see only themselves"] * bool(verdict.starved)
    budget = math.ceil(residues_budget(length, num_heads, pattern.causal))
    warnings.warn(
        f"{pattern} leaves {' and '.join(apart)} at {length} tokens and {num_heads} heads. This pattern shows every token in some head, with the "
        f"layers of your model for LAYERS: Dilated.for_length({length}, layers=LAYERS, budget={budget}, num_heads={num_heads}, "
        f"causal={pattern.causal}), in PatternAttention or MultiheadPatternAttention",
        ReachWarning,
        stacklevel=4,
    )
