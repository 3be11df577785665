"""`TokenStream`: a model of dilated layers, token by token, in the memory that its patterns need; and how `LongNet.generate` draws tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from longattn.attention.models.layers import DilatedTransformerEncoderLayer
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import check_integers, check_positive, check_size, check_type
from longattn.patterncache.spans import shortened

if TYPE_CHECKING:
    from longattn.attention.models.longnet import LongNet


class TokenStream:
    """Logits of a `LongNet` for tokens that come piece by piece: those of `model(all tokens)`, in memory that does not grow with them.

    Each layer has a `StreamingAttention`. Made by `LongNet.stream`.

    Attributes:
        states: of each layer; None before the first call.
    """

    def __init__(self, model: LongNet, invariant: bool = False, max_rewind: int = 0) -> None:
        self.model = model
        options: dict[str, Any] = {"invariant": invariant, "max_rewind": max_rewind}
        layers = cast("Iterable[DilatedTransformerEncoderLayer]", model.layers)
        self.attentions = [layer.self_attn.streaming(**options) for layer in layers]
        self.states: list[StreamingState | None] = [None] * len(self.attentions)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        state = self.states[0]
        return 0 if state is None else state.positions[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(state.nbytes for state in self.states if state is not None)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read the next tokens, (batch, n) integers, and return their logits, (batch, n, num_tokens).

        Raises:
            ValueError: the model is in training mode, in which dropout draws; or another batch size than before.
        """
        model = self.model
        if model.training:
            raise ValueError(
                "model must be in evaluation mode, model.eval(), where its tokens stream, got training mode"
            )
        x = model.embedding(tokens) * model.embedding.embedding_dim**0.5
        layers = cast("Iterable[DilatedTransformerEncoderLayer]", model.layers)
        for number, layer in enumerate(layers):
            x, self.states[number] = layer.stream(x, self.attentions[number], self.states[number])
        return nn.functional.linear(model.norm(x), model.embedding.weight)

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens, at most `max_rewind`. Raises as `StreamingState.rewind` does."""
        for state in self.states:
            if state is not None:
                state.rewind(tokens)

    def state_dict(self) -> dict[str, Any]:
        """What was read, as torch.save takes it, without the model's weights."""
        return {"states": [None if state is None else state.state_dict() for state in self.states]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is of a model with another number of layers; or as `StreamingState.from_state_dict` does.
        """
        entries = saved["states"]
        if len(entries) != len(self.states):
            raise ValueError(f"saved must have the states of {len(self.states)} layers, got {len(entries)}")
        self.states = [None if entry is None else StreamingState.from_state_dict(entry) for entry in entries]


def check_tokens(tokens: object) -> None:
    """(batch, seq) integers."""
    checked = check_type("tokens", tokens, Tensor, "a torch.Tensor of integers (batch, seq)")
    if checked.dtype not in (torch.int64, torch.int32) or checked.dim() != 2:
        raise TypeError(f"tokens must be int64 or int32 (batch, seq), got {checked.dtype} {tuple(checked.shape)}")


def generate(
    stream: Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: int | Sequence[int] | None,
    callback: Callable[[Tensor], object] | None,
    prefill_size: int,
    generator: torch.Generator | None,
) -> Tensor:
    """`LongNet.generate` over a stream of its tokens."""
    check_tokens(tokens)
    check_size("max_new_tokens", max_new_tokens)
    check_size("prefill_size", prefill_size)
    if not isinstance(cast(object, temperature), (int, float)) or temperature:
        temperature = check_positive("temperature", temperature)
    if not 0 < check_positive("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {shortened(top_p)}")
    if not tokens.shape[1]:
        raise ValueError(f"tokens must be (batch, seq) with a token at least, got {tuple(tokens.shape)}")
    if generator is not None:
        check_type("generator", generator, torch.Generator, "None or a torch.Generator")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be None or callable, got {shortened(callback)} ({type(callback).__name__})")
    one = isinstance(stop, int) and not isinstance(stop, bool)
    listed = [] if stop is None else [stop] if one else check_integers("stop", stop)
    stops = torch.tensor([check_size("stop", token, least=0) for token in listed], device=tokens.device)
    logits = tokens.new_empty(0)
    for begin in range(0, tokens.shape[1], prefill_size):
        logits = stream(tokens[:, begin : begin + prefill_size])[:, -1]
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    new: list[Tensor] = []
    for number in range(max_new_tokens):
        token = draw(logits, temperature, top_p, generator).to(tokens.dtype)
        if new:
            # A row that has ended repeats its last token, a stop token.
            token = torch.where(ended, new[-1], token)
        new.append(token)
        if callback is not None:
            callback(token)
        ended |= torch.isin(token, stops)
        if bool(ended.all()) or number + 1 == max_new_tokens:
            break
        logits = stream(token[:, None])[:, -1]
    return torch.cat((tokens, torch.stack(new, 1)), 1)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """(batch,) the most likely tokens at temperature 0; else drawn among the fewest whose probabilities add up to `top_p` (nucleus sampling,
    Holtzman et al. 2020, arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
