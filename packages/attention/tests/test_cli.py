"""The command `longattn`: every subcommand's answer, a user's mistakes, and what `--help` costs."""

import json
import subprocess
import sys

import pytest

from longattn.attention.cli import plan
from longattn.attention.cli.main import main
from longattn.attention.cli.parser import SHELLS, build_parser
from longattn.attention.cli.report import Report, Table, aligned, print_report
from longattn.attention.schedules.simulation import Prediction
from longattn.patterncache import Dilated, Window

SMALL = ("--length", "256", "--heads", "4")


def told(capsys, *words):
    """(exit status, what was printed)."""
    status = main(words)
    return status, capsys.readouterr().out


def data_of(capsys, *words):
    """What `--json` says, of a command that is done."""
    status, text = told(capsys, words[0], "--json", *words[1:])
    assert status == 0
    return json.loads(text)


def test_help_needs_neither_torch_nor_numpy():
    """In a process of its own: the help of the command and of each subcommand, and none of the heavy modules."""
    script = """
import sys
from longattn.attention.cli.main import main
for words in ([], ["info"], ["explain"], ["show"], ["plan"], ["bench"], ["demo"], ["memory"]):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "numpy", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    for name in ("info", "explain", "show", "plan", "bench", "demo", "memory"):
        assert f"longattn {name}" in ended.stdout


def test_python_m_is_the_same_command():
    """`python -m longattn.attention`, and the version."""
    words = [sys.executable, "-m", "longattn.attention", "--version"]
    ended = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.startswith("longattn-attention 0.")


def test_info_says_what_is_here(capsys):
    """Versions, the processor, the native level, and why a row cannot serve."""
    found = data_of(capsys, "info")
    assert found["versions"]["torch"] and found["processor"] and found["native"]["level"]
    assert set(found["rows"]) >= {"native", "sdpa", "triton"}
    assert "native level" in told(capsys, "info")[1]


def test_info_advises_where_the_native_row_cannot_be_had(capsys, monkeypatch):
    """Switched off by hand, it says so, and what serves instead."""
    monkeypatch.setenv("LONGATTN_NATIVE", "0")
    found = data_of(capsys, "info")
    assert "LONGATTN_NATIVE=0" in found["native"]["refusal"] and "slower rows" in found["advice"][0]


def test_explain_names_the_backend_and_every_other_ones_reason(capsys):
    """A row per backend; status 1 where none serves."""
    found = data_of(capsys, "explain", *SMALL, "--pattern", "dilated:64,128:1,2", "--verbose", "--machine", "H100")
    rows = {row["backend"]: row for row in found["rows"]}
    assert not rows[found["backend"]]["reasons"] and rows["triton"]["reasons"] and "GFLOP" in found["traffic"]
    status, text = told(capsys, "explain", *SMALL, "--backend", "triton")
    assert status == 1 and "no backend serves" in text


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("--pattern", "window:32:4"), Window(32, sinks=4, causal=True)),
        (("--pattern", "dilated:64,128:1,2", "--bidirectional"), Dilated((64, 128), (1, 2), causal=False)),
        ((), Dilated.for_length(256, layers=12, num_heads=4, causal=True)),
        (("--pattern", "for-length:3"), Dilated.for_length(256, layers=3, num_heads=4, causal=True)),
        (("--pattern", Window(9).canonical(), "--bidirectional"), Window(9).with_causal(False)),
    ],
)
def test_show_takes_every_form_of_a_pattern(capsys, words, pattern):
    """The pattern that was meant, and what lint says of it."""
    found = data_of(capsys, "show", *SMALL, *words)
    assert found["pattern"] == pattern.canonical()
    assert found["lint"]["pairs"] == pattern.lint(256, 4).pairs


def test_show_draws_a_map_and_a_picture(capsys, tmp_path):
    """A triangle on the terminal for causal attention; reach; a PNG beyond 2048 tokens."""
    image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "pattern.png"
    words = ("--pattern", "full", "--length", "4096", "--heads", "1", "--layers", "2", "--png", str(picture))
    status, text = told(capsys, "show", *words)
    cells = text.splitlines()[2:50]
    # 47 of 48 cells in a row are seen whole; the one on the diagonal in part.
    assert status == 0 and all(line.startswith("@@" * row) for row, line in enumerate(cells)) and "reach:" in text
    assert max(map(len, cells)) == 96 and image.imread(picture).shape[0] > 300


def test_plan_adds_up(capsys):
    """Weights from the model's own matrices; training holds more than a forward; a ring divides what grows with the sequence."""
    base = ("plan", "--length", "4096", "--pattern", "window:64", "--layers", "2", "--vocabulary", "1000")
    forward = data_of(capsys, *base)
    width = 8 * 64
    assert forward["parameters"] == 1000 * width + 2 * (2 * width**2 + 2 * width**2 + 2 * width * 4 * width)
    trained, recomputed = data_of(capsys, *base, "--train"), data_of(capsys, *base, "--train", "--recompute")
    ring = data_of(capsys, *base, "--train", "--ring", "4")
    assert forward["total"] < recomputed["total"] < trained["total"]
    assert trained["seconds"] < recomputed["seconds"] and ring["activations"] * 4 == trained["activations"]
    # Backward: five products beside the forward's two.
    assert trained["attention_flops"] == 3.5 * forward["attention_flops"] == 4 * ring["attention_flops"]
    assert ring["in_flight"] > 0 == trained["in_flight"]
    slow = data_of(capsys, *base, "--train", "--ring", "4", "--engine", "all_gather", "--link", "0.001")
    assert slow["transfer_seconds"] > ring["transfer_seconds"] and slow["seconds"] > slow["transfer_seconds"]


@pytest.mark.parametrize("pattern", ["full", "window:4096", "dilated:2048,32768,1073741824:1,16,524288"])
def test_plan_of_a_billion_tokens(capsys, pattern):
    """Counted, not looked at token by token: its attention grows from that of a million as its pairs do."""
    words = ("plan", "--pattern", pattern, "--ring", "8", "--train", "--heads", "4")
    million, billion = (data_of(capsys, *words, "--length", str(1 << n)) for n in (20, 30))
    ratio = billion["attention_flops"] / million["attention_flops"]
    assert ratio == pytest.approx(1 << 20 if pattern == "full" else 1 << 10, rel=0.02)
    assert "not made beyond 1048576 tokens" in told(capsys, *words, "--length", str(1 << 30))[1]
    assert "keys per query" in told(capsys, *words, "--length", "4096")[1]


def test_plan_counts_the_parameters_of_the_model_that_we_ship():
    """Projections, feed-forward and embedding, beside `LongNet`'s own, whose biases and norms are left out."""
    from longattn.attention import LongNet

    options = build_parser().parse_args(
        ["plan", "--heads", "2", "--head-dim", "8", "--layers", "2", "--vocabulary", "50"]
    )
    layer = Prediction("ring zigzag", 0.0, 0.0, 0.0, 0, 0, 0, 1)
    expected = plan.budget(options, 2, 0.0, plan.MACHINES["H100"], layer, None).parameters
    model = LongNet(50, 16, 2, 2, segment_lengths=(8,), dilation_rates=(1,))
    matrices = {id(x): x.numel() for x in model.parameters() if x.ndim == 2}
    assert sum(matrices.values()) in (expected, expected + 50 * 16)  # with an output matrix of its own


def test_bench_times_every_side_and_writes_rows(capsys, tmp_path):
    """Ours first, peers beside it, as a table, CSV and PNG; dense SDPA is marked as another attention."""
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    words = ("--peers", "sdpa,sdpa-mask", "--rounds", "1", "--backward", "--csv", str(table), "--png", str(picture))
    pytest.importorskip("matplotlib")
    found = data_of(capsys, "bench", *SMALL, "--head-dim", "16", "--kv-heads", "2", "--pattern", "window:16", *words)
    assert [row["side"] for row in found["rows"]] == ["longattn", "sdpa", "sdpa-mask"]
    assert [row["same_attention"] for row in found["rows"]] == ["yes", "no: dense", "yes"]
    assert table.read_text().splitlines()[0].startswith("side,ms,") and picture.stat().st_size > 1000


def test_demo_checks_itself(capsys):
    """Errors beside float64 decide the exit status."""
    found = data_of(capsys, "demo", *SMALL)
    assert found["layers"] <= 12 and 0 < found["pairs_of_dense"] < 1 and max(found["errors"].values()) < 1e-3


def test_memory_runs_a_script_and_tells_what_is_held(capsys, tmp_path):
    """Its arguments, its exit status, and the manager that is alive at its end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from longattn.bufmgr import create_attention_buffer_manager\n"
        "manager = create_attention_buffer_manager()\n"
        "held = manager.allocate('query', (64, 64))\n"
        "print(*sys.argv[1:])\n"
    )
    status, text = told(capsys, "memory", str(script), "first", "--second")
    assert status == 0 and text.startswith("first --second\n") and "buffer managers alive" in text and "query" in text
    script.write_text("raise SystemExit(7)\n")
    assert told(capsys, "memory", str(script))[0] == 7
    script.write_text("raise SystemExit('no data')\n")
    assert main(["memory", str(script)]) == 1 and capsys.readouterr().err == "no data\n"


@pytest.mark.parametrize(
    ("text", "place"), [("int('seven')\n", '", line 1, in <module>'), ("def f(:\n", "SyntaxError: invalid syntax")]
)
def test_memory_shows_where_a_script_fails(capsys, tmp_path, text, place):
    """As the interpreter would: frames of the script, none of what runs it, and status 1."""
    script = tmp_path / "script.py"
    script.write_text(text)
    assert main(["memory", str(script)]) == 1
    err = capsys.readouterr().err
    assert place in err and err.count("  File ") == err.count(str(script)) == 1


def test_memory_prints_nothing_but_json(capsys, tmp_path):
    """What the script prints goes to stderr."""
    script = tmp_path / "script.py"
    script.write_text("print('hello')\n")
    assert main(["memory", "--json", str(script)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_status"] == 0 and err == "hello\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("show", "--pattern", "spiral"), "--pattern must be full, window:SIZE"),
        (("show", "--pattern", "window:big"), "--pattern must have integers after its name, got 'big'"),
        (("show", "--pattern", "dilated:64:0"), "dilation_rates"),
        (("show", "--pattern", "[1"), "must be a canonical string"),
        (("show", "--head", "8"), "--head must be below --heads=8, got 8"),
        (("explain", "--architecture", "sm_90"), "architecture must be None for device=cpu"),
        (("explain", "--backend", "fast"), "backend must be None or one of"),
        (("explain", "--machine", "abacus"), "machine must be one of"),
        (("plan", "--machine", "abacus"), "--machine must be one of A100"),
        (("plan", "--kv-heads", "3"), "--kv-heads must divide --heads=8, got 3"),
        (("plan", "--ring", "9", "--length", "8"), "--ring must be at most --length=8, got 9"),
        (("plan", "--engine", "tree"), "engine must be one of ('ring contiguous', "),
        (
            ("plan", "--engine", "ulysses", "--ring", "9"),
            "ulysses must have a kv head a rank, got 8 kv heads for 9 ranks",
        ),
        (("bench", "--peers", "rocket"), "--peers must be of sdpa"),
        (
            ("bench", "--peers", "sdpa-mask", "--length", "20000"),
            "--length must be at most 16384 with --peers sdpa-mask, got 20000",
        ),
        (("bench", "--length", str(10**12)), "--length must be at most "),
        (("demo", "--length", str(10**12)), "--length must be at most "),
        (("bench", "--kv-heads", "3"), "--kv-heads must divide --heads=8, got 3"),
        (("memory", "/nowhere/script.py"), "script must be a file"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(capsys, words, sentence):
    """Exit status 2; what was wrong, on stderr."""
    assert main(words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert sentence in err[-1] and err[-1].startswith(f"longattn {words[0]}: ") and len(err) == 1


def test_a_picture_without_matplotlib_says_what_to_install(capsys, monkeypatch):
    """Not only which module is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert main(("show", "--length", "64", "--png", "x.png")) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("fly",),
        ("show", "--length", "0"),
        ("plan", "--efficiency", "2"),
        ("plan", "--link", "fast"),
        ("bench", "--csv", "/no/such/folder/rows.csv"),
        ("show", "--png", "/"),
        ("show", "--png", "/nowhere/at/all.png"),
        ("show", "--len", "9"),
        (),
    ],
)
def test_argparse_refuses_what_is_no_argument(capsys, words):
    """Exit status 2 and the usage."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage: longattn" in capsys.readouterr().err


def test_interrupted_while_torch_loads(monkeypatch):
    """The import of a subcommand is part of its run: no traceback."""

    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr("longattn.attention.cli.main.import_module", interrupted)
    assert main(["info"]) == 130


def test_rounds_are_shown_on_a_terminal_only(capsys, monkeypatch):
    """There one line that is cleared at the end; elsewhere nothing beside the answer."""
    words = ("bench", *SMALL, "--head-dim", "16", "--rounds", "1", "--peers", "")
    assert main(words) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(words) == 0
    shown = capsys.readouterr().err
    assert "longattn: round 1 of 1" in shown and shown.endswith(f"\r{'':79}\r")


def test_a_reader_that_leaves_is_no_error():
    """`longattn --print-completion bash | head -1`: status 0, nothing on stderr."""
    pytest.importorskip("shtab")
    command = f"{sys.executable} -m longattn.attention --print-completion bash; echo status $? >&2"
    ended = subprocess.run(
        ["sh", "-c", f"({command}) | head -1"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.stderr == "status 0\n"


def test_traceback_is_shown_where_asked():
    """For those who look for the place."""
    with pytest.raises(ValueError, match="--pattern must be"):
        main(["show", "--traceback", "--pattern", "spiral"])


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(capsys, shell):
    """Of shtab, with our subcommands in them."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(["--print-completion", shell])
    assert end.value.code in (0, None) and "explain" in capsys.readouterr().out


def test_tables_align_numbers_to_the_right(capsys, monkeypatch):
    """And rich draws the same cells where somebody looks."""
    table = Table("title", ("name", "count"), [("a", "5"), ("long", "12")])
    assert aligned(table).splitlines() == ["title", "name  count", "a         5", "long     12"]
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_report(Report({}, [table, "a sentence [not markup]"]), as_json=False)
    text = capsys.readouterr().out
    assert "long" in text and "12" in text and "a sentence [not markup]" in text
