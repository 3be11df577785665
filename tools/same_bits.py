"""Hashes of what every CPU row computes for a fixed set of inputs: does a change of structure change a bit?

    python -m tools.same_bits                     # compare with the committed hashes
    python -m tools.same_bits --write             # record this machine's

Bits depend on the processor's instructions, torch and the number of threads (one here), so hashes are kept by processor level and torch
version; on a machine without a record the comparison says so and passes.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longattn.attention import Ring, pattern_attention
from longattn.kernels import attend, backends
from longattn.patterncache import Dilated, Documents, Full, Pattern, Window

RECORD = Path(__file__).parent / "same_bits.json"
ROWS = tuple(name for name in backends("cpu") if name != "native")
"""The native row's own arithmetic changes with its kernels; it is held to the oracle."""

PATTERNS: dict[str, Pattern] = {
    "full": Full(),
    "causal": Full(causal=True),
    "window": Window(20, sinks=2),
    "dilated": Dilated((16, 32, 96), (1, 2, 4), causal=True),
    "split": Dilated((16, 32), (1, 2), heads="split"),
    "documents": Documents((0, 30, 96), Full(causal=True)),
}


def machine() -> str:
    """What bits depend on."""
    return f"{torch.backends.cpu.get_cpu_capability()} torch {torch.__version__.split('+')[0]}"


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v: 96 tokens, 4 heads, 2 kv heads of 16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 96, 4, 16), (2, 96, 2, 16), (2, 96, 2, 16))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results() -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Name, and outputs and gradients."""
    for row in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            for name, pattern in PATTERNS.items():
                q, k, v = tensors(dtype)
                state = attend(q, k, v, pattern, backend=row)
                grads = torch.autograd.grad(state.out.sum() + state.lse.sum(), (q, k, v))
                yield f"{row} {str(dtype)[6:]} {name}", [state.out, state.lse, *grads]
        for layout in ("contiguous", "zigzag", "striped"):
            q, k, v = tensors(torch.float32)
            options: dict[str, Any] = {"schedule": Ring(size=4, layout=layout), "backend": row, "return_lse": True}
            out, lse = pattern_attention(q, k, v, PATTERNS["dilated"], **options)
            yield f"{row} ring {layout}", [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))]


def hashes() -> dict[str, str]:
    """Of every result, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _hash(found) for name, found in results()}
    finally:
        torch.set_num_threads(threads)


def _hash(tensors: list[torch.Tensor]) -> str:
    known = hashlib.sha256()
    for x in tensors:
        known.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return known.hexdigest()[:16]


def recorded() -> dict[str, dict[str, str]]:
    """The committed hashes by machine."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def main() -> int:
    """Compare or record; 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record instead of comparing")
    known, here = recorded(), hashes()
    if parser.parse_args().write:
        RECORD.write_text(json.dumps(known | {machine(): here}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    if machine() not in known:
        print(f"no record for {machine()}")
        return 0
    differ = [name for name, value in known[machine()].items() if here.get(name) != value]
    print("\n".join(f"differs: {name}" for name in differ) or f"{len(here)} results, the same bits")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
