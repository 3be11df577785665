// Few query rows in tiles: products of up to 16 rows of bfloat16 with 64 keys and their values, for `FewQueries`.
//
// Scores are made transposed, keys x rows: rows of k are then an A operand as they lie in memory, and only q is packed, once. Values are
// packed in pairs of rows, numbers at even places apart from those at odd ones, which is the order that Stored16 keeps sums in.
#pragma once
#include "pack.h"
#include "stored.h"
#include "tiles.h"

#if defined(LONGATTN_TILES)
constexpr int64_t LEAST_TILED = 4;  // rows of a task; with fewer, sums in registers do as little work

template <int64_t KEYS_AT_ONCE, int64_t WIDEST>
class FewTiles {
    static constexpr int64_t SIDE = 16, NUMBERS = 2 * SIDE;  // of a tile; bfloat16 in a row of it
    const int64_t rows, dim, value_dim;
    const int64_t words, columns;  // of a row of q and k in whole tiles, and numbers of a row of v
    alignas(64) float Q[WIDEST / 2 * SIDE];                // (words, rows)
    alignas(64) float K[SIDE * WIDEST / 2];                // (keys, words), where rows cannot be read as they lie
    alignas(64) float V[KEYS_AT_ONCE / 2 * WIDEST];        // (pairs of keys, columns)
    alignas(64) float P[SIDE * KEYS_AT_ONCE / 2];          // (rows, pairs of keys)
    alignas(64) float S[SIDE * SIDE], acc[SIDE * WIDEST];  // (keys, rows); (rows, columns)

    static void upright(const float* from, int64_t ldf, float* to, int64_t ldt) {
        for (int64_t i = 0; i < SIDE; i += VL)
            for (int64_t j = 0; j < SIDE; j += VL) transpose(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
    }
    // `n` rows of `dim` bfloat16 as words of whole tiles, zeros beyond.
    template <class Row>
    void stage(int64_t n, Row row) {
        memset(K, 0, SIDE * words * 4);
        for (int64_t i = 0; i < n; i++) memcpy(K + i * words, row(i), dim * 2);
    }
    // A step of words of a row of v; nothing beyond `value_dim` is read.
    INLINE Ints step(const char* row, int64_t c) const {
        if (c + STEP <= value_dim) return *(const HalfAlignedInts*)(row + c * 2);
        Ints words = {};
        memcpy(&words, row + c * 2, (value_dim - c) * 2);
        return words;
    }

public:
    FewTiles(int64_t rows, int64_t dim, int64_t value_dim)
        : rows(rows), dim(dim), value_dim(value_dim), words(round_up(dim, NUMBERS) / 2), columns(round_up(value_dim, NUMBERS)) {}

    void open(const char* const* q) {
        stage(rows, [&](int64_t r) { return q[r]; });
        for (int64_t w = 0; w < words; w += SIDE) upright(K + w, words, Q + w * SIDE, SIDE);
        memset(acc, 0, SIDE * columns * 4);
        memset(V, 0, sizeof V);
        memset(P, 0, sizeof P);
    }

    // scores (rows x KEYS_AT_ONCE) = unit * q k^T for the keys at[0 .. n], which lie `k_step` bytes apart.
    void scores(const char* k, int64_t k_step, const int64_t* at, int64_t n, float unit, float* scores) {
        for (int64_t j = 0; j < n; j += SIDE) {
            const char* from = k + at[j] * k_step;
            int64_t step = k_step;
            if (j + SIDE > n || at[j + SIDE - 1] - at[j] != SIDE - 1 || dim % NUMBERS) {
                stage(least(SIDE, n - j), [&](int64_t i) { return k + at[j + i] * k_step; });
                from = (const char*)K, step = words * 4;
            }
            Tiles::zero<0>();
            for (int64_t w = 0; w < words; w += SIDE) {
                Tiles::load<1>(from + w * 4, step), Tiles::load<2>(Q + w * SIDE, 64);
                Tiles::product<0, 1, 2>();
            }
            Tiles::store<0>(S, 64);
            upright(S, SIDE, scores + j, KEYS_AT_ONCE);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < SIDE; i += VL) store(scores + r * KEYS_AT_ONCE + j + i, load(scores + r * KEYS_AT_ONCE + j + i) * unit);
        }
    }

    // acc = acc * factor + weights v; weights (rows x KEYS_AT_ONCE) are zeros from key n to a whole vector.
    void add_values(const char* v, int64_t v_step, const int64_t* at, int64_t n, const float* weights, const float* factor) {
        const int64_t keys = round_up(n, NUMBERS), known = round_up(n, VL);
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; factor[r] != 1 && c < columns; c += VL) store(acc + r * columns + c, load(acc + r * columns + c) * factor[r]);
            const float* row = weights + r * KEYS_AT_ONCE;
            auto weight = [&](int64_t j) { return j < known ? load(row + j) : Floats{}; };
            for (int64_t j = 0; j < keys; j += STEP) store_in_order<1>(P + (r * KEYS_AT_ONCE + j) / 2, 0, weight(j), weight(j + VL));
        }
        for (int64_t i = 0; i < keys; i += 2)
            for (int64_t c = 0; c < value_dim; c += STEP) {
                const Ints even = i < n ? step(v + at[i] * v_step, c) : Ints{}, odd = i + 1 < n ? step(v + at[i + 1] * v_step, c) : Ints{};
                float* to = V + i / 2 * columns + c;
                *(LooseInts*)to = (even & 0xffff) | odd << 16;
                *(LooseInts*)(to + VL) = (even >> 16 & 0xffff) | (odd & int32_t(0xffff0000));
            }
        for (int64_t c = 0; c < columns; c += NUMBERS) {
            Tiles::load<0>(acc + c, columns * 4), Tiles::load<1>(acc + c + SIDE, columns * 4);
            for (int64_t i = 0; i < keys / 2; i += SIDE) {
                Tiles::load<2>(P + i, KEYS_AT_ONCE * 2);
                Tiles::load<3>(V + i * columns + c, columns * 4);
                Tiles::product<0, 2, 3>();
                Tiles::load<4>(V + i * columns + c + SIDE, columns * 4);
                Tiles::product<1, 2, 4>();
            }
            Tiles::store<0>(acc + c, columns * 4), Tiles::store<1>(acc + c + SIDE, columns * 4);
        }
    }

    // Rows of sums, `wide` numbers each.
    void close(float* to, int64_t wide) const {
        for (int64_t r = 0; r < rows; r++) memcpy(to + r * wide, acc + r * columns, wide * 4);
    }
};
#endif
