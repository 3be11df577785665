# pyright: reportMissingImports=false
"""Ahead of time: compile every shipped configuration for its target, without a GPU, and see what it needs.

`python -m tools.triton_ahead [ARCHITECTURE ...]` prints registers, shared memory, spills and occupancy of each line of
the table, and fails where a line asks for more SRAM than its target has, or where a loop of matrix products keeps registers in
memory, waits for each product before it issues the next, loads without a pipeline though it has stages, makes a product twice, or overwrites registers of a
product that is in flight. A few bytes that are
spilled outside such loops are paid once a job and cost less than a smaller tile. All forms of all architectures take hours of one core; what was
found is kept in triton's cache folder (TRITON_CACHE_DIR) by the sources of kernel and compiler, so that a run that was stopped goes on, and the next
one compiles what changed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longattn.kernels.triton.backward_kernel import keys_kernel
from longattn.kernels.triton.configurations import (
    ARCHITECTURES,
    DENSE,
    HEAD_DIMS,
    PAGED,
    PAGED_WIDTHS,
    TABLE,
    Architecture,
    Configuration,
    choose,
)
from longattn.kernels.triton.dense_kernel import dense_kernel
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.paged_kernel import paged_kernel
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from tools import sass
from tools.sass import (
    disassemble,
    instructions_of,
    loads_asynchronously,
    local_accesses,
    loops,
    multiply_adds,
    overwritten_in_flight,
    product_loops,
    waits_for_every_product,
)

ELEMENTS = {2: "bf16", 4: "fp32"}
"""The element type that stands for a size: bfloat16 and float16 need the same."""

_KERNELS: dict[str, Any] = {
    "forward": forward_kernel,
    "dense": dense_kernel,
    "decode": forward_kernel,
    "backward_keys": keys_kernel,
    "backward_queries": queries_kernel,
    "paged": paged_kernel,
}

_FLAGS: dict[str, dict[str, Any]] = {
    "forward": {"GROUP": 1, "PACK": 1, "FLIP": False},
    "dense": {"GROUP": 1},
    "decode": {"GROUP": 8, "PACK": 8, "FLIP": False},
    "backward_keys": {"GROUP": 1, "REDUCE": True},
    "backward_queries": {"GROUP": 1, "ADD": False},
    "paged": {"PAGE": 16, "FLOAT8": False, "UNIT": 1.0},
}

TENSOR_MEMORY = 512
"""Columns of tensor memory that a program may have on sm_100. The compiler exceeds them without a word; such a kernel does nothing."""

_NARROW_VALUES = 128
"""head_dim of v beside a q and k of 192 in DeepSeek's models; those are padded to 256."""

_OPTIONAL = ("mask", "bias", "padding", "prior_out", "prior_lse", "by_distance", "k_scale", "v_scale")

FORMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "masked": (("mask", "bias", "padding"), {"MASK_ALL": True}),
    "dropout": ((), {"DROPOUT": True}),
    "prior": (("prior_out", "prior_lse"), {"ADD": True}),
    "deterministic": ((), {"REDUCE": False}),
    "all": (("mask", "bias", "padding", "prior_out", "prior_lse"), {"MASK_ALL": True, "DROPOUT": True, "ADD": True}),
    "terms": (("by_distance",), {"SOFTCAP": True, "COLUMNS": 258}),
    "listed": ((), {"LISTED": True}),
}
"""What a call may have beside q, k and v: (arguments that are there, constants). Each is compiled with the tile that `choose` gives it.

With a prior, queries add to the dq of an earlier launch; deterministic, keys make no share of dq.
"""

ALONE = {"prior": ("forward", "dense", "decode", "backward_queries"), "deterministic": ("backward_keys",)}
"""Forms that only some kernels have: which."""

STORED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "int8": (("k_scale", "v_scale"), {}),
    "float8": (("k_scale", "v_scale"), {"FLOAT8": True, "UNIT": 256.0}),
}
"""How pages may lie beside as they are, likewise."""

NARROW_STRIDES = "i32 strides"
"""The plain form of a tensor whose strides fit 32 bits, as triton specialises it."""


@dataclass(frozen=True)
class TableLine:
    """One line of the table, or one of your own, to compile.

    Attributes:
        value_dim: the head_dim of v; 0: head_dim. form: one of FORMS, or NARROW_STRIDES.
    """

    kernel: str
    architecture: str
    head_dim: int
    element_size: int
    configuration: Configuration
    value_dim: int = 0
    form: str = "plain"


@dataclass(frozen=True)
class Need:
    """What a compiled line needs.

    Attributes:
        shared: bytes of SRAM a program. registers: 32-bit ones a thread. spilled: bytes a thread keeps in memory instead.
        loop_faults: what is wrong in loops of matrix products, a sentence each.
        tensor_memory: columns of it, where there is such memory. occupancy: the share of a multiprocessor's threads that fit at once, judged from registers and SRAM.
    """

    line: TableLine
    shared: int
    registers: int
    spilled: int
    tensor_memory: int
    occupancy: float
    loop_faults: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Why the line cannot ship, a sentence each."""
        limit, found = ARCHITECTURES[self.line.architecture].shared, []
        if self.shared > limit:
            found.append(f"shared memory of {self.shared} bytes is over the {limit} of {self.line.architecture}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(
                f"{self.tensor_memory} columns of tensor memory are over the {TENSOR_MEMORY} of {self.line.architecture}"
            )
        return [*found, *self.loop_faults]

    def __str__(self) -> str:
        line, tile = self.line, self.line.configuration
        said = f"{line.architecture:7} {line.kernel:17} D={line.head_dim:<3} "
        said += f"DV={line.value_dim:<3} " if line.value_dim else ""
        said += f"{line.form} " if line.form != "plain" else ""
        said += f"{ELEMENTS[line.element_size]}"
        said += f" {tile.owned:>3} x {tile.streamed:<3} {tile.warps} warps {tile.stages} stages"
        said += f" chunks of {tile.chunk:<2}" if tile.chunk else " " * 13
        said += f"  registers {self.registers:>3}  shared {self.shared:>6}  occupancy {self.occupancy:4.0%}"
        said += f"  {self.spilled} bytes spilled" if self.spilled else ""
        return "  ".join([said, *self.faults])


def lines(architectures: Iterator[str] | list[str], *, every_form: bool = False) -> list[TableLine]:
    """Every shipped line of these architectures; those of the widest tiles also with a narrower v, as in MLA.

    every_form: with each of FORMS and strides of 32 bits too, in the tile that such a call gets.
    """
    plain = [
        TableLine(kernel, arch, dim, size, tile)
        for (kernel, arch, dim, size), tile in TABLE.items()
        if arch in architectures
    ]
    forms = [form for form in (*FORMS, NARROW_STRIDES) if form != "plain"] if every_form else []
    dense = [TableLine("dense", arch, dim, 2, tile) for (arch, dim), tile in DENSE.items() if arch in architectures]
    dense += [replace(line, form=form) for form in ("prior", NARROW_STRIDES) if form in forms for line in dense]
    plain += [replace(line, value_dim=_NARROW_VALUES) for line in plain if line.head_dim == max(HEAD_DIMS)]
    paged = [
        TableLine("paged", arch, dim, size, tile)
        for arch in architectures
        for size, tile in PAGED.items()
        for dim in HEAD_DIMS
        if dim <= PAGED_WIDTHS[size]
    ]
    paged += [replace(line, form=form) for form in STORED if every_form for line in paged]
    return (
        plain
        + dense
        + paged
        + [in_form(line, form) for form in forms for line in plain if line.kernel in ALONE.get(form, _KERNELS)]
    )


def in_form(line: TableLine, form: str) -> TableLine:
    """The line as a call of that form takes it."""
    key = line.kernel, line.architecture, line.head_dim, line.element_size
    masked, prior = form in ("masked", "dropout", "all"), form in ("prior", "all")
    return replace(line, form=form, configuration=choose(*key, form == "terms", masked, prior, form == "listed")[0])


def _form(line: TableLine) -> tuple[tuple[str, ...], dict[str, Any]]:
    return (FORMS | STORED)["plain" if line.form == NARROW_STRIDES else line.form]


def source(line: TableLine, flags: dict[str, Any] | None = None) -> ASTSource:
    """The kernel as a call with plain, contiguous tensors would specialise it; `flags` replace constants."""
    kernel, tile = _KERNELS[line.kernel], line.configuration
    own = {"backward_keys": "BLOCK_N", "paged": "BLOCK_G"}.get(line.kernel, "BLOCK_M")
    other = "BLOCK_M" if line.kernel == "backward_keys" else "BLOCK_N"
    value_dim = line.value_dim or line.head_dim
    present, form_flags = _form(line)
    constants = {
        "HEAD_DIM": line.head_dim, "BLOCK_D": line.head_dim, "VALUE_DIM": value_dim, "BLOCK_V": value_dim, own: tile.owned, other: tile.streamed, "LISTED": False,
        "CHUNK": min(tile.chunk or line.head_dim, line.head_dim),
        "MASK_ALL": False, "DROPOUT": False, "PRECISION": "ieee", "UPCAST": False, "SOFTCAP": False, "COLUMNS": 0, **_FLAGS[line.kernel], **form_flags, **(flags or {}),
    }  # fmt: skip
    constants["VALUE_CHUNK"] = min(tile.chunk or value_dim, value_dim)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    element, signature, attributes = ELEMENTS[line.element_size], {}, {}
    values: dict[Any, Any] = dict(constants)
    absent = {*_OPTIONAL} - {*present, *(["by_distance"] if constants.get("COLUMNS") else [])}
    integer = "i32" if line.form == NARROW_STRIDES else "i64"
    for at, name in enumerate(kernel.arg_names):
        stem = name.removesuffix("_ptr").removesuffix("_strides")
        if name in constants or stem in absent:
            signature[name] = "constexpr"
            values.setdefault(name, None)
        elif name.endswith("_ptr"):
            # A launch with a prior may hand on a state.
            stored = "i8" if line.form in STORED and stem in ("k", "v") else element
            state = stem == "out" and (line.form == "prior" or line.kernel == "paged")
            signature[name] = "*fp32" if state else f"*{_pointed(stem, stored)}"
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif name == "part_strides":
            signature[name] = ("i64", "i64")
        elif name.endswith("_strides"):
            # The last axis of q, k, v and out is contiguous; the others are whole multiples of a row. Masks lie as they please.
            width = {"lse": 3, "prior_lse": 3, "padding": 2}.get(stem, 4)
            rowed = stem not in ("lse", "prior_lse", "padding", "mask", "bias")
            signature[name] = (integer,) * (width - 1) + (("constexpr",) if rowed else (integer,))
            if rowed:
                attributes |= {(at, axis): [["tt.divisibility", 16]] for axis in range(3)}
                values[(at, 3)] = 1
        else:
            signature[name] = {
                "cap": "fp32",
                "scale": "fp32",
                "sm_scale": "fp32",
                "rescale": "fp32",
                "seed": "i64",
                "threshold": "i64",
            }.get(name, "i32")
    return ASTSource(kernel, signature, values, attributes)


def _pointed(stem: str, element: str) -> str:
    fixed = {
        "lse": "fp32",
        "prior_lse": "fp32",
        "prior_out": "fp32",
        "mask": "u8",
        "padding": "u8",
        "by_distance": "fp32",
        "delta": "fp32",
        "pivot": "fp32",
        "jobs": "i32",
        "entries": "i32",
        "rows": "i32",
        "weights": "fp32",
        "k_scale": "fp32",
        "v_scale": "fp32",
        "pages": "i32",
        "added": "fp32",
    }
    return fixed.get(stem, "fp32" if stem == "dq" else element)


def compiled(line: TableLine, flags: dict[str, Any] | None = None) -> Any:
    """One line as triton compiles it for its target."""
    target, tile = ARCHITECTURES[line.architecture], line.configuration
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(
        source(line, flags), target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )


def compile_line(line: TableLine, flags: dict[str, Any] | None = None) -> Need:
    """Compile one line for its target and read what it needs."""
    target, kernel = ARCHITECTURES[line.architecture], compiled(line, flags)
    shared, tile = kernel.metadata.shared, line.configuration
    if target.backend == "cuda":
        registers, spilled = _nvidia(kernel.asm["cubin"])
        kept_apart = line.kernel == "backward_keys" and not (_form(line)[1] | (flags or {})).get("REDUCE", True)
        products = PRODUCTS[line.kernel] - kept_apart
        loop_faults = _loop_faults(kernel.asm["cubin"], line, products)
    else:
        registers, spilled = _amd(kernel.asm["amdgcn"])
        loop_faults = [f"{spilled} bytes a thread are spilled to memory"] if spilled else []
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    occupancy = _occupancy(target, tile.warps, registers, shared)
    return Need(line, shared, registers, spilled, columns, occupancy, tuple(loop_faults))


@lru_cache
def _hash_sources() -> None:
    """Hash every kernel once, in one order: triton's hash of functions that share others depends on which was hashed first."""
    for kernel in _KERNELS.values():
        _ = kernel.cache_key


def kept_file(line: TableLine) -> Path:
    """Where what was found of a line is kept, for these sources of the kernel, of the compiler and of the scans."""
    _hash_sources()
    target, tools = ARCHITECTURES[line.architecture], (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell)
    parts = [source(line).hash(), line, target, triton.__version__, *(tool.version for tool in tools)]
    parts += [inspect.getsource(scan) for scan in (sass, compile_line, _loop_faults, _nvidia, _amd)]
    return Path(knobs.cache.dir) / "longattn-ahead" / hashlib.sha256(repr(parts).encode()).hexdigest()


def needed(line: TableLine) -> Need:
    """As `compile_line`, but what an earlier run found is not compiled again."""
    kept = kept_file(line)
    if kept.exists():
        figures = json.loads(kept.read_text(encoding="utf-8"))
        return Need(line, **(figures | {"loop_faults": tuple(figures["loop_faults"])}))
    need = compile_line(line)
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    figures = {field.name: getattr(need, field.name) for field in fields(Need) if field.name != "line"}
    unfinished.write_text(json.dumps(figures), encoding="utf-8")
    unfinished.replace(kept)
    return need


PRODUCTS = {"forward": 2, "decode": 2, "dense": 2, "backward_keys": 5, "backward_queries": 3, "paged": 2}
"""Products of a tile that each kernel needs; backward_keys with dq's share, as where floats are added atomically."""


def _loop_faults(cubin: bytes, line: TableLine, products: int) -> list[str]:
    """What makes the loops slow, or wrong: the dense loop first, then the masked one. products: of a tile, that the kernel needs."""
    code, tile = disassemble(cubin), line.configuration
    hot = product_loops(code)
    if not hot:
        return ["no loop with matrix products was found"]
    faults = []
    local = [local_accesses(loop) for loop in hot]
    if any(local):
        faults.append(f"{' and '.join(map(str, local))} loads and stores of spilled registers in loops of products")
    # Warps of their own may load for those that compute.
    loaded_apart = any(loads_asynchronously(loop) for loop in loops(code) if loop not in hot)
    # Consumers of the warp-specialised kernel share a tile.
    groups = tile.warps // 4 * (len(hot) if line.kernel == "dense" else 1)
    needed = products * tile.owned * tile.streamed * max(line.head_dim, 16)
    for loop in hot:
        if waited := waits_for_every_product(loop):
            faults.append(f"each of the {waited} products of a loop is waited for")
        if tile.stages > 1 and not loads_asynchronously(loop) and not loaded_apart:
            faults.append(f"{tile.stages} stages, but a loop's loads are not asynchronous")
        made = multiply_adds(loop) * groups
        if not tile.chunk and not line.value_dim and made > needed:
            faults.append(f"products of a loop take {made / needed:.2g} times the multiply-adds that a tile needs")
    overwritten = [
        i for part in (instructions_of(code), *(loop + loop for loop in hot)) for i in overwritten_in_flight(part)
    ]
    if overwritten:
        faults.append(f"{len(overwritten)} registers of a product in flight are overwritten, as by {overwritten[0]!r}")
    return faults


def _nvidia(cubin: bytes) -> tuple[int, int]:
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK"))  # type: ignore[index, return-value]


def _amd(text: str) -> tuple[int, int]:
    # Registers that are counted as spilled go to accumulation registers first; what goes to memory is the private segment.
    words = ("vgpr_count", "private_segment_fixed_size")
    return tuple(int(re.search(rf"\.{word}:\s+(\d+)", text)[1]) for word in words)  # type: ignore[index, return-value]


def _occupancy(target: Architecture, warps: int, registers: int, shared: int) -> float:
    threads = warps * target.warp_size
    fitting = min(
        target.registers // (max(1, registers) * threads), target.shared // max(1, shared), target.threads // threads
    )
    return fitting * threads / target.threads


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and return 1 where a line has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES), help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--jobs", type=int, default=None, help="processes; default one a core")
    parser.add_argument(
        "--forms", action="store_true", help="also with masks, dropout, score terms, listed rows and narrow strides"
    )
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--form", default="", help=f"one of {', '.join((*FORMS, *STORED, NARROW_STRIDES))} alone")
    options = parser.parse_args(argv)
    unknown = set(options.architectures) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"architectures must be of {', '.join(ARCHITECTURES)}, got {', '.join(sorted(unknown))}")
    found = [
        line
        for line in lines(options.architectures, every_form=options.forms or bool(options.form))
        if options.only in line.kernel and options.form in ("", line.form)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        needs = []
        for need in pool.map(needed, found):
            print(need, flush=True)
            needs.append(need)
    faulty = [need for need in needs if need.faults]
    print(f"{len(needs)} configurations compiled, {len(faulty)} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
