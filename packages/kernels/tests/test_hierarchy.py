"""What a call moves through a machine's memory, counted: exactly, from small plans and small machines."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import explain
from longattn.kernels.hierarchy import MACHINES, Level, Machine, _met, machine_of, traffic_of
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Span, Window


def toy(capacity: int) -> Machine:
    """One level, and memory that gives a kilobyte a second; a thousand FLOP a second in float32."""
    return Machine("toy", (Level("cache", capacity, None), Level("memory", None, 1024.0)), {32: 1000.0})


# 64 tokens, one head of 8 floats: a row is 32 bytes. Forward: q and out own, 64 bytes a row; k and v stream, 64 bytes.
# Backward: k, v, dk and dv own, 128 bytes; q, dO and dq stream, 96 bytes.
FORWARD, BACKWARD = 64 * 64 + 64 * 64, 64 * 128 + 64 * 96
EXACT: list[tuple[Pattern, int, bool, int]] = [
    (Full(), 8192, False, FORWARD),  # half of it holds every key
    (Full(), 4096, False, 64 * 64 + 2 * 64 * 64),  # 32 queries at a time, each time all 64 keys
    (Full(causal=True), 4096, False, 64 * 64 + (32 + 64) * 64),
    (Window(4), 4096, False, 64 * 64 + (32 + 35) * 64),
    (Full(), 16384, True, FORWARD + BACKWARD),
    (Full(), 4096, True, 64 * 64 + 2 * 64 * 64 + 64 * 128 + 4 * 64 * 96),  # 16 keys at a time
    (Full(causal=True), 4096, True, 64 * 64 + 96 * 64 + 64 * 128 + (64 + 48 + 32 + 16) * 96),
    (Window(4), 4096, True, 64 * 64 + 67 * 64 + 64 * 128 + (19 + 19 + 19 + 16) * 96),
    (Dilated((32,), (2,)), 4096, False, 2 * (16 * 64 + 16 * 64)),
]


@pytest.mark.parametrize(("pattern", "capacity", "backward", "expected"), EXACT)
def test_bytes_into_a_level(pattern: Pattern, capacity: int, backward: bool, expected: int) -> None:
    """For two heads and three batch elements six times as many."""
    for heads, batch in ((1, 1), (2, 3)):
        plan = pattern.plan(Rectangle(heads, Span(0, 64), Span(0, 64)))
        found = traffic_of(plan, batch, 8, 4, backward, toy(capacity))
        assert found.into == (("cache", expected * heads * batch),)
        pairs = sum(b.pairs * b.heads.length for b in plan.branches)
        assert found.operations == (14 if backward else 4) * pairs * 8 * batch
        assert found.seconds == (("products", found.operations / 1000), ("memory", expected * heads * batch / 1024))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.booleans(), st.booleans())
def test_rows_that_a_block_meets(n: int, ahead: int, size: int, block: int, causal: bool, keys_own: bool) -> None:
    """As counting each pair says."""
    pattern = Window(size, causal=causal)
    for branch in pattern.plan(Rectangle(1, Span(ahead, n), Span(0, n + ahead))).branches:
        if not branch.uniform or branch.band is None:
            continue
        shown = np.broadcast_to(branch.visible, (1, branch.q.count, branch.k.count))[0]  # type: ignore[arg-type]
        shown = shown.T if keys_own else shown
        first = np.arange(0, len(shown), block)
        last = np.minimum(first + block, len(shown)) - 1
        span = [np.flatnonzero(shown[a : b + 1].any(0)) for a, b in zip(first, last, strict=True)]
        expected = [int(s[-1] - s[0] + 1) if len(s) else 0 for s in span]
        assert _met(branch, first, last, keys_own).tolist() == expected


def test_explain_says_what_limits() -> None:
    """The text names machine, work, levels and the limit."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "architecture": "sm_90"}
    found = explain(Full(), (1, 8192, 8, 128), verbose=True, **options)
    assert found.traffic is not None and found.traffic.machine is MACHINES["H100"]
    assert found.traffic.operations == 4 * 8192 * 8192 * 8 * 128
    assert "on H100: 275 GFLOP; into shared memory 1216.0 MiB, L2 64.0 MiB; at least 0.278 ms, for products" in str(
        found
    )
    assert "GFLOP" not in (brief := str(explain(Full(), (1, 8192, 8, 128), **options))) and "on H100" not in brief
    named = explain(Full(), (1, 64, 1, 8), verbose=True, machine="Sapphire Rapids").traffic
    assert named is not None and named.machine.name == "Sapphire Rapids"


def test_machines_are_known_by_processor_or_architecture() -> None:
    """Or are to be named."""
    assert machine_of(None, "AuthenticAMD-26-2+avx2").name == "Zen 5"
    assert machine_of(None, "gfx942").name == "MI300X"
    for name, known_by, said in (
        ("H1000", "", "'H1000'"),
        (None, "riscv64", "None, on riscv64"),
        (None, "", "None, on a device"),
    ):
        with pytest.raises(ValueError, match=f"machine must be one of A100, .*got {said}"):
            machine_of(name, known_by)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_states_the_errors_of_this_call(grad: bool, dtype: torch.dtype) -> None:
    """Of outputs, and of gradients where they are asked for; within the row's tolerance; on the tensors that are given."""
    pattern, shape = Dilated((8, 16), (1, 2), causal=True), (2, 40, 4, 8)
    found = explain(pattern, shape, (2, 40, 2, 8), dtype=dtype, requires_grad=grad, verify=True)
    assert found.errors is not None
    assert [name for name, _ in found.errors] == ["out", "lse", *(["dq", "dk", "dv"] if grad else [])]
    assert all(error <= (1e-4 if dtype == torch.float32 else 1e-9) for _, error in found.errors)
    assert "sampled rows beside float64, largest error: out " in str(found)
    q, k, v = (torch.full((1, 12, 1, 4), float(n), dtype=dtype) for n in range(3))
    assert dict(explain(Full(), q.shape, dtype=dtype, verify=(q, k, v)).errors or ()) == {
        "out": 0.0,
        "lse": pytest.approx(0.0, abs=1e-6),
    }


def test_verify_sees_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a hundredth is stated as that."""
    from longattn.kernels import verifying

    attend = verifying.attend

    def off(*arguments: Any, **options: Any) -> Any:
        state = attend(*arguments, **options)
        return type(state)(state.out + 0.01, state.lse)

    monkeypatch.setattr(verifying, "attend", off)
    errors = dict(explain(Full(), (1, 16, 2, 8), verify=True).errors or ())
    assert errors["out"] == pytest.approx(0.01, rel=1e-3) and errors["lse"] < 1e-5


def test_rows_that_see_nothing_are_no_error() -> None:
    """-inf beside -inf, and zero beside zero."""
    assert dict(explain(Full(), (1, 1, 1, 8), (1, 0, 1, 8), verify=True).errors or ())["lse"] == 0.0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"verify": True, "dropout": True}, ValueError, "verify must be False with dropout"),
        ({"verify": "yes"}, TypeError, "verify must be a bool or a triple of tensors"),
        (
            {"verify": (torch.zeros(1, 8, 2, 4),) * 3},
            ValueError,
            "verify must have q of torch.float32 .*got torch.float32",
        ),
        ({"verbose": 1}, TypeError, "verbose must be"),
    ],
)
def test_what_cannot_be_verified_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """By name."""
    with pytest.raises(error, match=words):
        explain(Full(), (1, 8, 2, 8), **options)
