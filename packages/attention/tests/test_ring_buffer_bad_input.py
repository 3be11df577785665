"""Bad input is refused by name with what was expected and what came, and the state stays usable."""

import gc

import pytest
import torch

from longattn.attention import RingBufferAttention, RingBufferConfig, RingBufferState


def module_of(**options):
    return RingBufferAttention(
        RingBufferConfig(**{"num_heads": 2, "head_dim": 4, "dropout": 0.0, "buffer_size": 4, **options})
    )


def tokens(n=1, batch=2, heads=2, head_dim=4, dtype=torch.float32):
    return torch.randn(3, batch, n, heads, head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"buffer_size": 0}, ValueError, "buffer_size must be an integer >= 1, got 0"),
        ({"buffer_size": -5}, ValueError, "buffer_size must be an integer >= 1, got -5"),
        ({"buffer_size": 2.0}, TypeError, "buffer_size must be an integer >= 1, got 2.0"),
        ({"num_heads": True}, TypeError, "num_heads must be an integer"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"tile_size": 0}, ValueError, "tile_size must be"),
        ({"sinks": -1}, ValueError, "sinks must be an integer >= 0, got -1"),
        ({"bptt_calls": 1.5}, TypeError, "bptt_calls must be an integer >= 0"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"kv_heads": 3}, ValueError, "kv_heads must divide num_heads=2, got 3"),
        ({"positions": "relative"}, ValueError, "positions must be 'absolute' or 'cache', got 'relative'"),
        ({"positions": "cache", "causal": False}, ValueError, "positions must be 'absolute' where causal is False"),
        ({"positions": "cache", "head_dim": 5}, ValueError, "rotary_dim must be even and at most head_dim=5, got 5"),
        ({"backend": "nothing"}, ValueError, "backend"),
        ({"capacity": 3}, TypeError, "capacity"),
    ],
)
def test_a_config_is_checked_when_it_is_made(options, error, message):
    """By name."""
    with pytest.raises(error, match=message):
        module_of(**options)


def test_a_module_takes_a_config():
    """And nothing else; its defaults are the documented ones."""
    with pytest.raises(TypeError, match="config must be a RingBufferConfig, got 3"):
        RingBufferAttention(3)
    c = RingBufferAttention().config
    assert (c.num_heads, c.head_dim, c.dropout, c.buffer_size, c.block_size) == (8, 64, 0.1, 2048, 128)
    assert (c.tile_size, c.head_tile_size, c.prefill_size, c.causal) == (32, 4, 512, True)


WRONG = {
    "position skipped": (
        {"position": 8},
        {},
        ValueError,
        "position must be 7, the number of tokens written so far, got 8",
    ),
    "position repeated": ({"position": 6}, {}, ValueError, "position must be 7, .* got 6"),
    "position no number": ({"position": 7.0}, {}, TypeError, "position must be None, an integer"),
    "position by row": ({"position": torch.tensor([7, 8])}, {}, ValueError, "position must be 7"),
    "batch": ({}, {"batch": 3}, ValueError, "q, k and v must have the batch size of buffer_state, 2, got 3"),
    "dtype": (
        {},
        {"dtype": torch.float64},
        ValueError,
        "q, k and v must have the dtype of buffer_state, float32, got float64",
    ),
    "heads": ({}, {"heads": 1}, ValueError, r"q must have \(heads, head_dim\) = \(2, 4\) of the config, got \(1, 4\)"),
    "head_dim": ({}, {"head_dim": 8}, ValueError, "q must have .* got"),
    "mask": ({"att_mask": torch.ones(9) > 0}, {}, ValueError, r"att_mask must be broadcastable .* \(2, 2, 1, 4\)"),
    "mask dtype": (
        {"att_mask": torch.ones(4).long()},
        {},
        TypeError,
        "att_mask must be bool, True = may see, or floating",
    ),
    "no mask": ({"att_mask": [True]}, {}, TypeError, "att_mask must be a bool or floating torch.Tensor, got list"),
    "two masks": (
        {"att_mask": torch.ones(4) > 0, "attention_mask": torch.ones(4) > 0},
        {},
        TypeError,
        "att_mask must be None where attention_mask",
    ),
    "torch's mask": ({"attn_mask": torch.ones(4) > 0}, {}, TypeError, "attention_mask is the name here"),
    "padding": (
        {"key_padding_mask": torch.zeros(2, 1) > 0},
        {},
        ValueError,
        r"key_padding_mask must have shape \(batch, Nk\) = \(2, 4\), .* got \(2, 1\)",
    ),
    "padding dtype": ({"key_padding_mask": torch.zeros(2, 4)}, {}, TypeError, "key_padding_mask must be bool"),
    "no padding": ({"key_padding_mask": 3}, {}, TypeError, "key_padding_mask must be a bool torch.Tensor"),
    "sinks": ({"sink_logits": torch.zeros(3)}, {}, ValueError, r"sink_logits must have shape \(heads,\) = \(2,\)"),
    "weights": ({"needs_weights": 1}, {}, TypeError, "needs_weights must be True or False"),
    "gradient": ({"requires_grad": "yes"}, {}, TypeError, "requires_grad must be True or False"),
    "state": ({"buffer_state": 5}, {}, TypeError, "buffer_state must be None or a RingBufferState, got int"),
    "device": ({}, {"device": "meta"}, ValueError, "device of buffer_state, cpu, got meta"),
}


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_refused_call_leaves_the_state_as_it_was(wrong, decode):
    """The next good call is what it would have been."""
    options, shape, error, message = WRONG[wrong]
    if not decode and wrong == "padding":
        pytest.skip("an encoder call's padding may cover its own tokens")
    module = module_of()
    _, state = module(*tokens(7))
    twin, good = state.clone(), tokens()
    sizes = {name: value for name, value in shape.items() if name != "device"}
    bad = tokens(**sizes).to(shape.get("device", "cpu"))
    with pytest.raises(error, match=message):
        module(*bad, is_decoder=decode, **{"buffer_state": state, **options})
    state.check_valid()
    expected = module(*good, position=7, is_decoder=True, buffer_state=twin)
    assert torch.equal(module(*good, position=7, is_decoder=True, buffer_state=state), expected)


def test_kv_heads_do_not_change_mid_stream():
    """Neither do they differ from the config."""
    module = module_of(num_heads=4)
    q, k, v = tokens(5, heads=4)
    _, state = module(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="buffer_state must have kv_heads=4 of k, got kv_heads=2"):
        module(q[:, :1], k[:, :1], v[:, :1], is_decoder=True, buffer_state=state)
    with pytest.raises(ValueError, match="k must have kv_heads=2 of the config, got 4"):
        module_of(num_heads=4, kv_heads=2)(q, k, v)
    assert module(q[:, :1], k[:, :1, :2], v[:, :1, :2], is_decoder=True, buffer_state=state).shape == (2, 1, 4, 4)


def test_a_state_belongs_to_one_module():
    """Another layer of equal sizes is refused too; a loaded state belongs to whoever uses it first."""
    first, second = module_of(), module_of()
    _, state = first(*tokens(5))
    with pytest.raises(ValueError, match="buffer_state must be a state of this module"):
        second(*tokens(), is_decoder=True, buffer_state=state)
    loaded = RingBufferState.from_state_dict(state.state_dict())
    second(*tokens(), is_decoder=True, buffer_state=loaded)
    with pytest.raises(ValueError, match="buffer_state must be a state of this module"):
        first(*tokens(), is_decoder=True, buffer_state=loaded)
    loaded = RingBufferState.from_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="buffer_state must have buffer_size=8 of this module, got buffer_size=4"):
        module_of(buffer_size=8)(*tokens(), is_decoder=True, buffer_state=loaded)


def test_phases_need_their_tensors():
    """No q in an encoder call, none before there is feedback, lengths that fit."""
    module = module_of()
    with pytest.raises(TypeError, match="q must be a torch.Tensor"):
        module(None, *tokens()[1:])
    with pytest.raises(ValueError, match="q must be given in the first decoder call"):
        module(is_decoder=True)
    _, state = module(*tokens(3))
    with pytest.raises(ValueError, match="q must be given while the feedback ring is empty"):
        module(is_decoder=True, buffer_state=state)
    q, k, v = tokens(3)
    with pytest.raises(ValueError, match="q must have the length of k in decode, 3, got 1"):
        module(q[:, :1], k, v, is_decoder=True, buffer_state=state)
    with pytest.raises(ValueError, match="q must not be longer than k where causal, 1, got 3"):
        module(q, k[:, :1], v[:, :1], buffer_state=state)
    with pytest.raises(ValueError, match="position must be 0, the number of tokens written to a new state, got 3"):
        module(q, k, v, position=3)
    assert state.position == 3


def test_operations_on_a_state_are_checked():
    """rewind, reorder, fork, feedback, cat and loading."""
    module = module_of(max_rewind=2)
    _, state = module(*tokens(9))
    with pytest.raises(ValueError, match=r"tokens must be at most 2 here, .*\(max_rewind=2\), got 3"):
        state.rewind(3)
    with pytest.raises(ValueError, match="tokens must be from 0 to 9, the tokens written so far, got 10"):
        state.rewind(10)
    with pytest.raises(ValueError, match="tokens must be one number or 2"):
        state.rewind([1, 1, 1])
    with pytest.raises(TypeError, match="tokens must be integers"):
        state.rewind(1.5)
    with pytest.raises(ValueError, match=r"index must name rows from 0 to 1, got \[2\]"):
        state.reorder([2])
    with pytest.raises(ValueError, match="copies must be an integer >= 1, got 0"):
        state.fork(0)
    with pytest.raises(ValueError, match="n must be an integer from 0 to 0"):
        state.feedback(1)
    with pytest.raises(ValueError, match="states must hold at least one"):
        RingBufferState.cat([])
    _, other = module_of(buffer_size=3)(*tokens(9))
    with pytest.raises(ValueError, match="states must have one geometry"):
        RingBufferState.cat([state, other])
    with pytest.raises(ValueError, match="saved must be a dictionary of format 1"):
        RingBufferState.from_state_dict({})
    with pytest.raises(
        ValueError, match="saved must hold format, .*, got none of geometry, batch_size, dtype, clocks, rings"
    ):
        RingBufferState.from_state_dict({"format": 1})
    assert state.position == 9
    assert state.rewind(9).position == 0


def test_a_decoder_call_without_a_state_never_takes_one_of_two_streams():
    """Refused where two streams are alive, whichever came last; the only one goes on, and after a reset a new one begins."""
    attention = RingBufferAttention(RingBufferConfig(num_heads=2, head_dim=8, buffer_size=8, dropout=0.0)).eval()
    prompt, token = torch.randn(1, 5, 2, 8), torch.randn(1, 1, 2, 8)
    _, first = attention(prompt, prompt, prompt)
    attention(token, token, token, is_decoder=True)
    _, second = attention(prompt, prompt, prompt)
    for state in (first, second):
        attention(token, token, token, is_decoder=True, buffer_state=state)
        with pytest.raises(
            ValueError, match="buffer_state must be given where a module has several streams, got None with 2"
        ):
            attention(token, token, token, is_decoder=True)
    assert (first.position, second.position) == (7, 6)
    del state, first
    gc.collect()
    attention(token, token, token, is_decoder=True)
    assert second.position == 7
    attention.reset()
    attention(token, token, token, is_decoder=True)
    assert second.position == 7
