"""A plan as bytes, and back: for other processes, and for a digest that says whether two plans are the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from longattn.patterncache.indices import Affine, Index, Listed
from longattn.patterncache.plan import Band, Branch, Plan
from longattn.patterncache.planning.packed_lists import Narrow, pack_plan
from longattn.patterncache.spans import Rectangle, Span, check_kind, shortened

_KINDS = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<i8")
_MOST = 1 << 62

_MAGIC = b"longattn plan 1\n"


def plan_to_bytes(plan: Plan) -> bytes:
    """Equal bytes for equal plans, packed or not, on every machine: a line of JSON, then the packed lists, little-endian."""
    check_kind("plan", plan, Plan)
    lists: list[bytes] = []
    r = plan.rectangle
    head = {
        "rectangle": [r.num_heads, _spans(r.queries), _spans(r.keys), _spans((r.heads,))],
        "branches": [
            [
                _spans((b.heads,)),
                _index_head(b.q, lists),
                _index_head(b.k, lists),
                list(b.q_at),
                list(b.k_at),
                None if b.band is None else [b.band.low, b.band.high],
            ]
            for b in plan.branches
        ],
    }
    return _MAGIC + json.dumps(head, separators=(",", ":")).encode() + b"\n" + b"".join(lists)


class _MalformedPlan(ValueError):
    """What is wrong with bytes, for the error of `plan_from_bytes`."""


def plan_from_bytes(data: bytes) -> Plan:
    """The plan of `plan_to_bytes`, its lists packed.

    Raises:
        TypeError: data is no bytes.
        ValueError: they are none of `plan_to_bytes`.
    """
    if not isinstance(data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"data must be bytes, got {shortened(data)} ({type(data).__name__})")
    try:
        if not data.startswith(_MAGIC):
            raise _MalformedPlan(f"they must begin with {_MAGIC!r}")
        end = data.index(b"\n", len(_MAGIC))
        head = json.loads(data[len(_MAGIC) : end])
        rest = memoryview(data)[end + 1 :]
        num_heads, queries, keys, heads = head["rectangle"]
        rectangle = Rectangle(num_heads, _read_spans(queries), _read_spans(keys), *_read_spans(heads))
        branches: list[Branch] = []
        for its_heads, q_head, k_head, q_at, k_at, band in head["branches"]:
            q, rest = _read_index(q_head, rest)
            k, rest = _read_index(k_head, rest)
            its_band = None if band is None else Band(*(None if bound is None else _integer(bound) for bound in band))
            (group,) = _read_spans(its_heads)
            branch = Branch(group, q, k, (int(q_at[0]), int(q_at[1])), (int(k_at[0]), int(k_at[1])), its_band)
            _check_branch(branch, rectangle)
            branches.append(branch)
        if len(rest):
            raise _MalformedPlan(f"{len(rest)} bytes too many")
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, RecursionError) as error:
        why = f"{error}"[:200]
        raise ValueError(f"data must be the bytes of plan_to_bytes, got {len(data)} other bytes: {why}") from error
    return pack_plan(Plan(rectangle, tuple(branches)))


def _integer(value: object) -> int:
    """An integer of at most 62 bits: sums of two stay within int64."""
    if type(value) is not int or abs(value) > _MOST:
        raise _MalformedPlan(f"{value!r} is no integer of at most 62 bits")
    return value


def _check_branch(branch: Branch, rectangle: Rectangle) -> None:
    """Raise _MalformedPlan unless rows and heads lie in the rectangle, and positions are the rectangle's own."""
    heads, queries, keys = rectangle.shape
    if branch.heads.length and branch.heads.last >= heads:
        raise _MalformedPlan(f"heads {branch.heads} of {heads}")
    if branch.q.tiles != branch.k.tiles:
        raise _MalformedPlan(f"{branch.q.tiles} tiles of queries and {branch.k.tiles} of keys")
    for index, at, spans, length in (
        (branch.q, branch.q_at, rectangle.queries, queries),
        (branch.k, branch.k_at, rectangle.keys, keys),
    ):
        first, last = _row_range(index)
        if not 0 <= first <= last < length:
            raise _MalformedPlan(f"rows {first} to {last} of {length}")
        row = 0
        for span in spans:
            if row <= first < row + span.length:
                if last >= row + span.length or at != (span.start - row * span.step, span.step):
                    raise _MalformedPlan(f"rows {first} to {last} at {at}, in the span {span} from row {row} on")
                break
            row += span.length
    if not branch.q.distinct:
        raise _MalformedPlan("a query row in two tiles")


def _row_range(index: Index) -> tuple[int, int]:
    """First and last row of an index that has some, with steps forward."""
    if index.step < 1 or index.tiles < 1 or index.count < 1:
        raise _MalformedPlan(f"{index.tiles} tiles of {index.count} rows, {index.step} apart")
    if isinstance(index, Affine):
        if index.tile_step < 0:
            raise _MalformedPlan(f"tiles {index.tile_step} apart")
        return index.start, index.start + (index.tiles - 1) * index.tile_step + (index.count - 1) * index.step
    if index.run < 1:
        raise _MalformedPlan(f"runs of {index.run} rows")
    starts = index.starts
    return int(starts.min()), int(starts.max()) + (index.run - 1) * index.step


def plan_digest(plan: Plan) -> str:
    """SHA-256 of `plan_to_bytes`, in hexadecimal digits: equal for equal plans, in every process."""
    return hashlib.sha256(plan_to_bytes(plan)).hexdigest()


def _spans(spans: tuple[Span, ...]) -> list[list[int]]:
    return [list(span.numbers) for span in spans]


def _read_spans(spans: list[list[int]]) -> tuple[Span, ...]:
    return tuple(Span(*map(_integer, span)) for span in spans)


def _index_head(index: Index, lists: list[bytes]) -> list[Any]:
    if isinstance(index, Affine):
        return [index.start, index.tiles, index.tile_step, index.count, index.step]
    # Packed again, so that equal plans have equal bytes whether or not their lists are packed.
    narrow = Narrow.of(index.starts, index.run * index.step)
    kind = narrow.values.dtype.newbyteorder("<")
    lists.append(np.ascontiguousarray(narrow.values, dtype=kind).tobytes())
    return [index.run, index.step, narrow.base, narrow.unit, narrow.axis, kind.str, list(narrow.values.shape)]


def _read_index(head: list[Any], rest: memoryview) -> tuple[Index, memoryview]:
    if len(head) == 5:
        return Affine(*map(_integer, head)), rest
    run, step, base, unit, axis, kind, shape = head
    run, step, base, unit = map(_integer, (run, step, base, unit))
    if kind not in _KINDS or axis not in (None, 0, 1) or len(shape) != 2 or min(map(_integer, shape)) < 1:
        raise _MalformedPlan(f"a list of kind {kind!r}, axis {axis!r} and shape {shape!r}")
    nbytes = shape[0] * shape[1] * np.dtype(kind).itemsize
    if nbytes > len(rest):
        raise _MalformedPlan(f"a list of {nbytes} bytes in {len(rest)}")
    values: npt.NDArray[np.integer] = np.frombuffer(rest[:nbytes], np.dtype(kind)).reshape(shape)  # type: ignore[assignment]
    return Listed(Narrow(values, base, unit, axis).widen(), run, step), rest[nbytes:]
