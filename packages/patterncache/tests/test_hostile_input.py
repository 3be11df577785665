"""Texts, bytes and sizes from outside: refused with a ValueError that names the limit, at once, and in few words; or done at once."""

import json
import zlib
from base64 import b64encode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longattn.patterncache import (
    Affine,
    BlockLayout,
    BlockSparse,
    Branch,
    ByHead,
    Dilated,
    Documents,
    Full,
    HierarchicalBlocks,
    Listed,
    Periodic,
    Plan,
    Rectangle,
    Restrict,
    Span,
    Strided,
    Window,
    from_mask_mod,
    from_natten,
    parse_pattern,
    plan_from_bytes,
    plan_to_bytes,
)
from longattn.patterncache.spans import shortened
from longattn.patterncache.testing import patterns

AT_ONCE = pytest.mark.timeout(60)
"""Far more than it takes, and far less than what is refused here would take."""


def nested(times):
    text = '["full",{"causal":false}]'
    for _ in range(times):
        text = '["restrict",{"a":' + text + ',"b":["full",{"causal":true}]}]'
    return text


BOMB = b64encode(zlib.compress(bytes(1 << 26), 9)).decode()


def mask_text(shape, mask):
    return json.dumps(["block_sparse", {"block_size": 1, "causal": False, "shape": shape, "mask": mask}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(["hierarchical_blocks", {"block_size": 1, "levels": 2**62, "fanout": 2}]), "levels must"),
        (mask_text([8, 8], BOMB), "mask must hold 64 bits"),
        (mask_text([1 << 15, 1 << 15], BOMB), "shape must have at most 268435456 cells"),
        (mask_text([-1, 8], BOMB), "shape"),
        (json.dumps(["by_head", {"parts": [[[0, 10**9, 1], ["full", {"causal": True}]]]}]), "below 1048576 heads"),
        (nested(400), "must nest at most 200 brackets"),
        ("[" * 10**6, "must nest at most 200 brackets"),
        ("x" * 10**7, "must be a canonical string"),
        (json.dumps(["y" * 10**6, {}]), "must name one of"),
        ("[[],{}]", "must name one of"),
        ("3", "must be a canonical string"),
    ],
)
@AT_ONCE
def test_a_hostile_text_is_refused(text, words):
    """At once, by name, without repeating it."""
    with pytest.raises(ValueError, match=words) as refusal:
        parse_pattern(text)
    assert len(str(refusal.value)) < 1000


ODD_JSON = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1.5,
        2**70,
        1e400,
        "",
        "full",
        [],
        [[1]],
        [1, 2, 3],
        {},
        {"a": 1},
        ["full", {"causal": True}],
        "x" * 10**4,
    ]
)


def places(value, path=()):
    """The path of every value within JSON."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


@given(patterns(), st.data())
def test_a_text_of_another_shape_is_refused(pattern, data):
    """Whatever value within is another, missing or one too many: a pattern, or a ValueError of few words."""
    said = json.loads(pattern.canonical())
    *parents, last = data.draw(st.sampled_from(list(places(said))[1:]))
    within = said
    for key in parents:
        within = within[key]
    change = data.draw(st.sampled_from(["other", "missing", "more"]))
    if change == "other":
        within[last] = data.draw(ODD_JSON)
    elif change == "missing":
        del within[last]
    elif isinstance(within, dict):
        within["x" * 10**4] = 1
    else:
        within.append(data.draw(ODD_JSON))
    try:
        refusal = str(parse_pattern(json.dumps(said)))[:0]
    except ValueError as error:
        refusal = str(error)
    assert len(refusal) < 2000


LONG, HUGE, DIGITS = "x" * 10**6, 2**62, 10**5000


def all_pairs(b, h, q, k):
    return q >= 0 * k


REFUSED = {
    "batch entries": (lambda: from_mask_mod(all_pairs, 1, batch=2**31), "batch must be at most 65536"),
    "batch cells": (lambda: from_mask_mod(all_pairs, 4096, batch=60000), "at most 268435456 .* cells"),
    "mask tokens": (lambda: from_mask_mod(all_pairs, 2**50), "N must be at most 268435456 tokens"),
    "mask heads": (lambda: from_mask_mod(all_pairs, 4, num_heads=2**40), "at most 268435456 .* cells"),
    "natten": (lambda: from_natten((2**31, 2**31, 2**31), 3), "N must be an integer from 1 to"),
    "window": (lambda: Window(HUGE), "size must be an integer from 1 to 1152921504606846976, got 4611686018427387904"),
    "digits": (lambda: Window(DIGITS), "size must be .* got an integer of 16610 bits"),
    "negative digits": (lambda: Window(-DIGITS), "size must be .* got an integer of 16610 bits"),
    "text for a size": (lambda: Window(LONG), "size must be"),
    "segments": (lambda: Dilated((HUGE,), (1,)), r"segment_lengths\[0\] must be"),
    "text for segments": (lambda: Dilated(LONG, (1,)), "segment_lengths must be"),
    "lengths of lists": (lambda: Dilated([1] * 10**5, [1] * (10**5 - 1)), "dilation_rates must have"),
    "text for heads": (lambda: Dilated((4,), (1,), heads=LONG), "heads must be one of"),
    "text for a layout": (lambda: BlockLayout(LONG), "layout must be one of"),
    "ratio": (lambda: BlockLayout(ratio=1e-300), "ratio must be"),
    "runs": (lambda: Periodic(2, LONG, 8), "runs must be"),
    "parts": (lambda: ByHead(LONG), "parts must be"),
    "documents": (lambda: Documents(LONG, Full()), "cu_seqlens"),
    "heads of a module": (
        lambda: Rectangle(2**40, Span(0, 4), Span(0, 4)),
        "num_heads must be an integer from 1 to 1048576",
    ),
    "counts": (lambda: Full().to_dense(2**40), "at most 2147483648 dense counts"),
    "lint": (lambda: Full().lint(2**40), "N must be at most 268435456"),
    "reach": (lambda: Window(4).reach(2, 2**40), "N must be at most 268435456"),
    "listed": (lambda: (Strided(3) | HierarchicalBlocks(2)).plan(square(2**30)), 'listed="allow"'),
}


def square(length):
    return Rectangle(8, Span(0, length), Span(0, length))


@pytest.mark.parametrize("name", REFUSED)
@AT_ONCE
def test_a_hostile_size_is_refused(name):
    """At once, by name, in few words."""
    call, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=words) as refusal:
        call()
    assert len(str(refusal.value)) < 1000


MANY = 2**59
DONE = [
    Window(MANY, sinks=MANY),
    Window(MANY, causal=False),
    Dilated((MANY,), (2,), causal=True),
    Dilated((4,), (MANY,)),
    Dilated((2**31,), (2**31,), "blocks"),
    Dilated((MANY, MANY - 1), (1, 3), queries="all"),
    Dilated((MANY,), (2**31,)) | Dilated((5,), (2,)),
    Window(MANY) & Dilated((MANY,), (3,)),
    Strided(MANY, 2**31),
    HierarchicalBlocks(2, 2, 2**31),
    BlockLayout("bigbird", MANY, 0.1, MANY, MANY, 2**64 - 1),
    BlockLayout("dilated_sparse", 4, 2.0**-60),
    BlockSparse(MANY, [[True]]),
    Periodic(MANY, [(0, 0, None, MANY)], MANY),
    Documents([0, MANY], Window(3)),
]


@pytest.mark.parametrize("pattern", DONE, ids=lambda pattern: type(pattern).__name__)
@AT_ONCE
def test_a_large_number_costs_nothing(pattern):
    """Plans, counts, lint and canonical strings of few tokens take no time or room by it."""
    rectangle = Rectangle(2, Span(0, 16), Span(0, 16))
    assert (pattern.plan(rectangle).counts() == pattern.counts(rectangle)).all()
    assert parse_pattern(pattern.canonical()) == pattern and pattern.lint(16, 2).length == 16


@pytest.mark.parametrize("combine", [
    lambda a: Restrict(a, Full(causal=True)), lambda a: Restrict(Window(3), a), lambda a: a | Window(3), lambda a: Dilated((4, 8), (1, 2)) & a,
    lambda a: a + Window(3), lambda a: ByHead([(Span(0, 1), a), (Span(1, 1), Window(3))]), lambda a: Restrict(a | Window(3), Dilated((4, 8), (1, 2))),
])  # fmt: skip
@AT_ONCE
def test_many_patterns_within_patterns_cost_no_more_than_their_number(combine):
    """Each asks its parts once: a text of thirty levels is read, planned, linted and followed at once."""
    pattern = Dilated((4, 8), (1, 2))
    for _ in range(30):
        pattern = combine(pattern)
    rectangle = Rectangle(2, Span(0, 8), Span(0, 8))
    assert pattern.lint(8, 2).length == 8 and pattern.reach(1, 8) and pattern.describe(8, 2)
    assert (pattern.plan(rectangle).counts() == pattern.counts(rectangle)).all()
    assert pattern.last_queries(Span(0, 4), 2).shape == (2, 4)
    assert parse_pattern(pattern.canonical()) == pattern


def test_ninety_patterns_within_patterns_are_read():
    """The limit leaves room."""
    assert parse_pattern(nested(90)).canonical() == nested(90)


def plan_bytes(change):
    """Bytes of a plan with its line of JSON changed."""
    plan = Dilated((4, 8), (1, 2)).plan(Rectangle(2, Span(0, 16), Span(0, 16)))
    magic, head, rest = plan_to_bytes(plan).split(b"\n", 2)
    said = json.loads(head)
    change(said)
    return b"\n".join([magic, json.dumps(said).encode(), rest])


def set_branch(at, value, inner=None):
    def change(said):
        if inner is None:
            said["branches"][0][at] = value
        else:
            said["branches"][0][at][inner] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_branch(2, 0, 4),  # a key step of 0
        set_branch(2, -1, 4),
        set_branch(2, 10, 0),  # rows outside k
        set_branch(2, -3, 0),
        set_branch(1, 0, 2),  # a query row in two tiles
        set_branch(2, 2**61, 3),
        set_branch(2, 2**70, 0),
        set_branch(2, 1.5, 0),
        set_branch(2, True, 0),
        set_branch(2, 3, 1),  # other tiles than the queries
        set_branch(0, [[0, 9, 1]]),
        set_branch(3, [5, 1]),
        set_branch(5, ["a", None]),
        set_branch(5, 3),
        set_branch(2, [1, 1, 0, 1, None, "|O", [4, 1]]),
        set_branch(2, [1, 1, 0, 1, None, "<i8", [4, 10**9]]),
        set_branch(2, []),
        lambda said: said.update(rectangle=None),
        lambda said: said.update(branches=[3]),
    ],
)
def test_a_forged_plan_is_refused(change):
    """Steps, rows, tiles, heads and positions are those of a plan of its rectangle."""
    with pytest.raises(ValueError, match="data must be the bytes of plan_to_bytes"):
        plan_from_bytes(plan_bytes(change))


@pytest.mark.parametrize(("starts", "run", "step", "fits"), [
    ([[0, 3], [5, 1]], 3, 1, True), ([[0, 3], [6, 1]], 3, 1, False), ([[0, 3], [1, 6]], 3, 1, False), ([[0, 5]], 2, 2, True), ([[0, 6]], 2, 2, False),
])  # fmt: skip
def test_a_list_that_leaves_the_rectangle_is_refused(starts, run, step, fits):
    """Wherever in the list its farthest run stands, to the last row of it."""
    rows = Listed(np.array(starts), run, step)
    queries = Affine(0, rows.tiles, 1, 1, 1)
    plan = Plan(Rectangle(1, Span(0, 8), Span(0, 8)), (Branch(Span(0, 1), queries, rows),))
    if fits:
        np.testing.assert_array_equal(plan_from_bytes(plan_to_bytes(plan)).branches[0].k.rows(), rows.rows())
    else:
        with pytest.raises(ValueError, match=f"rows 0 to {rows.rows().max()} of 8"):
            plan_from_bytes(plan_to_bytes(plan))


def test_a_changed_byte_is_refused_or_harmless():
    """Whatever byte of a listed plan is changed, rows stay in the rectangle."""
    mask = [[(3 * a + b) % 4 == 0 for b in range(40)] for a in range(40)]
    data = plan_to_bytes(BlockSparse(2, mask).plan(Rectangle(1, Span(0, 80), Span(0, 80))))
    for at in range(0, len(data), 7):
        changed = data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        try:
            plan = plan_from_bytes(changed)
        except ValueError:
            continue
        for branch in plan.branches:
            assert branch.k.rows().min() >= 0 and branch.k.rows().max() < plan.rectangle.shape[2]


def test_limits_are_reached_and_not_passed(monkeypatch):
    """As many cells as may be are taken; a text of the greatest length is not cut."""
    monkeypatch.setattr("longattn.patterncache.patterns.block_sparse.MOST_CELLS", 64)
    pattern = BlockSparse(2, np.eye(8, dtype=bool))
    assert parse_pattern(pattern.canonical()) == pattern
    with pytest.raises(ValueError, match="at most 64 cells"):
        parse_pattern(BlockSparse(2, np.eye(9, dtype=bool)).canonical())
    assert shortened("x" * 8, 10) == repr("x" * 8) and shortened("x" * 9, 10) == "'xxxxxxxxx... (11 characters)"
