"""Block-sparse attention over the patches of a picture: `./run python examples/patches_2d.py`.

Patches are ordered tile by tile, so that one block of positions is one tile of the picture. A tile sees the tiles within a radius, in two dimensions. In the usual
order, row by row, a window of positions would see a whole row and nothing below it.
"""

import argparse

import torch
from torch import Tensor

from longattn.attention import MultiheadPatternAttention, pattern_attention
from longattn.patterncache import BlockSparse


def to_tiles(x: Tensor, tile: int) -> Tensor:
    """(batch, height, width, ...) -> (batch, height * width, ...), tile by tile."""
    batch, height, width = x.shape[:3]
    rest = x.shape[3:]
    x = x.reshape(batch, height // tile, tile, width // tile, tile, *rest).transpose(2, 3)
    return x.reshape(batch, height * width, *rest)


def from_tiles(x: Tensor, height: int, width: int, tile: int) -> Tensor:
    """The inverse of `to_tiles`."""
    batch, rest = x.shape[0], x.shape[2:]
    x = x.reshape(batch, height // tile, width // tile, tile, tile, *rest).transpose(2, 3)
    return x.reshape(batch, height, width, *rest)


def neighbourhood(height: int, width: int, tile: int, radius: int) -> BlockSparse:
    """Each tile sees the tiles whose row and column are at most `radius` away."""
    rows, columns = torch.meshgrid(torch.arange(height // tile), torch.arange(width // tile), indexing="ij")
    row, column = rows.flatten(), columns.flatten()
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    return BlockSparse(tile * tile, near.numpy())


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=32, help="patches")
    parser.add_argument("--width", type=int, default=48, help="patches")
    parser.add_argument("--tile", type=int, default=8, help="patches to a side of a tile")
    parser.add_argument("--radius", type=int, default=1, help="tiles that are seen to each side")
    given = parser.parse_args(argv)
    height, width, tile = given.height, given.width, given.tile

    patches = torch.randn(2, height, width, 4, 16)  # (batch, height, width, heads, head_dim)
    assert torch.equal(from_tiles(to_tiles(patches, tile), height, width, tile), patches)

    pattern = neighbourhood(height, width, tile, given.radius)
    verdict = pattern.lint(height * width, 4)
    share = verdict.mean_keys / (height * width)
    print(f"{height} x {width} patches: a patch sees {verdict.mean_keys:.0f} of {height * width}, {share:.0%} of all")

    q = to_tiles(patches, tile)
    out = from_tiles(pattern_attention(q, q, q, pattern), height, width, tile)

    # The same by torch's attention and a mask of all pairs, in the usual order.
    row, column = (
        x.flatten() // tile for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    mask = ((row[:, None] - row).abs() <= given.radius) & ((column[:, None] - column).abs() <= given.radius)
    plain = patches.flatten(1, 2).transpose(1, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(plain, plain, plain, attn_mask=mask)
    torch.testing.assert_close(out, dense.transpose(1, 2).reshape(out.shape))
    print("equal to dense attention with the mask of all pairs")

    layer = MultiheadPatternAttention(64, 4, pattern)
    x = to_tiles(patches.flatten(3), tile).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    print("a layer of it trains")


if __name__ == "__main__":
    main()
