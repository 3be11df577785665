# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""The kernel of decode steps over pages: each program a row's queries and one part of its slots. `merge_kernel` joins the parts.

Resident: the queries of a row (all heads that share its keys), running max, sum and output. Streamed: pages of keys and values, once, as
they lie: 8 bits are widened in registers, and their scales go to scores and weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longattn.kernels.triton.score_kernel import LN_2, LOG2_E, product


@triton.jit
def widened(x, FLOAT8: tl.constexpr, UPCAST: tl.constexpr, to: tl.constexpr):
    """Stored numbers as `to`; UPCAST: as float32, since the interpreter makes no bfloat16 of an integer. A float8_e4m3fn comes as its bits, which are those of a float16 that is 256 times too small."""
    if FLOAT8:
        bits = x.to(tl.int32)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = half.to(tl.int16).to(tl.float16, bitcast=True)
    if UPCAST:
        return x.to(tl.float32)
    return x.to(to)


@triton.jit(do_not_specialize=["heads", "group", "held", "page_count", "each", "rows"])
def paged_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr, added_ptr, out_ptr, lse_ptr,
    heads, group, held, page_count, each, added_batch, added_head, added_query, scale, rows,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, FLOAT8: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """program_id(0): row. program_id(1): part of `each` slots, a multiple of BLOCK_N. program_id(2): BLOCK_G queries. Parts: (parts, rows, group)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    queries = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query_valid = queries < group
    # q: HBM -> registers, once
    at = q_ptr + (row * group + queries)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(at, mask=query_valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    added_at = added_ptr + row // heads * added_batch + row % heads * added_head + queries[:, None] * added_query
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for first in tl.range(part * each, tl.minimum(part * each + each, held), BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        valid = slots < held
        added = tl.load(added_at + slots[None, :], mask=query_valid[:, None] & valid[None, :], other=float("-inf"))
        # Slots that no query sees are not read: what lies there need not be a number, nor a page.
        valid = valid & (tl.max(added, axis=0) > float("-inf"))
        page = tl.load(pages_ptr + row * page_count + slots // PAGE, mask=valid, other=0).to(tl.int64)
        slot = page * PAGE + slots % PAGE
        # k, v: HBM -> registers, once
        k = tl.load(
            k_ptr + slot[:, None] * HEAD_DIM + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0
        )
        scores = product(q, tl.trans(widened(k, FLOAT8, UPCAST, q.dtype)), PRECISION, UPCAST) * scale
        if k_scale_ptr is not None:
            scores = scores * (tl.load(k_scale_ptr + slot, mask=valid, other=0.0) * UNIT)[None, :]
        scores = tl.where(added == float("-inf"), float("-inf"), (scores + added) * LOG2_E)
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p, alpha = tl.exp2(scores - pivot[:, None]), tl.exp2(m - pivot)
        l = l * alpha + tl.sum(p, axis=1)
        if v_scale_ptr is not None:
            p = p * (tl.load(v_scale_ptr + slot, mask=valid, other=0.0) * UNIT)[None, :]
        v = tl.load(
            v_ptr + slot[:, None] * VALUE_DIM + value_dims[None, :], mask=valid[:, None] & (value_dims < VALUE_DIM)[None, :], other=0
        )  # fmt: skip
        acc = acc * alpha[:, None] + product(p.to(q.dtype), widened(v, FLOAT8, UPCAST, q.dtype), PRECISION, UPCAST)
        m = m_new
    total = tl.where(l == 0.0, 1.0, l)
    to = part * rows * group + row * group + queries
    # out, lse of the part: registers -> HBM, once
    tl.store(out_ptr + to[:, None] * VALUE_DIM + value_dims[None, :], acc / total[:, None],
             mask=query_valid[:, None] & (value_dims < VALUE_DIM)[None, :])  # fmt: skip
    tl.store(lse_ptr + to, tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) * LN_2), mask=query_valid)
