"""Tile sizes: one table per architecture and head_dim. `nox -s ahead` compiles every line of it for its target.

A line is (rows of the owned tile, rows of the streamed tile, warps, pipeline stages), and, where whole tiles would not fit in registers,
the columns of head_dim that a product over it takes at a time. Lines are chosen by the element size as well: a float32 tile is twice as
large, and its products without tf32 do not run on tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

HEAD_DIMS = (16, 32, 64, 128, 256)
"""Widths of tiles; a head_dim is padded to the next, in registers and SRAM only."""

KERNELS = ("forward", "decode", "backward_keys", "backward_queries")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One line of the table: rows of the owned and of the streamed tile, warps and pipeline stages of a program.

    Attributes:
        chunk: columns of head_dim that a product over it takes at a time; 0: all, and the owned tile stays in SRAM or registers.
    """

    owned: int
    streamed: int
    warps: int
    stages: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a program may use there.

    Attributes:
        name: as `explain` takes it. backend, arch, warp_size: as triton's GPUTarget does.
        shared: bytes of SRAM a program may have. registers: 32-bit ones of a multiprocessor (vector registers of a SIMD x 4).
        threads: that a multiprocessor holds.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    registers: int = 65536
    threads: int = 2048


ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("sm_80", "cuda", 80, 32, 166_912),
        Architecture("sm_89", "cuda", 89, 32, 101_376, threads=1536),
        Architecture("sm_90", "cuda", 90, 32, 232_448),
        Architecture("sm_100", "cuda", 100, 32, 232_448),
        Architecture("gfx942", "hip", "gfx942", 64, 65_536, registers=131_072),
    )
}


_NVIDIA = tuple(name for name in ARCHITECTURES if name.startswith("sm_"))

TileShape = tuple[int, ...]
"""Fields of a `Configuration`, in order."""

_FLOAT32: dict[str, tuple[TileShape, ...]] = {
    # Without tf32 products run outside tensor cores, and operands stand in registers: small tiles, the same on all of NVIDIA's.
    "forward": ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1, 32)),
    "decode": ((32, 16, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1, 32), (64, 32, 8, 1, 32)),
    "backward_keys": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1, 32), (16, 16, 8, 1, 32)),
    "backward_queries": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1, 32), (64, 32, 8, 1, 32)),
}
"""kernel -> a tile for each of HEAD_DIMS."""

_FLOAT32_GFX942: dict[str, tuple[TileShape, ...]] = {
    # Four warps may have 512 registers each, eight only 256.
    "forward": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "decode": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 4, 1), (32, 16, 8, 1)),
    "backward_keys": ((32, 32, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 16, 8, 1), (32, 16, 4, 1)),
    "backward_queries": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 4, 1)),
}

_HALF: dict[str, dict[str, tuple[TileShape, ...]]] = {
    # kernel -> architecture -> a tile for each of HEAD_DIMS
    "forward": {
        "sm_80": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 1, 64)),
        "sm_90": ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 8, 1, 64)),
        "sm_100": ((128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 8, 1)),
        "gfx942": ((128, 64, 8, 1), (128, 64, 8, 1), (128, 128, 8, 1), (128, 64, 4, 1), (64, 64, 4, 1)),
    },
    "decode": {
        "sm_80": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 8, 1)),
        "sm_90": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 16, 4, 1)),
        "sm_100": ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 8, 1)),
        "gfx942": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    },
    "backward_keys": {
        "sm_80": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 1, 64), (32, 32, 8, 1, 32)),
        "sm_90": ((128, 64, 8, 2), (64, 64, 4, 1), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1, 32)),
        "sm_100": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1, 64)),
        "gfx942": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1)),
    },
    "backward_queries": {
        "sm_80": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1, 32)),
        "sm_90": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1)),
        "sm_100": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "gfx942": ((128, 64, 8, 1), (128, 64, 8, 1), (128, 64, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    },
}


_MASKED: dict[str, tuple[TileShape, ...]] = {
    "forward": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1, 64)),
    "decode": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1, 64)),
    "backward_keys": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1, 32)),
    "backward_queries": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1, 32)),
}
"""kernel -> a tile for each of HEAD_DIMS, of 16-bit types with a mask, a bias, padding or dropout: addresses, flags and random words of as many pairs
stand in registers beside scores, where wider tiles keep them in memory."""

_ALONE: dict[tuple[str, str, str, int, int], TileShape] = {
    **{("masked", "forward", name, dim, 4): (64, 32, 8, 1) for name in _NVIDIA for dim in (16, 32)},
    **{("masked", "backward_keys", name, 64, 4): (32, 16, 8, 1) for name in _NVIDIA},
    ("masked", "backward_keys", "sm_100", 64, 4): (16, 16, 8, 1),
    **{("masked", "backward_keys", name, 64, 2): (32, 32, 8, 1) for name in ("sm_80", "sm_89")},
    **{("masked", "backward_keys", name, 128, 2): (32, 16, 8, 1) for name in ("sm_80", "sm_89")},
    ("masked", "forward", "sm_89", 128, 4): (32, 16, 8, 1),
    ("masked", "decode", "sm_89", 128, 2): (32, 32, 8, 1),
    ("masked", "decode", "sm_89", 64, 4): (32, 32, 8, 1),
    # With eight warps each has half the registers there.
    **{("masked", "decode", "gfx942", dim, 4): (64, 32, 4, 1) for dim in (16, 32)},
    **{("masked", "backward_keys", "gfx942", dim, 4): (32, 32, 4, 1) for dim in (16, 32)},
    **{("masked", "backward_queries", "gfx942", dim, 4): (32, 32, 4, 1) for dim in (32, 64)},
    **{("masked", kernel, "gfx942", 64, 4): (32, 32, 4, 1) for kernel in ("forward", "decode")},
    ("masked", "forward", "gfx942", 256, 4): (32, 16, 4, 1),
    ("prior", "forward", "sm_90", 128, 2): (128, 64, 8, 2),
    ("listed", "forward", "sm_90", 128, 2): (128, 64, 8, 2),
    ("listed", "forward", "sm_89", 128, 4): (32, 16, 8, 1),
    **{("terms", "forward", name, 32, 2): (128, 32, 8, 1) for name in ("sm_80", "sm_89", "sm_90")},
    ("terms", "forward", "sm_100", 16, 2): (128, 32, 8, 1),
    ("terms", "forward", "gfx942", 64, 2): (64, 64, 4, 1),
    ("terms", "forward", "sm_90", 128, 2): (128, 32, 8, 1),
    ("terms", "decode", "sm_90", 256, 2): (32, 16, 4, 1),
}
"""(form, kernel, architecture, head_dim, bytes an element) -> a tile of calls of that form there, where the one that `choose` would give it does not
fit in registers beside what the form keeps: addresses of masks or of a prior, row numbers, distances."""


def _lines() -> Iterator[tuple[tuple[str, str, int, int], Configuration]]:
    for kernel, architectures in _HALF.items():
        for name, tiles in architectures.items():
            wide = (_FLOAT32_GFX942 if name == "gfx942" else _FLOAT32)[kernel]
            # Tiles of sm_80 need no more SRAM than sm_89 has.
            names = ("sm_80", "sm_89") if name == "sm_80" else (name,)
            for target, (head_dim, half, full) in product(names, zip(HEAD_DIMS, tiles, wide, strict=True)):
                yield (kernel, target, head_dim, 2), Configuration(*half)
                yield (kernel, target, head_dim, 4), Configuration(*full)


TABLE: dict[tuple[str, str, int, int], Configuration] = dict(_lines())
"""(kernel, architecture, head_dim, bytes an element) -> tile."""

DENSE: dict[tuple[str, int], Configuration] = {
    ("sm_90", 64): Configuration(128, 128, 4, 3),
    ("sm_90", 128): Configuration(128, 64, 4, 2),
    ("sm_100", 64): Configuration(128, 128, 4, 3),
    ("sm_100", 128): Configuration(128, 128, 8, 2),
}
"""(architecture, head_dim) -> a tile of the warp-specialised kernel, of 16-bit types. `warps` are those of one consumer; the compiler adds the others."""

PAGED = {2: Configuration(32, 32, 4, 2), 4: Configuration(16, 16, 8, 1)}
"""Bytes an element of q -> the tile of decode steps over pages: up to so many queries that share keys, slots, warps and stages."""

PAGED_WIDTHS = {2: 256, 4: 128}
"""Bytes an element of q -> the widest head_dim whose tiles fit in registers there."""

FEW_ROWS = 64
"""Query rows x grouped heads up to which a call is a decode: one tile of queries, keys split over programs."""

_INTERPRETED = Configuration(64, 64, 4, 1)
"""Under the interpreter tiles cost by their number, not by their size."""


def table_architecture(name: str) -> str:
    """The table's architecture that serves the named one: itself, or the nearest. sm_86, sm_87 and sm_12x are served as sm_89."""
    if name in ARCHITECTURES:
        return name
    if name.startswith("gfx"):
        return "gfx942"
    number = int(name.removeprefix("sm_").rstrip("af"))
    if number // 10 in (10, 11):
        return "sm_100"
    return "sm_90" if number // 10 == 9 else "sm_89"


def padded(head_dim: int) -> int:
    """The width that a head_dim is padded to."""
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def dense_tile(architecture: str, head_dim: int, value_dim: int, element_size: int) -> Configuration | None:
    """The tile of the warp-specialised kernel on an architecture ("" is the interpreter), or None where there is none."""
    if padded(head_dim) != padded(value_dim) or element_size != 2:
        return None
    return DENSE.get((table_architecture(architecture), padded(head_dim))) if architecture else _INTERPRETED


def with_terms(tile: Configuration) -> Configuration:
    """The tile where score terms act: numbers by distance stand beside as many scores, and a pipeline would hold them in SRAM."""
    return replace(tile, streamed=max(16, tile.streamed // 2), stages=1)


def choose(
    kernel: str,
    architecture: str,
    head_dim: int,
    element_size: int,
    terms: bool = False,
    masked: bool = False,
    prior: bool = False,
    listed: bool = False,
) -> tuple[Configuration, int]:
    """The tile of a kernel on an architecture ("" is the interpreter), and the width that head_dim is padded to.

    head_dim: the larger one, where v has its own. terms: there are score terms. masked: there is a mask, a bias, padding or dropout.
    prior: a state is merged onto. listed: rows are gathered by number.
    """
    width = padded(head_dim)
    if not architecture:
        return _INTERPRETED, width
    target = table_architecture(architecture)
    tile = TABLE[kernel, target, width, element_size]
    forms = {"masked": masked, "terms": terms, "prior": prior, "listed": listed}
    shapes = {form: _ALONE.get((form, kernel, target, width, element_size)) for form, there in forms.items() if there}
    alone = [shape for shape in shapes.values() if shape is not None]
    if masked and shapes["masked"] is None and element_size == 2:
        tile = Configuration(*_MASKED[kernel][HEAD_DIMS.index(width)])
        if target == "gfx942":
            tile = replace(tile, warps=4)  # which may have 512 registers each
        if target == "sm_90" and tile.owned == 64:
            # Four warps make a product of 64 rows; eight would make some of it twice.
            tile = replace(tile, streamed=32 if width == 16 and kernel.startswith("backward") else 16, warps=4)
    elif alone:
        tile = Configuration(*alone[0])
    if terms and (masked or shapes["terms"] is None):
        tile = with_terms(tile)
    return tile, width
