"""What cases for every rank share: the group, its engines, a pattern, and numbers that are the same on each rank."""

import torch
import torch.distributed as dist

from longattn.attention import Ring
from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.layouts import LAYOUTS
from longattn.attention.schedules.ulysses import Ulysses
from longattn.patterncache import Dilated

LONGNET = Dilated((6, 12, 24), (1, 2, 4), causal=True)
WORLD, RANK = dist.get_world_size(), dist.get_rank()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def engines() -> list[Schedule]:
    """Every schedule over the whole world."""
    group = dist.group.WORLD
    return [*(Ring(group, layout=layout) for layout in LAYOUTS), AllGather(group), Ulysses(group)]
