"""The dispatch table: which row computes, and why not the others.

The order of `TABLE` is the preference where no figures of speed decide (see `choosing`). A row's module is imported when the table is first read for it; rows with heavy imports keep
their capability in a light module. Legality is declared (`Capability`), never found out by trying. A row that needs something of the machine,
such as a compiler, also has a `refusal`, which says without trying why that is not there, and a `prepare`, which tries once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import Capability
from longattn.kernels.hierarchy import MemoryTraffic
from longattn.kernels.problem import AttentionProblem
from longattn.patterncache import Plan
from longattn.patterncache.spans import shortened

TABLE: dict[str, str] = {
    "views_fa3": "longattn.kernels.eager.flash_packages:FA3",
    "views_fa4": "longattn.kernels.eager.flash_packages:FA4",
    "triton": "longattn.kernels.triton.row",
    "sdpa_views": "longattn.kernels.eager.sdpa_cuda:FLASH",
    "sdpa_views_cudnn": "longattn.kernels.eager.sdpa_cuda:CUDNN",
    "native": "longattn.kernels.native.row",
    "sdpa": "longattn.kernels.eager.sdpa",
    "gather": "longattn.kernels.eager.gather",
    "tiled": "longattn.kernels.eager.tiled:Q_MAJOR",
    "tiled_k_major": "longattn.kernels.eager.tiled:K_MAJOR",
}

logger = logging.getLogger("longattn.kernels")

Forward = Callable[[Call], tuple[Tensor, Tensor]]
Backward = Callable[
    [Call, Tensor, "Tensor | None", Tensor, Tensor, bool], "tuple[Tensor, Tensor, Tensor, Tensor | None]"
]

Shard = tuple[tuple[int, int, int], list[Call]]
"""Some query rows, (first, length, step), and the rectangles that they attend to."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One backend: its name, what it declares, and its two functions.

    Attributes:
        refusal: why this machine cannot run the row, as far as that is known without trying, or None.
        prepare: makes what the row needs of the machine, before its first call; the reason why that failed, or None.
        remark: what of this machine holds the row back without keeping it from serving, or None.
        bind: of a call that was served and what it gave, its forward with everything but pointers and seed in place, (q, k, v, seed, allocator) ->
            (out, lse), or None once it must be bound anew; None where the row has no such form. bind_backward: the same of its backward, from the
            arguments of `backward` and the gradients that it gave.
        rebind: of what `bind` gave and a call that differs from that one only in the lengths of k and v, what `bind` would give for it, or None; it
            costs no more than a forward. None where the row has no such form.
        bind_ahead: of what `bind` gave for one query a head, and (first length, how many) -> plans of so many lengths of k and v, what gives the same
            form for each of those lengths, (q, k, v) -> bound or None, cheaper than `rebind` because lengths are made ready together; or None.
        revision: (level, revision) of what serves, where figures of speed depend on more than this package's version.
        standing: of a problem, whether what the row would run for it has been checked on its device: "checked", "unchecked: why", "failed: what
            was wrong", or "" where rows do not check; the second argument says whether to check now what was not. A failed one refuses.
        second_backward: the derivative of `backward`, (call, gradients of dq, dk, dv and dbias or None each, (grad_out, grad_lse, out, lse)) ->
            gradients of grad_out, grad_lse, out, lse, q, k, v and bias; None where the row has none.
        bind_shards: of q, k, v, shards of query rows with their rectangles, which are views of the three, and out's dtype: all of them in one call,
            states of each shard merged, (q, k, v, allocator) -> (out, lse); None where it cannot.
        unsuited: of a plan that the row can serve, why others would serve it better, or None; then it stands behind them.
        form: of a plan and a problem that the row can serve: which of its ways a forward takes; None where there is one way.
    """

    name: str
    capability: Capability
    forward: Forward
    backward: Backward
    refusal: Callable[[], str | None] | None = None
    prepare: Callable[[], str | None] | None = None
    bind: Callable[[Call, Tensor, Tensor], Any] | None = None
    bind_backward: Callable[..., Any] | None = None
    rebind: Callable[[Any, Call], Any] | None = None
    bind_ahead: Callable[[Any, Callable[[int, int], list[Plan]]], Any] | None = None
    revision: Callable[[], tuple[str, str]] | None = None
    standing: Callable[[AttentionProblem, bool], str] | None = None
    second_backward: Callable[..., Any] | None = None
    bind_shards: Callable[[Tensor, Tensor, Tensor, Sequence[Shard], torch.dtype], Any] | None = None
    form: Callable[[Plan, AttentionProblem], str] | None = None
    remark: Callable[[], str | None] | None = None
    unsuited: Callable[[Plan], str | None] | None = None


@lru_cache
def row(name: str) -> TableRow:
    """The row of that name."""
    module, _, member = TABLE[name].partition(":")
    home = getattr(import_module(module), member) if member else import_module(module)
    needs = (
        "refusal",
        "prepare",
        "bind",
        "bind_backward",
        "rebind",
        "bind_ahead",
        "revision",
        "standing",
        "second_backward",
        "bind_shards",
        "form",
        "remark",
        "unsuited",
    )
    machine = [getattr(home, need, None) for need in needs]
    return TableRow(name, home.CAPABILITY, home.forward, home.backward, *machine)


def backends(device: str | None = None) -> tuple[str, ...]:
    """Names of the rows, in order of preference. Any of them may be given as `backend=`.

    device: only rows that declare this device type, such as "cpu". Default: all.
    """
    return tuple(name for name in TABLE if device is None or device in (row(name).capability.devices or (device,)))


class RowFailure(RuntimeError):
    """A row that was legal could not be made to run: its compiler failed. The row's `refusal` says so from then on."""


def twice_differentiable() -> tuple[str, ...]:
    """Names of the rows that have second derivatives."""
    return tuple(name for name in TABLE if row(name).second_backward is not None)


def check_backend_name(backend: object) -> str | None:
    """Return `backend`, or raise TypeError / ValueError unless it is None or names a row."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(
            f"backend must be None or one of {backends()}, got {shortened(backend)} ({type(backend).__name__})"
        )
    if backend is not None and backend not in TABLE:
        raise ValueError(f"backend must be None or one of {backends()}, got {shortened(backend)}")
    return backend


@dataclass(frozen=True)
class Explanation:
    """Which row serves a problem, and why not the others.

    Attributes:
        problem: the call without its data.
        rows: (name, reasons) in order of preference; no reasons means that the row could serve.
        backend: the row that serves, or None.
        expected: (name, seconds of CPU time, where the figure is from) of each row that could serve; seconds are None, and the text says why, where
            there is no figure. Empty where figures do not decide.
        order: what decides between rows that could serve.
        traffic: what the call moves and multiplies, with `verbose`.
        errors: (name, largest absolute error) of sampled rows beside float64, with `verify`.
        standings: (name, "checked" or "unchecked: why") of rows that check themselves on a device.
        forms: (name, form) of rows that could serve in more than one way: which of them this call takes.
    """

    problem: AttentionProblem
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    backend: str | None
    expected: tuple[tuple[str, float | None, str], ...] = ()
    order: str = "fixed"
    traffic: MemoryTraffic | None = None
    errors: tuple[tuple[str, float], ...] | None = None
    standings: tuple[tuple[str, str], ...] = ()
    forms: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [str(self.problem), f"  order: {self.order}"]
        times = {name: (seconds, source) for name, seconds, source in self.expected}
        forms = dict(self.forms)
        for name, reasons in self.rows:
            verdict = "; ".join(reasons) or ("chosen" if name == self.backend else "could serve")
            if name in forms:
                verdict += f", {forms[name]}"
            if not reasons and name in dict(self.standings):
                verdict += f"; {dict(self.standings)[name]}"
            if name in times:
                seconds, source = times[name]
                verdict += (
                    f"; {source}" if seconds is None else f"; {seconds * 1e3:.3g} ms of CPU time expected, {source}"
                )
            remark = row(name).remark if name in TABLE else None  # decode steps have rows beside the table's
            if not reasons and remark is not None and (text := remark()) is not None:
                verdict += f" ({text})"
            lines.append(f"  {name}: {verdict}")
        if self.traffic is not None:
            lines.append(f"  on {self.traffic}")
        if self.errors is not None:
            errors = ", ".join(f"{name} {error:.2g}" for name, error in self.errors)
            lines.append(f"  sampled rows beside float64, largest error: {errors}")
        return "\n".join(lines)


Refusals = tuple[tuple[str, str], ...]


def standings(problem: AttentionProblem) -> tuple[tuple[str, str], ...]:
    """(row, how it stands with this problem) of the rows that check themselves on a device; nothing is checked now."""
    checks = ((name, row(name).standing) for name in TABLE)
    return tuple((name, text) for name, check in checks if check is not None and (text := check(problem, False)))


def refusals(problem: AttentionProblem) -> Refusals:
    """(row, reason) of the rows that this machine, as far as is known now, cannot run, or that were wrong on the problem's device."""
    checks = ((name, row(name).refusal) for name in TABLE)
    unable = [(name, reason) for name, check in checks if check is not None and (reason := check()) is not None]
    return (*unable, *((name, text) for name, text in standings(problem) if text.startswith("failed")))


@lru_cache(maxsize=4096)
def explain_problem(problem: AttentionProblem, backend: str | None = None, refused: Refusals = ()) -> Explanation:
    """The table read for one problem; with `backend`, only that row may be chosen, and none that is `refused`."""
    machine = dict(refused)
    rows = tuple(
        (name, (*([machine[name]] if name in machine else []), *row(name).capability.reasons(problem)))
        for name in TABLE
    )
    fitting = [name for name, reasons in rows if not reasons and backend in (None, name)]
    chosen = fitting[0] if fitting else None
    explanation = Explanation(problem, rows, chosen)
    logger.debug("%s", explanation)
    return explanation
