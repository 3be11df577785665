"""`explain`: which row would serve, and why not the others; what the call moves and multiplies; how far its results are from exact."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from longattn.kernels.check import check_device_type, check_dtype, check_flag, check_head_dim, check_shapes
from longattn.kernels.decoding import explain_decode
from longattn.kernels.dispatch.choosing import explain_choice
from longattn.kernels.dispatch.processor import processor
from longattn.kernels.dispatch.table import Explanation, check_backend_name, row
from longattn.kernels.hierarchy import machine_of, traffic_of
from longattn.kernels.positions import last_positions
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.kernels.terms import ScoreTerms, as_terms, softcap_of, tensors_in
from longattn.patterncache import Pattern, Plan, Rectangle, Span
from longattn.patterncache.spans import shortened

_PLANNED_PAIRS = 1 << 24
"""Query-key pairs up to which a pattern that lists rows is planned, to see whether anything is listed."""


def explain(
    pattern: Pattern,
    q_shape: tuple[int, int, int, int],
    k_shape: tuple[int, int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    architecture: str | None = None,
    is_causal: bool | None = None,
    attention_mask: bool = False,
    bias: bool = False,
    dropout: bool = False,
    key_padding_mask: bool = False,
    score_terms: ScoreTerms = None,
    requires_grad: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
    value_head_dim: int | None = None,
    verbose: bool = False,
    machine: str | None = None,
    verify: bool | tuple[Tensor, Tensor, Tensor] = False,
    decode: bool = False,
) -> Explanation:
    """Which row would serve, and every other row's reasons, without data and without the device.

    On a CPU the rows that could serve have expected times beside them, and where their figures are from; the least serves. A row that
    compiles something counts as able where there is a compiler: nothing is compiled or measured here, and until the first call has
    measured a row, it says so and the order is the fixed one. A long plan that lists rows is not built: beyond 2^24 query-key pairs, a pattern that has to look at all of them counts as listed.

    Args:
        pattern: who sees whom.
        q_shape, k_shape: (batch, seq, heads, head_dim); k_shape defaults to q_shape.
        dtype: default torch's default dtype.
        device: any device or type, such as "cuda", whether or not this machine has one. Default "cpu".
        architecture: of that device, such as "sm_80", "sm_90" or "gfx942", whether or not this machine has one. Default: that of the
            device where it is here, else none, and then no row asks.
        is_causal, backend: as in `attend`.
        value_head_dim: of v. Default: that of q_shape.
        attention_mask, bias, key_padding_mask, dropout, requires_grad, deterministic: whether the call would have them; a floating
            attention_mask is a bias, and requires_grad includes its gradient.
        score_terms: as in `attend`; where requires_grad, with the gradient of those of their tensors that require it.
        verbose: also count the call's FLOP and the bytes that come into each level of a machine's memory (`Explanation.traffic`).
        machine: whose, by name: one of `longattn.kernels.hierarchy.MACHINES`. Default: that of the device, where it is one of them.
        verify: also compute the call, and sampled rows of it in float64, and state their errors (`Explanation.errors`); True takes unit
            normal q, k and v, a triple (q, k, v) is the call's own. Not with masks, bias, score terms, padding or dropout.
        decode: of a decode step of a ring buffer, whose cached keys lie in any order: q_shape is of one query, k_shape of the slots in use; masks
            hide slots. Then the rows are fixed in order, and neither `backend`, `verbose` nor `verify` may be given.

    Returns:
        Explanation; its `backend` is the row's name (None: nothing fits), and its text a line per row.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if not isinstance(pattern, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {shortened(pattern)} ({type(pattern).__name__})"
        )
    k_shape = q_shape if k_shape is None else k_shape
    check_shapes(q_shape, k_shape)
    check_dtype("dtype", dtype)
    flags = {
        "attention_mask": attention_mask,
        "bias": bias,
        "dropout": dropout,
        "key_padding_mask": key_padding_mask,
        "requires_grad": requires_grad,
        "deterministic": deterministic,
        "verbose": verbose,
        "decode": decode,
    }
    for name, flag in flags.items():
        check_flag(name, flag)
    check_backend_name(backend)
    terms = as_terms(score_terms)
    held = tensors_in(terms)
    flags["score_terms"] = bool(terms)
    if is_causal is not None and check_flag("is_causal", is_causal) != pattern.causal:
        pattern = pattern.with_causal(is_causal)
    queries = Span(*last_positions(q_shape[1], k_shape[1], pattern.positional))
    rectangle = Rectangle(q_shape[2], (queries,), (Span(0, k_shape[1]),))
    plan = _built(pattern, rectangle)
    problem = AttentionProblem(
        device=check_device_type(device),
        dtype=torch.get_default_dtype() if dtype is None else dtype,
        heads=q_shape[2],
        kv_heads=k_shape[2],
        head_dim=q_shape[3],
        value_head_dim=check_head_dim("value_head_dim", value_head_dim),
        listed=plan is None or plan.listed,
        attention_mask=attention_mask,
        bias=bias,
        bias_grad=bias and requires_grad,
        key_padding=key_padding_mask,
        softcap=softcap_of(terms) > 0,
        by_distance=bool(held),
        by_distance_grad=requires_grad and any(x.requires_grad for x in held),
        dropout=dropout,
        backward=requires_grad,
        deterministic=deterministic,
        architecture=_architecture(device) if architecture is None else check_architecture(architecture, device),
    )
    if decode:
        if q_shape[1] != 1 or backend is not None or verbose or verify is not False:
            raise ValueError(
                f"decode must be False but for one query and without backend, verbose and verify, got q_shape {tuple(q_shape)}"
            )
        return explain_decode(replace(problem, decode=True, listed=False))
    measure = verify is not False  # what computes the call also measures what it would
    explanation = explain_choice(problem, backend, plan, q_shape[0], measure=measure)
    if plan is not None:
        able = [row(name) for name, reasons in explanation.rows if not reasons]
        forms = ((each.name, each.form(plan, problem)) for each in able if each.form is not None)
        explanation = replace(explanation, forms=tuple((name, text) for name, text in forms if text))
    if verbose:
        if plan is None:
            raise ValueError("verbose must be False where the pattern lists rows and is too long to plan, got True")
        where = machine_of(machine, problem.architecture or (processor() if problem.device == "cpu" else ""))
        traffic = traffic_of(plan, q_shape[0], q_shape[3], problem.dtype.itemsize, requires_grad, where)
        explanation = replace(explanation, traffic=traffic)
    if verify is not False:
        # What computes imports the ops, and torch's FLOP counter with them, which imports triton.
        from longattn.kernels import verifying

        tensors = _tensors(verify, q_shape, k_shape, problem, flags)
        if tensors is None:
            tensors = verifying.drawn(
                q_shape, k_shape, problem.dtype, torch.device("cpu" if device is None else device)
            )
        if explanation.backend is None:
            raise ValueError(f"verify must be False where no row fits, got {verify is not False}: {explanation}")  # pyright: ignore[reportUnnecessaryComparison]
        explanation = replace(
            explanation, errors=verifying.errors_of(tensors, pattern, queries, explanation.backend, requires_grad)
        )
    return explanation


def _tensors(
    verify: bool | tuple[Tensor, Tensor, Tensor],
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    problem: AttentionProblem,
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `verify` computes with; None: tensors that are drawn."""
    beside = [name for name in ("attention_mask", "bias", "dropout", "key_padding_mask", "score_terms") if flags[name]]
    if beside:
        raise ValueError(f"verify must be False with {' and '.join(beside)}, got {verify is not False}")
    if verify is True:
        return None
    if not isinstance(verify, tuple) or len(verify) != 3 or not all(isinstance(x, Tensor) for x in verify):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"verify must be a bool or a triple of tensors (q, k, v), got {type(verify).__name__}")
    for name, x, shape in zip("qkv", verify, (q_shape, k_shape, k_shape), strict=True):
        if (tuple(x.shape), x.dtype, x.device.type) != (tuple(shape), problem.dtype, problem.device):
            raise ValueError(
                f"verify must have {name} of {problem.dtype} {tuple(shape)} on {problem.device}, got {x.dtype} {tuple(x.shape)} on {x.device.type}"
            )
    return verify


def _architecture(device: torch.device | str | None) -> str:
    """Of a device that is here, else ""."""
    place = torch.device("cpu" if device is None else device)
    if place.type != "cuda" or (place.index or 0) >= torch.cuda.device_count():
        return ""
    return architecture_of(place)


def check_architecture(architecture: object, device: torch.device | str | None) -> str:
    """Such as "sm_90" or "gfx942"."""
    if not isinstance(architecture, str):
        raise TypeError(
            f"architecture must be None or a name such as 'sm_90' or 'gfx942', got {shortened(architecture)} ({type(architecture).__name__})"
        )
    if not re.fullmatch(r"sm_\d+[af]?|gfx[0-9a-f]+", architecture):
        raise ValueError(
            f"architecture must be None or a name such as 'sm_90' or 'gfx942', got {shortened(architecture)}"
        )
    if check_device_type(device) == "cpu":
        raise ValueError(f"architecture must be None for device=cpu, which has none, got {shortened(architecture)}")
    return architecture


def _built(pattern: Pattern, rectangle: Rectangle) -> Plan | None:
    """The plan; None of a long rectangle of a pattern that says of itself that it lists, whose lists would take hours to make."""
    long = rectangle.shape[1] * rectangle.shape[2] > _PLANNED_PAIRS
    if long and pattern.listing:
        pattern.check_rectangle(rectangle)
        return None
    return pattern.plan(rectangle)
