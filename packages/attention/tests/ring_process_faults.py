"""Cases for every rank: one rank differs, or calls in another order. Every rank raises GroupError, refuses more, and is right after a reset."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Thread
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ring_process_setup import RANK, WORLD, randn
from torch import Tensor

from longattn.attention import (
    AllGather,
    GroupError,
    PatternAttention,
    Ring,
    RingDilatedAttentionV2,
    RingDilatedAttentionV3,
    RingMultiheadDilatedAttentionV2,
    Ulysses,
    pattern_attention,
    shard_sequence,
)
from longattn.attention.schedules import waiting
from longattn.attention.schedules.callers import calls_over
from longattn.attention.schedules.place import Place
from longattn.patterncache import BlockSparse, Dilated, Documents, Full, Pattern, Window

N, HEADS, KV_HEADS, DIM = 12 * WORLD, 2 * WORLD, WORLD, 10  # DIM is no number of heads in any world
PATTERN = Dilated((6, 12), (1, 2), causal=True)
DIFFERS = RANK == WORLD - 1
SECONDS = 40.0


def engines() -> list[Any]:
    """Each kind of schedule, with and without lengths. No rank waits SECONDS: every one of them comes."""
    group = dist.group.WORLD
    known = {"lengths": N, "timeout": SECONDS}
    return [
        Ring(group, **known),
        Ring(group, layout="zigzag", timeout=SECONDS),
        AllGather(group, **known),
        AllGather(group, timeout=SECONDS),
        Ulysses(group, **known),
        Ulysses(group, timeout=SECONDS),
    ]


class Case:
    """One rank's call: tensors, pattern, options and schedule, which a fault changes on the last rank."""

    def __init__(self, schedule: Any) -> None:
        shapes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM)
        self.whole = [randn(1, N, *shape, seed=n, dtype=torch.float32) for n, shape in enumerate(shapes)]
        self.schedule, self.pattern = schedule, PATTERN
        self.options: dict[str, Any] = {}
        self.context: AbstractContextManager[Any] = nullcontext()
        self.tensors = [shard_sequence(x, schedule)[0] for x in self.whole]

    def call(self) -> Tensor:
        """Of this rank."""
        with self.context:
            return pattern_attention(*self.tensors, self.pattern, schedule=self.schedule, **self.options)

    def check(self) -> None:
        """A right call, forward and backward, gives what one process gives."""
        leaves = [x.clone().requires_grad_() for x in self.whole]
        expected = pattern_attention(*leaves, PATTERN)
        grads = torch.autograd.grad(expected.sin().sum(), leaves)
        own = [shard_sequence(x, self.schedule)[0].requires_grad_() for x in self.whole]
        found = pattern_attention(*own, PATTERN, schedule=self.schedule)
        torch.testing.assert_close(found, shard_sequence(expected.detach(), self.schedule)[0])
        for a, b in zip(torch.autograd.grad(found.sin().sum(), own), grads, strict=True):
            torch.testing.assert_close(a, shard_sequence(b, self.schedule)[0])


def cast(dtype: torch.dtype) -> Callable[[Case], None]:
    """q, k and v in another dtype."""

    def change(case: Case) -> None:
        case.tensors = [x.to(dtype) for x in case.tensors]

    return change


def reshaped(*shape: int, batch: int = 1) -> Callable[[Case], None]:
    """Other heads and head_dim, or another batch."""

    def change(case: Case) -> None:
        case.tensors = [torch.randn(batch, x.shape[1], *shape) for x in case.tensors]

    return change


def kv_heads(case: Case) -> None:
    """As many as query heads."""
    case.tensors = [torch.randn(1, x.shape[1], HEADS, DIM) for x in case.tensors]


def value_dim(case: Case) -> None:
    """Of v alone."""
    case.tensors[2] = torch.randn(*case.tensors[2].shape[:3], 2 * DIM)


def pattern(other: Pattern) -> Callable[[Case], None]:
    """Another one."""

    def change(case: Case) -> None:
        case.pattern = other

    return change


def option(**options: Any) -> Callable[[Case], None]:
    """Given on this rank."""

    def change(case: Case) -> None:
        case.options = options

    return change


def layout(case: Case) -> None:
    """The other one of two that cut into equal shards."""
    kind, members = type(case.schedule), case.schedule.members
    known = {"lengths": members.lengths} if isinstance(members.lengths, int) else {}
    other = "striped" if members.layout != "striped" else "contiguous"
    case.schedule = kind(dist.group.WORLD, layout=other, timeout=SECONDS, **known)


def engine(case: Case) -> None:
    """Another engine over the same rows."""
    members = case.schedule.members
    known = {"lengths": members.lengths} if isinstance(members.lengths, int) else {}
    kind: Any = Ring if isinstance(case.schedule, AllGather) else AllGather
    case.schedule = kind(dist.group.WORLD, layout=members.layout, timeout=SECONDS, **known)


def autocast(case: Case) -> None:
    """Calls are in bfloat16."""
    case.context = torch.autocast("cpu", torch.bfloat16)


def version(case: Case) -> None:
    """Of the package."""
    case.context = mock.patch.object(calls_over(Place.of(dist.group.WORLD)), "version", "0")


def graded(case: Case) -> None:
    """Gradients are wanted."""
    case.tensors = [x.requires_grad_() for x in case.tensors]


FAULTS: dict[str, tuple[Callable[[Case], None], str]] = {
    # What differs on the last rank: how, and which field the error names.
    "float64": (cast(torch.float64), "dtype"),
    "float16": (cast(torch.float16), "dtype"),
    "bfloat16": (cast(torch.bfloat16), "dtype"),
    "autocast": (autocast, "dtype"),
    "version": (version, "version"),
    "heads and head_dim swapped": (reshaped(DIM, HEADS), "heads"),
    "fewer heads": (reshaped(WORLD, DIM), "heads"),
    "head_dim": (reshaped(KV_HEADS, 2 * DIM), "heads"),
    "kv heads": (kv_heads, "kv_heads"),
    "value head_dim": (value_dim, "value_head_dim"),
    "batch": (reshaped(HEADS, DIM, batch=2), "batch"),
    "causal": (pattern(Dilated((6, 12), (1, 2))), "pattern"),
    "head blocks": (pattern(Dilated((6, 12), (1, 2), "blocks", causal=True)), "pattern"),
    "segment": (pattern(Dilated((6, 24), (1, 2), causal=True)), "pattern"),
    "window": (pattern(Window(5, causal=True)), "pattern"),
    "full": (pattern(Full()), "pattern"),
    "documents": (pattern(Documents((0, 5, N), Full(causal=True))), "pattern"),
    "block sparse": (pattern(BlockSparse(4, [[True] * (N // 4)] * (N // 4))), "pattern"),
    "scale": (option(softmax_scale=0.5), "scale"),
    "dropout": (option(dropout_p=0.5), "dropout_p"),
    "sinks": (option(sink_logits=torch.zeros(HEADS)), "sinks"),
    "query start": (option(q_start=3), "q_start"),
    "layout": (layout, "schedule"),
    "engine": (engine, "schedule"),
    "gradients": (graded, "gradients"),
}  # fmt: skip


def expect_failure(case: Case, field: str | None) -> None:
    """GroupError on this rank, which then refuses calls until every rank has called reset."""
    with pytest.raises(GroupError) as caught:
        case.call()
    assert field is None or caught.value.field in (field, "phase"), caught.value
    assert caught.value.field is None or len(caught.value.values) == 2
    with pytest.raises(GroupError, match="refuse calls"):
        case.call()
    case.schedule.reset()


def raised(call: Callable[[], Any]) -> GroupError:
    """What the call raises."""
    with pytest.raises(GroupError) as caught:
        call()
    return caught.value


def check_fault(schedule: Any, name: str) -> None:
    """All that is promised of one fault."""
    change, field = FAULTS[name]
    case = Case(schedule)
    if DIFFERS:
        change(case)
    expect_failure(case, field)
    Case(schedule).check()


def case_one_rank_differs() -> None:
    """Whatever differs: every rank raises, names the field, and is right after a reset."""
    if WORLD > 1:
        for number, name in enumerate(FAULTS):
            for schedule in engines()[number % 2 :: 2]:
                check_fault(schedule, name)


def case_lengths_that_are_wrong_of_another_rank() -> None:
    """`lengths=` of one rank says that rank 0 holds more rows than it does: no message is taken for a longer one."""
    even = [N // WORLD] * WORLD
    for kind in (Ring, AllGather, Ulysses) if WORLD > 1 else ():
        right, wrong = (
            kind(dist.group.WORLD, lengths=lengths, timeout=SECONDS) for lengths in (even, [even[0] + 2, *even[1:]])
        )
        case = Case(right)
        case.schedule = wrong if DIFFERS else right
        expect_failure(case, None)
        Case(right).check()


def case_masks_on_one_rank() -> None:
    """Refused on every rank by name: the group stays as it is, or is reset."""
    for schedule in engines() if WORLD > 1 else ():
        for options in ({"attention_mask": torch.ones(1, 1, 1, N).bool()}, {"key_padding_mask": None}):
            case = Case(schedule)
            if "key_padding_mask" in options:
                options = {"key_padding_mask": torch.zeros(1, case.tensors[1].shape[1]).bool()}
            case.options = options if DIFFERS else {}
            with pytest.raises((GroupError, ValueError)):
                case.call()
            schedule.reset()
            Case(schedule).check()


def modules(schedule: Any, many: int = 3) -> list[PatternAttention]:
    """Alike but for their place."""
    return [PatternAttention(PATTERN, schedule=schedule) for _ in range(many)]


def case_calls_left_out_or_in_another_order() -> None:
    """The next call of another module says so; so does a retry of all of them on one rank."""
    orders = {"left out": [0, 2], "exchanged": [1, 0, 2], "retried": [0, 1, 0, 1, 2], "twice": [0, 0, 1, 2]}
    for schedule in engines() if WORLD > 1 else ():
        for name, order in orders.items():
            layers, case = modules(schedule), Case(schedule)
            for layer in layers:
                layer(*case.tensors)
            numbers = order if DIFFERS else range(3)
            error = raised(lambda: [*(layers[n](*case.tensors) for n in numbers), case.call()])  # noqa: B023 - called at once
            assert error.field == "caller", (name, error)
            schedule.reset()
            case.check()


def case_backwards_in_another_order() -> None:
    """A backward belongs to its forward."""
    for schedule in engines() if WORLD > 1 else ():
        case = Case(schedule)
        own = [x.requires_grad_() for x in case.tensors]
        outs = [pattern_attention(*own, PATTERN, schedule=schedule) for _ in range(2)]
        order = outs[::-1] if DIFFERS else outs
        error = raised(lambda: [torch.autograd.grad(out.sum(), own) for out in order])  # noqa: B023 - called at once
        assert error.field == "call", error
        schedule.reset()
        case.check()


def case_a_backward_left_out() -> None:
    """The rank's next forward meets the others' backward."""
    for schedule in engines() if WORLD > 1 else ():
        case = Case(schedule)
        own = [x.requires_grad_() for x in case.tensors]
        out = pattern_attention(*own, PATTERN, schedule=schedule)
        if DIFFERS:
            error = raised(case.call)
        else:
            error = raised(lambda: torch.autograd.grad(out.sum(), own))  # noqa: B023 - called at once
        assert error.field == "phase", error
        schedule.reset()
        case.check()


def case_a_rank_that_does_not_come() -> None:
    """The others name it when the timeout is over; it comes too late, and every rank goes on after a reset."""
    schedule = Ring(dist.group.WORLD, lengths=N, timeout=0.3)
    if WORLD > 1:
        error: GroupError | None = None
        with (
            # As if no wait had been long yet: the first one says for whom.
            mock.patch.object(calls_over(Place.of(dist.group.WORLD)), "_patience", waiting.Patience()),
            mock.patch.object(waiting, "PATIENCE", 0.1),
            mock.patch.object(waiting.logger, "info") as told,
        ):
            if not DIFFERS:
                error = raised(Case(schedule).call)
        # Whatever is wrong with what a rank saw, it is where the others are.
        dist.barrier()
        schedule.reset(SECONDS)
        Case(Ring(dist.group.WORLD, lengths=N)).check()
        if error is not None:
            assert f"rank {WORLD - 1} was silent for 0.3 s" in str(error), error
            assert (error.rank, error.step) == (WORLD - 1, "header"), error
            begun, ended = (call.args[1] for call in told.call_args_list)
            assert (
                begun.startswith(f"rank {RANK} of group ") and " waits for rank " in begun and ended.startswith(begun)
            ), (begun, ended)


def case_two_threads_on_one_group() -> None:
    """The second one is refused while the first is in a call."""
    schedule, calls = Ring(dist.group.WORLD, lengths=N), calls_over(Place.of(dist.group.WORLD))
    entered, leave = Event(), Event()

    def hold() -> None:
        with calls.underway():
            entered.set()
            leave.wait()

    thread = Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(SECONDS)
        error = raised(Case(schedule).call)
    finally:
        leave.set()
        thread.join()
    assert "another thread" in str(error), error
    Case(schedule).check()


def case_an_argument_of_one_rank_that_is_refused() -> None:
    """Nothing was said to other ranks: after the mistake is mended the call is made as if nothing had been."""
    schedule = Ring(dist.group.WORLD, lengths=N)
    case = Case(schedule)
    if DIFFERS:
        with pytest.raises(ValueError, match="dropout_p must be"):
            pattern_attention(*case.tensors, PATTERN, schedule=schedule, dropout_p=1.5)
    case.check()


def case_masks_of_one_dimension() -> None:
    """Work under every engine as in one process, gradients included; also where each rank has one query."""
    for length in (N, WORLD):
        whole = [
            randn(1, length, *shape, seed=n) for n, shape in enumerate(((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM)))
        ]
        for mask in (randn(length, seed=5), randn(length, seed=5) > -1):
            expected = pattern_attention(*whole, Full(), attention_mask=mask)
            for schedule in (Ring(dist.group.WORLD), AllGather(dist.group.WORLD), Ulysses(dist.group.WORLD)):
                own = mask.clone().requires_grad_(mask.is_floating_point())
                found = pattern_attention(
                    *(shard_sequence(x, schedule)[0] for x in whole), Full(), attention_mask=own, schedule=schedule
                )
                torch.testing.assert_close(found, shard_sequence(expected, schedule)[0])
                if own.requires_grad:
                    (gradient,) = torch.autograd.grad(found.sin().sum(), own)
                    dist.all_reduce(gradient)
                    leaf = mask.clone().requires_grad_()
                    alone = pattern_attention(*whole, Full(), attention_mask=leaf)
                    torch.testing.assert_close(gradient, torch.autograd.grad(alone.sin().sum(), leaf)[0])


def case_documents_of_this_rank_alone() -> None:
    """The error says what to give: ends of the whole sequence, on every rank."""
    for schedule in engines():
        case = Case(schedule)
        rows = case.tensors[0].shape[1]
        if WORLD > 1:
            with pytest.raises(
                ValueError, match="the same on every rank of the schedule's group, though this rank holds"
            ):
                pattern_attention(*case.tensors, Full(), schedule=schedule, cu_seqlens=[0, rows])
        case.check()


def case_presets_over_a_group() -> None:
    """`group=` and `schedule=` give what one process gives; a ring in process says once that it is one."""
    shape = {"segment_lengths": (6, 12), "dilation_rates": (1, 2), "causal": True}
    case = Case(Ring(dist.group.WORLD))
    expected = RingDilatedAttentionV3(**shape)(*case.whole)
    for given in (
        {"group": dist.group.WORLD},
        {"schedule": AllGather(dist.group.WORLD)},
        {"group": dist.group.WORLD, "ring_size": WORLD},
    ):
        module = RingDilatedAttentionV3(**shape, **given)
        found = module(*case.tensors)
        torch.testing.assert_close(found, shard_sequence(expected, case.schedule)[0])
    with pytest.raises(ValueError, match="schedule must be None where group"):
        RingDilatedAttentionV2(**shape, group=dist.group.WORLD, schedule=Ring(dist.group.WORLD))
    with pytest.raises(ValueError, match="size must be None or the group's"):
        RingDilatedAttentionV2(**shape, group=dist.group.WORLD, ring_size=WORLD + 2)
    if WORLD > 1:
        with pytest.warns(UserWarning, match="plays its ring in this process"):
            RingMultiheadDilatedAttentionV2(8, 2, **shape, ring_size=3)
    RingMultiheadDilatedAttentionV2(8, 2, **shape, ring_size=3)
