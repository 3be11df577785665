"""Packed documents: cumulative lengths as a pattern, and where packed queries stand.

In traced code they are data: cu_seqlens crosses into the op as a tensor, which reads it there, so that one graph serves every packing
of its shape. Else they are part of the pattern, read before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules.extents import Extents
from longattn.attention.schedules.layouts import count_rows, flat
from longattn.attention.schedules.registry import parse_schedule
from longattn.kernels.interface import OpArguments, OpTensors
from longattn.patterncache import Documents, Pattern, Span, parse_pattern


def documents_of(
    pattern: Pattern, cu_seqlens: Any, total: int, name: str = "cu_seqlens", here: int | None = None
) -> Documents:
    """The pattern within each document of a packed tensor of `total` tokens, of which this process has `here`; None: all.

    Raises:
        TypeError, ValueError: cu_seqlens is no rising sequence of integers from 0 to `total`.
    """
    documents = Documents(cu_seqlens, pattern)
    if documents.cu_seqlens[-1] != total:
        of_group = (
            ""
            if here in (None, total)
            else (
                f": the whole sequence's, the same on every rank of the schedule's group, though this rank holds {here} of its rows"
            )
        )
        raise ValueError(f"{name} must end with the packed length {total}{of_group}, got {documents.cu_seqlens[-1]}")
    return documents


def query_spans(cu_q: Sequence[int], cu_k: Sequence[int], positional: bool = True) -> tuple[Span, ...]:
    """Positions of packed queries: in each document, the last of its keys'.

    positional: whether more matters than the document. Where it does not, queries that outnumber its keys take their positions in turn.

    Raises:
        ValueError: another number of documents, or one with more queries than keys; without positions, one with queries and no keys.
    """
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens_q must have as many entries as cu_seqlens, got {len(cu_q)} and {len(cu_k)} entries"
        )
    spans: list[Span] = []
    for document, ((q_low, q_high), (k_low, k_high)) in enumerate(zip(pairwise(cu_q), pairwise(cu_k), strict=True)):
        queries, keys = q_high - q_low, k_high - k_low
        if queries > keys and (positional or not keys):
            excess = "more queries than keys" if positional else "queries without keys"
            raise ValueError(
                f"cu_seqlens_q must give no document {excess}, got {queries} and {keys} in document {document}"
            )
        while queries > keys:
            spans.append(Span(k_low, keys))
            queries -= keys
        spans.append(Span(k_high - queries, queries))
    return tuple(spans)


def packed_pattern(
    pattern: Pattern, cu_seqlens: Any, cu_seqlens_q: Any, extents: Extents
) -> tuple[Documents, list[int]]:
    """(the pattern within each document, positions of the whole's queries as flat spans, empty for the default ones).

    cu_seqlens are of the whole sequence, also where this process has some of its rows.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    documents = documents_of(pattern, cu_seqlens, extents.nk, here=count_rows(extents.k_rows))
    cu_q = documents.cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    queries = documents_of(pattern, cu_q, extents.nq, "cu_seqlens_q", count_rows(extents.q_rows))
    if queries.cu_seqlens == documents.cu_seqlens:
        return documents, []
    spans = [span for span in query_spans(queries.cu_seqlens, documents.cu_seqlens, pattern.positional) if span.length]
    return documents, flat(tuple(spans))


def check_packed(q: Tensor, k: Tensor, start: int | None, cu_seqlens: Any) -> None:
    """Raise ValueError unless tensors are packed, and nothing else says where queries are."""
    if cu_seqlens is None:
        raise ValueError("cu_seqlens must be given with cu_seqlens_q, got None: it is that of the keys")
    if start is not None:
        raise ValueError(f"q_start must be None where cu_seqlens says where queries are, got {start}")
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] != 1:
            raise ValueError(
                f"{name} must be packed as (1, total, heads, head_dim) where cu_seqlens is given, got {tuple(x.shape)}"
            )


def as_data(name: str, cu_seqlens: Any) -> Tensor | None:
    """cu_seqlens as the op takes it in traced code: (documents + 1,) integers, of whatever values.

    Raises:
        TypeError, ValueError: no such tensor, nor a sequence that makes one.
    """
    if cu_seqlens is None:
        return None
    ends = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(list(cu_seqlens), dtype=torch.int64)
    if ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ends.dtype}")
    if ends.dim() != 1 or ends.shape[0] < 2:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(ends.shape)}")
    return ends


def in_documents(tensors: OpTensors, arguments: OpArguments) -> tuple[OpTensors, OpArguments]:
    """A call whose documents are data (`tensors.cu_seqlens`) as one whose pattern has them. This is where they are read."""
    schedule, (nq, nk) = parse_schedule(arguments.schedule), (x.shape[1] for x in tensors[:2])
    # Of a schedule in one process, all rows are here.
    extents = schedule.extents(nq, nk, tensors.metadata) if schedule.distributed else Extents.of_whole(nq, nk)
    pattern = parse_pattern(arguments.pattern)
    documents, q_spans = packed_pattern(pattern, tensors.cu_seqlens, tensors.cu_seqlens_q, extents)
    arguments = arguments._replace(pattern=documents.canonical(), q_spans=q_spans or arguments.q_spans)
    return tensors._replace(cu_seqlens=None, cu_seqlens_q=None), arguments
