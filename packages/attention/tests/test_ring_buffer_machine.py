"""Any sequence of calls, rewinds, forks, reorders and copies is what a list of all tokens and the oracle say."""

import io
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from longattn.attention import RingBufferAttention, RingBufferConfig, RingBufferState
from longattn.attention.ring_buffer.testing import StreamModel, stale_slots_hold_nan

MOST_TOKENS = 40
"""Tokens in a stream after which the machine lets it rest."""


def near(got, expected):
    """Equal within rounding of float64."""
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9, check_dtype=False)


class Streams(RuleBasedStateMachine):
    """Up to three streams of one module, each beside its model."""

    @initialize(
        size=st.integers(1, 6),
        sinks=st.sampled_from([0, 0, 1, 3]),
        causal=st.sampled_from([True, True, False]),
        places=st.booleans(),
        kept=st.integers(0, 4),
        group=st.integers(1, 2),
        value_dim=st.sampled_from([None, 2, 7]),
        batch=st.integers(1, 3),
        tiles=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 7)),
        seed=st.integers(0, 1000),
    )
    def begin(self, size, sinks, causal, places, kept, group, value_dim, batch, tiles, seed):
        """A module and one empty stream."""
        self.random = torch.Generator().manual_seed(seed)
        self.config = RingBufferConfig(
            num_heads=2 * group,
            head_dim=4,
            value_head_dim=value_dim,
            dropout=0.0,
            buffer_size=size,
            sinks=sinks,
            causal=causal,
            positions="cache" if places and causal else "absolute",
            max_rewind=kept,
            tile_size=tiles[0],
            block_size=tiles[1],
            head_tile_size=tiles[2],
            prefill_size=tiles[3],
        )
        self.module = RingBufferAttention(self.config)
        self.module.tiling_processor.least_rows = 1
        state = self.module.new_state(batch, kv_heads=2, dtype=torch.float64)
        self.streams = [(state, StreamModel.begin(self.config, batch, 2))]

    def draw(self, batch, n):
        """q, k, v of n tokens."""
        shapes = ((self.config.num_heads, 4), (2, 4), (2, self.config.value_width))
        return [torch.randn(batch, n, *shape, generator=self.random, dtype=torch.float64) for shape in shapes]

    def chosen(self, which):
        """One of the streams."""
        return self.streams[which % len(self.streams)]

    @rule(which=st.integers(0, 2), n=st.integers(0, 9), padded=st.booleans())
    def chunk(self, which, n, padded):
        """An encoder call of any length; what padding holds is NaN."""
        state, model = self.chosen(which)
        if max(state.positions) > MOST_TOKENS:
            return
        q, k, v = self.draw(state.batch_size, n)
        hidden = torch.rand(k.shape[:2], generator=self.random) < 0.3 if padded else None
        if hidden is not None:
            k[hidden], v[hidden] = torch.nan, torch.inf
        out, same = self.module(q, k, v, buffer_state=state, key_padding_mask=hidden, requires_grad=False)
        assert same is state
        near(out, model.call(q, k, v, hidden, decode=False))

    @rule(which=st.integers(0, 2), n=st.sampled_from([1, 1, 1, 1, 2, 3]), say=st.booleans())
    def decode(self, which, n, say):
        """A decoder call."""
        state, model = self.chosen(which)
        if max(state.positions) > MOST_TOKENS:
            return
        q, k, v = self.draw(state.batch_size, n)
        position = state.position if say else None
        out = self.module(q, k, v, position=position, is_decoder=True, buffer_state=state)
        near(out, model.call(q, k, v, None, decode=True))

    @rule(which=st.integers(0, 2))
    def live_on_feedback(self, which):
        """A decoder call without input takes the latest output for it."""
        state, model = self.chosen(which)
        if not state.feedback_held or self.config.num_heads != 2 or max(state.positions) > MOST_TOKENS:
            return
        if self.config.value_width != self.config.head_dim:
            with pytest.raises(ValueError, match="q must be given where outputs"):
                self.module(is_decoder=True, buffer_state=state)
            return
        x = torch.stack([row.fed[-1][1] for row in model.rows]).flatten(0, 1)[:, None]
        near(self.module(is_decoder=True, buffer_state=state), model.call(x, x, x, None, decode=True))

    @rule(which=st.integers(0, 2), data=st.data(), each=st.booleans())
    def rewind(self, which, data, each):
        """All rows alike, or each by a number of its own; refused exactly when something cannot come back."""
        state, model = self.chosen(which)
        amounts = [data.draw(st.integers(0, min(5, p))) for p in state.positions]
        if not each:
            amounts = [min(amounts)] * len(amounts)
        before = state.positions
        try:
            assert state.rewind(amounts if each else amounts[0]) is state
        except ValueError:
            assert state.positions == before
            assert any(n > self.config.max_rewind - 5 for n in amounts)
            return
        model.rewind(amounts)

    @rule(which=st.integers(0, 2), data=st.data())
    def reorder(self, which, data):
        """Beam search picks rows."""
        state, model = self.chosen(which)
        index = data.draw(st.lists(st.integers(0, state.batch_size - 1), min_size=1, max_size=3))
        assert state.reorder(torch.tensor(index)) is state
        model.rows = model.taken(index).rows

    @precondition(lambda self: len(self.streams) < 3)
    @rule(which=st.integers(0, 2), how=st.sampled_from(["clone", "fork", "pickle", "file", "cat"]))
    def copy(self, which, how):
        """Another stream that shares nothing with the first."""
        state, model = self.chosen(which)
        index = list(range(state.batch_size))
        if how == "clone":
            other = state.clone()
        elif how == "fork":
            other, index = state.fork(2), [i for i in index for _ in range(2)]
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(state))
        elif how == "file":
            file = io.BytesIO()
            state.save(file)
            file.seek(0)
            other = RingBufferState.load(file)
        else:
            last, others = self.streams[-1]
            other = RingBufferState.cat([state, last])
            rows = model.taken(index).rows + others.taken(list(range(last.batch_size))).rows
            self.streams.append((other, StreamModel(self.config, rows)))
            return
        self.streams.append((other, model.taken(index)))

    @rule(which=st.integers(0, 2), wrong=st.sampled_from(["position", "batch", "dtype", "heads", "mask"]))
    def refuse(self, which, wrong):
        """A bad call says what was expected and changes nothing."""
        state, _ = self.chosen(which)
        q, k, v = self.draw(state.batch_size + (wrong == "batch"), 1)
        if wrong == "dtype":
            q, k, v = (x.float() for x in (q, k, v))
        if wrong == "heads":
            k, v = k[:, :, :1], v[:, :, :1]
        options = {"position": [p + 1 for p in state.positions]} if wrong == "position" else {}
        if wrong == "mask":
            options = {"key_padding_mask": torch.zeros(state.batch_size, 99, dtype=torch.bool)}
        with pytest.raises(ValueError, match="must"):
            self.module(q, k, v, is_decoder=True, buffer_state=state, **options)

    @invariant()
    def agrees(self):
        """Positions, feedback and the state's own invariants."""
        for state, model in getattr(self, "streams", []):
            state.check_valid()
            assert state.positions == [row.position for row in model.rows]
            held = max(0, min(len(row.fed) - row.lost for row in model.rows))
            assert state.feedback_held == held
            if held:
                expected = [torch.cat([out for _, out in row.fed[-held:]]) for row in model.rows]
                near(state.feedback(held), torch.stack(expected))


class TestStreams:
    """The machine, with NaN in every slot that was not written."""

    def test_any_sequence_of_operations(self):
        """Each output equals the oracle over the last `buffer_size` tokens."""
        from hypothesis.stateful import run_state_machine_as_test

        with stale_slots_hold_nan():
            run_state_machine_as_test(Streams, settings=settings(stateful_step_count=20))
