"""Rewinding where rings wrap, over several stretches of decoded tokens, and rows of the batch apart: as if the tokens had never come."""

import pytest
import torch

from longattn.attention import RingBufferAttention, RingBufferConfig
from longattn.attention.ring_buffer.testing import StreamModel, stale_slots_hold_nan


@pytest.fixture(autouse=True)
def _stale_slots_hold_nan():
    with stale_slots_hold_nan():
        yield


class Stream:
    """A module's stream beside its model."""

    def __init__(self, batch, **options):
        self.config = RingBufferConfig(num_heads=2, head_dim=4, dropout=0.0, **options)
        self.module = RingBufferAttention(self.config)
        self.state = self.module.new_state(batch, dtype=torch.float64)
        self.model = StreamModel.begin(self.config, batch, 2)
        self.random = torch.Generator().manual_seed(0)

    def call(self, n, decode):
        """n tokens."""
        part = torch.randn(3, self.state.batch_size, n, 2, 4, generator=self.random, dtype=torch.float64)
        out = self.module(*part, buffer_state=self.state, is_decoder=decode)
        expected = self.model.call(*part, None, decode)
        torch.testing.assert_close(out if decode else out[0], expected, atol=1e-9, rtol=1e-9)
        self.check()

    def rewind(self, *amounts):
        """As many tokens of each row, or of all."""
        self.state.rewind(list(amounts) if len(amounts) > 1 else amounts[0])
        self.model.rewind(list(amounts) if len(amounts) > 1 else list(amounts) * self.state.batch_size)
        self.check()

    def check(self):
        """Positions and outputs that may be fed back."""
        self.state.check_valid()
        assert self.state.positions == [row.position for row in self.model.rows]
        held = max(0, min(len(row.fed) - row.lost for row in self.model.rows))
        assert self.state.feedback_held == held
        if held:
            expected = torch.stack([torch.cat([out for _, out in row.fed[-held:]]) for row in self.model.rows])
            torch.testing.assert_close(self.state.feedback(held), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("kept", [2, 3, 4, 7])
@pytest.mark.parametrize("sinks", [0, 2])
def test_rows_apart_rewind_across_a_wrapped_ring(size, kept, sinks):
    """Rings of evicted rows whose length does not divide the window's: each row's own come back, after any number of turns."""
    stream = Stream(2, buffer_size=size, max_rewind=kept, sinks=sinks)
    stream.call(2 * size + sinks, False)
    stream.rewind(0, 1)
    for turn in range(2 * size + 1):
        for _ in range(kept):
            stream.call(1, True)
        stream.rewind(kept, max(1, kept - 1 - turn % 2))
        stream.call(1, True)
    stream.call(2, False)
    stream.rewind(2)


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("kept", [2, 3, 4, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_together_rewind_across_a_wrapped_ring(size, kept, causal):
    """The same for chunks of several tokens, some longer than the window. Without causality the oldest token that came back is seen too."""
    stream = Stream(1, buffer_size=size, max_rewind=kept, causal=causal)
    for n in (1, size, 2, 2 * size + 1, 3, kept):
        stream.call(n, False)
        stream.rewind(min(kept, n))
        stream.call(1, causal)
    for _ in range(2):
        stream.call(2 * size, False)  # nothing of it comes back: what is evicted next was never evicted before
        stream.call(kept, False)
        stream.rewind(kept)
        stream.call(1, causal)


def test_a_rewind_over_several_stretches_of_decoded_tokens():
    """Outputs of each are forgotten, those before stay; a stretch may be left in part, as a whole, or with what came before it."""
    stream = Stream(1, buffer_size=12, max_rewind=6)
    for n, decode in ((3, False), (2, True), (1, False), (2, True), (2, False), (1, True)):
        for _ in range(n if decode else 1):
            stream.call(1 if decode else n, decode)
    assert stream.state.feedback_held == 5
    for amount, held in ((1, 4), (1, 4), (2, 3), (3, 1), (1, 0)):
        stream.rewind(amount)
        assert stream.state.feedback_held == held
    stream.call(1, True)
    assert stream.state.feedback_held == 1
