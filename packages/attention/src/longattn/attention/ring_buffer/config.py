"""`RingBufferConfig`: what a `RingBufferAttention` is; and the two small vocabularies of its scheduler."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from longattn.attention.validate import check_bool, check_positive, check_size
from longattn.kernels.interface import check_backend_name, check_dropout
from longattn.patterncache.spans import shortened

Positions = Literal["absolute", "cache"]


class TileOrder(enum.Enum):
    """Which tile stays while the others stream past it. Results do not depend on it, beyond rounding."""

    Q_MAJOR = "q_major"
    """A q tile stays, k and v stream."""
    K_MAJOR = "k_major"
    """A k, v tile stays, q streams and partial states merge, which is split-K."""


class TileType(enum.Enum):
    """What of a tile is seen."""

    DENSE = "dense"
    """Every pair: no mask."""
    TRIANGLE = "triangle"
    """Some pairs: an edge of the window or the diagonal goes through it."""
    SKIP = "skip"
    """No pair: neither read nor computed."""


@dataclass(frozen=True)
class RingBufferConfig:
    """What a ring-buffer attention is.

    Args:
        num_heads, head_dim: of q. Default 8 and 64.
        dropout: probability in [0, 1) of dropping a (query, key) pair in training. Default 0.1.
        buffer_size: tokens that stay, the attention window. Default 2048.
        block_size: rows of a block, the unit of the upper level of scheduling. Default 128.
        tile_size: rows of q, and of k, in a tile, the unit of the lower level. Default 32.
        head_tile_size: heads processed together. Default 4.
        prefill_size: queries of one pass over a long call; keys that no query of a pass sees are not touched. Default 512.
        causal: each query of an encoder call sees the last buffer_size tokens up to itself; else the whole call and what the ring
            held before. Default True.
        kv_heads: heads of k and v, dividing num_heads. Default None: what the first call brings.
        softmax_scale: default head_dim ** -0.5.
        sinks: the first tokens, so many, stay beside the window for ever. Default 0.
        positions: "absolute", or "cache": queries and keys come with rotary positions, and sinks are seen at their place in the cache
            (StreamingLLM, Xiao et al. 2023, section 3.2). Default "absolute".
        rotary_base, rotary_dim, rotary_interleaved: how q and k were rotated; acts with positions="cache". Default 10000.0; None: all of
            head_dim; False: halves are paired (GPT-NeoX), True: neighbours (GPT-J).
        bptt_calls: how many earlier calls gradients flow into. Default 0: they stop at the call.
        max_rewind: tokens that may be rewound after the window has moved on; so many evicted rows are kept. Default 16.
        backend: row of longattn.kernels for calls with several queries; "tiled" means the tiled row of the order. Default: the first
            that fits.
        value_head_dim: of v and the output. Default None: head_dim. Keys and values lie in rows of the larger one.

    Raises:
        TypeError, ValueError: a bad field, by name.
    """

    num_heads: int = 8
    head_dim: int = 64
    dropout: float = 0.1
    buffer_size: int = 2048
    block_size: int = 128
    tile_size: int = 32
    head_tile_size: int = 4
    prefill_size: int = 512
    causal: bool = True
    kv_heads: int | None = None
    softmax_scale: float | None = None
    sinks: int = 0
    positions: Positions = "absolute"
    rotary_base: float = 10000.0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    bptt_calls: int = 0
    max_rewind: int = 16
    backend: str | None = None
    value_head_dim: int | None = None

    def __post_init__(self) -> None:
        """Check every field, once."""
        for name in (
            "num_heads",
            "head_dim",
            "buffer_size",
            "block_size",
            "tile_size",
            "head_tile_size",
            "prefill_size",
        ):
            check_size(name, getattr(self, name))
        for name in ("sinks", "bptt_calls", "max_rewind"):
            check_count(name, getattr(self, name))
        check_dropout("dropout", self.dropout)
        check_bool("causal", self.causal)
        check_bool("rotary_interleaved", self.rotary_interleaved)
        check_positive("rotary_base", self.rotary_base)
        if self.softmax_scale is not None:
            check_positive("softmax_scale", self.softmax_scale)
        check_backend_name(self.backend)
        if self.value_head_dim is not None:
            check_size("value_head_dim", self.value_head_dim)
        if self.kv_heads is not None and self.num_heads % check_size("kv_heads", self.kv_heads):
            raise ValueError(f"kv_heads must divide num_heads={self.num_heads}, got {self.kv_heads}")
        self._check_positions()

    def _check_positions(self) -> None:
        if self.positions not in ("absolute", "cache"):
            raise ValueError(f"positions must be 'absolute' or 'cache', got {shortened(self.positions)}")
        if self.positions == "cache" and not self.causal:
            raise ValueError(
                "positions must be 'absolute' where causal is False: places in the cache follow the query, got 'cache'"
            )
        if self.rotary_dim is not None:
            check_size("rotary_dim", self.rotary_dim)
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.positions == "cache" and (rotated % 2 or rotated > self.head_dim):
            raise ValueError(f"rotary_dim must be even and at most head_dim={self.head_dim}, got {rotated}")

    @property
    def value_width(self) -> int:
        """The head_dim of v and the output."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5 if self.softmax_scale is None else float(self.softmax_scale)


def check_count(name: str, value: object) -> int:
    """An integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= 0, got {shortened(value)} ({type(value).__name__})")
    if value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {shortened(value)}")
    return value
