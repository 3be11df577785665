"""A kernel form that has not run on a device yet runs a small problem of its own there first, and is compared with the float64 oracle.

A *form* is what a compiled kernel differs by: direction, dtype, widths, masks, dropout, score terms, listed rows, grouped heads. One that is wrong on this
device refuses with the measured error as its reason, and the next row of the table serves: a kernel that nobody ran there before, or that a
new compiler breaks, gives no wrong numbers. The outcome is kept on disk for this device, driver, torch, triton and source of the kernels.
LONGATTN_SELF_CHECK=0 skips the check.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.kernels import cachefolder
from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import ROUNDED_WITHIN
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.philox import keep_scale
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.kernels.reference import reference_attention
from longattn.kernels.terms import Alibi, RelativeBias, ScoreTerm, Softcap, by_distance_of, softcap_of
from longattn.kernels.triton.availability import installed_version
from longattn.patterncache import Dilated, Full, Pattern, Rectangle, Restrict, Span, Strided, Window

logger = logging.getLogger("longattn.kernels")

_STRIDED = Dilated((64, 128), (1, 2), causal=True) + Window(40, sinks=3)
"""Dense tiles and tiles that a band cuts, several branches, keys that count more than once."""

_DENSE = (Dilated((512, 1024), (1, 2)), Full(causal=True))
"""Whole tiles of several steps in one list, keys that count twice, edges that are merged."""

_LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))


class Form(NamedTuple):
    """What compiled kernels differ by, as far as a problem tells."""

    direction: str
    dtype: torch.dtype
    width: int
    value_width: int
    grouped: bool
    listed: bool
    attention_mask: bool
    bias: bool
    key_padding: bool
    dropout: bool
    softcap: bool
    by_distance: bool
    prior: bool
    deterministic: bool

    def __str__(self) -> str:
        flags = [name for name, value in self._asdict().items() if value is True]
        widths = f"D{self.width}" + (f" DV{self.value_width}" if self.value_width != self.width else "")
        return " ".join([self.direction, str(self.dtype).removeprefix("torch."), widths, *flags])


OUTCOMES: dict[tuple[object, str], str] = {}
"""(form, device's description) -> "" for right, or what was wrong, of this process."""


def forms_of(problem: AttentionProblem) -> list[Form]:
    """The forms that a problem needs: of its forward, and of its backward where gradients are wanted."""
    directions = ("forward", "backward") if problem.backward else ("forward",)
    width, value_width = (max(16, 1 << (dim - 1).bit_length()) for dim in (problem.head_dim, problem.value_width))
    flags = (
        problem.listed, problem.attention_mask, problem.bias, problem.key_padding, problem.dropout, problem.softcap,
        problem.by_distance,
    )  # fmt: skip
    grouped = problem.heads != problem.kv_heads
    return [
        Form(
            direction, problem.dtype, width, value_width, grouped, *flags, problem.prior and direction == "forward",
            problem.deterministic and direction == "backward",
        )
        for direction in directions
    ]  # fmt: skip


def standing(problem: AttentionProblem, run: bool) -> str:
    """The words checked, "unchecked: why" or "failed: what was wrong" of the forms that a problem needs on its device.

    run: check now what was not checked yet.
    """
    if os.environ.get("LONGATTN_SELF_CHECK") == "0":
        return "unchecked: LONGATTN_SELF_CHECK=0"
    device = _device_of(problem.architecture)
    if device is None:
        return f"unchecked: no {problem.architecture or problem.device} is here"
    where, unchecked = describe(device), []
    for form in forms_of(problem):
        outcome = known(form, where)
        if outcome is None and run and not torch.cuda.is_current_stream_capturing():
            outcome = keep(form, where, wrong(form, device))
        if outcome:
            return f"failed: {outcome}"
        if outcome is None:
            unchecked.append(str(form))
    return f"unchecked: {unchecked[0]} did not run on this device yet" if unchecked else "checked"


def dense_passed(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel for dense tiles was right on the device of these tensors; checked now where it was not yet.

    Nobody has run that kernel, so without a check (`LONGATTN_SELF_CHECK=0`, or inside a capture before any call) it does not serve.
    """
    if os.environ.get("LONGATTN_SELF_CHECK") == "0" or q.device.type != "cuda":
        return False
    problem = AttentionProblem(
        q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3], architecture=architecture_of(q.device)
    )
    return dense_standing(problem, True) == ""


def dense_standing(problem: AttentionProblem, run: bool) -> str | None:
    """Of the kernel for dense tiles: "" where it was right for such problems, what was wrong, or None where it did not run yet."""
    device = _device_of(problem.architecture)
    if device is None:
        return None
    form, where = forms_of(replace(problem, backward=False))[0]._replace(direction="dense forward"), describe(device)
    outcome = known(form, where)
    if outcome is None and run and not torch.cuda.is_current_stream_capturing():
        outcome = keep(form, where, wrong(form, device))
    return outcome


def wrong(form: Form, device: torch.device) -> str:
    """What a form computes wrongly on a device: the largest error beside the oracle, and where; "" where it is right."""
    from longattn.kernels.triton import launch_backward, launch_dense, launch_forward

    dense = form.direction == "dense forward"
    atol, rtol = ROUNDED_WITHIN[form.dtype]
    for pattern, nq, nk in _cases(form):
        call, tensors, expected = _problem(form, device, pattern, nq, nk)
        assert not dense or all(launch_dense.splits(call)), "the check takes the kernel for dense tiles"
        out, lse = launch_forward.forward(call, dense)
        pairs = [("out", out, expected[0]), ("lse", lse, expected[1])]
        if form.direction == "backward":
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
                form.dtype
            )
            true = torch.autograd.grad(expected[0], tensors, grad.double())
            gradients = launch_backward.backward(call, grad.to(device), None, out, lse)[:3]
            pairs = list(zip(("dq", "dk", "dv"), gradients, true, strict=True))
            atol, rtol = 4 * atol, 4 * rtol
        for name, got, want in pairs:
            got, want = got.double().cpu(), want.detach().double()
            # -inf is right only where -inf is expected; NaN never is.
            error = torch.where(got == want, 0.0, (got - want).abs())
            size = max(1.0, float(want[want.isfinite()].abs().max()))
            if not bool((error <= (atol + rtol) * size).all()):
                return f"{form}: {name} is {float(error.nan_to_num(torch.inf).max()):.2g} off the float64 oracle at {nq} queries, {nk} keys"
    return ""


def _cases(form: Form) -> Iterator[tuple[Pattern, int, int]]:
    """Patterns, queries and keys that a form is checked on."""
    if form.direction == "dense forward":
        yield from ((pattern, 1100, 1100) for pattern in _DENSE)
        return
    pattern = _LISTED if form.listed else _STRIDED
    yield pattern, 200, 200
    if form.direction == "forward":
        yield pattern, 1, 300


def _problem(
    form: Form, device: torch.device, pattern: Pattern, nq: int, nk: int
) -> tuple[Call, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A call of the form, the oracle's q, k, v in float64, and what it says of them."""
    random = torch.Generator().manual_seed(1)
    batch, heads, kv_heads, seed, dropout_p = 2, 4, 2 if form.grouped else 4, 7, 0.25 if form.dropout else 0.0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(form.dtype)

    sizes = ((nq, heads, form.width), (nk, kv_heads, form.width), (nk, kv_heads, form.value_width))
    q, k, v = (normal(batch, *size) for size in sizes)
    rectangle = Rectangle(heads, Span(nk - nq, nq), Span(0, nk))
    mask = torch.rand((1, 1, nq, nk), generator=random) < 0.8 if form.attention_mask else None
    bias = normal(1, heads, nq, nk) if form.bias else None
    padding = torch.rand((batch, nk), generator=random) < 0.2 if form.key_padding else None
    counts = torch.from_numpy(pattern.counts(rectangle)).expand(batch, -1, -1, -1)
    counts = counts if mask is None else counts * mask
    kept = None
    if form.dropout:
        axes = (batch, heads, nq, nk)
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in axes), indexing="ij")
        kept = keep_scale(seed, dropout_p, b, h, i + (nk - nq), j, torch.float64)
    terms: list[ScoreTerm] = [Softcap(2.0)] if form.softcap else []
    if form.by_distance:
        slopes, table = (torch.rand(shape, generator=random) for shape in ((heads,), (32, heads)))
        terms += [Alibi(slopes / 10), RelativeBias(table)]
    exact = q.double().requires_grad_(), k.double().requires_grad_(), v.double().requires_grad_()
    state = reference_attention(
        *exact, counts, bias=bias, key_padding_mask=padding, keep=kept, score_terms=tuple(terms) or None
    )
    prior = None
    if form.prior:
        # Over keys that were not seen: the oracle merges by the same law.
        prior = torch.randn(state.out.shape, generator=random), torch.randn(state.lse.shape, generator=random)
        top = torch.maximum(state.lse, prior[1].double())
        a, b = (state.lse - top).exp(), (prior[1].double() - top).exp()
        merged = (state.out * a[..., None] + prior[0].double() * b[..., None]) / (a + b)[..., None]
        expected = merged, top + (a + b).log()
        prior = prior[0].to(device), prior[1].to(device)
    else:
        expected = state.out, state.lse
    moved = [None if x is None else x.to(device) for x in (mask, bias, padding, by_distance_of(terms, form.dtype))]
    call = Call(
        q.to(device), k.to(device), v.to(device), pattern.plan(rectangle), scale=form.width**-0.5, mask=moved[0], bias=moved[1],
        key_padding=moved[2], prior=prior, dropout_p=dropout_p, seed=seed, out_dtype=torch.float32, deterministic=form.deterministic,
        allocator=TorchAllocator(), softcap=softcap_of(terms), by_distance=moved[3],
    )  # fmt: skip
    return call, exact, expected


def _device_of(architecture: str) -> torch.device | None:
    """A device of this architecture that is here."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if architecture in ("", architecture_of(device)):
            return device
    return None


@lru_cache
def describe(device: torch.device) -> str:
    """What an outcome holds for: the device, its driver, torch, triton, and the source of the kernels."""
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    ask: Any = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")
    driver = ask()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, driver {driver}, torch {torch.__version__}, triton {installed_version()}, kernels {source.hexdigest()[:16]}"


def _file_of(form: object, where: str) -> str:
    return f"self-check-{hashlib.sha256(f'{form} {where}'.encode()).hexdigest()[:24]}.txt"


def known(form: object, where: str) -> str | None:
    """The outcome of this process or of an earlier one, or None. Only "right" is believed from disk: what failed runs again."""
    outcome = OUTCOMES.get((form, where))
    folder = cachefolder.cache_folder()
    if outcome is None and isinstance(folder, Path):
        text = None
        with _not_kept(folder):
            text = cachefolder.read_text(folder, _file_of(form, where))
        if text is not None and text == f"right: {form}, {where}\n":
            outcome = OUTCOMES[form, where] = ""
    return outcome


def keep(form: object, where: str, outcome: str) -> str:
    """Write an outcome down, on disk where it is right, and return it."""
    OUTCOMES[form, where] = outcome
    folder = cachefolder.cache_folder()
    if outcome:
        logger.warning("row triton: %s", outcome)
    elif isinstance(folder, Path) and cachefolder.unwritable(folder) is None and cachefolder.refusal_of(folder) is None:
        with _not_kept(folder):
            cachefolder.keep_text(folder, _file_of(form, where), f"right: {form}, {where}\n")
    return outcome


@contextmanager
def _not_kept(folder: Path) -> Generator[None, None, None]:
    """A folder that cannot be read or written costs a check in each process, and no call."""
    try:
        yield
    except OSError as problem:
        logger.warning("row triton: outcomes of self-checks are not kept in %s: %s", folder, problem)
