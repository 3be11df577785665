"""The measuring instruments: a red gate reports nothing, the peers compute what they are said to compute."""

import csv
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import adaptive_figures, buffer_figures, gate, record, run
from benchmarks import experiment as experiment_module
from benchmarks.buffer_traces import TRACES, decoding_by_cat, exact_key_pool, live_peak
from benchmarks.cases.patterns import random_blocks
from benchmarks.experiment import Labels, Side, Targets, experiments, find
from benchmarks.figures import Figure, builds, hit_ratios, plan_bytes
from benchmarks.harness import (
    WAITING,
    Effort,
    Outcome,
    RedGateError,
    Sample,
    Summary,
    measure,
    summarize,
    timed,
    until_asleep,
)
from benchmarks.memory import ResidentPeak
from benchmarks.peers.dense import dense_attention
from benchmarks.peers.engines import ENGINES
from benchmarks.peers.fkodom_style import fkodom_style_attention
from benchmarks.peers.gathered_blocks import GatheredBlocks
from benchmarks.peers.op_for_op import Empty, from_torch, op_for_op_attention
from benchmarks.peers.torchscale_style import HeadAssignment, torchscale_style_attention
from benchmarks.row_class_figures import bound_call, from_arrays, from_periods
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESETS
from longattn.bufmgr import AttentionBufferManager
from longattn.patterncache import BlockSparse, Dilated, Full, Rectangle, Span

QUICK = Effort(warmups=1, min_pairs=2, max_pairs=2, seconds=0.0, growth=False)


@dataclass
class Toy:
    """An experiment that writes down the order of its calls; it is correct unless told otherwise."""

    failures: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    labels: Labels = field(default_factory=lambda: Labels("toy", "plain", "other", "float32", 8, False, "forward"))
    targets: Targets = field(default_factory=lambda: Targets(ratio=1e9))
    key: str = "toy"

    def prepare(self, side: Side) -> experiment_module.Path:
        """A call that only leaves its name."""
        return experiment_module.Path(lambda: self.calls.append(side), lambda: None, 1)

    def check(self) -> list[str]:
        """Red exactly if there are failures."""
        return self.failures


def test_pairs_alternate_after_the_warm_up() -> None:
    """A B A B: the two sides take turns, so a slow moment hits both."""
    toy = Toy()
    outcome = measure(toy, QUICK)
    assert toy.calls == ["ours", "peer"] * 3
    assert (outcome.ours.samples, outcome.peer.samples) == (2, 2)


def test_red_gate_runs_and_reports_nothing() -> None:
    """A failed check is raised with its sentences before anything is timed."""
    toy = Toy(failures=["ours: error of out is 1"])
    with pytest.raises(RedGateError, match="toy: ours: error of out is 1"):
        measure(toy, QUICK)
    assert toy.calls == []


@pytest.mark.parametrize(("failures", "status", "rows"), [([], 0, 1), (["wrong"], 1, 0)])
def test_run_writes_a_row_only_for_a_green_gate(
    failures: list[str], status: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red ends with status 1 and no row; a missed target is a row that says missed."""
    monkeypatch.setattr(run, "CASES", {"toy": "nowhere"})
    monkeypatch.setattr(run, "experiments", lambda case, quick: [Toy(failures=failures)])
    threads = torch.get_num_threads()
    try:
        found = run.main(["toy", "--no-growth", "--pairs", "1", "--results", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    path = tmp_path / "toy.csv"
    written = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    assert (found, len(written)) == (status, rows)
    assert all(row["verdict"].startswith("missed: ratio") and row["commit"] for row in written)


def test_a_sample_begins_once_threads_sleep() -> None:
    """What a thread computes after one call is not charged to the next; one that never ends is an error."""
    stop, alive = threading.Event(), []

    def spin(until: float) -> None:
        while time.perf_counter() < until and not stop.is_set():
            pass

    thread = threading.Thread(target=spin, args=(time.perf_counter() + 0.05,))
    thread.start()
    # By the time that the sample's call runs, the thread has stopped.
    timed(lambda: alive.append(thread.is_alive()))
    thread.join()
    assert alive == [False]
    thread = threading.Thread(target=spin, args=(time.perf_counter() + 60,))
    thread.start()
    try:
        # One or two glances: among more, a busy machine has one in which the thread gets no time.
        with pytest.raises(RuntimeError, match="still computes 0.002 s after the last call"):
            until_asleep(0.002)
    finally:
        stop.set()
        thread.join()


def test_results_say_how_threads_waited() -> None:
    """Every row of every case, old ones included; a row that was measured otherwise does not count as recorded."""
    assert WAITING == "asleep"
    for case in experiment_module.CASES:
        path = record.RESULTS / f"{case}.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        assert {row["waiting"] for row in rows} <= {"asleep", "spinning"}, case


def test_rows_append_under_one_header(tmp_path: Path) -> None:
    """A second run adds rows, not a second header."""
    summary = summarize([Sample(1.0, 1.0), Sample(3.0, 2.0)])
    outcome = Outcome(summary, Summary(4.0, 3.0, 5.0, 2.0, 2), our_growth=0.5, peer_growth=None)
    row = record.make_row(Toy().labels, Targets(ratio=2.0, growth=0.6), outcome, record.surroundings())
    for _ in range(2):
        record.append(row, tmp_path / "new" / "toy.csv")
    lines = (tmp_path / "new" / "toy.csv").read_text().splitlines()
    assert (len(lines), lines[1]) == (3, lines[2])
    assert (row.ratio_cpu, row.our_cpu_p20, row.our_cpu_p80, row.verdict) == (2.0, 1.4, 2.6, "met")


@pytest.mark.parametrize("heads", ["shared", "blocks"])
@pytest.mark.parametrize(
    ("batch", "seq_len", "num_heads", "segments", "rates", "causal"),
    [
        (1, 64, 8, (16, 32, 64), (1, 2, 4), False),
        (2, 64, 3, (16, 64), (1, 2), False),
        (1, 64, 8, (16, 32, 64), (1, 2, 4), True),
        (1, 50, 5, (16, 32, 64), (1, 2, 4), True),
        (2, 40, 4, (10, 20), (3, 1), True),
    ],
)
def test_torchscale_style_is_dilated_attention(
    heads: HeadAssignment,
    batch: int,
    seq_len: int,
    num_heads: int,
    segments: tuple[int, ...],
    rates: tuple[int, ...],
    causal: bool,
) -> None:
    """Outputs equal the oracle's for both head assignments; with differentiable merge weights gradients do too."""
    pattern = Dilated(segments, rates, heads=heads, causal=causal)
    q, k, v, grad = normal(batch, seq_len, num_heads, 8)

    def peer(merge_grad: bool) -> gate.Attention:
        return lambda q, k, v: torchscale_style_attention(
            q, k, v, segments, rates, causal=causal, heads=heads, merge_grad=merge_grad
        )

    truth = gate.oracle(q, k, v, grad, pattern, range(seq_len))
    exact = gate.errors(peer(merge_grad=True), q, k, v, grad, truth)
    detached = gate.errors(peer(merge_grad=False), q, k, v, grad, truth)
    assert gate.red("exact", exact, q.dtype) == []
    assert detached["out"] == exact["out"]
    assert detached["dq"] > 1e-2


@pytest.mark.parametrize(("name", "causal"), list(itertools.product(ENGINES, (False, True))))
def test_other_engines_are_full_attention(name: str, causal: bool) -> None:
    """Each of their dtypes, beside SDPA in float32."""
    modules, dtypes, attention = ENGINES[name]
    for module in modules:
        pytest.importorskip(module)
    given = torch.randn(3, 2, 33, 4, 16, generator=torch.Generator().manual_seed(0))
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        q, k, v = given.to(kind)
        most = 2e-5 if kind == torch.float32 else 3e-2
        expected = dense_attention(q.float(), k.float(), v.float(), causal=causal)
        torch.testing.assert_close(attention(q, k, v, causal=causal).float(), expected, atol=most, rtol=most)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_is_full_attention(causal: bool) -> None:
    """The dense peer equals the oracle of `Full`, gradients included."""
    q, k, v, grad = normal(2, 33, 3, 8)
    truth = gate.oracle(q, k, v, grad, Full(causal=causal), range(33))
    found = gate.errors(lambda q, k, v: dense_attention(q, k, v, causal=causal), q, k, v, grad, truth)
    assert gate.red("dense", found, q.dtype) == []


@pytest.mark.parametrize(
    "broken", [lambda x: x * 1.001, lambda x: x * float("nan"), lambda x: x.flip(1)], ids=["scaled", "nan", "flipped"]
)
def test_gate_turns_red_on_a_wrong_result(broken: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """An output off by a thousandth, a NaN or a permutation is seen."""
    q, k, v, grad = normal(1, 32, 2, 8)
    truth = gate.oracle(q, k, v, grad, Full(), gate.sampled_rows(32, [16], amount=12))
    found = gate.errors(lambda q, k, v: broken(dense_attention(q, k, v)), q, k, v, grad, truth)
    assert any("out" in sentence for sentence in gate.red("broken", found, q.dtype))


def test_sampled_rows_hold_both_sides_of_every_border() -> None:
    """Ends and borders come first; the rest is random, sorted, without repetition."""
    rows = gate.sampled_rows(100, [32, 64, 128], amount=20)
    assert {0, 1, 31, 32, 33, 63, 64, 65, 99} <= set(rows)
    assert (rows, len(rows)) == (sorted(set(rows)), 20)


@pytest.mark.parametrize("case", experiment_module.CASES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_is_found_again_by_its_key(case: str, quick: bool) -> None:
    """Keys are unique within a case, so a fresh process measures the same experiment; rows tell experiments apart."""
    every = list(experiments(case, quick=quick))
    assert len({one.key for one in every}) == len({one.labels for one in every}) == len(every)
    assert {one.labels.case for one in every} == {case}
    assert find(case, every[-1].key, quick=quick) == every[-1]


def test_every_preset_has_its_rows() -> None:
    """The case reads the table of presets, so a new one is measured without a word here."""
    named = {one.key.split("-")[0] for one in experiments("presets", quick=True)}
    assert named == {*PRESETS, *MULTIHEAD_PRESETS}


@pytest.mark.parametrize(("most_ms", "said"), [(2.0, "met"), (1.5, "missed: 2.00 ms > 1.5"), (None, "")])
def test_a_time_of_its_own_can_be_a_target(most_ms: float | None, said: str) -> None:
    """The row says by how much it was missed."""
    summary = summarize([Sample(2.0, 1.0)])
    assert record.verdict(Outcome(summary, summary, None, None), Targets(most_ms=most_ms)) == said


def test_unknown_case_is_named() -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match="case must be one of attention, presets, patterns, .*got 'nope'"):
        experiments("nope", quick=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "segments", "rates"),
    [(8, (16, 32, 64), (1, 2, 4)), (3, (8, 128), (3, 2)), (2, (64,), (1,))],
)
def test_fkodom_style_is_split_dilated_attention(
    causal: bool, num_heads: int, segments: tuple[int, ...], rates: tuple[int, ...]
) -> None:
    """Without its divisions outputs and gradients are the oracle's; the divisions are by sums and by the branches."""
    pattern = Dilated(segments, rates, heads="split", causal=causal)
    q, k, v, grad = normal(2, 64, num_heads, 8)

    def peer(normalize: bool) -> gate.Attention:
        return lambda q, k, v: fkodom_style_attention(q, k, v, segments, rates, causal=causal, normalize=normalize)

    truth = gate.oracle(q, k, v, grad, pattern, range(64))
    found = gate.errors(peer(normalize=False), q, k, v, grad, truth)
    assert gate.red("fkodom-style", found, q.dtype) == []
    plain, divided = peer(normalize=False)(q, k, v), peer(normalize=True)(q, k, v)
    expected = plain / plain.sum(1, keepdim=True) / len(rates)
    torch.testing.assert_close(divided, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [from_torch, AttentionBufferManager().empty], ids=["torch", "manager"])
@pytest.mark.parametrize(
    ("batch", "seq", "num_heads", "segments", "rates"),
    [(1, 64, 8, (16, 32, 64), (1, 2, 4)), (2, 50, 3, (16, 64), (1, 2)), (1, 33, 2, (16, 2), (1, 3))],
)
def test_op_for_op_is_split_dilated_attention(
    empty: Empty, batch: int, seq: int, num_heads: int, segments: tuple[int, ...], rates: tuple[int, ...]
) -> None:
    """Wherever its temporaries come from, also the second time, when they were used before."""
    q, k, v, grad = normal(batch, seq, num_heads, 8)
    truth = gate.oracle(q, k, v, grad, Dilated(segments, rates, heads="split"), range(seq))

    def peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return op_for_op_attention(q, k, v, segments, rates, empty=empty)

    for _ in range(2):
        assert gate.red("op-for-op", gate.errors(peer, q, k, v, grad, truth, gradients=False), q.dtype) == []


@pytest.mark.parametrize("per_head", [False, True])
def test_gathered_blocks_is_block_sparse_attention(per_head: bool) -> None:
    """Outputs and gradients equal the oracle's, for one mask and for a mask per head, and a block that sees nothing."""
    mask = np.stack([random_blocks(8, seed) for seed in range(3)]) if per_head else random_blocks(8)
    mask[..., 5, :] = False
    q, k, v, grad = normal(2, 64, 3, 8)
    truth = gate.oracle(q, k, v, grad, BlockSparse(8, mask), range(64))
    found = gate.errors(GatheredBlocks(8, mask), q, k, v, grad, truth)
    assert gate.red("gathered", found, q.dtype) == []
    q, k, v, grad = q[:, :48], k[:, :48], v[:, :48], grad[:, :48]
    truth = gate.oracle(q, k, v, grad, BlockSparse(8, mask), range(48))
    assert gate.red("shorter", gate.errors(GatheredBlocks(8, mask), q, k, v, grad, truth), q.dtype) == []


@pytest.mark.parametrize("count", [8, 64])
def test_random_blocks_hide_nine_in_ten(count: int) -> None:
    """The diagonal and at least a tenth of all blocks are seen, always the same ones for a seed."""
    mask = random_blocks(count)
    assert mask.diagonal().all()
    assert mask.sum() == max(-(-count * count // 10), count)
    assert (mask == random_blocks(count)).all()
    assert count == 8 or (mask != random_blocks(count, seed=1)).any()


def test_resume_leaves_out_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run keeps its rows, and the next one does only the rest."""
    toys = [Toy(key=name, labels=Labels("toy", name, "other", "float32", 8, False, "forward")) for name in "ab"]
    monkeypatch.setattr(run, "CASES", {"toy": "nowhere"})
    monkeypatch.setattr(run, "experiments", lambda case, quick: toys)
    options = ["--no-growth", "--pairs", "1", "--results", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert run.main(["--only", "a", *options]) == 0
    toys[0].calls.clear()
    assert run.main(["--resume", *options]) == 0
    assert (toys[0].calls, toys[1].calls) == ([], ["ours", "peer"] * 2)
    assert [row["variant"] for row in csv.DictReader((tmp_path / "toy.csv").read_text().splitlines())] == ["a", "b"]


def test_a_text_that_no_key_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a run that measures nothing and is well."""
    monkeypatch.setattr(run, "CASES", {"toy": "nowhere"})
    monkeypatch.setattr(run, "experiments", lambda case, quick: [Toy()])
    assert run.main(["--only", "nothing", "--threads", str(torch.get_num_threads())]) == 2
    assert "got ['nothing']" in capsys.readouterr().err


def test_rows_under_other_columns_are_refused(tmp_path: Path) -> None:
    """A file of another shape is left as it is."""
    path = tmp_path / "toy.csv"
    path.write_text("case,peer\n")
    summary = summarize([Sample(1.0, 1.0)])
    row = record.make_row(Toy().labels, Targets(), Outcome(summary, summary, None, None), record.surroundings())
    with pytest.raises(ValueError, match="toy.csv must have the columns case,variant,.*got case,peer"):
        record.append(row, path)
    assert path.read_text() == "case,peer\n"


def test_resident_peak_sees_a_large_allocation() -> None:
    """Memory that was touched and given back still counts as the peak."""
    peak = ResidentPeak()
    peak.start()
    if peak.growth() is None:
        pytest.skip("this system does not tell resident memory")
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    assert (peak.growth() or 0) > 60 << 20


def test_quick_run_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    """`--quick` exercises every experiment of every case and writes to standard output only."""
    before = sorted(record.RESULTS.glob("*")) if record.RESULTS.exists() else []
    threads = torch.get_num_threads()
    try:
        assert run.main(["--quick", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (sorted(record.RESULTS.glob("*")) if record.RESULTS.exists() else []) == before
    shown = capsys.readouterr().out
    assert all(f"/ {peer}:" in shown for peer in ("torchscale-style", "fkodom-style", "functional", "local", "dense"))


def normal(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded q, k, v and upstream gradient of one shape."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    return q, k, v, grad


@pytest.mark.parametrize(
    ("least", "most", "said"), [(None, None, ""), (0.5, None, "met"), (None, 0.4, "missed"), (0.6, 1.0, "missed")]
)
def test_a_figure_says_whether_it_is_within_its_bounds(least: float | None, most: float | None, said: str) -> None:
    """Where it has any."""
    assert Figure("hits", "any", "ratio", 0.5, least=least, most=most).verdict == said


def test_figures_of_the_cache_are_what_is_promised() -> None:
    """One build per key under threads; a small plan; a small cache's hits are counted for every trace."""
    found = [*builds(), *plan_bytes(), *hit_ratios((200,))]
    assert {figure.verdict for figure in found} <= {"met", ""} and len(found) == 1 + 2 + 6


def test_figures_of_buffers_are_what_is_promised() -> None:
    """Little is retained on every trace, from the first pass on, where a pool with exact keys retains several times the peak."""
    found = list(buffer_figures.counted(passes=2, recorded=False))
    assert {figure.verdict for figure in found} == {"met"} and len(found) == 2 * len(TRACES)
    for trace_of in TRACES.values():
        assert trace_of() == trace_of()
        assert exact_key_pool(trace_of()) > 4 * live_peak(trace_of())


def test_recorded_steps_take_and_drop_what_they_should() -> None:
    """Every drop is of something taken before; what grows by `torch.cat` is larger in each step; a learner's figures tell both."""
    steps = decoding_by_cat(steps=6)
    held: set[int] = set()
    for what, name, _ in itertools.chain.from_iterable(steps):
        if what == "take":
            assert name not in held
            held.add(name)
        else:
            held.remove(name)
    largest = [max(nbytes for _, _, nbytes in step) for step in steps]
    assert largest == sorted(set(largest))
    misses, seconds = adaptive_figures.learning({"decoding": lambda: steps}, turns=1)
    assert (misses.verdict, seconds.unit) == ("met", "ratio")


def test_retained_memory_of_a_small_trace_is_counted() -> None:
    """Two tensors of 3 and 5 bytes at once, then one of 5: the live peak is 8, and so is what exact keys retain."""
    trace = [("take", 0, 3), ("take", 1, 5), ("drop", 0, 0), ("drop", 1, 0), ("take", 2, 5), ("drop", 2, 0)]
    assert (live_peak(trace), exact_key_pool(trace)) == (8, 8)
    assert exact_key_pool([*trace, ("take", 3, 4)]) == 12


@pytest.mark.parametrize("causal", [False, True])
def test_both_forms_of_row_classes_attend_alike(causal: bool) -> None:
    """So that their times compare: the same plan, lowered from periods and from arrays, has the same results."""
    pattern = Dilated((16, 32, 64), (1, 2, 4), causal=causal)
    plan = pattern.plan(Rectangle(4, Span(0, 200), Span(0, 200)))
    q, k, v = (torch.randn(1, 200, 4, 16) for _ in range(3))
    calls = [
        bound_call(q, k, v, pattern, *form) for form in ((0.25, from_periods(plan)), (0.2500001, from_arrays(plan)))
    ]
    outs = [call() for call in calls]
    torch.testing.assert_close(outs[0].out, outs[1].out, atol=1e-5, rtol=0)
    torch.testing.assert_close(outs[0].lse, outs[1].lse, atol=1e-5, rtol=0)
