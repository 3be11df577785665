"""Decode 64 streams that come and go, in one batch and constant memory, and check each against its own run alone.

    ./run python examples/many_streams.py --streams 64 --rows 16

A batch has so many rows. A stream that arrives is read alone, put into a free row (`state.admit`), and decoded with the others, whatever
their lengths; one that ends frees its row (`state.clear`) for the next. Tokens are random vectors: what is shown is the bookkeeping.
"""

import argparse
import random

import torch

from longattn.attention import StreamingAttention, pattern_attention
from longattn.patterncache import Dilated

HEADS, HEAD_DIM = 4, 16


def decode(streams: int, rows: int, longest: int, seed: int = 0) -> dict[str, float]:
    """Serve all streams, and return what was measured: steps, tokens, peak bytes and the largest error."""
    pattern = Dilated((16, 64), (1, 4), causal=True)
    attention = StreamingAttention(pattern, num_heads=HEADS, head_dim=HEAD_DIM)
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [chance.randint(2, longest) for _ in range(streams)]
    tokens = [torch.randn(3, 1, n, HEADS, HEAD_DIM, generator=generator) for n in lengths]
    outs: list[list[torch.Tensor]] = [[] for _ in range(streams)]
    waiting, active = list(range(streams)), dict[int, int]()  # row -> stream
    batch = attention.new_state(rows)
    steps, decoded, peak = 0, 0, 0
    while waiting or active:
        for row in range(rows):
            # Arrivals are not all at once: a free row waits now and then.
            if row not in active and waiting and chance.random() < 0.7:
                stream = waiting.pop(0)
                prompt = chance.randint(1, lengths[stream] - 1)
                out, alone = attention(*tokens[stream][:, :, :prompt])
                batch.admit(row, alone)
                active[row], outs[stream] = stream, [out]
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
            steps, decoded, peak = steps + 1, decoded + len(at), max(peak, batch.nbytes)
    error = 0.0
    for stream in range(streams):
        expected = pattern_attention(*tokens[stream], pattern)
        error = max(error, float((torch.cat(outs[stream], 1) - expected).abs().max()))
    return {"steps": steps, "tokens": decoded, "peak_bytes": peak, "longest": max(lengths), "error": error}


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


if __name__ == "__main__":
    main()
