"""`./run` answers a wrong word with one line and a non-zero exit, in any POSIX shell, from any folder."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workspace import ROOT

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]


def call(shell: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a shell, from a folder."""
    return subprocess.run(
        [shell, str(ROOT / "run"), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("arguments", [("tset",), ("--hlep",)])
def test_wrong_word(shell: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """One line on stderr that says what to do."""
    answer = call(shell, tmp_path, *arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1
    assert "./run" in answer.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_help(shell: str, tmp_path: Path) -> None:
    """Help, and no word at all, name both main commands."""
    for arguments in ((), ("help",), ("--help",)):
        answer = call(shell, tmp_path, *arguments)
        assert answer.returncode == 0
        assert "demo" in answer.stdout
        assert "test" in answer.stdout


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    """Both have their run bit."""
    assert (ROOT / script).stat().st_mode & 0o111
