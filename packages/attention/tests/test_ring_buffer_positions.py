"""positions="cache": what StreamingLLM computes, without turning any key of the window again."""

import pytest
import torch

from longattn.attention import RingBufferAttention, RingBufferConfig
from longattn.attention.ring_buffer.positions import rotate_features, rotate_for_sinks
from longattn.attention.ring_buffer.testing import StreamModel


def config_of(**options):
    defaults = {"num_heads": 2, "head_dim": 8, "dropout": 0.0, "buffer_size": 6, "sinks": 2, "positions": "cache"}
    return RingBufferConfig(**{**defaults, **options})


@pytest.mark.parametrize("options", [{}, {"rotary_dim": 4}, {"rotary_interleaved": True}, {"rotary_base": 500.0}])
def test_a_stream_is_what_places_in_the_cache_give(options):
    """Prefill in chunks, then decode far past the window: each token sees the cache as if it had been written anew."""
    config = config_of(**options)
    module, model = RingBufferAttention(config), StreamModel.begin(config, 2, 2)
    state, position = None, 0
    for n in (1, 9, 4, *[1] * 20):
        bare = torch.randn(3, 2, n, 2, 8, dtype=torch.float64)
        at = torch.arange(position, position + n)
        q, k, v = rotate_features(bare[0], at, config), rotate_features(bare[1], at, config), bare[2]
        decode = position > 13
        out = module(q, k, v, is_decoder=decode, buffer_state=state)
        out, state = (out, state) if decode else out
        torch.testing.assert_close(out, model.call(q, k, v, None, decode), atol=1e-9, rtol=1e-9)
        position += n


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_a_rotation_of_pairs(interleaved):
    """By position * base ** (-2 i / dim), as complex numbers say it."""
    config = config_of(rotary_dim=6, rotary_interleaved=interleaved, rotary_base=100.0)
    x, at = torch.randn(1, 5, 1, 8, dtype=torch.float64), torch.tensor([0, 1, -3, 7, 1000])
    part = x[..., :6]
    pairs = part.unflatten(-1, (3, 2)) if interleaved else part.unflatten(-1, (2, 3)).transpose(-1, -2)
    angle = at[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    rotated = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    back = torch.view_as_real(rotated)
    expected = back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2)
    got = rotate_features(x, at, config)
    torch.testing.assert_close(got[..., :6], expected)
    assert torch.equal(got[..., 6:], x[..., 6:])


def test_far_down_a_stream_sinks_are_exact():
    """At position a million, a float32 sink score is that of its distance in the cache; float32 angles would be off by far."""
    config = config_of(head_dim=64)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    at = torch.tensor([1_000_000])
    seen = rotate_for_sinks(rotate_features(q, at, config).float(), at, config)
    score = (seen * rotate_features(k, torch.tensor([1]), config).float()).sum()
    expected = (rotate_features(q, torch.tensor([7]), config) * rotate_features(k, torch.tensor([1]), config)).sum()
    torch.testing.assert_close(score.double(), expected, atol=1e-5, rtol=1e-5)


def test_before_anything_is_evicted_positions_do_not_matter():
    """Absolute positions and places in the cache are the same then."""
    x = torch.randn(3, 1, 8, 2, 8)
    one, other = (RingBufferAttention(config_of(positions=p)) for p in ("cache", "absolute"))
    torch.testing.assert_close(one(*x)[0], other(*x)[0])
    longer = torch.randn(3, 1, 9, 2, 8)
    assert not torch.allclose(one(*longer)[0][:, 8], other(*longer)[0][:, 8])


def test_sinks_stay_in_their_slots():
    """Their rows are never written again, by any number of tokens."""
    module = RingBufferAttention(config_of())
    x = torch.randn(3, 1, 30, 2, 8)
    _, state = module(*x[:, :, :5])
    sinks = state.kv.main.storage[:, :, :, :2].clone()
    version = [module(*x[:, :, i : i + 1], is_decoder=True, buffer_state=state) for i in range(5, 30)]
    assert len(version) == 25
    assert torch.equal(state.kv.main.storage[:, :, :, :2, :8], sinks[..., :8])
    assert torch.equal(state.kv.main.planes[0][:, :, :2], x[1, :, :2].transpose(1, 2))
