"""Read a long text through a small model in constant memory, and go on after a kill where it was, bit for bit.

    ./run python examples/stream_book.py --text book.txt --state book.state --png book.png
    ./run python examples/stream_book.py --library --tokens 1000000 --png book.png   # Python's own documentation and sources
    ./run python examples/stream_book.py --tokens 100000                             # a text made from a seed

Bytes are tokens. Each piece of the text goes through `LongNet.stream()`, whose layers hold what their patterns still see. After every few
pieces all that was read is saved, in one step, so that a kill at any time loses the pieces since then and nothing else; the next run with the
same arguments reads on from there, and its figures are those of a run that was never stopped. Without --train the weights are random: then the
loss shows the model's start, and memory what is meant here.
"""

import argparse
import csv
import os
import resource
from pathlib import Path
from typing import Any

import torch

from longattn.attention import LongNet

WORDS = [
    "the",
    "sea",
    "of",
    "a",
    "long",
    "road",
    "and",
    "one",
    "small",
    "light",
    "under",
    "every",
    "wide",
    "morning",
    "that",
    "no",
    "one",
    "counts",
]


def made_text(count: int, seed: int = 0) -> bytes:
    """So many bytes of words drawn from a few, the same for a seed."""
    drawn = torch.randint(len(WORDS), (count // 2 + 1,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn).encode()[:count]


def library_text(count: int) -> bytes:
    """So many bytes of Python's documentation, as `help()` has it, and of the sources of its library, in order of their names."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    folder = Path(os.__file__).parent
    for source in sorted(folder.glob("*.py")):
        if len(text) >= count:
            break
        text += source.read_bytes()
    return text[:count]


def small_model(seed: int = 0) -> LongNet:
    """Two layers of 64 features over segments of 128 and 512 bytes at rates 1 and 4."""
    torch.manual_seed(seed)
    return LongNet(256, d_model=64, nhead=4, num_layers=2, segment_lengths=(128, 512), dilation_rates=(1, 4)).eval()


def train(model: LongNet, text: bytes, steps: int, length: int = 512) -> None:
    """A few steps on the beginning of the text."""
    tokens = torch.tensor(list(text[: length * 8 + 1]))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    for step in range(steps):
        start = step * length % max(1, len(tokens) - length - 1)
        piece = tokens[start : start + length + 1][None]
        loss = torch.nn.functional.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def read(
    model: LongNet, text: bytes, state: Path, piece: int = 512, save_every: int = 16, pieces: int | None = None
) -> list[dict[str, Any]]:
    """Read the text on from where `state` says, and return a row for each piece since its beginning: position, loss, bytes.

    Args:
        piece: bytes that go through the model at once. save_every: pieces from one saving to the next.
        pieces: stop after so many, as a kill would. Default: at the text's end.
    """
    stream, rows, last = model.stream(), [], None
    if state.exists():
        saved = torch.load(state, weights_only=True)
        stream.load_state_dict(saved["stream"])
        rows, last = saved["rows"], saved["last"]
    done = 0
    while stream.position < len(text) and done != pieces:
        tokens = torch.tensor(list(text[stream.position : stream.position + piece]))[None]
        logits = stream(tokens)[0]
        # The first byte of a piece is foretold by the last logits of the piece before.
        before, targets = (logits[:-1], tokens[0, 1:]) if last is None else (torch.cat((last, logits[:-1])), tokens[0])
        loss = float(torch.nn.functional.cross_entropy(before, targets)) if len(targets) else float("nan")
        last, done = logits[-1:], done + 1
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(
            {"position": stream.position, "loss": loss, "held_bytes": stream.nbytes, "peak_resident_bytes": resident}
        )
        if done % save_every == 0 or stream.position >= len(text):
            fresh = state.with_suffix(".new")
            torch.save({"stream": stream.state_dict(), "rows": rows, "last": last}, fresh)
            os.replace(fresh, state)
    return rows


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Loss and memory by position. Needs matplotlib."""
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True)
    at = [row["position"] for row in rows]
    upper.plot(at, [row["loss"] for row in rows])
    upper.set_ylabel("loss, nats a byte")
    lower.plot(at, [row["held_bytes"] / 2**20 for row in rows], label="keys and values held")
    lower.plot(at, [row["peak_resident_bytes"] / 2**20 for row in rows], label="peak of the process")
    lower.set_ylabel("MiB")
    lower.set_xlabel("position")
    lower.legend()
    figure.savefig(png)


def main() -> None:
    """Read, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="a file; default: a text made from a seed")
    parser.add_argument("--library", action="store_true", help="Python's documentation and the sources of its library")
    parser.add_argument("--tokens", type=int, default=100_000, help="bytes of the text that is no file")
    parser.add_argument("--train", type=int, default=0, help="steps of training on the text's beginning")
    parser.add_argument("--state", type=Path, default=Path("stream_book.state"))
    parser.add_argument("--csv", type=Path, help="where rows go; default: beside the state")
    parser.add_argument("--png", type=Path, help="where the plot goes; default: none")
    options = parser.parse_args()
    made = library_text if options.library else made_text
    text = options.text.read_bytes() if options.text else made(options.tokens)
    model = small_model()
    train(model, text, options.train)
    rows = read(model, text, options.state)
    with (options.csv or options.state.with_suffix(".csv")).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    losses = [row["loss"] for row in rows]
    print(
        f"{len(text)} bytes read; mean loss {sum(losses) / len(losses):.4f}; {rows[-1]['held_bytes']} bytes of keys and values held"
    )
    if options.png:
        plot(rows, options.png)


if __name__ == "__main__":
    main()
