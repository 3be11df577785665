"""Row "triton": the Triton family, for CUDA and ROCm. Light: triton is imported when the row is first used."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import ROUNDED_WITHIN, Capability
from longattn.kernels.far_rows import exact_backward, exact_forward
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.triton import availability, paged_check, self_check
from longattn.kernels.triton.configurations import FEW_ROWS, PAGED_WIDTHS, dense_tile
from longattn.patterncache import Plan

if TYPE_CHECKING:
    from longattn.kernels.pages import PagedCache

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

CAPABILITY = Capability(
    devices=("cuda", "cpu") if availability.INTERPRETED else ("cuda",),
    dtypes={"": _DTYPES},
    tolerance={dtype: ROUNDED_WITHIN[dtype] for dtype in _DTYPES},
    max_head_dim=256,
    softcap=True,
    by_distance=True,
    dropout=True,
    architectures=("sm_8?*", "sm_9?*", "sm_1??*", "gfx90a", "gfx94?", "gfx950"),
)

refusal = availability.refusal


def standing(problem: AttentionProblem, run: bool) -> str:
    """How the kernel forms that a problem needs stand on its device; see `self_check`. Interpreted on a CPU nothing is compiled, nor asked."""
    return self_check.standing(problem, run) if problem.device == "cuda" else ""


def form(plan: Plan, problem: AttentionProblem) -> str:
    """Whether dense tiles go to the warp-specialised kernel; "" where a call has one way only."""
    masked = (
        problem.attention_mask,
        problem.bias,
        problem.key_padding,
        problem.dropout,
        problem.softcap,
        problem.by_distance,
    )
    few = plan.rectangle.shape[1] * (problem.heads // problem.kv_heads) <= FEW_ROWS
    widths = problem.head_dim, problem.value_width
    if problem.device != "cuda" or few or any(masked) or problem.listed:
        return ""
    if dense_tile(problem.architecture, *widths, problem.dtype.itemsize) is None or not problem.architecture:
        return ""
    outcome = self_check.dense_standing(problem, False)
    if outcome is None:
        return "tiles by one kernel (the warp-specialised one for dense tiles did not run on this device yet)"
    if outcome:
        return f"tiles by one kernel (the warp-specialised one for dense tiles failed: {outcome})"
    return "dense tiles by the warp-specialised kernel, where they are most of a launch"


@exact_forward
def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
    return _launches()[0].forward(call)


@exact_backward
def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v. deterministic: queries own dq, keys own dk and dv; else dq is reduce-added."""
    return _launches()[1].backward(call, grad_out, grad_lse, out, lse)


def bind(call: Call, out: Tensor, lse: Tensor) -> Any:
    """`forward` of such calls with everything in place but tensors and seed, or None."""
    return _launches()[0].bind(call, out, lse)


def rebind(bound: Any, call: Call) -> Any:
    """What `bind` would give for a call with other lengths of k and v than that of a bound one, or None where it is computed otherwise."""
    return bound.at_lengths(call)


def bind_ahead(bound: Any, plans: Any) -> Any:
    """What gives such forms of the next lengths of k and v without being shown their plans one by one, or None."""
    return bound.tokens_ahead(plans)


def bind_backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, gradients: tuple[Any, ...]
) -> Any:
    """`backward` of such calls likewise, or None."""
    return _launches()[1].bind_backward(call, grad_out, grad_lse, out, lse, gradients)


def serves_pages(cache: PagedCache, q: Tensor) -> bool:
    """Whether triton takes decode steps over such a cache here: it is here, and the kernel was right on this device."""
    served = cache.keys.device.type in CAPABILITY.devices and q.dtype in CAPABILITY.tolerance
    able = served and max(cache.widths) <= PAGED_WIDTHS[q.element_size()] and refusal() is None
    return able and paged_check.passed(cache, q, attend_pages)


def attend_pages(
    q: Tensor, cache: PagedCache, pages: Tensor, held: int, scale: float, added: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Fill out and lse, as `paged_attention` says, from arguments that it checked.

    Raises:
        RowFailure: the kernel does not compile.
    """
    _launches()[2].attend_pages(q, cache, pages, held, scale, added, out, lse)


def _launches() -> tuple[ModuleType, ModuleType, ModuleType]:
    """What launches the forward, the backward, and steps over pages; triton is imported with them."""
    from longattn.kernels.triton import launch_backward, launch_forward, launch_paged

    return launch_forward, launch_backward, launch_paged
