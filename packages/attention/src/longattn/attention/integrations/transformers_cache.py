"""A cache of transformers that holds what a pattern's later queries see: one `StreamingAttention` for each layer.

A layer's `update` hands the call's own keys on, marked as its own; our attention function finds the mark, and attends to the layer's stream.
So positions, slots and padding stay here, and a model's code between the two sees tensors of the call's length. Imported when asked for: it
needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longattn.attention.streaming.module import StreamingAttention
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import integers
from longattn.patterncache import Pattern

MARK = "_longattn_stream"
"""The attribute of a key tensor that says which layer's stream it belongs to."""


class StreamLayer(CacheLayerMixin):
    """The stream of one layer.

    Args:
        max_rewind: tokens that `crop` can take back. Default 0.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_rewind: int = 0) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.max_rewind = max_rewind
        self.reset()

    def reset(self) -> None:
        """Hold nothing, as before the first call."""
        self.keys = self.values = None
        self.is_initialized = False
        self.attention: StreamingAttention | None = None
        self.state: StreamingState | None = None
        self.tokens = 0
        self._pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a stream is made by its first attention."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The call's own keys and values, (batch, kv_heads, n, head_dim), as they are, marked for the attention function.

        Raises:
            RuntimeError: those of the call before were never attended to by a pattern of longattn.
        """
        if self._pending is not None:
            raise RuntimeError(
                "a streaming cache of longattn needs attn_implementation to be a pattern's in every layer: keys of the call before were never attended to"
            )
        self.is_initialized = True
        self._pending = (key_states, value_states)
        setattr(key_states, MARK, self)
        return key_states, value_states

    def attend(self, pattern: Pattern, q: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Attend with q (batch, n, heads, head_dim) to the stream, the pending keys its newest.

        Args:
            pattern: causal. mask: as `transformers_masks` makes it. options: of `pattern_attention`.

        Raises:
            ValueError: a mask other than padding on the left, or an option that streams do not have, by name.
        """
        assert self._pending is not None
        k, v = (x.transpose(1, 2) for x in self._pending)
        self._pending = None
        for name, value in options.items():
            if name not in ("softmax_scale", "dropout_p") or (name == "dropout_p" and value):
                raise ValueError(
                    f"{name} must be none in a streaming cache of longattn, got {value!r}: use another cache"
                )
        padding = self._padding(mask, q)
        if self.attention is None:
            self.attention = StreamingAttention(
                pattern,
                num_heads=q.shape[2],
                head_dim=q.shape[3],
                kv_heads=k.shape[2],
                value_head_dim=v.shape[3],
                softmax_scale=options.get("softmax_scale"),
                max_rewind=self.max_rewind,
            )
        begun = self.tokens
        self.tokens += q.shape[1]
        with torch.no_grad():
            if all(first <= begun for first in padding):
                out, self.state = self.attention(q, k, v, self.state)
                return out
            return self._attend_padded(padding, begun, q, k, v)

    def _attend_padded(self, padding: list[int], begun: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for a call in which some rows still have padding: each row from its first token on, zero before."""
        assert self.attention is not None
        if self.state is None:
            self.state = self.attention.new_state(q.shape[0], dtype=k.dtype, device=k.device)
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        for row, first in enumerate(padding):
            part = slice(row, row + 1), slice(max(0, first - begun), None)
            if q[part].shape[1]:
                out[part], self.state = self.attention(q[part], k[part], v[part], self.state, rows=[row])
        return out

    def _padding(self, mask: Tensor | None, q: Tensor) -> list[int]:
        """Tokens of padding on the left of each row of the batch."""
        if mask is None or (mask.dtype == torch.int64 and not mask.shape[2]):
            return [0] * q.shape[0]
        if mask.dtype != torch.int64:
            raise ValueError(
                f"attention_mask must be causal with padding on the left in a streaming cache of longattn, got one of {mask.dtype}: windows, packed "
                f"sequences and masks of the model's own need another cache"
            )
        present = mask[:, 0, 0].bool().expand(q.shape[0], -1)
        first = present.int().argmax(1)
        ordered = torch.arange(present.shape[1], device=present.device) >= first[:, None]
        if not torch.equal(ordered, present):
            raise ValueError(
                "attention_mask must have its padding on the left in a streaming cache of longattn, got holes"
            )
        return integers(first)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens with this call's, 0): masks speak of all tokens, of which padding is read."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back. Raises ValueError beyond max_rewind."""
        amount = abs(tokens_to_remove)
        if amount and self.state is not None:
            self.state.rewind(amount)
            self.tokens -= amount

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, neighbours alike."""
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def offload(self) -> None:
        """Refused."""
        raise NotImplementedError(
            "a streaming cache of longattn does not move its layers to another device: use offloading=False"
        )

    def prefetch(self) -> None:
        """Refused."""
        self.offload()
