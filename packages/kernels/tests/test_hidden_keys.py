"""What keys that nobody sees may hold: anything under key_padding_mask, any ordinary number under a pattern, a mask or a bias of -inf."""

from dataclasses import replace

import pytest
import torch

from longattn.kernels import Environment, attend, backends
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.dispatch.table import row
from longattn.kernels.testing import Case, assert_near, run_case
from longattn.patterncache import Dilated, Full, Restrict, Strided, Window

ROWS = pytest.mark.parametrize("name", backends("cpu"))
LONGNET = Dilated((8, 16), (1, 2), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
LOW = torch.finfo(torch.float32).min


@ROWS
@pytest.mark.parametrize(
    "case",
    [
        Case(Full(causal=True), (1, 70), group=3),
        Case(Full(causal=True), (3, 70), group=3, dtype=torch.bfloat16),
        Case(LISTED, (19, 19), mask="bhqk"),
        Case(LONGNET, (19, 19), group=2, mask="+qk", prior=True),
    ],
    ids=["decode", "few_queries", "listed", "bias"],
)
def test_padding_may_hold_anything(name: str, case: Case):
    """Short calls and long ones, rows that are made again for their bias included: the same bits as over zeros, gradients too."""
    if case.dtype not in row(name).capability.dtypes_on("cpu"):
        pytest.skip(f"{name} has no {case.dtype}")
    data = case.tensors()
    if data.mask is not None and data.mask.is_floating_point():
        data = replace(data, mask=data.mask.clone().index_fill_(-2, torch.tensor([2, 5]), LOW))
    padding = torch.rand(2, case.lengths[1], generator=torch.Generator().manual_seed(3)) < 0.4
    padding[0, :40], padding[1] = True, padding[1] & (torch.arange(case.lengths[1]) > 2)
    found = []
    for fill in (0.0, torch.nan, torch.inf):
        k, v = (x.masked_fill(padding[:, :, None, None], fill).requires_grad_() for x in (data.k, data.v))
        q = data.q.clone().requires_grad_()
        filled = replace(data, q=q, k=k, v=v, padding=padding, prior=None)
        with torch.no_grad():
            step = run_case(case, replace(filled, prior=data.prior), backend=name)
        state = run_case(case, filled, backend=name)
        grads = torch.autograd.grad(state.out, (q, k, v), data.grad_out.to(state.out.dtype))
        found.append((step.out, step.lse, state.out, state.lse, *grads))
    for other in found[1:]:
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(found[0], other, strict=True))


@ROWS
def test_a_row_that_skips_padding_copies_no_keys(name: str):
    """Nothing as large as k is asked of the allocator, for a decode step over a cache is that much reading and no more."""

    class Recording(TorchAllocator):
        def empty(self, shape, dtype, device, role):
            sizes.append(torch.Size(shape).numel())
            return super().empty(shape, dtype, device, role)

    sizes: list[int] = []
    q, (k, v) = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 500, 2, 16)
    padding = (torch.arange(500) < 30).expand(2, 500)
    environment = Environment(allocator=Recording())
    attend(q, k, v, Full(causal=True), key_padding_mask=padding, backend=name, environment=environment)
    assert (max(sizes) < k.numel()) == row(name).capability.skips_padding
    assert row("native").capability.skips_padding


@ROWS
@pytest.mark.parametrize("how", ["causal", "mask", "bias", "pattern"])
def test_other_hidden_keys_may_hold_any_ordinary_number(name: str, how: str):
    """Keys after the query, keys of a mask and of a bias of -inf, keys outside the pattern: out and gradients are as over zeros."""
    data = Case(Full(), (12, 12), batch=1).tensors()
    pattern = {"causal": Full(causal=True), "pattern": Window(3)}.get(how, Full())
    seen = torch.arange(12) < 8
    mask = {"mask": seen, "bias": torch.zeros(12).masked_fill(~seen, -torch.inf)}.get(how)
    rows = slice(0, 8) if how == "causal" else slice(11, 12) if how == "pattern" else slice(0, 12)
    hidden = slice(0, 9) if how == "pattern" else slice(8, 12)
    found = []
    for fill in (0.0, 1e6):
        k, v = (x.clone() for x in (data.k, data.v))
        k[:, hidden], v[:, hidden] = fill, -fill
        q, k, v = (x.requires_grad_() for x in (data.q.clone(), k, v))
        state = attend(q, k, v, pattern, attention_mask=mask, backend=name)
        grads = torch.autograd.grad(state.out[:, rows].square().sum(), (q, k, v))
        found.append((state.out[:, rows], state.lse[:, rows], grads[0][:, rows], *grads[1:]))
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-5, 1e-5, f"{name} {how}")
