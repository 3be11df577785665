"""Calls with few query rows: the native row streams their keys in ranges, and is held to what every row is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.kernels import attend
from longattn.kernels.native import row
from longattn.kernels.native.building import refusal
from longattn.kernels.native.cpu import levels
from longattn.kernels.poison import poisoned_memory
from longattn.kernels.testing import TERMS, Case, check_backend, run_case
from longattn.patterncache import Dilated, Full, Pattern, Window

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))

DTYPES = row.CAPABILITY.dtypes_on("cpu")
PATTERNS = [Full(), Full(causal=True), Window(7), Window(1500), Window(9, causal=False), Dilated((4, 64), (1, 2))]


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the library."""
    monkeypatch.setenv("LONGATTN_NATIVE", request.param)
    return request.param


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library's entries that calls went through."""
    seen, plain = [], row._run
    monkeypatch.setattr(row, "_run", lambda call, entry, *rest: (seen.append(entry), plain(call, entry, *rest))[1])
    return seen


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(
    rows=st.integers(1, 17),
    keys=st.integers(0, 2200),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 8)]),
    dim=st.sampled_from([1, 8, 33, 64, 80]),
    value_dim=st.sampled_from([None, None, 7, 64, 192]),
    padding=st.booleans(),
    terms=st.sampled_from([(), (), *TERMS]),
)
@settings(max_examples=settings().max_examples // 6)
def test_few_rows_over_any_number_of_keys(
    pattern: Pattern, dtype: torch.dtype, rows, keys, heads, dim, value_dim, padding, terms
):
    """Out and lse, and gradients, which come through the other kernel from this one's out and lse."""
    keys = max(keys, rows)
    check_backend(
        "native",
        Case(
            pattern,
            (rows, keys),
            batch=2,
            kv_heads=heads[0],
            group=heads[1],
            head_dim=dim,
            value_head_dim=value_dim,
            dtype=dtype,
            padding=padding,
            terms=terms,
        ),
    )


@pytest.mark.parametrize(
    ("case", "short"),
    [
        (Case(Full(causal=True), (1, 3000)), True),
        (Case(Window(40), (16, 3000), padding=True), True),
        (Case(Dilated((64,), (2,)), (9, 40)), True),
        (Case(Full(), (1, 100), terms=TERMS[-1]), True),
        (Case(Full(), (65, 100), group=1), False),
        (Case(Full(), (1, 100), mask="k"), False),
        (Case(Full(), (1, 100), mask="+k"), False),
        (Case(Full(), (1, 100), prior=True), False),
        (Case(Full(), (1, 100), dropout_p=0.5), False),
    ],
    ids=str,
)
def test_which_calls_are_short(case: Case, short: bool, entries: list[str]):
    """Without mask, bias, dropout and prior, few rows over evenly spaced keys."""
    with torch.no_grad():
        run_case(case, case.tensors(), backend="native")
    assert (set(entries) == {"longattn_attend_short"}) == short


@pytest.mark.parametrize("group", [1, 3, 16])
def test_heads_that_a_job_has_in_part(group: int, entries: list[str]):
    """heads="split" gives a job some heads of a group: they are read one by one."""
    case = Case(Dilated((64, 64), (1, 2), heads="split"), (3, 3), batch=1, kv_heads=2, group=group)
    check_backend("native", case)
    assert "longattn_attend_short" in entries


def test_scratch_full_of_nan():
    """Parts are written before they are read."""
    case = Case(Full(causal=True), (5, 2500), kv_heads=1, group=2, head_dim=40, padding=True)
    plain = run_case(case, case.tensors(), backend="native")
    with poisoned_memory():
        state = run_case(case, case.tensors(), backend="native")
    assert torch.equal(state.out, plain.out) and torch.equal(state.lse, plain.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads(dtype: torch.dtype):
    """Ranges depend on the number of keys alone."""
    q, k, v = (torch.randn(1, n, 1, 64).to(dtype) for n in (4, 9000, 9000))
    before, outs = torch.get_num_threads(), []
    try:
        for many in (1, 2, 3, 3, 8):
            torch.set_num_threads(many)
            outs.append(attend(q, k, v, Full(causal=True), backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x.out, outs[0].out) and torch.equal(x.lse, outs[0].lse) for x in outs)
