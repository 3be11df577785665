"""Score terms: what is done to scaled scores by a rule, rather than by a tensor with a number for each pair.

1. `Softcap` bounds scaled scores: c * tanh(s / c) (Gemma 2, 2024, arXiv:2408.00118). It comes first, as in that model's own code: bias,
   mask and the terms below are added to what it leaves.
2. `Alibi` adds -slope * |i - j| (Press et al. 2022, arXiv:2108.12409).
3. `RelativeBias` adds a learned number for the bucket that the distance j - i falls into (T5, Raffel et al. 2020, arXiv:1910.10683).

The last two depend on head and distance alone, and T5's buckets end at a largest distance. So both are one small tensor, `by_distance`,
of (heads, 1) or (heads, 2 + 2 * L) numbers whatever the length of the sequence: a slope, then a number for each distance from -L to L. It
is made by torch operations, through which gradients go on to slopes and tables.
"""

# Arguments come as anything, and are checked here.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longattn.kernels.state import FLOATS, state_dtype
from longattn.patterncache.spans import shortened


@dataclass(frozen=True, slots=True)
class Softcap:
    """Scaled scores s become value * tanh(s / value), before anything is added to them.

    Args:
        value: a finite number > 0; scores then lie between -value and value.

    Raises:
        TypeError, ValueError: it is not.
    """

    value: float

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"value must be a finite number > 0, got {shortened(self.value)} ({type(self.value).__name__})"
            )
        if not 0 < self.value <= sys.float_info.max:
            raise ValueError(f"value must be a finite number > 0, got {shortened(self.value)}")


@dataclass(frozen=True, slots=True, eq=False)
class Alibi:
    """`-slopes[h] * abs(i - j)` is added to the score of query i and key j, whose positions these are.

    Args:
        slopes: (heads,) floating, one for each query head of the call, finite, with gradient. Negative ones favour what is far.

    Raises:
        TypeError, ValueError: no floating tensor of one axis.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        _check_floating("slopes", self.slopes, "(heads,)", 1)


@dataclass(frozen=True, slots=True, eq=False)
class RelativeBias:
    """table[bucket(j - i), h] is added to the score of query i and key j, whose positions these are: T5's relative attention bias.

    Half of the buckets of a side are for one distance each, the other half grows logarithmically up to `max_distance`, beyond which all
    share the last.

    Args:
        table: (num_buckets, heads) floating, a column for each query head of the call, finite, with gradient: the weight of T5's embedding.
        bidirectional: keys behind the query have buckets of their own, half of all. Default True. False: they share the first bucket.
        max_distance: from which distance on all is one bucket. Default 128.

    Raises:
        TypeError, ValueError: no floating tensor of two axes; too few buckets for one of each kind (4, and 2 where not bidirectional), or
            a max_distance that is no integer beyond the buckets of one distance.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        _check_floating("table", self.table, "(num_buckets, heads)", 2)
        if not isinstance(self.bidirectional, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"bidirectional must be True or False, got {shortened(self.bidirectional)} ({type(self.bidirectional).__name__})"
            )
        least = 4 if self.bidirectional else 2
        if self.table.shape[0] < least:
            raise ValueError(f"table must have at least {least} buckets, got {self.table.shape[0]}")
        if isinstance(self.max_distance, bool) or not isinstance(self.max_distance, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"max_distance must be an integer over {self.table.shape[0] // least}, got {shortened(self.max_distance)} "
                f"({type(self.max_distance).__name__})"
            )
        exact = self.table.shape[0] // least
        if self.max_distance <= exact:
            raise ValueError(
                f"max_distance must be an integer over {exact}, the distances that have a bucket of their own, got {self.max_distance}"
            )

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance j - i, int64, as T5's own code computes it, in float32.

        Raises:
            TypeError: distance is no tensor of integers.
        """
        if not isinstance(distance, Tensor) or distance.is_floating_point() or distance.is_complex():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"distance must be a tensor of integers, got {shortened(distance)} ({type(distance).__name__})"
            )
        count = self.table.shape[0] // (2 if self.bidirectional else 1)
        exact = count // 2
        far = distance.abs() if self.bidirectional else -distance.clamp(max=0)
        # Logarithms of distances below `exact` are made too, and not used: of 0 it would be -inf, whose integer is undefined.
        steps = torch.log(far.clamp(min=1).to(torch.float32) / exact) / math.log(self.max_distance / exact)
        large = (exact + (steps * (count - exact)).to(torch.int64)).clamp(max=count - 1)
        bucket = torch.where(far < exact, far, large)
        return bucket + count * (distance > 0) if self.bidirectional else bucket


ScoreTerm = Softcap | Alibi | RelativeBias
ScoreTerms = ScoreTerm | Sequence[ScoreTerm] | None
"""One term, or several, each of another kind, in any order."""


def _check_floating(name: str, x: Any, shape: str, axes: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a floating torch.Tensor {shape}, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating torch.Tensor {shape}, got {x.dtype}")
    if x.dim() != axes or not x.numel():
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def as_terms(terms: object, name: str = "score_terms") -> tuple[ScoreTerm, ...]:
    """The terms as a tuple.

    Raises:
        TypeError: something else than terms.
        ValueError: two of one kind.
    """
    if terms is None:
        return ()
    listed: Any = (terms,) if isinstance(terms, ScoreTerm) else terms
    if not isinstance(listed, (tuple, list)) or not all(isinstance(term, ScoreTerm) for term in listed):
        raise TypeError(
            f"{name} must be None, a Softcap, Alibi or RelativeBias, or a tuple of those, got {shortened(terms)} ({type(terms).__name__})"
        )
    kinds = [type(term) for term in listed]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"{name} must have each kind of term once, got {kinds.count(kind)} of {kind.__name__}")
    return tuple(listed)


def check_terms(terms: object, q: Tensor, name: str = "score_terms") -> tuple[ScoreTerm, ...]:
    """The terms as a tuple; tensors of theirs have the heads of q (batch, Nq, heads, head_dim), and are on its device.

    Raises:
        TypeError, ValueError: they are not, by name.
    """
    checked = as_terms(terms, name)
    for term in checked:
        if isinstance(term, Softcap):
            continue
        part, x = ("slopes", term.slopes) if isinstance(term, Alibi) else ("a table", term.table)
        if x.shape[-1] != q.shape[2]:
            raise ValueError(f"{name} must have {part} for the heads of q, {q.shape[2]}, got shape {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    return checked


def tensors_in(terms: Sequence[ScoreTerm]) -> list[Tensor]:
    """What the terms hold, in order."""
    return [term.slopes if isinstance(term, Alibi) else term.table for term in terms if not isinstance(term, Softcap)]


def with_tensors(terms: Sequence[ScoreTerm], tensors: Sequence[Tensor]) -> tuple[ScoreTerm, ...]:
    """The terms with other tensors in place of `tensors_in`."""
    rest = list(tensors)
    replaced: list[ScoreTerm] = []
    for term in terms:
        if isinstance(term, Alibi):
            term = Alibi(rest.pop(0))
        elif isinstance(term, RelativeBias):
            term = RelativeBias(rest.pop(0), term.bidirectional, term.max_distance)
        replaced.append(term)
    return tuple(replaced)


def of_heads(terms: Sequence[ScoreTerm], first: int, count: int) -> tuple[ScoreTerm, ...]:
    """The terms for some neighbouring heads."""
    return with_tensors(terms, [x[..., first : first + count] for x in tensors_in(terms)])


def softcap_of(terms: Sequence[ScoreTerm]) -> float:
    """The softcap's value; 0: none."""
    return next((float(term.value) for term in terms if isinstance(term, Softcap)), 0.0)


def by_distance_of(terms: Sequence[ScoreTerm], dtype: torch.dtype) -> Tensor | None:
    """What the terms add for each head and distance, as `by_distance`, for tensors of `dtype`; None: nothing. Differentiable."""
    slopes = next((term.slopes for term in terms if isinstance(term, Alibi)), None)
    relative = next((term for term in terms if isinstance(term, RelativeBias)), None)
    wide = state_dtype(dtype)
    if relative is None:
        return None if slopes is None else slopes.to(wide).unsqueeze(1)
    most = relative.max_distance
    distances = torch.arange(-most, most + 1, device=relative.table.device)
    table = relative.table.to(wide)[relative.buckets(distances)].t()
    first = table.new_zeros(table.shape[0], 1) if slopes is None else slopes.to(wide).unsqueeze(1)
    return torch.cat([first, table], 1)


def at_distances(by_distance: Tensor, distance: Tensor) -> Tensor:
    """(heads, *distance.shape): what is added at distances j - i, any integers."""
    slopes, table = by_distance[:, :1], by_distance[:, 1:]
    added = -slopes * distance.abs().to(by_distance.dtype).reshape(1, -1)
    if table.shape[1]:
        most = table.shape[1] // 2
        added = added + table[:, distance.clamp(-most, most).reshape(-1) + most]
    return added.unflatten(1, distance.shape) if distance.dim() != 1 else added


def add_gradients(total: Tensor, distance: Tensor, grads: Tensor) -> None:
    """Add to `total`, shaped like `by_distance`, its gradient from those of scores at distances: grads (heads, *distance.shape). In place."""
    grads = grads.flatten(1)
    total[:, 0] -= grads @ distance.abs().to(grads.dtype).reshape(-1)
    if total.shape[1] > 1:
        most = total.shape[1] // 2 - 1
        total[:, 1:].index_add_(1, distance.clamp(-most, most).reshape(-1) + most, grads)
