"""DTensors sharded on the sequence: each rank's part is attended under a ring over that dimension of their mesh.

Sharded on the heads (a tensor-parallel module's), each rank attends for its heads, by their numbers among all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.callers import calls_over
from longattn.attention.schedules.group import Members
from longattn.attention.schedules.layouts import rows_by_rank
from longattn.attention.schedules.place import Place
from longattn.attention.schedules.ring import Ring
from longattn.attention.schedules.transport import gather_integers
from longattn.attention.validate import integers
from longattn.kernels.interface import as_seed, as_terms, sharding_module, tensors_in, with_tensors

_sharding = sharding_module()
check_placements, dimension_of, chunks = _sharding.check_placements, _sharding.dimension_of, _sharding.chunks
first_head, placements_beside, placed_like = _sharding.first_head, _sharding.placements_beside, _sharding.placed_like

Attention = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, **options) to (out, lse)."""

_AXES = {
    "key_padding_mask": (0, 1, None),
    "attention_mask": (-4, -2, -3),
    "positions_start": (0, None, None),
    "sink_logits": (None, None, 0),
    "softmax_scale": (None, None, 0),
    "slopes": (None, None, 0),
    "table": (None, None, 1),
}
"""Options that may be DTensors: which axes are the batch's, the sequence's and the heads'. Counted from the end, an axis of one row is the
same on every rank."""


def sharded_attention(
    attend_local: Attention, q: Any, k: Any, v: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """out and lse as DTensors placed as q, differentiable. Plain masks in `options` are this rank's part, as for a `Ring`.

    Args:
        whole: attends to this rank's part.
        q, k, v: DTensors with equal placements: the sequence and the heads each sharded over at most one mesh dimension, the batch over
            any others. A key head is on the rank of its query heads.
        options: of `pattern_attention`; a schedule in one process is replaced by a contiguous Ring over the mesh dimension of the sequence.

    Raises:
        TypeError, ValueError: not all DTensors, other placements, different ones, or a schedule over other ranks, by name.
    """
    check_placements({"q": q, "k": k, "v": v})
    options = local_options(q, options) | {"schedule": schedule_over(q, k, options["schedule"])}
    options["head_start"], options["num_heads"] = heads_here(q, k, options["head_start"], options["num_heads"])
    if options.get("dropout_p"):
        options["seed"] = _shared_seed(q, options.get("seed"))
    out, lse = attend_local(q.to_local(), k.to_local(), v.to_local(), **options)
    return placed_like(out, q, (*q.shape[:3], v.shape[3])), placed_like(lse, q, q.shape[:3])


def heads_here(q: DTensor, k: DTensor, head_start: int | None, num_heads: int | None) -> tuple[int | None, int | None]:
    """(the first of this rank's query heads, query heads of all ranks): as given, where the heads are not sharded.

    Raises:
        ValueError: both given and sharded, or shards in which a rank has no head, or a query head without its key head.
    """
    if dimension_of(q, 2) is None:
        return head_start, num_heads
    if head_start is not None or num_heads is not None:
        raise ValueError(
            f"head_start and num_heads must be None where q's heads are sharded, got {head_start} and {num_heads}"
        )
    return first_head(q, k), q.shape[2]


def schedule_over(q: DTensor, k: DTensor, schedule: Schedule | None) -> Schedule | None:
    """The schedule that attends to DTensors with the sequence on axis 1, where `schedule` is asked for.

    One process's schedules become a Ring over the ranks that hold the sequence: they give the same numbers, and each has all keys. Where the
    placements do not cut the sequence, a schedule over ranks of other mesh dimensions has it cut: tensor parallel under a ring.

    Raises:
        ValueError: other placements, or a schedule whose ranks or rows are not those of the placements.
    """
    check_placements({"query": q, "key": k})
    along, over_group = dimension_of(q, 1), schedule is not None and schedule.distributed
    if along is None:
        if over_group and not _apart(q, schedule):
            raise ValueError(
                f"schedule must be None or in one process where no rank has only a part of the sequence, or over another mesh dimension, "
                f"got {schedule} for {q.placements} on {q.device_mesh}"
            )
        return schedule
    return _checked(q, k, along, schedule) if over_group else _ring_over(q, k, along)


def _apart(q: DTensor, schedule: Any) -> bool:
    """Whether this rank is the only one that is in the mesh of q and in a group of the schedule."""
    ranks = set(integers(q.device_mesh.mesh.flatten()))
    while schedule is not None and schedule.distributed:
        members = getattr(schedule, "members", None)
        if not isinstance(members, Members) or len(ranks & set(members.place.members())) > 1:
            return False
        schedule = getattr(schedule, "inner", None)
    return True


def _checked(q: DTensor, k: DTensor, along: int, schedule: Any) -> Schedule:
    """That schedule, if it is over the sequence's mesh dimension and cuts as DTensor does. All ranks see the same."""
    if not _fits(q, k, along, schedule):
        raise ValueError(
            f"schedule must be None, in one process, or a contiguous one over the ranks and rows of the placements of q, "
            f"{q.placements} on {q.device_mesh}, got {schedule}"
        )
    return schedule


def _fits(q: DTensor, k: DTensor, along: int, schedule: Any) -> bool:
    members, inner = getattr(schedule, "members", None), getattr(schedule, "inner", None)
    if not isinstance(members, Members) or (inner is not None and inner.distributed):
        return False
    if members.place != Place.of(q.device_mesh.get_group(along)):
        return False
    if members.lengths_known:
        held = rows_by_rank(members.laid_out(q.shape[1]))
        if any(held != chunks(x, along, 1) for x in (q, k)):
            return False
    return members.layout == "contiguous" or members.place.size == 1


def local_options(like: DTensor, options: dict[str, Any]) -> dict[str, Any]:
    """Options of `pattern_attention` with each DTensor among them as this rank's part of it; plain tensors are that already."""
    return {
        name: _local_terms(x, like)
        if name == "score_terms"
        else _local(name, x, like)
        if name in _AXES and isinstance(x, DTensor)
        else x
        for name, x in options.items()
    }


def _local_terms(terms: Any, like: DTensor) -> Any:
    """Score terms whose tensors are DTensors that every rank has whole, with these; each rank gives its share of their gradients."""
    held = tensors_in(as_terms(terms))
    if not any(isinstance(x, DTensor) for x in held):
        return terms
    names = ("slopes", "table")  # by the number of axes
    local = [_local(names[x.dim() - 1], x, like) if isinstance(x, DTensor) else x for x in held]
    return with_tensors(as_terms(terms), local)


def _local(name: str, x: DTensor, like: DTensor) -> Tensor:
    if x.device_mesh != like.device_mesh:
        raise ValueError(f"{name} must be on the mesh of q, {like.device_mesh}, got {x.device_mesh}")
    placements, gradients = placements_beside(_AXES[name], x, like)
    return x.redistribute(placements=placements).to_local(grad_placements=gradients)


def on_local(function: Callable[[Tensor], Tensor], x: DTensor) -> Tensor:
    """`function` of x, row by row: of its local part, placed as it was."""
    return placed_like(function(x.to_local()), x, x.shape)


def moved(placements: Any, axes: dict[int, int]) -> tuple[Any, ...]:
    """Placements of a tensor whose axes stand elsewhere: {axis: where it is now}."""
    axis_of = [cast(Any, p).dim if isinstance(p, Shard) else None for p in placements]
    return tuple(p if at is None else Shard(axes.get(at, at)) for p, at in zip(placements, axis_of, strict=True))


def _ring_over(q: DTensor, k: DTensor, along: int) -> Ring:
    lengths = chunks(q, along, 1) if q.shape[1] == k.shape[1] else None
    return Ring(q.device_mesh.get_group(along), lengths=lengths)


def _shared_seed(q: DTensor, seed: Any) -> Tensor:
    """One seed on all ranks that hold the same elements: a ring exchanges its own; ranks of other dimensions exchange it here.

    Raises:
        ValueError: the batch is sharded: what is dropped depends on an element's place in the whole batch.
    """
    shared = as_seed(seed)
    for dimension, placement in enumerate(q.placements):
        if q.device_mesh.size(dimension) == 1 or placement == Shard(1):
            continue
        if placement == Shard(0):
            raise ValueError(
                f"dropout_p must be 0 where the batch is sharded, got placements {q.placements}: pairs are dropped by their place in "
                f"the whole batch; give local tensors and a schedule"
            )
        calls = calls_over(Place.of(q.device_mesh.get_group(dimension)))
        shared = gather_integers(calls, "seed", (int(shared),))[0, 0]
    return shared
