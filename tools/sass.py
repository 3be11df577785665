# pyright: reportMissingImports=false
"""Reading NVIDIA's machine code: the loops of a compiled kernel, and what stands in them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[list[str]]:
    """The instructions of each innermost loop: from a label to the branch that goes back to it, with no such branch between.

    A conditional branch forward out of it counts as an instruction; code that a loop jumps over counts too, as it cannot be told apart.
    """
    lines, labels, instructions = code.splitlines(), {}, []
    for line in lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    spans = []
    for at, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], at + 1) <= at:
            spans.append((labels[target[1]], at))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [instructions[first : last + 1] for first, last in innermost]


def instructions_of(code: str) -> list[str]:
    """All instructions, in order."""
    return [
        found[1].strip() for line in code.splitlines() if (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line))
    ]


def product_loops(code: str) -> list[list[str]]:
    """The innermost loops that hold matrix products: on tensor cores, or, for float32 without tf32, fused multiply-adds by the dozen."""
    found = loops(code)
    on_tensor_cores = [loop for loop in found if any(re.search(r"MMA\b", _name(i).replace(".", " ")) for i in loop)]
    return on_tensor_cores or [loop for loop in found if sum("FFMA" in i for i in loop) >= 12]


def _text(instruction: str) -> str:
    """Without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction)


def _name(instruction: str) -> str:
    return _text(instruction).split()[0]


def local_accesses(loop: list[str]) -> int:
    """Loads and stores of registers that did not fit, in one turn of a loop."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", i.replace(".", " "))) for i in loop)


def waits_for_every_product(loop: list[str]) -> int:
    """How many asynchronous products a loop has, where it waits as often; else 0. Two are waited for anyway: the scores', and the last one."""
    products, waits = (sum(word in i for i in loop) for word in ("HGMMA", "WARPGROUP.DEPBAR"))
    return products if waits >= products > 2 else 0


def loads_asynchronously(loop: list[str]) -> bool:
    """Whether a loop holds a load that it need not wait for at once."""
    return any(re.search(r"LDGSTS|UTMALDG|UBLKCP", i) for i in loop)


def multiply_adds(loop: list[str]) -> int:
    """Multiply-adds of a Hopper loop's products, of one group of four warps; 0 where it has none of that kind."""
    shapes = (re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", _text(i)) for i in loop)
    return sum(int(shape[1]) * int(shape[2]) * int(shape[3]) for shape in shapes if shape)


def overwritten_in_flight(instructions: list[str]) -> list[str]:
    """Instructions that write a register which an asynchronous product still reads: from the product to the wait that covers it.

    ptxas 12.8 and 12.9 are said to do so on Hopper. A loop is read twice, for what one turn leaves to the next.
    """
    faults: list[str] = []
    committed: list[set[int]] = []
    current: set[int] = set()
    for instruction in instructions:
        text = _text(instruction)
        read = set().union(current, *committed)
        if product := re.match(r"HGMMA\.\d+x(\d+)x\S*\s+R(\d+), (?:R(\d+)|gdesc)", text):
            first, columns = int(product[2]), int(product[1])
            if read & set(range(first, first + columns // 2)):
                faults.append(text)
            if product[3]:
                current |= set(range(int(product[3]), int(product[3]) + 4))
            if "gsb0" in text:
                committed.append(current)
                current = set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text):
            left = int(wait[1], 16)
            committed = committed[-left:] if left else []
        elif _written(text) & read:
            faults.append(text)
    return faults


_NO_RESULT = ("ST", "RED", "BAR", "ATOM", "LDGSTS", "BRA", "SYNCS", "UTMA", "R2UR", "WARPGROUP")
"""How instructions begin whose first register is read."""


def _written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    target = re.match(r"\S+\s+(?:P\w+,\s*)*R(\d+)\b", text)
    name = text.split()[0]
    if target is None or name.startswith(_NO_RESULT):
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name == "CS2R" else 1
    if name.startswith("LDSM") and name[-1].isdigit():
        width = int(name[-1])
    return set(range(int(target[1]), int(target[1]) + width))
