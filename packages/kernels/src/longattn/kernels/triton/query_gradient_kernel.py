# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""dq where queries own it, without atomics: three products, and the same bits every time.

Grid: (programs * batch,); program p of a batch element does jobs p, p + programs, ... Resident for a job: q and dO tiles, pivot and
delta of their rows, dq. Streamed: k and v tiles, dense entries first, then masked ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import (
    ENTRY_WIDTH,
    JOB_WIDTH,
    add_by_distance,
    find_positions,
    find_rows,
    hide,
    keep,
    load_tile,
    product,
    product_over_dims,
    tanh,
)


@triton.jit
def gather_dq(
    q, grad, dq, pivot, delta, begin, end, entries_ptr, weights_ptr, rows_ptr, batch, head, q_rows, q_positions, q_valid,
    q_ptr, q_base, q_strides, grad_ptr, grad_base, grad_strides, k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, dims, value_dims,
    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
    by_distance_ptr, cap, scale, seed, threshold, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    LISTED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq after the entries begin .. end."""
    for at in tl.range(begin, end):
        # one entry: HBM -> registers, for all its tiles
        entry = entries_ptr + at * ENTRY_WIDTH
        start, step, count = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        origin, unit = tl.load(entry + 4), tl.load(entry + 5)
        low, high = tl.load(entry + 6), tl.load(entry + 7)
        weight = tl.load(weights_ptr + at)
        for first in tl.range(0, count, BLOCK_N, disable_licm=True):
            offs_n = first + tl.arange(0, BLOCK_N)
            k_valid = offs_n < count
            k_rows = find_rows(rows_ptr, start, step, offs_n, count, LISTED)
            k_positions = find_positions(origin, unit, k_rows)
            # k tile: HBM -> SRAM, replaced every iteration
            k = load_tile(k_ptr, k_base, k_rows, k_strides[1], dims, k_strides[3], k_valid, HEAD_DIM, BLOCK_D, MASKED)
            scores = product_over_dims(
                q, q_ptr, q_base, q_rows, q_strides, q_valid, k, k_ptr, k_base, k_rows, k_strides, k_valid,
                BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, CHUNK, PRECISION, UPCAST,
            ) * scale  # fmt: skip
            if SOFTCAP:
                bent = tanh(scores / cap)
                scores = bent * cap
            if COLUMNS > 0:
                distance = k_positions[None, :] - q_positions[:, None]
                scores = add_by_distance(scores, distance, head, by_distance_ptr, COLUMNS)
            if MASKED:
                scores = hide(
                    scores, q_valid[:, None], k_valid[None, :], q_positions[:, None] - k_positions[None, :], low, high,
                    batch, head, q_rows[:, None], k_rows[None, :],
                    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                )  # fmt: skip
            # Both in one number a row: with the scale before it, one multiply-add a score.
            p = tl.exp2(scores + (weight - pivot)[:, None])
            # v tile: HBM -> SRAM, replaced every iteration
            v = load_tile(
                v_ptr, v_base, k_rows, v_strides[1], value_dims, v_strides[3], k_valid, VALUE_DIM, BLOCK_V, MASKED
            )
            dp = product_over_dims(
                grad, grad_ptr, grad_base, q_rows, grad_strides, q_valid, v, v_ptr, v_base, k_rows, v_strides, k_valid,
                BLOCK_M, BLOCK_N, VALUE_DIM, BLOCK_V, VALUE_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
            if DROPOUT:
                survives = keep(seed, threshold, batch, head + first_head, q_positions[:, None], k_positions[None, :])
                dp = tl.where(survives, dp * rescale, 0.0)
            ds = p * (dp - delta[:, None])
            if SOFTCAP:
                ds *= 1.0 - bent * bent
            ds = ds.to(k.dtype)
            dq += product(ds, k, PRECISION, UPCAST)
    return dq


@triton.jit(do_not_specialize=["job_count", "program_count", "heads", "length", "seed", "threshold", "first_head"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, pivot_ptr, dq_ptr, mask_ptr, bias_ptr, padding_ptr,
    jobs_ptr, entries_ptr, weights_ptr, rows_ptr, job_count, program_count, heads, length,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, mask_strides, bias_strides, padding_strides,
    by_distance_ptr, cap, scale, sm_scale, seed: tl.int64, threshold: tl.int64, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr, LISTED: tl.constexpr, MASK_ALL: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of the queries of one job after the other; with ADD onto what an earlier launch left."""
    offs_m, dims, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch = (tl.program_id(0) // program_count).to(tl.int64)
    for at in tl.range(tl.program_id(0) % program_count, job_count, program_count):
        # one job: HBM -> registers, until its rows are stored
        job = jobs_ptr + at * JOB_WIDTH
        head, start, step, count = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        origin, unit = tl.load(job + 4), tl.load(job + 5)
        dense, edge, end = tl.load(job + 6), tl.load(job + 7), tl.load(job + 8)
        kv_head = head // GROUP
        q_valid = offs_m < count
        q_rows = find_rows(rows_ptr, start, step, offs_m, count, LISTED)
        q_positions = find_positions(origin, unit, q_rows)
        q_base, grad_base = batch * q_strides[0] + head * q_strides[2], batch * grad_strides[0] + head * grad_strides[2]
        # q, dO tiles: HBM -> SRAM, stay for all their keys
        q = load_tile(q_ptr, q_base, q_rows, q_strides[1], dims, q_strides[3], q_valid, HEAD_DIM, BLOCK_D, True)
        grad = load_tile(
            grad_ptr, grad_base, q_rows, grad_strides[1], value_dims, grad_strides[3], q_valid, VALUE_DIM, BLOCK_V, True
        )
        line = (batch * heads + head) * length
        # pivot, delta: HBM -> registers, stay; +inf makes P zero beyond the last row
        pivot = tl.load(pivot_ptr + line + q_rows, mask=q_valid, other=float("inf"))
        delta = tl.load(delta_ptr + line + q_rows, mask=q_valid, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # registers, stays
        k_base, v_base = batch * k_strides[0] + kv_head * k_strides[2], batch * v_strides[0] + kv_head * v_strides[2]
        for stage in tl.static_range(2):
            # dense entries, then edges
            begin, stop = (dense, edge) if stage == 0 else (edge, end)
            dq = gather_dq(
                q, grad, dq, pivot, delta, begin, stop, entries_ptr, weights_ptr, rows_ptr, batch, head, q_rows, q_positions,
                q_valid, q_ptr, q_base, q_strides, grad_ptr, grad_base, grad_strides, k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, dims,
                value_dims, mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                by_distance_ptr, cap, scale, seed, threshold, rescale, first_head,
                SOFTCAP, COLUMNS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, VALUE_CHUNK, LISTED, MASK_ALL or stage == 1, DROPOUT, PRECISION, UPCAST,
            )  # fmt: skip
        dq *= sm_scale
        mask = q_valid[:, None] & (dims < HEAD_DIM)[None, :]
        dq_at = dq_ptr + batch * dq_strides[0] + head * dq_strides[2] + q_rows[:, None].to(tl.int64) * dq_strides[1]
        dq_at += dims[None, :] * dq_strides[3]
        if ADD:
            # dq so far: HBM -> registers, once a job
            dq += tl.load(dq_at, mask=mask, other=0.0).to(tl.float32)
        # dq: registers -> HBM, once a job
        tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask)
