"""The case that asks whether the chosen row is the best one: its problems, its peers, and what it calls a miss."""

from pathlib import Path

import pytest
import torch

from benchmarks import choice, gate
from benchmarks.choice_problems import Problem, flex, problems, sdpa, tiny
from longattn.patterncache import Full, Window

DENSE = Problem("full", Full(), "float32", 2048, 4, 64, "forward", 2048)
NARROW = Problem("window 64", Window(64), "float32", 8192, 2, 64, "forward", 8192)


def test_there_are_problems_enough_and_each_is_known_by_its_key() -> None:
    """Every dtype, head size, direction, pattern and kind of short call that was asked for."""
    every = list(problems())
    assert len(every) >= 60 and len({problem.key for problem in every}) == len(every)
    names = {"full", "causal", "window 64", "window 512", "longnet", "longnet causal", "split", "short"}
    assert {problem.name for problem in every} == names | {f"blocks {share} hidden" for share in ("50%", "90%", "98%")}
    assert {(p.dtype, p.head_dim) for p in every} == {
        (d, n) for d in ("float32", "bfloat16", "float16") for n in (64, 128)
    }
    assert {p.heads for p in every if p.name == "short"} == {1, 8}
    assert {(p.seq_len) for p in every if p.name == "short"} == {512, 4096, 32768}


@pytest.mark.parametrize(("problem", "share"), [(DENSE, 1.0), (NARROW, (64 * 8192 - 64 * 63 / 2) / 8192**2)])
def test_share_of_pairs_that_are_seen(problem: Problem, share: float) -> None:
    """Counted from the plan."""
    assert problem.seen == share


@pytest.mark.parametrize(
    ("problem", "cpu", "regret", "said"),
    [
        (DENSE, {"native": 1.0, "sdpa": 2.0, "dense SDPA": 2.0, "FlexAttention": 0.5}, 1.0, "met"),
        (DENSE, {"native": 2.2, "sdpa": 2.0, "dense SDPA": 2.1, "FlexAttention": 9.0}, 1.1, "met"),
        (DENSE, {"native": 2.2, "sdpa": 3.0, "dense SDPA": 2.0, "FlexAttention": 9.0}, 1.1, "missed: 1.10 of dense SDPA > 1.05"),
        (NARROW, {"native": 1.0, "sdpa": 0.8, "dense SDPA": 0.5}, 1.25, "missed: regret 1.25 > 1.1, sdpa is faster; 2.00 of dense SDPA, not faster"),
    ],
)  # fmt: skip
def test_what_is_a_miss(problem: Problem, cpu: dict[str, float], regret: float, said: str) -> None:
    """Regret counts what computes the same; dense SDPA is a bound where few pairs are seen; FlexAttention stands beside."""
    assert choice.verdict(problem, "native", cpu) == (pytest.approx(regret), said)


@pytest.mark.parametrize("rows", [1, 5, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_is_about_the_last_rows(rows: int, causal: bool) -> None:
    """Causal from the end, as ours."""
    problem = Problem("short", Full(causal=causal), "float32", 24, 2, 8, "forward", rows)
    q, k, v, _ = problem.tensors()
    counts = torch.from_numpy(problem.pattern.counts(problem.rectangle).copy())
    wanted = gate.reference_attention(q.double(), k.double(), v.double(), counts).out
    torch.testing.assert_close(sdpa(problem)(q, k, v).double(), wanted, atol=2e-6, rtol=2e-5)


def test_flex_stands_beside_long_forwards_alone() -> None:
    """It is not compiled for what it cannot do, or for a few tokens."""
    assert all(flex(problem) is None for problem in tiny())
    assert flex(Problem("full", Full(), "float32", 2048, 4, 64, "forward+backward", 2048)) is None


def test_quick_run_measures_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every contender is held to the oracle; the best and the chosen one are shown."""
    threads = torch.get_num_threads()
    try:
        assert choice.main(["--quick", "--threads", "1", "--rounds", "1", "--results", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "3 problems: median regret" in shown and "*" in shown and not list(tmp_path.iterdir())
