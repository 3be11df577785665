"""Decode 64 streams that come and go, in one batch and the pages of one pool, and check each against its own run alone.

    ./run python examples/many_streams.py --streams 64 --rows 16

A batch has so many rows. A stream that arrives is read alone, put into a free row (`state.admit`), and decoded with the others, whatever
their lengths; one that ends frees its row (`state.clear`) and its pages for the next. Every second stream begins with one prompt that all
of them share: it is read once, and each goes on from a clone, which holds the same pages until it writes into them. The pool has a number of
pages that is never exceeded, so memory is constant. Tokens are random vectors: what is shown is the bookkeeping.
"""

import argparse
import random

import torch

from longattn.attention import StreamingAttention, pattern_attention
from longattn.patterncache import Dilated

HEADS, HEAD_DIM = 4, 16
PAGE_SIZE = 16
SEGMENTS, RATES = (16, 64), (1, 4)
SHARED = 40
"""Tokens of the prompt that every second stream begins with."""


def decode(streams: int, rows: int, longest: int, seed: int = 0) -> dict[str, float]:
    """Serve all streams, and return what was measured: steps, tokens, pages at most, bytes and the largest error."""
    attention = StreamingAttention(Dilated(SEGMENTS, RATES, causal=True), num_heads=HEADS, head_dim=HEAD_DIM)
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [chance.randint(SHARED + 2, max(longest, SHARED + 2)) for _ in range(streams)]
    tokens = [torch.randn(3, 1, n, HEADS, HEAD_DIM, generator=generator) for n in lengths]
    for each in tokens[::2]:
        each[:, :, :SHARED] = tokens[0][:, :, :SHARED]
    # A head holds a segment's keys at each rate and its newest one; beside the rows there are the prompt and the stream that arrives.
    pages = -(-(sum(s // r for s, r in zip(SEGMENTS, RATES, strict=True)) + 1) // PAGE_SIZE)
    pool = attention.new_pool((rows + 2) * HEADS * pages, page_size=PAGE_SIZE)
    prompt_out, prompt = attention(*tokens[0][:, :, :SHARED], attention.new_state(1, pool=pool))
    outs: list[list[torch.Tensor]] = [[] for _ in range(streams)]
    waiting, active = list(range(streams)), dict[int, int]()  # row -> stream
    batch = attention.new_state(rows, pool=pool)
    steps, decoded, most, size = 0, 0, 0, pool.nbytes
    while waiting or active:
        for row in range(rows):
            # Arrivals are not all at once: a free row waits now and then.
            if row not in active and waiting and chance.random() < 0.7:
                stream = waiting.pop(0)
                shares = stream % 2 == 0
                alone, begun = (prompt.clone(), SHARED) if shares else (attention.new_state(1, pool=pool), 0)
                end = chance.randint(begun + 1, lengths[stream] - 1)
                out, alone = attention(*tokens[stream][:, :, begun:end], alone)
                batch.admit(row, alone)
                del alone
                active[row], outs[stream] = stream, [prompt_out, out] if shares else [out]
        if active:
            at = sorted(active)
            positions = batch.positions
            q, k, v = (
                torch.cat([tokens[active[row]][part, :, positions[row] : positions[row] + 1] for row in at])
                for part in range(3)
            )
            out, batch = attention(q, k, v, batch, rows=at)
            for index, row in enumerate(at):
                outs[active[row]].append(out[index : index + 1])
                if batch.positions[row] == lengths[active[row]]:
                    batch.clear(row)
                    del active[row]
            steps, decoded, most = steps + 1, decoded + len(at), max(most, pool.pages_held)
    error = 0.0
    for stream in range(streams):
        expected = pattern_attention(*tokens[stream], attention.pattern)
        error = max(error, float((torch.cat(outs[stream], 1) - expected).abs().max()))
    # Only the prompt is left, and the memory is that of the beginning.
    left = pool.pages_held - prompt.nbytes // pool.page_nbytes
    return {
        "steps": steps, "tokens": decoded, "longest": max(lengths), "pages": pool.limit or 0, "most_pages_held": most,
        "pages_left": left, "bytes": pool.nbytes, "grown_by": pool.nbytes - size, "error": error,
    }  # fmt: skip


def main() -> None:
    """Serve, print, and fail where a stream differs from its run alone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--longest", type=int, default=400)
    options = parser.parse_args()
    measured = decode(options.streams, options.rows, options.longest)
    print(", ".join(f"{name} {value}" for name, value in measured.items()))
    if measured["error"] > 1e-4:
        raise SystemExit(f"a stream differs from its run alone by {measured['error']}")
    if measured["pages_left"] or measured["grown_by"]:
        raise SystemExit(
            f"{measured['pages_left']} pages were not given back, and memory grew by {measured['grown_by']}"
        )


if __name__ == "__main__":
    main()
