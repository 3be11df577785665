"""`RingBufferAttention`: attention over the last `buffer_size` tokens of a stream, in constant memory."""

from __future__ import annotations

import uuid
from typing import Any, Never

import torch
from torch import Tensor, nn

from longattn.attention.ring_buffer.advance import StreamOptions, advance
from longattn.attention.ring_buffer.config import RingBufferConfig
from longattn.attention.ring_buffer.decode import append_and_decode, fits_append_and_decode
from longattn.attention.ring_buffer.requests import (
    check_fit,
    check_position,
    check_state,
    check_tensors,
    geometry_of,
)
from longattn.attention.ring_buffer.state import RingBufferState
from longattn.attention.ring_buffer.tiles import TilingProcessor
from longattn.attention.ring_buffer.tuning import tuned
from longattn.attention.validate import check_bool, check_factory, check_size, check_type, refuse_unknown
from longattn.kernels.interface import Layout, ScoreTerms, autocast, exchanged, in_order


class RingBufferAttention(nn.Module):
    """softmax(scale * q k^T) v over the last `buffer_size` tokens of a stream (and its first `sinks`). No parameters.

    | tensor | shape |
    | --- | --- |
    | q, output | (batch, Nq, num_heads, head_dim), the output with value_head_dim |
    | k, v | (batch, n, kv_heads, head_dim), v with value_head_dim |
    | weights | (batch, num_heads, Nq, Nk); Nk counts the attended keys in position order, oldest first |

    An encoder call takes any number of tokens, and continues a state if it is given one. A decoder call appends its tokens (one, as a
    rule), attends, and keeps its outputs in the feedback ring. One module serves any number of threads, each with states of its own.

    Args:
        config: what it is. Default RingBufferConfig().

    Raises:
        TypeError: config is no RingBufferConfig.

    Example:
        >>> attention = RingBufferAttention(RingBufferConfig(num_heads=2, head_dim=16, buffer_size=8)).eval()
        >>> prompt, token = torch.randn(1, 20, 2, 16), torch.randn(1, 1, 2, 16)
        >>> out, state = attention(prompt, prompt, prompt)
        >>> attention(token, token, token, position=20, is_decoder=True, buffer_state=state).shape
        torch.Size([1, 1, 2, 16])
    """

    def __init__(self, config: RingBufferConfig | None = None) -> None:
        super().__init__()
        self.config = RingBufferConfig() if config is None else config
        check_type("config", self.config, RingBufferConfig, "a RingBufferConfig")
        self.tiling_processor = TilingProcessor(self.config)
        self._name = uuid.uuid4().hex
        self._latest: RingBufferState | None = None

    @classmethod
    def from_config(cls, config: RingBufferConfig) -> RingBufferAttention:
        """The module of a config, as xFormers' factory asks for it: the constructor by another name."""
        return cls(config)

    def new_state(
        self,
        batch_size: int,
        *,
        kv_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RingBufferState:
        """A state at position 0, for a stream that begins with a decoder call.

        Args:
            kv_heads: default the config's, else num_heads. dtype: default torch's. device: default the current one.
        """
        heads = self.config.kv_heads or self.config.num_heads if kv_heads is None else check_size("kv_heads", kv_heads)
        like = torch.empty(0, **check_factory(device, dtype))
        return self._new_state(check_size("batch_size", batch_size), heads, like)

    def tune(
        self,
        length: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Try tile sizes and orders on calls of `length` random tokens, keep the quickest in `tiling_processor`, and return them.

        Results do not depend on them, beyond rounding. Takes as long as some dozens of such calls, once on a machine: on CPUs the choice is
        kept in the kernels' cache folder (LONGATTN_CACHE), for this module's sizes, shape of call, torch, processor and threads.

        Args:
            dtype, device: default torch's default dtype, the current device.
        """
        heads, dim = self.config.num_heads, self.config.head_dim
        factory_kwargs = check_factory(device, dtype)
        shapes = [
            (check_size("batch_size", batch_size), check_size("length", length), h, dim)
            for h in (heads, *[self.config.kv_heads or heads] * 2)
        ]
        shapes[2] = (*shapes[2][:3], self.config.value_width)
        q, k, v = (torch.randn(shape, **factory_kwargs) for shape in shapes)
        latest = self._latest
        config = self.config
        about = (batch_size, k.shape[2], dim, config.buffer_size, config.causal, config.backend, q.dtype)
        with torch.no_grad():
            settings = tuned(self.tiling_processor, heads, length, q.device.type, about, lambda: self(q, k, v))
        self._latest = latest
        return settings

    def reset(self) -> None:
        """Forget the latest state: a decoder call without one then begins at position 0."""
        self._latest = None

    def forward(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        requires_grad: bool | None = None,
        position: int | Tensor | list[int] | None = None,
        is_decoder: bool = False,
        buffer_state: RingBufferState | None = None,
        att_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        needs_weights: bool = False,
        output_attentions: bool = False,
        *,
        attention_mask: Tensor | None = None,
        sink_logits: Tensor | None = None,
        score_terms: ScoreTerms = None,
        seed: Tensor | int | None = None,
        layout: Layout = "bnhd",
        **unknown: Never,
    ) -> Any:
        """Attend, and put the call's tokens into the ring.

        Args:
            q: None in a decoder call: the latest output in the feedback ring; then k and v may be None too, and are q.
            k, v: the call's tokens. q may be shorter in an encoder call: its queries are the last ones.
            requires_grad: False: no gradient. Default None, and True: as autograd says.
            position: tokens written so far, for all rows of the batch or for each. Default None: whatever it is.
            is_decoder: default False.
            buffer_state: what to continue. Default: an encoder call begins anew, a decoder call continues the module's latest state.
            att_mask, attention_mask: one thing by two names. bool, True = may see, or floating, added to the scaled scores; broadcastable
                to (batch, num_heads, Nq, Nk). In an encoder call it may be as wide as the call's own tokens: earlier ones are then seen.
            key_padding_mask: (batch, Nk) bool, True = padding; stays with its tokens. In an encoder call it may cover the call's own only.
            needs_weights, output_attentions: either returns weights as well. O(Nq * Nk) memory.
            sink_logits: (num_heads,), a learned sink per head, with gradient.
            score_terms: as in `pattern_attention`, by positions in the stream, with gradient. With positions="cache" and sinks, a Softcap alone.
            seed: decides what is dropped in training. Default: drawn from torch's generator.
            layout: "bnhd" (default): tensors are as in the table. "bhnd": q, k, v and the output have heads before the sequence, as views.

        Returns:
            Encoder: (output, state), with weights (output, state, weights). Decoder: output, with weights (output, weights).

        Raises:
            TypeError, ValueError: a bad argument, by name. The state is as it was.
        """
        if layout != "bnhd":
            q, k, v = in_order(layout, q, k, v)
            results = self.forward(
                q,
                k,
                v,
                requires_grad,
                position,
                is_decoder,
                buffer_state,
                att_mask,
                key_padding_mask,
                needs_weights,
                output_attentions,
                attention_mask=attention_mask,
                sink_logits=sink_logits,
                score_terms=score_terms,
                seed=seed,
                **unknown,
            )
            return (exchanged(results[0]), *results[1:]) if isinstance(results, tuple) else exchanged(results)
        dropout_p = self.config.dropout if self.training else 0.0
        plain = att_mask is None and attention_mask is None and key_padding_mask is None and sink_logits is None
        plain = (
            plain
            and score_terms is None
            and not (dropout_p or needs_weights is not False or output_attentions is not False or unknown)
        )
        if is_decoder is True and plain and seed is None and requires_grad is None:
            state = self._latest if buffer_state is None else buffer_state
            if fits_append_and_decode(state, q, k, v, position, self._name):
                if self._latest is not state:
                    # Module.__setattr__ takes as long as an operation.
                    self._latest = state
                return append_and_decode(self.config, state, q, k, v)  # type: ignore[arg-type]
        refuse_unknown("RingBufferAttention()", unknown)
        if att_mask is not None and attention_mask is not None:
            raise TypeError("att_mask must be None where attention_mask, its other name, is given, got both")
        weights = check_bool("needs_weights", needs_weights) | check_bool("output_attentions", output_attentions)
        if requires_grad is not None:
            check_bool("requires_grad", requires_grad)
        mask = attention_mask if att_mask is None else att_mask
        options = StreamOptions(mask, key_padding_mask, weights, dropout_p, seed, sink_logits, score_terms)
        with torch.set_grad_enabled(torch.is_grad_enabled() and requires_grad is not False):
            if check_bool("is_decoder", is_decoder):
                return self._decode(buffer_state, position, q, k, v, options)
            return self._encode(buffer_state, position, q, k, v, options)

    def _encode(
        self, state: RingBufferState | None, position: object, q: Any, k: Any, v: Any, options: StreamOptions
    ) -> tuple[Tensor, RingBufferState] | tuple[Tensor, RingBufferState, Tensor]:
        q, k, v = autocast(q, k, v)
        check_tensors(self.config, q, k, v, decode=False)
        state = self._ready(state, k, position)
        out, weights = advance(self.config, self.tiling_processor, state, (q, k, v), False, options)
        self._keep(state)
        return (out, state) if weights is None else (out, state, weights)

    def _decode(
        self, state: RingBufferState | None, position: object, q: Any, k: Any, v: Any, options: StreamOptions
    ) -> Tensor | tuple[Tensor, Tensor]:
        state = self._latest if state is None else state
        if q is None:
            if not isinstance(state, RingBufferState):
                raise ValueError("q must be given in the first decoder call, got None: there is no feedback yet")
            if not state.feedback_held:
                raise ValueError(
                    "q must be given while the feedback ring is empty, got None: it holds the outputs of decoder calls"
                )
            if self.config.value_width != self.config.head_dim:
                raise ValueError(
                    f"q must be given where outputs, of value_head_dim={self.config.value_width}, do not have its "
                    f"head_dim={self.config.head_dim}, got None"
                )
            q = state.feedback(1)
            k, v = (q, q) if k is None and v is None else (k, v)
        q, k, v = autocast(q, k, v)
        check_tensors(self.config, q, k, v, decode=True)
        state = self._ready(state, k, position)
        out, weights = advance(self.config, self.tiling_processor, state, (q, k, v), True, options)
        self._keep(state)
        return out if weights is None else (out, weights)

    def _ready(self, state: RingBufferState | None, k: Tensor, position: object) -> RingBufferState:
        """The state of the call, checked, or a new one."""
        geometry = geometry_of(self.config, k.shape[2])
        if state is None:
            check_position(position, [0] * k.shape[0], "to a new state")
            return self._new_state(k.shape[0], k.shape[2], k)
        state = check_state(state, self._name, geometry)
        check_fit(state, k)
        check_position(position, state.positions, "so far")
        return state

    def _keep(self, state: RingBufferState) -> None:
        """After a call: the state is this module's, and its latest."""
        state.owner = self._name
        self._latest = state

    def _new_state(self, batch_size: int, kv_heads: int, like: Tensor) -> RingBufferState:
        state = RingBufferState(geometry_of(self.config, kv_heads), batch_size, like.dtype, like.device)
        state.owner = self._name
        return state

    def extra_repr(self) -> str:
        """The config."""
        return str(self.config)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file holds the module, not the stream that it last served.
        return {**self.__dict__, "_latest": None}
