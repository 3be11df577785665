"""`LongNet.generate` and `LongNet.stream`: the tokens and logits of the whole forward, in the memory of a pattern."""

import io

import pytest
import torch

from longattn.attention import LongNet, MultiheadPatternAttention
from longattn.attention.models.generation import draw
from longattn.patterncache import Window


@pytest.fixture
def model():
    """A small model with GQA, in float64, so that the most likely token is no matter of rounding."""
    options = {"segment_lengths": (4, 12), "dilation_rates": (1, 2), "kv_heads": 2, "dtype": torch.float64}
    return LongNet(17, d_model=16, nhead=4, num_layers=2, **options).eval()


def greedy(model, tokens, count):
    """Without a cache: the whole forward for each token."""
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens


def test_greedy_tokens_are_those_without_a_cache(model):
    """For any length of the prompt and any size of its pieces, and for a batch."""
    for length, size in ((1, 2048), (7, 3), (13, 12), (30, 1)):
        prompt = torch.randint(17, (2, length))
        assert torch.equal(greedy(model, prompt, 20), model.generate(prompt, 20, prefill_size=size))


def test_a_stream_gives_the_logits_of_the_whole_forward(model):
    """In any pieces; after a rewind, and from a saved state."""
    tokens = torch.randint(17, (2, 40))
    with torch.no_grad():
        expected = model(tokens)
    stream = model.stream(max_rewind=2)
    parts = [stream(part) for part in tokens[:, :20].split([9, 1, 1, 9], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, :20])
    stream.rewind(2)
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    other = model.stream(max_rewind=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert 18 == other.position == stream.position
    first, second = other(tokens[:, 18:]), stream(tokens[:, 18:])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected[:, 18:])


def test_memory_does_not_grow(model):
    """Bytes after many periods are those after one."""
    stream = model.stream()
    stream(torch.randint(17, (1, 12)))
    after_one = stream.nbytes
    for _ in range(10):
        stream(torch.randint(17, (1, 12)))
    assert after_one == stream.nbytes


def test_stop_and_callback(model):
    """A row that has ended repeats its stop token; the callback gets each token once."""
    prompt, seen = torch.randint(17, (2, 5)), []
    free = greedy(model, prompt, 10)
    stop = int(free[0, 7])
    out = model.generate(prompt, 10, stop=stop, callback=seen.append)
    assert torch.equal(out[:, 5:], torch.stack(seen, 1))
    for row, expected in zip(out[:, 5:], free[:, 5:], strict=True):
        ends = (expected == stop).nonzero()
        end = int(ends[0]) + 1 if len(ends) else 10
        assert torch.equal(expected[: min(end, len(row))], row[:end]) and (row[end:] == stop).all()


def test_drawing():
    """Frequencies are those of the softmax at a temperature, within the nucleus; a generator repeats them."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.bincount(draw(logits, 1.0, 0.7, generator), minlength=4) / 20000
    torch.testing.assert_close(frequencies, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02, rtol=0)
    cold = torch.bincount(draw(logits, 0.5, 1.0, generator), minlength=4) / 20000
    torch.testing.assert_close(cold, torch.softmax(2 * logits[0], -1), atol=0.02, rtol=0)
    assert (draw(logits, 0.0, 1.0, None) == 0).all()
    again = [draw(logits, 1.0, 1.0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_what_is_wrong_is_named(model):
    """Training mode, arguments, slices of heads, patterns that are not causal."""
    prompt = torch.randint(17, (1, 5))
    for options, words in [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 1, "top_p": 1.5}, "top_p must be in"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be"),
        ({"max_new_tokens": 1, "prefill_size": 0}, "prefill_size must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            model.generate(prompt, **options)
    with pytest.raises(ValueError, match="tokens must be"):
        model.generate(prompt[:, :0], 1)
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        model.train().generate(prompt, 1)
    with pytest.raises(ValueError, match="local_heads must be all 4 heads"):
        MultiheadPatternAttention(16, 4, Window(2), layer_norm=False, head_start=0, local_heads=2).streaming()
    with pytest.raises(ValueError, match="saved must have the states of 2 layers"):
        model.stream().load_state_dict({"states": []})
