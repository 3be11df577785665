"""How the native library comes to be: at the first call and never before, once, and with a reason where it cannot."""

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longattn.kernels import attend, build_native, explain
from longattn.kernels.dispatch import table as dispatch
from longattn.kernels.native import building, cpu
from longattn.patterncache import Full

SHAPE = (1, 8, 2, 4)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test finds, and leaves, a process that has read no variable yet."""
    building.target.cache_clear()
    yield
    building.target.cache_clear()
    dispatch.explain_problem.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes each call and fails, and an empty cache folder."""
    script = tmp_path / "cxx"
    script.write_text(
        f"#!/bin/sh\necho called >> {tmp_path}/calls\necho 'first line' >&2\necho 'out of paper' >&2\nexit 1\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGATTN_NATIVE", raising=False)
    return script


def reason() -> str:
    (found,) = dict(explain(Full(), SHAPE, dtype=torch.float32).rows)["native"]
    return found


def serves_without() -> None:
    """The torch rows serve, and asking for the row by name says why it cannot."""
    q = torch.randn(SHAPE)
    assert attend(q, q, q, Full()).out.isfinite().all()
    assert explain(Full(), SHAPE, dtype=torch.float32).backend == "sdpa"
    with pytest.raises(ValueError, match="backend='native' cannot serve"):
        attend(q, q, q, Full(), backend="native")


def test_nothing_is_compiled_before_the_first_call(compiler: Path):
    """explain looks, and counts the row as able; the call that tries finds the compiler failing, once."""
    assert explain(Full(), SHAPE, dtype=torch.float32).backend == "native"
    assert not (compiler.parent / "calls").exists() and not (compiler.parent / "cache").exists()
    serves_without()
    serves_without()
    assert (compiler.parent / "calls").read_text() == "called\n"
    assert reason() == f"the compiler {compiler} failed: out of paper"
    with pytest.raises(building.NativeBuildError, match="out of paper"):
        build_native()


def test_importing_compiles_nothing(tmp_path: Path):
    """Nor does it make a folder."""
    code = "import longattn.kernels as k; k.attend, k.explain, k.backends(); import longattn.kernels.native.row"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "LONGATTN_CACHE": str(tmp_path / "cache")}
    )
    assert not (tmp_path / "cache").exists()


def test_no_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(compiler.parent / "nowhere"))
    assert reason().startswith("no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on PATH")
    serves_without()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("place", ["/proc/self/cache", "/dev/null/cache"])
def test_a_cache_folder_that_cannot_be_written(place: str, monkeypatch: pytest.MonkeyPatch):
    """Found by looking, or, where permissions do not tell, by trying."""
    monkeypatch.setenv("LONGATTN_CACHE", place)
    serves_without()
    assert place in reason() and ("cannot be written" in reason() or "cannot be made" in reason())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("place", ["/" + "x" * 300, "/folder" * 900])
def test_a_cache_folder_of_too_long_a_name(place: str, monkeypatch: pytest.MonkeyPatch):
    """Longer than the system takes, in one name or in all of them."""
    monkeypatch.setenv("LONGATTN_CACHE", place)
    serves_without()
    assert reason() == f"the cache folder {place} cannot be read: File name too long; LONGATTN_CACHE names another"


@pytest.mark.usefixtures("compiler")
def test_a_cache_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch):
    """As below another user's home; root may enter all."""

    def refuses(self: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("LONGATTN_CACHE", "/private/cache")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", refuses)
        serves_without()
    assert reason() == "the cache folder /private/cache cannot be read: Permission denied; LONGATTN_CACHE names another"


@pytest.mark.usefixtures("compiler")
def test_an_unknown_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    cpu.widest.cache_clear()
    try:
        assert reason() == "this machine's processor is not known"
        serves_without()
    finally:
        monkeypatch.undo()
        cpu.widest.cache_clear()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("0", "switched off by LONGATTN_NATIVE=0"),
        (
            "fast",
            "LONGATTN_NATIVE must be 0, 1 or one of amx, avx512bf16, avx512, avx2, bfdot, generic, amx-plain, got 'fast'",
        ),
        ("avx512", "LONGATTN_NATIVE=avx512 needs another processor than this one, which has generic"),
    ],
)
def test_switched_off_or_misspelt(choice: str, words: str, monkeypatch: pytest.MonkeyPatch):
    """The variable is read at every call."""
    monkeypatch.setattr(building, "levels", lambda: ("generic",))
    monkeypatch.setenv("LONGATTN_NATIVE", choice)
    assert reason() == words
    serves_without()
    monkeypatch.setenv("LONGATTN_NATIVE", "1")
    assert explain(Full(), SHAPE, dtype=torch.float32).backend == "native"


def test_the_widest_level_that_fits(monkeypatch: pytest.MonkeyPatch):
    """From the flags of the processor; each level includes the narrower ones."""
    every = {
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_bf16",
        "avx2",
        "fma",
        "f16c",
        "amx_tile",
        "amx_bf16",
    }
    monkeypatch.setattr(cpu, "tiles_refusal", lambda: None)
    for missing, level in (
        (set(), "amx"),
        ({"amx_bf16"}, "avx512bf16"),
        ({"amx_tile", "avx512_bf16"}, "avx512"),
        ({"avx512dq"}, "avx2"),
        ({"fma"}, "generic"),
    ):
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(cpu, "_flags", lambda kept=frozenset(every - missing): kept)
        cpu.widest.cache_clear()
        assert cpu.widest() == level and cpu.levels()[0] == level and cpu.levels()[-1] == "generic"
    for machine, level in (("aarch64", "generic"), ("arm64", "generic"), ("s390x", None)):
        monkeypatch.setattr("platform.machine", lambda name=machine: name)
        cpu.widest.cache_clear()
        assert cpu.widest() == level
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(cpu, "_flags", lambda: frozenset({"asimd", "bf16"}))
    cpu.widest.cache_clear()
    assert cpu.levels() == ("bfdot", "generic")
    monkeypatch.undo()
    cpu.widest.cache_clear()


@pytest.mark.parametrize(("capability", "level"), [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "generic")])
def test_the_widest_level_where_the_system_lists_no_flags(capability: str, level: str, monkeypatch: pytest.MonkeyPatch):
    """macOS and Windows: torch has asked the processor."""

    def no_file(*_: object, **__: object) -> str:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(cpu.Path, "read_text", no_file)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu.widest.cache_clear()
    try:
        assert cpu.widest() == level
    finally:
        monkeypatch.undo()
        cpu.widest.cache_clear()


@pytest.mark.skipif(building.target("generic").refusal is not None, reason="there is no compiler here")
@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders here: each process compiles")
def test_one_of_several_processes_compiles(tmp_path: Path):
    """The others wait for it and get the same library. What a killed process left in the folder is gone; a later one compiles nothing."""
    code = """
        import torch
        from longattn.kernels import attend, build_native
        from longattn.patterncache import Full
        print(build_native())
        q = torch.randn(1, 8, 2, 4)
        assert attend(q, q, q, Full(), backend="native").out.isfinite().all()
    """
    folder, compiler, calls = tmp_path / "cache", tmp_path / "cxx", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho called >> {calls}\nexec c++ "$@"\n')
    compiler.chmod(0o700)
    (folder / "building-left").mkdir(parents=True)
    folder.chmod(0o700)
    quick = {"LONGATTN_NATIVE": "generic", "LONGATTN_NATIVE_FLAGS": "-O0", "OMP_NUM_THREADS": "1", "CXX": str(compiler)}
    environment = {**os.environ, **quick, "LONGATTN_CACHE": str(folder)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip

    paths = {process.communicate()[0].strip() for process in [start() for _ in range(4)]} | {
        start().communicate()[0].strip()
    }
    assert paths == {str(path) for path in folder.iterdir()} and len(paths) == 1 and ".so" in paths.pop()
    assert calls.read_text() == "called\n"
