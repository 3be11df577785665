// A strip of query rows against a tile of keys: scores, the mask of pairs, and products with the probabilities or gradients of scores.
#pragma once
#include "keys.h"
#include "pack.h"
#include "tiled_product.h"

// visit(Count<n>()) for n = 1 .. MOST: n as a constant.
template <int N>
struct Count {
    static constexpr int value = N;
};
template <int MOST, class Visit>
static INLINE void with_count(int64_t n, Visit visit) {
    if (n == MOST) return visit(Count<MOST>());
    if constexpr (MOST > 1) with_count<MOST - 1>(n, visit);
}

// For all register tiles of `rows` x keys that meet: visit(row, key, Count<vectors of keys>()). A panel of keys stays for all rows of the strip.
template <class Op, class Visit>
static INLINE void tiles_of(int64_t rows, int64_t padded, const Reach<Op>& reach, Visit visit) {
    for (int64_t j = 0; j < padded; j += PW)
        for (int64_t r = 0; r < rows; r += MR) {
            const int64_t begin = most(j, reach.begin(r)), end = least(j + PW, reach.end(r));
            if (begin < end) with_count<NV>((end - begin) / VL, [&](auto n) { visit(r, begin, n); });
        }
}

// The plain product: C (rows x WIDTH) = A B, in blocks of tiles.
template <class Op>
static void tiled_products(const float* A, int64_t rows, const float* B, const Shape<Op>& shape, const Reach<Op>& reach, float* out) {
    for (int64_t r = 0; r < rows; r += Op::TALL)
        Op::scores(A + r * shape.wide, shape.wide, shape.part / Op::DEEP, B, reach.begin(r), reach.end(r), out + r * Op::WIDTH);
}

// scores (rows x WIDTH) = A B + start for each key, and top, the largest of each row in each lane. B is packed in panels.
template <class Op>
static void scores_of(const float* A, int64_t rows, const float* B, const Shape<Op>& shape, const KeyTile& tile, const float* start,
                      const Reach<Op>& reach, float* scores, float* top) {
    if constexpr (Op::TILES) {
        const bool counted = tile.counted && start == tile.bias;
        tiled_products<Op>(A, rows, B, shape, reach, scores);
        for (int64_t r = 0; r < rows; r++) {
            float* row = scores + r * Op::WIDTH;
            Floats m = splat(NONE);
            for (int64_t j = reach.begin(r); j < reach.end(r); j += VL) {
                Floats s = load(row + j);
                if (counted) store(row + j, s += load(start + j));
                m = max(m, s);
            }
            store(top + r * VL, m);
        }
    } else {
        for (int64_t r = 0; r < rows * VL; r += VL) store(top + r, splat(NONE));
        tiles_of(rows, tile.padded, reach, [&](int64_t r, int64_t j, auto count) {
            constexpr int N = decltype(count)::value;
            const float* panel = B + j / PW * PW * shape.wide + j % PW;  // K^T panel: L2 -> L1
            float* C = scores + r * Op::WIDTH + j;
            register_tile<Op, MR, N>(
                shape.words, A + r * shape.wide, shape.wide, 1, panel, PW,
                [&](Floats(&s)[MR][N]) {
                    for (int n = 0; n < N; n++) {
                        Floats bias = load(start + j + n * VL);
                        for (int i = 0; i < MR; i++) s[i][n] = bias;
                    }
                },
                [&](Floats(&s)[MR][N]) {
                    for (int i = 0; i < MR; i++) {
                        Floats m = load(top + (r + i) * VL);
                        for (int n = 0; n < N; n++) {
                            store(C + i * Op::WIDTH + n * VL, s[i][n]);
                            m = max(m, s[i][n]);
                        }
                        store(top + (r + i) * VL, m);
                    }
                });
        });
    }
}

// C (rows x WIDTH) = A B, for dO V^T.
template <class Op>
static void products_of(const float* A, int64_t rows, const float* B, const Shape<Op>& shape, int64_t padded,
                        const Reach<Op>& reach, float* out) {
    if constexpr (Op::TILES) tiled_products<Op>(A, rows, B, shape, reach, out);
    else
        tiles_of(rows, padded, reach, [&](int64_t r, int64_t j, auto count) {
            constexpr int N = decltype(count)::value;
            register_tile<Op, MR, N>(
                shape.words, A + r * shape.wide, shape.wide, 1, B + j / PW * PW * shape.wide + j % PW, PW,
                [&](Floats(&s)[MR][N]) {
                    for (int i = 0; i < MR; i++)
                        for (int n = 0; n < N; n++) s[i][n] = Floats{};
                },
                [&](Floats(&s)[MR][N]) {
                    for (int i = 0; i < MR; i++)
                        for (int n = 0; n < N; n++) store(out + (r + i) * Op::WIDTH + j + n * VL, s[i][n]);
                });
        });
}

// scores[j] = change(scores[j], j-th key's number) for the keys from .. to of a tile, in numbers of some type with a stride.
template <class Number, class Change>
static INLINE void look_up(const char* at, int64_t stride, const KeyTile& tile, int64_t from, int64_t to, float* scores, Change change) {
    const Number* numbers = (const Number*)at;
    if (tile.neighbours && stride == 1) {
        numbers += tile.rows[0];
        for (int64_t j = from; j < to; j++) scores[j] = change(scores[j], numbers[j]);
    } else
        for (int64_t j = from; j < to; j++) scores[j] = change(scores[j], numbers[tile.rows[j] * stride]);
}

// A bias that is a number hides nothing: beyond 1e30, beside which scores vanish, it ends, so that its product with `by` is a number too.
static INLINE float added(float score, float bias, float by) {
    const float low = bias == NONE ? NONE : -1e30f, high = bias == -NONE ? -NONE : 1e30f;
    bias = bias < -1e30f ? low : bias;
    return score + (bias > 1e30f ? high : bias) * by;
}

// Applies band, mask and bias to a strip of scores. `factor` converts the bias to the units of the scores; `top`, where given, is
// computed again.
class PairMask {
    const Call& call;
    const float factor;

    void bias(const KeyTile& tile, int64_t from, int64_t to, int64_t b, int64_t h, int64_t n, float* scores) const {
        const Lookup& x = call.bias;
        const char* at = x.data + (b * x.batch + h * x.head + n * x.row) * size_of(x.type);
        const float by = factor;
        if (x.type == FLOAT32) look_up<float>(at, x.key, tile, from, to, scores, [by](float s, float y) { return added(s, y, by); });
        else if (x.type == BFLOAT16)
            look_up<uint16_t>(at, x.key, tile, from, to, scores, [by](float s, uint16_t y) { return added(s, from_bfloat16(y), by); });
        else
            look_up<uint16_t>(at, x.key, tile, from, to, scores, [by](float s, uint16_t y) { return s + from_float16(y) * by; });
    }

    // Keys outside the band of a query at `position`.
    static void band(const KeyTile& tile, int64_t from, int64_t to, int64_t position, float* scores) {
        const int64_t low = position - tile.high, high = position - tile.low;  // of positions that it sees
        if (tile.wide) {
            for (int64_t j = from; j < to; j++) {
                const int64_t at = tile.positions[j];
                scores[j] = ((at >= low) & (at <= high)) ? scores[j] : NONE;
            }
            return;
        }
        const Ints begin = splat_int(int32_t(most(-1, least(NEAR, low - tile.first))));
        const Ints end = splat_int(int32_t(most(-1, least(NEAR, high - tile.first))));
        for (int64_t j = from; j < to; j += VL) {
            const Ints at = *(const LooseInts*)(tile.after + j);
            store(scores + j, ((at >= begin) & (at <= end)) ? load(scores + j) : splat(NONE));
        }
    }

public:
    PairMask(const Call& call, float factor) : call(call), factor(factor) {}

    bool needed(Visibility visibility) const { return visibility == SOME || call.mask.data || call.bias.data; }

    template <class Op>
    void hide(const KeyTile& tile, Visibility visibility, const Reach<Op>& reach, int64_t b, int64_t h, const Queries& queries,
              int64_t first, int64_t rows, float* scores, float* top) const {
        for (int64_t r = 0; r < rows; r++) {
            float* row = scores + r * Op::WIDTH;
            const int64_t n = queries.rows[first + r], from = reach.begin(r), to = reach.end(r), last = least(to, tile.n);
            if (visibility == SOME) band(tile, from, to, queries.positions[first + r], row);
            if (call.bias.data) bias(tile, from, last, b, h, n, row);
            if (call.mask.data)
                look_up<uint8_t>(call.mask.data + b * call.mask.batch + h * call.mask.head + n * call.mask.row, call.mask.key, tile,
                                 from, last, row, [](float s, uint8_t seen) { return seen ? s : NONE; });
            if (!top) continue;
            Floats m = splat(NONE);
            for (int64_t j = from; j < to; j += VL) m = max(m, load(row + j));
            store(top + r * VL, m);
        }
    }
};

// Steps of K from .. to.
struct Steps {
    int64_t from, to;
};

// C (rows x columns) = C * factor for each row + A B, where A's numbers are at A[row * lda + k * step], and steps(row) says over which k a
// register tile of rows sums; over none it is left as it is.
template <class Op, int N, class Of, class Factor>
static INLINE void accumulate_columns(int64_t rows, Of steps, const float* A, int64_t lda, int64_t step, const float* B, int64_t ldb,
                                      float* C, int64_t ldc, Factor factor) {
    for (int64_t r = 0; r < rows; r += MR) {
        const Steps k = steps(r);
        if (k.from == k.to) continue;
        register_tile<Op, MR, N>(
            k.to - k.from, A + r * lda + k.from * step, lda, step, B + k.from * ldb, ldb,
            [&](Floats(&s)[MR][N]) {
                for (int i = 0; i < MR; i++)
                    for (int n = 0; n < N; n++) s[i][n] = load(C + (r + i) * ldc + n * VL) * factor(r + i);
            },
            [&](Floats(&s)[MR][N]) {
                for (int i = 0; i < MR; i++)
                    for (int n = 0; n < N; n++) store(C + (r + i) * ldc + n * VL, s[i][n]);
            });
    }
}

template <class Op, class Of, class Factor>
static void accumulate(int64_t rows, Of steps, const float* A, int64_t lda, int64_t step, const float* B, int64_t columns, float* C,
                       Factor factor) {
    for (int64_t c = 0; c < columns; c += PW)
        with_count<NV>(least(NV, (columns - c) / VL), [&](auto count) {
            accumulate_columns<Op, decltype(count)::value>(rows, steps, A, lda, step, B + c, columns, C + c, columns, factor);
        });
}
