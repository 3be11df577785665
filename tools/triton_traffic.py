"""Bytes and floating-point operations of the Triton kernels, counted from the job tables: what a launch moves and multiplies.

Bytes are those between HBM (or L2) and a multiprocessor: every tile that a program loads counts, whether L2 has it or not. FLOPs are those
that are issued, masked scores and ragged tails included; `useful` counts visible pairs only, each as often as the plan says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longattn.kernels.triton.configurations import choose
from longattn.kernels.triton.joblist import ENTRY_FIELDS, JOB_FIELDS, JobTables
from longattn.kernels.triton.passes import key_tables, query_passes, query_tables
from longattn.patterncache import Dilated, Full, Plan, Rectangle, Span, Window

STATE = 4
"""Bytes of a number of the state: lse, delta, a float32 sum."""


@dataclass(frozen=True)
class KernelTraffic:
    """One kernel, for one batch element.

    Attributes:
        loaded, stored: bytes. added: bytes of float32 reduce-adds.
        flops: issued. useful: of visible pairs. jobs: blocks of rows that programs own.
    """

    loaded: int
    stored: int
    added: int
    flops: int
    useful: int
    jobs: int

    @property
    def intensity(self) -> float:
        """Issued FLOPs a byte loaded, stored or added."""
        return self.flops / max(1, self.loaded + self.stored + self.added)

    def __add__(self, other: KernelTraffic) -> KernelTraffic:
        return KernelTraffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def _sums(tables: JobTables) -> tuple[int, int, int, int]:
    """(rows owned, rows met, rows owned times tiles that their job streams, bytes of tables read), over all jobs."""
    column = {name: tables.jobs[:, at].astype(np.int64) for at, name in enumerate(JOB_FIELDS)}
    counts = tables.entries[:, ENTRY_FIELDS.index("count")].astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counts)])
    entries = int((column["end"] - column["dense"]).sum())
    met = int((before[column["end"]] - before[column["dense"]]).sum())
    owned = int(column["count"].sum())
    width = 4 * (len(ENTRY_FIELDS) + 1)
    read = tables.jobs.nbytes + entries * width + (4 * (owned + met) if tables.listed else 0)
    return owned, met, int((column["count"] * tables.tiles).sum()), read


def forward_traffic(plan: Plan, architecture: str, head_dim: int, element: int) -> KernelTraffic:
    """The forward launches of a plan for one batch element; later ones read and write the float32 state that they merge onto."""
    tile, width = choose("forward", architecture, head_dim, element)
    total = KernelTraffic(0, 0, 0, 0, 0, 0)
    pairs = sum(branch.pairs * branch.heads.length for branch in plan.branches)
    passes = query_passes(plan).launches
    for number, launch in enumerate(passes):
        tables = query_tables(plan, number, (tile.owned, tile.streamed))
        owned, met, again, read = _sums(tables)
        out = element if len(passes) == 1 else STATE
        merged = 0 if launch.fresh else owned * (head_dim * out + STATE)
        total += KernelTraffic(
            ((again if tile.chunk else owned) + 2 * met) * head_dim * element + read + merged,
            owned * (head_dim * out + STATE),
            0,
            4 * int(tables.tiles.sum()) * tile.owned * tile.streamed * width,
            4 * pairs * head_dim if number == 0 else 0,
            len(tables.jobs),
        )
    return total


def keys_traffic(
    plan: Plan, architecture: str, head_dim: int, element: int, group: int = 1, *, fast: bool = True
) -> KernelTraffic:
    """The backward launch where keys own: five products with dq's reduce-add, or four without."""
    tile, width = choose("backward_keys", architecture, head_dim, element)
    tables = key_tables(plan, group, (tile.owned, tile.streamed))
    owned, met, again, read = _sums(tables)
    pairs, products = sum(branch.pairs * branch.heads.length for branch in plan.branches), 5 if fast else 4
    # In chunks v is read again for each tile of queries, k once more for dq, and q and dO twice.
    kept, streamed = ((3 if fast else 2) * again, 4 * met) if tile.chunk else (2 * owned, 2 * met)
    return KernelTraffic(
        (kept + streamed) * head_dim * element + 2 * met * STATE + read,
        2 * owned * head_dim * element,
        met * head_dim * STATE if fast else 0,
        2 * products * int(tables.tiles.sum()) * tile.owned * tile.streamed * width,
        2 * products * pairs * head_dim,
        len(tables.jobs),
    )


def queries_traffic(plan: Plan, architecture: str, head_dim: int, element: int) -> KernelTraffic:
    """The deterministic launches that make dq, three products each; later ones add onto a float32 sum."""
    tile, width = choose("backward_queries", architecture, head_dim, element)
    total = KernelTraffic(0, 0, 0, 0, 0, 0)
    pairs = sum(branch.pairs * branch.heads.length for branch in plan.branches)
    passes = query_passes(plan).launches
    for number, launch in enumerate(passes):
        tables = query_tables(plan, number, (tile.owned, tile.streamed))
        owned, met, again, read = _sums(tables)
        out = element if len(passes) == 1 else STATE
        total += KernelTraffic(
            (2 * again + 3 * met if tile.chunk else 2 * owned + 2 * met) * head_dim * element
            + 2 * owned * STATE
            + read
            + (0 if launch.fresh else owned * head_dim * out),
            owned * head_dim * out,
            0,
            6 * int(tables.tiles.sum()) * tile.owned * tile.streamed * width,
            6 * pairs * head_dim if number == 0 else 0,
            len(tables.jobs),
        )
    return total


def traffic_rows(architecture: str = "sm_90", head_dim: int = 128, element: int = 2) -> list[str]:
    """The table of the page on memory hierarchies: one head group of eight heads, one batch element."""
    rows = []
    for length, pattern in (
        (8192, Full()),
        (8192, Full(causal=True)),
        (32768, Window(1024)),
        (32768, Dilated((2048, 4096, 8192), (1, 2, 4))),
        (32768, Dilated((2048, 4096, 8192), (1, 2, 4), causal=True)),
    ):
        plan = pattern.plan(Rectangle(8, Span(0, length), Span(0, length)))
        name = type(pattern).__name__ + (" causal" if pattern.causal else "")
        for kernel, found in (
            ("forward", forward_traffic(plan, architecture, head_dim, element)),
            ("backward, fast", keys_traffic(plan, architecture, head_dim, element)),
            (
                "backward, deterministic",
                keys_traffic(plan, architecture, head_dim, element, fast=False)
                + queries_traffic(plan, architecture, head_dim, element),
            ),
        ):
            sizes = (
                found.loaded / 2**20,
                found.stored / 2**20,
                found.added / 2**20,
                found.flops / 1e9,
                found.useful / 1e9,
            )
            numbers = " | ".join(f"{x:.0f}" for x in sizes)
            rows.append(f"| {name} {length} | {kernel} | {numbers} | {found.intensity:.0f} |")
    return rows
