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


def product_loops(cubin: bytes) -> list[list[str]]:
    """The innermost loops that hold matrix products: on tensor cores, or, for float32 without tf32, fused multiply-adds by the dozen."""
    found = loops(disassemble(cubin))
    on_tensor_cores = [
        loop
        for loop in found
        if any(re.search(r"MMA\b", i.split()[0 if i[0] != "@" else 1].replace(".", " ")) for i in loop)
    ]
    return on_tensor_cores or [loop for loop in found if sum("FFMA" in i for i in loop) >= 12]


def local_accesses(loop: list[str]) -> int:
    """Loads and stores of registers that did not fit, in one turn of a loop."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", i.replace(".", " "))) for i in loop)
