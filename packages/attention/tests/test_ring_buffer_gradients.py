"""Gradients through the window: of the call, of earlier calls as `bptt_calls` says, and never of a stale slot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.attention import RingBufferAttention, RingBufferConfig
from longattn.attention.ring_buffer.testing import stale_slots_hold_nan
from longattn.kernels import reference_attention
from longattn.kernels.philox import keep_scale


@pytest.fixture(autouse=True)
def _stale_slots_hold_nan():
    with stale_slots_hold_nan():
        yield


def near(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


def window_counts(n, total, size, sinks, causal, before, first=None):
    """(n, total) of what the last n queries see, when `before` tokens came before the call."""
    i = torch.arange(total - n, total)[:, None]
    j = torch.arange(total)[None]
    if causal:
        return ((j <= i) & ((j > i - size) | (j < sinks))).long()
    return ((j < sinks) | (j >= max(sinks, before - size))).long().expand(n, -1)


def attend_all(x, size, sinks, causal, before, keep=None):
    """The oracle's output for the last tokens of x (3, batch, total, heads, head_dim)."""
    q, k, v = x
    n = q.shape[1] - before
    counts = window_counts(n, q.shape[1], size, sinks, causal, before).expand(q.shape[2], -1, -1)
    return reference_attention(q[:, before:], k, v, counts, keep=keep).out


@given(
    calls=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    size=st.integers(1, 8),
    sinks=st.sampled_from([0, 0, 2]),
    causal=st.booleans(),
    bptt=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_gradients_flow_as_far_back_as_bptt_calls_says(calls, size, sinks, causal, bptt, seed):
    """They equal the oracle's, with older tokens detached; no call breaks what an earlier one saved."""
    config = RingBufferConfig(
        num_heads=2, head_dim=4, dropout=0.0, buffer_size=size, sinks=sinks, causal=causal, bptt_calls=bptt
    )
    module = RingBufferAttention(config)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, sum(calls), 2, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(sum(calls), generator=generator, dtype=torch.float64)[:, None, None]
    mine, true = x.clone().requires_grad_(), x.clone().requires_grad_()
    state, start, loss, expected = None, 0, [], []
    borders = [0]
    for n in calls:
        stop = start + n
        out, state = module(*mine[:, :, start:stop], buffer_state=state, requires_grad=True)
        flows = borders[max(0, len(borders) - 1 - bptt)]
        # A token that left the backward ring with its capacity carries no gradient; sinks are held as values.
        flows = max(flows, start - size) if bptt else start
        seen = torch.cat([true[:, :, :flows].detach(), true[:, :, flows:stop]], 2)
        loss.append((out * weight[start:stop]).sum())
        expected.append((attend_all(seen, size, sinks, causal, start) * weight[start:stop]).sum())
        borders.append(stop)
        start = stop
    near(torch.stack(loss), torch.stack(expected))
    sum(loss).backward()
    sum(expected).backward()
    near(mine.grad, true.grad)


def module_of(**options):
    config = RingBufferConfig(num_heads=2, head_dim=4, **{"dropout": 0.0, "buffer_size": 4, **options})
    return RingBufferAttention(config)


def test_decoding_can_be_trained_through():
    """Steps of an autoregressive loop with gradients reach as many steps back as bptt_calls says."""
    module = module_of(bptt_calls=2)
    x = torch.randn(3, 1, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    state = module.new_state(1, dtype=torch.float64)
    outs = [module(*x[:, :, i : i + 1], is_decoder=True, buffer_state=state) for i in range(6)]
    (grad,) = torch.autograd.grad(outs[5].sum(), x)
    assert [bool(grad[1:, 0, i].any()) for i in range(6)] == [False, False, False, True, True, True]


def test_detach_and_calls_without_gradients_stop_them():
    """`detach`, no_grad and requires_grad=False are borders that no gradient crosses."""
    module = module_of(bptt_calls=3)
    for border in ("detach", "no_grad", "flag", "clone"):
        x = torch.randn(3, 1, 6, 2, 4, dtype=torch.float64, requires_grad=True)
        _, state = module(*x[:, :, :2])
        if border == "detach":
            state.detach()
        elif border == "no_grad":
            with torch.no_grad():
                module(*x[:, :, 2:4], buffer_state=state)
        elif border == "flag":
            out, _ = module(*x[:, :, 2:4], buffer_state=state, requires_grad=False)
            assert not out.requires_grad
        else:
            state = state.clone()
        out, _ = module(*x[:, :, 4:], buffer_state=state)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert bool(grad[1:, :, :2].any()) == (border == "clone")


def test_a_rewound_token_gets_no_gradient():
    """Rewinding takes it out of the backward ring too, and reordering takes the graph along."""
    module = module_of(bptt_calls=2)
    x = torch.randn(3, 2, 6, 2, 4, dtype=torch.float64, requires_grad=True)
    _, state = module(*x[:, :, :3])
    state.rewind(1).reorder([1, 1])
    out, _ = module(*x[:, :, 3:5], buffer_state=state)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[1:, :, 2].any()
    assert not grad[1:, 0, :2].any()
    assert grad[1:, 1, :2].all()


def test_what_happens_to_the_rings_before_backward_does_not_matter():
    """Going on, rewinding to the start and writing anew leave gradients as they are, sinks' part included."""
    module = module_of(sinks=2, bptt_calls=1)
    grads = []
    for changed in (False, True):
        x = torch.randn(
            3, 1, 12, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        with torch.no_grad():
            _, state = module(*x[:, :, :9])
        out, _ = module(*x[:, :, 9:], buffer_state=state)
        if changed:
            module(*x[:, :, :9].detach(), buffer_state=state)
            state.rewind(2)
            for ring in (state.kv.main, state.kv.evicted):
                ring.clear(0, ring.slots)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*grads)


def test_padding_and_stale_slots_give_no_nan_to_any_gradient():
    """What padded tokens hold reaches neither output nor gradient, in this call or a later one."""
    module = module_of(bptt_calls=1)
    x = torch.randn(3, 2, 6, 2, 4, dtype=torch.float64)
    x[1:, :, 1] = torch.nan
    x.requires_grad_()
    hidden = torch.tensor([False, True, False]).expand(2, 3)
    first, state = module(*x[:, :, :3], key_padding_mask=hidden)
    second, _ = module(*x[:, :, 3:], buffer_state=state)
    (grad,) = torch.autograd.grad(first.sum() + second.sum(), x)
    assert first.isfinite().all() and second.isfinite().all() and grad.isfinite().all()
    assert not grad[1:, :, 1].any()


def test_a_learned_sink_and_a_bias_have_gradients():
    """Both as in the oracle."""
    module = module_of()
    x = torch.randn(3, 1, 5, 2, 4, dtype=torch.float64)
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    out, _ = module(*x, sink_logits=logits, att_mask=bias)
    state = reference_attention(*x, window_counts(5, 5, 4, 0, True, 0).expand(2, -1, -1), bias=bias)
    true = state.out * torch.sigmoid(state.lse - logits).unsqueeze(-1)
    near(out, true)
    for got, expected in zip(
        torch.autograd.grad(out.square().sum(), (logits, bias)),
        torch.autograd.grad(true.square().sum(), (logits, bias)),
        strict=True,
    ):
        near(got, expected)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_dropout_is_a_function_of_positions_in_the_stream(grad, ragged):
    """Cut anywhere, with or without gradients, rows together or apart, the same pairs drop, by Philox; and only in training."""
    module = module_of(dropout=0.4, max_rewind=4)
    x = torch.randn(3, 2, 9, 2, 4, dtype=torch.float64)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    batch, head = torch.arange(2)[:, None, None, None], torch.arange(2)[None, :, None, None]
    keep = keep_scale(7, 0.4, batch, head, i, j, torch.float64)
    true = attend_all(x, 4, 0, True, 0, keep=keep)
    x.requires_grad_(grad)
    out, state = module(*x[:, :, :6], seed=7)
    near(out, true[:, :6])
    if ragged:
        state.rewind([0, 2])
        again = torch.stack([x[:, 0, 6:8], x[:, 1, 4:6]], 1)
        out, _ = module(*again, buffer_state=state, seed=7)
        near(out, torch.stack([true[0, 6:8], true[1, 4:6]]))
        return
    out, _ = module(*x[:, :, 6:8], buffer_state=state, seed=7)
    near(out, true[:, 6:8])
    near(module(*x[:, :, 8:], is_decoder=True, buffer_state=state, seed=7), true[:, 8:])
    module.eval()
    near(module(*x)[0], attend_all(x, 4, 0, True, 0))
