"""A window in place of torch.nn.MultiheadAttention, in a model that exists: `./run python examples/replace_multihead.py`.

1. Each nn.MultiheadAttention becomes a MultiheadPatternAttention with the same weights.
2. With Full() the model computes what it did before.
3. With a window each token sees its neighbours only, and the model learns on.
"""

import argparse

import torch
from torch import Tensor, nn

from longattn.attention import MultiheadPatternAttention
from longattn.patterncache import Full, Pattern, Window


class Block(nn.Module):
    """A block as many models have it; `attention` returns (output, weights)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(batch, seq, width) -> the same."""
        y = self.norm(x)
        out, _ = self.attention(y, y, y, key_padding_mask=padding, need_weights=False)
        return x + out


class PatternInPlace(nn.Module):
    """Called as nn.MultiheadAttention is, and returns what it returns."""

    def __init__(self, old: nn.MultiheadAttention, pattern: Pattern) -> None:
        super().__init__()
        assert old.batch_first and old.in_proj_weight is not None, "one width for q, k and v, batch first"
        width = old.embed_dim
        self.inner = MultiheadPatternAttention(
            width, old.num_heads, pattern, dropout=old.dropout, bias=old.in_proj_bias is not None, layer_norm=False
        )
        self.inner.load_state_dict(old.state_dict())  # in_proj_weight and all

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Weights are not asked for; a mask of pairs is the pattern's affair."""
        assert not need_weights, "need_weights=True returns weights from `inner`"
        return self.inner(query, key, value, key_padding_mask=key_padding_mask), None


def replace(model: nn.Module, pattern: Pattern) -> int:
    """Replace every nn.MultiheadAttention below `model`; returns how many there were."""
    found = 0
    for name, child in list(model.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            setattr(model, name, PatternInPlace(child, pattern))
            found += 1
        else:
            found += replace(child, pattern)
    return found


class Tagger(nn.Module):
    """Two blocks and a head: says for each token how many of the last four are even."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(512, width) * 0.3)
        self.blocks = nn.ModuleList([Block(width, heads), Block(width, heads)])
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """(batch, seq) -> (batch, seq, 1)."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Tagger(16, 32, 4)
    tokens = torch.randint(16, (8, given.length))
    padding = torch.zeros(8, given.length, dtype=torch.bool)
    padding[0, given.length // 2 :] = True
    before = model(tokens, padding)
    assert replace(model, Full()) == 2
    torch.testing.assert_close(model(tokens, padding)[~padding], before[~padding], atol=1e-5, rtol=1e-5)
    print("with Full() the model computes what it did before")

    for block in model.blocks:
        block.attention.inner.pattern = Window(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(given.steps):
        tokens = torch.randint(16, (8, given.length))
        even = (tokens % 2 == 0).float().unfold(1, 4, 1).sum(-1)  # of four neighbours, from the fourth token on
        loss = nn.functional.mse_loss(model(tokens)[:, 3:, 0], even)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"with Window(4): loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 0.5 * losses[0]


if __name__ == "__main__":
    main()
