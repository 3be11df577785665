"""What the figures of patterns say before anything is trained: `python -m examples.quality --predict` writes predictions.csv.

The rule: a model recalls what some head of some layer sees directly, and guesses the rest; a path over several layers is rarely learnt. So the
predicted accuracy is the share of (question, answer) pairs that are seen directly, and of the others what guessing gives: one of the values
that were shown in recall, one of 32 where there is one fact. Blocks that scores choose may be any, so all pairs count as seen there.

A lone fact is another matter: nothing else stands in the text, so whoever sees it can pass it on. There what is heard of after all layers counts.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch

from examples.quality.families import FAMILIES, MIXED, BestBlocks, Layers, keys_per_query
from examples.quality.tasks import KEYS, TASKS

PATH = Path(__file__).with_name("predictions.csv")
HEADS = 4
TWO = tuple(name for name in FAMILIES if "three" not in name)
PLANS = ((128, 2, tuple(TASKS), TWO), (128, 4, ("recall",), ("window", *MIXED)), (256, 2, ("recall",), TWO))
"""(length, layers, tasks, families) of the runs that are predicted."""


def seen(patterns: Layers, length: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(length, length) bool: what some head of some layer sees directly, and what is heard of after all layers."""
    direct, heard = np.eye(length, dtype=bool), np.eye(length, dtype=bool)
    for pattern in patterns:
        if isinstance(pattern, BestBlocks):
            shown = np.tri(length, dtype=bool)
        else:
            shown = (pattern.to_dense(length, heads) > 0).any(axis=0)
        direct |= shown
        # What a token has heard of before, and what the tokens that it sees have.
        heard = ((shown | np.eye(length, dtype=bool)).astype(np.int64) @ heard) > 0
    return direct, heard


def rows() -> Iterator[dict[str, object]]:
    """One for each plan, task and family."""
    for length, layers, tasks, families in PLANS:
        tables = {family: seen(FAMILIES[family](length, layers, HEADS), length, HEADS) for family in families}
        for task, family in product(tasks, families):
            batch = TASKS[task](length)(2000, torch.Generator().manual_seed(0))
            direct, heard = (table[batch.asked.numpy(), batch.answer.numpy()].mean() for table in tables[family])
            told = heard if task.startswith("lone") else direct
            guessed = 1 / min(KEYS, length // 16) if task == "recall" else 1 / KEYS
            yield {
                "task": task,
                "family": family,
                "length": length,
                "layers": layers,
                "heads": HEADS,
                "keys_per_query": f"{keys_per_query(FAMILIES[family](length, layers, HEADS), length, HEADS):.1f}",
                "answers_seen_directly": f"{direct:.3f}",
                "answers_heard_of": f"{heard:.3f}",
                "predicted_accuracy": f"{told + (1 - told) * guessed:.2f}",
            }


def write() -> None:
    """predictions.csv, beside this module."""
    table = list(rows())
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
