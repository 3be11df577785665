"""`PatternAttention` and `MultiheadPatternAttention`: the two modules that all presets configure. Neither forward is overridden."""

from __future__ import annotations

from typing import Any, Never

import torch
from torch import Tensor, nn

from longattn.attention.functional import pattern_attention
from longattn.attention.projections import ProjectedModule
from longattn.attention.rotary import rotate
from longattn.attention.schedule import Local, Schedule
from longattn.attention.validate import (
    check_bool,
    check_embedded,
    check_pattern_argument,
    check_positive,
    check_size,
    refuse_unknown,
)
from longattn.attention.weights import attention_weights, sparse_attention_weights
from longattn.attention.wiring import Resources, WiredModule, Wiring
from longattn.kernels.check import check_dropout, check_qkv
from longattn.kernels.dispatch import check_backend_name
from longattn.patterncache import Pattern


class PatternAttention(WiredModule):
    """softmax(scale * q k^T + log counts) v, with the counts of a pattern. No parameters.

    | tensor | shape |
    | --- | --- |
    | query, output | (batch, Nq, heads, head_dim) |
    | key, value | (batch, Nk, kv_heads, head_dim) |
    | weights | (batch, heads, Nq, Nk), only with need_weights=True |

    Args:
        pattern: who sees whom.
        softmax_scale: default head_dim ** -0.5.
        dropout: probability in [0, 1) of dropping a (query, key) pair in training. Default 0.
        backend: row of longattn.kernels that must serve. Default: the first that fits.
        schedule: in which order keys arrive. Default Local().
        wiring: which memory and which cache. Default: plain torch and the global cache.
        sparse_weights: weights come as sparse COO tensors. Default False: dense, O(Nq * Nk) memory.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> attention = PatternAttention(Dilated((4, 8), (1, 2), causal=True))
        >>> x = torch.randn(1, 10, 2, 16)
        >>> attention(x, x, x).shape
        torch.Size([1, 10, 2, 16])
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        schedule: Schedule | None = None,
        wiring: Wiring | None = None,
        sparse_weights: bool = False,
    ) -> None:
        super().__init__()
        self._resources = Resources(Wiring() if wiring is None else wiring)
        self.pattern = check_pattern_argument(pattern)
        # Both forms are made here, canonical strings included, so that traced code only picks one.
        self._causal_forms = (pattern.with_causal(False), pattern.with_causal(True))
        for form in (pattern, *self._causal_forms):
            form.canonical()
        self.softmax_scale = None if softmax_scale is None else check_positive("softmax_scale", softmax_scale)
        self.dropout = check_dropout("dropout", dropout)
        self.backend = check_backend_name(backend)
        self.schedule: Schedule = Local() if schedule is None else schedule
        self.sparse_weights = check_bool("sparse_weights", sparse_weights)

    def pattern_for(self, is_causal: bool | None) -> Pattern:
        """The pattern of a call: its own, or with its causal field replaced."""
        return self.pattern if is_causal is None else self._causal_forms[check_bool("is_causal", is_causal)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        **unknown: Never,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. `is_causal=None` takes the constructor's; masks as in `pattern_attention`.

        Returns:
            query's shape and dtype; with need_weights also the weights, without dropout.
        """
        refuse_unknown("forward()", unknown)
        check_qkv(query, key, value, ("query", "key", "value"))
        out = pattern_attention(
            query,
            key,
            value,
            self.pattern_for(is_causal),
            softmax_scale=self.softmax_scale,
            attention_mask=attention_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            schedule=self.schedule,
            environment=self._resources.environment,
        )
        if not check_bool("need_weights", need_weights):
            return out
        return out, self.weights(query, key, is_causal, attention_mask, key_padding_mask)

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The weights of such a call, (batch, heads, Nq, Nk) in query's dtype: dense, or sparse COO with `sparse_weights`."""
        weigh = sparse_attention_weights if self.sparse_weights else attention_weights
        return weigh(query, key, self.pattern_for(is_causal), self.softmax_scale, attention_mask, key_padding_mask)

    def extra_repr(self) -> str:
        """The pattern, and what differs from the defaults."""
        shown = [str(self.pattern), str(self.schedule)]
        shown += [f"{n}={getattr(self, n)!r}" for n in ("softmax_scale", "backend") if getattr(self, n) is not None]
        return ", ".join([*shown, *([f"dropout={self.dropout}"] if self.dropout else [])])


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
        softmax_scale, dropout, backend, schedule, wiring, sparse_weights: as in `PatternAttention`.
        bias: of the projections. Default True.
        fused_qkv: one projection instead of three. Default False. State dicts load into each other.
        rotary_base: turn queries and keys by their positions, with angles of this base (see `rotary`). Default None: do not.
        layer_norm: normalise the merged heads before the output projection. Default True.
        layer_norm_eps: default 1e-5.
        gamma_init: gain of the value and output projections' initialisation (MAGNETO's gamma). Default 1.0.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern,
        *,
        kv_heads: int | None = None,
        softmax_scale: float | None = None,
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
        self.gamma_init = check_positive("gamma_init", gamma_init)
        self.rotary_base = None if rotary_base is None else check_positive("rotary_base", rotary_base)
        if rotary_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary_base must be None for an odd head_dim, got head_dim={self.head_dim}")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        has_bias = check_bool("bias", bias)
        self._make_projections(check_bool("fused_qkv", fused_qkv), has_bias, place)
        eps = check_positive("layer_norm_eps", layer_norm_eps)
        use_norm = check_bool("layer_norm", layer_norm)
        self.norm = nn.LayerNorm(embed_dim, eps=eps, **place) if use_norm else nn.Identity()
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=has_bias, **place)
        self.attention = PatternAttention(
            pattern,
            softmax_scale=softmax_scale,
            dropout=dropout,
            backend=backend,
            schedule=schedule,
            wiring=wiring,
            sparse_weights=sparse_weights,
        )
        self._resources = self.attention._resources
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier normal; value and output projections with gain gamma_init; biases zero; LayerNorm one and zero."""
        self._reset_projections(self.gamma_init)
        nn.init.xavier_normal_(self.out_proj.weight, gain=self.gamma_init)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
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
        **unknown: Never,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. Padded rows of key and value are zeroed before they are projected, so that what they hold reaches nothing.

        Args:
            query: (batch, Nq, embed_dim). key: default query. value: default key.
            is_causal, attention_mask, key_padding_mask: as in `pattern_attention`.
            need_weights: also return the attention weights, without dropout.

        Returns:
            (batch, Nq, embed_dim), or that and weights (batch, heads, Nq, Nk) in the module's dtype.
        """
        refuse_unknown("forward()", unknown)
        key = query if key is None else key
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_embedded(name, x, self.embed_dim, self.out_proj.weight.dtype)
        query, key, value = _zero_padded(query, key, value, key_padding_mask)
        q, k, v = self._project(query, key, value)
        if self.rotary_base is not None:
            nq, nk = q.shape[1], k.shape[1]
            # Queries are the last of the positions, as everywhere.
            q = rotate(q, torch.arange(nk - nq, nk, device=q.device), self.rotary_base)
            k = rotate(k, torch.arange(nk, device=k.device), self.rotary_base)
        out = self.attention(q, k, v, is_causal, attention_mask, key_padding_mask)
        out = self.out_proj(self.norm(out.flatten(2)))
        if not check_bool("need_weights", need_weights):
            return out
        return out, self.attention.weights(q, k, is_causal, attention_mask, key_padding_mask)


def _zero_padded(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.shape != key.shape[:2]:
        return query, key, value  # no padding, or a mask that `attend` refuses by name
    hidden = key_padding_mask.unsqueeze(-1)
    padded_key = key.masked_fill(hidden, 0)
    return (
        padded_key if query is key else query,
        padded_key,
        padded_key if value is key else value.masked_fill(hidden, 0),
    )
