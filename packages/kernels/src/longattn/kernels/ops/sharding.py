"""DTensors through `longattn::attend` and its backward: each rank attends for its batch elements and its heads, and nothing is exchanged.

torch's sharding strategies choose placements, but hand the op's other arguments on as they are; a rank's heads need their numbers among all, so
these are rules of dispatch instead. A sequence that is sharded needs a schedule over its ranks, which `longattn.attention` has.

Importing this module registers the rules. torch's own module for DTensors is heavy: `entry.sharding_module` imports this one when the first comes.
"""

# torch's own types are partial.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from longattn.kernels.ops.arguments import GRADED, TENSORS, Cotangents, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import LIBRARY
from longattn.kernels.ops.define import wanted_gradients

Axes = tuple["int | None", "int | None", "int | None"]
"""Which axes of a tensor are the batch's, the sequence's and the heads'; from the end, where an axis of one row is the same for all."""

_BROADCAST: Axes = (-4, -2, -3)
_AXES: dict[str, Axes] = {
    "bias": _BROADCAST,
    "mask": _BROADCAST,
    "key_padding": (0, 1, None),
    "by_distance": (None, None, 0),
}
_PLACED_AS_Q = ("q", "k", "v", "prior_out", "prior_lse")
_BESIDE = len(Cotangents._fields)
_GRADED = OpTensors._fields[:GRADED]


def check_placements(tensors: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless all are DTensors placed as the first is."""
    names = list(tensors)
    first = tensors[names[0]]
    for name, x in tensors.items():
        if not isinstance(x, DTensor):
            others = ", ".join(names[:-1])
            raise TypeError(
                f"{name} must be a DTensor where another of {others} and {names[-1]} is one, got {type(x).__name__}"
            )
        if x.placements != first.placements or x.device_mesh != first.device_mesh:
            raise ValueError(f"{name} must have the placements of {names[0]}, {first.placements}, got {x.placements}")


def dimension_of(q: DTensor, axis: int) -> int | None:
    """The mesh dimension over which the sequence (axis 1) or the heads (2) are sharded, or None.

    Raises:
        ValueError: q is placed as no attention is cut.
    """
    cut: list[int] = [cast(Any, placement).dim for placement in q.placements if isinstance(placement, Shard)]
    known = all(placement == Replicate() or type(placement) is Shard for placement in q.placements)
    if not known or max(cut, default=0) > 2 or cut.count(1) > 1 or cut.count(2) > 1:
        raise ValueError(
            f"q must have its sequence and its heads sharded over one mesh dimension each at most, and its batch over others, "
            f"got {q.placements}"
        )
    return q.placements.index(Shard(axis)) if axis in cut else None


def chunks(x: DTensor, along: int, axis: int) -> list[int]:
    """Rows of each rank: DTensor cuts as torch.chunk does: equal chunks, rounded up, and what is left."""
    ranks, length = x.device_mesh.size(along), x.shape[axis]
    chunk = -(-length // ranks)
    return [max(0, min(chunk, length - chunk * rank)) for rank in range(ranks)]


def first_head(q: DTensor, k: DTensor) -> int:
    """The number of this rank's first query head among those of q.

    Raises:
        ValueError: shards in which a rank has no head, or a query head without its key head.
    """
    along = dimension_of(q, 2)
    if along is None:
        return 0
    queries, keys = chunks(q, along, 2), chunks(k, along, 2)
    group = q.shape[2] // max(1, k.shape[2])
    if 0 in queries or queries != [group * held for held in keys]:
        raise ValueError(
            f"k must have its heads cut where those of q are, at least one on each rank, got query heads {queries} and key heads {keys} "
            f"on the ranks of {q.device_mesh}"
        )
    return sum(queries[: q.device_mesh.get_local_rank(along)])


def placements_beside(axes: Axes, x: Tensor, like: DTensor) -> tuple[list[Placement], list[Placement]]:
    """How a tensor of these axes is placed beside q, and its gradient: what ranks with other rows share has a part of its gradient on each."""
    placements: list[Placement] = []
    gradients: list[Placement] = []
    for placement in like.placements:
        cut: int | None = cast(Any, placement).dim if isinstance(placement, Shard) else None
        axis = None if cut is None else axes[cut]
        if axis is None or x.dim() < (-axis if axis < 0 else axis + 1) or (axis < 0 and x.shape[axis] == 1):
            placements.append(Replicate())
        else:
            placements.append(Shard(axis % x.dim()))
        shared = placements[-1] == Replicate() and placement != Replicate()
        gradients.append(Partial() if shared else placements[-1])
    return placements, gradients


def placed_like(x: Tensor, like: DTensor, shape: Any, placements: Any = None) -> Tensor:
    """This rank's part as a DTensor of a shape on the mesh of `like`; placements: default its own."""
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    placements_of_x = like.placements if placements is None else placements
    return DTensor.from_local(
        x, like.device_mesh, placements_of_x, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def _local_call(tensors: OpTensors, arguments: OpArguments) -> tuple[OpTensors, OpArguments]:
    """This rank's part of a call of the op.

    Raises:
        TypeError, ValueError: tensors that are no DTensors, or placed as this op cannot attend, by name.
    """
    check_placements(
        {name: x for name in _PLACED_AS_Q if (x := getattr(tensors, name)) is not None or name in ("q", "k", "v")}
    )
    q = cast(DTensor, tensors.q)
    if dimension_of(q, 1) is not None:
        raise ValueError(
            f"q must have its sequence whole on every rank, got {q.placements}; longattn.attention.pattern_attention takes a sharded one, as "
            f"a ring over its ranks"
        )
    if arguments.dropout_p:
        raise ValueError(
            f"dropout_p must be 0 for DTensors, got {arguments.dropout_p}; ranks agree on a seed under longattn.attention.pattern_attention"
        )
    local: dict[str, Any] = {}
    for name, x in zip(OpTensors._fields, tensors, strict=True):
        if name in _AXES and x is not None:
            if not isinstance(x, DTensor):
                raise TypeError(f"{name} must be a DTensor where q is one, got {type(x).__name__}")
            x = x.redistribute(placements=placements_beside(_AXES[name], x, q)[0])
        local[name] = x.to_local() if isinstance(x, DTensor) else x
    total, first, _ = arguments.heads
    heads = [total, first + first_head(q, cast(DTensor, tensors.k)), local["q"].shape[2]]
    return OpTensors(**local), arguments._replace(heads=heads)


def _inputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Any, ...]:
    """What the op was called with, in the order of its schema, which has no defaults."""
    return (*args, *((kwargs or {})[argument.name] for argument in func._schema.arguments[len(args) :]))


def _attend(cls: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Tensor, Tensor]:
    inputs = _inputs(func, args, kwargs)
    tensors = OpTensors(*inputs[:TENSORS])
    local, arguments = _local_call(tensors, OpArguments(*inputs[TENSORS:]))
    out, lse = func(*local, *arguments)
    q = cast(DTensor, tensors.q)
    return placed_like(out, q, (*q.shape[:3], tensors.v.shape[3])), placed_like(lse, q, q.shape[:3])


def _attend_backward(cls: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Tensor, ...]:
    inputs = _inputs(func, args, kwargs)
    tensors = OpTensors(*inputs[_BESIDE:][:TENSORS])
    local, arguments = _local_call(tensors, OpArguments(*inputs[_BESIDE + TENSORS :]))
    q = cast(DTensor, tensors.q)
    # Gradients may come placed otherwise, such as replicated by a loss over the whole.
    beside = _parts(("q",) * _BESIDE, inputs[:_BESIDE], q)
    gradients: list[Tensor] = list(func(*beside, *local, *arguments))
    given = [x if wanted else None for x, wanted in zip(tensors, wanted_gradients(arguments), strict=False)]
    return _gradients_of(_GRADED, given, gradients, q)


def _attend_second(cls: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Tensor, ...]:
    inputs = _inputs(func, args, kwargs)
    above, beside, rest = inputs[:GRADED], inputs[GRADED : GRADED + _BESIDE], inputs[GRADED + _BESIDE :]
    tensors = OpTensors(*rest[:TENSORS])
    local, arguments = _local_call(tensors, OpArguments(*rest[TENSORS:]))
    q = cast(DTensor, tensors.q)
    # A gradient is placed as what it is of; that of a sum over ranks is the same for each of its parts.
    parts = (*_parts(_GRADED, above, q), *_parts(("q",) * _BESIDE, beside, q))
    gradients: list[Tensor] = list(func(*parts, *local, *arguments))
    return _gradients_of((*("q",) * _BESIDE, *_GRADED), (*beside, *tensors[:GRADED]), gradients, q)


def _parts(names: Sequence[str], given: Sequence[Any], q: DTensor) -> list[Tensor | None]:
    """This rank's part of each, placed as the tensor of its name is beside q."""
    return [
        None if x is None else x.redistribute(placements=_placements(name, x, q)[0]).to_local()
        for name, x in zip(names, given, strict=True)
    ]


def _gradients_of(
    names: Sequence[str], given: Sequence[Any], gradients: list[Tensor], q: DTensor
) -> tuple[Tensor, ...]:
    """DTensors of this rank's parts of gradients of what was given; the others as they are."""
    return tuple(
        gradient if x is None else placed_like(gradient, q, x.shape, _placements(name, x, q)[1])
        for name, x, gradient in zip(names, given, gradients, strict=True)
    )


def _placements(name: str, x: DTensor, q: DTensor) -> tuple[Sequence[Placement], Sequence[Placement]]:
    """Of an input of the op and of its gradient."""
    return placements_beside(_AXES[name], x, q) if name in _AXES else (q.placements, q.placements)


for _name, _rule in (("attend", _attend), ("attend_backward", _attend_backward), ("attend_second", _attend_second)):
    torch.library.register_torch_dispatch(f"longattn::{_name}", DTensor, _rule, lib=LIBRARY)
