# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The backward kernels: dS = P * (dO v - delta), with P = exp(s - lse) made anew from q, k and the merged lse.

Three kernels. `rows_kernel` makes delta = rowsum(dO * O) - dlse and lse in log2, once. `keys_kernel` owns a block of keys of one kv head:
dk and dv stay in registers, q and dO stream past; with REDUCE it also adds dS^T's share to a float32 dq, so that five products are all.
`queries_kernel` owns queries and makes dq without atomics: together seven products, and equal bits for equal inputs.

No result of a product is transposed (triton 3.4 to 3.7 miscompile that on Hopper): keys own scores as (keys, queries), and their share of
dq is k^T dS^T, added to (batch, heads, Nq, head_dim) by columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import (
    ENTRY_WIDTH,
    JOB_WIDTH,
    LOG2_E,
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


@triton.jit(do_not_specialize=["length", "heads"])
def rows_kernel(
    grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, pivot_ptr, length, heads,
    grad_strides, out_strides, lse_strides, grad_lse_strides, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta and lse * log2 e of ROWS query rows of a head, into (batch, heads, Nq). A row that saw nothing gets +inf: its P is 0.

    Without out_ptr, grad_lse_ptr holds -delta, which was made for several rectangles.
    """
    blocks = tl.cdiv(length, ROWS)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    head, batch = line % heads, line // heads
    rows = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < length
    if out_ptr is None:
        delta = tl.zeros([ROWS], tl.float32)
    else:
        dims = tl.arange(0, BLOCK_V)
        mask = valid[:, None] & (dims < VALUE_DIM)[None, :]
        at = grad_out_ptr + batch * grad_strides[0] + head * grad_strides[2] + rows[:, None] * grad_strides[1]
        # dO, O: HBM -> registers, once
        grad = tl.load(at + dims[None, :] * grad_strides[3], mask=mask, other=0.0).to(tl.float32)
        at = out_ptr + batch * out_strides[0] + head * out_strides[2] + rows[:, None] * out_strides[1]
        out = tl.load(at + dims[None, :] * out_strides[3], mask=mask, other=0.0).to(tl.float32)
        delta = tl.sum(grad * out, 1)
    if grad_lse_ptr is not None:
        at = grad_lse_ptr + batch * grad_lse_strides[0] + head * grad_lse_strides[2] + rows * grad_lse_strides[1]
        delta -= tl.load(at, mask=valid, other=0.0).to(tl.float32)
    at = lse_ptr + batch * lse_strides[0] + head * lse_strides[2] + rows * lse_strides[1]
    lse = tl.load(at, mask=valid, other=0.0)
    pivot = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    # delta, pivot: registers -> HBM, side by side along queries
    at = line * length + rows
    tl.store(delta_ptr + at, delta, mask=valid)
    tl.store(pivot_ptr + at, pivot, mask=valid)


@triton.jit
def stream_queries(
    k, v, dk, dv, begin, end, entries_ptr, weights_ptr, rows_ptr, batch, kv_head, heads, length, k_rows, k_positions, k_valid,
    k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, q_ptr, q_strides, grad_ptr, grad_strides, delta_ptr, pivot_ptr, dq_ptr, dims, value_dims,
    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
    by_distance_ptr, cap, scale, sm_scale, seed, threshold, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, REDUCE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv after the entries begin .. end; scores are (keys, queries)."""
    for at in tl.range(begin, end):
        # one entry: HBM -> registers, for all its tiles
        entry = entries_ptr + at * ENTRY_WIDTH
        head = kv_head * GROUP + tl.load(entry).to(tl.int64)
        start, step, count = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        origin, unit = tl.load(entry + 4), tl.load(entry + 5)
        low, high = tl.load(entry + 6), tl.load(entry + 7)
        weight = tl.load(weights_ptr + at)
        q_base, grad_base = batch * q_strides[0] + head * q_strides[2], batch * grad_strides[0] + head * grad_strides[2]
        line = (batch * heads + head) * length
        for first in tl.range(0, count, BLOCK_M, disable_licm=True):
            offs_m = first + tl.arange(0, BLOCK_M)
            q_valid = offs_m < count
            q_rows = find_rows(rows_ptr, start, step, offs_m, count, LISTED)
            # q tile: HBM -> SRAM, replaced every iteration
            q = load_tile(q_ptr, q_base, q_rows, q_strides[1], dims, q_strides[3], q_valid, HEAD_DIM, BLOCK_D, MASKED)
            # pivot, delta: HBM -> registers, replaced every iteration; +inf makes P zero beyond the last row
            pivot = tl.load(pivot_ptr + line + q_rows, mask=q_valid, other=float("inf"))
            delta = tl.load(delta_ptr + line + q_rows, mask=q_valid, other=0.0)
            scores = product_over_dims(
                k, k_ptr, k_base, k_rows, k_strides, k_valid, q, q_ptr, q_base, q_rows, q_strides, q_valid,
                BLOCK_N, BLOCK_M, HEAD_DIM, BLOCK_D, CHUNK, PRECISION, UPCAST,
            ) * scale  # fmt: skip
            q_positions = find_positions(origin, unit, q_rows)
            if SOFTCAP:
                bent = tanh(scores / cap)
                scores = bent * cap
            if COLUMNS > 0:
                distance = k_positions[:, None] - q_positions[None, :]
                scores = add_by_distance(scores, distance, head, by_distance_ptr, COLUMNS)
            if MASKED:
                scores = hide(
                    scores, q_valid[None, :], k_valid[:, None], k_positions[:, None] - q_positions[None, :], low, high,
                    batch, head, q_rows[None, :], k_rows[:, None],
                    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                )  # fmt: skip
            # Both in one number a row: with the scale before it, one multiply-add a score.
            p = tl.exp2(scores + (weight - pivot)[None, :])
            # dO tile: HBM -> SRAM, replaced every iteration
            grad = load_tile(
                grad_ptr,
                grad_base,
                q_rows,
                grad_strides[1],
                value_dims,
                grad_strides[3],
                q_valid,
                VALUE_DIM,
                BLOCK_V,
                MASKED,
            )
            dp = product_over_dims(
                v, v_ptr, v_base, k_rows, v_strides, k_valid, grad, grad_ptr, grad_base, q_rows, grad_strides, q_valid,
                BLOCK_N, BLOCK_M, VALUE_DIM, BLOCK_V, VALUE_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
            dropped = p
            if DROPOUT:
                survives = keep(seed, threshold, batch, head + first_head, q_positions[None, :], k_positions[:, None])
                dropped = tl.where(survives, p * rescale, 0.0)
                dp = tl.where(survives, dp * rescale, 0.0)
            dv += product(dropped.to(grad.dtype), grad, PRECISION, UPCAST)
            if CHUNK < BLOCK_D:
                # Only now is all of q needed: L2 -> SRAM, not held since the scores.
                q = load_tile(
                    q_ptr, q_base, q_rows, q_strides[1], dims, q_strides[3], q_valid, HEAD_DIM, BLOCK_D, MASKED
                )
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds *= 1.0 - bent * bent
            ds = ds.to(q.dtype)
            dk += product(ds, q, PRECISION, UPCAST)
            if REDUCE:
                # head_dim is a constant, so an address a row is all that registers hold.
                dq_at = dq_ptr + (line + q_rows.to(tl.int64))[None, :] * HEAD_DIM
                # Products outside tensor cores do not gain from narrow ones.
                WIDTH: tl.constexpr = BLOCK_D if k_ptr.dtype.element_ty == tl.float32 else CHUNK
                for begin_dim in tl.range(0, BLOCK_D, WIDTH):
                    columns = begin_dim + tl.arange(0, WIDTH)
                    part = k
                    if CHUNK < BLOCK_D:
                        # CHUNK columns of k: L2 -> SRAM, for one product
                        part = load_tile(
                            k_ptr, k_base, k_rows, k_strides[1], columns, k_strides[3], k_valid, HEAD_DIM, BLOCK_D, True
                        )
                    dq = product(tl.trans(part), ds, PRECISION, UPCAST) * sm_scale
                    inside = (columns < HEAD_DIM)[:, None] & q_valid[None, :]
                    # dq share: registers -> L2, added there in float32, every iteration
                    tl.atomic_add(dq_at + columns[:, None], dq, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["job_count", "program_count", "heads", "length", "seed", "threshold", "first_head"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, pivot_ptr, dq_ptr, dk_ptr, dv_ptr, mask_ptr, bias_ptr, padding_ptr,
    jobs_ptr, entries_ptr, weights_ptr, rows_ptr, job_count, program_count, heads, length,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides, mask_strides, bias_strides, padding_strides,
    by_distance_ptr, cap, scale, sm_scale, seed: tl.int64, threshold: tl.int64, rescale, first_head,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr, LISTED: tl.constexpr, MASK_ALL: tl.constexpr, DROPOUT: tl.constexpr, REDUCE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys of one job after the other; with REDUCE their share of dq too."""
    offs_n, dims, value_dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch = (tl.program_id(0) // program_count).to(tl.int64)
    for at in tl.range(tl.program_id(0) % program_count, job_count, program_count):
        # one job: HBM -> registers, until its rows are stored
        job = jobs_ptr + at * JOB_WIDTH
        kv_head, start, step, count = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        origin, unit = tl.load(job + 4), tl.load(job + 5)
        dense, edge, end = tl.load(job + 6), tl.load(job + 7), tl.load(job + 8)
        k_valid = offs_n < count
        k_rows = find_rows(rows_ptr, start, step, offs_n, count, LISTED)
        k_positions = find_positions(origin, unit, k_rows)
        k_base, v_base = batch * k_strides[0] + kv_head * k_strides[2], batch * v_strides[0] + kv_head * v_strides[2]
        # k, v tiles: HBM -> SRAM, stay for all their queries
        k = load_tile(k_ptr, k_base, k_rows, k_strides[1], dims, k_strides[3], k_valid, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_ptr, v_base, k_rows, v_strides[1], value_dims, v_strides[3], k_valid, VALUE_DIM, BLOCK_V, True)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # registers, stays
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # registers, stays
        # A short block has rows that are no keys: their P is not theirs to add, so all its entries are masked.
        edge = tl.where(count < BLOCK_N, dense, edge)
        for stage in tl.static_range(2):
            # dense entries, then edges
            begin, stop = (dense, edge) if stage == 0 else (edge, end)
            dk, dv = stream_queries(
                k, v, dk, dv, begin, stop, entries_ptr, weights_ptr, rows_ptr, batch, kv_head, heads, length, k_rows, k_positions,
                k_valid, k_ptr, k_base, k_strides, v_ptr, v_base, v_strides, q_ptr, q_strides, grad_ptr, grad_strides, delta_ptr, pivot_ptr, dq_ptr, dims,
                value_dims, mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
                by_distance_ptr, cap, scale, sm_scale, seed, threshold, rescale, first_head,
                SOFTCAP, COLUMNS, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, CHUNK, VALUE_CHUNK, LISTED, MASK_ALL or stage == 1, DROPOUT, REDUCE, PRECISION, UPCAST,
            )  # fmt: skip
        mask = k_valid[:, None] & (dims < HEAD_DIM)[None, :]
        # dk, dv: registers -> HBM, once a job
        row_at = k_rows.to(tl.int64)
        dk_at = dk_ptr + batch * dk_strides[0] + kv_head * dk_strides[2] + row_at[:, None] * dk_strides[1]
        tl.store(dk_at + dims[None, :] * dk_strides[3], (dk * sm_scale).to(dk_ptr.dtype.element_ty), mask=mask)
        dv_at = dv_ptr + batch * dv_strides[0] + kv_head * dv_strides[2] + row_at[:, None] * dv_strides[1]
        value_mask = k_valid[:, None] & (value_dims < VALUE_DIM)[None, :]
        tl.store(dv_at + value_dims[None, :] * dv_strides[3], dv.to(dv_ptr.dtype.element_ty), mask=value_mask)
