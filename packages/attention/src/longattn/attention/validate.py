"""Rules for arguments of this package, one function each. Messages name the parameter, what was expected and what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import IO, Any, NoReturn, TypeVar, cast

import torch

from longattn.kernels.interface import refuse_torchscript
from longattn.patterncache import Pattern
from longattn.patterncache.spans import shortened

T = TypeVar("T")

MOST_SIZE = 1 << 62
"""Sums of two positions are int64."""

MOST_COPIES = 1 << 20
"""Rows that a row may become: each is listed."""

_HINTS = {
    "attn_mask": "attention_mask is the name here, and True = may see (torch's attn_mask differs between functions and modules)",
    "attention_dropout": "dropout is the one name",
    "dropout_p": "dropout is the one name",
    "scale": "softmax_scale is the name",
    "softcap": "give score_terms=longattn.kernels.Softcap(value) to the call",
    "alibi_slopes": "give score_terms=longattn.kernels.Alibi(slopes) to the call",
    "score_mod": "give score_terms, which longattn.kernels has for caps, slopes and relative biases; other rules are a floating attention_mask",
    "position_bias": "give a dense one as attention_mask, and T5's own as score_terms=longattn.kernels.RelativeBias(table)",
    "cu_seqlens_k": "cu_seqlens is that of the keys",
    "causal": "is_causal is the call's name, and a pattern has a causal of its own",
    "window_size": "give Window(size) as the pattern",
    "enable_gqa": "it is always on: k and v may have fewer heads, a number that divides q's",
    "block_mask": "give longattn.patterncache.from_block_mask(block_mask) as the pattern",
    "mask_mod": "give longattn.patterncache.from_mask_mod(mask_mod, ...) as the pattern",
    "max_seqlen": "lengths are read from cu_seqlens",
    "max_seqlen_q": "lengths are read from cu_seqlens_q",
    "max_seqlen_k": "lengths are read from cu_seqlens",
    "is_causal": "causal is the constructor's name; is_causal belongs to the call",
}


def refuse_unknown(where: str, unknown: Mapping[str, object]) -> None:
    """Raise TypeError for keywords that `where` does not take, with a hint for those that other libraries use."""
    for name in unknown:
        _refuse(where, name)


def _refuse(where: str, name: str) -> NoReturn:
    hint = f": {_HINTS[name]}" if name in _HINTS else ""
    raise TypeError(f"{where} got an unexpected keyword argument {name!r}{hint}")


def check_type(name: str, value: object, kind: type[T], expected: str) -> T:
    """A value of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {shortened(value)} ({type(value).__name__})")
    return value


def integers(x: torch.Tensor) -> list[int]:
    """The elements of an integer tensor, read on the host."""
    return cast(Any, x.flatten()).tolist()


def check_integers(name: str, value: object) -> list[int]:
    """A list, a tuple or a tensor of integers, as a list."""
    try:
        listed: Any = integers(value) if isinstance(value, torch.Tensor) else value
    except RuntimeError as error:
        raise TypeError(f"{name} must be integers, got a tensor that does not hold them here: {error}") from error
    numbers: list[Any] = [*listed] if isinstance(listed, (list, tuple)) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"{name} must be integers, got {shortened(value)}")
    return numbers


def check_copies(copies: object) -> int:
    """How many rows each row of a state's batch becomes."""
    if check_size("copies", copies) > MOST_COPIES:
        raise ValueError(f"copies must be at most {MOST_COPIES}, got {shortened(copies)}")
    return cast(int, copies)


def check_pattern_argument(pattern: object) -> Pattern:
    """A Pattern."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern must be a Pattern such as Dilated or Window, got {_shown(pattern)} ({type(pattern).__name__})"
        )
    return pattern


def _shown(value: object) -> str:
    """Itself; of a mask or what makes one, where it belongs."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}: a mask goes to attention_mask, beside Full()"
    if hasattr(value, "to_dense") and hasattr(value, "mask_mod"):
        return "a block mask: give longattn.patterncache.from_block_mask(...) of it"
    if callable(value) and not isinstance(value, type):
        return f"{value!r}: a mask_mod goes through longattn.patterncache.from_mask_mod"
    return shortened(value)


def check_size(name: str, value: object, least: int = 1) -> int:
    """An integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {least}, got {shortened(value)} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {shortened(value)}")
    if value >= MOST_SIZE:
        raise ValueError(f"{name} must be an integer below 2 ** 62, got {shortened(value)}")
    return value


def check_device(value: object) -> torch.device | None:
    """None, or a device that torch knows and that is here."""
    try:
        device = None if value is None else torch.device(cast(Any, value))
        if device is not None and device.type not in ("cpu", "meta"):
            torch.empty(0, device=device)
        return device
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device must be one that torch has here, got {shortened(value)}: {str(error)[:200]}") from error


def check_factory(device: object, dtype: object) -> dict[str, Any]:
    """device and dtype of parameters: None, or a device that torch knows, and a floating dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be None or a floating torch.dtype, got {shortened(dtype)} ({type(dtype).__name__})"
        )
    return {"device": check_device(device), "dtype": dtype}


def check_bool(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        # The TorchScript exporter to ONNX makes tensors of a module's defaults.
        refuse_torchscript()
        raise TypeError(f"{name} must be True or False, got {shortened(value)} ({type(value).__name__})")
    return value


def check_positive(name: str, value: object) -> float:
    """A number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number > 0, got {shortened(value)} ({type(value).__name__})")
    if not (0 < value <= sys.float_info.max or value == math.inf):  # an integer may be beyond every float
        raise ValueError(f"{name} must be a number > 0, got {shortened(value)}")
    return float(value)


def check_start(name: str, value: object) -> int | None:
    """None, or an integer >= 0 (a symbolic one in traced code)."""
    if value is None or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be None or an integer >= 0, got {shortened(value)} ({type(value).__name__})")
    if not 0 <= value < MOST_SIZE:
        raise ValueError(f"{name} must be None or an integer >= 0 and below 2 ** 62, got {shortened(value)}")
    return value


def global_heads(local: int, head_start: object, num_heads: object) -> list[int]:
    """[heads of the whole module, the first here, how many are here], where q has `local` heads.

    Raises:
        TypeError, ValueError: head_start is no integer >= 0, or num_heads none that reaches the last head; one of them alone.
    """
    if head_start is None and num_heads is None:
        return [local, 0, local]
    first = check_start("head_start", head_start)
    if first is None:
        raise ValueError(
            f"head_start must be given with num_heads: the first of q's heads among them, got num_heads={shortened(num_heads)}"
        )
    if num_heads is None:
        raise ValueError(
            f"num_heads must be given with head_start: the query heads of the whole module, got head_start={first}"
        )
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(
            f"num_heads must be an integer >= {first + local}, got {shortened(num_heads)} ({type(num_heads).__name__})"
        )
    if num_heads < first + local:
        raise ValueError(
            f"num_heads must be >= {first + local}, the heads up to the last of q, got {shortened(num_heads)}"
        )
    return [num_heads, first, local]


def check_merge_grad(value: object, pattern: Pattern, sink_logits: object) -> None:
    """Raise ValueError unless it is "exact", or "detached" and the pattern has branches, and nothing has its gradient by merge weights alone."""
    if value == "exact":
        return
    if value != "detached":
        raise ValueError(f"merge_grad must be 'exact' or 'detached', got {shortened(value)}")
    if not pattern.addends:
        raise ValueError(
            f"merge_grad must be 'exact' for a pattern without branches to merge, got 'detached' for {pattern}"
        )
    if sink_logits is not None:
        raise ValueError(
            "sink_logits must be None with merge_grad='detached', because a sink has a gradient by the weights of the merge alone, "
            f"got {type(sink_logits).__name__}"
        )


def check_embedded(name: str, x: object, embed_dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor (batch, seq, embed_dim) in the module's dtype (or under autocast, or where that is not known, any floating dtype)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (batch, seq, {embed_dim}), got {type(x).__name__}")
    if dtype is None and not x.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    # torch refuses the question about autocast on devices such as "meta": it is asked only where it matters.
    fits = dtype is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type)
    if not x.dtype.is_floating_point or not fits:
        raise TypeError(f"{name} must have the module's dtype {dtype}, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"{name} must have shape (batch, seq, {embed_dim}), got {tuple(x.shape)}")
    return x


def load_checked(file: str | IO[bytes], map_location: torch.device | str | None) -> Any:
    """What torch.load makes of a file with weights_only, sparse tensors of a forged one checked whatever torch's default is."""
    with torch.sparse.check_sparse_tensor_invariants(True):
        return torch.load(file, map_location=map_location, weights_only=True)
