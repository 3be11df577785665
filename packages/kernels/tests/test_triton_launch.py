"""How kernels are launched, seen by a stub of the driver: device, grid, variants, and what fails.

triton's own launcher runs; nothing is compiled and no GPU is needed. What kernels compute is the interpreter's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.triton import launch_backward, launch_forward, launching
from longattn.kernels.triton.availability import FAILURES, INTERPRETED, installed_version
from longattn.kernels.triton.backward_kernel import keys_kernel, rows_kernel
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Span

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreting, nothing is launched")

KERNELS: tuple[JITFunction[Any], ...] = (forward_kernel, merge_kernel, rows_kernel, keys_kernel, queries_kernel)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, the device it went to, its grid and its arguments by position."""

    kernel: str
    device: int
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@dataclass
class StubDriver:
    """What triton asks of a driver when it launches.

    Attributes:
        current: the current device, which `torch.cuda.device` sets.
        launches: in order. compiled: (kernel, specialisation) of each variant that would have been compiled.
        failure: raised at the next compilation or launch, as `failing` says.
    """

    current: int = 0
    launches: list[Launch] = field(default_factory=list)
    compiled: list[tuple[str, str]] = field(default_factory=list)
    failure: Exception | None = None
    failing: str = ""

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def fail(self, when: str) -> None:
        if self.failure is not None and self.failing == when:
            raise self.failure

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """Stands for `torch.cuda.device`."""
        before, self.current = self.current, device.index or 0
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """The stub, in place of triton's driver and compiler."""
    stub = StubDriver()

    def compile_nothing(self: JITFunction[Any], key: str, signature: Any, *_: Any) -> Any:
        stub.fail("compile")
        name = self.__name__
        stub.compiled.append((name, key))

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            stub.fail("launch")
            stub.launches.append(Launch(name, stub.current, (x, y, z), rest[6:]))

        kernel = SimpleNamespace(run=launch, function=0, packed_metadata=(), launch_metadata=lambda *_: None)
        self.device_caches[stub.current][0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(torch.cuda, "device", stub.device)
    before = driver._active
    driver.set_active(stub)  # type: ignore[arg-type]
    yield stub
    driver._active = before


@pytest.fixture(autouse=True)
def fresh_kernels() -> Any:
    """No variant of a kernel is kept from one test to the next, and no failure."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    FAILURES.clear()
    yield
    FAILURES.clear()


def call_of(pattern: Pattern, *, batch: int = 1, nq: int = 96, nk: int = 96, seed: int = 0, **options: Any) -> Call:
    """A call of two heads over unwritten tensors."""
    q, k, v = (torch.empty(batch, n, 2, 64, dtype=torch.bfloat16) for n in (nq, nk, nk))
    plan = pattern.plan(Rectangle(2, Span(nk - nq, nq), Span(0, nk)))
    settings = {"scale": 0.125, "dropout_p": 0.0, "out_dtype": torch.bfloat16, "deterministic": False, **options}
    absent = dict.fromkeys(("mask", "bias", "key_padding", "prior"))
    return Call(q, k, v, plan, **absent, seed=seed, allocator=TorchAllocator(), **settings)


def run_backward(call: Call, grad: torch.Tensor | None = None) -> None:
    lse = torch.empty(call.q.shape[:3])
    launch_backward.backward(call, torch.empty_like(call.q) if grad is None else grad, None, call.q, lse)


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_goes_to_the_device_of_its_tensors(stub: StubDriver, index: int):
    """Whichever device is current; afterwards the current one is the same as before."""
    stub.current = 1 - index
    out, lse = torch.empty(1, 4, 2, 64), torch.empty(1, 4, 2)
    arguments = (out, lse, None, None, out, lse, 8, 0, 0)
    sizes = {"PARTS": 1, "HEAD_DIM": 64, "BLOCK_D": 64, "ROWS": 16}
    launching.run(merge_kernel, (1,), *arguments, device=torch.device("cuda", index), **sizes)
    assert [launch.device for launch in stub.launches] == [index] and stub.current == 1 - index


def test_every_launch_says_its_device(stub: StubDriver, monkeypatch: pytest.MonkeyPatch):
    """All five kernels: forward, split forward with its merge, fast and deterministic backward."""
    named: dict[str, torch.device] = {}
    run = launching.run

    def record(kernel: Any, grid: Any, *arguments: Any, device: torch.device, **rest: Any) -> None:
        named[kernel.__name__] = device
        run(kernel, grid, *arguments, device=device, **rest)

    for module in (launch_forward, launch_backward):
        monkeypatch.setattr(module, "run", record)
    launch_forward.forward(call_of(Full()))
    launch_forward.forward(call_of(Full(), nq=1, nk=4096))
    for deterministic in (False, True):
        run_backward(call_of(Full(), deterministic=deterministic))
    assert named == {kernel.__name__: torch.device("cpu") for kernel in KERNELS}


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_batch_may_exceed_what_two_axes_of_a_grid_hold(stub: StubDriver, deterministic: bool):
    """65535 is the limit of a grid's second and third axis."""
    call = call_of(Dilated((8,), (1,)), batch=70_000, nq=1, nk=1, deterministic=deterministic)
    launch_forward.forward(call)
    run_backward(call)
    assert {launch.kernel for launch in stub.launches} >= {"forward_kernel", "rows_kernel", "keys_kernel"}
    assert all(launch.grid[1:] == (1, 1) for launch in stub.launches)
    assert next(launch for launch in stub.launches if launch.kernel == "rows_kernel").grid[0] == 140_000


def test_numbers_that_change_from_call_to_call_compile_nothing_anew(stub: StubDriver):
    """Seeds of any size, thresholds, lengths, numbers of jobs and of batch elements, some of them 1 or divisible by 16."""
    for seed, length, batch, dropout_p in ((1, 112, 1, 0.5), (16, 160, 16, 0.1), (2**40, 200, 3, 0.25)):
        for deterministic in (False, True):
            options = {"dropout_p": dropout_p, "deterministic": deterministic}
            call = call_of(Full(), nq=length, nk=length, batch=batch, seed=seed, **options)
            launch_forward.forward(call)
            run_backward(call)
    variants = Counter(name for name, _ in stub.compiled)
    # keys_kernel has two forms: with dq's share, and without.
    assert variants == {"forward_kernel": 1, "rows_kernel": 1, "keys_kernel": 2, "queries_kernel": 1}


def test_an_expanded_cotangent_is_laid_out_before_it_is_read(stub: StubDriver):
    """The gradient of a sum has strides of 0; a kernel would load it number by number, and compile once more for it."""
    call = call_of(Full())
    run_backward(call)
    before = len(stub.compiled)
    run_backward(call, torch.ones((), dtype=torch.bfloat16).expand(call.q.shape))
    assert len(stub.compiled) == before


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("PassManager::run failed"), RuntimeError("Failed to find C compiler. Please specify via CC"),
     OutOfResources(300_000, 232_448, "shared memory"), PTXASError("too hot"), CalledProcessError(1, ["gcc"])],
    ids=lambda failure: f"{type(failure).__name__}-{failure}"[:32],
)  # fmt: skip
def test_what_does_not_compile_makes_the_row_refuse(stub: StubDriver, failure: Exception):
    """With the configuration and the compiler's words as the reason; the next row serves."""
    stub.failure, stub.failing = failure, "compile"
    with pytest.raises(RowFailure, match=r"forward_kernel with \{.*BLOCK_M.*\} does not compile: "):
        launch_forward.forward(call_of(Full()))
    assert len(FAILURES) == 1 and str(failure).splitlines()[0] in FAILURES[0]


def test_a_failed_launch_is_raised_with_what_was_launched(stub: StubDriver):
    """It is no reason to choose another row: the device may be broken."""
    stub.failure, stub.failing = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "launch"
    words = r"forward_kernel with \{.*'BLOCK_M': .*\} on cpu, grid \(\d+,\): Triton Error \[CUDA\]: an illegal memory"
    with pytest.raises(RuntimeError, match=words) as raised:
        launch_forward.forward(call_of(Full()))
    assert not isinstance(raised.value, RowFailure) and not FAILURES


@pytest.mark.parametrize("name", ["triton", "triton-rocm", "pytorch-triton-rocm"])
def test_triton_goes_by_several_names(monkeypatch: pytest.MonkeyPatch, name: str):
    """torch's wheels for ROCm install it under a name of their own."""
    from importlib import metadata

    def version(asked: str) -> str:
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return "3.7.1"

    monkeypatch.setattr(metadata, "version", version)
    assert installed_version() == "3.7.1"
