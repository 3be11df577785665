"""Our encoder layer inside `nn.TransformerEncoder`: torch's masks mean there what they mean in torch's own layer."""

import pytest
import torch

from longattn.attention import DilatedTransformerEncoderLayer

SIZES = {"segment_lengths": (8, 16), "dilation_rates": (1, 2), "dim_feedforward": 32, "dtype": torch.float64}


def encoder(layers=2, **options):
    """torch's stack of our layers, every one with weights of its own."""
    torch.manual_seed(0)
    stack = torch.nn.TransformerEncoder(
        DilatedTransformerEncoderLayer(16, 2, **SIZES, **options), layers, enable_nested_tensor=False
    )
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stack


def by_hand(stack, x, *arguments, **options):
    """The same layers, called one after the other."""
    for layer in stack.layers:
        x = layer(x, *arguments, **options)
    return x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_pattern_stays_the_constructors(causal, training):
    """Also causal ones, though torch passes is_causal=False where it is given no mask; with and without gradients."""
    stack, x = encoder(causal=causal).train(training), torch.randn(3, 21, 16, dtype=torch.float64)
    torch.testing.assert_close(stack(x), by_hand(stack, x))
    with torch.no_grad():
        torch.testing.assert_close(stack(x), by_hand(stack, x))


@pytest.mark.parametrize("floating", [False, True])
def test_masks_hide_what_they_hide_in_torch(floating):
    """Padding and a mask of pairs, bool (True hides) or added to scores; alone and together."""
    stack, x = encoder(), torch.randn(3, 21, 16, dtype=torch.float64)
    padding = torch.zeros(3, 21, dtype=torch.bool)
    padding[1, 15:] = True
    hidden = torch.rand(21, 21) < 0.3
    hidden.fill_diagonal_(False)
    as_given = (
        (lambda mask: torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, -torch.inf))
        if floating
        else (lambda mask: mask)
    )
    for given, ours in [
        ({"src_key_padding_mask": as_given(padding)}, {"key_padding_mask": padding}),
        ({"mask": as_given(hidden)}, {"attention_mask": ~hidden}),
        (
            {"mask": as_given(hidden), "src_key_padding_mask": as_given(padding)},
            {"attention_mask": ~hidden, "key_padding_mask": padding},
        ),
    ]:
        rows = ~padding  # padded queries may give anything
        torch.testing.assert_close(stack(x, **given)[rows], by_hand(stack, x, **ours)[rows])


def test_a_causal_mask_with_its_hint_is_causal():
    """As torch's users write it."""
    stack, x = encoder(), torch.randn(2, 21, 16, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(21, dtype=torch.float64)
    torch.testing.assert_close(stack(x, mask=mask, is_causal=True), by_hand(stack, x, is_causal=True))


def test_a_mask_for_each_head():
    """(batch * heads, Nq, Nk), as in torch."""
    stack, x = encoder(1), torch.randn(2, 21, 16, dtype=torch.float64)
    hidden = torch.rand(4, 21, 21) < 0.3
    expected = by_hand(stack, x, attention_mask=~hidden.view(2, 2, 21, 21))
    torch.testing.assert_close(stack.layers[0](x, src_mask=hidden), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"src_mask": torch.zeros(3, 21, 21)}, r"src_mask must be \(Nq, Nk\) or \(4, Nq, Nk\), got \(3, 21, 21\)"),
        ({"src_key_padding_mask": torch.zeros(21)}, r"src_key_padding_mask must be \(batch, Nk\), got \(21,\)"),
        (
            {"src_mask": None, "attention_mask": torch.ones(21, 21).bool()},
            "attention_mask and key_padding_mask must be None beside src_mask",
        ),
    ],
)
def test_masks_that_do_not_fit_are_named(options, words):
    """And two conventions at once are refused."""
    with pytest.raises(ValueError, match=words):
        encoder(1).layers[0](torch.randn(2, 21, 16, dtype=torch.float64), **options)
