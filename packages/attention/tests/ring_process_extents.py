"""Cases for every rank: what depends on a row's place or on the whole length is Local's, for each module, option and engine."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ring_process_setup import LONGNET, WORLD, randn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

from longattn.attention import (
    DilatedTransformerEncoderLayer,
    Local,
    LongNet,
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
)
from longattn.attention.all_gather import AllGather
from longattn.attention.layouts import LAYOUTS, select_rows
from longattn.attention.schedule import Schedule
from longattn.attention.ulysses import Ulysses

WIDE: dict[str, Any] = {"dtype": torch.float64}
SMALL: dict[str, Any] = {"segment_lengths": (4, 12), "dilation_rates": (1, 2), "dim_feedforward": 16}
MESH = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ring",))
GRID = init_device_mesh("cpu", (2, WORLD // 2) if WORLD > 2 else (1, WORLD), mesh_dim_names=("ring", "heads"))


def engines() -> list[Schedule]:
    """Every schedule over the whole world, 2-D ones included."""
    group = dist.group.WORLD
    both = [Ulysses(GRID["heads"], inner=Ring(GRID["ring"], layout="zigzag"))]
    return [*(Ring(group, layout=layout) for layout in LAYOUTS), AllGather(group), Ulysses(group), *both]


def attention(schedule: Schedule | None, **options: Any) -> nn.Module:
    """Four heads, no parameters."""
    return PatternAttention(LONGNET, schedule=schedule, **options)


def multihead(schedule: Schedule | None, **options: Any) -> nn.Module:
    """With rotary positions."""
    return MultiheadPatternAttention(16, 4, LONGNET, schedule=schedule, rotary_base=50.0, **options, **WIDE)


def layer(schedule: Schedule | None, **options: Any) -> nn.Module:
    """An encoder layer with rotary positions."""
    return DilatedTransformerEncoderLayer(
        16, 4, **SMALL, causal=True, rotary_base=50.0, schedule=schedule, **options, **WIDE
    )


def longnet(schedule: Schedule | None, **options: Any) -> nn.Module:
    """Two layers over tokens."""
    return LongNet(11, 16, 4, 2, **SMALL, schedule=schedule, **options, **WIDE)


MODULES: dict[Callable[..., nn.Module], int] = {attention: 3, multihead: 1, layer: 1, longnet: 1}
"""Modules, and how many tensors each takes."""

AXES = {"key_padding_mask": 1, "attention_mask": -2}
"""Along which axis an option has this rank's rows, where the whole has more than one."""


def tensors_of(make: Callable[..., nn.Module], length: int) -> list[Tensor]:
    """The whole sequence's."""
    if make is longnet:
        return [torch.randint(11, (2, length), generator=torch.Generator().manual_seed(7))]
    if make is attention:
        return [randn(2, length, 4, 4, seed=n) for n in range(3)]
    return [randn(2, length, 16)]


def run(module: nn.Module, tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the module returns; then gradients of the inputs and of the parameters for a loss that weighs nothing by its place."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    found = module(*leaves, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    dense = [x.to_dense() if x.is_sparse else x for x in found]
    loss = sum(x.square().sum() for x in (y.full_tensor() if isinstance(y, DTensor) else y for y in dense))
    wanted = [x for x in leaves if x.requires_grad] + list(module.parameters())
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]
    return dense, grads


def mine(schedule: Schedule, x: Tensor, axis: int = 1) -> Tensor:
    """This rank's rows."""
    return select_rows(x, axis, schedule.held(x.shape[axis])).contiguous()


def part_of(schedule: Schedule, options: dict[str, Any]) -> dict[str, Any]:
    """What a rank is given of options for the whole."""
    return {
        name: mine(schedule, x, AXES[name] % x.dim()) if name in AXES and x.dim() > 1 and x.shape[AXES[name]] > 1 else x
        for name, x in options.items()
    }


def check_plain(schedule: Schedule, make: Callable[..., nn.Module], length: int, given: dict, **made: Any) -> None:
    """On this rank's rows, outputs and gradients are Local's on the whole; parameters' gradients add up to it."""
    torch.manual_seed(0)
    module = make(schedule, **made)
    alone = copy.deepcopy(module)
    inner = [m for m in alone.modules() if isinstance(m, PatternAttention)]
    for one in inner:
        one.schedule = Local()
    tensors = tensors_of(make, length)
    torch.manual_seed(1)
    expected, wanted = run(alone, tensors, given)
    torch.manual_seed(1)
    found, grads = run(module, [mine(schedule, x) for x in tensors], part_of(schedule, given))
    what = f"{make.__name__} under {schedule} of {length} rows, {given} {made}"
    for a, b, axis in zip(found, expected, (1, 2), strict=False):
        torch.testing.assert_close(a, mine(schedule, b, axis), msg=lambda m: f"{what}: {m}")
    inputs = len(grads) - len(list(module.parameters()))
    for n, (a, b) in enumerate(zip(grads, wanted, strict=True)):
        if n < inputs:
            b = mine(schedule, b)
        else:
            dist.all_reduce(a)
        torch.testing.assert_close(a, b, msg=lambda m, n=n: f"gradient {n} of {what}: {m}")


def check_sharded(
    schedule: Schedule | None, make: Callable[..., nn.Module], length: int, given: dict, **made: Any
) -> None:
    """The same for DTensors: full outputs and gradients are Local's."""
    torch.manual_seed(0)
    module = make(schedule, **made)
    torch.manual_seed(0)
    alone = make(None, **made)
    tensors = tensors_of(make, length)
    torch.manual_seed(1)
    expected, wanted = run(alone, tensors, given)
    module = distribute_module(module, MESH)
    rows = -(-length // WORLD)
    cut = [slice(dist.get_rank() * rows, min(length, (dist.get_rank() + 1) * rows))]
    local = {
        name: x.movedim(AXES[name] % x.dim(), 0)[cut[0]].movedim(0, AXES[name] % x.dim()).contiguous()
        if name in AXES and x.dim() > 1 and x.shape[AXES[name]] > 1
        else x
        for name, x in given.items()
    }
    torch.manual_seed(1)
    found, grads = run(module, [distribute_tensor(x, MESH, [Shard(1)]) for x in tensors], local)
    what = f"{make.__name__} of DTensors under {schedule}, {length} rows, {given} {made}"
    for a, b in [*zip(found, expected, strict=True), *zip(grads, wanted, strict=True)]:
        assert isinstance(a, DTensor), what
        torch.testing.assert_close(a.full_tensor(), b, msg=lambda m: f"{what}: {m}")


def case_a_positions_go_on_from_rank_to_rank() -> None:
    """Rotary positions of LongNet, a layer and a multihead module, at q_start too."""
    for schedule in engines():
        for make in (multihead, layer, longnet):
            check_plain(schedule, make, 13, {})
        check_plain(schedule, multihead, 13, {"q_start": 5})


def case_b_modules_take_sharded_tensors() -> None:
    """DTensors sharded on the sequence, under whatever schedule the module has by itself."""
    for make in MODULES:
        check_sharded(None, make, 13, {})
    check_sharded(Ring(size=3), attention, 13, {})


def case_c_left_padding_is_of_the_whole() -> None:
    """`positions_start`, with and without rotary positions; more padding than a rank has rows; dropout."""
    starts = {"positions_start": torch.tensor([3, 9])}
    for schedule in engines():
        for make in MODULES:
            check_plain(schedule, make, 13, starts)
        check_plain(schedule, attention, 13, starts, dropout=0.4)
        check_plain(schedule, attention, 13, starts | {"sink_logits": randn(4), "is_causal": False})


def case_d_weights_are_of_all_keys() -> None:
    """`need_weights`: this rank's rows, the whole sequence's columns; padding and masks; sparse."""
    padding = randn(2, 13, seed=3) < -0.5
    given = {"need_weights": True, "key_padding_mask": padding, "attention_mask": randn(1, 4, 13, 13, seed=4)}
    for schedule in engines():
        check_plain(schedule, attention, 13, given)
        check_plain(schedule, attention, 13, given, sparse_weights=True)
        check_plain(schedule, multihead, 13, {"need_weights": True})


def case_e_a_mask_of_one_row_on_one_rank() -> None:
    """A rank with one row of a mask has not a mask for every row; a mask without rows is the same on all."""
    for length in (3, 2, 13):
        for schedule in engines():
            rows = {"attention_mask": randn(2, 1, length, length, seed=5) < 0.7}
            bias = {"attention_mask": randn(1, 4, length, length, seed=6)}
            flat = {"attention_mask": randn(1, length, seed=6)}
            for given in (rows, bias, flat, {"attention_mask": randn(length, seed=6)}):
                check_plain(schedule, attention, length, given)
