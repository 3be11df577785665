"""Streams in 8 bits: the stated error of numbers and of outputs, bytes, and lives of such states."""

import math

import pytest
import torch

from longattn.attention import StreamingAttention, StreamingState, pattern_attention
from longattn.attention.streaming.slot_buffer import SlotBuffer
from longattn.patterncache import Dilated, Window

SHAPE = (2, 50, 64)
DILATED = Dilated((16, 64), (1, 4), causal=True)


def rows(scale):
    """Numbers of very different sizes: rows of one size, rows with one large number, zeros."""
    x = torch.randn(SHAPE) * torch.logspace(-6, 3, 50)[:, None] * scale
    x[:, ::5, 0] *= 100
    x[:, 7] = 0
    return x


def error_bound(x, storage):
    """As `slot_buffer` states it, and a rounding of float32."""
    largest = x.abs().amax(-1, keepdim=True)
    bound = largest / 254 if storage == "int8" else torch.maximum(x.abs() / 16, largest / (448 * 1024))
    return bound * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_numbers_are_off_by_at_most_the_stated_error(storage, scale):
    """Of every number, whatever else is in its row; zeros stay zeros."""
    x, buffer = rows(scale), SlotBuffer(SHAPE, torch.float32, torch.device("cpu"), storage)
    slots = torch.arange(100).flip(0).view(2, 50)
    buffer.put(slots, x)
    read = buffer.read(slots)
    assert ((read - x).abs() <= error_bound(x, storage)).all()
    assert not read[:, 7].any()


@pytest.mark.parametrize("pattern", [DILATED, Window(24, sinks=2)], ids=lambda p: p.name)
@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_outputs_are_off_by_at_most_the_stated_error(storage, pattern):
    """Token by token, beside the full forward: d + (exp(2 scale |q|_1 e) - 1) max |v|; and not by nothing."""
    module = StreamingAttention(pattern, num_heads=4, head_dim=64, kv_heads=2, storage=storage)
    q = torch.randn(1, 80, 4, 64) / 8
    k, v = torch.randn(2, 1, 80, 2, 64)
    expected, state = pattern_attention(q, k, v, pattern), None
    key_error, value_error = (float(error_bound(x, storage).max()) for x in (k, v))
    for at in range(80):
        out, state = module(q[:, at : at + 1], k[:, at : at + 1], v[:, at : at + 1], state)
        spread = 2 * 64**-0.5 * float(q[:, at].abs().sum(-1).max()) * key_error
        error = float((out - expected[:, at : at + 1]).abs().max())
        assert error <= value_error + (math.exp(spread) - 1) * float(v.abs().max())
    assert error > 1e-6


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_bytes_are_little_more_than_half_of_bfloat16s(storage):
    """0.55 at most, scales included."""
    token = torch.randn(1, 70, 2, 64, dtype=torch.bfloat16)
    sizes = []
    for kind in (None, storage):
        _, state = StreamingAttention(DILATED, num_heads=2, head_dim=64, storage=kind)(token, token, token)
        sizes.append(state.nbytes)
    assert sizes[1] <= 0.55 * sizes[0]


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_copies_and_rows_go_on_with_the_same_bits(storage):
    """Saved and loaded, cloned, forked, admitted: what lies in the slots is the same."""
    module = StreamingAttention(DILATED, num_heads=2, head_dim=64, storage=storage)
    prompt, token = torch.randn(1, 30, 2, 64), torch.randn(1, 1, 2, 64)
    _, state = module(prompt, prompt, prompt)
    others = [state.clone(), StreamingState.from_state_dict(state.state_dict()), module.new_state(1).admit(0, state)]
    expected, _ = module(token, token, token, state)
    for other in others:
        assert torch.equal(expected, module(token, token, token, other)[0])


def test_what_is_wrong_is_named():
    """Another storage, and one whose bits depend on the calls."""
    with pytest.raises(ValueError, match="storage must be None, 'int8' or 'fp8', got 'int4'"):
        StreamingAttention(DILATED, num_heads=2, head_dim=8, storage="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage must be None where invariant is True"):
        StreamingAttention(DILATED, num_heads=2, head_dim=8, storage="int8", invariant=True)
