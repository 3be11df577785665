"""Runs a target's tests on a copy of its package, one forked process per mutant.

The parent has imported what is slow to import and is not mutated; a child imports the package anew, from the copy, which stands first on
its path. A child that hangs is ended with all that it started.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, NoReturn

from tools.mutants.mutant import Mutant
from tools.mutants.targets import Target

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 6 << 30
"""Of memory that a child may ask for: a mutated length must not take the machine's."""

SURVIVED, KILLED, HANGS, INVALID = "survived", "killed", "killed: it hangs", "does not compile"
_INVALID_STATUS = 77


class Tree:
    """A copy of one package's source, in which one file at a time has a fault."""

    def __init__(self, target: Target, folder: Path, root: Path = ROOT) -> None:
        self.target, self.root, self.folder = target, root, folder
        self.mutant: Mutant | None = None
        self.child, self.until = 0, 0.0
        self.source = folder / "src"
        shutil.copytree(
            root / "packages" / target.package / "src", self.source, ignore=shutil.ignore_patterns("__pycache__")
        )

    def files(self) -> list[str]:
        """Paths of the target's files, relative to the checkout."""
        inner = Path("packages", self.target.package, "src", "longattn", self.target.package)
        found = [path for pattern in self.target.files for path in sorted((self.root / inner).glob(pattern))]
        return [str(path.relative_to(self.root)) for path in found if path.name != "__init__.py"]

    def write(self, file: str, text: str) -> None:
        """Put a text in the place of the copy of a file.

        What was compiled from the old one is removed: Python takes it for the new one's where both have the same size and second.
        """
        path = self.source / Path(file).relative_to(Path("packages", self.target.package, "src"))
        path.unlink()
        Path(cache_from_source(path)).unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")

    def begin(self, limit: float, mutant: Mutant | None = None) -> None:
        """Start the tests, with a fault where one is given; they may take `limit` seconds."""
        self.mutant = mutant
        if mutant is not None:
            self.write(mutant.file, mutant.text)
        self.until = time.monotonic() + limit
        self.child = os.fork()
        if self.child == 0:
            self._be_child()

    def poll(self) -> str | None:
        """What became of the tests that were begun, or None while they run. Nothing that they started is left afterwards."""
        ended, status = os.waitpid(self.child, os.WNOHANG)
        if not ended and time.monotonic() < self.until:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child, signal.SIGKILL)
        if not ended:
            os.waitpid(self.child, 0)
        if self.mutant is not None:
            self.write(self.mutant.file, (self.root / self.mutant.file).read_text(encoding="utf-8"))
        if not ended or "Timeout (0:" in self.printed:
            return HANGS
        code = os.waitstatus_to_exitcode(status)
        return {0: SURVIVED, _INVALID_STATUS: INVALID}.get(code, KILLED)

    def run(self, limit: float, mutant: Mutant | None = None) -> str:
        """Begin, and wait for what becomes of the tests."""
        self.begin(limit, mutant)
        while (verdict := self.poll()) is None:
            time.sleep(0.02)
        return verdict

    @property
    def printed(self) -> str:
        """What the last tests printed."""
        return (self.folder / "printed.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def failed(self) -> str:
        """The test that failed, or the file that could not be imported."""
        lines = [line.split(" ", 2)[1] for line in self.printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return lines[-1].rsplit("/", 1)[-1] if lines else ""

    def _be_child(self) -> NoReturn:
        """Run pytest and end the process with its status."""
        status = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            out = os.open(self.folder / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            sys.path.insert(0, str(self.source))
            # Without a fault, modules are compiled to be found by later children.
            sys.dont_write_bytecode = self.mutant is not None
            os.environ.update(
                PYTHONPATH=str(self.source),
                HYPOTHESIS_PROFILE="ci",
                LONGATTN_CACHE=str(self.folder / "libraries"),
                **self.target.environment,
            )
            status = self._tested()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)

    def _tested(self) -> int:
        if self.target.native:
            # Imported here: the parent has nothing of the package.
            building: Any = __import__("longattn.kernels.native.building", fromlist=["building"])
            shutil.rmtree(self.folder / "libraries", ignore_errors=True)
            try:
                for part in building.PARTS:
                    building.build_native(part)
            except building.NativeBuildError as problem:
                print(problem)
                return _INVALID_STATUS
        import pytest

        from tools.mutants.selection import Order, Recorder

        files = [self._selected(test) for test in self.target.tests]
        # The parent's import of hypothesis is no news.
        options = [
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *self.target.options,
        ]
        recorded = self.folder / "recorded.json"
        first = Order(recorded, self.mutant) if recorded.exists() else Recorder(self.source, recorded)
        return int(pytest.main([*options, *files], plugins=[first]))

    def _selected(self, test: str) -> str:
        package, _, rest = test.partition("/")
        name, colons, inner = rest.partition("::")
        return f"packages/{package}/tests/{name}.py{colons}{inner}"


def preload(names: Sequence[str]) -> None:
    """Import what children then find in memory."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            __import__(name)
