"""`longattn::scheduled_attend` and its backward: the opaque border to torch, for a whole schedule.

Which tensors travel between processes, and which rectangles are empty, is known only at run time, so a whole schedule is one op to
traced code: it crosses as its canonical string. The arguments are those of `longattn::attend`; q_spans and k_spans are of all queries and
keys, and empty where only all ranks together know them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longattn.attention.schedules import driver as scheduled
from longattn.attention.schedules.documents import in_documents
from longattn.attention.schedules.layouts import flat
from longattn.attention.schedules.local import Local
from longattn.attention.schedules.passes import ScheduleWork, query_spans
from longattn.attention.schedules.registry import parse_schedule
from longattn.kernels.interface import (
    Cotangents,
    Gradients,
    OpArguments,
    OpTensors,
    define,
    find_environment,
    find_plan,
    second_gradients,
    visible_pairs,
)

LIBRARY = torch.library.Library("longattn", "FRAGMENT")


def _compute(tensors: OpTensors, arguments: OpArguments) -> tuple[Tensor, Tensor]:
    if tensors.prior_out is not None:
        raise NotImplementedError("longattn::scheduled_attend takes no prior; merge with longattn.kernels.merge")
    if tensors.cu_seqlens is not None:
        tensors, arguments = in_documents(tensors, arguments)
    environment = find_environment(arguments.env)
    work = ScheduleWork((tensors.q,), tensors, arguments, environment)
    schedule = parse_schedule(arguments.schedule)
    with schedule.underway():
        return scheduled.forward(schedule.start(work), arguments, environment, tensors.v.shape[3])


def _differentiate(cotangents: Cotangents, tensors: OpTensors, arguments: OpArguments) -> Gradients:
    if tensors.cu_seqlens is not None:
        tensors, arguments = in_documents(tensors, arguments)
    environment = find_environment(arguments.env, may_be_gone=True)
    grad_out, grad_lse, out, lse = cotangents
    queries = (tensors.q, grad_out, out, lse, *(() if grad_lse is None else (grad_lse,)))
    work = ScheduleWork(queries, tensors, arguments, environment)
    schedule = parse_schedule(arguments.schedule)
    with schedule.underway():
        dq, dk, dv, dbias, added = scheduled.backward(schedule.start(work), arguments, environment)
    dq, dk, dv = (gradient.to(tensors.q.dtype) for gradient in (dq, dk, dv))
    return dq, dk, dv, None if dbias is None or tensors.bias is None else dbias.to(tensors.bias.dtype), added


def _pairs(q: Any, k: Any, arguments: OpArguments) -> int:
    # Of the whole, where all of it is here. Documents that are data are not known here: as if they were one.
    if parse_schedule(arguments.schedule).distributed:
        return 0
    spans = query_spans(arguments, q[1], k[1])
    whole = arguments._replace(q_spans=flat(spans), k_spans=[0, k[1], 1])
    return visible_pairs(find_plan(whole, find_environment("")))


def _differentiate_twice(
    above: list[Tensor | None], cotangents: Cotangents, tensors: OpTensors, arguments: OpArguments
) -> list[Tensor | None]:
    if tensors.cu_seqlens is not None:
        tensors, arguments = in_documents(tensors, arguments)
    schedule = parse_schedule(arguments.schedule)
    if type(schedule) is not Local:
        raise NotImplementedError(f"second derivatives are not supported under {schedule}: use Local()")
    environment = find_environment(arguments.env, may_be_gone=True)
    return second_gradients(above, cotangents, tensors, arguments._replace(schedule=""), environment)


scheduled_attend = define(LIBRARY, "scheduled_attend", _compute, _differentiate, _pairs, _differentiate_twice)
"""Attend under a schedule; arguments are checked, and whether gradients are wanted is filled in."""
