"""Train a byte-level LongNet on real text: by default the sources of Python's standard library, 8192 bytes of context.

    python examples/train_bytes.py                          # 600 steps; writes bytes.pt, bytes.csv and bytes.png
    python examples/train_bytes.py --resume                 # goes on where bytes.pt was written
    python examples/train_bytes.py --data my.txt --device cuda --d-model 512 --layers 6 --steps 20000
    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_bytes.py     # the context in a ring of processes

A run that was killed and resumed has the losses of one that was not: what a step reads follows from its number and the seed. With
`--deterministic` they are the same bits.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from longattn.attention import LongNet, Ring, shard_sequence

BYTES = 256
BAR = 24


def read(data: Path | None, most: int) -> Tensor:
    """The text as (bytes,) uint8: a file, a folder's files, or the standard library's sources; at most so many bytes."""
    root = Path(sysconfig.get_path("stdlib")) if data is None else data
    files = (
        [root]
        if root.is_file()
        else sorted(root.glob("*.py") if data is None else (p for p in root.rglob("*") if p.is_file()))
    )
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) >= most:
            break
    return torch.frombuffer(text[:most], dtype=torch.uint8)


def batch_of(text: Tensor, options: argparse.Namespace, step: int) -> Tensor:
    """(batch, context + 1) int64 for a step, which its number and the seed decide; negative numbers are for judging."""
    random = torch.Generator().manual_seed((options.seed << 32) + step % (1 << 32))
    starts = torch.randint(len(text) - options.context, (options.batch,), generator=random)
    return torch.stack([text[start : start + options.context + 1] for start in starts.tolist()]).long()


def ring_of(options: argparse.Namespace) -> Ring | None:
    """Over the processes that torchrun started; None for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return Ring(dist.group.WORLD, layout="zigzag", lengths=options.context)


def loss_of(model: LongNet, tokens: Tensor, ring: Ring | None) -> Tensor:
    """Cross entropy of the next byte, in nats; of a ring's rank its share of the mean over all bytes."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if ring is not None:
        (inputs, _), (targets, _) = shard_sequence(inputs, ring), shard_sequence(targets, ring)
    total = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def add_up(ring: Ring | None, *tensors: Tensor) -> None:
    """In place, over the ranks of a ring."""
    if ring is not None:
        for tensor in tensors:
            dist.all_reduce(tensor)


def bar(step: int, steps: int, loss: float, seconds: float) -> str:
    """A line that says how far it is."""
    done = BAR * step // steps
    return f"[{'#' * done}{'.' * (BAR - done)}] {step}/{steps}  {loss:.3f} nats a byte  {seconds:.0f} s left "


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its place, then move it there: one that is cut off replaces nothing."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def draw(losses: list[float], context: int, path: Path) -> bool:
    """The losses as a picture; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, lw=1)
    axes.set(xlabel="step", ylabel="nats a byte", title=f"Next byte, {context} bytes of context")
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def train(options: argparse.Namespace) -> list[float]:
    """Run to the last step, and return the loss of every step; on a ring's other ranks none."""
    ring = ring_of(options)
    first_rank = ring is None or dist.get_rank() == 0
    torch.manual_seed(options.seed)
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    text = read(options.data, options.most_bytes)
    if len(text) <= options.context:
        raise SystemExit(f"--data must hold more than --context={options.context} bytes, got {len(text)}")
    model = LongNet(
        BYTES, options.d_model, options.heads, options.layers, max_length=options.context, schedule=ring
    ).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    losses: list[float] = []
    checkpoint = options.out.with_suffix(".pt")
    if options.resume:
        state = torch.load(checkpoint, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        losses = state["losses"]
    begin, first = time.monotonic(), len(losses)
    while len(losses) < options.steps:
        step = len(losses)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20)
        loss = loss_of(model, batch_of(text, options, step).to(options.device), ring)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        add_up(ring, loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if not first_rank:
            continue
        left = (time.monotonic() - begin) / (step - first) * (options.steps - step)
        print(bar(step, options.steps, losses[-1], left), end="\r" if sys.stdout.isatty() else "\n", flush=True)
        if step % options.save_every == 0 or step == options.steps:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**parts, "random": torch.get_rng_state(), "losses": losses})
    with torch.no_grad():
        judged = loss_of(model, batch_of(text, options, -1).to(options.device), ring)
        add_up(ring, judged)
    if first_rank:
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{size} parameters, {judged.item():.3f} nats a byte on a batch of its own")
    if ring is not None:
        dist.destroy_process_group()
    return losses if first_rank else []


def main(arguments: list[str] | None = None) -> None:
    """Read the options, train, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or a folder (default: the standard library's sources)")
    parser.add_argument("--most-bytes", type=int, default=1 << 23, help="bytes of it that are used (default: 8 MiB)")
    parser.add_argument("--out", type=Path, default=Path("bytes"), help="name of .pt, .csv and .png (default: bytes)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--deterministic", action="store_true", help="the same bits in every run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=2e-3)
    for name, default in (
        ("context", 8192),
        ("steps", 600),
        ("batch", 1),
        ("d-model", 64),
        ("layers", 2),
        ("heads", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints (default: 25)")
    options = parser.parse_args(arguments)
    losses = train(options)
    if not losses:
        return
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("step", "loss"), *enumerate(losses, 1)])
    drawn = draw(losses, options.context, options.out.with_suffix(".png"))
    print(f"wrote {options.out}.pt, .csv" + (" and .png" if drawn else "; no .png without matplotlib"))


if __name__ == "__main__":
    main()
