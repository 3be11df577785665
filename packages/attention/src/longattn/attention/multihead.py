"""`MultiheadPatternAttention`: projections and LayerNorm around `PatternAttention`. Its forward is not overridden."""

from __future__ import annotations

from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from longattn.attention.arguments import CallOptions, MergeGrad, given_options, hidden_rows, positions, refuse_weights
from longattn.attention.models.projections import ProjectedModule
from longattn.attention.modules import PatternAttention
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.call_extents import CallExtents, on_local
from longattn.attention.sequences.rotary import rotate
from longattn.attention.sequences.varlen import jagged_like, pack_jagged, refuse_jagged_shards
from longattn.attention.streaming.module import StreamingAttention
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import (
    check_bool,
    check_embedded,
    check_factory,
    check_positive,
    check_size,
    check_type,
    global_heads,
)
from longattn.attention.wiring import Wiring
from longattn.patterncache import Pattern
from longattn.patterncache.spans import shortened


class MultiheadPatternAttention(ProjectedModule):
    """Project, attend by a pattern, merge heads, LayerNorm, project (MAGNETO, Wang et al. 2022, arXiv:2210.06423).

    | tensor | shape |
    | --- | --- |
    | query, output | (batch, Nq, embed_dim) |
    | key, value | (batch, Nk, embed_dim); default: query, and key |
    | weights | (batch, heads, Nq, Nk), only with need_weights=True |

    Args:
        embed_dim, num_heads: num_heads divides embed_dim.
        pattern: who sees whom.
        kv_heads: heads of keys and values, dividing num_heads (GQA). Default num_heads.
        value_head_dim: of values and of each head's output. Default: that of queries and keys, embed_dim / num_heads.
        softmax_scale, dropout, backend, schedule, wiring, sparse_weights, merge_grad: as in `PatternAttention`.
        bias: of the projections. Default True.
        fused_qkv: one projection instead of three. Default False. State dicts load into each other.
        rotary_base: turn queries and keys by their positions, with angles of this base (see `rotary`). Default None: do not.
        layer_norm: normalise the merged heads before the output projection. Default True.
        layer_norm_eps: default 1e-5.
        gamma_init: gain of the value and output projections' initialisation (MAGNETO's gamma). Default 1.0.
        head_start, local_heads: a slice of the module, with heads head_start .. head_start + local_heads of num_heads alone: rows of the
            projections of those heads and of their key heads, columns of the output projection, and its bias where head_start is 0, so
            that outputs of all slices add up to the module's. A key head that query heads of several slices share is in each of them,
            and its gradients add up. Needs layer_norm=False, for that is over all heads. Default: all heads.
        warn_apart: as in `PatternAttention`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    batch_first = True
    """Read by `nn.TransformerEncoder`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern,
        *,
        kv_heads: int | None = None,
        value_head_dim: int | None = None,
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        fused_qkv: bool = False,
        rotary_base: float | None = None,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        backend: str | None = None,
        schedule: Schedule | None = None,
        wiring: Wiring | None = None,
        sparse_weights: bool = False,
        merge_grad: MergeGrad = "exact",
        head_start: int | None = None,
        local_heads: int | None = None,
        warn_apart: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.num_heads = check_size("num_heads", num_heads)
        self.kv_heads = num_heads if kv_heads is None else check_size("kv_heads", kv_heads)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim={embed_dim}, got {num_heads}")
        if num_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide num_heads={num_heads}, got {kv_heads}")
        self.head_dim = embed_dim // num_heads
        width = self.head_dim if value_head_dim is None else value_head_dim
        self.value_head_dim = check_size("value_head_dim", width)
        self._hold_heads(head_start, local_heads)
        self.gamma_init = check_positive("gamma_init", gamma_init)
        self.rotary_base = None if rotary_base is None else check_positive("rotary_base", rotary_base)
        if rotary_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary_base must be None for an odd head_dim, got head_dim={self.head_dim}")
        factory_kwargs = check_factory(device, dtype)
        has_bias = check_bool("bias", bias)
        self._make_projections(check_bool("fused_qkv", fused_qkv), has_bias, factory_kwargs)
        eps = check_positive("layer_norm_eps", layer_norm_eps)
        use_norm = check_bool("layer_norm", layer_norm)
        if use_norm and self.local_heads < num_heads:
            raise ValueError(
                "layer_norm must be False for a slice of heads (local_heads), because it normalises over all heads of the module, got True"
            )
        merged, with_bias = self.local_heads * self.value_head_dim, has_bias and not head_start
        self.norm = nn.LayerNorm(merged, eps=eps, **factory_kwargs) if use_norm else nn.Identity()
        self.out_proj = nn.Linear(merged, embed_dim, bias=with_bias, **factory_kwargs)
        self.attention = PatternAttention(
            pattern,
            softmax_scale=softmax_scale,
            dropout=dropout,
            backend=backend,
            schedule=schedule,
            wiring=wiring,
            sparse_weights=sparse_weights,
            merge_grad=merge_grad,
            head_start=head_start,
            num_heads=None if head_start is None else num_heads,
            warn_apart=warn_apart,
        )
        self._resources = self.attention._resources
        self.reset_parameters()

    def _hold_heads(self, head_start: int | None, local_heads: int | None) -> None:
        """Which query and key heads are here.

        Raises:
            TypeError, ValueError: no such slice, or one whose query heads share key heads unevenly.
        """
        if (head_start is None) != (local_heads is None):
            raise ValueError(
                f"head_start and local_heads must be given together, got {shortened(head_start)} and {shortened(local_heads)}"
            )
        self.local_heads = self.num_heads if local_heads is None else check_size("local_heads", local_heads)
        total, first, count = global_heads(self.local_heads, head_start, None if head_start is None else self.num_heads)
        group = total // self.kv_heads
        if first % group == count % group == 0:
            self.local_kv_heads = count // group
        elif first // group == (first + count - 1) // group:
            self.local_kv_heads = 1
        else:
            raise ValueError(
                f"head_start and local_heads must be multiples of {group}, the query heads of a key head, or lie within one such group, "
                f"got {first} and {count}"
            )

    def reset_parameters(self) -> None:
        """Xavier normal; value and output projections with gain gamma_init; biases zero; LayerNorm one and zero."""
        self._reset_projections(self.gamma_init)
        nn.init.xavier_normal_(self.out_proj.weight, gain=self.gamma_init)
        bias = cast("Tensor | None", self.out_proj.bias)
        if bias is not None:
            nn.init.zeros_(bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. Padded rows of key and value are zeroed before they are projected, so that what they hold reaches nothing.

        Args:
            query: (batch, Nq, embed_dim). key: default query. value: default key.
            is_causal, attention_mask, key_padding_mask: as in `pattern_attention`.
            need_weights: also return the attention weights, without dropout.
            options: `CallOptions`, as in `pattern_attention`.

        query, key and value may be packed as (1, total, embed_dim) with cu_seqlens, or jagged nested tensors (batch, lengths, embed_dim).

        Returns:
            (batch, Nq, embed_dim), a tensor and no pair (as torch.nn.MultiheadAttention returns even without weights), or with
            need_weights a pair: that, and weights (batch, heads, Nq, Nk) in the module's dtype.
        """
        call_options = given_options(options)
        key = query if key is None else key
        value = key if value is None else value
        if check_bool("need_weights", need_weights):
            refuse_weights(query, call_options)
        if check_type("query", query, Tensor, "a torch.Tensor (batch, seq, embed_dim)").is_nested:
            refuse_jagged_shards("query", self.attention.schedule)
            masks = {"attention_mask": attention_mask, "key_padding_mask": key_padding_mask}
            call_options |= masks
            packed, cu_seqlens = pack_jagged({"query": query, "key": key, "value": value}, call_options)
            # What was one tensor stays one, for a fused projection.
            q = packed[0]
            k = q if key is query else packed[1]
            v = k if value is key else packed[2]
            return jagged_like(query, self(q, k, v, is_causal, **call_options, **cu_seqlens))
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_embedded(name, x, self.embed_dim, self._dtype())
        call = CallExtents(query, key, self.attention.schedule)
        hidden = hidden_rows(call, key_padding_mask, call_options)
        query, key, value = _zero_padded(query, key, value, hidden)
        q, k, v = self._project(query, key, value)
        if self.rotary_base is not None:
            q_positions, k_positions = positions(call, call_options)
            q, k = _rotate_local(q, q_positions, self.rotary_base), _rotate_local(k, k_positions, self.rotary_base)
        out = self.attention(q, k, v, is_causal, attention_mask, key_padding_mask, **call_options)
        out = self.out_proj(self.norm(out.flatten(2)))
        if not need_weights:
            return out
        terms = call_options.get("score_terms")
        return out, self.attention.weights(q, k, is_causal, attention_mask, key_padding_mask, terms)

    def streaming(self, **options: Any) -> StreamingAttention:
        """The attention of this module for a stream of its own embeddings; options as in `StreamingAttention`.

        Raises:
            ValueError: a pattern that is not causal, a slice of the heads, or a learned scale.
        """
        if self.local_heads < self.num_heads:
            raise ValueError(
                f"local_heads must be all {self.num_heads} heads in a stream, got {shortened(self.local_heads)}"
            )
        scale = self.attention.softmax_scale
        if isinstance(scale, Tensor):
            raise ValueError("softmax_scale must be None or a number in a stream, got a tensor")
        return StreamingAttention(
            self.attention.pattern,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            value_head_dim=self.value_head_dim,
            softmax_scale=scale,
            **options,
        )

    def stream(
        self, x: Tensor, attention: StreamingAttention, state: StreamingState | None
    ) -> tuple[Tensor, StreamingState]:
        """Self-attention of the next tokens of a stream, (batch, n, embed_dim), by `attention` of `streaming()`; no dropout."""
        x = check_embedded("x", x, self.embed_dim, self._dtype())
        q, k, v = self._project(x, x, x)
        if self.rotary_base is not None:
            starts = [0] * x.shape[0] if state is None else state.positions
            rows = torch.arange(x.shape[1], device=x.device) + torch.tensor(starts, device=x.device)[:, None]
            q, k = (rotate(each, rows, self.rotary_base) for each in (q, k))
        out, advanced = attention(q, k, v, state)
        return self.out_proj(self.norm(out.flatten(2))), advanced

    def _dtype(self) -> torch.dtype | None:
        """What the embeddings must be of; None where layers were put in place of ours that keep it to themselves."""
        weights = [getattr(getattr(self, name, None), "weight", None) for name in self._projection_names]
        all_floating = all(isinstance(weight, Tensor) and weight.is_floating_point() for weight in weights)
        return weights[0].dtype if all_floating and isinstance(weights[0], Tensor) else None


def _zero_padded(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if rows is None:
        return query, key, value
    padded_key = _zero_rows(key, rows)
    return (
        padded_key if query is key else query,
        padded_key,
        padded_key if value is key else _zero_rows(value, rows),
    )


def _zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    return on_local(lambda local: local.masked_fill(rows.unsqueeze(-1), 0), x)


def _rotate_local(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return on_local(lambda local: rotate(local, positions, base), x)
