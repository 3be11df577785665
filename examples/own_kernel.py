"""A kernel of your own, fed by a pattern's index arrays: `./run python examples/own_kernel.py`.

The kernel here is a dozen lines of torch: gather the keys that a query sees, one softmax. patterncache says which keys those are, keeps the plan, and knows how
to build the same pattern again from a string.
"""

import argparse

import torch
from torch import Tensor

from longattn.patterncache import (
    Dilated,
    IndexArrays,
    Pattern,
    PatternCache,
    Rectangle,
    Span,
    index_arrays,
    parse_pattern,
)


def rows_of(cache: PatternCache, pattern: Pattern, length: int, heads: int) -> IndexArrays:
    """The pattern as compressed rows, made once for each pattern, length and number of heads."""
    whole = Rectangle(heads, Span(0, length), Span(0, length))
    return cache.get_or_build((pattern.canonical(), whole), lambda: index_arrays(pattern.plan(whole)))


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, rows: IndexArrays) -> Tensor:
    """softmax(scores + log(counts)) v for every row; q, k, v (seq, heads, head_dim)."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        kind = rows.head_class[head]  # heads that see alike share their rows
        for i in range(q.shape[0]):
            begin, end = int(rows.indptr[kind, i]), int(rows.indptr[kind, i + 1])
            if begin == end:
                continue  # sees no key: zero
            seen = torch.tensor(rows.indices[begin:end], dtype=torch.long)
            counts = torch.tensor(rows.counts[begin:end])
            scores = k[seen, head] @ q[i, head] * q.shape[-1] ** -0.5 + counts.log()
            out[i, head] = scores.softmax(0) @ v[seen, head]
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """The same by the definition, with all pairs."""
    counts = torch.from_numpy(pattern.to_dense(q.shape[0], q.shape[1]))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5 + counts.log()
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), v)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    given = parser.parse_args(argv)

    pattern = Dilated((16, 64), (1, 4), causal=True)
    cache = PatternCache(max_size=10)
    q, k, v = torch.randn(3, given.length, given.heads, 16)
    for _ in range(3):
        rows = rows_of(cache, pattern, given.length, given.heads)
        out = gathered_attention(q, k, v, rows)
    torch.testing.assert_close(out, dense_attention(q, k, v, pattern))

    stats = cache.get_stats()
    print(f"{len(rows.indices)} index entries in {rows.indptr.shape[0]} kinds of heads, for {given.length} tokens")
    print(f"the plan was built {stats['misses']} time and found {stats['hits']} times")
    assert (stats["misses"], stats["hits"]) == (1, 2)
    assert parse_pattern(pattern.canonical()) == pattern
    print(f"as a string: {pattern.canonical()}")


if __name__ == "__main__":
    main()
