"""Checks at the public edge, once. Every message names the parameter, what was expected and what came."""

# What is active in torch is known to private names alone.
# pyright: reportPrivateUsage=false
# Arguments come as anything, and are checked here.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from longattn.kernels.dispatch.capability import dtype_name
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.state import FLOATS, AttentionState, state_dtype
from longattn.patterncache.spans import MOST, shortened

Names = tuple[str, str, str]

MOST_HEADS = 128
"""No model has more heads than this; many sequences are longer."""

_warned = False


class LayoutWarning(UserWarning):
    """A tensor's axes look as if sequence and heads were exchanged. Given once in a process."""


def refuse_torchscript() -> None:
    """Raise NotImplementedError where torch.jit.trace or an ONNX export records the call: lengths would be constants in what comes out."""
    # Dynamo traces neither question, and cannot be within either.
    if torch.compiler.is_dynamo_compiling():
        return
    onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    if onnx or torch._C._get_tracing_state() is not None:  # pyright: ignore[reportUnnecessaryComparison]
        raise NotImplementedError(
            "attention cannot be recorded by torch.jit.trace or exported to ONNX, which have no such operator: use "
            "torch.export.export, whose program torch._inductor.aoti_compile_and_package compiles, or torch.compile"
        )


def check_qkv(q: object, k: object, v: object, names: Names = ("q", "k", "v")) -> None:
    """q (batch, Nq, heads, head_dim), k and v (batch, Nk, kv_heads, head_dim): one floating dtype, one device, heads divisible.

    v may have a head_dim of its own.

    Raises:
        TypeError: one is not a torch.Tensor, or its dtype is not floating or differs.
        ValueError: rank, shape or device do not fit.
    """
    tensors = [_check_tensor(name, x) for name, x in zip(names, (q, k, v), strict=True)]
    first, key, value = tensors
    for name, x in zip(names[1:], tensors[1:], strict=True):
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {names[0]}, {dtype_name(first.dtype)}, got {dtype_name(x.dtype)}"
            )
        if x.device != first.device:
            raise ValueError(f"{name} must be on the device of {names[0]}, {first.device}, got {x.device}")
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} must have the batch size of {names[0]}, {first.shape[0]}, got {x.shape[0]}")
    if key.shape[3] != first.shape[3]:
        raise ValueError(f"{names[1]} must have the head_dim of {names[0]}, {first.shape[3]}, got {key.shape[3]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"{names[2]} must have the length and heads of {names[1]}, {tuple(key.shape[1:3])}, got {tuple(value.shape[1:3])}"
        )
    if key.shape[2] == 0 or first.shape[2] % key.shape[2]:
        raise ValueError(
            f"{names[1]} must have a number of heads that divides that of {names[0]}, {first.shape[2]}, got {key.shape[2]}"
        )
    if first.shape[3] == 0 or first.shape[2] == 0:
        raise ValueError(f"{names[0]} must have at least one head and head_dim >= 1, got shape {tuple(first.shape)}")
    if value.shape[3] == 0:
        raise ValueError(f"{names[2]} must have head_dim >= 1, got shape {tuple(value.shape)}")


def _check_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (batch, seq, heads, head_dim), got {type(x).__name__}")
    if x.dtype not in FLOATS:
        names = ", ".join(dtype_name(d) for d in FLOATS)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {dtype_name(x.dtype)}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape (batch, seq, heads, head_dim), got {tuple(x.shape)}")
    return x


def check_key_padding(mask: object, q: Tensor, k: Tensor) -> None:
    """None, or bool (batch, Nk) on the device of k, True = padding."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a bool torch.Tensor (batch, Nk), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True = padding, got {dtype_name(mask.dtype)}")
    if tuple(mask.shape) != (k.shape[0], k.shape[1]):
        raise ValueError(
            f"key_padding_mask must have shape (batch, Nk) = {(k.shape[0], k.shape[1])}, got {tuple(mask.shape)}"
        )
    check_device("key_padding_mask", mask, q)


def check_attention_mask(mask: object, q: Tensor, k: Tensor) -> None:
    """None, bool (True = may see) or floating (added to the scores), broadcastable to (batch, heads, Nq, Nk)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a bool or floating torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(
            f"attention_mask must be bool, True = may see, or floating, added to the scores, got {dtype_name(mask.dtype)}"
        )
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    fits = mask.dim() <= 4 and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(
            f"attention_mask must be broadcastable to (batch, heads, Nq, Nk) = {full}, got {tuple(mask.shape)}"
        )
    check_device("attention_mask", mask, q)


def check_dropout(name: str, value: object) -> float:
    """A probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {shortened(value)} ({type(value).__name__})")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {shortened(value)}")
    return float(value)


def check_sinks(sinks: object, q: Tensor) -> None:
    """None, or floating (heads,) on the device of q."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sink_logits must be a floating torch.Tensor (heads,), got {type(sinks).__name__}")
    if sinks.dtype not in FLOATS:
        raise TypeError(f"sink_logits must be floating, got {dtype_name(sinks.dtype)}")
    if tuple(sinks.shape) != (q.shape[2],):
        raise ValueError(f"sink_logits must have shape (heads,) = {(q.shape[2],)}, got {tuple(sinks.shape)}")
    check_device("sink_logits", sinks, q)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """x is on the device of q."""
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def check_prior(prior: object, q: Tensor, v: Tensor) -> None:
    """None, or a state over the queries of q with v's head_dim, on its device, in the dtype of partial results."""
    if prior is None:
        return
    if not isinstance(prior, AttentionState):
        raise TypeError(f"prior must be None or an AttentionState, got {type(prior).__name__}")
    dtype = state_dtype(q.dtype)
    for name, x, shape in (("prior.out", prior.out, (*q.shape[:3], v.shape[3])), ("prior.lse", prior.lse, q.shape[:3])):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(
                f"{name} must be {dtype_name(dtype)} for q of {dtype_name(q.dtype)} (rounded states lose precision), "
                f"got {dtype_name(x.dtype)}"
            )
        check_device(name, x, q)


def check_dtype(name: str, dtype: object) -> None:
    """None, or a floating torch.dtype."""
    if dtype is not None and dtype not in FLOATS:
        names = ", ".join(dtype_name(d) for d in FLOATS)
        raise TypeError(f"{name} must be None or one of the torch dtypes {names}, got {shortened(dtype)}")


def check_environment(environment: object) -> None:
    """None, or an Environment."""
    if environment is not None and not isinstance(environment, Environment):
        raise TypeError(
            f"environment must be None or an Environment, got {shortened(environment)} ({type(environment).__name__})"
        )


def check_device_type(device: object) -> str:
    """The type of a device, such as "cuda"; None is "cpu"."""
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(
            f"device must be None, a torch.device or a string such as 'cuda', got {shortened(device)} ({type(device).__name__})"
        )
    try:
        return torch.device("cpu" if device is None else device).type
    except RuntimeError as error:
        raise ValueError(
            f"device must name a device that torch knows, such as 'cuda', got {shortened(device)}"
        ) from error


def check_shapes(q_shape: object, k_shape: object) -> None:
    """(batch, seq, heads, head_dim) twice: batch and head_dim equal, heads divisible."""
    for name, shape in (("q_shape", q_shape), ("k_shape", k_shape)):
        if (
            not isinstance(shape, (tuple, list))
            or len(shape) != 4
            or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
        ):
            raise ValueError(f"{name} must be (batch, seq, heads, head_dim), integers >= 0, got {shortened(shape)}")
    assert isinstance(q_shape, (tuple, list)) and isinstance(k_shape, (tuple, list))
    if q_shape[2] == 0 or q_shape[3] == 0:
        raise ValueError(f"q_shape must have at least one head and head_dim >= 1, got {tuple(q_shape)}")
    if (k_shape[0], k_shape[3]) != (q_shape[0], q_shape[3]) or k_shape[2] == 0 or q_shape[2] % k_shape[2]:
        raise ValueError(
            f"k_shape must have the batch and head_dim of q_shape, {tuple(q_shape)}, and a number of heads that divides its own, "
            f"got {tuple(k_shape)}"
        )


def check_head_dim(name: str, value: object) -> int | None:
    """None, or an integer >= 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be None or an integer >= 1, got {shortened(value)} ({type(value).__name__})")
    if value is not None and not 1 <= value <= MOST:
        raise ValueError(f"{name} must be None or an integer from 1 to {MOST}, got {shortened(value)}")
    return value


def check_scale(scale: object, name: str = "softmax_scale") -> float | None:
    """None (head_dim ** -0.5), or a number."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name} must be None or a number, got {shortened(scale)} ({type(scale).__name__})")
    # Of an integer beyond every float too.
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"{name} must be None or a finite number, got {shortened(scale)}")
    return float(scale)


def check_flag(name: str, value: object) -> bool | None:
    """None or a bool."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be None, True or False, got {shortened(value)} ({type(value).__name__})")
    return value


def warn_of_axes(name: str, x: Tensor, layout: str) -> None:
    """Warn, once in a process, where x has fewer positions than heads, and more heads than any model."""
    global _warned
    if _warned or layout != "bnhd" or torch.compiler.is_compiling():
        return
    length, heads = x.shape[1:3]
    if length < heads and length <= MOST_HEADS < heads:
        _warned = True
        warnings.warn(
            f"{name} has shape {tuple(x.shape)}, of which {length} is taken for the sequence and {heads} for the heads; if the heads come "
            f'first, say layout="bhnd", which takes and returns views (this is said once)',
            LayoutWarning,
            stacklevel=3,
        )


def check_broadcastable(name: str, x: object, shape: tuple[int, ...]) -> None:
    """Raise unless x is a plain tensor that can be broadcast to a shape."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
        raise TypeError(
            f"{name} must be a plain tensor broadcastable to {shape}, got {shortened(x)} ({type(x).__name__})"
        )
    if x.dim() > len(shape) or any(n not in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to {shape}, got {tuple(x.shape)}")
