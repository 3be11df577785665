"""torchscale's DilatedAttention, whose tests have none of it, beside ours on its own projections: outputs, and gradients as it detaches its mixing."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longattn.attention import pattern_attention
from longattn.kernels import attend
from longattn.patterncache import Dilated, Full

dilated_attention = pytest.importorskip("torchscale.component.dilated_attention", reason="no torchscale here")
multihead = pytest.importorskip("torchscale.component.multihead_attention")


def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: None, scale: None, is_causal: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What flash-attn would compute on a GPU: (out, lse (batch, heads, seq))."""
    state = attend(q, k, v, Full(causal=is_causal), backend="sdpa")
    return state.out, state.lse.transpose(1, 2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "rates", "heads", "seq"),
    [((8,), (1,), 4, 32), ((8, 16, 32), (1, 2, 4), 4, 32), ((8, 16), (1, 2), 8, 48), ((4, 8), (1, 4), 8, 40)],
)
def test_equal(lengths, rates, heads, seq, is_causal, monkeypatch) -> None:
    """Their heads go in blocks over the offsets."""
    monkeypatch.setattr(multihead, "flash_attn_func", flash)
    args = SimpleNamespace(
        flash_attention=True, multiway=False, layernorm_eps=1e-5, xpos_rel_pos=False, seq_parallel=False,
        segment_length=list(lengths), dilated_ratio=list(rates),
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = dilated_attention.DilatedAttention(args, 8 * heads, heads, self_attention=True)
    x, own = (torch.randn(2, seq, 8 * heads).requires_grad_() for _ in range(2))
    own.data.copy_(x.data)
    expected, _ = theirs(x, x, x, is_causal=is_causal)
    q, k, v = (p(own).unflatten(-1, (heads, 8)) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    pattern = Dilated(lengths, rates, heads="blocks", causal=is_causal)
    out = pattern_attention(q, k, v, pattern, merge_grad="detached")
    assert isinstance(out, Tensor)
    found = theirs.out_proj(out.flatten(-2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for a, b in zip(torch.autograd.grad(found.sin().sum(), own), torch.autograd.grad(expected.sin().sum(), x), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
