"""`PatternAttention`: with `MultiheadPatternAttention`, what all presets configure. Neither forward is overridden."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from longattn.attention.arguments import HeadedOptions, MergeGrad, given_options, refuse_weights
from longattn.attention.functional import pattern_attention
from longattn.attention.reaching import MOST_JUDGED, warn_apart
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.call_extents import CallExtents, is_sharded
from longattn.attention.schedules.callers import calling
from longattn.attention.schedules.local import Local
from longattn.attention.validate import (
    check_bool,
    check_merge_grad,
    check_pattern_argument,
    check_positive,
    global_heads,
)
from longattn.attention.weights import weights_of
from longattn.attention.wiring import Resources, WiredModule, Wiring
from longattn.kernels.interface import (
    ScoreTerms,
    check_backend_name,
    check_dropout,
    check_qkv,
    exchanged,
    in_order,
)
from longattn.patterncache import Pattern


class PatternAttention(WiredModule):
    """softmax(scale * q k^T + log counts) v, with the counts of a pattern. No parameters.

    | tensor | shape |
    | --- | --- |
    | query, key | (batch, Nq, heads, head_dim), (batch, Nk, kv_heads, head_dim) |
    | value, output | (batch, Nk, kv_heads, its own head_dim), (batch, Nq, heads, that head_dim) |
    | weights | (batch, heads, Nq, Nk), only with need_weights=True |

    Args:
        pattern: who sees whom.
        softmax_scale: a number > 0, or a floating tensor () or (heads,): a parameter is learned, another tensor is a buffer. Default
            head_dim ** -0.5.
        dropout: probability in [0, 1) of dropping a (query, key) pair in training. Default 0.
        backend: row of longattn.kernels that must serve. Default: the first that fits.
        schedule: in which order keys arrive. Default Local().
        wiring: which memory and which cache. Default: plain torch and the global cache.
        sparse_weights: weights come as sparse COO tensors. Default False: dense, O(Nq * Nk) memory.
        merge_grad: "exact" (default), or "detached" for torchscale's gradient, as in `pattern_attention`.
        head_start, num_heads: where q's heads are those of a slice, its first head, and the heads of the whole module. Default: all
            are here.
        warn_apart: warn with `ReachWarning`, once for each length, where the pattern leaves tokens apart that no number of layers joins, or
            tokens that see only themselves. Default False; the presets of dilated attention do.

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
        softmax_scale: float | Tensor | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        schedule: Schedule | None = None,
        wiring: Wiring | None = None,
        sparse_weights: bool = False,
        merge_grad: MergeGrad = "exact",
        head_start: int | None = None,
        num_heads: int | None = None,
        warn_apart: bool = False,
    ) -> None:
        super().__init__()
        self._resources = Resources(Wiring() if wiring is None else wiring)
        self.pattern = check_pattern_argument(pattern)
        # Both forms are made here, canonical strings included, so that traced code only picks one.
        self._causal_forms = (pattern.with_causal(False), pattern.with_causal(True))
        for form in (pattern, *self._causal_forms):
            form.canonical()
        self.softmax_scale: float | Tensor | None
        if isinstance(softmax_scale, Tensor) and not isinstance(softmax_scale, nn.Parameter):
            self.register_buffer("softmax_scale", softmax_scale)
        elif softmax_scale is None or isinstance(softmax_scale, Tensor):
            self.softmax_scale = softmax_scale
        else:
            self.softmax_scale = check_positive("softmax_scale", softmax_scale)
        self.dropout = check_dropout("dropout", dropout)
        self.backend = check_backend_name(backend)
        self.schedule: Schedule = Local() if schedule is None else schedule
        self.sparse_weights = check_bool("sparse_weights", sparse_weights)
        check_merge_grad(merge_grad, pattern, None)
        self.merge_grad: MergeGrad = merge_grad
        global_heads(0, head_start, num_heads)
        self.head_start, self.num_heads = head_start, num_heads
        self.warn_apart = check_bool("warn_apart", warn_apart)
        self._judged: set[Any] = set()  # shapes of calls that `warn_apart` has looked at

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
        **options: Unpack[HeadedOptions],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. `is_causal=None` takes the constructor's; masks and `HeadedOptions` as in `pattern_attention`.

        Returns:
            (batch, Nq, heads, value's head_dim) in query's dtype; with need_weights also the weights, without dropout: of this rank's rows, and of all keys of the
            whole sequence, where a schedule is over a process group.
        """
        layout = options.pop("layout", "bnhd")
        if layout != "bnhd":
            query, key, value = in_order(layout, query, key, value)
        call_options = given_options(options)
        if not (isinstance(cast(object, query), Tensor) and query.is_nested):
            check_qkv(query, key, value, ("query", "key", "value"))
        if check_bool("need_weights", need_weights):
            refuse_weights(query, call_options)
        if self.warn_apart and not query.is_nested and not torch.compiler.is_compiling():
            judged = query.shape[1:3], key.shape[1], is_causal is None, is_causal is True
            if judged not in self._judged:
                self._judge(query, key, is_causal, call_options)
                if len(self._judged) == MOST_JUDGED:
                    self._judged.clear()
                self._judged.add(judged)
        # Ranks compare which module calls. Traced code does not know: one graph may serve several.
        alone = torch.compiler.is_compiling() or not (is_sharded(query) or getattr(self.schedule, "distributed", False))
        with nullcontext() if alone else calling(self):
            out: Tensor = cast(Any, pattern_attention)(
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
                # Without gradients there is nothing to detach, and one pass over all branches is quicker.
                merge_grad=self.merge_grad if torch.is_grad_enabled() else "exact",
                head_start=self.head_start,
                num_heads=self.num_heads,
                **call_options,
            )
        if layout != "bnhd":
            out = exchanged(out)
        if not need_weights:
            return out
        return out, self.weights(
            query, key, is_causal, attention_mask, key_padding_mask, call_options.get("score_terms")
        )

    def _judge(self, query: Tensor, key: Tensor, is_causal: bool | None, options: Any) -> None:
        """Warn where tokens of this call's sequence stand apart; not of packed documents, nor of a shard."""
        if options.get("cu_seqlens") is None and not self.schedule.distributed and query.shape[1] == key.shape[1]:
            heads = query.shape[2] if self.num_heads is None else self.num_heads
            warn_apart(self.pattern_for(is_causal), key.shape[1], heads)

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        is_causal: bool | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        score_terms: ScoreTerms = None,
    ) -> Tensor:
        """The weights of such a call, (batch, heads, Nq, Nk) in query's dtype: dense, or sparse COO with `sparse_weights`."""
        masks = {"attention_mask": attention_mask, "key_padding_mask": key_padding_mask}
        call = CallExtents(query, key, self.schedule)
        pattern, heads = self.pattern_for(is_causal), (self.head_start, self.num_heads)
        scale = self.softmax_scale
        return weights_of(call, query, key, pattern, scale, masks, self.sparse_weights, heads, score_terms)

    def extra_repr(self) -> str:
        """The pattern, and what differs from the defaults."""
        shown = [str(self.pattern), str(self.schedule)]
        scale = self.softmax_scale
        if scale is not None:
            shown += [f"softmax_scale={f'a tensor {tuple(scale.shape)}' if isinstance(scale, Tensor) else scale}"]
        shown += [] if self.backend is None else [f"backend={self.backend!r}"]
        shown += [f"dropout={self.dropout}"] if self.dropout else []
        shown += [f"merge_grad={self.merge_grad!r}"] if self.merge_grad != "exact" else []
        shown += [] if self.num_heads is None else [f"head_start={self.head_start}, num_heads={self.num_heads}"]
        return ", ".join(shown)
