"""Cases for every rank: DTensors sharded on the heads, modules under torch's tensor-parallel plans, and DTensors given to `attend` itself."""

import copy

import pytest
import torch
from ring_process_checks import GRID, MESH, N, close, done
from ring_process_setup import LONGNET, WORLD, randn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longattn.attention import MultiheadPatternAttention, PatternAttention, pattern_attention
from longattn.kernels import Alibi, attend
from longattn.patterncache import Dilated

HEADS, KV_HEADS = 4 * WORLD, 2 * WORLD
BATCH = max(2, WORLD)  # an element a rank: torch's own operations gather what has fewer
BLOCKS = Dilated((4, 12), (1, 3), "blocks", causal=True)


def leaves(mesh, placements) -> tuple[list[torch.Tensor], list[DTensor]]:
    """q, k and v whole, and as DTensors."""
    whole = [randn(BATCH, N, heads, 4, seed=n) for n, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
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
    few = distribute_tensor(randn(BATCH, N, 1, 4), MESH, [Shard(2)])
    with pytest.raises(ValueError, match="head_start and num_heads must be None where q's heads are sharded"):
        pattern_attention(*sharded, BLOCKS, head_start=0, num_heads=HEADS)
    with pytest.raises(ValueError, match="k must have its heads cut where those of q are"):
        pattern_attention(sharded[0], few, few, BLOCKS)
    done()


def attend_options() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors beside q, k and v that `attend` takes; those of floating dtype have gradients."""
    padding = torch.zeros(BATCH, N, dtype=torch.bool)
    padding[1, :3] = True
    bias = randn(HEADS, N, N, seed=6)
    return {
        "nothing": {},
        "bias": {"attention_mask": bias},
        "mask": {"attention_mask": bias > 0, "key_padding_mask": padding},
        "slopes": {"score_terms": randn(HEADS, seed=7).abs()},
        "sinks": {"sink_logits": randn(HEADS, seed=8)},
    }


def attended(q, k, v, given) -> list[torch.Tensor]:
    """out and lse of `attend`, and gradients of all that has one."""
    given = {name: x.requires_grad_(x.is_floating_point()) for name, x in given.items()}
    terms = Alibi(given["score_terms"]) if "score_terms" in given else None
    state = attend(q, k, v, BLOCKS, **(given | {"score_terms": terms}))
    leaves = [x for x in (q, k, v, *given.values()) if x.requires_grad]
    loss = state.out.square().sum() + state.lse.exp().sin().sum()
    return [state.out, state.lse, *torch.autograd.grad(loss, leaves)]


def case_attend_takes_dtensors_without_an_exchange() -> None:
    """Batch and heads sharded, over one mesh dimension and over two: out, lse and gradients are the whole's, and no rank sends anything."""
    whole_batch = [(MESH, [Shard(2)]), (MESH, [Replicate()]), (GRID, [Replicate(), Shard(2)])]
    for mesh, placements in (*whole_batch, (MESH, [Shard(0)]), (GRID, [Shard(0), Shard(2)])):
        for name, given in attend_options().items():
            whole, sharded = leaves(mesh, placements)
            spread = {key: distribute_tensor(x, mesh, [Replicate()] * mesh.ndim) for key, x in given.items()}
            expected = attended(*whole, given)
            with CommDebugMode() as exchanged:
                found = attended(*sharded, spread)
            what = f"{name} of {placements}"
            assert exchanged.get_total_counts() == 0, f"{what}: {exchanged.get_comm_counts()}"
            assert found[0].placements == tuple(placements), what  # type: ignore[attr-defined]
            for a, b in zip(found, expected, strict=True):
                close(a.full_tensor(), b, what)
    done()


def case_second_derivatives_of_dtensors() -> None:
    """A penalty on gradients: its own gradients are the whole's, of a bias that ranks share too; what has none in one process has none here."""
    for mesh, placements in ((MESH, [Shard(2)]), (MESH, [Shard(0)]), (GRID, [Shard(0), Shard(2)])):
        options = attend_options()
        for name in ("nothing", "bias", "mask"):
            whole, sharded = leaves(mesh, placements)
            spread = {key: distribute_tensor(x, mesh, [Replicate()] * mesh.ndim) for key, x in options[name].items()}
            expected, found = (
                penalty(tensors, given) for tensors, given in ((whole, options[name]), (sharded, spread))
            )
            for a, b in zip(found, expected, strict=True):
                close(a.full_tensor(), b, f"{name} of {placements}")  # type: ignore[attr-defined]
        slopes = distribute_tensor(options["slopes"]["score_terms"], mesh, [Replicate()] * mesh.ndim)
        with pytest.raises(NotImplementedError, match="second derivatives are not supported with score_terms"):
            penalty(sharded, {"score_terms": Alibi(slopes)})
    done()


def penalty(tensors, given) -> list[torch.Tensor]:
    """Gradients of the squares of a loss's gradients, with respect to all that has one."""
    given = {
        name: x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for name, x in given.items()
    }
    leaves = [*tensors, *(x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    loss = attend(*tensors, BLOCKS, **given).out.square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))  # type: ignore[arg-type]


class BareAttention(torch.nn.Module):
    """Projections around `attend`, as somebody else's model has them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"wq": HEADS, "wk": KV_HEADS, "wv": KV_HEADS}
        for name, heads in sizes.items():
            setattr(self, name, torch.nn.Linear(HEADS, 4 * heads, dtype=torch.float64))
        self.wo = torch.nn.Linear(4 * HEADS, HEADS, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, N, HEADS) to the same."""
        q, k, v = (project(x).unflatten(-1, (-1, 4)) for project in (self.wq, self.wk, self.wv))
        return self.wo(attend(q, k, v, BLOCKS).out.flatten(2))


def case_attend_stays_cut_inside_parallelize_module() -> None:
    """torch's plan over a model that calls `attend`: its own all-reduce is all that is sent, eager and compiled; gradients are the module's."""
    torch.manual_seed(0)
    alone = BareAttention()
    module = copy.deepcopy(alone)
    columns = ColwiseParallel(use_local_output=False)
    parallelize_module(module, MESH, {"wq": columns, "wk": columns, "wv": columns, "wo": RowwiseParallel()})
    x = randn(2, N, HEADS).requires_grad_()
    expected = alone(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(alone.parameters()))
    with CommDebugMode() as exchanged:
        found = module(x)
    assert exchanged.get_total_counts() == 1, exchanged.get_comm_counts()
    close(found, expected, "out")
    for a, b in zip(torch.autograd.grad(found.square().sum(), list(module.parameters())), wanted, strict=True):
        close(a.full_tensor(), b, "gradient")  # type: ignore[attr-defined]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    whole, sharded = leaves(MESH, [Shard(2)])
    close(compiled(*sharded, BLOCKS).out.full_tensor(), attend(*whole, BLOCKS).out, "compiled")
    done()


def case_attend_refuses_what_it_would_have_to_exchange() -> None:
    """A sharded sequence, sums that are not added up, plain tensors beside DTensors, other placements, dropout; by name, on every rank."""
    whole, sharded = leaves(MESH, [Shard(2)])
    rows, batches = leaves(MESH, [Shard(1)])[1], leaves(MESH, [Shard(0)])[1]
    partial = [DTensor.from_local(x.detach(), MESH, [Partial()]) for x in whole]
    bias = randn(HEADS, N, N)
    refused = [
        (ValueError, "q must have its sequence whole on every rank", lambda: attend(*rows, BLOCKS)),
        (ValueError, "q must have its sequence and its heads sharded", lambda: attend(*partial, BLOCKS)),
        (ValueError, "k must have the placements of q", lambda: attend(sharded[0], *batches[1:], BLOCKS)),
        (TypeError, "k must be a DTensor", lambda: attend(sharded[0], *whole[1:], BLOCKS)),
        (TypeError, "bias must be a DTensor where q is one", lambda: attend(*sharded, BLOCKS, attention_mask=bias)),
        (ValueError, "dropout_p must be 0 for DTensors", lambda: attend(*sharded, BLOCKS, dropout_p=0.1)),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()
    done()
