"""One projection or three: the same numbers, and state dicts that load into each other."""

import pytest
import torch

from longattn.attention import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention, MultiheadPatternAttention
from longattn.patterncache import Full

SHAPE = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
PAIRS = [
    (MultiheadDilatedAttention, ImprovedMultiheadDilatedAttention),
    (ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"bias": False, "layer_norm": False}, {"kv_heads": 1}], ids=str)
def test_state_dicts_load_into_each_other(source, target, options):
    """Strictly, inside a larger model too; outputs and gradients of the input agree."""
    first = torch.nn.ModuleList([source(16, 2, **SHAPE, dtype=torch.float64, **options)])
    second = torch.nn.ModuleList([target(16, 2, **SHAPE, dtype=torch.float64, **options)])
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(first.state_dict())
    assert list(kept) == list(first.state_dict())
    x = torch.randn(2, 21, 16, dtype=torch.float64, requires_grad=True)
    a, b = first[0](x, is_causal=True), second[0](x, is_causal=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (a, b)))


def test_the_fused_one_has_one_projection():
    """And by default the same first weights as three, from the same generator."""
    torch.manual_seed(3)
    fused = ImprovedMultiheadDilatedAttention(16, 2, **SHAPE, gamma_init=0.5)
    torch.manual_seed(3)
    plain = MultiheadDilatedAttention(16, 2, **SHAPE, gamma_init=0.5)
    assert {"qkv_proj.weight", "qkv_proj.bias"} <= set(fused.state_dict()) and not hasattr(fused, "q_proj")
    for (weight, bias), (other, zero) in zip(fused.qkv_parameters(), plain.qkv_parameters(), strict=True):
        assert torch.equal(weight, other) and torch.equal(bias, zero)
    assert fused.qkv_proj.weight.is_leaf and torch.equal(fused.out_proj.weight, plain.out_proj.weight)
    assert MultiheadDilatedAttention(16, 2, **SHAPE, fused_qkv=True).qkv_proj.out_features == 48


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_state_of_torchs_multihead_attention_loads(fused, bias):
    """Strictly; where the pattern is Full and there is no norm, the output is torch's."""
    dense = torch.nn.MultiheadAttention(16, 2, bias=bias, batch_first=True, dtype=torch.float64)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    ours = MultiheadPatternAttention(16, 2, Full(), bias=bias, layer_norm=False, fused_qkv=fused, dtype=torch.float64)
    ours.load_state_dict(dense.state_dict())
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), dense(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("dense", "entry"),
    [({"kdim": 8}, "q_proj_weight"), ({"add_bias_kv": True}, "bias_k"), ({"embed_dim": 32}, "size mismatch")],
)
def test_a_state_that_does_not_fit_is_refused(dense, entry):
    """Other widths, keys of their own, another model: torch's error names the entry."""
    other = torch.nn.MultiheadAttention(**{"embed_dim": 16, "num_heads": 2} | dense)
    with pytest.raises(RuntimeError, match=entry):
        MultiheadPatternAttention(16, 2, Full(), layer_norm=False).load_state_dict(other.state_dict())


def test_cross_attention_takes_slices():
    """Different query, key and value: what three layers give."""
    fused, plain = ImprovedMultiheadDilatedAttention(16, 2, **SHAPE), MultiheadDilatedAttention(16, 2, **SHAPE)
    plain.load_state_dict(fused.state_dict())
    query, key, value = torch.randn(3, 1, 12, 16)
    torch.testing.assert_close(fused(query, key, value), plain(query, key, value))
    torch.testing.assert_close(fused(query, key), plain(query, key))


def test_a_layer_put_in_place_of_a_projection_is_called():
    """Adapters that replace q_proj work."""

    class Doubled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) * 2

    module, x = MultiheadDilatedAttention(16, 2, **SHAPE), torch.randn(1, 9, 16)
    before = module(x)
    module.v_proj = Doubled(module.v_proj)
    assert not torch.allclose(module(x), before)


def test_a_state_dict_of_another_size_is_refused():
    """By torch, with the name of the entry."""
    with pytest.raises(RuntimeError, match="qkv_proj.weight"):
        MultiheadDilatedAttention(16, 2).load_state_dict(ImprovedMultiheadDilatedAttention(8, 2).state_dict())
    with pytest.raises(RuntimeError, match="qkv_proj.weight"):
        ImprovedMultiheadDilatedAttention(16, 2).load_state_dict(MultiheadDilatedAttention(8, 2).state_dict())


def test_reset_parameters_starts_over():
    """LayerNorm included."""
    module, fresh = (ImprovedMultiheadDilatedAttention(16, 2, **SHAPE) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    for each in (module, fresh):
        torch.manual_seed(1)
        each.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))
