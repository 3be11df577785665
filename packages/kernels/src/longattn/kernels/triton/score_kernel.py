# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
"""What all kernels of the family share: how rows are found, what hides, biases or drops a score. Device functions only.

Written once for either orientation: a tile of scores is (queries, keys) in the forward pass and (keys, queries) where keys own, and
every function takes rows and positions that broadcast to its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

JOB_WIDTH = tl.constexpr(10)
ENTRY_WIDTH = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(1e30)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in float32. UPCAST: the interpreter multiplies bfloat16 wrongly without a word, so it gets float32 of the same values."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def find_rows(rows_ptr, start, step, offs, count, LISTED: tl.constexpr):
    """Row numbers, int32, of members `offs` of a run; where rows are gathered, the run is one of the table of rows."""
    if LISTED:
        # row numbers: HBM -> registers, for one tile
        return tl.load(rows_ptr + start + offs, mask=offs < count, other=0)
    return start + offs * step


@triton.jit
def load_tile(
    ptr,
    base,
    rows,
    row_stride,
    dims,
    dim_stride,
    valid,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(rows, BLOCK_D) of a tensor; columns beyond HEAD_DIM, and with MASKED rows that are not valid, are 0."""
    at = ptr + base + rows[:, None].to(tl.int64) * row_stride + dims[None, :] * dim_stride
    if MASKED:
        return tl.load(at, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def product_over_dims(
    a, a_ptr, a_base, a_rows, a_strides, a_valid, b, b_ptr, b_base, b_rows, b_strides, b_valid,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a @ b^T in float32: of the tiles as they are, or, with CHUNK < BLOCK_D, read once more, CHUNK columns at a time.

    For widths at which operands of such a product do not fit in registers. A tile that nothing else uses is then never loaded whole.
    """
    if CHUNK == BLOCK_D:
        total = product(a, tl.trans(b), PRECISION, UPCAST)
    else:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        # A loop, not unrolled: columns that stay for all tiles would be moved out of an unrolled one, back into registers.
        for first in tl.range(0, BLOCK_D, CHUNK):
            dims = first + tl.arange(0, CHUNK)
            # CHUNK columns of a, b: L2 -> SRAM, replaced every iteration
            a_part = load_tile(
                a_ptr, a_base, a_rows, a_strides[1], dims, a_strides[3], a_valid, HEAD_DIM, BLOCK_D, True
            )
            b_part = load_tile(
                b_ptr, b_base, b_rows, b_strides[1], dims, b_strides[3], b_valid, HEAD_DIM, BLOCK_D, True
            )
            total += product(a_part, tl.trans(b_part), PRECISION, UPCAST)
    return total


@triton.jit
def tanh(x):
    """In float32, relative error 5e-7. Near zero a power series, because 1 - e^(-2x) has lost its digits there."""
    a = tl.abs(x)
    square = a * a
    far = tl.exp2(a * -2.8853900817779268)
    series = a + a * square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825396825397))
    size = tl.where(a < 0.2, series, (1.0 - far) / (1.0 + far))
    return tl.where(x < 0.0, -size, size)


@triton.jit
def add_by_distance(scores, distance, head, by_distance_ptr, COLUMNS: tl.constexpr):
    """Scores (log2 units) plus what is added for each head and distance, key's position - query's; see longattn.kernels.terms."""
    own = by_distance_ptr + head * COLUMNS
    # a slope, and numbers of a small table: L1 -> registers, for one tile
    scores -= tl.load(own) * LOG2_E * tl.abs(distance).to(tl.float32)
    if COLUMNS > 1:
        MOST: tl.constexpr = COLUMNS // 2 - 1
        at = tl.minimum(tl.maximum(distance, -MOST), MOST) + (MOST + 1)
        scores += tl.load(own + at) * LOG2_E
    return scores


@triton.jit
def hide(
    scores, q_valid, k_valid, distance, low, high, batch, head, q_rows, k_rows,
    mask_ptr, mask_strides, bias_ptr, bias_strides, padding_ptr, padding_strides,
):  # fmt: skip
    """Scores (log2 units) plus bias, -inf where a band, a mask, a bias of -inf or padding hides, or where there is no row."""
    # Rows beyond the last query are never stored, so only reading for them is masked.
    seen = k_valid & (distance >= low) & (distance <= high)
    q_rows, k_rows = q_rows.to(tl.int64), k_rows.to(tl.int64)
    if padding_ptr is not None:
        at = padding_ptr + batch * padding_strides[0] + k_rows * padding_strides[1]
        # padding flags of the keys: HBM -> registers, for one tile
        seen = seen & (tl.load(at, mask=k_valid, other=1) == 0)
    if mask_ptr is not None:
        at = (
            mask_ptr
            + batch * mask_strides[0]
            + head * mask_strides[1]
            + q_rows * mask_strides[2]
            + k_rows * mask_strides[3]
        )
        # mask: HBM -> registers, for one tile
        seen = seen & (tl.load(at, mask=q_valid & k_valid, other=0) != 0)
    if bias_ptr is not None:
        at = (
            bias_ptr
            + batch * bias_strides[0]
            + head * bias_strides[1]
            + q_rows * bias_strides[2]
            + k_rows * bias_strides[3]
        )
        # bias: HBM -> registers, for one tile
        bias = tl.load(at, mask=q_valid & k_valid, other=0.0).to(tl.float32)
        # A finite bias hides nothing: it ends where its product with log2 e is still a number (see far_rows).
        bias = tl.where((bias < -HUGE) & (bias > float("-inf")), -HUGE, bias)
        bias = tl.where((bias > HUGE) & (bias < float("inf")), HUGE, bias)
        scores += bias * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def find_positions(origin, unit, rows):
    """Positions of rows, in 32 bits that wrap: differences are right below 2^31, and dropout reads the low 32 bits."""
    return origin + unit * rows


@triton.jit
def keep(seed, threshold, batch, head, q_positions, k_positions):
    """Whether dropout keeps a pair: Philox4x32-10 of (key // 4, query, head, batch), lane key % 4; see longattn.kernels.philox."""
    # Everything in the tile's shape, from the two positions' own.
    keys = k_positions.to(tl.uint32, bitcast=True) + tl.zeros_like(q_positions).to(tl.uint32)
    queries = q_positions.to(tl.uint32, bitcast=True) + tl.zeros_like(k_positions).to(tl.uint32)
    lane = keys % 4
    zero = tl.zeros_like(keys)
    w0, w1, w2, w3 = tl.philox(seed, keys // 4, queries, zero + head.to(tl.uint32), zero + batch.to(tl.uint32))
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def merge_prior(
    acc, lse, prior_out_ptr, prior_out_strides, prior_lse_ptr, prior_lse_strides, batch, head_at, row_at, value_dims, q_valid, row_mask,
):  # fmt: skip
    """out and lse (natural log) of a job's rows merged onto a prior state; heads and rows are int64, one each a row."""
    at_lse = (
        prior_lse_ptr + batch * prior_lse_strides[0] + row_at * prior_lse_strides[1] + head_at * prior_lse_strides[2]
    )
    # prior state: HBM -> registers, once, and merged here: no pass of its own
    other = tl.load(at_lse, mask=q_valid, other=float("-inf"))
    at_out = prior_out_ptr + batch * prior_out_strides[0] + head_at[:, None] * prior_out_strides[2]
    at_out += row_at[:, None] * prior_out_strides[1] + value_dims[None, :] * prior_out_strides[3]
    # Where the prior saw nothing its out weighs 0, whatever it holds.
    seen = row_mask & (other > float("-inf"))[:, None]
    other_out = tl.load(at_out, mask=seen, other=0.0).to(tl.float32)
    top = tl.maximum(lse, other)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    own_weight, prior_weight = tl.exp2((lse - pivot) * LOG2_E), tl.exp2((other - pivot) * LOG2_E)
    total = tl.where(own_weight + prior_weight == 0.0, 1.0, own_weight + prior_weight)
    acc = acc * (own_weight / total)[:, None] + other_out * (prior_weight / total)[:, None]
    return acc, tl.where(top == float("-inf"), float("-inf"), pivot + tl.log2(total) * LN_2)
