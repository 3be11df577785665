"""Tasks whose answer stands in the sequence: many facts asked again (MQAR), and one fact asked much later, among others or in blanks.

Tokens: 0 is filler, 1 to KEYS are keys, the next KEYS are values. A fact is a key followed by its value; a question is the key again, and the
answer is what a model says there. Labels are -1 where nothing is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS = 32
VOCABULARY = 1 + 2 * KEYS


@dataclass(frozen=True)
class Batch:
    """tokens, labels (batch, length) int64; asked, answer (batch, questions) int64: where questions and their values stand."""

    tokens: Tensor
    labels: Tensor
    asked: Tensor
    answer: Tensor

    def to(self, device: str) -> Batch:
        """On a device."""
        return Batch(*(x.to(device) for x in (self.tokens, self.labels, self.asked, self.answer)))


def recall(batch: int, length: int, facts: int, random: torch.Generator) -> Batch:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): facts first, each asked once at a place of its own."""
    keys = torch.rand(batch, KEYS, generator=random).argsort(1)[:, :facts] + 1
    values = torch.randint(1 + KEYS, VOCABULARY, (batch, facts), generator=random)
    places = torch.rand(batch, length - 2 * facts, generator=random).argsort(1)[:, :facts] + 2 * facts
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    tokens[:, 0 : 2 * facts : 2], tokens[:, 1 : 2 * facts : 2] = keys, values
    tokens.scatter_(1, places, keys)
    labels = torch.full_like(tokens, -1).scatter_(1, places, values)
    return Batch(tokens, labels, places, (2 * torch.arange(facts) + 1).expand(batch, facts))


def one_fact(batch: int, length: int, near: int, blank: bool, random: torch.Generator) -> Batch:
    """One fact, asked `near` to `near + 7` tokens after its value, in filler alone or among other keys and values; places and distances are drawn."""
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=random) * (not blank)
    key = torch.randint(1, 1 + KEYS, (batch, 1), generator=random)
    # The key stands nowhere else.
    tokens = torch.where(tokens == key, 0, tokens)
    value = torch.randint(1 + KEYS, VOCABULARY, (batch, 1), generator=random)
    distance = torch.randint(near, near + 8, (batch, 1), generator=random)
    answer = 1 + (torch.rand(batch, 1, generator=random) * (length - distance - 1)).long()
    tokens.scatter_(1, answer - 1, key).scatter_(1, answer, value).scatter_(1, answer + distance, key)
    labels = torch.full_like(tokens, -1).scatter_(1, answer + distance, value)
    return Batch(tokens, labels, answer + distance, answer)


TASKS = {"recall": lambda n: lambda batch, random: recall(batch, n, min(KEYS, n // 16), random)} | {
    f"{kind}, {name}": lambda n, share=share, kind=kind: (
        lambda batch, random: one_fact(batch, n, round(n * share), kind == "lone fact", random)
    )
    for kind in ("one fact", "lone fact")
    for name, share in (("inside", 3 / 16), ("across", 3 / 8), ("beyond", 3 / 4))
}
"""name -> length -> (batch, generator) -> Batch. Distances of one fact: inside the longest segment of the scaled default (a quarter of the
length), across its border, and far beyond it."""
