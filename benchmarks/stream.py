"""`python -m benchmarks.stream`: a million tokens through one ring buffer, and what that does to resident memory.

Rows of `benchmarks/results/decode-stream.csv`: growth of the peak since the warm-up, beside tokens so far. With matplotlib also the plot beside it.
"""

import argparse
import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.memory import ResidentPeak
from longattn.attention import RingBufferAttention, RingBufferConfig

TOKENS, WARM_UP, SAMPLES = 1_000_000, 10_000, 100
SIZE, HEADS, HEAD_DIM = 256, 4, 32


def stream(tokens: int, warm_up: int) -> list[tuple[int, int]]:
    """(tokens so far, bytes by which resident memory has grown at most since the warm-up), a hundred times."""
    config = RingBufferConfig(num_heads=HEADS, head_dim=HEAD_DIM, buffer_size=SIZE, dropout=0.0)
    module = RingBufferAttention(config).eval()
    state = module.new_state(1)
    token = torch.randn(3, 1, 1, HEADS, HEAD_DIM).unbind()
    peak, seen = ResidentPeak(), [(0, 0)] * SAMPLES
    with torch.inference_mode():
        for position in range(warm_up):
            module(*token, position=position, is_decoder=True, buffer_state=state)
        peak.start()
        for done in range(1, tokens + 1):
            module(*token, position=warm_up + done - 1, is_decoder=True, buffer_state=state)
            sample, rest = divmod(done * SAMPLES, tokens)
            if rest == 0:
                seen[sample - 1] = (done, peak.growth() or 0)
    return seen


def write(rows: Sequence[tuple[int, int]], path: Path) -> None:
    """Replace the file by these rows, with where they were measured."""
    where = asdict(record.surroundings())
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tokens", "growth_bytes", "buffer_size", *where])
        writer.writerows([n, growth, SIZE, *where.values()] for n, growth in rows)


def plot(rows: Sequence[tuple[int, int]], path: Path) -> None:
    """Growth over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    # The same figure gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "longattn"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.plot([n / 1e6 for n, _ in rows], [growth / 2**20 for _, growth in rows])
    axes.set(xlabel="million tokens", ylabel="MiB grown", title=f"peak resident memory, ring of {SIZE} tokens")
    axes.set_ylim(-0.05, max(1.0, rows[-1][1] / 2**20))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Stream, print the growth, and write rows and plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=main.__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args(argv)
    rows = stream(arguments.tokens, WARM_UP)
    print(f"{rows[-1][0]} tokens: {rows[-1][1]} bytes of growth after {WARM_UP} to warm up")
    write(rows, arguments.results / "decode-stream.csv")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, arguments.results / "decode-stream.svg")


if __name__ == "__main__":
    main()
