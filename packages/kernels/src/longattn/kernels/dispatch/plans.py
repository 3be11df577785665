"""Plans of the op's rectangles: the key of one, the one of its arguments, and those of lengths to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from longattn.kernels.dispatch.environment import Environment, find_plan_of
from longattn.kernels.ops.arguments import OpArguments
from longattn.kernels.positions import last_positions
from longattn.patterncache import Plan, Rectangle, Span, parse_pattern


def plan_key(arguments: OpArguments) -> tuple[Hashable, ...]:
    """The pattern cache's key of a rectangle."""
    return (arguments.pattern, tuple(arguments.q_spans), tuple(arguments.k_spans), tuple(arguments.heads))


def find_plan(arguments: OpArguments, environment: Environment) -> Plan:
    """The plan of a rectangle, from the environment's cache."""
    return find_plan_of(plan_key(arguments), environment)


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
