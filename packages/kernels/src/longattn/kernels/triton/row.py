"""Row "triton": the Triton family, for CUDA and ROCm. Light: triton is imported when the row is first used."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.capability import ROUNDED_WITHIN, Capability
from longattn.kernels.far_rows import exact_backward, exact_forward
from longattn.kernels.problem import AttentionProblem
from longattn.kernels.triton import availability, self_check

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


@exact_forward
def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, Nq, heads, head_dim) in out_dtype, lse (batch, Nq, heads)."""
    from longattn.kernels.triton import launch_forward

    return launch_forward.forward(call)


@exact_backward
def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """(dq, dk, dv, None) in the dtypes of q, k, v. deterministic: queries own dq, keys own dk and dv; else dq is reduce-added."""
    from longattn.kernels.triton import launch_backward

    return launch_backward.backward(call, grad_out, grad_lse, out, lse)
