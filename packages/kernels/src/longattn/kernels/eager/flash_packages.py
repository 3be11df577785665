"""Rows "views_fa3" and "views_fa4": strided branches through FlashAttention 3 or 4, where the user has installed it, and a merge.

Tiles are strided views, as in the row "sdpa_views"; dense and causal ones go to the package's own kernels, forward and backward, with the merged
out and lse. Nothing is built or installed here: FlashAttention 3 is the module `flash_attn_interface`, 4 is `flash_attn.cute.interface`. Their
functions that take and return an lse are not public, so `prepare` compares their parameters with those that were read (FlashAttention's
repository, hopper/flash_attn_interface.py and flash_attn/cute/interface.py) and refuses others. Plans with strips that need a mask suit
other rows better.

Neither package has run under these rows: calls are tested with stand-ins of the same signatures, on no GPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from longattn.kernels.eager.sdpa_cuda import WITH_FLASH, DenseKernel, ViewsRow
from longattn.patterncache import Plan, pieces

PROBLEMS: dict[str, str | None] = {}
"""Module -> why it cannot be used, or None, of those that were imported in this process."""


@dataclass(frozen=True)
class Package:
    """Where a package's functions are, and what is given to them by name.

    Attributes:
        module: that is imported. forward, backward: names of its functions. by_name: function -> parameters.
    """

    module: str
    forward: str
    backward: str
    by_name: dict[str, tuple[str, ...]]

    def missing(self) -> str | None:
        """Why it is not here, without importing it, or, once it was imported, why it cannot be used; or None."""
        name = self.module.partition(".")[0]
        installed = name in sys.modules or _is_installed(name)
        return PROBLEMS.get(self.module) if installed else f"{self.module} is not installed"

    def problem(self) -> str | None:
        """Imports it; why it cannot be used, or None."""
        if self.module not in PROBLEMS:
            PROBLEMS[self.module] = self._problem()
        return PROBLEMS[self.module]

    def _problem(self) -> str | None:
        try:
            module = self._module()
        except ImportError as error:
            return f"{self.module} cannot be imported: {error}"
        for function, asked in self.by_name.items():
            given = getattr(module, function, None)
            if given is None:
                return f"{self.module} has no {function}"
            absent = [name for name in asked if name not in inspect.signature(given).parameters]
            if absent:
                return f"{function} of {self.module} takes no {', '.join(absent)}"
        return None

    def function(self, name: str) -> Callable[..., Any]:
        """One of its functions."""
        return getattr(self._module(), name)

    def _module(self) -> ModuleType:
        return import_module(self.module)


@lru_cache
def _is_installed(name: str) -> bool:
    # Each call of a new signature would search every directory of sys.path again. What is installed later counts once somebody imported it.
    return find_spec(name) is not None


_FA3 = Package(
    "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward",
    {
        "_flash_attn_forward": ("q", "k", "v", "softmax_scale", "causal"),
        "_flash_attn_backward": (
            "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_scale", "is_causal",
        ),
    },
)  # fmt: skip
_FA4 = Package(
    "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd",
    {
        "_flash_attn_fwd": ("q", "k", "v", "softmax_scale", "causal", "return_lse"),
        "_flash_attn_bwd": ("q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal"),
    },
)  # fmt: skip


def _by_position(*tensors: Tensor) -> list[Tensor]:
    """(tiles, heads, count, d) as (tiles, count, heads, d), the packages' layout: views, but where the last axis is not contiguous."""
    turned = (x.transpose(1, 2) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in turned]


def _forward_3(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _by_position(q, k, v)
    out, lse, *_ = _FA3.function(_FA3.forward)(q, k, v, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2), lse


def _backward_3(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = _by_position(grad, q, k, v, out)
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    _FA3.function(_FA3.backward)(
        grad, q, k, v, out, lse.contiguous(), dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale, is_causal=causal
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _forward_4(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _by_position(q, k, v)
    out, lse, *_ = _FA4.function(_FA4.forward)(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out.transpose(1, 2), lse


def _backward_4(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = _by_position(grad, q, k, v, out)
    grads = _FA4.function(_FA4.backward)(q, k, v, out, grad, lse.contiguous(), softmax_scale=scale, causal=causal)
    dq, dk, dv = (x.transpose(1, 2) for x in grads[:3])
    return dq, dk, dv


@dataclass(frozen=True)
class PackageRow(ViewsRow):
    """A row over one of the packages."""

    package: Package

    def refusal(self) -> str | None:
        """Why the package is not here, without importing it, or None."""
        return self.package.missing()

    def prepare(self) -> str | None:
        """Import it; why it cannot be used, or None."""
        return self.package.problem()

    def unsuited(self, plan: Plan) -> str | None:
        """Why another row would serve the plan better, or None."""
        masked = plan.listed or any(piece.band is not None and not piece.triangle for piece in pieces(plan))
        return "the plan has tiles that need a mask" if masked else None


FA3 = PackageRow(
    replace(WITH_FLASH, architectures=("sm_9?*",)), DenseKernel(_forward_3, _backward_3, groups=True), _FA3
)
FA4 = PackageRow(
    replace(WITH_FLASH, max_head_dim=128, architectures=("sm_9?*", "sm_10?*")),
    DenseKernel(_forward_4, _backward_4, widest=128, groups=True),
    _FA4,
)
