"""`prepare`: a call that is checked and looked up once, for loops that call with the same shapes again and again."""

# Arguments come as anything, and are checked here.
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.kernels.check import check_dropout, check_scale
from longattn.kernels.dispatch.environment import Environment
from longattn.kernels.dispatch.prepared import PREPARED, described
from longattn.kernels.entry import attend, checked_pattern
from longattn.kernels.ops import direct
from longattn.kernels.options import Options, arguments_of, tensors_of
from longattn.kernels.philox import as_seed
from longattn.kernels.positions import flat_heads, last_positions
from longattn.kernels.state import AttentionState, state_dtype
from longattn.kernels.terms import ScoreTerms, as_terms, tensors_in
from longattn.patterncache import Pattern


class PreparedAttention:
    """`attend` for tensors of one signature: shapes, strides, dtypes, devices, gradients and options are those it was prepared with.

    The number of threads, LONGATTN_NATIVE, LONGATTN_CHOICE and the deterministic flag are those of the time of `prepare`. Under tracing, a transform, a
    mode or autocast a call is an ordinary call of `attend`.

    Attributes:
        backend: name of the row that serves.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, options: Options) -> None:
        self._pattern = pattern
        mask, padding = options.attention_mask, options.key_padding_mask
        self._masked = (mask is not None, padding is not None)
        key = direct.signature("attend", q, k, v, pattern, options)
        if any(x.requires_grad for x in tensors_in(as_terms(options.score_terms))):
            raise ValueError("score_terms must hold tensors that require no grad, got one that does: call attend there")
        placed = checked_pattern(q, k, v, pattern, options)
        if key is None:
            raise ValueError(
                "q, k, v must be plain tensors outside of tracing, transforms, modes and autocast, and options of their documented types; "
                "call attend there"
            )
        out_dtype = state_dtype(q.dtype) if options.out_dtype is None else options.out_dtype
        spans = last_positions(q.shape[1], k.shape[1], placed.positional), [0, k.shape[1], 1]
        arguments = arguments_of(placed, options, *spans, flat_heads(q.shape[2], None, None), out_dtype)
        self._drops = arguments.dropout_p > 0
        self._environment = options.environment
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        tensors = tensors_of(q, k, v, options, as_seed(0) if self._drops else None)
        self._call = direct.prepare_checked(key, tensors, arguments, self._environment)[0]
        self._key = key
        self._forms, self._needs_grad = (described(q), described(k), described(v)), needs_grad
        self._beside = tuple(None if x is None else described(x) for x in (mask, padding))
        # What was prepared with is not kept alive.
        self._options = options._replace(attention_mask=None, key_padding_mask=None)

    @property
    def backend(self) -> str:
        """Name of the row that serves."""
        return self._call.row.name

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        seed: Tensor | int | None = None,
    ) -> AttentionState:
        """Attend, as `longattn.kernels.attend` does with these options.

        Raises:
            TypeError, ValueError: a tensor of another signature, by name.
        """
        options = self._options
        if attention_mask is not None or key_padding_mask is not None:
            options = options._replace(attention_mask=attention_mask, key_padding_mask=key_padding_mask)
        if not direct.is_plain():
            as_by_default: Any = options._asdict()
            # What `attend` does not take; here they are as by default.
            for name in ("q_start", "head_start", "num_heads"):
                del as_by_default[name]
            return attend(q, k, v, self._pattern, seed=seed if self._drops else None, **as_by_default)
        forms = direct.plain_form(q), direct.plain_form(k), direct.plain_form(v)
        if None in forms:
            raise TypeError(
                f"q, k and v must be plain torch.Tensors, got {type(q).__name__}, {type(k).__name__}, {type(v).__name__}"
            )
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if forms != self._forms or needs_grad is not self._needs_grad:
            self._refuse(forms, needs_grad)
        if attention_mask is not None or key_padding_mask is not None or self._masked != (False, False):
            self._check_masks(attention_mask, key_padding_mask)
        drawn = as_seed(seed) if self._drops else None
        call = self._call
        if call.successor is not None:
            call = self._call = call.successor
        tensors = tensors_of(q, k, v, options, drawn)
        return AttentionState(*direct.run_prepared(call, self._key, tensors, self._environment))

    def _refuse(self, forms: tuple[Any, ...], needs_grad: bool) -> None:
        for name, of_prepared, of_given in zip("qkv", self._forms, forms, strict=True):
            for part, expected, came in zip(
                ("shape", "strides", "dtype", "device"), of_prepared, of_given, strict=True
            ):
                if expected != came:
                    raise ValueError(
                        f"{name} must have the {part} that was prepared, {_text(expected)}, got {_text(came)}"
                    )
        raise ValueError(
            f"q, k and v must want gradients as prepared, {self._needs_grad}, got {needs_grad}: prepare with tensors that require them"
        )

    def _check_masks(self, attention_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
        masks = {"attention_mask": attention_mask, "key_padding_mask": key_padding_mask}
        for (name, x), expected in zip(masks.items(), self._beside, strict=True):
            came = described(x) if isinstance(x, Tensor) else None
            if came != expected or (x is not None and x.requires_grad):
                raise ValueError(
                    f"{name} must be as prepared, {_text(expected)} (shape, strides, dtype), got {_text(came)}"
                )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return str(tuple(value))
    return "cpu" if value is None else str(value)


def prepare(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    score_terms: ScoreTerms = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
    environment: Environment | None = None,
) -> PreparedAttention:
    """Check a call of `attend` and look it up, once, without computing it. Arguments mean what they mean there.

    Args:
        pattern: who sees whom.
        q, k, v: tensors of the shapes, strides, dtypes and devices that calls will have; what they hold is not read. Where one of them
            requires grad, calls are differentiable.
        softmax_scale: None or a number; where it is a tensor, multiply q by it and prepare with 1.0.
        attention_mask, key_padding_mask: likewise; a call must then be given such masks. A bias that requires grad cannot be prepared.
        score_terms: those of every call; what their tensors hold is read at each. Ones that require grad cannot be prepared.

    Returns:
        An object to call with (q, k, v), masks as prepared, and a seed where dropout_p is not 0.

    Raises:
        TypeError, ValueError: a bad argument, by name; no row fits; or tensors that are not plain.

    Example:
        >>> q, k, v = torch.randn(3, 1, 16, 2, 8)
        >>> step = prepare(Full(), q, k, v)
        >>> step(q, k, v).out.shape
        torch.Size([1, 16, 2, 8])
    """
    if isinstance(pattern, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
        pattern.canonical()
    if isinstance(softmax_scale, Tensor):
        raise TypeError(
            f"softmax_scale must be None or a number where a call is prepared, got a tensor {tuple(softmax_scale.shape)}: multiply q by it and "
            "prepare with 1.0"
        )
    # True and what is refused stay as they are: the call's own checks name them.
    if type(softmax_scale) is int:
        softmax_scale = check_scale(softmax_scale)
    if type(dropout_p) is int:
        dropout_p = check_dropout("dropout_p", dropout_p)
    options = Options(
        attention_mask, key_padding_mask, score_terms, environment, deterministic, is_causal, softmax_scale, dropout_p, backend, out_dtype
    )  # fmt: skip
    return PreparedAttention(q, k, v, pattern, options)


def prepared_stats() -> dict[str, object]:
    """Of the memo of prepared calls of this process: `hits misses hit_rate evictions size max_size`."""
    return PREPARED.get_stats()
