"""The processor's peak as a contender: a loop of nothing but multiply-adds that does as many operations as dense attention."""

import ctypes
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from longattn.kernels.native import compiling
from longattn.kernels.native.building import current


@lru_cache
def _library() -> ctypes.CDLL:
    target, compiler = current(), compiling.find()
    if isinstance(compiler, str):
        raise RuntimeError(compiler)
    source = Path(__file__).with_name("fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "fma_peak.so"
        flags = (*target.flags, f"-I{files('longattn.kernels.native')}")
        subprocess.run(compiler.command(flags, str(source), str(made)), check=True)
        return ctypes.CDLL(str(made))


def multiply_adds_of_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The floating-point operations of dense attention's two products, on all of torch's threads, and nothing else.

    Args:
        q, k, v: (batch, seq, heads, head_dim); only sizes and dtype are read.
        causal: half the pairs, and those of the diagonal.

    Returns:
        q: there is no result.
    """
    batch, rows, heads, dim = q.shape
    keys = k.shape[1]
    pairs = rows * (rows + 1) // 2 if causal else rows * keys
    threads, half = torch.get_num_threads(), int(q.dtype == torch.bfloat16 and current().level == "avx512bf16")
    library = _library()
    step = library.flops_of_step
    step.restype = ctypes.c_int64
    steps = 4 * batch * heads * pairs * dim // (step(ctypes.c_int64(half)) * threads)

    def spin(_: int) -> None:
        library.multiply_adds(ctypes.c_int64(steps), ctypes.c_int64(half))

    # ctypes lets go of the interpreter, so these run at the same time.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(spin, range(threads)))
    return q
