"""Row "native": the plan's jobs through the C++ library, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import Capability
from longattn.kernels.dispatch.table import Shard
from longattn.kernels.eager.tile_walk import finish
from longattn.kernels.far_rows import bounded, exact_backward, exact_forward
from longattn.kernels.native import building, cpu
from longattn.kernels.native.bound import BoundBackward, BoundForward, is_plain, readable_as_it_lies
from longattn.kernels.native.bound_shards import BoundShards, Step
from longattn.kernels.native.cpu import HALVES, TILED
from longattn.kernels.native.decode import MOST_WIDE
from longattn.kernels.native.lowering import Lowered, lower
from longattn.kernels.native.structures import SIZES, TYPES, CallArgument, PackedJobs, packed
from longattn.kernels.problem import AttentionProblem
from longattn.patterncache import Plan

CAPABILITY = Capability(
    devices=("cpu",),
    dtypes={"cpu": (torch.float16, torch.bfloat16, torch.float32)},
    tolerance={torch.float32: (2e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
    max_head_dim=MOST_WIDE,
    softcap=True,
    by_distance=True,
    by_distance_grad=True,
    dropout=True,
    skips_padding=True,
)

_TASKS_A_THREAD = 4
"""Tasks for each thread, where there are rows enough: so many that the last one keeps nobody waiting long."""

_LEAST_ROWS, _MOST_ROWS = 96, 768

_SHORT_ROWS = {True: 32, False: 64}
"""Query rows that share keys up to which streaming them is faster than packing them into tiles, with products of bfloat16 and without."""

_LINE = 64
"""Bytes of a cache line, where scratch begins whatever the allocator's alignment."""

_LEAST_OCCUPANCY = 5 / 7
"""Share of the threads that must have work for one backward pass to be faster than two.

One pass makes all three gradients of a kv head in five matrix products, on one thread; two passes, over ranges of keys and then of queries,
keep every thread busy but make the scores and their gradients twice, seven products.
"""


refusal = building.refusal


def revision() -> tuple[str, str]:
    """The level of vectors, and what tells this library from others."""
    binary = building.current()
    return binary.level, binary.stem


def remark() -> str | None:
    """Why the level is not the processor's widest, where nobody chose it; None where it is."""
    refused = cpu.refused()
    level = building.current().level
    return None if refused is None else f"level {level}, for {refused}"


def prepare() -> str | None:
    """Compile or load the library; why that failed, or None."""
    try:
        building.library()
    except building.NativeBuildError as problem:
        return str(problem)
    return None


@exact_forward
def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads) float32."""
    lowered = lower(call.plan)
    out, lse = _new_state(call, lowered)
    argument = _argument(call, out, lse)
    argument.merges = call.prior is not None
    if _is_short(call, lowered, bool(argument.half)):
        _run(call, "longattn_attend_short", argument, packed(lowered, 0))
        return finish(call, out), lse
    for phase in range(len(lowered.phases)):
        _run(call, "longattn_attend", argument, packed(lowered, phase))
    return finish(call, out), lse


def _is_short(call: Call, lowered: Lowered, half: bool) -> bool:
    """Whether reading keys and values is most of the work: they are then streamed in ranges, all heads of a kv head at once."""
    if any(x is not None for x in (call.prior, call.mask, call.bias)) or call.dropout_p:
        return False
    rows = call.q.shape[1] * (call.q.shape[2] // call.k.shape[2])
    return call.q.dtype == call.k.dtype == call.v.dtype and _few_rows_of_even_keys(lowered, rows, half)


def _few_rows_of_even_keys(lowered: Lowered, rows: int, half: bool) -> bool:
    return rows <= _SHORT_ROWS[half] and len(lowered.phases) == 1 and packed(lowered, 0).even


def form(plan: Plan, problem: AttentionProblem) -> str:
    """Which of the row's two forms a forward of this plan takes: "few queries" or "tiles"."""
    beside = problem.prior or problem.attention_mask or problem.bias or problem.dropout
    rows = plan.rectangle.shape[1] * (problem.heads // problem.kv_heads)
    # Long plans are not lowered for an answer that their length gives.
    if beside or rows > max(_SHORT_ROWS.values()):
        return "tiles"
    return "few queries" if _few_rows_of_even_keys(lower(plan), rows, bool(_products(problem.dtype))) else "tiles"


@exact_backward
def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v; summed in float32."""
    lowered = lower(call.plan)
    own_out = out if call.part is None else None
    if call.part is not None:
        grad_lse = call.part.minus_delta
    readable = None if own_out is None else _readable(own_out, call.q.dtype)
    argument = _argument(call, readable, _readable(lse, call.q.dtype))
    argument.point_to("grad_out", _readable(grad_out, call.q.dtype), tuple(grad_out.shape))
    if grad_lse is not None:
        argument.point_to("grad_lse", grad_lse.to(torch.float32), tuple(lse.shape))
    one_phase = len(lowered.phases) == 1
    dq_dtype, *key_dtypes = call.gradient_dtypes
    dq = None if call.part is None else call.part.dq
    argument.merges = dq is not None
    if dq is None:
        dq = _unwritten(call.q, dq_dtype if one_phase else torch.float32, lowered.complete)
    # Sums that are float32 anyway are made where they are wanted; others in scratch, and every row is written.
    dk, dv = (
        _unwritten(x, dtype, dtype != torch.float32 and bool(lowered.phases))
        for x, dtype in zip((call.k, call.v), key_dtypes, strict=True)
    )
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        argument.point_to(name, x, tuple(x.shape))
    argument.key_parts = parts = _key_parts(argument)
    sums = None
    if call.by_distance is not None and call.by_distance_grad is not None:
        # A part for everyone who owns keys: no two add to one number, and equal calls give equal bits.
        sums = torch.zeros((parts, argument.batch, *call.by_distance.shape), dtype=torch.float32)
        argument.add_by_distance(call.by_distance, sums, argument.heads)
    if lowered.phases:
        _run(call, "longattn_attend_backward", argument, packed(lowered, None, argument.heads // argument.kv_heads))
    argument.key_parts = 0
    for phase in range(len(lowered.phases) if parts > 1 else 0):
        _run(call, "longattn_attend_backward", argument, packed(lowered, phase))
    if sums is not None and call.by_distance_grad is not None:
        call.by_distance_grad.add_(sums.sum((0, 1)))
    return dq.to(dq_dtype), dk, dv, None


def _key_parts(argument: CallArgument) -> int:
    """1: whoever owns a kv head makes all three gradients of it; more: dk and dv in so many ranges of rows, dq apart."""
    owners = argument.batch * argument.kv_heads
    rounds = -(-owners // argument.threads)
    if owners == 0 or owners >= _LEAST_OCCUPANCY * rounds * argument.threads:
        return 1
    return min(-(-_TASKS_A_THREAD * argument.threads // owners), max(1, argument.keys))


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the library reads it beside q of `dtype`: float32 unless it is of that type."""
    return x if x.dtype == dtype else x.to(torch.float32)


def _in_known_type(x: Tensor) -> Tensor:
    return x if x.dtype in TYPES or x.dtype == torch.bool else bounded(x).to(torch.float32)


def _unwritten(like: Tensor, dtype: torch.dtype, complete: bool) -> Tensor:
    make = torch.empty if complete else torch.zeros
    return make(like.shape, dtype=dtype, device=like.device)


def _new_state(call: Call, lowered: Lowered) -> tuple[Tensor, Tensor]:
    """(out, lse) to write: the prior's copy; unwritten where every row will be, or empty. In out_dtype where nothing merges."""
    if call.prior is not None:
        out, lse = (x.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for x in call.prior)
        return out, lse
    direct = len(lowered.phases) == 1 and call.out_dtype in TYPES
    dtype = call.out_dtype if direct else torch.float32
    batch, length, heads, _ = call.q.shape
    shape = (batch, length, heads, call.v.shape[-1])
    out = call.allocator.empty(shape, dtype, call.q.device, "output" if dtype == call.out_dtype else "temp")
    lse = call.allocator.empty(shape[:-1], torch.float32, call.q.device, "temp")
    return (out, lse) if lowered.complete else (out.zero_(), lse.fill_(-torch.inf))


def _argument(call: Call, out: Tensor | None, lse: Tensor) -> CallArgument:
    """What forward and backward both say. out: None where -delta stands for it."""
    batch, nq, heads, dim = call.q.shape
    _, nk, kv_heads, value_dim = call.v.shape
    fits = (heads, nq, nk) == call.plan.rectangle.shape and kv_heads and heads % kv_heads == 0
    if not fits or not 0 < dim <= MOST_WIDE or not 0 < value_dim <= MOST_WIDE:
        raise ValueError(
            f"q, k and v must fit the plan's {call.plan.rectangle.shape}, got {call.q.shape}, {call.k.shape} and {call.v.shape}"
        )
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
    argument = CallArgument(batch=batch, queries=nq, keys=nk, **sizes)
    argument.point_to("q", call.q, (batch, nq, heads, dim))
    argument.point_to("k", call.k, (batch, nk, kv_heads, dim))
    argument.point_to("v", call.v, (batch, nk, kv_heads, value_dim))
    if out is not None:
        argument.point_to("out", out, (batch, nq, heads, value_dim))
    argument.point_to("lse", lse, (batch, nq, heads))
    if call.key_padding is not None:
        argument.hide(call.key_padding, (batch, nk))
    for name, x in (("mask", call.mask), ("bias", call.bias)):
        if x is not None:
            argument.look_up(name, _in_known_type(x), (batch, heads, nq, nk))
    if call.by_distance is not None:
        argument.add_by_distance(call.by_distance, None, heads)
    argument.softcap = call.softcap
    argument.scale, argument.drop, argument.seed = call.scale, call.dropout_p, call.seed & (2**64 - 1)
    argument.first_head = call.plan.rectangle.heads.start
    argument.half = _products(call.q.dtype)
    argument.threads = torch.get_num_threads()
    return argument


def _products(dtype: torch.dtype) -> int:
    """`Products` of call.h: 0 of float32, 1 of bfloat16, 2 of numbers split into two bfloat16, where the level has them."""
    level = building.current().level
    if dtype == torch.bfloat16:
        return int(level in HALVES)
    splits = dtype == torch.float16 or torch.get_float32_matmul_precision() != "highest"
    return 2 if level in TILED and splits else 0


def _run(call: Call, entry: str, argument: CallArgument, jobs: PackedJobs) -> None:
    """The library's `entry` on some jobs, with scratch of the call's allocator."""
    if not argument.batch:
        return
    floats = _give_jobs(entry, argument, jobs)
    scratch = call.allocator.empty((floats + _LINE // 4,), torch.float32, call.q.device, "temp")
    argument.scratch = -(-scratch.data_ptr() // _LINE) * _LINE
    getattr(building.library(), entry)(ctypes.byref(argument))
    call.allocator.release(scratch, "temp")


def _give_jobs(entry: str, argument: CallArgument, jobs: PackedJobs) -> int:
    """Write the jobs into the argument; how many floats of scratch `entry` wants for them."""
    library = building.library()
    sizes = tuple(library.longattn_sizes(ctypes.c_int64(i)) for i in range(3))
    if sizes != SIZES:
        raise RuntimeError(f"the native library's structures must have sizes {SIZES}, got {sizes}")
    argument.jobs, argument.job_count = jobs.address, jobs.count
    rows = jobs.rows * argument.batch // (argument.threads * _TASKS_A_THREAD)
    argument.rows = max(_LEAST_ROWS, min(_MOST_ROWS, rows))
    short = entry == "longattn_attend_short"
    scratch_of = library.longattn_short_scratch if short else library.longattn_scratch
    scratch_of.restype = ctypes.c_int64
    return scratch_of(ctypes.byref(argument)) * (1 if short else argument.threads)


def bind(call: Call, out: Tensor, lse: Tensor) -> BoundForward | None:
    """`forward` of such calls with everything in place but pointers and seed; None where a call has more than q, k and v.

    out, lse: what `forward` gave for this one.
    """
    lowered = lower(call.plan)
    if not is_plain(call) or len(lowered.phases) != 1 or call.out_dtype not in TYPES:
        return None
    argument = _argument(call, out, lse)
    entry = "longattn_attend_short" if _is_short(call, lowered, bool(argument.half)) else "longattn_attend"
    jobs = packed(lowered, 0)
    return BoundForward(call, argument, jobs, entry, _give_jobs(entry, argument, jobs), lowered.complete)


def bind_shards(q: Tensor, k: Tensor, v: Tensor, shards: Sequence[Shard], out_dtype: torch.dtype) -> BoundShards | None:
    """All rectangles of one q, k and v in one call, states of each shard merged; None where a rectangle has more than views of these.

    shards: of each, its rows of out, (first, length, step), and its rectangles, at least one.
    """
    if out_dtype not in TYPES:
        return None
    made = []
    for rows, calls in shards:
        if not calls or not all(is_plain(call) for call in calls):
            return None
        made.append((rows, [step for call in calls for step in _steps(call)]))
    return BoundShards(q, k, v, made, out_dtype) if all(steps for _, steps in made) else None


def _steps(call: Call) -> Iterator[Step]:
    """A rectangle's phases, which write its state in float32."""
    lowered = lower(call.plan)
    out = torch.empty((*call.q.shape[:3], call.v.shape[3]), dtype=torch.float32)
    for phase in range(len(lowered.phases)):
        argument, jobs = _argument(call, out, out[..., 0].contiguous()), packed(lowered, phase)
        few = _is_short(call, lowered, bool(argument.half))
        floats = _give_jobs("longattn_attend_short" if few else "longattn_attend", argument, jobs)
        yield Step(call, argument, jobs, few, lowered.complete or phase > 0, phase > 0, floats)


def bind_backward(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> BoundBackward | None:
    """`backward` of such calls likewise; None where it takes two passes, or a tensor is converted first.

    gradients: what `backward` gave for this one.
    """
    lowered = lower(call.plan)
    if call.part is not None:
        grad_lse = call.part.minus_delta
    given = [x for x in (grad_out, grad_lse, out, lse) if x is not None]
    readable = all(readable_as_it_lies(x, call.q.dtype) for x in given) and lse.dtype == torch.float32
    if not is_plain(call) or len(lowered.phases) != 1 or not readable:
        return None
    argument = _argument(call, out if call.part is None else None, lse)
    argument.merges = call.part is not None and call.part.dq is not None
    argument.point_to("grad_out", grad_out, tuple(out.shape))
    if grad_lse is not None:
        argument.point_to("grad_lse", grad_lse, tuple(lse.shape))
    argument.key_parts = _key_parts(argument)
    if argument.key_parts != 1:
        return None
    complete = (lowered.complete, gradients[1].dtype != torch.float32)
    for name, x in zip(("dq", "dk", "dv"), gradients[:3], strict=True):
        argument.point_to(name, x, tuple(x.shape))
    jobs = packed(lowered, None, argument.heads // argument.kv_heads)
    return BoundBackward(call, argument, jobs, _give_jobs("longattn_attend_backward", argument, jobs), complete)
