"""Mutants of C++ source: operators, small constants and min / max replaced in turn, line by line.

A line is cut into tokens without a parser. An operator counts where a space stands on both sides, as the sources are formatted: so the
brackets of templates, pointers and references are left alone, and so are comments, strings and the preprocessor's lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.mutants.mutant import Mutant, numbered

OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "&&": "||", "||": "&&", "&": "|", "|": "&", "^": "&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "*=": "+=",
}  # fmt: skip
WORDS = {"min": "max", "max": "min", "most": "least", "least": "most", "++": "--", "--": "++"}
TOKEN = re.compile(
    r"(?<= )(?:&&|\|\||<<|>>|[-+*<>=!]=|[-+*/%<>&|^])(?= )"
    r"|\b(?:min|max|most|least)(?=\()|(?<![\w.'])\d+(?![\w.'])|\+\+|--"
)
OPENS = re.compile(r"(?:struct|class) (\w+)|[\w:<>,&*\s]*?\b(\w+)\(")
"""A line at the margin that begins a type or a function."""


def mutants_of(text: str, file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the source."""
    return numbered(_faults(text), file)


def _faults(text: str) -> Iterator[tuple[str, str, str, str]]:
    lines = text.splitlines(keepends=True)
    where, inside_comment = "", False
    for index, line in enumerate(lines):
        code = line.split("//", maxsplit=1)[0]
        if opened := OPENS.match(code) if code[:1].strip() else None:
            where = opened.group(1) or opened.group(2)
        if inside_comment or "/*" in code:
            inside_comment = "*/" not in code
            continue
        # What a template is given is no arithmetic that a test could notice without not compiling.
        if code.lstrip().startswith(("#", "template", "static_assert", "using ", "namespace", "extern")) or '"' in code:
            continue
        for found in TOKEN.finditer(code):
            token = found.group()
            after = OPERATORS.get(token) or WORDS.get(token) or str(int(token) + 1)
            changed = line[: found.start()] + after + line[found.end() :]
            mutated = "".join([*lines[:index], changed, *lines[index + 1 :]])
            yield where, line.strip(), changed.strip(), mutated
