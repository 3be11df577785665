"""One run: a family on a task until it has stopped improving, and the row that says what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from examples.quality.families import FAMILIES, keys_per_query
from examples.quality.model import Decoder, work
from examples.quality.tasks import TASKS, VOCABULARY, Batch

BATCH, CHECK = 16, 100
TESTED = 256
"""Sequences that accuracy is measured on; they are drawn from a seed that training does not use."""


BETTER = 0.01
"""A rise of accuracy that counts as one."""
LEARNT = 0.995
KEYS_AT_EQUAL_FLOPS = 1 / 8
"""Keys a query, as a share of the length, of the model of width `Plan.width` whose work the others get at equal FLOPs."""


@dataclass(frozen=True)
class Row:
    """A run. `flops` are those of a token's forward pass; `steps` is how many were made, `best_step` after how many accuracy was best; `curve` is
    the accuracy after each 100 steps; seconds are processor time.
    """

    task: str
    family: str
    length: int
    layers: int
    heads: int
    width: int
    equal: str
    parameters: int
    keys_per_query: float
    flops: int
    rate: float
    seed: int
    steps: int
    best_step: int
    accuracy: float
    stopped: str
    seconds: float
    curve: str


@dataclass(frozen=True)
class Plan:
    """A model, and how long a run may take: at most `steps`, and `patience` steps without a better accuracy; it also ends at 99.5 %.

    `equal` "parameters" takes `width` for every family. "flops" takes the widest with which a token costs no more than in a model of `width` with an
    eighth of the keys: dense attention gets a narrower model, and patterns that see less a wider one.
    """

    length: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 64
    equal: str = "parameters"
    steps: int = 3000
    patience: int = 600
    device: str = "cpu"

    def width_of(self, keys: float) -> int:
        """Of the model of a family that sees so many keys a query."""
        if self.equal == "parameters":
            return self.width
        shape = (VOCABULARY, self.layers)
        most = work(*shape, self.width, self.heads, self.length * KEYS_AT_EQUAL_FLOPS)
        widths = range(self.heads, 2 * self.width + 1, self.heads)
        return max(width for width in widths if work(*shape, width, self.heads, keys) <= most)


def run(task: str, family: str, seed: int, rate: float, plan: Plan, progress: Callable[[str], None]) -> Row:
    """Train and judge one model."""
    begin = time.process_time()
    torch.manual_seed(seed)
    draw, random = TASKS[task](plan.length), torch.Generator().manual_seed(1000 + seed)
    tested = draw(TESTED, torch.Generator().manual_seed(1)).to(plan.device)
    patterns = FAMILIES[family](plan.length, plan.layers, plan.heads)
    keys = keys_per_query(patterns, plan.length, plan.heads)
    width = plan.width_of(keys)
    model = Decoder(VOCABULARY, patterns, width, plan.heads).to(plan.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    curve: list[float] = []
    best, best_step, step, stopped = 0.0, 0, 0, "steps"
    while step < plan.steps:
        batch = draw(BATCH, random).to(plan.device)
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
        curve.append(accuracy)
        if accuracy >= min(LEARNT, best + BETTER):
            best, best_step = accuracy, step
        if best >= LEARNT or step - best_step >= plan.patience:
            stopped = "learnt" if best >= LEARNT else "no better"
            break
    return Row(
        task=task,
        family=family,
        length=plan.length,
        layers=plan.layers,
        heads=plan.heads,
        width=width,
        equal=plan.equal,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        keys_per_query=round(keys, 1),
        flops=work(VOCABULARY, plan.layers, width, plan.heads, keys),
        rate=rate,
        seed=seed,
        steps=step,
        best_step=best_step,
        accuracy=round(max(curve), 4),
        stopped=stopped,
        seconds=round(time.process_time() - begin, 1),
        curve=" ".join(f"{accuracy:.3f}" for accuracy in curve),
    )


@torch.no_grad()
def judge(model: Decoder, batch: Batch) -> float:
    """The share of questions that are answered right."""
    guesses = model(batch.tokens).argmax(-1).gather(1, batch.asked)
    return float((guesses == batch.labels.gather(1, batch.asked)).float().mean())
