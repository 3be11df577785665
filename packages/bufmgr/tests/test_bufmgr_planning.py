"""Planning ahead: lifetimes, layouts, what need not be kept, and that results stay the same to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longattn.bufmgr import Lifetime, MemoryPlan, plan_memory
from longattn.bufmgr.planning.lifetimes import lay_out, live_peak
from longattn.bufmgr.planning.recompute import Recompute
from longattn.bufmgr.planning.recording import LifetimeRecorder

LIFETIMES = st.lists(
    st.builds(
        lambda nbytes, first, length: Lifetime(nbytes, first, first + length, "op"),
        st.integers(1, 5000),
        st.integers(0, 12),
        st.integers(0, 6),
    ),
    max_size=24,
)


@given(LIFETIMES)
def test_a_layout_keeps_what_lives_together_apart(lifetimes: list[Lifetime]):
    layout = lay_out(lifetimes)
    places = list(zip(lifetimes, layout.offsets, strict=True))
    for index, (one, start) in enumerate(places):
        assert start % 64 == 0 and start + one.nbytes <= layout.block_bytes
        for other, begin in places[:index]:
            together = one.first <= other.last and other.first <= one.last
            assert not together or start + one.nbytes <= begin or begin + other.nbytes <= start
    assert layout.block_bytes >= live_peak(lifetimes)
    assert layout.block_bytes <= sum(-(-lifetime.nbytes // 64) * 64 for lifetime in lifetimes)


@given(LIFETIMES)
def test_the_peak_is_the_most_at_any_step(lifetimes: list[Lifetime]):
    steps = range(20)
    alive = [sum(life.nbytes for life in lifetimes if life.first <= step <= life.last) for step in steps]
    assert live_peak(lifetimes) == max(alive)


def test_a_chain_needs_two_places():
    """Each tensor lives until the next is made, so 10 tensors fit into two places."""
    chain = [Lifetime(640, step, step + 1, "op") for step in range(10)]
    assert lay_out(chain).block_bytes == live_peak(chain) == 1280


def test_lifetimes_of_real_tensors():
    """A storage lives until its last view is gone; what an operation changes in place or only views is not new."""
    with LifetimeRecorder() as recorder:
        a = torch.ones(100)  # step 1 makes it
        b = a[:50].mul_(2)  # steps 2 and 3
        c = a + 1  # step 4
        del a
        d = c * 2  # step 5: a lives through its view b
        del b, c
        e = d - 1  # step 6
    lifetimes = recorder.lifetimes()
    assert [(life.nbytes, life.first, life.last) for life in lifetimes] == [
        (400, 1, 5),
        (400, 4, 5),
        (400, 5, 6),
        (400, 6, 6),
    ]
    assert lifetimes[1].name == "aten.add.Tensor" and (d + e).shape == (100,)


class Block(nn.Module):
    """A transformer's feed-forward with a norm inside, as LongNet's: three kept tensors of the inner width, two of which are
    made again from the first.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.inner_norm = nn.LayerNorm(width), nn.LayerNorm(4 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner_norm(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + self.down(y.view(-1, y.shape[-1])).view(x.shape)


def model(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers)))


def gradients(module: nn.Module, x: torch.Tensor, plan: MemoryPlan | None) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    if plan is None:
        result = module(x)
    else:
        with plan.apply():
            result = module(x)
    (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum().backward()
    assert x.grad is not None
    return [result.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def test_a_plan_holds_less_and_changes_no_bit():
    module, x = model(), torch.randn(2, 128, 16)
    plan = plan_memory(module, [(2, 128, 16)])
    assert all(parameter.grad is None for parameter in module.parameters())
    # GELU's result and the inner norm's, and what the first norm's result needs anew, of each layer.
    assert plan.recomputed == 4 * 3
    assert plan.peak_after < 0.7 * plan.peak_before
    assert plan.peak_after <= plan.layout().block_bytes <= 1.02 * plan.peak_after
    plain, planned = gradients(module, x, None), gradients(module, x, plan)
    assert len(plain) == 2 + len(list(module.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, planned, strict=True))


@pytest.mark.parametrize("planned", [False, True])
def test_the_peaks_are_those_of_a_real_run(planned: bool):
    """What fake tensors told is what real ones do."""
    module = model()
    plan = plan_memory(module, [(2, 128, 16)])
    x = torch.empty(2, 128, 16).normal_()
    with LifetimeRecorder() as recorder:
        if planned:
            with plan.apply():
                result = module(x)
        else:
            result = module(x)
        torch.stack([result.sum()]).sum().backward()
        del result
    expected = plan.peak_after if planned else plan.peak_before
    assert live_peak(recorder.lifetimes()) == expected


def test_what_was_changed_in_place_is_kept_or_refused():
    """A result that is changed before it is kept is kept; a source that is changed afterwards is an error, as in autograd."""
    weight = torch.randn(8, 8, requires_grad=True)
    with Recompute() as recompute:
        hidden = torch.nn.functional.gelu(torch.randn(8, 8) @ weight)
        hidden.add_(1)
        result = hidden @ weight
    assert recompute.recomputed == 0
    result.sum().backward()
    source = (torch.randn(8, 8) @ weight).requires_grad_()
    with Recompute() as recompute:
        result = torch.nn.functional.gelu(source) @ weight
    assert recompute.recomputed == 1
    with torch.no_grad():
        source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_nothing_to_gain_is_said():
    plan = plan_memory(nn.Linear(16, 16), [(8, 16)])
    assert (plan.recomputed, plan.before) == (0, plan.after)
    assert "(0.0% less), in one block" in plan.report()
    inference = plan_memory(model(), [(2, 128, 16)], backward=False)
    assert inference.peak_after == inference.peak_before < plan_memory(model(), [(2, 128, 16)]).peak_after


def test_a_module_is_not_touched():
    """No gradient, no fake tensor stays in it, and a buffer keeps its value."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plan = plan_memory(module, [torch.empty(8, 4, device="meta")], loss=lambda result: result.square().mean())
    assert plan.peak_before > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert type(module(torch.randn(8, 4))) is torch.Tensor


def test_the_report_names_the_largest():
    lines = plan_memory(model(), [(2, 128, 16)]).report().splitlines()
    assert lines[0].startswith("plain torch: ") and "less)" in lines[1]
    assert lines[3].strip().startswith("4 x       0.06 MiB of aten.")
    with pytest.raises(ValueError, match="module must return a tensor with a gradient"):
        plan_memory(nn.Identity(), [(3,)])
    for loss in (lambda result: 1.0, lambda result: result):
        with pytest.raises(TypeError, match="loss must return a tensor of one element, got"):
            plan_memory(nn.Linear(3, 2), [(4, 3)], loss=loss)
