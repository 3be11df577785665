"""Patterns from other libraries' masks: exactly what they show, or a refusal. Torch is imported only where a BlockMask is handed over."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.interop.intervals_of_masks import pattern_of_intervals, strips
from longattn.patterncache.interop.sampled_masks import Sees, agrees, blocks_of
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.patterns.block_sparse import BlockSparse
from longattn.patterncache.patterns.periodic import Periodic, Run
from longattn.patterncache.planning.limits import VARIABLE, check_listed, cost_of, is_limited
from longattn.patterncache.spans import Rows, check_flag, check_int, shortened

Shown = npt.NDArray[np.bool_]

MOST_CELLS = 1 << 28
MOST_BATCH = 1 << 16
"""(head, query, key) triples of a mask that are looked at one by one: a quarter of a gigabyte of booleans."""

_STRIP_CELLS = 1 << 20
"""Triples that are compared at once, which keeps them in the processor's cache."""

_MOST_PERIOD, _MOST_RUNS = 64, 4096

VERIFY = ("every", "samples")

_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)

_CELLS_PER_SECOND, _BYTES_PER_CELL = 2e8, 5
"""What a core compares, roughly, and what stands of an arbitrary mask at once; for error messages only."""


def from_mask_mod(
    mask_mod: Callable[..., Any],
    N: int,
    num_heads: int | None = None,
    batch: int = 1,
    *,
    as_tensor: Callable[[npt.NDArray[np.int64]], Any] = np.asarray,
    compact: bool = False,
    listed: str | None = None,
    verify: str = "every",
) -> Pattern:
    """The pattern of a FlexAttention mask_mod over `N` tokens, exactly: every pair is looked at, unless `verify` says otherwise.

    Causal masks, windows and bands become `Full`, `Window` and `Periodic`, those of packed documents `Documents`; all other masks, and
    where heads differ, block masks of the largest blocks, 128 to 1, that say the same.

    With `compact`, a `Periodic` whose plans hold no index data: for masks that repeat along their diagonal.

    Args:
        mask_mod: (b, h, q, k) -> whether q sees k; elementwise over broadcast int64 arrays, True or False each.
        N: tokens, >= 1: queries and keys.
        num_heads: heads to ask about, which are the heads of the result; None (default): heads do not differ, and 0 is asked.
        batch: how many batch entries to ask, at most 65536; a pattern has none, so they must agree. Default 1.
        as_tensor: makes what mask_mod takes of an int64 array; `torch.from_numpy` for one written with torch functions.
        compact: demand a `Periodic`. Default False.
        listed: what happens where num_heads * N * N is above 2 ** 28. "limit": an error that says what comparing every pair would
            cost, and whether the mask looks like a band or documents, which need no memory for it; "allow": pairs are compared.
            Default None: as `LONGATTN_LISTED` in the environment says, else "limit".
        verify: "every" (default): all pairs. "samples": a band, documents or blocks of 16 to 128 are believed after about 130 pairs of each
            query, which are around the diagonal, at both ends, at borders and at random: time and memory linear in N, and no proof. A mask
            that is none of these is refused. Not with `compact`.

    Raises:
        TypeError, ValueError: an argument is not such a value; mask_mod does not return booleans of the broadcast shape; batch
            entries differ; too many pairs; or `compact` is demanded of a mask that differs by head, or does not repeat with a period
            of at most 64 in few runs.
    """
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be callable as mask_mod(b, h, q, k), got {mask_mod!r}")
    length, batch = check_int("N", N, minimum=1), check_int("batch", batch, minimum=1)
    if batch > MOST_BATCH:
        raise ValueError(f"batch must be at most {MOST_BATCH}, for every entry is asked, got {batch}")
    heads = 1 if num_heads is None else check_int("num_heads", num_heads, minimum=1)
    check_flag("compact", compact)
    if listed is not None:
        check_listed("listed", listed)
    if verify not in VERIFY:
        raise ValueError(f"verify must be one of {VERIFY}, got {shortened(verify)}")
    if verify == "samples":
        return _believed(mask_mod, batch, heads, length, as_tensor, num_heads is not None, compact)
    named = None if compact else _named(mask_mod, batch, heads, length, as_tensor, listed)
    if named is not None:
        return named
    _check_allowed((heads, length, length), batch, listed, "an arbitrary mask", _BYTES_PER_CELL)
    shown = _asked(mask_mod, 0, (heads, length, length), as_tensor)
    for entry in range(1, batch):
        if not np.array_equal(shown, _asked(mask_mod, entry, shown.shape, as_tensor)):
            raise ValueError(f"mask_mod must say the same for all of batch={batch}, got another mask for entry {entry}")
    if compact:
        return _repeating(shown)
    return _coarsest(shown[0] if num_heads is None else shown)


def from_block_mask(block_mask: Any) -> BlockSparse:
    """The pattern of a FlexAttention BlockMask: its full blocks, and what its mask_mod leaves of the partial ones.

    Args:
        block_mask: a `torch.nn.attention.flex_attention.BlockMask` with one batch entry and one or more heads.

    Raises:
        TypeError, ValueError: it is no BlockMask, has several batch entries, or is above 2 ** 28 (head, query, key) triples.
    """
    names = (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "mask_mod",
        "BLOCK_SIZE",
        "seq_lengths",
    )
    missing = [name for name in names if not hasattr(block_mask, name)]
    if missing:
        raise TypeError(
            f"block_mask must be a FlexAttention BlockMask, got {type(block_mask).__name__} without {missing}"
        )
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    if batch != 1:
        raise ValueError(f"block_mask must have one batch entry, for a pattern has none, got {batch}")
    partial = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = np.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    shape = (heads, *block_mask.seq_lengths)
    _check_cells(shape)
    asked = _asked(block_mask.mask_mod, 0, shape, import_module("torch").from_numpy)
    (queries, keys), (q_size, k_size) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    i, j = np.arange(int(queries)) // int(q_size), np.arange(int(keys)) // int(k_size)
    shown: Shown = full[:, i[:, None], j] | (partial[:, i[:, None], j] & asked)
    return _coarsest(shown if heads > 1 else shown[0])


def _listed_blocks(number: Any, indices: Any) -> Shown:
    """(heads, query blocks, key blocks) from BlockMask's lists: the first `number` of each row of `indices`."""
    counts: Rows = number[0].cpu().numpy()
    listed: Rows = indices[0].cpu().numpy()
    shown = np.zeros(listed.shape, bool)
    head, row, at = np.nonzero(np.arange(listed.shape[-1]) < counts[..., None])  # pyright: ignore[reportUnknownArgumentType]
    shown[head, row, listed[head, row, at]] = True
    return shown


def _check_cells(shape: tuple[int, ...]) -> None:
    cells = prod(shape)
    if cells > MOST_CELLS:
        raise ValueError(f"mask must have at most {MOST_CELLS} (head, query, key) triples, got {shape}: {cells}")


def _check_allowed(shape: tuple[int, ...], batch: int, listed: str | None, what: str, most_bytes: int) -> None:
    """Raise ValueError with the cost of comparing every pair of a large mask, unless that is allowed."""
    cells = prod(shape)
    if cells > MOST_CELLS and is_limited(listed):
        raise ValueError(
            f"mask_mod must be asked about at most {MOST_CELLS} (head, query, key) triples, got {shape}: {cells}. Comparing all of "
            f"{what} takes {cost_of(cells * batch, _CELLS_PER_SECOND, most_bytes)}; "
            f'listed="allow" (or {VARIABLE}=allow in the environment) does so'
        )


def _asking(
    mask_mod: Callable[..., Any], as_tensor: Callable[..., Any], length: int
) -> tuple[Sees, Callable[[Rows, Rows], Shown]]:
    """(what a mask says of a batch entry's broadcast heads, queries and keys; of pairs of the first entry's first head)."""

    def sees(entry: int, h: Rows, q: Rows, k: Rows) -> Shown:
        answer = _answer(mask_mod, entry, (h, q, k), as_tensor)
        return answer if answer.dtype == np.bool_ else np.zeros(1, bool)

    def of_first_head(q: Rows, k: Rows) -> Shown:
        answer = sees(0, np.zeros((1, 1, 1), np.int64), q.reshape(1, -1, 1), k.reshape(1, -1, 1))
        return np.broadcast_to(answer.reshape(-1), q.shape) if answer.size in (1, len(q)) else np.zeros(len(q), bool)

    return sees, of_first_head


def _named(
    mask_mod: Callable[..., Any],
    batch: int,
    heads: int,
    length: int,
    as_tensor: Callable[..., Any],
    listed: str | None,
) -> Pattern | None:
    """The band, or documents of bands, that a mask is for all heads and batch entries; None where it is none."""
    sees, of_first_head = _asking(mask_mod, as_tensor, length)
    named = pattern_of_intervals(of_first_head, length)
    if named is None:
        return None
    pattern, begin, end = named
    _check_allowed((heads, length, length), batch, listed, f"what looks like {shortened(pattern)}", 0)
    every_head, keys = np.arange(heads, dtype=np.int64), np.arange(length, dtype=np.int64).reshape(1, 1, -1)
    for first, expected in strips(begin, end, max(1, _STRIP_CELLS // (heads * length))):
        q = np.arange(first, first + len(expected), dtype=np.int64).reshape(1, -1, 1)
        for entry in range(batch):
            shown = sees(entry, every_head.reshape(-1, 1, 1), q, keys)
            if shown.shape[-2:] != expected.shape or (shown != expected).any():
                return None
    return pattern


def _believed(
    mask_mod: Callable[..., Any],
    batch: int,
    heads: int,
    length: int,
    as_tensor: Callable[..., Any],
    by_head: bool,
    compact: bool,
) -> Pattern:
    """The band, documents of bands, or blocks that a mask is as far as samples say.

    Raises:
        ValueError: it is none of these, or `compact` is demanded.
    """
    if compact:
        raise ValueError("verify must be 'every' where a compact plan is demanded, got 'samples'")
    sees, of_first_head = _asking(mask_mod, as_tensor, length)
    named = pattern_of_intervals(of_first_head, length)
    if named is not None and agrees(sees, named[0], heads, batch, length, (named[1], named[2])):
        return named[0]
    blocks = blocks_of(sees, heads, batch, length, by_head)
    if blocks is None:
        raise ValueError(
            f"mask_mod must be a band, documents of bands, or blocks of 16 to 128 where verify='samples', got a mask of {length} tokens "
            f"that is none of them; verify='every' looks at all pairs"
        )
    return blocks


def _asked(mask_mod: Callable[..., Any], entry: int, shape: tuple[int, ...], as_tensor: Callable[..., Any]) -> Shown:
    """What a mask_mod says of one batch entry, (heads, queries, keys); asked some rows at a time, as its numbers take more room."""
    heads, queries, keys = shape
    shown, rows = np.empty(shape, bool), max(1, _STRIP_CELLS // max(1, heads * keys))
    for first in range(0, queries, rows):
        q = np.arange(first, min(first + rows, queries), dtype=np.int64)
        shown[:, first : first + rows] = _asked_rows(mask_mod, entry, (heads, q, keys), as_tensor)
    return shown


def _asked_rows(
    mask_mod: Callable[..., Any], entry: int, asked: tuple[int, Rows, int], as_tensor: Callable[..., Any]
) -> Shown:
    """What a mask_mod says of (heads, query positions, keys)."""
    heads, q, keys = asked
    shape = heads, len(q), keys
    h, k = (np.arange(length, dtype=np.int64) for length in (heads, keys))
    axes = h.reshape(-1, 1, 1), q.reshape(1, -1, 1), k.reshape(1, 1, -1)
    answer = _answer(mask_mod, entry, axes, as_tensor)
    if answer.dtype != np.bool_:
        raise TypeError(f"mask_mod must return booleans{_hint(as_tensor)}, got {answer.dtype}")
    try:
        return np.broadcast_to(answer, shape)
    except ValueError as error:
        raise ValueError(f"mask_mod must return what broadcasts to {shape}, got shape {answer.shape}") from error


def _answer(
    mask_mod: Callable[..., Any], entry: int, axes: tuple[Rows, Rows, Rows], as_tensor: Callable[..., Any]
) -> npt.NDArray[Any]:
    """What a mask_mod returns for one batch entry and (heads, queries, keys) that broadcast."""
    try:
        return np.asarray(mask_mod(as_tensor(np.full((1, 1, 1), entry, np.int64)), *map(as_tensor, axes)))
    except TypeError as error:
        raise TypeError(f"mask_mod must take int64 arrays (b, h, q, k){_hint(as_tensor)}, got {error}") from error


def _hint(as_tensor: Callable[..., Any]) -> str:
    if as_tensor is not np.asarray:
        return ""
    return "; one written with torch functions or tables needs as_tensor=torch.from_numpy"


def _coarsest(shown: Shown) -> BlockSparse:
    """The same mask in the largest blocks that say it, with `causal` where that lets blocks be larger."""
    future = ~np.tri(*shown.shape[-2:], dtype=bool)
    some, every, causal = shown, shown, not (shown & future).any()
    # Hidden only because it is the future: whole blocks of the past, triangles on the diagonal.
    past = shown | future if causal else shown
    coarsest: tuple[int, Shown, bool] = (1, shown, False)
    # Blocks that say a mask are made of smaller ones that do, so the first size that fails is the last to try.
    for size in _BLOCKS[1:]:
        some, every = _halved(np.logical_or, some), _halved(np.logical_and, every)
        past = _halved(np.logical_and, past) if causal else every
        if np.array_equal(some, every):
            coarsest = (size, some, False)
        elif causal and (past >= some).all():
            coarsest = (size, some, True)
        else:
            break
    return BlockSparse(*coarsest)


def _repeating(shown: Shown) -> Periodic:
    """A mask that is the same one period further on, in the fewest runs."""
    if (shown[1:] != shown[:1]).any():
        raise ValueError(
            "mask_mod must be the same for all heads where a compact plan is demanded, got heads that differ"
        )
    mask = shown[0]
    candidates = [
        Periodic(period, runs, len(mask))
        for period in range(1, min(_MOST_PERIOD, (len(mask) + 1) // 2) + 1)
        if np.array_equal(mask[period:, period:], mask[:-period, :-period])
        and (runs := _runs(mask, period)) is not None
    ]
    if not candidates:
        raise ValueError(
            f"mask_mod must repeat along its diagonal, with a period of at most {_MOST_PERIOD} in at most {_MOST_RUNS} runs, where a "
            f"compact plan is demanded, got a mask of {len(mask)} tokens that does not"
        )
    return min(candidates, key=lambda pattern: len(pattern.runs))


def _runs(mask: Shown, period: int) -> list[Run] | None:
    """The runs of a periodic mask; None where they are too many."""
    runs: list[Run] = []
    for a in range(period):
        last = a + (len(mask) - 1 - a) // period * period
        # The first row of a residue says what lies ahead, the last one what lies behind.
        shown = np.concatenate([mask[a, :a:-1], mask[last, last::-1]])
        distance = np.concatenate([np.arange(a + 1 - len(mask), 0), np.arange(last + 1)])
        for b in range(period):
            some = np.flatnonzero((a - distance) % period == b)
            flags = np.concatenate([[False], shown[some], [False]]).astype(np.int8)
            starts, ends = np.flatnonzero(np.diff(flags) == 1), np.flatnonzero(np.diff(flags) == -1) - 1
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                low = None if start == 0 else int(distance[some[start]])
                runs.append((a, b, low, None if end == len(some) - 1 else int(distance[some[end]])))
            if len(runs) > _MOST_RUNS:
                return None
    return runs


def _halved(how: np.ufunc, blocks: Shown) -> Shown:
    """Blocks of twice the size: two by two of them, and at the end what is left."""
    for axis in (-2, -1):
        pairs = np.moveaxis(blocks, axis, 0)
        joined = pairs[::2].copy()
        how(joined[: len(pairs) // 2], pairs[1::2], out=joined[: len(pairs) // 2])
        blocks = np.moveaxis(joined, 0, axis)
    return blocks
