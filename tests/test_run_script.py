"""`./run` answers a wrong word with one line and a non-zero exit, in any POSIX shell, from any folder; what it installs, a uv that only notes its calls says."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.workspace import ROOT

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]

# Answers as uv does, as far as the script asks; every call is a line of CALLS.
UV = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
--version) echo "uv 0.9.0" ;;
*--dry-run*) printf '%s\\n' "$PLANNED" >&2 ;;
sync*) exit "${SYNC_EXIT:-0}" ;;
esac
"""
FROM_AN_INDEX = "Would download 19 packages\nWould install 48 packages\n + nvidia-cublas==13.1.1.3\n + torch==2.13.0"
FROM_A_FOLDER = "Would install 29 packages\n + torch==2.13.0+cpu"


def call(shell: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a shell, from a folder."""
    return subprocess.run(
        [shell, str(ROOT / "run"), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script alone, and a uv on the way to it."""
    root = tmp_path / "checkout"
    (tmp_path / "bin").mkdir()
    root.mkdir()
    shutil.copy(ROOT / "run", root / "run")
    shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")
    uv = tmp_path / "bin" / "uv"
    uv.write_text(UV)
    uv.chmod(0o755)
    return root


def call_with_uv(root: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run that checkout's script; returns its answer and what it asked of uv."""
    calls = root.parent / "calls"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    kept |= {"PATH": f"{root.parent / 'bin'}{os.pathsep}{kept['PATH']}", "CALLS": str(calls), "PLANNED": ""}
    answer = subprocess.run(
        ["sh", str(root / "run"), *arguments], env=kept | environment, capture_output=True, text=True, check=False
    )
    return answer, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("arguments", [("tset",), ("--hlep",), ("lint", "packages"), ("docs", "--fast")])
def test_wrong_word(shell: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """One line on stderr that says what to do."""
    answer = call(shell, tmp_path, *arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1
    assert "./run" in answer.stderr
    assert arguments[-1] in answer.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_help(shell: str, tmp_path: Path) -> None:
    """Help, and no word at all, name both main commands."""
    for arguments in ((), ("help",), ("--help",)):
        answer = call(shell, tmp_path, *arguments)
        assert answer.returncode == 0
        assert "demo" in answer.stdout
        assert "test" in answer.stdout


def test_the_demo_installs_what_it_needs(checkout: Path) -> None:
    """The packages and the group `demo`; every other command has the group `dev`, which is uv's default."""
    _, calls = call_with_uv(checkout, "demo", "--seq-len", "64")
    assert [f"sync --project {checkout} --inexact --no-default-groups --group demo"] == synced(calls)
    assert calls[-1].endswith("python -m demo --seq-len 64")
    (checkout.parent / "calls").unlink()
    _, calls = call_with_uv(checkout, "test", "tests")
    assert [f"sync --project {checkout} --inexact --all-packages"] == synced(calls)


def synced(calls: list[str]) -> list[str]:
    """The calls that install, without --quiet."""
    return [line.removesuffix(" --quiet") for line in calls if line.startswith("sync") and "--dry-run" not in line]


def test_nothing_is_uninstalled(checkout: Path) -> None:
    """Each sync leaves alone what is there besides."""
    for command in ("demo", "test", "bench", "nox", "lint", "types", "docs", "python"):
        _, calls = call_with_uv(checkout, command)
        assert all("--inexact" in line for line in calls if line.startswith("sync"))


def test_a_download_of_gigabytes_is_announced(checkout: Path) -> None:
    """Where torch would bring CUDA's libraries from an index: how much it is, and how to have less. Before anything is installed."""
    answer, calls = call_with_uv(checkout, "demo", PLANNED=FROM_AN_INDEX)
    assert "3 GB" in answer.stderr
    assert "UV_INDEX" in answer.stderr
    assert "--dry-run" in next(line for line in calls if line.startswith("sync"))


def test_no_warning_without_such_a_download(checkout: Path) -> None:
    """A wheel in a folder is silent, and so is an environment that has torch: then nothing is even asked."""
    answer, _ = call_with_uv(checkout, "demo", PLANNED=FROM_A_FOLDER)
    assert "GB" not in answer.stderr
    (checkout / ".venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    (checkout.parent / "calls").unlink()
    answer, calls = call_with_uv(checkout, "demo", PLANNED=FROM_AN_INDEX)
    assert answer.stderr == ""
    assert not any("--dry-run" in line for line in calls)


@pytest.mark.parametrize(
    ("version", "stays", "said"),
    [
        ("2.12.1", True, "2.12.1 in .venv stays"),
        ("2.13.0+cpu", False, ""),
        ("2.10.0", False, "2.10.0 in .venv is too old"),
    ],
)
def test_another_torch_stays(checkout: Path, version: str, stays: bool, said: str) -> None:
    """What its user put into .venv is not replaced, but where the packages could not run with it; either is said once."""
    installed = checkout / ".venv/lib/python3.11/site-packages"
    (installed / "torch").mkdir(parents=True)
    (installed / f"torch-{version}.dist-info").mkdir()
    answer, calls = call_with_uv(checkout, "demo")
    assert stays == ("--no-install-package torch" in synced(calls)[0])
    assert (said in answer.stderr) and len(answer.stderr.splitlines()) == bool(said)


def test_the_first_set_up_tells_what_it_installs(checkout: Path) -> None:
    """And what takes the place of another version; once the packages are there, uv is quiet."""
    _, calls = call_with_uv(checkout, "demo")
    assert not any("--quiet" in line for line in calls if line.startswith("sync"))
    (checkout / ".venv/lib/python3.11/site-packages/longattn_bufmgr-0.1.0.dist-info").mkdir(parents=True)
    _, calls = call_with_uv(checkout, "demo")
    assert calls[-2].endswith("--quiet")


@pytest.mark.skipif(os.name != "posix", reason="needs folders without write permission")
def test_a_read_only_checkout_is_named() -> None:
    """Not the network, not pip: the folder is the cause, and one line says so."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "run", folder)
        os.chmod(folder, 0o555)
        answer = subprocess.run(["sh", f"{folder}/run", "demo"], capture_output=True, text=True, check=False, **nobody)
        os.chmod(folder, 0o755)
    assert answer.returncode == 2
    assert f"cannot write to the checkout {folder}" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_what_uv_refuses_ends_the_command(checkout: Path) -> None:
    """A failed set-up runs nothing."""
    answer, calls = call_with_uv(checkout, "demo", SYNC_EXIT="1")
    assert answer.returncode == 2
    assert not any("python -m demo" in line for line in calls)


@pytest.mark.parametrize("path", ["tests/no_such_test.py", "no/such/folder"])
def test_a_test_path_that_is_not_there(path: str) -> None:
    """pytest-xdist alone would say that no tests ran; the first file's worker never starts."""
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 4
    assert f"no such file or folder, counted from {ROOT}: {path}" in answer.stderr


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    """Both have their run bit."""
    assert (ROOT / script).stat().st_mode & 0o111
