"""What compilers, files and cache folders can do to the native library: each ends with a library that is ours, or with a reason."""

import io
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from longattn.kernels import __main__, attend, build_native, cachefolder, explain, installation
from longattn.kernels.dispatch import table as dispatch
from longattn.kernels.native import building, compiling
from longattn.kernels.pages import PagedCache
from longattn.kernels.paging import paged_attention
from longattn.patterncache import Full

SHAPE = (1, 8, 2, 4)

Script = Callable[[str], Path]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test finds, and leaves, a process that has read no variable yet."""
    building.target.cache_clear()
    yield
    building.target.cache_clear()
    dispatch.explain_problem.cache_clear()


@pytest.fixture(scope="module")
def ours() -> Path:
    """A library that works here."""
    building.target.cache_clear()
    if building.refusal() is not None:
        pytest.skip(str(building.refusal()))
    return build_native()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet."""
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGATTN_NATIVE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def script(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes a shell script the compiler; `$made` is what it is to write."""

    def make(lines: str) -> Path:
        path = tmp_path / "cxx"
        path.write_text(f'#!/bin/sh\nfor made in "$@"; do :; done\n{lines}\n')
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


def reason() -> str:
    """Why the row cannot serve, after a call was served by another."""
    q = torch.randn(SHAPE)
    assert attend(q, q, q, Full()).out.isfinite().all()
    (found,) = dict(explain(Full(), SHAPE, dtype=torch.float32).rows)["native"]
    return found


def works() -> None:
    """The row serves."""
    q = torch.randn(SHAPE)
    assert attend(q, q, q, Full(), backend="native").out.isfinite().all()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("exit 0", "ended well and wrote no library"),
        (': > "$made"', "cannot be loaded"),
        ('echo text > "$made"', "cannot be loaded"),
        ("printf 'voil\\340 \\377\\376\\n' >&2; exit 3", "failed: voil"),
        ("kill -9 $$", "failed: it said nothing"),
    ],
)
def test_a_compiler_that_makes_no_library(lines: str, words: str, script: Script, folder: Path):
    script(lines)
    assert words in reason()
    assert not [path for path in folder.iterdir() if path.suffix == ".so"], "nothing to be found by the next process"


def test_a_library_without_our_functions(script: Script, folder: Path, ours: Path):
    """Another shared object, which loads: one of torch's, or of Python's."""
    (other,) = [p for p in (Path(p) for p in sys.path) if p.name == "lib-dynload"][:1]
    library = next(iter(sorted(other.glob("_bisect*.so"))), None)
    if library is None:
        pytest.skip("this Python has no shared object of its own")
    script(f'cp {library} "$made"')
    assert "is not ours: it has no longattn_sizes" in reason()
    building.target.cache_clear()
    script(f'cp {ours} "$made"')
    works()


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_damaged_library_is_moved_aside_and_made_again(
    damage: bytes | None, script: Script, folder: Path, ours: Path, caplog: pytest.LogCaptureFixture
):
    """Empty, cut off, or a byte changed: never loaded."""
    script(f'echo called >> {folder.parent}/calls; cp {ours} "$made"')
    path = build_native()
    assert path.parent == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    whole = path.read_bytes()
    path.unlink()  # a file of the name, not the one that is loaded
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    building.target.cache_clear()
    with caplog.at_level(logging.WARNING, logger="longattn.kernels"):
        works()
    assert path.read_bytes() == whole and "is not what was compiled" in caplog.text
    assert (folder.parent / "calls").read_text() == "called\n" * 2
    assert sorted(p.name for p in folder.iterdir()) == sorted([path.name, path.name + ".damaged"])


def test_a_damaged_library_and_no_compiler(script: Script, folder: Path, ours: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = script(f'cp {ours} "$made"')
    path = build_native()
    path.unlink()
    path.write_bytes(b"")
    building.target.cache_clear()
    compiler.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    os.utime(compiler, ns=(compiler.stat().st_atime_ns, compiler.stat().st_mtime_ns))
    assert "failed: no" in reason()


def test_a_symbolic_link_to_a_library_is_not_loaded(script: Script, folder: Path, ours: Path, tmp_path: Path):
    script(f'cp {ours} "$made"')
    path = build_native()
    elsewhere = tmp_path / "elsewhere.so"
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)
    building.target.cache_clear()
    assert build_native() == path and not path.is_symlink()


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_may_write_is_not_loaded(mode: int, script: Script, folder: Path, ours: Path):
    """Whatever umask the compiler was run with, ours is nobody else's."""
    script(f'cp {ours} "$made"; chmod 777 "$made"')
    path = build_native()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(mode)
    building.target.cache_clear()
    assert build_native() == path and stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.with_name(path.name + ".damaged").stat().st_mode) == mode


def test_a_compiler_that_hangs_leaves_nobody(script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor what it started, which holds its output open."""
    monkeypatch.setattr(compiling, "LONGEST_S", 1.0)
    compiler = script("sleep 300 &\necho $! > $0.child\nwait")
    assert f"the compiler {compiler} took longer than 1 s" in reason()
    child = int(Path(f"{compiler}.child").read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # ended; whoever adopted it has not looked
            return
        time.sleep(0.05)
    pytest.fail("the compiler's child lives")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders here")
def test_another_process_is_waited_for_no_longer_than_a_compiler(
    script: Script, ours: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """One whose compiler hangs, or that was stopped, holds the folder: this call is served by another row, the next process asks again."""
    monkeypatch.setattr(compiling, "LONGEST_S", 0.2)
    script(f'cp {ours} "$made"')
    cachefolder.make(folder)
    with cachefolder.workshop(folder, 0):
        assert "another process has been at it for longer than 0.2 s" in reason()
    building.target.cache_clear()
    monkeypatch.setattr(compiling, "LONGEST_S", 30)
    works()


def test_a_command_line_as_the_compiler(script: Script, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As CXX='ccache g++'. A change of either file makes another library."""
    compiler = script(f'cp {ours} "$made"')
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\n[ "$1" = "--loud" ] || exit 1\nshift\nexec "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{wrapper}' --loud {compiler}")
    works()
    found = compiling.find()
    assert isinstance(found, compiling.Compiler) and found.words == (str(wrapper), "--loud", str(compiler))
    os.utime(compiler, ns=(0, 0))
    changed = compiling.find()
    assert isinstance(changed, compiling.Compiler) and changed.identity != found.identity
    for wrong in ("'unclosed", "/nowhere/g++ -x"):
        monkeypatch.setenv("CXX", wrong)
        building.target.cache_clear()
        dispatch.explain_problem.cache_clear()
        assert "CXX" in reason() and wrong in reason()


def test_the_wheel_serves_where_nothing_else_is_there(monkeypatch: pytest.MonkeyPatch):
    """Each level names what zig may use: it takes all that the machine has otherwise."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    monkeypatch.setattr(compiling, "version", lambda name: "0.17.0")
    found = compiling.find()
    assert isinstance(found, compiling.Compiler) and found.words == (sys.executable, "-m", "ziglang", "c++")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    command = found.command(("-O3", "-mavx2", "-mfma", "-mf16c"), "a.cpp", "a.so")
    assert command[4:] == ["-O3", "-mcpu=x86_64+avx2+fma+f16c", "a.cpp", "-o", "a.so"]
    assert "-mcpu=x86_64" in found.command(("-O3",), "a.cpp", "a.so")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "-mcpu=baseline" in found.command(("-O3",), "a.cpp", "a.so")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert "pip install ziglang" in str(compiling.find())


def test_folders_that_are_not_ours_alone(script: Script, folder: Path, ours: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused by name, though a good library lies in them."""
    script(f'cp {ours} "$made"')
    build_native()

    def refused() -> str:
        building.target.cache_clear()
        dispatch.explain_problem.cache_clear()
        found = reason()
        assert str(folder) in found and "LONGATTN_CACHE names another" in found
        return found

    for mode in (0o770, 0o777, 0o702, 0o1777):
        folder.chmod(mode)
        assert "is writable by others" in refused()
    folder.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 54321)
        assert "belongs to user" in refused()
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.symlink_to(moved)
    assert "is a symbolic link" in refused()
    folder.unlink()
    folder.write_text("")
    assert "is no folder" in refused()
    folder.unlink()
    moved.rename(folder)
    building.target.cache_clear()
    works()


@pytest.mark.parametrize("named", ["cache", "~/cache", "./cache", "~"])
@pytest.mark.usefixtures("folder")
def test_a_relative_folder_is_none(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is made in the folder where the process happens to stand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGATTN_CACHE", named)
    assert reason() == f"LONGATTN_CACHE must be an absolute path, got {named!r}"
    assert not list(tmp_path.iterdir())


def test_the_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative XDG_CACHE_HOME is ignored, as its specification says; without a home there is no folder."""
    monkeypatch.delenv("LONGATTN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cachefolder.cache_folder() == tmp_path / "other" / "longattn"
    for ignored in ("", "cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cachefolder.cache_folder() == tmp_path / ".cache" / "longattn"
    monkeypatch.setenv("HOME", "~")
    assert str(cachefolder.cache_folder()).startswith("there is no cache folder")


def test_on_disk_before_it_has_its_name(script: Script, ours: Path, monkeypatch: pytest.MonkeyPatch):
    script(f'cp {ours} "$made"')
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("on disk"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("named"), replace(*names)))
    build_native()
    assert done == ["on disk", "named"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_says_what_is_compiled(
    terminal: bool,
    script: Script,
    folder: Path,
    ours: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """On a terminal a line in two halves, else records of level INFO. A library that is there says nothing."""
    compiler = script(f'cp {ours} "$made"')

    class Stderr(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    with caplog.at_level("INFO", logger="longattn.kernels"):
        build_native()
        building.target.cache_clear()
        build_native()
    what = f"compiling the native row ({building.current().level}) with {compiler} into {folder}"
    said, logged = stderr.getvalue(), "".join(f"{record.getMessage()}\n" for record in caplog.records)
    assert said.startswith(f"longattn: {what} (once") if terminal else said == ""
    told = said if terminal else logged
    assert what in told and "python -m longattn.kernels build" in told and " done in " in told
    assert told.count("\n") == (1 if terminal else 2)


@pytest.fixture(scope="module")
def each(ours: Path) -> dict[str, Path]:
    """Every part of a library that works here."""
    return {part: build_native(part) for part in building.PARTS}


@pytest.fixture
def each_made(each: dict[str, Path]) -> str:
    """What a script does to make the part that it is asked for."""
    cases = (f'*{building.PARTS[part].source}*) cp {path} "$made";;' for part, path in each.items())
    return f'echo called >> $0.calls; case "$*" in {" ".join(cases)} esac'


def test_the_command(each_made: str, script: Script, folder: Path, capsys: pytest.CaptureFixture[str]):
    """All parts, each on a line."""
    script(each_made)
    assert __main__.main(["build"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [Path(line).name.partition("-")[0] for line in printed] == list(building.PARTS)
    assert sorted(printed) == sorted(str(path) for path in folder.iterdir())
    building.target.cache_clear()
    script("echo out of paper >&2; exit 1")
    assert __main__.main(["build"]) == 1
    assert "out of paper" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["build", "--level", "fast"])


def test_a_part_is_made_by_the_first_call_that_needs_it(each_made: str, script: Script, folder: Path):
    """Attention takes the row, a step over pages the part that reads its numbers; one that fails leaves the others."""
    compiler = script(each_made)

    def made() -> list[str]:
        return sorted(path.name.partition("-")[0] for path in folder.iterdir())

    works()
    assert made() == ["native"]
    steps(torch.bfloat16)
    assert made() == ["decode", "native"]
    steps(torch.int8)
    assert made() == ["decode", "native", "quantized"]
    assert installation()["native"]["libraries"].keys() == building.PARTS.keys()
    assert Path(f"{compiler}.calls").read_text() == "called\n" * 3
    for path in folder.glob("quantized*"):
        path.unlink()
    building.target.cache_clear()
    script("echo out of paper >&2; exit 1")
    steps(torch.int8)
    assert building.refusal("quantized") == f"the compiler {compiler} failed: out of paper"
    with pytest.raises(ValueError, match="part must be one of native, decode, quantized, got 'backward'"):
        build_native("backward")


def steps(dtype: torch.dtype) -> None:
    """A step over one page of such numbers is right, whatever serves it."""
    keys = torch.randint(-3, 4, (2, 4, 16)).to(dtype)
    scales = () if dtype.is_floating_point else (torch.ones(2, 4), torch.ones(2, 4))
    q, added = torch.randn(1, 1, 2, 16).bfloat16(), torch.zeros(1, 1, 2, 3)
    got = paged_attention(q, PagedCache(keys, keys, *scales), torch.ones(1, 1, 1, dtype=torch.int32), 3, 0.3, added)
    seen = keys[1, :3].float()
    expected = (q.float() @ seen.T * 0.3).softmax(-1) @ seen
    torch.testing.assert_close(got.out.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.fixture
def prebuilt(ours: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that came with a library for this processor, on a machine without a compiler."""
    came_with = tmp_path / "prebuilt"
    came_with.mkdir()
    digest = cachefolder.digest(ours)
    path = came_with / f"{building.prebuilt_stem(building.current().level)}.{digest}.so"
    path.write_bytes(ours.read_bytes())
    monkeypatch.setattr(building, "PREBUILT", came_with)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    building.target.cache_clear()
    return path


def test_a_prebuilt_library_serves_without_a_compiler(prebuilt: Path, folder: Path):
    """At once: nothing is compiled, and no folder made."""
    assert build_native() == prebuilt and not folder.exists()
    works()
    assert installation()["native"]["library"] == str(prebuilt)


@pytest.mark.parametrize("name", ["CXX", "LONGATTN_NATIVE_FLAGS"])
def test_who_names_compiler_or_flags_gets_their_own(
    name: str, prebuilt: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
):
    """A prebuilt library was made with others."""
    monkeypatch.setenv(name, "-O1")
    building.target.cache_clear()
    assert building.current().prebuilt is None and building.refusal() is not None


def test_a_damaged_prebuilt_library_is_not_loaded(prebuilt: Path, caplog: pytest.LogCaptureFixture):
    """A lost write would end the process with a bus error; a warning names the file."""
    prebuilt.write_bytes(prebuilt.read_bytes()[:1000])
    building.target.cache_clear()
    with caplog.at_level("WARNING", logger="longattn.kernels"):
        assert "no C++ compiler" in str(building.refusal())
    assert str(prebuilt) in caplog.text


def test_a_prebuilt_library_of_another_source_is_not_loaded(prebuilt: Path):
    """As a file that an upgrade left."""
    level, _, rest = prebuilt.name.rpartition("-")
    prebuilt.rename(prebuilt.with_name(f"{level}-{'0' * 20}.{rest.partition('.')[2]}"))
    building.target.cache_clear()
    assert building.current().prebuilt is None
