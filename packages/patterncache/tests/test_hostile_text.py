"""Texts and bytes from outside: refused with a ValueError that names the limit, at once, and in few words."""

import json
import time
import zlib
from base64 import b64encode

import numpy as np
import pytest

from longattn.patterncache import (
    Affine,
    BlockSparse,
    Branch,
    Dilated,
    Listed,
    Plan,
    Rectangle,
    Span,
    parse_pattern,
    plan_from_bytes,
    plan_to_bytes,
)


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
        (json.dumps(["hierarchical_blocks", {"block_size": 1, "levels": 2**62, "fanout": 2}]), "levels must keep"),
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
def test_a_hostile_text_is_refused(text, words):
    """Quickly, by name, without repeating it."""
    begin = time.process_time()
    with pytest.raises(ValueError, match=words) as refusal:
        parse_pattern(text)
    assert len(str(refusal.value)) < 1000 and time.process_time() - begin < 2


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
