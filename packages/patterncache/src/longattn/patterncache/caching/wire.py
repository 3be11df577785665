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
from longattn.patterncache.spans import Rectangle, Span

_MAGIC = b"longattn plan 1\n"


def plan_to_bytes(plan: Plan) -> bytes:
    """Equal bytes for equal plans, packed or not, on every machine: a line of JSON, then the packed lists, little-endian."""
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


def plan_from_bytes(data: bytes) -> Plan:
    """The plan of `plan_to_bytes`, its lists packed.

    Raises:
        ValueError: data is no such bytes.
    """
    try:
        if not data.startswith(_MAGIC):
            raise ValueError("another beginning")
        end = data.index(b"\n", len(_MAGIC))
        head = json.loads(data[len(_MAGIC) : end])
        rest = memoryview(data)[end + 1 :]
        num_heads, queries, keys, heads = head["rectangle"]
        rectangle = Rectangle(num_heads, _read_spans(queries), _read_spans(keys), *_read_spans(heads))
        branches = []
        for its_heads, q_head, k_head, q_at, k_at, band in head["branches"]:
            q, rest = _read_index(q_head, rest)
            k, rest = _read_index(k_head, rest)
            seen = None if band is None else Band(*band)
            (group,) = _read_spans(its_heads)
            branches.append(Branch(group, q, k, (q_at[0], q_at[1]), (k_at[0], k_at[1]), seen))
        if len(rest):
            raise ValueError(f"{len(rest)} bytes too many")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data must be the bytes of plan_to_bytes, got {len(data)} others: {error}") from error
    return pack_plan(Plan(rectangle, tuple(branches)))


def plan_digest(plan: Plan) -> str:
    """SHA-256 of `plan_to_bytes`, in hexadecimal digits: equal for equal plans, in every process."""
    return hashlib.sha256(plan_to_bytes(plan)).hexdigest()


def _spans(spans: tuple[Span, ...]) -> list[list[int]]:
    return [[span.start, span.length, span.step] for span in spans]


def _read_spans(spans: list[list[int]]) -> tuple[Span, ...]:
    return tuple(Span(*span) for span in spans)


def _index_head(index: Index, lists: list[bytes]) -> list[Any]:
    if isinstance(index, Affine):
        return [index.start, index.tiles, index.tile_step, index.count, index.step]
    # Packed anew, so that the bytes do not depend on whether it was.
    narrow = Narrow.of(index.starts, index.run * index.step)
    kind = narrow.values.dtype.newbyteorder("<")
    lists.append(np.ascontiguousarray(narrow.values, dtype=kind).tobytes())
    return [index.run, index.step, narrow.base, narrow.unit, narrow.axis, kind.str, list(narrow.values.shape)]


def _read_index(head: list[Any], rest: memoryview) -> tuple[Index, memoryview]:
    if len(head) == 5:
        return Affine(*head), rest
    run, step, base, unit, axis, kind, shape = head
    nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    values: npt.NDArray[np.integer] = np.frombuffer(rest[:nbytes], np.dtype(kind)).reshape(shape)  # type: ignore[assignment]
    return Listed(Narrow(values, base, unit, axis).widen(), run, step), rest[nbytes:]
