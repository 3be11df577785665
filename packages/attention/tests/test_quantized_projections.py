"""Projections in dynamic int8: torch's own layers stand in ours' place, and attention itself stays as it was."""

import pytest
import torch
from torch.ao.nn.quantized import dynamic

from longattn.attention import MultiheadPatternAttention
from longattn.patterncache import Window


def quantized(module):
    """torch's call, which warns that it will move to another package."""
    return torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_dynamic_int8_projections_give_what_int8_can(fused):
    """Self- and cross-attention, within a few hundredths of the largest value; every projection is int8."""
    torch.manual_seed(0)
    module = MultiheadPatternAttention(64, 4, Window(9, causal=True), fused_qkv=fused, layer_norm=False).eval()
    small = quantized(module)
    layers = [layer for layer in small.modules() if isinstance(layer, dynamic.Linear)]
    assert len(layers) == (2 if fused else 4)
    x, other = torch.randn(2, 1, 40, 64)
    with torch.no_grad():
        for inputs in ((x,), (x, other)):
            exact = module(*inputs)
            torch.testing.assert_close(small(*inputs), exact, atol=0.05 * exact.abs().max().item(), rtol=0)
