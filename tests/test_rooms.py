"""Imports stand at the top: those inside functions are counted, package by package, and each one is listed with its reason."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workspace import ROOT

# package -> {module below it: imports of our own modules inside functions, by statement or by name}
LISTED: dict[str, dict[str, int]] = {
    "attention": {
        "__init__": 1,  # public names are lazy
        "cli.main": 1,  # a subcommand's module is imported when it is run: --help needs no torch
        "cli.parser": 1,  # what a wrong argument was is cut by a function that comes with numpy: --help needs neither
        "integrations.factory": 2,  # a registered kind may be named by where it stands; RingBufferAttention is, so that it loads when asked for
        "integrations.huggingface": 1,  # the cache's layers are classes of transformers', an extra
        "integrations.xformers": 1,  # xFormers' own module, optional
        "schedules.call_extents": 1,  # the module for DTensors needs torch's, which is heavy
    },
    "patterncache": {
        "__init__": 1,  # public names are lazy
        "pattern": 1,  # lint, reach, describe and to_block_mask are methods of Pattern, and stand above it
        "patterns.block_sparse": 1,  # from_scores needs torch, an extra
    },
    "kernels": {
        "__init__": 1,  # public names are lazy
        "dispatch.table": 2,  # a row's module is imported when the table is first read for it, or for a part of it
        "eager.flash_packages": 1,  # a package of the user's, imported when its row is first chosen
        "entry": 1,  # the module for DTensors needs torch's, which is heavy
        "explaining": 1,  # verify computes: its ops import torch's FLOP counter, and that imports triton
        "triton.self_check": 1,  # what it checks imports triton, an extra, and is imported when a check first runs
        "triton.row": 1,  # what launches: triton is an extra, imported when the row first serves
    },
}


def late_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Imports of our modules inside functions, and `import_module` of one."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if (
                (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longattn"))
                or (isinstance(node, ast.Import) and any(alias.name.startswith("longattn") for alias in node.names))
                or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module" and is_ours(node))
            ):
                yield node


def is_ours(call: ast.Call) -> bool:
    """Whether an `import_module` names a module of ours, or one that is only known when it runs."""
    name = call.args[0]
    return not isinstance(name, ast.Constant) or str(name.value).startswith("longattn")


def counted(package: str) -> dict[str, int]:
    """Late imports by module."""
    found: Counter[str] = Counter()
    source = ROOT / "packages" / package / "src" / "longattn" / package
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        found[module] += len({(node.lineno, node.col_offset) for node in late_imports(parsed(path))})  # type: ignore[attr-defined]
    return {module: many for module, many in found.items() if many}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", sorted(LISTED))
def test_late_imports_are_listed(package: str) -> None:
    """No more than are listed, and no fewer: the list is the count."""
    assert LISTED[package] == counted(package)


def test_a_late_import_is_noticed() -> None:
    """Both forms, and none of other people's modules."""
    text = "def f():\n    import longattn.x\n    from longattn.y import z\n    import_module('longattn.z')\n    import_module('torch')\n"
    assert 3 == len(list(late_imports(ast.parse(text))))
