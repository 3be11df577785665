// A strip of query rows against a tile of keys: scores, what hides them, and products with what became of them.
#pragma once
#include "keys.h"
#include "pack.h"

// scores (rows x KEYS) = A B + bias for each key, and top, the largest of each row in each lane. B is packed in panels.
template <class Op>
static void scores_of(const float* A, int64_t rows, const float* B, const Shape<Op>& shape, const KeyTile& tile, float* scores,
                      float* top) {
    for (int64_t r = 0; r < rows * VL; r += VL) store(top + r, splat(NONE));
    for (int64_t j = 0; j < tile.padded; j += PW) {
        const float* panel = B + j * shape.wide;  // K^T panel: L2 -> L1, stays for all rows of the strip
        for (int64_t r = 0; r < rows; r += MR) {
            float* C = scores + r * KEYS + j;
            register_tile<Op, MR, NV>(
                shape.words, A + r * shape.wide, shape.wide, 1, panel, PW,
                [&](Floats(&s)[MR][NV]) {
                    for (int n = 0; n < NV; n++) {
                        Floats bias = load(tile.bias + j + n * VL);
                        for (int i = 0; i < MR; i++) s[i][n] = bias;
                    }
                },
                [&](Floats(&s)[MR][NV]) {
                    for (int i = 0; i < MR; i++) {
                        Floats m = load(top + (r + i) * VL);
                        for (int n = 0; n < NV; n++) {
                            store(C + i * KEYS + n * VL, s[i][n]);
                            m = max(m, s[i][n]);
                        }
                        store(top + (r + i) * VL, m);
                    }
                });
        }
    }
}

// The plain product: C (rows x KEYS) = A B, for dO V^T.
template <class Op>
static void products_of(const float* A, int64_t rows, const float* B, const Shape<Op>& shape, int64_t padded, float* out) {
    for (int64_t j = 0; j < padded; j += PW)
        for (int64_t r = 0; r < rows; r += MR)
            register_tile<Op, MR, NV>(
                shape.words, A + r * shape.wide, shape.wide, 1, B + j * shape.wide, PW,
                [&](Floats(&s)[MR][NV]) {
                    for (int i = 0; i < MR; i++)
                        for (int n = 0; n < NV; n++) s[i][n] = Floats{};
                },
                [&](Floats(&s)[MR][NV]) {
                    for (int i = 0; i < MR; i++)
                        for (int n = 0; n < NV; n++) store(out + (r + i) * KEYS + j + n * VL, s[i][n]);
                });
}

// scores[j] = change(scores[j], j-th key's number) for the keys of a tile, in numbers of some type with a stride.
template <class Number, class Change>
static INLINE void look_up(const char* from, int64_t stride, const KeyTile& tile, float* scores, Change change) {
    const Number* numbers = (const Number*)from;
    if (tile.neighbours && stride == 1) {
        numbers += tile.rows[0];
        for (int64_t j = 0; j < tile.n; j++) scores[j] = change(scores[j], numbers[j]);
    } else
        for (int64_t j = 0; j < tile.n; j++) scores[j] = change(scores[j], numbers[tile.rows[j] * stride]);
}

// What a band, a mask or a bias does to a strip of scores; `factor` takes the bias to the units of the scores. `top` anew, if any.
class Veil {
    const Call& call;
    const float factor;

    void bias(const KeyTile& tile, int64_t b, int64_t h, int64_t n, float* scores) const {
        const Lookup& x = call.bias;
        const char* from = x.data + (b * x.batch + h * x.head + n * x.row) * size_of(x.type);
        const float by = factor;
        if (x.type == FLOAT32) look_up<float>(from, x.key, tile, scores, [by](float s, float y) { return s + y * by; });
        else if (x.type == BFLOAT16)
            look_up<uint16_t>(from, x.key, tile, scores, [by](float s, uint16_t y) { return s + from_bfloat16(y) * by; });
        else
            look_up<uint16_t>(from, x.key, tile, scores, [by](float s, uint16_t y) { return s + from_float16(y) * by; });
    }

public:
    Veil(const Call& call, float factor) : call(call), factor(factor) {}

    bool needed(Sight sight) const { return sight == SOME || call.mask.data || call.bias.data; }

    void hide(const KeyTile& tile, Sight sight, int64_t b, int64_t h, const Queries& queries, int64_t first, int64_t rows,
              float* scores, float* top) const {
        for (int64_t r = 0; r < rows; r++) {
            float* row = scores + r * KEYS;
            const int64_t n = queries.rows[first + r], position = queries.positions[first + r], low = tile.low, high = tile.high;
            for (int64_t j = 0; sight == SOME && j < tile.padded; j++) {
                int64_t distance = position - tile.positions[j];
                row[j] = ((distance >= low) & (distance <= high)) ? row[j] : NONE;
            }
            if (call.bias.data) bias(tile, b, h, n, row);
            if (call.mask.data)
                look_up<uint8_t>(call.mask.data + b * call.mask.batch + h * call.mask.head + n * call.mask.row, call.mask.key, tile,
                                 row, [](float s, uint8_t seen) { return seen ? s : NONE; });
            if (!top) continue;
            Floats m = splat(NONE);
            for (int64_t j = 0; j < tile.padded; j += VL) m = max(m, load(row + j));
            store(top + r * VL, m);
        }
    }
};

// C (rows x columns) = C * factor for each row + A B, where A's numbers are at A[row * lda + k * step].
template <class Op, int N, class Factor>
static INLINE void accumulate_columns(int64_t rows, int64_t K, const float* A, int64_t lda, int64_t step, const float* B, int64_t ldb,
                                      float* C, int64_t ldc, Factor factor) {
    for (int64_t r = 0; r < rows; r += MR)
        register_tile<Op, MR, N>(
            K, A + r * lda, lda, step, B, ldb,
            [&](Floats(&s)[MR][N]) {
                for (int i = 0; i < MR; i++)
                    for (int n = 0; n < N; n++) s[i][n] = load(C + (r + i) * ldc + n * VL) * factor(r + i);
            },
            [&](Floats(&s)[MR][N]) {
                for (int i = 0; i < MR; i++)
                    for (int n = 0; n < N; n++) store(C + (r + i) * ldc + n * VL, s[i][n]);
            });
}

template <class Op, class Factor>
static void accumulate(int64_t rows, int64_t K, const float* A, int64_t lda, int64_t step, const float* B, int64_t columns, float* C,
                       Factor factor) {
    int64_t c = 0;
    for (; c + PW <= columns; c += PW) accumulate_columns<Op, NV>(rows, K, A, lda, step, B + c, columns, C + c, columns, factor);
    switch ((columns - c) / VL) {
        case 3: accumulate_columns<Op, 3>(rows, K, A, lda, step, B + c, columns, C + c, columns, factor); break;
        case 2: accumulate_columns<Op, 2>(rows, K, A, lda, step, B + c, columns, C + c, columns, factor); break;
        case 1: accumulate_columns<Op, 1>(rows, K, A, lda, step, B + c, columns, C + c, columns, factor); break;
    }
}

// Two vectors of numbers as one of bfloat16, in order; and two rows of numbers as pairs (row 0, row 1) for each column.
#if defined(__AVX512BF16__)
static INLINE Floats in_order(Floats first, Floats second) {
    return (Floats)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
static INLINE Floats in_pairs(Floats even, Floats odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif
