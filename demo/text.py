"""Real text as attention's inputs: bytes -> seeded embedding -> q, k, v."""

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from demo.refusal import RefusalError

if TYPE_CHECKING:
    from torch import Tensor

    from demo.options import Options

AUTO_LENGTH = 32768
_PIECE = 1 << 20


def read_text(file: str | None, seq_len: int | None) -> tuple[bytes, str]:
    """The first `seq_len` bytes of a file, or of the Python standard library's own sources in alphabetical order.

    Args:
        file: path, or None for the standard library.
        seq_len: bytes wanted; None takes what there is, at most 32768.

    Returns:
        The bytes, and a phrase that says where they come from.

    Raises:
        RefusalError: the file is missing, a directory, unreadable, empty, or shorter than `seq_len`. Text is never
            repeated to fill a length: repeated text would be a different job.
    """
    wanted = AUTO_LENGTH if seq_len is None else seq_len
    text, source = _standard_library(wanted) if file is None else _file(file, wanted)
    if seq_len is not None and len(text) < seq_len:
        raise RefusalError(
            f"{source} has {len(text)} bytes, fewer than --seq-len {seq_len}; "
            f"pass --seq-len {len(text)} or less, --seq-len auto, or a longer --file"
        )
    return text, source


def _file(file: str, wanted: int) -> tuple[bytes, str]:
    path = Path(file)
    if path.is_dir():
        raise RefusalError(f"--file must name a file, got the directory {file}")
    try:
        with path.open("rb") as opened:
            text = _take(opened, wanted)
    except OSError as error:
        raise RefusalError(f"--file {file}: {error.strerror or error}") from error
    if not text:
        raise RefusalError(f"--file {file} is empty")
    return text, file


def _take(opened: BinaryIO, wanted: int) -> bytes:
    """Up to `wanted` bytes, piece by piece: one read of a mistyped length would reserve all of it at once."""
    parts: list[bytes] = []
    while wanted > 0 and (part := opened.read(min(wanted, _PIECE))):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


def _standard_library(wanted: int) -> tuple[bytes, str]:
    root = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    size = 0
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        # Installed packages live below the same folder and are not the standard library.
        if path.parent.name in ("site-packages", "dist-packages", "test"):
            continue
        part = path.read_bytes()
        parts.append(part)
        size += len(part)
        if size >= wanted:
            break
    if not parts:
        raise RefusalError("this Python has no standard library sources to read; pass --file PATH")
    return b"".join(parts)[:wanted], "the Python standard library's sources"


def embed(text: bytes, options: "Options") -> tuple["Tensor", "Tensor", "Tensor", "Tensor"]:
    """Seeded embedding of the bytes and three seeded projections; equal in every process.

    Returns:
        q, k, v and an upstream gradient dO, each (1, len(text), heads, head_dim) in the options' dtype on their device;
        entries of q, k and v have variance near 1.
    """
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    width = options.heads * options.head_dim
    table = torch.randn(256, width, generator=generator)
    # A projection of an embedding is a row of the projected table: 256 products instead of one per token.
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    shape = (1, len(text), options.heads, options.head_dim)

    def place(x: "Tensor") -> "Tensor":
        return x.to(device=options.device, dtype=getattr(torch, options.dtype))

    projected = []
    for _ in range(3):
        weight = torch.randn(width, width, generator=generator) * width**-0.5
        projected.append(place((table @ weight)[tokens].reshape(shape)))
    q, k, v = projected
    return q, k, v, place(torch.randn(shape, generator=generator))
