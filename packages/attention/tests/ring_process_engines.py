"""Cases for every rank of a world of any size: each engine gives on its shard what `Local` gives on the whole sequence."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ring_process_setup import randn
from torch.distributed.device_mesh import init_device_mesh

from longattn.attention import Local, Ring, pattern_attention
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.layouts import LAYOUTS, count_rows, select_rows
from longattn.attention.schedules.ulysses import Ulysses
from longattn.kernels import Alibi, RelativeBias, Softcap
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Restrict, Span, Window

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LENGTHS = (3, 64) if NIGHTLY else (3,)
PATTERNS: list[Pattern] = [
    Dilated((6, 12, 24), (1, 2, 4), causal=True),
    Full(causal=True),
    Window(5, sinks=2),
    Restrict(
        Dilated((12, 40), (1, 3)), BlockSparse(8, torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.4)
    ),
]
if NIGHTLY:
    PATTERNS += [
        Full(),
        Dilated((5, 40), (7, 3), "split"),
        Dilated((9,), (1,)),
        Window(4, causal=False),
        Window(3) | Full(causal=True),
    ]


def engines() -> Iterator[Schedule]:
    """Every engine and layout over the whole world."""
    group = dist.group.WORLD
    for layout in LAYOUTS:
        yield Ring(group, layout=layout)
        if NIGHTLY or layout == "zigzag":
            yield AllGather(group, layout=layout)
            yield Ulysses(group, layout=layout)
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
        for layout in LAYOUTS:
            yield Ulysses(mesh["heads"], inner=Ring(mesh["ring"], layout=layout))
            yield Ulysses(mesh["ring"], layout="striped", inner=AllGather(mesh["heads"], layout=layout))


def mine(schedule: Schedule, x: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """This rank's rows."""
    return select_rows(x, axis, schedule.held(x.shape[axis]))


def check(
    schedule: Schedule,
    pattern: Pattern,
    length: int,
    tolerance: float = 1e-10,
    heads: int = 8,
    kv_heads: int = 4,
    **options,
) -> None:
    """out, lse and gradients equal Local's on this rank's rows. Options as in `pattern_attention`, for the whole sequence."""
    shapes = ((heads, 4), (kv_heads, 4), (kv_heads, 6))
    inputs = [randn(2, length, *shape, seed=n) for n, shape in enumerate(shapes)]
    where = {"key_padding_mask": 1, "attention_mask": -2}
    local = {
        name: mine(schedule, x, where[name] % x.dim()).contiguous() if name in where and x.shape[where[name]] > 1 else x
        for name, x in options.items()
    }

    def run(chosen: Schedule, tensors: list[torch.Tensor], given: dict) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        given = {
            n: x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
            for n, x in given.items()
        }
        rest = {n: x for n, x in given.items() if n not in ("slopes", "table")}
        if "table" in given:
            table = RelativeBias(given["table"], max_distance=20)
            rest["score_terms"] = (Softcap(2.0), Alibi(given["slopes"]), table)
        out, lse = pattern_attention(*leaves, pattern, schedule=chosen, return_lse=True, **rest)
        loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        extra = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        return [out, lse, *torch.autograd.grad(loss, [*leaves, *extra])]

    expected = run(Local(), inputs, options)
    found = run(schedule, [mine(schedule, x) for x in inputs], local)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=False):
        torch.testing.assert_close(a, mine(schedule, b), atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n} of {schedule}, {pattern}: {m}")  # fmt: skip
    for a, b, name in zip(
        found[5:],
        expected[5:],
        [n for n, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()],
        strict=True,
    ):
        if name == "attention_mask" and b.shape[-2] > 1:
            b = mine(schedule, b, b.dim() - 2)
        else:
            # A rank's part of what all ranks share. It may be a view, whose memory gloo would read as it lies.
            a = a.contiguous()
            dist.all_reduce(a)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def case_every_pattern_and_engine_equals_local() -> None:
    """Patterns cut by shard borders, lengths that do not divide, more ranks than rows; GQA."""
    for schedule in engines():
        for pattern in PATTERNS:
            check(schedule, pattern, 37)
        for length in LENGTHS:
            check(schedule, PATTERNS[0], length)


def case_options() -> None:
    """Padding, masks, bias with its gradient, sinks, q_start, score terms with the gradients of what they hold."""
    padding = torch.rand(2, 37, generator=torch.Generator().manual_seed(3)) < 0.3
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(4)) < 0.7
    for schedule in engines():
        for pattern in PATTERNS[:2]:
            check(schedule, pattern, 37, key_padding_mask=padding)
            check(schedule, pattern, 37, attention_mask=mask)
            check(schedule, pattern, 37, attention_mask=randn(8, 37, 37, seed=9))
            check(schedule, pattern, 37, sink_logits=randn(8, seed=8), attention_mask=randn(1, 37, seed=7))
            check(schedule, pattern, 37, q_start=5)
        check(schedule, PATTERNS[0], 37, slopes=randn(8, seed=6).abs(), table=randn(8, 8, seed=5))


def case_masks_where_ranks_hold_one_row() -> None:
    """Whether a mask has rows is the whole sequence's affair, in a mesh of two dimensions too; the bias's gradient comes home."""
    length = dist.get_world_size() + 1
    for schedule in engines():
        if isinstance(schedule, Ulysses):
            check(schedule, PATTERNS[1], length, attention_mask=randn(8, 1, length, seed=9))
            check(schedule, PATTERNS[1], length, attention_mask=randn(2, 1, length, length, seed=9))


def case_dropout_is_the_same_everywhere() -> None:
    """Given a seed, and drawn: then it is rank 0's, whatever the others draw."""
    for schedule in engines():
        check(schedule, PATTERNS[0], 37, dropout_p=0.3, seed=5)
        rank, x = dist.get_rank(), randn(1, 37, 4, 4)
        torch.manual_seed(0)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        expected = pattern_attention(x, x, x, Full(), dropout_p=0.5, seed=seed)
        torch.manual_seed(rank)
        found = pattern_attention(*(mine(schedule, x),) * 3, Full(), dropout_p=0.5, schedule=schedule)
        torch.testing.assert_close(found, mine(schedule, expected))


def case_given_lengths_need_no_roll() -> None:
    """The whole length, or every shard's: the same numbers."""
    group, world = dist.group.WORLD, dist.get_world_size()
    uneven = tuple(5 + 7 * rank for rank in range(world))
    for layout in LAYOUTS:
        check(Ring(group, layout=layout, lengths=37), PATTERNS[0], 37)
    check(Ring(group, lengths=uneven), PATTERNS[0], sum(uneven))


def case_ulysses_over_a_ring_of_uneven_lengths() -> None:
    """The ring's ranks hold parts of different lengths, and the ranks that share a part's heads hold different lengths of it."""
    world = dist.get_world_size()
    for sizes in {(world, 1), (1, world), (world // 2, 2) if world % 2 == 0 else (1, world)}:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "heads"))
        parts = tuple(9 + 7 * rank for rank in range(sizes[0]))
        part = parts[mesh.get_local_rank("ring")]
        shares = (*(2 + rank for rank in range(sizes[1] - 1)), part - sum(2 + rank for rank in range(sizes[1] - 1)))
        ring = Ring(mesh["ring"], lengths=parts)
        # Ranks that were told no lengths send theirs, the part's as a whole to the ring.
        check(Ulysses(mesh["heads"], inner=Ring(mesh["ring"])), PATTERNS[0], sum(parts))
        for schedule in (Ulysses(mesh["heads"], inner=ring), Ulysses(mesh["heads"], lengths=shares, inner=ring)):
            check(schedule, PATTERNS[0], sum(parts))
            check(schedule, PATTERNS[1], sum(parts), attention_mask=randn(8, sum(parts), sum(parts), seed=9))


def case_any_lengths() -> None:
    """Contiguous shards of any lengths, found out by the roll call; keys and queries cut differently."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ring = Ring(dist.group.WORLD)
    rows, keys = ([n + step * r for r in range(world)] for n, step in ((2, 3), (9, 1)))
    q, k = randn(1, sum(rows), 2, 4), randn(1, sum(keys), 2, 4, seed=1)
    part, key_part = ((Span(sum(n[:rank]), n[rank]),) for n in (rows, keys))
    leaves = [select_rows(x, 1, at).clone().requires_grad_() for x, at in ((q, part), (k, key_part))]
    found = pattern_attention(leaves[0], leaves[1], leaves[1], Full(causal=True), schedule=ring)
    whole = [x.clone().requires_grad_() for x in (q, k)]
    expected = pattern_attention(whole[0], whole[1], whole[1], Full(causal=True))
    torch.testing.assert_close(found, select_rows(expected, 1, part))
    grads, wanted = (torch.autograd.grad(out.square().sum(), x) for out, x in ((found, leaves), (expected, whole)))
    for a, b, at in zip(grads, wanted, (part, key_part), strict=True):
        torch.testing.assert_close(a, select_rows(b, 1, at))


def case_half_precision_is_rounded_once() -> None:
    """bfloat16 on the wire, float32 in states and on the way home."""
    x = randn(2, 64, 4, 8, dtype=torch.bfloat16)
    whole = [x.float().requires_grad_() for _ in range(3)]
    out = pattern_attention(*whole, PATTERNS[0])
    expected = torch.autograd.grad(out.sum(), whole)
    for schedule in engines():
        leaves = [mine(schedule, x).clone().requires_grad_() for _ in range(3)]
        found = pattern_attention(*leaves, PATTERNS[0], schedule=schedule)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), mine(schedule, out), rtol=2e-2, atol=2e-2)
        for a, b in zip(torch.autograd.grad(found.sum(), leaves), expected, strict=True):
            torch.testing.assert_close(a.float(), mine(schedule, b), rtol=6e-2, atol=6e-2)


def case_a_bad_call_is_refused_on_every_rank() -> None:
    """Before anything travels, so that no rank waits for another."""
    world, ring = dist.get_world_size(), Ring(dist.group.WORLD)
    x = randn(1, 4, 2, 4)
    for given, words in (
        ({"attention_mask": torch.ones(3, 3, dtype=torch.bool)}, "attention_mask must be broadcastable"),
        ({"schedule": Ring(dist.group.WORLD, lengths=4 * world + 64)}, "must have the length"),
    ):
        with pytest.raises(ValueError, match=words):
            pattern_attention(x, x, x, Full(), **{"schedule": ring, **given})
    assert count_rows(ring.held(10)) in (10 // world, 10 // world + 1)
