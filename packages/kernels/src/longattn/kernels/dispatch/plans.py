"""Plans of the op's rectangles: the key of one, the one that a pattern cache holds, and those of lengths to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.ops.arguments import OpArguments
from longattn.kernels.positions import last_positions
from longattn.patterncache import Plan, Rectangle, Span, parse_pattern


def plan_key(arguments: OpArguments) -> tuple[Hashable, ...]:
    """The pattern cache's key of a rectangle."""
    return (arguments.pattern, tuple(arguments.q_spans), tuple(arguments.k_spans), tuple(arguments.heads))


def find_plan(arguments: OpArguments, environment: Environment) -> Plan:
    """The plan of a rectangle, from the environment's cache."""
    return find_plan_of(plan_key(arguments), environment)


def find_plan_of(key: tuple[Any, ...], environment: Environment) -> Plan:
    """The plan under a `plan_key`, from the environment's cache."""
    return environment.cache.get_or_build(key, lambda: _build_plan(*key))


def _build_plan(pattern: str, q_spans: tuple[int, ...], k_spans: tuple[int, ...], heads: tuple[int, ...]) -> Plan:
    queries, keys = (tuple(Span(*flat[i : i + 3]) for i in range(0, len(flat), 3)) for flat in (q_spans, k_spans))
    return parse_pattern(pattern).plan(Rectangle(heads[0], queries, keys, Span(*heads[1:])))


def plans_ahead(arguments: OpArguments, serves: Callable[[Plan], bool], first: int, number: int) -> list[Plan]:
    """The plans of so many lengths of k and v, of the last query each, which nobody keeps; none where `serves` refuses the first of them."""
    pattern, plans = parse_pattern(arguments.pattern), list[Plan]()
    total, heads = arguments.heads[0], Span(*arguments.heads[1:])
    for keys in range(first, first + number):
        query = Span(*last_positions(1, keys, pattern.positional))
        try:
            plans.append(pattern.plan(Rectangle(total, query, Span(0, keys), heads)))
        except ValueError:  # the pattern ends here: the call that comes so far says so
            break
    return plans if plans and serves(plans[0]) else []
