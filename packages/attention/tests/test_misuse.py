"""Every row of docs/attention/misuse.md does what it says; the page of flags is the generated one, and says what is so."""

import ast
import pickle
import re
from pathlib import Path

import pytest
import torch

import longattn.attention
from longattn.attention import ImprovedDilatedAttentionV2, RingDilatedAttentionV2
from longattn.attention.support import BUFFERS, page
from longattn.attention.testing import small_inputs, small_preset
from longattn.bufmgr import BufferType, reset_global_memory_pool
from longattn.patterncache import Dilated, Full, Window, reset_global_pattern_cache

PAGES = Path(__file__).parents[3] / "docs" / "attention"
ROW = re.compile(r"^\| (construction|call|compile|pickle|teardown) \| `(.+)` \| (\w+): (.+) \|$", re.M)
NAMES = {name: getattr(longattn.attention, name) for name in longattn.attention.__all__} | {
    "torch": torch,
    "pickle": pickle,
    "Full": Full,
    "Window": Window,
    "Dilated": Dilated,
    "reset_global_memory_pool": reset_global_memory_pool,
    "reset_global_pattern_cache": reset_global_pattern_cache,
}

pytestmark = pytest.mark.skipif(not PAGES.exists(), reason="the pages are in the checkout, not in the wheel")


def rows():
    """(code, outcome, words) of each row."""
    return [match.groups()[1:] for match in ROW.finditer((PAGES / "misuse.md").read_text(encoding="utf-8"))]


def run(code):
    """The value of the last statement, where it is an expression."""
    torch._dynamo.reset()
    scope = NAMES | {name: torch.randn(2, 12, 4, 8) for name in "qkv"} | {"x": torch.randn(2, 12, 32)}
    scope["attention"] = longattn.attention.DilatedAttention((4, 8), (1, 2))
    scope["layer"] = longattn.attention.MultiheadDilatedAttention(32, 4, (4, 8), (1, 2))
    tree = ast.parse(code)
    last = tree.body.pop()
    exec(compile(tree, "row", "exec"), scope)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "row", "eval"), scope)
    return exec(compile(ast.Module([last], []), "row", "exec"), scope)


def raised(code):
    """(names of the raised class and those below it, its message)."""
    with pytest.raises(
        (ValueError, TypeError, RuntimeError, NotImplementedError, torch._dynamo.exc.Unsupported)
    ) as caught:
        run(code)
    # torch.compile wraps what tracing raised.
    return {kind.__name__ for kind in type(caught.value).__mro__}, str(caught.value)


@pytest.mark.parametrize(("code", "outcome", "words"), rows() if PAGES.exists() else [])
def test_a_row_does_what_it_says(code, outcome, words):
    """The error of that class with those words, or a true end."""
    if outcome == "true":
        assert bool(run(code)) is True
        return
    kinds, message = raised(code)
    assert outcome in kinds and words in message, message


def test_every_line_of_the_table_is_a_row():
    """None is lost to its spelling; every kind of moment is there."""
    lines = [line for line in (PAGES / "misuse.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows()) == len(lines) - 2
    assert {line.split("|")[1].strip() for line in lines[2:]} == {
        "construction",
        "call",
        "compile",
        "pickle",
        "teardown",
    }


def test_the_page_of_flags_is_the_generated_one():
    """`python -m longattn.attention.support` made it."""
    assert page() == (PAGES / "support.md").read_text(encoding="utf-8")


def test_buffers_come_from_where_the_table_says():
    """By the profiles of a pool and of a manager, in half precision, with padding and gradients."""
    assert set(BUFFERS) == set(BufferType)
    padding = torch.rand(1, 21) > 0.7
    for flag, at in (("enable_memory_pool", 2), ("enable_buffer_manager", 3)):
        module = small_preset("ImprovedDilatedAttentionV2", enable_profiling=True, **{flag: True})
        x = [t.bfloat16().requires_grad_() for t in small_inputs("ImprovedDilatedAttentionV2")]
        module(*x, key_padding_mask=padding).float().sum().backward()
        stats = module._memory_pool.get_stats() if at == 2 else module.get_buffer_stats()
        served = {kind for kind, row in stats["profile"].items() if row["count"]}
        source = "pool" if at == 2 else "manager"
        promised = {kind.value for kind, entries in BUFFERS.items() if entries[at] == source}
        assert served == promised - {"comm"}
    assert not hasattr(RingDilatedAttentionV2(), "buffer_manager") and not hasattr(
        ImprovedDilatedAttentionV2(), "buffer_manager"
    )
