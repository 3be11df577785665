"""The demo from outside, as a user starts it, and the parts that decide before anything is started."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demo import resources
from demo.__main__ import main, prepare
from demo.options import Options, parse
from demo.picture import draw, mean_counts
from demo.refusal import RefusalError
from demo.text import read_text
from longattn.patterncache import Dilated, Rectangle, Span

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--seq-len", "512", "--segments", "64", "128", "256", "--heads", "4", "--head-dim", "16"]


def demo(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m demo` in a directory of its own, with the checkout importable."""
    path = os.pathsep.join(
        entry if os.path.isabs(entry) else str(ROOT / entry)
        for entry in (str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    )
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.nightly
def test_small_run_prints_everything_and_writes_the_picture(tmp_path: Path) -> None:
    """One command reads a file, runs three paths and says how they compare; the default picture is in the directory."""
    text = tmp_path / "some [bold]text.txt"
    text.write_text("long context attention " * 50)
    done = demo([*SMALL, "--file", str(text), "--dtype", "bfloat16"], tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    for wanted in (
        str(text),
        "lint: Dilated",
        "backend:",
        "longattn, joined",
        "in 12 layers every token hears of all before it",
        "gather-scatter",
        "dense SDPA",
        "forward",
        "oracle",
        "Picture",
    ):
        assert wanted in done.stdout
    assert "1/14" in done.stderr
    assert (tmp_path / "who_sees_whom.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "missing.txt"], "missing.txt"),
        (["--file", "."], "directory"),
        (["--file", "empty.txt"], "empty"),
        (["--file", "short.txt"], "--seq-len 5"),
        (["--file", "short.txt", "--seq-len", "1000000000000000000000"], "has 5 bytes"),
        (["--seq-len", "0"], "--seq-len"),
        (["--seq-len", "3.5"], "--seq-len"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--segments", "0"], "--segments"),
        (["--segments", "64", "128"], "--rates"),
        (["--heads", "-1"], "--heads"),
        (["--seed", "x"], "--seed"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--png", "."], "directory"),
        (["--png", "picture.jpg"], ".png"),
        (["--png", "no/such/folder/picture.png"], "no/such/folder"),
        (["--seq-len", "100", "--heads", "100000000"], "GiB"),
    ],
)
def test_refusal_is_one_clear_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot run says so in one line on standard error, names its cause, and ends with status 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"short")
    status = main(arguments)
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("demo: ")
    assert words in captured.err


def test_refusal_from_outside(tmp_path: Path) -> None:
    """The process itself ends non-zero, with one line and no traceback."""
    done = demo(["--file", "missing.txt"], tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_device_that_is_not_there(tmp_path: Path) -> None:
    """A worker's refusal travels up as the demo's one line."""
    done = demo([*SMALL, "--device", "cuda:99", "--file", str(ROOT / "LICENSE")], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("demo: --device cuda:99")
    assert "Traceback" not in done.stderr


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    """A device without room refuses with the system's own reason."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(RefusalError, match=r"--png .*full\.png"):
        draw(Dilated((64,), (1,), causal=True), 256, 2, tmp_path / "full.png")


def test_short_text_with_auto_takes_all_of_it(tmp_path: Path) -> None:
    """`--seq-len auto` is the whole file when it is short."""
    (tmp_path / "short.txt").write_bytes(b"short")
    options, text, _ = prepare(parse(["--seq-len", "auto", "--file", str(tmp_path / "short.txt")]))
    assert (options.seq_len, text) == (5, b"short")


def test_standard_library_is_long_enough_and_always_the_same() -> None:
    """The default text fills the default length, from real sources."""
    first, _ = read_text(None, 32768)
    second, _ = read_text(None, 32768)
    assert (len(first), first) == (32768, second)
    assert b"import " in first


def test_options_survive_the_trip_to_a_worker() -> None:
    """`from_json` inverts `to_json`."""
    options = parse(["--segments", "64,128", "--rates", "1", "2", "--device", "cuda:1"])
    assert Options.from_json(options.to_json()) == options


@pytest.mark.parametrize("available", [0, 500 << 20, 1 << 30])
def test_too_little_memory_says_what_would_fit(available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any length that the message proposes is accepted."""
    monkeypatch.setattr(resources, "available_bytes", lambda: available)
    options = replace(parse([]), seq_len=10**6)
    with pytest.raises(RefusalError, match="GiB") as caught:
        resources.check_memory(options)
    words = str(caught.value).split("pass --seq-len ")
    if len(words) == 2:
        resources.check_memory(replace(options, seq_len=int(words[1].split()[0])))


def test_cgroup_limits_are_read(tmp_path: Path) -> None:
    """Room in a group is its limit less its use, page cache not counted; without a limit there is none to report."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    assert resources._cgroup_room(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert resources._cgroup_room(tmp_path) is None


def test_reduced_picture_averages_the_true_counts() -> None:
    """Away from the diagonal, where tiles are uniform, a pixel is the mean of the counts that it stands for."""
    pattern = Dilated((64, 256, 1024), (1, 2, 4), heads="shared", causal=False)
    seen = mean_counts(pattern, 1024, heads=8)
    whole = Span(0, 1024)
    counts = pattern.counts(Rectangle(num_heads=8, queries=(whole,), keys=(whole,)))
    np.testing.assert_allclose(seen, counts.reshape(8, 256, 4, 256, 4).mean(axis=(0, 2, 4)))
