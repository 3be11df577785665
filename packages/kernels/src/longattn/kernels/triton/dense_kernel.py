# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportArgumentType=false
"""The forward kernel for tiles in which every pair is visible: warp-specialised, over descriptors (TMA), for Hopper and Blackwell.

The same online softmax as `forward_kernel`, without anything that hides or changes a score. Producer warps load tiles of k and v through
tensor descriptors while consumer warps compute; on Hopper the compiler makes two consumers of 64 query rows each. A descriptor is made
for each job: keys are (rows / modulus, modulus, head_dim) of the batch element and kv head, so that a tile of every modulus-th row is
addressed by (first, phase) and never gathered. Grid: (programs * batch,), persistent as in `forward_kernel`. Resident for a job: the q tile,
running max m, running sum l, output acc. Streamed: k and v tiles. A launch needs memory for descriptors: `launching.run` gives it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import LN_2, merge_prior, product

DENSE_JOB_WIDTH = tl.constexpr(8)


@triton.jit(do_not_specialize=["job_count", "program_count", "keys"])
def dense_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, prior_out_ptr, prior_lse_ptr, jobs_ptr, entries_ptr, weights_ptr,
    job_count, program_count, q_strides, k_strides, v_strides, out_strides, lse_strides, prior_out_strides, prior_lse_strides,
    keys, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Jobs p, p + programs, ... of one batch element; see the module. keys: rows of k. scale is times log2 e and positive."""
    offs_m, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    batch = (tl.program_id(0) // program_count).to(tl.int64)
    for at in tl.range(tl.program_id(0) % program_count, job_count, program_count):
        # one job: HBM -> registers, until its rows are stored
        job = jobs_ptr + at * DENSE_JOB_WIDTH
        head, start, step, count = tl.load(job).to(tl.int64), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        begin, end, modulus = tl.load(job + 4), tl.load(job + 5), tl.load(job + 6)
        # strides of a small tensor come in 32 bits
        q_start, q_step, k_step = start.to(tl.int64), step.to(tl.int64), modulus.to(tl.int64)
        kv_head = head // GROUP
        # rows beyond the last of a job are zeros, and are not stored
        q_tile = tl.make_tensor_descriptor(
            q_ptr + batch * q_strides[0] + head * q_strides[2] + q_start * q_strides[1],
            shape=[count, HEAD_DIM], strides=[q_step * q_strides[1], 1], block_shape=[BLOCK_M, BLOCK_D],
        )  # fmt: skip
        rows = (keys + modulus - 1) // modulus
        k_tiles = tl.make_tensor_descriptor(
            k_ptr + batch * k_strides[0] + kv_head * k_strides[2],
            shape=[rows, modulus, HEAD_DIM], strides=[k_step * k_strides[1], k_strides[1], 1], block_shape=[BLOCK_N, 1, BLOCK_D],
        )  # fmt: skip
        v_tiles = tl.make_tensor_descriptor(
            v_ptr + batch * v_strides[0] + kv_head * v_strides[2],
            shape=[rows, modulus, VALUE_DIM], strides=[k_step * v_strides[1], v_strides[1], 1], block_shape=[BLOCK_N, 1, BLOCK_V],
        )  # fmt: skip
        # q tile: HBM -> SRAM, stays for all its keys
        q = q_tile.load([0, 0])
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running max: registers, stays
        l = tl.zeros([BLOCK_M], tl.float32)  # running sum: registers, stays
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)  # output: registers, stays
        for tile in tl.range(begin, end, warp_specialize=True):
            first, phase = tl.load(entries_ptr + 2 * tile), tl.load(entries_ptr + 2 * tile + 1)
            weight = tl.load(weights_ptr + tile)
            # k tile: HBM -> SRAM, replaced every iteration
            k = k_tiles.load([first, phase, 0]).reshape([BLOCK_N, BLOCK_D])
            scores = product(q, k.T, "ieee", UPCAST)
            m_new = tl.maximum(m, tl.max(scores, 1) * scale + weight)
            p = tl.exp2(scores * scale - (m_new - weight)[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, 1)
            # v tile: HBM -> SRAM, replaced every iteration
            v = v_tiles.load([first, phase, 0]).reshape([BLOCK_N, BLOCK_V])
            acc = acc * alpha[:, None]
            acc += product(p.to(v.dtype), v, "ieee", UPCAST)
            m = m_new
        total = tl.where(l == 0.0, 1.0, l)
        acc = acc / total[:, None]
        lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) * LN_2)
        q_valid = offs_m < count
        row_at, head_at = (start + offs_m * step).to(tl.int64), head + tl.zeros_like(offs_m).to(tl.int64)
        row_mask = q_valid[:, None] & (value_dims < VALUE_DIM)[None, :]
        if prior_out_ptr is not None:
            acc, lse = merge_prior(
                acc, lse, prior_out_ptr, prior_out_strides, prior_lse_ptr, prior_lse_strides, batch, head_at, row_at, value_dims, q_valid,
                row_mask,
            )  # fmt: skip
        out_at = out_ptr + batch * out_strides[0] + head_at[:, None] * out_strides[2]
        out_at += row_at[:, None] * out_strides[1] + value_dims[None, :] * out_strides[3]
        # out, lse: registers -> HBM, once a job
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=row_mask)
        lse_at = lse_ptr + batch * lse_strides[0] + row_at * lse_strides[1] + head_at * lse_strides[2]
        tl.store(lse_at, lse, mask=q_valid)
