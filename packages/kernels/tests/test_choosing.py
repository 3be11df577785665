"""The row chosen by evidence: legal whatever the figures say, the same every time, and in the fixed order where that is asked for."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longattn.kernels import attend, cachefolder, explain, reference_attention
from longattn.kernels.dispatch import choosing, keeping, probing, rates
from longattn.kernels.dispatch.prepared import PREPARED
from longattn.kernels.dispatch.processor import processor, processor_of
from longattn.kernels.dispatch.rates import Figures, checked, figures_of
from longattn.kernels.dispatch.table import row
from longattn.kernels.dispatch.work import FORMS, Work, form_of, work_of
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Span, Window

ROWS = ("native", "sdpa", "gather", "tiled", "tiled_k_major")
HEAD_DIM = 8


def numbers(rate: float, overhead_us: float = 1.0) -> rates.Numbers:
    """Figures of a row that computes every form at one rate."""
    known = {"overhead_us": overhead_us, **{f"{form} 64": rate for form in FORMS}}
    return {"forward": known, "backward": known}


@pytest.fixture(autouse=True)
def by_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What users have."""
    monkeypatch.delenv("LONGATTN_CHOICE")


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A processor without shipped figures, and a cache folder without kept ones."""
    monkeypatch.setattr(rates, "shipped_figures", lambda *_: None)
    monkeypatch.setattr(keeping, "_believed", {})
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LONGATTN_NATIVE", "0")
    return tmp_path / "cache"


def given_figures(monkeypatch: pytest.MonkeyPatch, table: dict[str, rates.Numbers]) -> None:
    """From now on rows are as fast as the table says."""
    PREPARED.clear()
    monkeypatch.setattr(choosing, "figures_of", lambda row, *_: Figures(table[row.split()[0]], "a test"))


RATES = st.fixed_dictionaries(
    {
        name: st.builds(numbers, st.floats(1e-3, 1e6, allow_nan=False), st.floats(1e-3, 1e6, allow_nan=False))
        for name in ROWS
    }
)
PATTERNS = st.sampled_from(
    [
        Full(),
        Full(causal=True),
        Window(3),
        Dilated((4, 8), (1, 2), causal=True),
        Dilated((4, 8), (1, 2), heads="split"),
        BlockSparse(4, torch.tensor([[True, False, True], [False, True, False], [True, True, True]]).numpy()),
    ]
)


@given(
    table=RATES,
    pattern=PATTERNS,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    grad=st.booleans(),
    dropout=st.booleans(),
    queries=st.sampled_from([1, 12]),
)
def test_whatever_the_figures_say_the_row_is_legal_and_right(
    table: dict[str, rates.Numbers], pattern: Pattern, dtype: torch.dtype, grad: bool, dropout: bool, queries: int
) -> None:
    """Outputs and gradients are the oracle's, and the row is one that says that it can."""
    with pytest.MonkeyPatch.context() as patch:
        given_figures(patch, table)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n, 4, HEAD_DIM, generator=generator).to(dtype) for n in (queries, 12, 12))
        found = explain(pattern, q.shape, k.shape, dtype=dtype, requires_grad=grad, dropout=dropout)
        legal = {name for name, reasons in found.rows if not reasons}
        assert found.backend in legal and {name for name, *_ in found.expected} == legal
        assert found.order.startswith("by expected time")
        if dropout:
            return
        chosen, asked = [], row(found.backend)
        patch.setattr(choosing, "row", lambda name: chosen.append(name) or row(name))
        for x in (q, k, v):
            x.requires_grad_(grad)
        state = attend(q, k, v, pattern)
        assert chosen[-1] == found.backend
        counts = torch.from_numpy(pattern.counts(Rectangle(4, Span(12 - queries, queries), Span(0, 12))).copy())
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        truth = reference_attention(*exact, counts)
        absolute, relative = asked.capability.tolerance[dtype]
        torch.testing.assert_close(state.out.double(), truth.out, atol=absolute, rtol=relative)
        if grad:
            upstream = torch.ones_like(state.out)
            got = torch.autograd.grad(state.out, (q, k, v), upstream)
            wanted = torch.autograd.grad(truth.out, exact, upstream.double())
            for mine, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine.double(), theirs, atol=4 * absolute, rtol=4 * relative)


def test_the_least_expected_time_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with a high rate wins long calls, one that costs little a call wins short ones; of equals the first in the table."""
    table = {name: numbers(1.0, 1.0) for name in ROWS}
    given_figures(monkeypatch, table)
    assert explain(Full(), (1, 64, 2, 8), dtype=torch.float64).backend == "sdpa"
    table["tiled"] = numbers(1000.0, 500.0)
    found = explain(Full(), (1, 1024, 2, 64), dtype=torch.float64)
    assert found.backend == "tiled"
    seconds = {name: x for name, x, _ in found.expected}
    assert seconds["tiled"] == pytest.approx(500e-6 + 4 * 2 * 1024 * 1024 * 64 / 1000e9)
    assert "tiled: chosen; 1.04 ms of CPU time expected, a test" in str(found)
    assert explain(Full(), (1, 16, 2, 8), dtype=torch.float64).backend == "sdpa"


def test_gradients_count_in_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is slow backwards serves calls without gradients alone."""
    table = {name: numbers(1.0) for name in ROWS}
    table["sdpa"] = {"forward": numbers(10.0)["forward"], "backward": numbers(0.01)["backward"]}
    given_figures(monkeypatch, table)
    chosen = [explain(Full(), (1, 256, 2, 8), dtype=torch.float64, requires_grad=x).backend for x in (False, True)]
    assert chosen == ["sdpa", "gather"]


@pytest.mark.parametrize(
    ("options", "setting", "words"),
    [
        ({}, "fixed", "fixed: LONGATTN_CHOICE=fixed"),
        ({"deterministic": True}, "", "fixed: deterministic=True"),
        ({"backend": "sdpa"}, "", "fixed: backend is named"),
        ({"device": "cuda"}, "", "fixed: no figures are kept for cuda"),
    ],
)
def test_the_fixed_order_says_why(
    options: dict[str, Any], setting: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row that fits serves, whatever the figures say."""
    given_figures(monkeypatch, {name: numbers(1e6 if name == "tiled" else 1.0) for name in ROWS})
    monkeypatch.setenv("LONGATTN_CHOICE", setting)
    found = explain(Full(), (1, 256, 2, 8), dtype=torch.float32, **options)
    assert (found.order, found.expected) == (words, ())
    assert found.backend == next(name for name, why in found.rows if not why and name == options.get("backend", name))


def test_a_prepared_call_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """LONGATTN_CHOICE is part of what a call is looked up by."""
    given_figures(monkeypatch, {name: numbers(1e6 if name == "gather" else 1.0) for name in ROWS})
    served: list[str] = []
    monkeypatch.setattr(choosing, "row", lambda name: served.append(name) or row(name))
    q = torch.randn(1, 16, 2, 8, dtype=torch.float64)
    for setting, expected in (("evidence", "gather"), ("fixed", "sdpa"), ("evidence", None)):
        served.clear()
        monkeypatch.setenv("LONGATTN_CHOICE", setting)
        attend(q, q, q, Full())
        assert (served[-1] if served else None) == expected


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with what it may be."""
    monkeypatch.setenv("LONGATTN_CHOICE", "quickest")
    with pytest.raises(ValueError, match="LONGATTN_CHOICE must be evidence .* or fixed, got 'quickest'"):
        explain(Full(), (1, 16, 2, 8))


def test_rows_are_measured_once_and_never_again(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` measures nothing; the first call does and keeps it; another process would read the files."""
    before = explain(Full(), (1, 32, 2, 8), dtype=torch.float64)
    assert before.order == "fixed: not every row has figures" and "sdpa: chosen; not measured yet" in str(before)
    assert not nothing_known.exists()
    state = torch.get_rng_state()
    q = torch.randn(1, 32, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(probing, "TOKENS", 64)
    attend(q, q, q, Full())
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(nothing_known.glob("rates-*.json"))
    assert len(files) == 4 and all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    monkeypatch.setattr(choosing, "probe", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(keeping, "_believed", {})
    PREPARED.clear()
    attend(q, q, q, Full())
    found = explain(Full(), (1, 32, 2, 8), dtype=torch.float64)
    assert found.order == "by expected time, as dense" and "measured once on this machine, 1 thread" in str(found)


def test_a_damaged_file_is_set_aside_with_a_warning(
    nothing_known: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is measured again, but not silently."""
    measured: list[int] = []

    def measure() -> rates.Numbers:
        measured.append(1)
        return numbers(2.0)

    for said in (None, "{", '{"value": {"forward": {"overhead_us": 1, "dense 64": NaN}}}', '{"value": 3}'):
        monkeypatch.setattr(keeping, "_believed", {})
        if said is not None:
            next(iter(nothing_known.glob("rates-*.json"))).write_text(said)
        found = figures_of("some row", "1", torch.float32, measure)
        assert isinstance(found, Figures) and found.numbers == numbers(2.0)
    assert len(measured) == 4 and len(list(nothing_known.glob("*.damaged"))) == 1
    assert caplog.text.count("is damaged, so it is measured again") == 3


def test_where_nothing_can_be_kept_nothing_is_measured(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process would choose otherwise each time: the order is fixed, and says why."""
    nothing_known.mkdir()
    nothing_known.chmod(0o777)
    monkeypatch.setattr(choosing, "probe", lambda *_: pytest.fail("measured"))
    q = torch.randn(1, 32, 2, 8, dtype=torch.float64)
    attend(q, q, q, Full())
    found = explain(Full(), (1, 32, 2, 8), dtype=torch.float64)
    assert found.backend == "sdpa" and "is writable by others" in str(found)


def test_two_processes_keep_the_first_figure(tmp_path: Path) -> None:
    """Both get what the first one kept, and nobody reads half a file."""
    folder = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from longattn.kernels import cachefolder;"
        "print(cachefolder.keep_text(Path(sys.argv[1]), 'figure', sys.argv[2]))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(n) * 5000], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    said = {process.communicate()[0].strip() for process in running}
    assert said == {(folder / "figure").read_text()} and len(next(iter(said))) == 5000
    assert [path.name for path in folder.iterdir()] == ["figure"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_a_file_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    """Nor a link: it is replaced by what is measured."""
    cachefolder.keep_text(tmp_path / "own", "figure", "mine")
    (tmp_path / "own" / "figure").chmod(0o666)
    assert cachefolder.read_text(tmp_path / "own", "figure") is None
    assert cachefolder.keep_text(tmp_path / "own", "figure", "mine again") == "mine again"
    assert cachefolder.read_text(tmp_path / "own", "figure") == "mine again"
    (tmp_path / "own" / "link").symlink_to(tmp_path / "own" / "figure")
    assert cachefolder.read_text(tmp_path / "own", "link") is None


def test_forms_that_were_not_measured_have_the_share_of_a_known_processor() -> None:
    """rate(form) = what the dense one is here x what that form has of the dense one there; the nearest head size."""
    like = {"forward": {"overhead_us": 9.0, "dense 64": 100.0, "dense 128": 120.0, "band 64": 25.0, "band 128": 30.0}}
    here = Figures({"forward": {"overhead_us": 2.0, "dense 64": 10.0}}, "here", like)
    for work, rate in ((Work("band", 1000, 64), 2.5), (Work("band", 1000, 200), 3.0), (Work("short", 1000, 64), 10.0)):
        assert here.seconds(work, "forward") == pytest.approx(2e-6 + work.operations("forward") / (rate * 1e9))
    measured = Figures(like, "there")
    assert measured.seconds(Work("band", 1000, 90), "forward") == pytest.approx(9e-6 + 4 * 1000 * 90 / 25e9)


@pytest.mark.parametrize(
    ("form", "pattern", "queries", "keys", "pairs"),
    [
        ("dense", Full(), 96, 96, 96 * 96),
        ("causal", Full(causal=True), 96, 96, 96 * 97 // 2),
        ("band", Window(8), 96, 96, 8 * 96 - 28),
        ("strided", Dilated((16, 32), (1, 2)), 96, 96, 96 * 16 + 3 * 16 * 16),
        (
            "listed",
            BlockSparse(32, torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool().numpy()),
            96,
            96,
            5 * 32 * 32,
        ),
        ("short", Full(causal=True), 2, 96, 95 + 96),
        ("dense", Full(), 2, 8, 16),
    ],
)
def test_form_and_pairs_of_plans(form: str, pattern: Pattern, queries: int, keys: int, pairs: int) -> None:
    """Exactly, for two heads and three batch elements."""
    plan = pattern.plan(Rectangle(2, Span(keys - queries, queries), Span(0, keys)))
    assert form_of(plan) == form
    work = work_of(plan, 3, 16)
    assert work == Work(form, 6 * pairs, 16)
    assert (work.operations("forward"), work.operations("backward")) == (4 * 6 * pairs * 16, 10 * 6 * pairs * 16)


def test_what_is_shipped_is_whole() -> None:
    """Every row, dtype, direction, form and head size, and finite."""
    for table in rates.shipped():
        assert set(table) == {"processor", "torch", "date", "threads", "rows"} and table["threads"]
        assert {name.split()[0] for name in table["rows"]} == set(ROWS)
        for name, by_dtype in table["rows"].items():
            capability = row(name.split()[0]).capability
            assert set(by_dtype) == {str(dtype)[6:] for dtype in capability.dtypes_on("cpu")}
            for found in by_dtype.values():
                assert checked(found) == found and set(found) == {"forward", "backward"}
                for known in found.values():
                    assert set(known) == {"overhead_us", *(f"{form} {d}" for form in FORMS for d in (64, 128))}


def test_a_processor_is_known_by_family_and_vector_units() -> None:
    """Not by a name that its renter may have shortened."""
    x86 = {"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2", "flags": "fpu avx2 avx512f amx_bf16"}
    assert processor_of(x86, "x86_64", "") == "AuthenticAMD-26-2+avx2+avx512f+amx_bf16"
    arm = {"CPU implementer": "0x41", "CPU part": "0xd40", "Features": "fp asimd sve bf16"}
    assert processor_of(arm, "aarch64", "") == "0x41-0xd40+asimd+sve+bf16"
    assert processor_of({}, "arm64", "Apple M2") == "arm64-Apple_M2"
    assert processor() == processor()


def test_kept_figures_are_readable(nothing_known: Path) -> None:
    """The file says what it is for."""
    figures_of("some row", "7", torch.float32, lambda: numbers(2.0))
    said = json.loads(next(iter(nothing_known.glob("rates-*.json"))).read_text())
    assert said["key"] == [torch.__version__, processor(), "1 threads", "some row", "7", "float32"]


def test_a_row_is_measured_whatever_the_caller_does(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults, modes and autocast of the caller's reach no measurement, and a measurement is not among what he counts."""
    monkeypatch.setattr(probing, "TOKENS", 32)
    q = torch.randn(1, 16, 2, 8)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            attend(q, q, q, Full())
        finally:
            torch.set_default_dtype(torch.float32)
    assert counter.get_total_flops() == 4 * 2 * 16 * 16 * 8
    assert len(list(nothing_known.glob("rates-*.json"))) == 4


def test_a_row_that_cannot_be_made_to_run_is_left_out(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiler fails when it is to be measured: the others are chosen from, and it says why from then on."""
    monkeypatch.setattr(probing, "TOKENS", 32)
    broken: list[str] = []
    first = row("sdpa")
    refusing = dataclasses.replace(
        first,
        prepare=lambda: broken.append("the compiler failed") or broken[0],
        refusal=lambda: broken[0] if broken else None,
    )
    monkeypatch.setattr(choosing, "row", lambda name: refusing if name == "sdpa" else row(name))
    monkeypatch.setattr(choosing, "refusals", lambda _: (("sdpa", broken[0]),) if broken else ())
    q = torch.randn(1, 16, 2, 8, dtype=torch.float64)
    assert attend(q, q, q, Full()).out.isfinite().all()
    found = choosing.explain_choice(
        explain(Full(), q.shape, dtype=q.dtype).problem,
        None,
        Full().plan(Rectangle(2, Span(0, 16), Span(0, 16))),
        1,
        measure=True,
    )
    assert broken == ["the compiler failed"] and "sdpa: the compiler failed" in str(found)
    assert {name for name, *_ in found.expected} == {"gather", "tiled", "tiled_k_major"}
