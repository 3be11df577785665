"""How kernels are launched, seen by a stub of the driver: device, grid, variants, and what fails.

triton's own launcher runs; nothing is compiled and no GPU is needed. What kernels compute is the interpreter's business.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

from longattn.kernels import attend
from longattn.kernels.dispatch import table
from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import Environment, TorchAllocator
from longattn.kernels.dispatch.prepared import LENGTHS, PREPARED
from longattn.kernels.dispatch.table import RowFailure
from longattn.kernels.ops.arguments import Cotangents, OpTensors
from longattn.kernels.triton import (
    bound,
    forward_form,
    launch_backward,
    launch_dense,
    launch_forward,
    launching,
    passes,
    row,
)
from longattn.kernels.triton.availability import FAILURES, INTERPRETED, installed_version
from longattn.kernels.triton.backward_kernel import keys_kernel, rows_kernel
from longattn.kernels.triton.dense_kernel import dense_kernel
from longattn.kernels.triton.forward_kernel import forward_kernel
from longattn.kernels.triton.joblist import ENTRY_FIELDS, JOB_FIELDS
from longattn.kernels.triton.merge_kernel import merge_kernel
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, PatternCache, Rectangle, Span, Window

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreting, nothing is launched")

KERNELS: tuple[JITFunction[Any], ...] = (
    forward_kernel, dense_kernel, merge_kernel, rows_kernel, keys_kernel, queries_kernel,
)  # fmt: skip


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
    assert {*named.values()} == {torch.device("cpu")} and {*named} == {kernel.__name__ for kernel in KERNELS} - {
        "dense_kernel"
    }


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


@pytest.mark.parametrize(
    ("nq", "nk", "dtype"), [(96, 96, torch.bfloat16), (96, 96, torch.float32), (1, 4096, torch.bfloat16)]
)
def test_a_bound_forward_launches_what_a_forward_does(stub: StubDriver, nq: int, nk: int, dtype: torch.dtype):
    """The same kernels over the same grids with the same numbers; out, lse, and parts of a split, are new."""
    call = call_of(Full(), nq=nq, nk=nk, out_dtype=dtype, dropout_p=0.25, seed=3)
    out, lse = launch_forward.forward(call)
    bound = launch_forward.bind(call, out, lse)
    assert bound is not None
    expected, compiled = stub.launches.copy(), len(stub.compiled)
    stub.launches.clear()
    q, k, v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
    computed = bound(q, k, v, torch.tensor(3), call.allocator)
    assert computed is not None and [x.shape for x in computed] == [out.shape, lse.shape]
    assert [x.dtype for x in computed] == [dtype, torch.float32] and len(stub.compiled) == compiled
    assert [described(launch) for launch in expected] == [described(launch) for launch in stub.launches]
    assert all(any(x is y for y in stub.launches[0].arguments) for x in (q, k, v))


@pytest.mark.parametrize(
    "pattern",
    [Full(), Full(causal=True), Window(600, causal=True, sinks=4), Dilated((256, 512), (1, 2), causal=True)],
    ids=lambda pattern: pattern.name,
)
@pytest.mark.parametrize("owned", [1, 3, 96])
def test_a_bound_forward_follows_a_cache_that_grows(stub: StubDriver, pattern: Pattern, owned: int):
    """Each length is bound from the one before, launches what a forward of its own does, and compiles nothing; where it is computed in
    another form, it is not bound so.
    """
    lengths = (*range(1000, 1010), 1024, 1100, 1025)
    first = call_of(pattern, nq=owned, nk=lengths[0])
    bound = launch_forward.bind(first, *launch_forward.forward(first))
    followed = 0
    for length in lengths[1:]:
        call = call_of(pattern, nq=owned, nk=length)
        stub.launches.clear()
        launch_forward.forward(call)
        expected, compiled = stub.launches.copy(), len(stub.compiled)
        stub.launches.clear()
        assert bound is not None
        grown = bound.at_lengths(call)
        if grown is None:
            assert forward_form.form_of(call) != bound._form or len(expected) != len(bound._launches)
            continue
        q, k, v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
        assert grown(q, k, v, None, call.allocator) is not None and len(stub.compiled) == compiled
        assert [described(launch) for launch in expected] == [described(launch) for launch in stub.launches]
        bound, followed = grown, followed + 1
    assert followed >= 9


@pytest.fixture
def serving(stub: StubDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """The stub, and a row that serves tensors of the CPU too, through every floor above it."""
    monkeypatch.setattr(row, "CAPABILITY", replace(row.CAPABILITY, devices=("cuda", "cpu")))
    for forget in (table.row.cache_clear, table.explain_problem.cache_clear):
        forget()
    yield stub
    monkeypatch.undo()
    for forget in (table.row.cache_clear, table.explain_problem.cache_clear, PREPARED.clear, LENGTHS.clear):
        forget()


@pytest.mark.parametrize(
    "pattern",
    [Full(), Full(causal=True), Window(300, causal=True, sinks=4), Dilated((256, 512), (1, 2), causal=True)],
    ids=lambda pattern: pattern.name,
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_tokens_of_a_cache_that_grows_are_made_ready_together(serving: StubDriver, pattern: Pattern, kv_heads: int):
    """After three lengths plans are not asked for any more; each token launches what a forward of its own does, over tables that are those of
    its plan, and compiles nothing. The same length again does, too.
    """
    cache = PatternCache()
    environment = Environment(cache)
    q = torch.empty(1, 1, 2, 64, dtype=torch.bfloat16)
    keys, values = (torch.empty(1, 1200, kv_heads, 64, dtype=torch.bfloat16) for _ in range(2))
    first = 960
    for length in range(first, first + 90):
        k, v = keys[:, :length], values[:, :length]
        compiled = len(serving.compiled)
        serving.launches.clear()
        attend(q, k, v, pattern, backend="triton", environment=environment)
        launched = serving.launches.copy()
        assert len(serving.compiled) == compiled or length < first + 2 or length % 128 < 2
        serving.launches.clear()
        plan = pattern.plan(Rectangle(2, Span(length - 1, 1), Span(0, length)))
        call = replace(call_of(pattern, nq=1, nk=length), q=q, k=k, v=v, plan=plan, out_dtype=torch.float32)
        launch_forward.forward(call)
        expected = serving.launches.copy()
        assert [described(launch) for launch in launched] == [described(launch) for launch in expected]
        own, alone = (read_tables(named(launches[0])) for launches in (launched, expected))
        assert all(torch.equal(x, y) for x, y in zip(own, alone, strict=True))
        serving.launches.clear()
        attend(q, k, v, pattern, backend="triton", environment=environment)
        assert [described(launch) for launch in serving.launches] == [described(launch) for launch in expected]
    # Lengths at which keys are split into other parts are prepared with their plans.
    assert cache.get_stats()["misses"] < 12


def read_tables(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Jobs, entries and weights as far as a launch reads them: lines are filled up with any numbers."""
    jobs = arguments["jobs_ptr"][: arguments["job_count"] * len(JOB_FIELDS)].view(-1, len(JOB_FIELDS))
    entries = int(jobs[:, JOB_FIELDS.index("end")].max())
    return [jobs, arguments["entries_ptr"][: entries * len(ENTRY_FIELDS)], arguments["weights_ptr"][:entries]]


def test_a_token_made_ready_is_prepared_with_its_plan_where_its_tensors_lie_otherwise(serving: StubDriver):
    """Keys that begin at an odd address have a variant of the kernel of their own; the plan is asked for then."""
    cache = PatternCache()
    environment, pattern = Environment(cache), Full(causal=True)
    q = torch.empty(1, 1, 2, 64, dtype=torch.bfloat16)
    memory = torch.empty(1200 * 2 * 64 + 1, dtype=torch.bfloat16)
    keys, odd = (memory[at : at + 1200 * 2 * 64].view(1, 1200, 2, 64) for at in (0, 1))
    for length in range(400, 408):
        attend(q, keys[:, :length], keys[:, :length], pattern, backend="triton", environment=environment)
    asked = cache.get_stats()["misses"]
    for length in (407, 408):
        attend(q, odd[:, :length], odd[:, :length], pattern, backend="triton", environment=environment)
        assert named(serving.launches[0])["k_ptr"] is not None
        asked += 1
        assert cache.get_stats()["misses"] == asked


def test_lengths_are_not_made_ready_beyond_where_a_pattern_ends(serving: StubDriver):
    """A pattern of so many blocks has no plan after them; those before are made ready all the same."""
    environment = Environment(PatternCache())
    pattern = BlockSparse(16, [[True] * 4] * 4)
    q = torch.empty(1, 1, 2, 64, dtype=torch.bfloat16)
    keys = torch.empty(1, 70, 2, 64, dtype=torch.bfloat16)
    for length in range(50, 65):
        attend(q, keys[:, :length], keys[:, :length], pattern, backend="triton", environment=environment)
    with pytest.raises(ValueError, match="64"):
        attend(q, keys[:, :65], keys[:, :65], pattern, backend="triton", environment=environment)


def test_strides_that_compile_another_variant_are_not_bound_so(stub: StubDriver):
    """Triton tells multiples of 16 from other strides, and lists from ranges; a tensor that begins elsewhere is not bound at all."""
    call = call_of(Full(), nq=1, nk=1000)
    bound = launch_forward.bind(call, *launch_forward.forward(call))
    assert bound is not None
    wide = torch.empty(1, 1001, 2, 72, dtype=torch.bfloat16)[..., :64]
    plan = Full().plan(Rectangle(2, Span(1000, 1), Span(0, 1001)))
    longer = replace(call_of(Full(), nq=1, nk=1001), plan=plan)
    assert bound.at_lengths(longer) is not None
    assert bound.at_lengths(replace(longer, k=wide)) is None
    assert (
        bound.at_lengths(replace(longer, k=torch.empty(wide.numel() + 1, dtype=wide.dtype)[1:].view(wide.shape)))
        is None
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bound_backward_launches_what_a_backward_does(stub: StubDriver, deterministic: bool):
    """Rows, keys, and queries where those own dq."""
    call = call_of(Full(causal=True), deterministic=deterministic)
    grad, out, lse = torch.empty_like(call.q), torch.empty_like(call.q), torch.empty(call.q.shape[:3])
    gradients = launch_backward.backward(call, grad, None, out, lse)
    bound = launch_backward.bind_backward(call, grad, None, out, lse, gradients)
    assert bound is not None
    expected = stub.launches.copy()
    stub.launches.clear()
    again = bound(Cotangents(grad, None, out, lse), OpTensors(call.q, call.k, call.v), call.allocator)
    assert again is not None and [x.stride() for x in gradients[:3]] == [x.stride() for x in again[:3]]
    assert [described(launch) for launch in expected] == [described(launch) for launch in stub.launches]


@pytest.mark.parametrize("pattern", [Full(), Full(causal=True), Dilated((256,), (2,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_tiles_have_a_launch_of_their_own(
    stub: StubDriver, monkeypatch: pytest.MonkeyPatch, pattern: Pattern, dtype: torch.dtype
):
    """The rest first, whose float32 state is the prior of the kernel for dense tiles, which writes out; bound, the same."""
    monkeypatch.setattr(forward_form, "is_dense", lambda call: True)
    call = call_of(pattern, nq=1024, nk=1024, out_dtype=dtype)
    out, lse = launch_forward.forward(call)
    *before, last = [(launch.kernel, named(launch)) for launch in stub.launches]
    assert last[0] == "dense_kernel" and last[1]["out_ptr"] is out and last[1]["lse_ptr"] is lse
    assert [name for name, _ in before] == (["forward_kernel"] if pattern.causal else [])
    for _, rest in before:
        assert rest["out_ptr"].dtype == torch.float32 and rest["out_ptr"] is last[1]["prior_out_ptr"]
        assert (rest["out_ptr"] is out) == (dtype == torch.float32)
    bound, expected = launch_forward.bind(call, out, lse), stub.launches.copy()
    stub.launches.clear()
    assert bound is not None and bound(call.q, call.k, call.v, None, call.allocator) is not None
    assert [described(launch) for launch in expected] == [described(launch) for launch in stub.launches]


def named(launch: Launch) -> dict[str, Any]:
    """Its arguments by name."""
    kernel = next(kernel for kernel in KERNELS if kernel.__name__ == launch.kernel)
    return dict(zip(kernel.arg_names, launch.arguments, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.5}, {"scale": -1.0}, {"softcap": 5.0}],
    ids=["dropout", "negative scale", "score term"],
)
def test_what_changes_scores_is_not_for_the_dense_kernel(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    monkeypatch.setattr(launch_dense.self_check, "dense_passed", lambda q, k: True)
    assert launch_dense.is_dense(call_of(Full())) and not launch_dense.is_dense(call_of(Full(), **options))
    assert not launch_dense.is_dense(replace(call_of(Full()), key_padding=torch.zeros(1, 96, dtype=torch.bool)))


def test_descriptors_name_only_aligned_rows(monkeypatch: pytest.MonkeyPatch):
    """16 bytes: of the start, of each stride, and of a row."""
    monkeypatch.setattr(launch_dense.self_check, "dense_passed", lambda q, k: True)
    call = call_of(Full())
    wide = torch.empty(1, 96, 2, 72, dtype=torch.bfloat16)
    assert launch_dense.is_dense(replace(call, k=wide[..., :64]))
    for k in (
        torch.empty(1, 96, 2, 68, dtype=torch.bfloat16)[..., :64],
        wide[..., 4:68],
        call.k.transpose(1, 3).contiguous().transpose(1, 3),
        call.k[:, :1].expand(call.k.shape),
    ):
        assert not launch_dense.is_dense(replace(call, k=k))


def test_memory_for_descriptors_is_torchs_own(stub: StubDriver):
    """Of a launch alone: what a caller told triton stays."""
    from triton.runtime import _allocation

    seen: list[Any] = []
    before = _allocation._allocator.get()
    launching.with_scratch(torch.device("cpu"), lambda: seen.append(_allocation._allocator.get()(384, 128, 0)))
    assert seen[0].numel() == 384 and _allocation._allocator.get() is before


def described(launch: Launch) -> tuple[Any, ...]:
    """A launch without which tensors it reads and writes."""
    shown = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in launch.arguments]
    return launch.kernel, launch.device, launch.grid, shown


def test_a_bound_call_serves_only_what_it_was_made_for(stub: StubDriver):
    """None, so that the call takes the long way: for tensors that begin elsewhere, and once the plan is gone."""
    call = call_of(Full())
    bound = launch_forward.bind(call, *launch_forward.forward(call))
    assert bound is not None
    moved = torch.empty(call.q.numel() + 1, dtype=call.q.dtype)[1:].view(call.q.shape)
    assert bound(moved, call.k, call.v, None, call.allocator) is None
    q, k, v, allocator = call.q, call.k, call.v, call.allocator
    del call
    gc.collect()
    stub.launches.clear()
    assert bound(q, k, v, None, allocator) is None and not stub.launches


def test_one_tensor_may_be_two_arguments_when_a_call_is_bound(stub: StubDriver):
    """Self-attention without projections: the next call of that signature may have three tensors."""
    call = call_of(Full())
    call = replace(call, k=call.q, v=call.q)
    bound = launch_forward.bind(call, *launch_forward.forward(call))
    back = launch_backward.bind_backward(call, call.q, None, call.q, torch.empty(call.q.shape[:3]), ())
    assert bound is not None and back is not None
    q, k, v, grad, out = (torch.empty_like(call.q) for _ in range(5))
    stub.launches.clear()
    bound(q, k, v, None, call.allocator)
    back(Cotangents(grad, None, out, torch.empty(out.shape[:3])), OpTensors(q, k, v), call.allocator)
    names = [forward_kernel.arg_names, rows_kernel.arg_names, keys_kernel.arg_names]
    forward, rows, keys = (
        dict(zip(some, launch.arguments, strict=True)) for some, launch in zip(names, stub.launches, strict=True)
    )
    for launched in (forward, keys):
        assert (launched["q_ptr"], launched["k_ptr"], launched["v_ptr"]) == (Same(q), Same(k), Same(v))
    assert (rows["grad_out_ptr"], rows["out_ptr"], keys["grad_ptr"]) == (Same(grad), Same(out), Same(grad))


@dataclass(frozen=True, eq=False)
class Same:
    """Equal to its tensor alone."""

    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return other is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def test_an_empty_grid_is_not_bound(stub: StubDriver):
    """No key, no job: nothing is launched, and rows are what nothing seen leaves."""
    call = call_of(Full(), nq=4, nk=4)
    call = replace(call, k=call.k[:, :0], v=call.v[:, :0], plan=Full().plan(Rectangle(2, Span(0, 4), Span(0, 0))))
    bound = launch_forward.bind(call, *launch_forward.forward(call))
    stub.launches.clear()
    computed = None if bound is None else bound(call.q, call.k, call.v, None, call.allocator)
    assert (
        computed is not None and not stub.launches and not computed[0].any() and bool((computed[1] == -torch.inf).all())
    )


def test_masks_and_priors_are_not_bound(stub: StubDriver):
    """Their calls are made anew each time."""
    call = replace(call_of(Full()), key_padding=torch.zeros(1, 96, dtype=torch.bool))
    assert launch_forward.bind(call, call.q, call.q) is None


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables are on a device, and a CUDA graph captures."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def test_tables_that_a_graph_captured_stay(monkeypatch: pytest.MonkeyPatch):
    """They outlive their plan; others die with it. Inside a capture none are made."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(passes, "_to_device", lambda host, device: (host, None))
    monkeypatch.setattr(passes, "_CAPTURED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept, lost = (Full().plan(Rectangle(2, Span(0, n), Span(0, n))) for n in (64, 65))
    build = {id(plan): partial(passes.query_tables, plan, 0, (64, 64)) for plan in (kept, lost)}
    tables = [weakref.ref(passes.tables_on(plan, ("x",), device, build[id(plan)])) for plan in (kept, lost)]
    with capturing(monkeypatch):
        assert passes.tables_on(kept, ("x",), device, build[id(kept)]) is tables[0]()
        with pytest.raises(RuntimeError, match="make the call once before the capture"):
            passes.tables_on(lost, ("y",), device, build[id(lost)])
    del kept, lost, build
    gc.collect()
    assert tables[0]() is not None and tables[1]() is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "after torch.compile with graphs"])
def test_tables_go_over_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch, compiled: bool):
    """On the current stream, with an event after the copy; where graphs of torch.compile may own memory of this thread, from another one."""
    seen: list[tuple[object, ...]] = []
    host = torch.arange(4, dtype=torch.int32)

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        seen.append(("copy", device, non_blocking, threading.get_ident() == here))
        return self

    here, stream = threading.get_ident(), object()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append(("pinned",)) or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda on: seen.append(("on", on is stream)) or nullcontext())
    monkeypatch.setattr(
        torch.cuda, "Event", lambda: SimpleNamespace(record=lambda on: seen.append(("event", on is stream)))
    )
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", SimpleNamespace())
    if not compiled:
        monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees")
    device = torch.device("cuda", 1)
    assert passes._to_device(host, device)[0] is host
    assert seen == [("on", True), ("pinned",), ("copy", device, True, not compiled), ("event", True)]


@pytest.mark.parametrize("index", [0, 1])
def test_a_bound_launch_goes_to_the_device_of_its_tensors(
    stub: StubDriver, monkeypatch: pytest.MonkeyPatch, index: int
):
    """Whichever device is current, as an unbound one does."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stub.current, seen = 1 - index, list[tuple[int, bool]]()

    def launch(tensors: object, seed: int, stream: int, capturing: bool) -> None:
        seen.append((stub.current, capturing))

    bound.launch_bound(cast(Any, [launch]), (), 0, torch.device("cuda", index))
    assert seen == [(index, False)] and stub.current == 1 - index


def test_another_stream_waits_for_the_copy_of_tables(stub: StubDriver, monkeypatch: pytest.MonkeyPatch):
    """Once, whether a launch is bound or not; and their memory outlives the launches there. A capture waits for nothing: it would fail."""
    seen: list[tuple[str, int]] = []

    class Stream:
        def __init__(self, number: int) -> None:
            self.cuda_stream = number

        def wait_event(self, event: object) -> None:
            assert event == "copied"
            seen.append(("waits", self.cuda_stream))

    at = [0]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(at[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: seen.append(("keeps", stream.cuda_stream)))
    monkeypatch.setattr(passes, "_to_device", lambda host, device: (host, "copied"))
    device, plan = torch.device("cuda", 0), Full().plan(Rectangle(2, Span(0, 64), Span(0, 64)))
    for at[0] in (0, 0, 7, 7, 0):
        tables = passes.tables_on(plan, ("x",), device, partial(passes.query_tables, plan, 0, (64, 64)))
    assert seen == [("waits", 0), ("keeps", 0), ("waits", 7), ("keeps", 7)]
    at[0] = 9
    with capturing(monkeypatch):
        assert passes.tables_on(plan, ("x",), device, pytest.fail) is tables
    assert len(seen) == 4
    call = call_of(Full(), nq=64, nk=64)
    arguments = dict.fromkeys(forward_kernel.arg_names, 0) | {"num_warps": 4, "num_stages": 1}
    launch = bound.BoundLaunch(
        bound.Launch(
            SimpleNamespace(
                __name__="k",
                arg_names=list(arguments)[:1],
                warmup=lambda **_: SimpleNamespace(
                    metadata=None, run=lambda *_: None, function=0, packed_metadata=(), launch_metadata=lambda *_: None
                ),
            ),
            (1,),
            arguments,
            tables,
        ),
        (),
        call.q.device,
    )
    for _ in range(2):
        launch((), 0, 9, False)
    launch((), 0, 11, True)
    assert seen[4:] == [("waits", 9), ("keeps", 9)]


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
