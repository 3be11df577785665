"""What the Triton kernels are told: row classes and job tables say exactly the plan's counts. No triton is needed for any of it."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from longattn.kernels.lowering.head_classes import head_classes
from longattn.kernels.triton.decode_tables import decode_tables, tables_of_tokens
from longattn.kernels.triton.dense_tables import DENSE_JOB_FIELDS, split_dense
from longattn.kernels.triton.joblist import ENTRY_FIELDS, JOB_FIELDS, JobTables
from longattn.kernels.triton.passes import copied, key_tables, packable, query_passes, query_tables
from longattn.kernels.triton.row_classes import row_classes
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Plan, Rectangle, Restrict, Span, Strided, Window
from longattn.patterncache.testing import patterns, spans

LONGNET = Dilated((16, 32, 64), (1, 2, 4))
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
BLOCK = (8, 4)
COPIED = ("jobs", "entries", "weights", "rows")

Counts = npt.NDArray[np.int64]


def members(table: npt.NDArray[np.int32], at: int, fields: tuple[str, ...]) -> dict[str, int]:
    """One line of a table, by name."""
    return dict(zip(fields, map(int, table[at]), strict=True))


def rows_of(tables: JobTables, line: dict[str, int]) -> Counts:
    """The rows of a job or an entry, as a kernel finds them."""
    found = line["start"] + np.arange(line["count"]) * line["step"]
    return tables.rows[found].astype(np.int64) if tables.listed else found


def add_counts(total: Counts, tables: JobTables, *, own_keys: bool, pack: int = 1, group: int = 1) -> None:
    """Add what a launch over these tables would count to (heads, queries, keys)."""
    for number in range(len(tables.jobs)):
        job = members(tables.jobs, number, JOB_FIELDS)
        owned = rows_of(tables, job)
        assert len(owned) <= (BLOCK[0] if pack == 1 else max(1, BLOCK[0] // pack)) and tables.tiles[number] >= 0
        for at in range(job["dense"], job["end"]):
            entry = members(tables.entries, at, ENTRY_FIELDS)
            met = rows_of(tables, entry)
            distance = (job["origin"] + job["scale"] * owned)[:, None] - (entry["origin"] + entry["scale"] * met)[None]
            seen = (distance >= entry["low"]) & (distance <= entry["high"])
            if at < job["edge"]:
                assert seen.all() and len(met) % BLOCK[1] == 0, "a dense entry has whole tiles that are all visible"
            seen = seen * round(2 ** float(tables.weights[at]))
            for member in range(pack):
                head = job["head"] * (group if own_keys else pack) + (entry["member"] if own_keys else member)
                if own_keys:
                    np.add.at(total[head], (met[None, :], owned[:, None]), seen)
                else:
                    np.add.at(total[head], (owned[:, None], met[None, :]), seen)


def planned(pattern: Pattern, heads: int, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> Plan | None:
    """The plan, or None where the pattern has no meaning there."""
    try:
        return pattern.plan(Rectangle(heads, queries, keys))
    except ValueError:
        return None


SOME_SPANS = st.lists(spans(), min_size=1, max_size=2).map(tuple)


@given(pattern=patterns(), heads=st.integers(1, 4), queries=SOME_SPANS, keys=SOME_SPANS, parts=st.integers(1, 3))
@example(pattern=LONGNET, heads=4, queries=(Span(0, 70),), keys=(Span(0, 70),), parts=1)
@example(pattern=LISTED, heads=2, queries=(Span(0, 30),), keys=(Span(0, 30),), parts=2)
def test_what_queries_are_told_is_the_plan(
    pattern: Pattern, heads: int, queries: tuple[Span, ...], keys: tuple[Span, ...], parts: int
):
    """The launches of a plan, added, are its counts, however the keys are split."""
    plan = planned(pattern, heads, queries, keys)
    if plan is None:
        return
    total = np.zeros(plan.rectangle.shape, np.int64)
    for number in range(len(query_passes(plan).launches)):
        add_counts(total, query_tables(plan, number, BLOCK, parts=parts), own_keys=False)
    assert (total == plan.counts()).all()


@given(
    pattern=patterns(),
    group=st.integers(1, 2),
    length=st.integers(1, 90),
    past=st.integers(0, 40),
    parts=st.integers(1, 4),
)
@example(pattern=LONGNET, group=2, length=90, past=0, parts=3)
@example(pattern=Window(9, sinks=2), group=1, length=50, past=3, parts=2)
def test_what_a_single_query_is_told_is_the_plan(pattern: Pattern, group: int, length: int, past: int, parts: int):
    """A decoder step, whose tables are worked out branch by branch, packed or not."""
    plan = planned(pattern, 2 * group, (Span(length - 1, 1),), (Span(past, length),))
    if plan is None or not packable(plan, group):
        return
    total = np.zeros(plan.rectangle.shape, np.int64)
    for number in range(len(query_passes(plan).launches)):
        add_counts(total, query_tables(plan, number, BLOCK, group, parts), own_keys=False, pack=group)
    assert (total == plan.counts()).all()


@given(pattern=patterns(), group=st.integers(1, 2), length=st.integers(1, 90), parts=st.integers(1, 4))
@example(pattern=LONGNET, group=2, length=60, parts=3)
@example(pattern=Window(9, sinks=2), group=1, length=5, parts=2)
@example(pattern=Full(causal=True), group=1, length=1, parts=4)
def test_tables_of_tokens_together_are_those_of_each(pattern: Pattern, group: int, length: int, parts: int):
    """Of nine lengths of a cache that grows, equal numbers, also as they are copied to a device."""
    plans = [planned(pattern, 2 * group, (Span(n - 1, 1),), (Span(0, n),)) for n in range(length, length + 9)]
    served = [plan for plan in plans if plan is not None and packable(plan, group)]
    together = tables_of_tokens(served, BLOCK[1], group, parts)
    for plan, tables in zip(served, together, strict=True):
        alone = decode_tables(plan, plan.branches, BLOCK[1], group, parts)
        assert (tables is None) == (alone is None)
        if tables is not None and alone is not None:
            assert all(np.array_equal(getattr(tables, name), getattr(alone, name)) for name in COPIED)
    filled = [tables for tables in together if tables is not None]
    for tables, on_device in zip(filled, copied(filled, torch.device("cpu")) if filled else [], strict=True):
        for name in COPIED:
            flat = getattr(tables, name).ravel()
            assert np.array_equal(getattr(on_device, name)[: flat.size].numpy(), flat)
        assert on_device.count == len(tables.jobs)


@given(pattern=patterns(), heads=st.integers(1, 3), queries=SOME_SPANS, keys=SOME_SPANS, owned=st.sampled_from([4, 8]))
@example(pattern=Dilated((32, 64), (1, 2)), heads=2, queries=(Span(0, 130),), keys=(Span(0, 130),), owned=4)
@example(pattern=LONGNET, heads=4, queries=(Span(0, 100),), keys=(Span(0, 100),), owned=8)
@example(pattern=Full(causal=True), heads=1, queries=(Span(0, 50),), keys=(Span(0, 50),), owned=8)
def test_dense_tiles_and_the_rest_are_the_launch(
    pattern: Pattern, heads: int, queries: tuple[Span, ...], keys: tuple[Span, ...], owned: int
):
    """Rows that a descriptor addresses, all of them visible, and what the kernel that masks is left with."""
    plan = planned(pattern, heads, queries, keys)
    if plan is None or plan.listed:
        return
    total = np.zeros(plan.rectangle.shape, np.int64)
    for number in range(len(query_passes(plan).launches)):
        split = split_dense(query_tables(plan, number, BLOCK), BLOCK[1], owned)
        assert split.rest is None or split.rest.jobs[:, 3].max() <= owned
        if split.rest is not None:
            add_counts(total, split.rest, own_keys=False)
        for line in range(len(split.dense.jobs)):
            job = members(split.dense.jobs, line, DENSE_JOB_FIELDS)
            assert job["end"] - job["begin"] == split.dense.tiles[line] and 0 < job["count"] <= BLOCK[0]
            owned_rows = job["start"] + np.arange(job["count"]) * job["step"]
            for at in range(job["begin"], job["end"]):
                first, phase = map(int, split.dense.entries[at])
                met = (first + np.arange(BLOCK[1])) * job["modulus"] + phase
                assert phase < job["modulus"]
                times = round(2 ** float(split.dense.weights[at]))
                np.add.at(total[job["head"]], (owned_rows[:, None], met[None]), times)
    assert (total == plan.counts()).all()


def test_neighbouring_blocks_share_tiles():
    """A causal launch has as many tiles as its longest list, not as all lists together."""
    plan = Full(causal=True).plan(Rectangle(2, Span(0, 400), Span(0, 400)))
    split = split_dense(query_tables(plan, 0, BLOCK), BLOCK[1], 8)
    assert len(split.dense.entries) == split.dense.tiles.max() == 98 and split.pays


@given(pattern=patterns(), groups=st.integers(1, 2), group=st.integers(1, 3), queries=SOME_SPANS, keys=SOME_SPANS)
@example(pattern=LONGNET, groups=2, group=2, queries=(Span(0, 70),), keys=(Span(0, 70),))
def test_what_keys_are_told_is_the_plan(
    pattern: Pattern, groups: int, group: int, queries: tuple[Span, ...], keys: tuple[Span, ...]
):
    """Seen from the keys, grouped or not, it is the same plan; and every key row is owned by one job at most."""
    plan = planned(pattern, groups * group, queries, keys)
    if plan is None:
        return
    total = np.zeros(plan.rectangle.shape, np.int64)
    tables = key_tables(plan, group, BLOCK)
    add_counts(total, tables, own_keys=True, group=group)
    assert (total == plan.counts()).all()
    owned = np.zeros((groups, plan.rectangle.shape[2]), np.int64)
    for number in range(len(tables.jobs)):
        job = members(tables.jobs, number, JOB_FIELDS)
        owned[job["head"], rows_of(tables, job)] += 1
    assert owned.max(initial=0) <= 1


@pytest.mark.parametrize("pattern", [LONGNET, Full(), Window(5), Dilated((16,), (2,), causal=True)], ids=str)
def test_no_row_is_written_twice_in_a_launch(pattern: Pattern):
    """Programs of one launch run in any order, so they must not meet."""
    plan = pattern.plan(Rectangle(4, Span(0, 70), Span(0, 70)))
    for number in range(len(query_passes(plan).launches)):
        tables = query_tables(plan, number, BLOCK)
        seen = np.zeros((4, 70), np.int64)
        for at in range(len(tables.jobs)):
            job = members(tables.jobs, at, JOB_FIELDS)
            seen[job["head"], rows_of(tables, job)] += 1
        assert seen.max() == 1


def test_longnet_is_one_launch_of_unique_keys():
    """Not causal: one launch, longest jobs first, and about a fifth fewer pairs than branch by branch."""
    plan = Dilated((2048, 4096, 8192), (1, 2, 4)).plan(Rectangle(4, Span(0, 8192), Span(0, 8192)))
    (launch,) = query_passes(plan).launches
    tables = query_tables(plan, 0, (128, 128))
    assert launch.unique and (np.diff(tables.tiles) <= 0).all()
    unique = sum(
        found.owned.rows * found.met.rows * len(alike.owners)
        for alike in head_classes(4, launch.branches)
        for found in row_classes(alike.branches, own_keys=False, unique=True)
    )
    pairs = sum(branch.pairs * branch.heads.length for branch in plan.branches)
    assert 0.78 < unique / pairs < 0.83


def test_causal_longnet_goes_branch_by_branch():
    """Three branches whose rows overlap are three launches; the first covers every row, so nothing is filled before."""
    plan = Dilated((2048, 4096, 8192), (1, 2, 4), causal=True).plan(Rectangle(8, Span(0, 8192), Span(0, 8192)))
    passes = query_passes(plan)
    assert [launch.fresh for launch in passes.launches] == [True, False, False] and passes.complete


@pytest.mark.parametrize("length", [1 << 14, 1 << 20])
def test_affine_plans_have_tables_by_tile_not_by_row(length: int):
    """A window over a million tokens: one job a block of queries, a handful of entries a job, and no row is listed."""
    plan = Window(4096).plan(Rectangle(2, Span(0, length), Span(0, length)))
    tables = query_tables(plan, 0, (128, 128))
    assert len(tables.jobs) == 2 * length // 128 and len(tables.entries) <= 3 * length // 128 and len(tables.rows) == 1


def test_block_lists_stay_runs():
    """Blocks of 64 keys are entries of 64 rows, not rows; small blocks are gathered."""
    mask = np.random.default_rng(0).random((8, 8)) < 0.4
    plan = BlockSparse(64, mask).plan(Rectangle(1, Span(0, 512), Span(0, 512)))
    tables = query_tables(plan, 0, (64, 64))
    assert not tables.listed and tables.tiles.sum() == mask.sum()
    small = BlockSparse(4, mask).plan(Rectangle(1, Span(0, 32), Span(0, 32)))
    assert query_tables(small, 0, (64, 64)).listed


def test_cells_of_coprime_rates_are_bounded():
    """Rates whose common multiple is long give at most a cell a row."""
    plan = Dilated((400, 400, 400), (7, 11, 13)).plan(Rectangle(1, Span(0, 400), Span(0, 400)))
    total = np.zeros((1, 400, 400), np.int64)
    add_counts(total, query_tables(plan, 0, BLOCK), own_keys=False)
    assert (total == plan.counts()).all()
    assert sum(1 for _ in row_classes([(0, b) for b in plan.branches], own_keys=False, unique=True)) <= 400
