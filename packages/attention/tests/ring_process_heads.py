"""Cases for every rank: DTensors sharded on the heads, and modules under torch's tensor-parallel plans, are the whole module."""

import copy

import pytest
import torch
from ring_process_checks import GRID, MESH, N, close, done
from ring_process_setup import LONGNET, WORLD, randn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longattn.attention import MultiheadPatternAttention, PatternAttention, pattern_attention
from longattn.patterncache import Dilated

HEADS, KV_HEADS = 4 * WORLD, 2 * WORLD
BLOCKS = Dilated((4, 12), (1, 3), "blocks", causal=True)


def leaves(mesh, placements) -> tuple[list[torch.Tensor], list[DTensor]]:
    """q, k and v whole, and as DTensors."""
    whole = [randn(2, N, heads, 4, seed=n) for n, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    sharded = [distribute_tensor(x, mesh, placements) for x in whole]
    return [x.requires_grad_() for x in whole], [x.requires_grad_() for x in sharded]


def case_heads_have_their_numbers() -> None:
    """Dilation offsets, dropout, masks, sinks and weights of sharded heads are those of the whole; with the sequence sharded too."""
    bias, sinks = randn(HEADS, N, N, seed=6), randn(HEADS)
    for mesh, placements in ((MESH, [Shard(2)]), (GRID, [Shard(1), Shard(2)])):
        whole, sharded = leaves(mesh, placements)
        shared = [distribute_tensor(x, mesh, [Replicate()] * mesh.ndim) for x in (bias, sinks)]
        for given, options in (
            ({"dropout_p": 0.4, "seed": 3}, {}),
            ({"attention_mask": bias, "sink_logits": sinks}, {"attention_mask": shared[0], "sink_logits": shared[1]}),
        ):
            expected = pattern_attention(*whole, BLOCKS, **given)
            found = pattern_attention(*sharded, BLOCKS, **(given | options))
            close(found.full_tensor(), expected, f"{placements}, {list(given)}")
            grads = torch.autograd.grad(found.full_tensor().square().sum(), sharded)
            wanted = torch.autograd.grad(expected.square().sum(), whole)
            for a, b in zip(grads, wanted, strict=True):
                close(a.full_tensor(), b, f"gradient of {placements}, {list(given)}")  # type: ignore[union-attr]
        module = PatternAttention(BLOCKS)
        weights = module.weights(*sharded[:2])
        close(weights.full_tensor(), module.weights(*whole[:2]), f"weights of {placements}")  # type: ignore[union-attr]
    done()


def case_tensor_parallel_modules_are_the_module() -> None:
    """torch's plan with DTensors inside: projections by columns and by rows; sequences are whole on every rank."""
    torch.manual_seed(0)
    alone = MultiheadPatternAttention(
        4 * HEADS, HEADS, LONGNET, kv_heads=KV_HEADS, rotary_base=10.0, dtype=torch.float64
    )
    module = copy.deepcopy(alone)
    columns = ColwiseParallel(use_local_output=False)
    plan = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "out_proj": RowwiseParallel()}
    module.norm = torch.nn.Identity()
    alone.norm = torch.nn.Identity()
    parallelize_module(module, MESH, plan)
    x = randn(2, N, 4 * HEADS)
    close(module(distribute_tensor(x, MESH, [Replicate()])), alone(x), "out")
    done()


def case_heads_that_cannot_be_cut_so_are_refused() -> None:
    """Numbers given twice, and key heads away from their query heads."""
    if WORLD == 1:
        return
    _, sharded = leaves(MESH, [Shard(2)])
    few = distribute_tensor(randn(2, N, 1, 4), MESH, [Shard(2)])
    with pytest.raises(ValueError, match="head_start and num_heads must be None where q's heads are sharded"):
        pattern_attention(*sharded, BLOCKS, head_start=0, num_heads=HEADS)
    with pytest.raises(ValueError, match="k must have its heads cut where those of q are"):
        pattern_attention(sharded[0], few, few, BLOCKS)
    done()
