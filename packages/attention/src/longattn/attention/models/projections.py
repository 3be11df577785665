"""Queries, keys and values from embeddings: three layers, or one with `fused_qkv`. State dicts of either load into the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn, split
from torch.nn.functional import linear

from longattn.attention.wiring import WiredModule


class ProjectedModule(WiredModule):
    """A module with q_proj, k_proj and v_proj, or, fused, with one qkv_proj whose rows are theirs, one below the other.

    Fused, self-attention is one product instead of three; queries, keys and values of different tensors take slices of its weight.
    """

    embed_dim: int
    num_heads: int
    kv_heads: int
    local_heads: int
    local_kv_heads: int
    head_dim: int
    value_head_dim: int
    fused_qkv: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    qkv_proj: nn.Linear

    def _make_projections(self, fused_qkv: bool, bias: bool, factory_kwargs: dict[str, Any]) -> None:
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv_proj = nn.Linear(self.embed_dim, sum(self.widths()), bias=bias, **factory_kwargs)
        else:
            for name, width in zip("qkv", self.widths(), strict=True):
                self.add_module(f"{name}_proj", nn.Linear(self.embed_dim, width, bias=bias, **factory_kwargs))
        cast(Any, self).register_load_state_dict_pre_hook(_match_layout)

    @property
    def _projection_names(self) -> tuple[str, ...]:
        return ("out_proj", "qkv_proj") if self.fused_qkv else ("out_proj", "q_proj", "k_proj", "v_proj")

    def widths(self) -> list[int]:
        """Features of queries, keys and values."""
        kv_heads = self.local_kv_heads
        return [self.local_heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.value_head_dim]

    def qkv_parameters(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """(weight, bias) of queries, keys and values; views of the one layer's where they are fused."""
        if not self.fused_qkv:
            layers = [getattr(self, f"{name}_proj") for name in "qkv"]
            return tuple((layer.weight, layer.bias) for layer in layers)
        weights = split(self.qkv_proj.weight, self.widths())
        bias = cast("Tensor | None", self.qkv_proj.bias)
        biases = (None, None, None) if bias is None else split(bias, self.widths())
        return tuple(zip(weights, biases, strict=True))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, seq, heads or kv_heads, head_dim or value_head_dim) of each.

        Raises:
            ValueError: a projection made another number of heads than the module holds, so that which ones is not known.
        """
        if not self.fused_qkv:
            # Called as layers: hooks on them, and layers put in their place, keep working.
            flat: Sequence[Tensor] = [
                getattr(self, f"{name}_proj")(x) for name, x in zip("qkv", (query, key, value), strict=True)
            ]
        elif query is key and key is value:
            flat = split(self.qkv_proj(query), self.widths(), -1)
        elif not isinstance(cast(object, self.qkv_proj), nn.Linear) or not self.qkv_proj.weight.is_floating_point():
            # A layer in its place, such as a quantized one, may not compute with slices of its weight: slice its outputs.
            flat = [split(self.qkv_proj(x), self.widths(), -1)[at] for at, x in enumerate((query, key, value))]
        else:
            pairs = zip((query, key, value), self.qkv_parameters(), strict=True)
            flat = [linear(x, weight, bias) for x, (weight, bias) in pairs]
        dims = (self.head_dim, self.head_dim, self.value_head_dim)
        q, k, v = (torch.unflatten(x, -1, (-1, dim)) for x, dim in zip(flat, dims, strict=True))
        if q.shape[2] != self.local_heads:
            raise ValueError(
                f"q_proj must make {self.local_heads} heads, got {q.shape[2]}: which of them these are is not known; in a "
                f"tensor-parallel plan use ColwiseParallel(use_local_output=False), or make the module with head_start and local_heads"
            )
        return q, k, v

    def _reset_projections(self, value_gain: float) -> None:
        """Xavier normal, values with that gain, biases zero: the same draws fused or not."""
        with torch.no_grad():
            for (weight, bias), gain in zip(self.qkv_parameters(), (1.0, 1.0, value_gain), strict=True):
                nn.init.xavier_normal_(weight, gain=gain)
                if bias is not None:
                    nn.init.zeros_(bias)


def _match_layout(module: ProjectedModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: three layers' entries become one's, or one's three, as this module has them; so do those of `nn.MultiheadAttention`."""
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj_{kind}" in state_dict:
            state_dict[f"{prefix}qkv_proj.{kind}"] = state_dict.pop(f"{prefix}in_proj_{kind}")
        fused, separate = f"{prefix}qkv_proj.{kind}", [f"{prefix}{name}_proj.{kind}" for name in "qkv"]
        if module.fused_qkv and all(entry in state_dict for entry in separate):
            state_dict[fused] = torch.cat([state_dict.pop(entry) for entry in separate])
        elif not module.fused_qkv and fused in state_dict and len(state_dict[fused]) == sum(module.widths()):
            state_dict.update(zip(separate, split(state_dict.pop(fused), module.widths()), strict=True))
