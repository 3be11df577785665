"""`longattn` is a namespace that four distributions share and none owns."""

import importlib
from pathlib import Path

import pytest

from tests.workspace import PACKAGES, ROOT, source


def test_nobody_owns_the_namespace() -> None:
    """No `longattn/__init__.py` stands anywhere: it would hide the siblings."""
    assert [] == sorted(str(path) for path in (ROOT / "packages").glob("*/src/longattn/__init__.py*"))


def test_namespace_lists_all_four() -> None:
    """`longattn.__path__` leads to every package of the checkout."""
    namespace = importlib.import_module("longattn")
    assert namespace.__file__ is None
    there = {child.name for folder in namespace.__path__ for child in Path(folder).iterdir() if child.is_dir()}
    assert set(PACKAGES) <= there


@pytest.mark.parametrize("package", PACKAGES)
def test_package_comes_from_this_checkout(package: str) -> None:
    """The tests test this checkout, not another installed copy."""
    module = importlib.import_module(f"longattn.{package}")
    assert source(package) / "__init__.py" == Path(module.__file__ or "").resolve()


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    """Type checkers read the package's own hints."""
    assert (source(package) / "py.typed").is_file()
