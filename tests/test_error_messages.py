"""One form of errors in all four packages: "NAME must be WHAT, got VALUE".

Whoever reads a ValueError or a TypeError learns which parameter is meant, what it may be, and what came instead. The test reads the
text of every `raise ValueError(...)` and `raise TypeError(...)` in the packages, with "{}" in place of what an f-string fills in.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workspace import modules

# "q", "{}", "{}.out", "parts[{}][0]", 'heads="split"', "ranks {}", "q, k and v", "q_start (or q_spans)"
_NAME = r"(?:a plan's |--)?[\w{}][\w.\[\]{}=\"'!-]*(?: \(or \w+\))?"
FORM = re.compile(rf"{_NAME}(?:, {_NAME})*(?: and {_NAME})? must (?:not )?\S.*[,;] got \S.*", re.DOTALL)

# (module, text): why this error has another form.
OTHER_FORMS: dict[tuple[str, str | None], str] = {
    ("attention.validate", "{} got an unexpected keyword argument {}{}"): "Python's own words for it, with a hint",
    (
        "attention.wiring",
        "{} does not take {}: of the flags it takes {}",
    ): "the same, for flags that other presets take",
    (
        "kernels.dispatch.choosing",
        "{} {} this problem: {}",
    ): "no parameter is wrong: every row says why it does not serve the call",
    (
        "kernels.preparing",
        "q, k, v must be plain tensors outside of tracing, transforms, modes and autocast, and options of their documented types; call attend there",
    ): "what came may be a mode of torch, which is no value",
}


def texts(tree: ast.AST) -> Iterator[tuple[int, str | None]]:
    """The line and text of every ValueError and TypeError that is raised with a new message; None where it is no literal."""
    for node in ast.walk(tree):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(raised, ast.Call) and ast.unparse(raised.func) in {"ValueError", "TypeError"}:
            yield raised.lineno, text_of(raised.args[0]) if raised.args else None


def text_of(node: ast.expr) -> str | None:
    """The text of a string or an f-string, with "{}" for each value that it fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def module_name(path: Path) -> str:
    """`attention.schedules.ring` for a file."""
    parts = path.with_suffix("").parts
    return ".".join(parts[parts.index("longattn") + 1 :])


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_errors_name_the_parameter_what_is_expected_and_what_came(path: Path) -> None:
    """Every error has the form, or is listed with a reason."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = {text for name, text in OTHER_FORMS if name == module_name(path)}
    assert [] == [
        (line, text) for line, text in texts(tree) if text not in listed and not (text and FORM.fullmatch(text))
    ]


def test_every_listed_error_is_raised() -> None:
    """What is mended leaves the list."""
    raised = {
        (module_name(path), text)
        for path in modules()
        for _, text in texts(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert set() == OTHER_FORMS.keys() - raised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{} must be an integer >= {}, got {}", True),
        ("parts[{}][0] must not overlap, got {}", True),
        ("q, k and v must be plain tensors, got {}", True),
        ("{}.out must be float32; got {}", True),
        ("size: expected an integer, got {}", False),
        ("size must be an integer", False),
        ("expected an integer, got {}", False),
        ("the size that you gave must be an integer, got {}", False),
    ],
)
def test_the_form_itself(text: str, expected: bool) -> None:
    """Three things are asked of a message."""
    assert expected == bool(FORM.fullmatch(text))


def test_both_kinds_of_strings_are_read() -> None:
    """And a message that is put together elsewhere is None, which has no form."""
    code = "def f():\n    raise ValueError('a')\n    raise TypeError(f'{b!r} c')\n    raise ValueError(d + e)\n    raise ValueError\n    raise KeyError('f')"
    assert [(2, "a"), (3, "{} c"), (4, None)] == list(texts(ast.parse(code)))
