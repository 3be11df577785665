"""The walk of one call through our files, as a figure: `./run python -m tools.trace_call --write` puts it into docs/a-call.md.

The interpreter says which functions a call enters, in which order; what torch and Python enter of their own is left out. The walk is
that of `RingDilatedAttentionV3` on tiny tensors, eager, its ring in this process, by the row of the table that serves here.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from longattn.attention import DilatedAttention, RingDilatedAttentionV3

PAGE = Path(__file__).resolve().parents[1] / "docs" / "a-call.md"
BEGIN, END = "<!-- what follows is written by tools/trace_call.py -->\n", "<!-- end of what is written -->\n"


@dataclass
class Entered:
    """A function that was entered, and what it entered in turn. The root stands for the caller: its file is empty."""

    file: str
    function: str
    inner: list[Entered] = field(default_factory=list)

    def every(self) -> Iterator[Entered]:
        """This and all below it, in order of entry."""
        yield self
        for each in self.inner:
            yield from each.every()


def walk(call: Callable[[], object]) -> Entered:
    """What of ours `call` enters on this thread."""
    root = Entered("", "")
    stack: list[tuple[FrameType, Entered]] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = _own_file(frame.f_code.co_filename)
        if file is None:
            return
        if event == "call":
            here = Entered(file, frame.f_code.co_qualname)
            (stack[-1][1] if stack else root).inner.append(here)
            stack.append((frame, here))
        elif event == "return" and stack and stack[-1][0] is frame:
            stack.pop()

    collects = gc.isenabled()
    gc.disable()  # a collection would enter finalizers of things that are not of this call
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()
    return root


def _own_file(path: str) -> str | None:
    """A module of ours as PACKAGE/PATH, or None."""
    parts = Path(path).parts
    if "longattn" not in parts or not path.endswith(".py"):
        return None
    return "/".join(parts[len(parts) - parts[::-1].index("longattn") :])


def two_calls(ring_size: int | None) -> tuple[Entered, Entered]:
    """The first call of a signature, and the third, of a ring or of `DilatedAttention`; the second one binds what all later ones use.

    Libraries are loaded and torch is warm: a call of another pattern came before.
    """
    for lengths in ((4, 8), (8, 16)):
        options: dict[str, Any] = {"segment_lengths": lengths, "dilation_rates": (1, 2)}
        ring = ring_size is not None
        module = RingDilatedAttentionV3(**options, ring_size=ring_size) if ring else DilatedAttention(**options)
        q, k, v = torch.randn(3, 1, 2 * lengths[1], 2, 8)
        first, _, third = (walk(lambda: module(q, k, v)) for _ in range(3))  # noqa: B023
    return first, third


def by_file(root: Entered) -> dict[str, Counter[str]]:
    """File -> how often each of its functions is entered, files in order of entry. Comprehensions count for who holds them."""
    found: dict[str, Counter[str]] = {}
    for each in root.every():
        if each.file and "<" not in each.function.rsplit(".", 1)[-1]:
            found.setdefault(each.file, Counter())[each.function] += 1
    return found


def figure(root: Entered) -> str:
    """The walk, one line for each file that a file enters, indented below it; beside it what is entered there, in order."""
    lines: list[tuple[str, str]] = []

    def put(entered: list[Entered], depth: int) -> None:
        rooms: dict[str, list[Entered]] = {}
        for each in entered:
            rooms.setdefault(each.file, []).append(each)
        for file, members in rooms.items():
            names, beyond = _stay(members, file)
            lines.append(("  " * depth + file, ", ".join(dict.fromkeys(names))))
            put(beyond, depth + 1)

    put(root.inner, 0)
    width = max(len(left) for left, _ in lines) + 2
    return "\n".join(left.ljust(width) + right for left, right in lines)


def _stay(members: list[Entered], file: str) -> tuple[list[str], list[Entered]]:
    """Functions entered without leaving the file, by their short names, and what is entered from them elsewhere."""
    names: list[str] = []
    beyond: list[Entered] = []
    for each in members:
        if each.file != file:
            beyond.append(each)
            continue
        name = each.function.rsplit("<locals>.", 1)[-1]
        if not name.startswith("<"):
            names.append(name)
        inside, outside = _stay(each.inner, file)
        names += inside
        beyond += outside
    return names, beyond


def beside(first: Entered, repeated: Entered) -> str:
    """A table of files: how many functions the first call enters in each, and how many a repeated one."""
    left, right = by_file(first), by_file(repeated)
    rows = [
        f"| `{file}` | {left.get(file, Counter()).total() or ''} | {right.get(file, Counter()).total() or ''} |"
        for file in dict.fromkeys([*right, *left])
    ]
    total = f"| {len(left)} and {len(right)} files | {_entered(left)} | {_entered(right)} |"
    return "\n".join(["| file | first call | repeated call |", "| --- | --- | --- |", *rows, total])


def _entered(files: dict[str, Counter[str]]) -> int:
    return sum(each.total() for each in files.values())


def written() -> str:
    """What the page shows."""
    first, repeated = two_calls(1)
    lines = [f"```text\n{figure(repeated)}\n```", "## First call beside a repeated call"]
    lines += ["Functions entered in each file, the repeated call's files first.", beside(first, repeated)]
    lines += ["## Beside other calls", "Repeated calls of the same signature.", _other_calls()]
    return "\n\n".join(lines) + "\n"


def _other_calls() -> str:
    rows = ["| call | files | functions entered |", "| --- | --- | --- |"]
    for name, ring_size in (("`DilatedAttention`", None), ("a ring of one", 1), ("a ring of four, in one process", 4)):
        files = by_file(two_calls(ring_size)[1])
        rows.append(f"| {name} | {len(files)} | {_entered(files)} |")
    return "\n".join(rows)


def main() -> None:
    """Print the figure, the number of files, or put the figure into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/a-call.md")
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        metavar="RING_SIZE",
        help="only a repeated call's number of files, and whose row served",
    )
    options = parser.parse_args()
    if options.count:
        for ring_size in options.count:
            files = by_file(two_calls(ring_size)[1])
            print(len(files), "native" if any("/native/" in file for file in files) else "torch")
    elif options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{written()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(written())


if __name__ == "__main__":
    main()
