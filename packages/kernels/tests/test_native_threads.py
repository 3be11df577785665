"""Threads: as many as torch has, none left over in a forked child, and Python threads that call at the same time."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from longattn.kernels import attend
from longattn.kernels.native.building import refusal
from longattn.patterncache import Dilated, Full

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))

LONGNET = Dilated((64, 128, 256), (1, 2, 4))
LINUX = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(seed: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 512, 4, 32, generator=torch.Generator().manual_seed(seed)))
    state = attend(q, k, v, LONGNET, backend="native")
    return (state.out, *torch.autograd.grad(state.out.square().sum(), (q, k, v)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_alone():
    """After the parent's threads have worked: the child has none of them, waits for none, and gets the same bits."""
    # In a process of its own, for torch's runtime, which hangs in a child, must not be asked for anything there.
    code = """
        import os, torch
        from pathlib import Path
        from longattn.kernels import attend
        from longattn.patterncache import Dilated

        tasks = Path("/proc/self/task")
        torch.set_num_threads(3)
        q, k, v = torch.randn(3, 1, 512, 4, 32)
        call = lambda: attend(q, k, v, Dilated((64, 128, 256), (1, 2, 4)), backend="native").out
        before = call().numpy().tobytes()
        child = os.fork()
        if not child:
            same = call().numpy().tobytes() == before
            os._exit(0 if same and (not tasks.is_dir() or len(list(tasks.iterdir())) == 1) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert call().numpy().tobytes() == before
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_python_threads_at_once(threads: Callable[[int], None]):
    """Eight callers share one pool: nobody waits for ever, nobody gets another's numbers, bits are those of a call alone."""
    threads(2)
    expected = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(gradients, range(8)))
            for mine, alone in zip(found, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


@LINUX
def test_as_many_threads_as_torch_has():
    """The library starts one fewer than asked for, keeps them, and never more: in a fresh process that has nothing else."""
    code = """
        import os, torch
        torch.set_num_threads(1)
        from longattn.kernels import attend
        from longattn.patterncache import Full
        q = torch.randn(1, 2048, 4, 16)

        def started(threads):
            torch.set_num_threads(threads)
            attend(q, q, q, Full(), backend="native", out_dtype=torch.float32)
            return len(os.listdir("/proc/self/task"))

        first = started(1)
        print([started(n) - first for n in (1, 2, 3, 3, 1, 2)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "[0, 1, 2, 2, 2, 2]"


def test_no_second_openmp_runtime():
    """The library names none: a second one beside torch's hangs in a forked child."""
    from longattn.kernels import build_native

    assert b"libgomp" not in build_native().read_bytes() and b"libiomp" not in build_native().read_bytes()


def test_more_threads_than_work(threads: Callable[[int], None]):
    threads(16)
    q = torch.randn(1, 3, 1, 4)
    assert attend(q, q, q, Full(), backend="native").out.isfinite().all()
