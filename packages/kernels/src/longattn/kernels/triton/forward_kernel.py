# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The forward kernel: out = softmax(scale * q k^T + log counts) v and its lse, for the rows of one job after the other.

The equation is the online softmax (FlashAttention, Dao et al. 2022, algorithm 1), in base 2. Grid: (programs * batch,); program p of a
batch element does jobs p, p + programs, ... A job is a block of query rows of one head, or, packed for decode, of all heads that
share a kv head. Resident for a job: the q tile, running max m, running sum l, output acc. Streamed: k and v tiles, dense entries first,
then masked ones. Strided rows are addressed, not gathered.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import (
    ENTRY_WIDTH,
    JOB_WIDTH,
    LN_2,
    add_by_distance,
    find_positions,
    find_rows,
    hide,
    keep,
    load_tile,
    merge_prior,
    product,
    product_over_dims,
    tanh,
)


@triton.jit
def stream_keys(
    q, m, l, acc, begin, end, entries_ptr, weights_ptr, rows_ptr, batch, heads, q_rows, q_positions, q_valid,
    q_ptr, q_base, q_strides, k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, dims, value_dims,
    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
    by_distance_ptr, cap, scale, seed, threshold, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    LISTED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, FLIP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """m, l, acc after the entries begin .. end; without MASKED every pair of their tiles is visible."""
    for at in tl.range(begin, end):
        # one entry: HBM -> registers, for all its tiles
        entry = entries_ptr + at * ENTRY_WIDTH
        start, step, count = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        origin, unit = tl.load(entry + 4), tl.load(entry + 5)
        low, high = tl.load(entry + 6), tl.load(entry + 7)
        weight = tl.load(weights_ptr + at)
        for first in tl.range(0, count, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            k_valid = offs_n < count
            k_rows = find_rows(rows_ptr, start, step, offs_n, count, LISTED)
            # k tile: HBM -> SRAM, replaced every iteration
            k = load_tile(k_ptr, k_base, k_rows, k_strides[1], dims, k_strides[3], k_valid, HEAD_DIM, BLOCK_D, MASKED)
            scores = product_over_dims(
                q, q_ptr, q_base, q_rows, q_strides, q_valid, k, k_ptr, k_base, k_rows, k_strides, k_valid,
                BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
            if FLIP:
                scores = -scores
            TERMS: tl.constexpr = SOFTCAP or COLUMNS > 0
            if MASKED or TERMS:
                k_positions = find_positions(origin, unit, k_rows)
                scores = scores * scale
                if SOFTCAP:
                    scores = tanh(scores / cap) * cap
                if COLUMNS > 0:
                    distance = k_positions[None, :] - q_positions[:, None]
                    scores = add_by_distance(scores, distance, heads[:, None], by_distance_ptr, COLUMNS)
                scores += weight
            if MASKED:
                scores = hide(
                    scores, q_valid[:, None], k_valid[None, :], q_positions[:, None] - k_positions[None, :], low, high,
                    batch, heads[:, None], q_rows[:, None], k_rows[None, :],
                    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                )  # fmt: skip
            if MASKED or TERMS:
                m_new = tl.maximum(m, tl.max(scores, 1))
                # Finite where nothing was seen yet, so that -inf - -inf does not arise.
                pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
                p = tl.exp2(scores - pivot[:, None])
            else:
                # scale > 0 here, so it may wait until after the maximum: one multiply-add a score.
                m_new = tl.maximum(m, tl.max(scores, 1) * scale + weight)
                pivot = m_new
                p = tl.exp2(scores * scale - (pivot - weight)[:, None])
            alpha = tl.exp2(m - pivot)
            l = l * alpha + tl.sum(p, 1)
            if DROPOUT:
                k_positions = find_positions(origin, unit, k_rows)
                survives = keep(
                    seed, threshold, batch, heads[:, None] + first_head, q_positions[:, None], k_positions[None, :]
                )
                p = tl.where(survives, p * rescale, 0.0)
            # v tile: HBM -> SRAM, replaced every iteration
            v = load_tile(
                v_ptr, v_base, k_rows, v_strides[1], value_dims, v_strides[3], k_valid, VALUE_DIM, BLOCK_V, MASKED
            )
            acc = acc * alpha[:, None] + product(p.to(v.dtype), v, PRECISION, UPCAST)
            m = m_new
    return m, l, acc


@triton.jit(do_not_specialize=["job_count", "program_count", "seed", "threshold", "first_head"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, prior_out_ptr, prior_lse_ptr, mask_ptr, bias_ptr, padding_ptr,
    jobs_ptr, entries_ptr, weights_ptr, rows_ptr, job_count, program_count,
    q_strides, k_strides, v_strides, out_strides, lse_strides, prior_out_strides, prior_lse_strides,
    mask_strides, bias_strides, padding_strides, part_strides,
    by_distance_ptr, cap, scale, seed: tl.int64, threshold: tl.int64, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, MASK_ALL: tl.constexpr, DROPOUT: tl.constexpr,
    FLIP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Jobs p, p + programs, ... of one batch element; see the module. scale is times log2 e and positive."""
    offs_m, dims, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch = (tl.program_id(0) // program_count).to(tl.int64)
    for at in tl.range(tl.program_id(0) % program_count, job_count, program_count):
        # one job: HBM -> registers, until its rows are stored
        job = jobs_ptr + at * JOB_WIDTH
        owner, start, step, count = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        origin, unit = tl.load(job + 4), tl.load(job + 5)
        dense, edge, end, part = tl.load(job + 6), tl.load(job + 7), tl.load(job + 8), tl.load(job + 9)
        # Packed, neighbouring rows are the query heads of one kv head.
        heads = owner * PACK + offs_m % PACK
        kv_head = (owner * PACK // GROUP).to(tl.int64)
        q_valid = offs_m // PACK < count
        q_rows = find_rows(rows_ptr, start, step, offs_m // PACK, count, LISTED)
        q_positions = find_positions(origin, unit, q_rows)
        row_mask = q_valid[:, None] & (value_dims < VALUE_DIM)[None, :]
        head_at, row_at = heads.to(tl.int64), q_rows.to(tl.int64)
        q_base = batch * q_strides[0] + head_at[:, None] * q_strides[2]
        # q tile: HBM -> SRAM, stays for all its keys
        q = load_tile(q_ptr, q_base, q_rows, q_strides[1], dims, q_strides[3], q_valid, HEAD_DIM, BLOCK_D, True)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running max: registers, stays
        l = tl.zeros([BLOCK_M], tl.float32)  # running sum: registers, stays
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)  # output: registers, stays
        k_base, v_base = batch * k_strides[0] + kv_head * k_strides[2], batch * v_strides[0] + kv_head * v_strides[2]
        for stage in tl.static_range(2):
            # dense entries, then edges
            begin, stop = (dense, edge) if stage == 0 else (edge, end)
            m, l, acc = stream_keys(
                q, m, l, acc, begin, stop, entries_ptr, weights_ptr, rows_ptr, batch, heads, q_rows, q_positions, q_valid,
                q_ptr, q_base, q_strides, k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, dims, value_dims,
                mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                by_distance_ptr, cap, scale, seed, threshold, rescale, first_head,
                SOFTCAP, COLUMNS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, LISTED, MASK_ALL or stage == 1, DROPOUT, FLIP, PRECISION, UPCAST,
            )  # fmt: skip
        total = tl.where(l == 0.0, 1.0, l)
        acc = acc / total[:, None]
        lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) * LN_2)
        if prior_out_ptr is not None:
            acc, lse = merge_prior(
                acc, lse, prior_out_ptr, prior_out_strides, prior_lse_ptr, prior_lse_strides, batch, head_at, row_at, value_dims, q_valid,
                row_mask,
            )  # fmt: skip
        out_at = out_ptr + part * part_strides[0] + batch * out_strides[0] + head_at[:, None] * out_strides[2]
        out_at += row_at[:, None] * out_strides[1] + value_dims[None, :] * out_strides[3]
        # out, lse: registers -> HBM, once a job
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask)
        lse_at = (
            lse_ptr
            + part * part_strides[1]
            + batch * lse_strides[0]
            + row_at * lse_strides[1]
            + head_at * lse_strides[2]
        )
        tl.store(lse_at, lse, mask=q_valid)
