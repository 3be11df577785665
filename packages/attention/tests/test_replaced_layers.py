"""Projections that somebody replaced: quantised ones, and wrappers that keep their weight to themselves."""

import pytest
import torch
from torch import Tensor, nn

from longattn.attention import MultiheadPatternAttention
from longattn.patterncache import Full


class Wrapped(nn.Module):
    """A layer beside a low-rank one, as adapters are: no attribute `weight`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Int8(nn.Module):
    """A layer whose weight is int8, and one that says its weight by a method, as torch's dynamic quantisation does."""

    def __init__(self, base: nn.Linear, method: bool) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 127
        rounded = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.kept, self.bias = rounded, base.bias
        self.weight = (lambda: rounded) if method else rounded

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kept.to(x.dtype) * self.scale, self.bias)


MAKE = {"wrapped": Wrapped, "int8": lambda x: Int8(x, False), "method": lambda x: Int8(x, True)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_dtype_is_not_asked_of_a_replaced_layer(make, fused: bool):
    """Self and cross attention run, and give what the layers give."""
    torch.manual_seed(0)
    module = MultiheadPatternAttention(16, 2, Full(), fused_qkv=fused)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = module(x), module(x, memory)
    for name, layer in list(module.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(module, name, make(layer))
    for got, true in zip((module(x), module(x, memory)), expected, strict=True):
        torch.testing.assert_close(got, true, atol=8e-2, rtol=8e-2)
    with pytest.raises(TypeError, match="query must have a floating dtype, got torch.int64"):
        module(torch.zeros(2, 5, 16, dtype=torch.int64))


def test_it_is_asked_of_ours():
    module = MultiheadPatternAttention(16, 2, Full())
    with pytest.raises(TypeError, match="query must have the module's dtype torch.float32, got torch.float64"):
        module(torch.randn(2, 5, 16, dtype=torch.float64))
    with pytest.raises(TypeError, match="query must have the module's dtype torch.float32, got torch.int64"):
        module(torch.zeros(2, 5, 16, dtype=torch.int64))
