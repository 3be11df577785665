"""`python -m examples.quality.text`: the loss of the next byte by how many bytes came before it, in long documents of real text.

Documents are the standard library's sources (or `--data`) that are longer than the context; every eighth is held out. Families have the same parameters,
read the same bytes in the same order, and are judged on the same ones.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from examples.quality.families import FAMILIES, keys_per_query
from examples.quality.model import Attends, Decoder
from examples.quality.rows import Rows
from longattn.patterncache import Pattern

BYTES, HEADS, LAYERS, WIDTH = 256, 4, 2, 64
READ = ("dense", "islands", "for_length, all residues", "window", "dense, then window")
Documents = list[Tensor]


def documents(data: Path | None, length: int) -> tuple[Documents, Documents]:
    """(trained on, held out): files longer than the context, each as uint8."""
    root = Path(sysconfig.get_path("stdlib")) if data is None else data
    files = sorted(root.glob("*.py") if data is None else (file for file in root.rglob("*") if file.is_file()))
    long = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
    long = [text for text in long if len(text) > length]
    if len(long) < 8:
        raise SystemExit(f"--data must hold 8 files of more than --length={length} bytes, got {len(long)}")
    return [text for at, text in enumerate(long) if at % 8 != 7], long[7::8]


def windows(texts: Documents, length: int, batch: int, random: torch.Generator) -> Tensor:
    """(batch, length + 1) int64: from documents drawn by their size, at places of their own."""
    sizes = torch.tensor([float(len(text)) for text in texts])
    drawn = []
    for document in torch.multinomial(sizes, batch, replacement=True, generator=random).tolist():
        start = int(torch.randint(len(texts[document]) - length, (), generator=random))
        drawn.append(texts[document][start : start + length + 1])
    return torch.stack(drawn).long()


def losses_of(model: Decoder, tokens: Tensor) -> Tensor:
    """(batch, length) nats of each next byte."""
    return functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")


def train(
    patterns: Sequence[Pattern | Attends],
    texts: Documents,
    seed: int,
    length: int,
    batch: int,
    steps: int,
    rate: float = 3e-3,
    device: str = "cpu",
    progress: Callable[[str], None] = print,
) -> tuple[Decoder, list[float]]:
    """A model that has read `steps` batches, and the loss of each step. What a step reads follows from the seed alone."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(1000 + seed)
    model = Decoder(BYTES, patterns, WIDTH, HEADS).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, 0.1 + 0.9 * (1 - step / steps))
    )
    curve = []
    for step in range(1, steps + 1):
        loss = losses_of(model, windows(texts, length, batch, random).to(device)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if step % 100 == 0:
            progress(f"step {step}: {sum(curve[-100:]) / 100:.3f} nats a byte")
    return model, curve


@torch.no_grad()
def by_position(model: Decoder, texts: Documents, length: int, judged: int, device: str = "cpu") -> Tensor:
    """(length,) nats in the mean over so many held-out windows, the same for every model."""
    random = torch.Generator().manual_seed(1)
    batches = [windows(texts, length, 4, random).to(device) for _ in range(max(1, judged // 4))]
    return torch.cat([losses_of(model, batch) for batch in batches]).mean(0)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, train each family, append a row for each stretch of positions."""
    parser = argparse.ArgumentParser(prog="python -m examples.quality.text", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of text files (default: the standard library's sources)")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(READ))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    for name, default in (("length", 2048), ("batch", 2), ("steps", 1000), ("judged", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("quality-text.csv"), help="default: quality-text.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    read, held = documents(options.data, options.length)
    shape = (options.length, options.batch, options.steps)
    written = Rows(options.out)
    for seed, family in product(options.seeds, options.families):
        run = {"family": family, "length": options.length, "batch": options.batch, "steps": options.steps, "seed": seed}
        if written.finished(run):
            continue
        begin = time.process_time()
        patterns = FAMILIES[family](options.length, LAYERS, HEADS)
        model, _ = train(patterns, read, seed, *shape, device=options.device)
        losses = by_position(model, held, options.length, options.judged, options.device)
        run |= {"layers": LAYERS, "heads": HEADS, "width": WIDTH, "judged": options.judged}
        run |= {"keys_per_query": round(keys_per_query(patterns, options.length, HEADS), 1)}
        run |= {"seconds": round(time.process_time() - begin, 1)}
        stretch = -(-options.length // 16)
        rows = [
            run | {"begin": start, "end": min(start + stretch, options.length), "loss": round(part.mean().item(), 4)}
            for start, part in zip(range(0, options.length, stretch), losses.split(stretch), strict=True)
        ]
        written.append(*rows)
        print(f"{family} | seed {seed}: {losses.mean():.3f} nats a byte, last stretch {rows[-1]['loss']}", flush=True)


if __name__ == "__main__":
    main()
