# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The merge kernel: any number of partial states, and a prior, into one. Split-K decode ends with it.

A state is (out, lse); the merged lse is the logsumexp of all, the merged out their mean weighted by exp(lse - merged). Grid: (blocks of
rows). Resident: running max, sum and output of ROWS rows, in registers. Streamed: the parts, one after the other, once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import LN_2, LOG2_E


@triton.jit
def add_state(m, l, acc, out_at, lse_at, row_valid, dim_valid):
    """m, l, acc after one more state."""
    # lse of the part: HBM -> registers, once
    lse = tl.load(lse_at, mask=row_valid, other=float("-inf")) * LOG2_E
    m_new = tl.maximum(m, lse)
    # Finite where nothing was seen yet, so that -inf - -inf does not arise.
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha, weight = tl.exp2(m - pivot), tl.exp2(lse - pivot)
    # out of the part: HBM -> registers, once; a part that saw nothing was perhaps never written
    seen = (lse > float("-inf"))[:, None] & dim_valid[None, :]
    out = tl.load(out_at, mask=seen, other=0.0).to(tl.float32)
    return m_new, l * alpha + weight, acc * alpha[:, None] + out * weight[:, None]


@triton.jit
def merge_kernel(
    parts_ptr, parts_lse_ptr, prior_out_ptr, prior_lse_ptr, out_ptr, lse_ptr, rows, part_stride, part_lse_stride,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0) * ROWS, ... of contiguous (rows, HEAD_DIM) outs and (rows,) lse."""
    offs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    row_valid, dim_valid = offs < rows, dims < HEAD_DIM
    at = offs[:, None] * HEAD_DIM + dims[None, :]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in tl.range(0, PARTS):
        out_at, lse_at = parts_ptr + part * part_stride + at, parts_lse_ptr + part * part_lse_stride + offs
        m, l, acc = add_state(m, l, acc, out_at, lse_at, row_valid, dim_valid)
    if prior_out_ptr is not None:
        m, l, acc = add_state(m, l, acc, prior_out_ptr + at, prior_lse_ptr + offs, row_valid, dim_valid)
    total = tl.where(l == 0.0, 1.0, l)
    # merged out, lse: registers -> HBM, once
    out_mask = row_valid[:, None] & dim_valid[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + offs, lse, mask=row_valid)
