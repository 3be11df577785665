"""A cache of transformers that holds what a pattern's later queries see: one `StreamingAttention` for each layer.

A layer's `update` hands the call's own keys on, marked as its own; our attention function finds the mark, and attends to the layer's stream.
So positions, slots and padding stay here, and a model's code between the two sees tensors of the call's length. Imported when asked for: it
needs transformers.

A step is one operation to a compiler, `longattn::stream_step`, which names its layer by a number and advances the layer's clock, a tensor.
With `max_cache_len` positions are read from the clock and masks have one shape, so that a compiled model is compiled once.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longattn.attention.integrations.transformers_masks import HEADER, first_keys
from longattn.attention.streaming.module import StreamingAttention
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import integers
from longattn.patterncache import Pattern, parse_pattern
from longattn.patterncache.spans import shortened

MARK = "_longattn_stream"
"""The attribute of a key tensor that says which layer's stream it belongs to."""


_NUMBERS = count()
_LAYERS: weakref.WeakValueDictionary[int, StreamLayer] = weakref.WeakValueDictionary()
"""Layers by number, for graphs."""


def _stream_step(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, clock: Tensor, layer: int, pattern: str, scale: float | None
) -> Tensor:
    """`StreamLayer.step` of a layer by number; what was done is in its state, and in the clock."""
    return _LAYERS[layer].step(parse_pattern(pattern), q, k, v, mask, scale)


def _stream_step_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, clock: Tensor, layer: int, pattern: str, scale: float | None
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


stream_step = torch.library.custom_op("longattn::stream_step", _stream_step, mutates_args=("clock",))
cast(Any, stream_step).register_fake(_stream_step_fake)


class StreamLayer(CacheLayerMixin):
    """The stream of one layer.

    Args:
        max_rewind: tokens that `crop` can take back. Default 0.
        max_cache_len: most tokens, padding included; memory is taken at once. Default None: no maximum.
        offload: whether keys and values lie in host memory while other layers compute. Default False.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_rewind: int = 0, max_cache_len: int | None = None, offload: bool = False) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.max_rewind, self.max_cache_len, self.offloaded = max_rewind, max_cache_len, offload
        self.is_compileable = max_cache_len is not None
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self
        self.clock = torch.zeros((), dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        """Hold nothing, as before the first call."""
        self.keys = self.values = None
        self.is_initialized = False
        self.attention: StreamingAttention | None = None
        self.state: StreamingState | None = None
        self.tokens = 0
        self.clock.zero_()
        self._pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The clock goes to the device of the keys; a stream is made by its first attention."""
        if self.clock.device != key_states.device:
            self.clock = self.clock.to(key_states.device)
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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
                    f"{name} must be none in a streaming cache of longattn, got {shortened(value)}: use another cache"
                )
        scale = options.get("softmax_scale")
        if torch.compiler.is_compiling():
            return stream_step(q, k, v, mask, self.clock, self.number, pattern.canonical(), scale)
        return self.step(pattern, q, k, v, mask, scale)

    def step(
        self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """`attend` with keys and values (batch, n, kv_heads, head_dim) that are no longer pending."""
        begun, end = self.tokens, self.tokens + q.shape[1]
        if self.max_cache_len is not None and end > self.max_cache_len:
            raise ValueError(
                f"max_cache_len must be at least {end}, the tokens of this stream, got {self.max_cache_len}"
            )
        padding = self._padding(mask, q)
        if self.attention is None:
            self.attention = StreamingAttention(
                pattern,
                num_heads=q.shape[2],
                head_dim=q.shape[3],
                kv_heads=k.shape[2],
                value_head_dim=v.shape[3],
                softmax_scale=scale,
                max_rewind=self.max_rewind,
            )
        if self.state is None:
            self.state = self.attention.new_state(q.shape[0], dtype=k.dtype, device=k.device)
            if self.max_cache_len is not None:
                slots = self.attention.most_held(self.max_cache_len)
                self.state.pool.ensure(q.shape[0] * k.shape[2] * -(-slots // self.state.pool.page_size))
        self.tokens = end
        self.clock += q.shape[1]
        if self.offloaded:
            self.state.pool.move(q.device)
        with torch.no_grad():
            if all(first <= begun for first in padding):
                out, self.state = self.attention(q, k, v, self.state)
            else:
                out = self._attend_padded(padding, begun, q, k, v)
        if self.offloaded:
            self.offload()
        return out

    def _attend_padded(self, padding: list[int], begun: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for a call in which some rows still have padding: each row from its first token on, zero before."""
        assert self.attention is not None
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
        if mask.dtype == torch.int64:
            present = mask[:, 0, 0].bool().expand(q.shape[0], -1)
            first = first_keys(present)
            if torch.equal(torch.arange(present.shape[1], device=present.device) >= first[:, None], present):
                return integers(first)
            raise ValueError(
                "attention_mask must have its padding on the left in a streaming cache of longattn, got holes"
            )
        # Positions on the device, of compiled models: which pairs are seen is written out.
        form = f"{tuple(mask.shape)}, {mask.dtype}"
        if mask.shape[1] != 1 or mask.dtype not in (torch.int32, torch.bool):
            raise ValueError(
                f"attention_mask must be causal with padding on the left in a streaming cache of longattn, got one of {form}: masks of the model's "
                f"own need another cache"
            )
        visible = (mask[:, 0, :, HEADER:] != 0) if mask.dtype == torch.int32 else mask[:, 0]
        keys = torch.arange(visible.shape[2], device=mask.device)
        rows = self.tokens + torch.arange(visible.shape[1], device=mask.device)[:, None]
        first = first_keys(visible[:, -1])
        expected = (keys >= first[:, None, None]) & (keys <= rows)
        # What stands on padding is attended to by nobody, and its own row says nothing.
        if not (expected == visible)[(rows >= first[:, None, None]).expand_as(visible)].all():
            raise ValueError(
                f"attention_mask must be causal with padding on the left in a streaming cache of longattn, got one of {form}: windows, packed "
                f"sequences and masks of the model's own need another cache"
            )
        return integers(first.expand(q.shape[0]))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens with this call's, or max_cache_len, 0): masks speak of all tokens, of which padding is read."""
        return (self.tokens + query_length if self.max_cache_len is None else self.max_cache_len), 0

    def get_seq_length(self) -> Any:
        """Tokens so far, padding included; with max_cache_len a tensor, which no graph depends on."""
        return self.tokens if self.max_cache_len is None else self.clock

    def get_max_length(self) -> int:
        """max_cache_len; -1: no maximum."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back. Raises ValueError beyond max_rewind."""
        amount = abs(tokens_to_remove)
        if amount and self.state is not None:
            self.state.rewind(amount)
            self.tokens -= amount
            self.clock -= amount

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
        """Keys and values go to host memory; the next step fetches them."""
        if self.state is not None:
            self.state.pool.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Nothing: a step fetches its own keys and values."""
