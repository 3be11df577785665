"""What cases of positions and lengths share: modules, engines, and what a rank computes held against Local on the whole sequence."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ring_process_setup import LONGNET, RANK, WORLD, randn
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
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.layouts import LAYOUTS, select_rows
from longattn.attention.schedules.ulysses import Ulysses

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
N = 13
WIDE: dict[str, Any] = {"dtype": torch.float64}
SMALL: dict[str, Any] = {"segment_lengths": (4, 12), "dilation_rates": (1, 2), "dim_feedforward": 16}
MESH = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ring",))
GRID = init_device_mesh("cpu", (2, WORLD // 2) if WORLD == 4 else (1, WORLD), mesh_dim_names=("ring", "heads"))

Make = Callable[..., nn.Module]


def engines() -> list[Schedule]:
    """Every schedule over the whole world, one of two dimensions included."""
    group = dist.group.WORLD
    both = Ulysses(GRID["heads"], inner=Ring(GRID["ring"], layout="zigzag"))
    return [*(Ring(group, layout=layout) for layout in LAYOUTS), AllGather(group), Ulysses(group), both]


def attention(schedule: Schedule | None, **options: Any) -> nn.Module:
    """Four heads, no parameters."""
    return PatternAttention(LONGNET, schedule=schedule, **options)


def multihead(schedule: Schedule | None, **options: Any) -> nn.Module:
    """With rotary positions."""
    return MultiheadPatternAttention(16, 4, LONGNET, schedule=schedule, rotary_base=50.0, **options, **WIDE)


def layer(schedule: Schedule | None, **options: Any) -> nn.Module:
    """An encoder layer with rotary positions."""
    given = {"causal": True, "rotary_base": 50.0, "schedule": schedule, **SMALL, **options, **WIDE}
    return DilatedTransformerEncoderLayer(16, 4, **given)


def longnet(schedule: Schedule | None, **options: Any) -> nn.Module:
    """Two layers over tokens."""
    return LongNet(11, 16, 4, 2, **SMALL, schedule=schedule, **options, **WIDE)


AXES = {"key_padding_mask": 1, "attention_mask": -2}
"""Along which axis an option has this rank's rows, where the whole has more than one."""

WRONG: list[str] = []
"""What did not hold so far in a case: all checks are made on every rank, so that none waits for another that gave up."""


def done() -> None:
    """Assert that nothing was wrong since the last time."""
    found, WRONG[:] = list(WRONG), []
    assert not found, f"{len(found)} wrong\n" + "\n".join(found[:4])


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Note what differs."""
    try:
        torch.testing.assert_close(found, expected)
    except AssertionError as error:
        WRONG.append(f"{what}: {error}")


def tensors_of(make: Make, length: int, batch: int) -> list[Tensor]:
    """The whole sequence's."""
    if make is longnet:
        return [torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(7))]
    if make is attention:
        # v has a head_dim of its own.
        return [randn(batch, length, 4, 3 if n == 2 else 4, seed=n) for n in range(3)]
    return [randn(batch, length, 16)]


def run(module: nn.Module, tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the module returns, and gradients of the inputs and of the parameters."""
    torch.manual_seed(1)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    found = module(*leaves, **options)
    dense = [x.to_dense() if x.is_sparse else x for x in (found if isinstance(found, tuple) else (found,))]
    loss = sum(x.square().sum() for x in (y.full_tensor() if isinstance(y, DTensor) else y for y in dense))
    wanted = [x for x in leaves if x.requires_grad] + list(module.parameters())
    grads = torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]
    return dense, list(grads)


def cut(options: dict[str, Any], rows: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    """What a rank is given of options for the whole."""
    return {
        name: rows(x, AXES[name] % x.dim()) if name in AXES and x.dim() > 1 and x.shape[AXES[name]] > 1 else x
        for name, x in options.items()
    }


def mine(schedule: Schedule, x: Tensor, axis: int = 1) -> Tensor:
    """This rank's rows."""
    return select_rows(x, axis, schedule.held(x.shape[axis])).contiguous()


def check_plain(schedule: Schedule, make: Make, given: dict, length: int = N, batch: int = 2, **made: Any) -> None:
    """On this rank's rows, outputs and gradients are Local's on the whole; parameters' gradients add up to it."""
    torch.manual_seed(0)
    alone = make(Local(), **made)
    module = copy.deepcopy(alone)
    for one in module.modules():
        if isinstance(one, PatternAttention):
            one.schedule = schedule
    tensors = tensors_of(make, length, batch)
    expected, wanted = run(alone, tensors, given)
    here = cut(given, lambda x, axis: mine(schedule, x, axis))
    found, grads = run(module, [mine(schedule, x) for x in tensors], here)
    what = f"{make.__name__} under {schedule}, {length} rows, {list(given)} {made}"
    for a, b, axis in zip(found, expected, (1, 2), strict=False):
        close(a, mine(schedule, b, axis), what)
    inputs = len(grads) - len(list(module.parameters()))
    for n, (a, b) in enumerate(zip(grads, wanted, strict=True)):
        if n >= inputs:
            dist.all_reduce(a)
        close(a, mine(schedule, b) if n < inputs else b, f"gradient {n} of {what}")


def check_sharded(
    schedule: Schedule | None, make: Make, given: dict, length: int = N, batch: int = 2, **made: Any
) -> None:
    """The same for DTensors: full outputs and gradients are Local's."""
    torch.manual_seed(0)
    alone = make(schedule, **made)
    module = distribute_module(copy.deepcopy(alone), MESH)
    for one in alone.modules():
        if isinstance(one, PatternAttention):
            one.schedule = Local()
    tensors = tensors_of(make, length, batch)
    expected, wanted = run(alone, tensors, given)
    rows = -(-length // WORLD)
    here = cut(given, lambda x, axis: x[(slice(None),) * axis + (slice(RANK * rows, (RANK + 1) * rows),)].contiguous())
    found, grads = run(module, [distribute_tensor(x, MESH, [Shard(1)]) for x in tensors], here)
    what = f"{make.__name__} of DTensors under {schedule}, {length} rows, {list(given)} {made}"
    for a, b in [*zip(found, expected, strict=True), *zip(grads, wanted, strict=True)]:
        close(a.full_tensor(), b, what)  # type: ignore[union-attr]
