"""The islands of a plan: connected components of its tokens, whichever way they see each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longattn.patterncache.indices import Affine, Index, Listed
from longattn.patterncache.plan import Branch, Plan
from longattn.patterncache.spans import Rows


def islands(plan: Plan) -> Rows:
    """(tokens,) int64: the first token of each one's island. No walk of any length, in any direction, leaves an island."""
    length = plan.rectangle.shape[1]
    if any(_is_chain(branch, length) for branch in plan.branches):
        return np.zeros(length, np.int64)
    # Where ranges of tokens that are joined to the next one begin, less where they end: many tiles and branches say so of the same ones.
    borders = np.zeros(length + 1, np.int64)
    ends = [np.stack([a.ravel(), b.ravel()]) for branch in plan.branches for a, b in _links(branch, borders)]
    label = np.arange(length, dtype=np.int64)
    label[1:][np.cumsum(borders)[: length - 1] > 0] = 0
    label = np.maximum.accumulate(label)
    links = np.concatenate([np.zeros((2, 0), np.int64), *ends], 1)
    while links.size:
        at = label[links]
        links, at = links[:, at[0] != at[1]], at[:, at[0] != at[1]]
        # A label is the first token of what is joined so far; each takes the lowest label among its links.
        np.minimum.at(label, at.max(axis=0), at.min(axis=0))
        while (label != (shorter := label[label])).any():
            label = shorter
    return label


def _is_chain(branch: Branch, length: int) -> bool:
    """Whether a branch joins every token to the next, by itself."""
    every = Affine(0, 1, 0, length, 1)
    shown = branch.band is None or bool(branch.band.sees(np.array([1, -1])).any())
    return shown and branch.steps == (1, 1) and all(_same_rows(index, every) for index in (branch.q, branch.k))


def _same_rows(index: Index, one: Affine) -> bool:
    return isinstance(index, Affine) and (index.start, index.tiles, index.count) == (one.start, one.tiles, one.count)


def _links(branch: Branch, borders: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of tokens that, with the ranges marked in `borders`, join all that the branch joins; far fewer than its pairs."""
    if branch.band is None:
        (q, _), (k, _) = _runs(branch.q), _runs(branch.k)
        yield q[:, :1], k[:, :1]
        yield _chain(branch.q, borders)
        yield _chain(branch.k, borders)
    elif branch.uniform:
        q, k = branch.q.rows(), branch.k.rows()
        begin, end = branch.key_range()
        seeing = begin <= end
        begin, end = begin[seeing], end[seeing]
        yield q[:, seeing], k[:, begin]
        # Neighbouring keys are joined where some query sees both.
        cover = np.zeros(branch.k.count + 1, np.int64)
        np.add.at(cover, begin, 1)
        np.add.at(cover, end, -1)
        together = np.flatnonzero(np.cumsum(cover)[: branch.k.count - 1] > 0)
        yield k[:, together], k[:, together + 1]
    else:
        yield listed_pairs(branch)


def _runs(index: Index) -> tuple[Rows, int]:
    """(tiles, runs) first rows of runs of neighbouring rows, and how many rows each has."""
    if index.step != 1:
        return index.rows(), 1
    return (index.starts, index.run) if isinstance(index, Listed) else (index.narrow(0, 1).rows(), index.count)


def _chain(index: Index, borders: Rows) -> tuple[Rows, Rows]:
    """Pairs that join each tile's rows one after the other; neighbours are marked in `borders` instead."""
    starts, run = _runs(index)
    np.add.at(borders, starts, 1)
    np.add.at(borders, starts + run - 1, -1)
    before, after = starts[:, :-1] + run - 1, starts[:, 1:]
    near = after == before + 1
    np.add.at(borders, before[near], 1)
    np.add.at(borders, after[near], -1)
    return before[~near], after[~near]


def listed_pairs(branch: Branch) -> tuple[Rows, Rows]:
    """(queries, keys) of every pair that a branch with listed visibility shows."""
    assert branch.visible is not None
    t, a, b = np.nonzero(branch.visible)
    return branch.q.rows()[t, a], branch.k.rows()[t, b]
