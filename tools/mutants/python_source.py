"""Mutants of Python source: each operator, small constant, condition and statement replaced in turn.

Left alone is what no test should hold on to: annotations, docstrings and other strings, what an error says, `__repr__`, lists of
names, and what only a type checker reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tools.mutants.mutant import Mutant, numbered, shortened

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


def mutants_of(text: str, file: str) -> list[Mutant]:
    """Every mutant of a file, in the order of the source."""
    tree = ast.parse(text)
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line.encode()))
    return numbered(_faults(tree, text.encode(), offsets), file)


def _faults(tree: ast.Module, source: bytes, offsets: list[int]) -> Iterator[tuple[str, str, str, str]]:
    """(where, the line, the line with the fault, the whole text with it)."""
    for where, node in _walk(tree, ""):
        for after in _replacements(node):
            begin = offsets[node.lineno - 1] + node.col_offset
            assert node.end_lineno is not None and node.end_col_offset is not None
            end = offsets[node.end_lineno - 1] + node.end_col_offset
            mutated = (source[:begin] + after.encode() + source[end:]).decode()
            line, changed = (text.splitlines()[node.lineno - 1] for text in (source.decode(), mutated))
            yield where, shortened(line), shortened(changed), mutated


def _walk(node: ast.AST, where: str) -> Iterator[tuple[str, ast.expr | ast.stmt]]:
    """Every expression and statement that may be mutated, with the function or class around it."""
    for child in _parts(node):
        inner = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{where}.{child.name}".lstrip(".")
        elif isinstance(child, ast.expr | ast.stmt):
            yield where, child
        yield from _walk(child, inner)


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node that can be mutated."""
    left_out: list[ast.AST | None] = []
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Constant():
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.AnnAssign() | ast.arg():
            left_out = [node.annotation]
        case ast.FunctionDef(name="__repr__" | "__str__"):
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            if any(isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list):
                return
            left_out = [node.returns, *node.decorator_list]
        case ast.ClassDef():
            left_out = [*node.bases, *node.decorator_list]
        case ast.Assign(targets=[ast.Name(id="__all__" | "__slots__")]):
            return
        case ast.Assign(targets=[ast.Name(id=name)]) if name[0].isupper() and not name.isupper():
            return  # an alias of a type
        case ast.Call(func=ast.Name(id="cast" | "isinstance" | "issubclass" | "TypeVar")):
            return
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger" | "LOGGER" | "warnings"))):
            return
        case _:
            pass
    for child in ast.iter_child_nodes(node):
        if child not in left_out:
            yield child


def _replacements(node: ast.expr | ast.stmt) -> Iterator[str]:
    """Texts that may stand in the place of a node."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield _parenthesised(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=[*ops]):
            for index, op in enumerate(ops):
                if type(op) in OPERATORS:
                    changed = [*ops[:index], OPERATORS[type(op)](), *ops[index + 1 :]]
                    yield _parenthesised(node, ops=changed)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield _parenthesised(node, func=ast.Name(NAMES[name]))
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in NAMES:
            yield _parenthesised(node, func=ast.Attribute(value, NAMES[name]))
        case ast.IfExp(test=test):
            yield _parenthesised(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield ast.unparse(_copied(node, op=OPERATORS[type(op)]()))
        case ast.Expr(value=ast.Call() as call) if not _says_only(call):
            yield "pass"
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"
        case _:
            pass


def _says_only(call: ast.Call) -> bool:
    """Whether a call writes to the log or warns."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(value, ast.Name) and value.id in ("logger", "LOGGER", "warnings")


def _copied(node: ast.AST, **changed: object) -> ast.AST:
    """A node of the same kind with some fields changed."""
    return type(node)(**{**dict(ast.iter_fields(node)), **changed})


def _parenthesised(node: ast.AST, **changed: object) -> str:
    return f"({ast.unparse(_copied(node, **changed))})"
