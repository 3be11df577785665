# pyright: reportMissingImports=false
"""Calls of the next lengths of a cache that grows, made ready together: one query a head, a key more each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.triton.decode_tables import sees_all_heads, tables_of_tokens
from longattn.kernels.triton.forward_form import Form, pack_of, parts_of
from longattn.kernels.triton.passes import DeviceTables, copied
from longattn.patterncache import Plan

PlansAhead = Callable[[int, int], list[Plan]]
"""(first length, how many) -> the plans of so many lengths of k and v, or of fewer, which nobody keeps."""


class TokensAhead:
    """(q, k, v) -> the forward of their length, bound; None where it is computed in another form.

    Tables of the next lengths are made together, and one copy takes them to the device: a token costs a fraction of its own.

    Args:
        form: of all of them, and `bind`: of the tables of a length and its tensors, the bound forward, or None.
        plans: who makes plans.
    """

    def __init__(
        self, form: Form, bind: Callable[[DeviceTables, Tensor, Tensor, Tensor], Any], plans: PlansAhead
    ) -> None:
        self._form, self._bind, self._plans = form, bind, plans
        self._tables: dict[int, DeviceTables] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """One length; where it has no tables yet, those of the next `_AHEAD` are made."""
        length = k.shape[1]
        if length not in self._tables:
            # What is copied inside a capture belongs to the graph.
            if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            self._tables = self._made(q, k, length)
        tables = self._tables.get(length)
        return None if tables is None else self._bind(tables, q, k, v)

    def _made(self, q: Tensor, k: Tensor, first: int) -> dict[int, DeviceTables]:
        """Of the lengths that are computed in the bound form; the kernel, its tile and its heads are the same for all."""
        form, lengths, plans = self._form, list[int](), list[Plan]()
        for length, plan in enumerate(self._plans(first, _AHEAD), first):
            alike = sees_all_heads(plan) and pack_of(q, k, plan) == form.pack
            if alike and parts_of(q, length, form.pack, form.tile.streamed) == form.parts:
                lengths.append(length)
                plans.append(plan)
        tables = tables_of_tokens(plans, form.tile.streamed, form.pack, form.parts)
        made = [(length, each) for length, each in zip(lengths, tables, strict=True) if each is not None]
        on_device = copied([each for _, each in made], q.device) if made else []
        return {length: each for (length, _), each in zip(made, on_device, strict=True)}


_AHEAD = 32
"""Lengths whose tables are made together: more would cost a cache that stops growing more than they save one that does not."""
