"""One run: a family on a task until it has stopped improving, and the row that says what came out."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional

from examples.quality.families import FAMILIES, keys_per_query
from examples.quality.model import Decoder
from examples.quality.tasks import TASKS, VOCABULARY, Batch

BATCH, CHECK = 16, 100
TESTED = 256
"""Sequences that accuracy is measured on; they are drawn from a seed that training does not use."""


@dataclass(frozen=True)
class Row:
    """A run. `steps` is how many were made, `best_step` after how many accuracy was best; seconds are processor time."""

    task: str
    family: str
    length: int
    layers: int
    heads: int
    parameters: int
    keys_per_query: float
    rate: float
    seed: int
    steps: int
    best_step: int
    accuracy: float
    stopped: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How long a run may take: at most `steps`, and `patience` steps without a better accuracy; it also ends at 99.5 %."""

    length: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 64
    steps: int = 1000
    patience: int = 400


def run(task: str, family: str, seed: int, rate: float, plan: Plan, progress: Callable[[str], None]) -> Row:
    """Train and judge one model, on one thread."""
    begin = time.process_time()
    torch.manual_seed(seed)
    draw, random = TASKS[task](plan.length), torch.Generator().manual_seed(1000 + seed)
    tested = draw(TESTED, torch.Generator().manual_seed(1))
    patterns = FAMILIES[family](plan.length, plan.layers, plan.heads)
    model = Decoder(VOCABULARY, patterns, plan.width, plan.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    best, best_step, step, stopped = 0.0, 0, 0, "steps"
    while step < plan.steps:
        batch = draw(BATCH, random)
        loss = functional.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten(), ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % CHECK and step < plan.steps:
            continue
        accuracy = judge(model, tested)
        progress(f"{task} | {family} | seed {seed} | step {step}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
        if accuracy > best:
            best, best_step = accuracy, step
        if best >= 0.995 or step - best_step >= plan.patience:
            stopped = "learnt" if best >= 0.995 else "no better"
            break
    parameters = sum(parameter.numel() for parameter in model.parameters())
    keys = round(keys_per_query(patterns, plan.length, plan.heads), 1)
    shape = (plan.length, plan.layers, plan.heads, parameters, keys)
    seconds = round(time.process_time() - begin, 1)
    return Row(task, family, *shape, rate, seed, step, best_step, round(best, 4), stopped, seconds)


@torch.no_grad()
def judge(model: Decoder, batch: Batch) -> float:
    """The share of questions that are answered right."""
    guesses = model(batch.tokens).argmax(-1).gather(1, batch.asked)
    return float((guesses == batch.labels.gather(1, batch.asked)).float().mean())


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV file, with its header where the file is new."""
    fields = asdict(row)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(fields), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(fields)
