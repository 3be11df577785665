"""One fault: where it is put and what it replaces; and which faults a seed takes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A source text with one fault.

    Attributes:
        file: path of the source file, relative to the checkout.
        where: the function or class that holds the fault, or the file's own level.
        before, after: the expression, statement or line, and what stands in its place.
        number: counts equal faults of one place, from 0.
        text: the whole file with the fault.
    """

    file: str
    where: str
    before: str
    after: str
    number: int
    text: str

    @property
    def name(self) -> tuple[str, str, str, str, str]:
        """What identifies the fault in the table of survivors; it does not move with the lines above it."""
        return self.file, self.where, self.before, self.after, str(self.number)


def numbered(found: Iterable[tuple[str, str, str, str]], file: str) -> list[Mutant]:
    """Mutants of one file from (where, before, after, text), equal ones told apart by a number."""
    seen: Counter[tuple[str, str, str]] = Counter()
    mutants = []
    for where, before, after, text in found:
        key = (where, before, after)
        mutants.append(Mutant(file, *key, seen[key], text))
        seen[key] += 1
    return mutants


def sample(mutants: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """The `count` mutants whose hash with the seed is least: a change elsewhere in the source leaves the others as they are."""

    def order(mutant: Mutant) -> bytes:
        return hashlib.sha256("\0".join((str(seed), *mutant.name)).encode()).digest()

    return sorted(mutants, key=order)[:count]


def shortened(text: str, most: int = 140) -> str:
    """One line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
