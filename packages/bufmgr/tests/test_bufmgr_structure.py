"""The modules form layers: no circular import, deferred imports and imports for type checkers counted."""

import ast
from pathlib import Path

import pytest

import longattn.bufmgr

PACKAGE = "longattn.bufmgr"
ROOT = Path(longattn.bufmgr.__file__ or "").parent

# From the bottom; a module imports from lower layers and from its own. A folder's name stands for its modules.
LAYERS = (
    ("log", "checks"),
    ("spec",),
    ("request", "strategy"),
    ("memory",),
    ("numa",),
    ("leasing",),
    ("timeline",),
    ("report", "planning"),
    ("pool",),
    ("serving", "metrics"),
    ("manager",),
    ("tiers", "learning"),
    ("testing",),
)

# Where a module may import inside a function or by a string, and why.
DEFERRED = {
    "__init__": "the public names are lazy, so that importing the package loads no torch",
    "timeline": "matplotlib, the extra png, is imported when a picture is asked for",
}


def modules() -> dict[str, ast.Module]:
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


MODULES = modules()


def imports(tree: ast.AST) -> set[str]:
    """Return the modules of this package that a module imports anywhere, relative to the package."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix(f"{PACKAGE}.") in MODULES else str(node.module) for name in inner}
    return {name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(PACKAGE)}


def layer(module: str) -> int:
    (index,) = (index for index, names in enumerate(LAYERS) if module.split(".")[0] in names)
    return index


INNER = [name for name in MODULES if name != "__init__" and MODULES[name].body[1:]]


def test_every_module_has_a_layer():
    listed = {name for names in LAYERS for name in names}
    assert listed == {name.split(".")[0] for name in MODULES if name != "__init__"}


@pytest.mark.parametrize("module", INNER)
def test_imports_point_down(module: str):
    """Nothing of a higher layer is imported, and nothing through the package's lazy names."""
    wrong = {name for name in imports(MODULES[module]) if name == PACKAGE or layer(name) > layer(module)}
    assert wrong == set()


def test_no_circle():
    """Modules can be put in an order in which each imports earlier ones only."""
    left = {module: imports(MODULES[module]) & set(INNER) for module in INNER}
    while ready := {module for module, needed in left.items() if not needed & set(left)}:
        left = {module: needed for module, needed in left.items() if module not in ready}
    assert left == {}


def test_no_deferred_imports():
    """No function imports a module of this package, and no module is imported by its name as a string."""
    deferred = set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.If):
                inside = {inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)}
                if inside:
                    deferred.add(name)
            if isinstance(node, ast.Name | ast.Attribute) and "import_module" in ast.unparse(node):
                deferred.add(name)
    assert deferred == set(DEFERRED)
