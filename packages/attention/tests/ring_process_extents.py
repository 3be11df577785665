"""Cases for every rank: what depends on a row's place or on the whole length is Local's, for each module, option and engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ring_process_checks import (
    MESH,
    NIGHTLY,
    WRONG,
    N,
    attention,
    check_plain,
    check_sharded,
    close,
    done,
    engines,
    layer,
    longnet,
    mine,
    multihead,
)
from ring_process_setup import LONGNET, RANK, WORLD, randn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from longattn.attention import PatternAttention, Ring, pattern_attention
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.ulysses import Ulysses
from longattn.kernels import Alibi, RelativeBias, Softcap
from longattn.patterncache import Full

PADDING = randn(2, N, seed=3) < -0.5
STARTS = {"positions_start": torch.tensor([3, 9])}
DOCUMENTS = {"cu_seqlens": [0, 2, 2, 9, N]}


def case_a_positions_go_on_from_rank_to_rank() -> None:
    """Rotary positions of LongNet, a layer and a multihead module, at q_start too."""
    for schedule in engines():
        check_plain(schedule, longnet, {})
        check_plain(schedule, multihead, {"q_start": 5})
    check_plain(engines()[0], layer, {})
    check_plain(Ring(dist.group.WORLD, layout="striped", lengths=N), multihead, {})
    done()


def case_b_modules_take_sharded_tensors() -> None:
    """DTensors sharded on the sequence, under whatever schedule the module has by itself."""
    for make in (attention, multihead, layer, longnet):
        check_sharded(None, make, {})
    check_sharded(None, attention, {}, dropout=0.4)
    group = dist.group.WORLD
    for schedule in (Ring(size=3), Ring(group), AllGather(group), Ulysses(group)):
        check_sharded(schedule, attention, {})
    done()


def case_c_left_padding_is_of_the_whole() -> None:
    """`positions_start`, with and without rotary positions; more padding than a rank has rows; dropout; sinks."""
    for schedule in engines():
        check_plain(schedule, multihead, STARTS)
        check_plain(schedule, attention, STARTS | {"key_padding_mask": PADDING}, dropout=0.4)
        check_plain(schedule, attention, STARTS | {"sink_logits": randn(4), "is_causal": False})
    check_plain(engines()[0], longnet, STARTS)
    done()


def case_d_weights_are_of_all_keys() -> None:
    """`need_weights`: this rank's rows, the whole sequence's columns; padding and masks; sparse; gradients go home."""
    given = {"need_weights": True, "key_padding_mask": PADDING, "attention_mask": randn(1, 4, N, N, seed=4)}
    for schedule in engines():
        check_plain(schedule, attention, given)
        check_plain(schedule, attention, given, sparse_weights=True)
        check_plain(schedule, multihead, {"need_weights": True})
    check_sharded(None, multihead, given)
    done()


def case_e_a_mask_of_one_row_on_one_rank() -> None:
    """A rank with one row of a mask has not a mask for every row; a mask without rows is the same on all, also of one axis."""
    for length in (WORLD + 1, WORLD, N):
        masks = [randn(2, 1, length, length, seed=5) < 0.7, randn(1, 4, length, length, seed=6)]
        masks += [randn(4, 1, length, seed=6), randn(length, seed=6)]
        for schedule in engines():
            for mask in masks:
                check_plain(schedule, attention, {"attention_mask": mask}, length)
    # Lengths that everybody knows do not say whose mask has rows.
    known = Ulysses(dist.group.WORLD, lengths=WORLD + 1)
    check_plain(known, attention, {"attention_mask": randn(WORLD + 1, WORLD + 1, seed=6)}, WORLD + 1)
    done()


def case_packed_documents_go_on_from_rank_to_rank() -> None:
    """`cu_seqlens` of the whole, under every engine; queries that are the last of each document."""
    for schedule in engines():
        check_plain(schedule, attention, DOCUMENTS, batch=1)
        check_plain(schedule, multihead, DOCUMENTS, batch=1)
        q, k = randn(1, 6, 4, 4), randn(1, N, 4, 4, seed=1)
        ends = DOCUMENTS | {"cu_seqlens_q": [0, 1, 1, 4, 6]}
        expected = pattern_attention(q, k, k, LONGNET, **ends)  # type: ignore[call-overload]
        part = [mine(schedule, x) for x in (q, k, k)]
        found = pattern_attention(*part, LONGNET, schedule=schedule, **ends)  # type: ignore[call-overload]
        close(found, mine(schedule, expected), f"cu_seqlens_q under {schedule}")
    done()


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "is_causal": {"is_causal": False},
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attention_mask": randn(N, N, seed=5) < 0.7},
    "bias": {"attention_mask": randn(2, 4, N, N, seed=6)},
    "q_start": {"q_start": 5},
    "positions_start": STARTS,
    "cu_seqlens": DOCUMENTS,
    "sinks": {"sink_logits": randn(4)},
    "terms": {"score_terms": (Softcap(2.0), Alibi(randn(4).abs()), RelativeBias(randn(8, 4), max_distance=20))},
    "weights": {"need_weights": True},
}
"""Options of a module's call."""

TAKEN = {
    attention: set(OPTIONS),
    multihead: set(OPTIONS),
    layer: set(OPTIONS) - {"weights"},
    longnet: set(OPTIONS) - {"weights", "is_causal", "mask", "bias"},
}
"""Modules, and what each takes."""


def case_every_option_of_every_module_under_every_engine() -> None:
    """Plain tensors and DTensors: equal to Local on the whole, out and gradients. By default a module and an option meet some engines."""
    found = engines()
    for number, make in enumerate(TAKEN):
        for place, option in enumerate(sorted(TAKEN[make])):
            chosen = found if NIGHTLY else [found[(number + place) % len(found)]]
            batch = 1 if option == "cu_seqlens" else 2
            for schedule in chosen:
                for made in ({}, {"dropout": 0.3}) if NIGHTLY and make in (attention, multihead) else ({},):
                    check_plain(schedule, make, OPTIONS[option], batch=batch, **made)
            if NIGHTLY or (number + place) % 3 == 0:
                check_sharded(None, make, OPTIONS[option], batch=batch)
    done()


def case_what_cannot_be_is_refused_by_name() -> None:
    """The same ranks twice, DTensors cut otherwise, nested tensors, masks of different kinds; on every rank, before anything travels."""
    group = dist.group.WORLD
    x = randn(2, 2 * WORLD, 4, 4)
    sharded = distribute_tensor(x, MESH, [Shard(1)])
    whole = distribute_tensor(x, MESH, [Replicate()])
    by_batch = distribute_tensor(randn(WORLD, 4, 4, 4), MESH, [Shard(0)])
    jagged = torch.nested.nested_tensor([randn(3, 4, 4), randn(2, 4, 4)], layout=torch.jagged)
    sparse = PatternAttention(LONGNET, sparse_weights=True)
    refusals: list[tuple[str, Callable[[], Any]]] = [
        ("q must be this rank's rows", lambda: pattern_attention(jagged, jagged, jagged, Full(), schedule=Ring(group))),
        ("schedule must be None or in one process", lambda: attention(Ring(group))(whole, whole, whole)),
        ("sparse_weights must be False for DTensors", lambda: sparse(sharded, sharded, sharded, need_weights=True)),
        ("cu_seqlens must end with the packed length", lambda: attention(Ring(group))(*[x[:1]] * 3, cu_seqlens=[0, 3])),
        ("positions_start must lie in", lambda: attention(Ring(group))(x, x, x, positions_start=torch.tensor([0, 99]))),
    ]
    if WORLD > 1:
        mixed = randn(1, 2 * WORLD) if RANK else None
        some_rows = randn(2 * WORLD if RANK else 1, 2 * WORLD * WORLD)
        refusals += [
            ("inner must be over another dimension", lambda: Ulysses(group, inner=Ring(group))),
            ("schedule must be None, in one process", lambda: attention(Ring(group, layout="zigzag"))(*[sharded] * 3)),
            (
                "dropout_p must be 0 where the batch is sharded",
                lambda: pattern_attention(by_batch, by_batch, by_batch, Full(), dropout_p=0.5, seed=1),
            ),
            (
                "attention_mask must be given on every rank",
                lambda: attention(Ulysses(group))(x, x, x, attention_mask=mixed),
            ),
            (
                "attention_mask must have this rank's rows",
                lambda: attention(Ulysses(group))(x, x, x, attention_mask=some_rows),
            ),
        ]
    for words, call in refusals:
        try:
            with pytest.raises(ValueError, match=words):
                call()
        except (AssertionError, pytest.fail.Exception, TypeError) as error:
            WRONG.append(f"{words}: {error}")
    done()


def case_masks_and_sinks_may_be_sharded_tensors() -> None:
    """DTensors among the options, whatever their placements; what all share gets the whole gradient."""
    q, padding, sinks, bias = randn(2, N, 4, 4), PADDING, randn(4), randn(4, N, N, seed=6)
    plain = [x.clone().requires_grad_() for x in (q, sinks, bias)]
    shared = [
        distribute_tensor(q, MESH, [Shard(1)]),
        *(distribute_tensor(x, MESH, [Replicate()]) for x in (sinks, bias)),
    ]
    leaves = [x.requires_grad_() for x in shared]
    given = {"key_padding_mask": distribute_tensor(padding, MESH, [Shard(1)])}
    module = attention(None)
    found = module(*leaves[:1] * 3, sink_logits=leaves[1], attention_mask=leaves[2], **given)
    expected = module(*plain[:1] * 3, sink_logits=plain[1], attention_mask=plain[2], key_padding_mask=padding)
    close(found.full_tensor(), expected, "out")
    grads = torch.autograd.grad(found.full_tensor().square().sum(), leaves)
    for name, a, b in zip("qsb", grads, torch.autograd.grad(expected.square().sum(), plain), strict=True):
        close(a.full_tensor(), b, f"gradient of {name}")  # type: ignore[union-attr]
    done()


def case_rotary_positions_compile() -> None:
    """fullgraph, with lengths that ranks exchange inside the graph."""
    for schedule in engines() if NIGHTLY else engines()[1:2]:
        torch.manual_seed(0)
        module = multihead(schedule)
        compiled = torch.compile(module, backend="aot_eager" if NIGHTLY else "eager", fullgraph=True)
        x = mine(schedule, randn(2, N, 16)).requires_grad_()
        expected, found = module(x), compiled(x)
        close(found, expected, f"{schedule}")
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)), f"{schedule}")  # type: ignore[misc]
    done()


def case_packings_are_data_of_one_graph() -> None:
    """`cu_seqlens` of the whole sequence in a compiled module with rotary positions: eager's, for every packing."""
    schedule = engines()[1]
    torch.manual_seed(0)
    module = multihead(schedule)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = mine(schedule, randn(1, N, 16)).requires_grad_()
    for ends in (DOCUMENTS["cu_seqlens"], [0, 1, 5, 8, N]):
        found, expected = (each(x, cu_seqlens=torch.tensor(ends)) for each in (compiled, module))
        close(found, expected, f"{ends}")
        close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)), f"{ends}")  # type: ignore[misc]
    done()
