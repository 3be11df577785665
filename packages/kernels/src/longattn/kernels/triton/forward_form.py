# pyright: reportMissingImports=false
"""In which form a forward is computed: its tile, the heads of a tile, the parts that keys are split into, and what goes to which launch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.triton.configurations import FEW_ROWS, Configuration
from longattn.kernels.triton.dense_tables import DenseSplit
from longattn.kernels.triton.launch_dense import is_dense, splits
from longattn.kernels.triton.launching import configuration_of, programs
from longattn.kernels.triton.passes import packable, query_passes
from longattn.patterncache import Plan

_PART_TILES = 2
"""Tiles that a part of a split has at least."""


class Form(NamedTuple):
    """How a call is computed.

    Attributes:
        tile: rows of a program's tiles. pack: heads that are rows of one tile. parts: that keys are split into. single: whether one pass writes all rows.
        complete: whether every row is written. split: of each pass its two launches, where dense tiles have one of their own; else None.
    """

    tile: Configuration
    pack: int
    parts: int
    single: bool
    complete: bool
    split: tuple[DenseSplit | None, ...]

    @property
    def handed(self) -> bool:
        """Whether one launch hands a float32 state to the next, which writes all rows of out."""
        return self.single and self.split[0] is not None and self.split[0].rest is not None


def form_of(call: Call, dense: bool | None = None) -> Form:
    """The form of a call; dense: as `launch_forward.forward` takes it."""
    passes, pack = query_passes(call.plan), pack_of(call.q, call.k, call.plan)
    single = len(passes.launches) == 1
    few = call.q.shape[1] * pack <= FEW_ROWS
    tile = configuration_of(call, "decode" if few else "forward", not single or call.prior is not None)
    parts = parts_of(call.q, call.k.shape[1], pack, tile.streamed) if single and passes.complete and few else 1
    dense = not few and is_dense(call) if dense is None else dense
    return Form(tile, pack, parts, single, passes.complete, splits(call) if dense else (None,) * len(passes.launches))


def pack_of(q: Tensor, k: Tensor, plan: Plan) -> int:
    """How many heads are rows of one tile: all that share a kv head where queries are few, else one."""
    group = q.shape[2] // k.shape[2]
    few = q.shape[1] * group <= FEW_ROWS
    return group if few and group > 1 and packable(plan, group) else 1


def parts_of(q: Tensor, keys: int, pack: int, tile: int) -> int:
    """Into how many parts the keys of few queries are split: as many as keep the device busy, where queries alone do not."""
    batch, rows, heads, _ = q.shape
    if not batch * rows:
        return 1
    parts = programs(q.device) // (batch * heads // pack)
    return max(1, min(parts, keys // (_PART_TILES * tile)))
