"""The machine of mutation testing, on a target in miniature: what is killed, what survives, what hangs, and what the table says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.workspace import ROOT
from tools.mutants import cpp_source, python_source
from tools.mutants.__main__ import LISTED, read_listed
from tools.mutants.mutant import sample
from tools.mutants.selection import Order, place_of
from tools.mutants.targets import TARGETS

TOY = '''"""A toy."""
from typing import Literal

Kind = Literal[1, 2]
__all__ = ["least"]


def least(values: list[int] | None, below: int = 3) -> int:
    """The least value, or `below` + 1."""
    total = 0
    for value in values or []:
        if value < below:
            total += 1
    if total < 0:
        raise ValueError(f"never {total + 1}")
    return below + 1 if not total else min(values or [])
'''
TESTS = """
from longattn.toy.least import least


def test_least():
    assert least([]) == 4 and least([2, 1, 5]) == 1 and least([3]) == 4 and least([1]) == 1
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout with one package."""
    source = tmp_path / "packages" / "toy" / "src" / "longattn" / "toy"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("")
    (source / "least.py").write_text(TOY)
    tests = tmp_path / "packages" / "toy" / "tests"
    tests.mkdir()
    (tests / "test_toy.py").write_text(TESTS)
    return tmp_path


def run(toy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on the toy, in a process that has imported nothing of it."""
    code = (
        "import sys; from pathlib import Path; from tools.mutants.__main__ import main; from tools.mutants.targets import Target\n"
        "target = Target('toy', ('*.py',), ('toy/test_toy',))\n"
        f"root = Path({str(toy)!r})\n"
        "sys.exit(main(sys.argv[1:], {'toy': target}, root, root / 'listed.csv', ('pytest',)))"
    )
    command = [sys.executable, "-c", code, *arguments]
    plain = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_a_toy_target(toy: Path) -> None:
    """Faults that its test sees are killed; the one that cannot matter survives, and passes once it is listed."""
    (toy / "listed.csv").write_text("target,file,where,before,after,number,reason\n")
    first = run(toy, "toy", "--count", "12")
    survivors = [line.removeprefix("    not listed: ") for line in first.stdout.splitlines() if "not listed: " in line]
    assert first.returncode == 1 and survivors, first.stdout + first.stderr
    assert any("if total <= 0" in line or "total < 1" in line for line in first.stdout.splitlines() if "killed" in line)
    assert "killed by test_toy.py::test_least: packages/toy/src/longattn/toy/least.py least:" in first.stdout
    assert all("if total < 0" in line or "total" in line for line in survivors), first.stdout
    (toy / "listed.csv").write_text(
        "target,file,where,before,after,number,reason\n" + "".join(f"{line}nothing is below 0\n" for line in survivors)
    )
    again = run(toy, "toy", "--count", "12")
    assert "0 survivors not listed" in again.stdout, again.stdout
    assert "    nothing is below 0" in again.stdout
    assert (toy / "packages/toy/src/longattn/toy/least.py").read_text() == TOY
    (toy / "packages/toy/tests/test_toy.py").write_text("def test_nothing():\n    assert False\n")
    assert "the tests fail without a fault" in run(toy, "toy").stdout


def test_tests_that_call_the_function_come_first(tmp_path: Path) -> None:
    """The quick ones before the slow ones; then all others, which may read what it put into a cache."""
    recorded = tmp_path / "recorded.json"
    calls = {
        "a": [1.0, []],
        "b": [3.0, ["longattn/toy/least.py least"]],
        "c": [2.0, ["longattn/toy/least.py least", "longattn/toy/x.py y"]],
    }
    recorded.write_text(json.dumps(calls), encoding="utf-8")
    mutant = python_source.mutants_of(TOY, "packages/toy/src/longattn/toy/least.py")[0]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in ("new", "a", "b", "c")]
    Order(recorded, mutant).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["c", "b", "new", "a"]


@pytest.mark.parametrize(
    ("qualname", "expected"),
    [("least", "least"), ("Cls.method", "Cls.method"), ("f.<locals>.g.<locals>.<lambda>", "f.g"), ("<module>", "")],
)
def test_the_place_of_a_code_object_is_that_of_its_mutants(qualname: str, expected: str) -> None:
    """Functions within functions are named after both; lambdas and comprehensions are part of what holds them."""
    assert place_of(qualname) == expected


def test_what_is_mutated_in_python() -> None:
    """Operators, numbers, conditions, calls of min; no types, docstrings, errors or lists of names. Each mutant is Python."""
    mutants = python_source.mutants_of(TOY, "toy.py")
    for mutant in mutants:
        compile(mutant.text, "toy.py", "exec")
        assert mutant.text != TOY and mutant.where == "least"
    changes = {(mutant.before, mutant.after) for mutant in mutants}
    assert ("if value < below:", "if (value <= below):") in changes
    assert ("total += 1", "total -= 1") in changes and ("total += 1", "total += 2") in changes
    assert any("max(values or [])" in after for _, after in changes)
    assert not any("raise" in before or "Literal" in before for before, _ in changes)


def test_what_is_mutated_in_cpp() -> None:
    """Operators with spaces around them, numbers, min and max; no templates, comments, strings or lines of the preprocessor."""
    text = """#define TEN 10
template <int N>
static int first(const int* p, int n) {  // n < 7
    for (int i = 0; i < n; i++) p += least(i, 3);
    return use<2>(p) && n;
}
"""
    changes = [(mutant.where, mutant.before, mutant.after) for mutant in cpp_source.mutants_of(text, "toy.h")]
    loop = "for (int i = 0; i < n; i++) p += least(i, 3);"
    for after in (
        loop.replace("= 0", "= 1"), loop.replace("i < n", "i <= n"), loop.replace("i++", "i--"), loop.replace("+=", "-="),
        loop.replace("least", "most"), loop.replace("3", "4"),
    ):  # fmt: skip
        assert ("first", loop, after) in changes
    assert ("first", "return use<2>(p) && n;", "return use<2>(p) || n;") in changes
    assert not any("template" in before or "define" in before or "n < 8" in after for _, before, after in changes)


def test_a_sample_stays_where_other_lines_change() -> None:
    """It is chosen by what a fault is, not by where its line stands; another seed chooses others."""
    moved = "import os\n\n" + TOY
    before, after = (python_source.mutants_of(text, "toy.py") for text in (TOY, moved))
    names = [mutant.name for mutant in sample(before, 5, 1)]
    assert names == [mutant.name for mutant in sample(after, 5, 1)] != [mutant.name for mutant in sample(before, 5, 2)]


def test_every_survivor_has_a_reason_and_a_file() -> None:
    """And its target is one of those that there are."""
    for (target, file, *_), reason in read_listed(LISTED).items():
        assert target in TARGETS and reason.strip() and (ROOT / file).is_file()


@pytest.mark.parametrize("name", TARGETS)
def test_targets_name_files_that_there_are(name: str) -> None:
    """Each pattern of files and each test file."""
    target = TARGETS[name]
    inner = ROOT / "packages" / target.package / "src" / "longattn" / target.package
    assert all(list(inner.glob(pattern)) for pattern in target.files)
    for test in target.tests:
        package, file = test.split("::")[0].split("/")
        assert (ROOT / "packages" / package / "tests" / f"{file}.py").is_file()
