"""`explain`: which row would serve, and why not the others, without data."""

from __future__ import annotations

import re

import torch

from longattn.kernels.check import check_device_type, check_dtype, check_flag, check_shapes
from longattn.kernels.dispatch.choosing import explain_choice
from longattn.kernels.dispatch.table import Explanation, check_backend_name
from longattn.kernels.positions import last_positions
from longattn.kernels.problem import AttentionProblem, architecture_of
from longattn.patterncache import Pattern, Plan, Rectangle, Span

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
    requires_grad: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
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
        attention_mask, bias, key_padding_mask, dropout, requires_grad, deterministic: whether the call would have them; a floating
            attention_mask is a bias, and requires_grad includes its gradient.

    Returns:
        Explanation; its `backend` is the row's name (None: nothing fits), and its text a line per row.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {pattern!r} ({type(pattern).__name__})"
        )
    k_shape = q_shape if k_shape is None else k_shape
    check_shapes(q_shape, k_shape)
    check_dtype("dtype", dtype)
    wanted = {
        "attention_mask": attention_mask,
        "bias": bias,
        "dropout": dropout,
        "key_padding_mask": key_padding_mask,
        "requires_grad": requires_grad,
        "deterministic": deterministic,
    }
    for name, flag in wanted.items():
        check_flag(name, flag)
    check_backend_name(backend)
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
        listed=plan is None or plan.listed,
        attention_mask=attention_mask,
        bias=bias,
        bias_grad=bias and requires_grad,
        key_padding=key_padding_mask,
        dropout=dropout,
        backward=requires_grad,
        deterministic=deterministic,
        architecture=_architecture(device) if architecture is None else check_architecture(architecture),
    )
    return explain_choice(problem, backend, plan, q_shape[0], measure=False)


def _architecture(device: torch.device | str | None) -> str:
    """Of a device that is here, else ""."""
    found = torch.device("cpu" if device is None else device)
    if found.type != "cuda" or (found.index or 0) >= torch.cuda.device_count():
        return ""
    return architecture_of(found)


def check_architecture(architecture: object) -> str:
    """Such as "sm_90" or "gfx942"."""
    if not isinstance(architecture, str):
        raise TypeError(
            f"architecture must be None or a name such as 'sm_90' or 'gfx942', got {architecture!r} ({type(architecture).__name__})"
        )
    if not re.fullmatch(r"sm_\d+[af]?|gfx[0-9a-f]+", architecture):
        raise ValueError(f"architecture must be None or a name such as 'sm_90' or 'gfx942', got {architecture!r}")
    return architecture


def _built(pattern: Pattern, rectangle: Rectangle) -> Plan | None:
    """The plan; None of a long rectangle of a pattern that says of itself that it lists, whose lists would take hours to make."""
    long = rectangle.shape[1] * rectangle.shape[2] > _PLANNED_PAIRS
    if long and pattern.listing:
        pattern.check_rectangle(rectangle)
        return None
    return pattern.plan(rectangle)
