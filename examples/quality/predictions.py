"""What the figures of patterns say before anything is trained: `python -m examples.quality --predict` writes predictions.csv.

The rule: a model recalls what some head of some layer sees directly, and guesses the rest; a path over several layers is rarely learnt. So the
predicted accuracy is the share of (question, answer) pairs that are seen directly, and of the others what guessing gives: one of eight values
that were shown in recall, one of 32 where there is one fact.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from examples.quality.families import FAMILIES, Layers, keys_per_query
from examples.quality.tasks import TASKS

PATH = Path(__file__).with_name("predictions.csv")
LENGTH, LAYERS, HEADS = 128, 2, 4
GUESSED = {"recall": 1 / 8}


def seen(patterns: Layers, length: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(length, length) bool: what some head of some layer sees directly, and what is heard of after all layers."""
    direct, heard = np.eye(length, dtype=bool), np.eye(length, dtype=bool)
    for pattern in patterns:
        shown = (pattern.to_dense(length, heads) > 0).any(axis=0)
        direct |= shown
        # What a token has heard of before, and what the tokens that it sees have.
        heard = ((shown | np.eye(length, dtype=bool)).astype(np.int64) @ heard) > 0
    return direct, heard


def rows() -> list[dict[str, object]]:
    """One for each task and family."""
    written: list[dict[str, object]] = []
    for task, of_length in TASKS.items():
        batch = of_length(LENGTH)(2000, torch.Generator().manual_seed(0))
        pairs = batch.asked.numpy(), batch.answer.numpy()
        for family, build in FAMILIES.items():
            patterns = build(LENGTH, LAYERS, HEADS)
            direct, heard = (table[pairs].mean() for table in seen(patterns, LENGTH, HEADS))
            written.append(
                {
                    "task": task,
                    "family": family,
                    "length": LENGTH,
                    "layers": LAYERS,
                    "heads": HEADS,
                    "keys_per_query": f"{keys_per_query(patterns, LENGTH, HEADS):.1f}",
                    "answers_seen_directly": f"{direct:.3f}",
                    "answers_heard_of": f"{heard:.3f}",
                    "predicted_accuracy": f"{direct + (1 - direct) * GUESSED.get(task, 1 / 32):.2f}",
                }
            )
    return written


def write() -> None:
    """predictions.csv, beside this module."""
    table = rows()
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
