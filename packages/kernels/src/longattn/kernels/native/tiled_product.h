// Products of bfloat16 in tiles of 16 x 16 sums: what `Float32` and `BFloat16` of product.h are to register tiles.
//
// With PARTS = 2 a number is the sum of two bfloat16, high and low, and a product three: high high + low high + high low. That is exact for
// float16 and leaves about 16 bits of a float32. An operand's low part lies `low` words behind its high part.
#pragma once
#include <type_traits>

#include "product.h"
#include "tiles.h"

#if defined(LONGATTN_TILES)
// Rows of words (two bfloat16) in memory, `row` words apart.
struct Operand {
    const float* at;
    int64_t row, low;
};

template <int PARTS_>
struct Tiled {
    static constexpr bool TILES = true;
    static constexpr int PAIR = 2, PARTS = PARTS_;
    static constexpr int SIDE = 16, TALL = 32;        // rows, columns and words of a tile; of a block of four sums
    static constexpr int GROUP = 32, PANEL = SIDE, WHOLE = 32, COLUMNS = 32, DEEP = SIDE;
    static constexpr int WIDTH = 128;                 // keys of a tile: scores of a strip stay in L1
    static constexpr int STRIP = 32, BACK_STRIP = 96; // backward sums over the strip's rows: three tiles at a time
    static constexpr int DEGREE = PARTS == 1 ? 3 : 5;

    // C (32 rows x keys from .. to, WIDTH apart) = A B. A: 32 rows, `deep` tiles each, the low part behind them; B: panels of 16 keys alike.
    static void scores(const float* A, int64_t lda, int64_t deep, const float* B, int64_t from, int64_t to, float* C) {
        if (deep == 1) return scores_of_few<PARTS>(A, lda, B, from, to, C);
        if (deep == 2) return scores_of_few<2 * PARTS>(A, lda, B, from, to, C);
        if constexpr (PARTS == 1) {
            if (deep == 3) return scores_of_few<3>(A, lda, B, from, to, C);
            if (deep == 4) return scores_of_few<4>(A, lda, B, from, to, C);
        }
        scores_of_many(A, lda, deep, B, from, to, C);
    }

    // C (32 x 32) += A (32 rows x `deep` tiles) B (`deep` x 16 rows of words x 32 columns).
    static void add(float* C, int64_t ldc, Operand A, Operand B, int64_t deep) {
        if (deep <= 0) return;
        Tiles::load<0>(C, ldc * 4), Tiles::load<1>(C + SIDE, ldc * 4);
        Tiles::load<2>(C + SIDE * ldc, ldc * 4), Tiles::load<3>(C + SIDE * ldc + SIDE, ldc * 4);
        for (int64_t k = 0; k + 1 < deep; k++) step<false>(C, ldc, A, B, k);
        step<true>(C, ldc, A, B, deep - 1);
    }

private:
    template <int N>
    using Number = std::integral_constant<int, N>;
    template <int N, class Visit>
    static INLINE void each(Visit visit) {
        if constexpr (N > 0) each<N - 1>(visit), visit(Number<N - 1>());
    }

    // The products of one tile of sums C, with tiles of A from A0 on and tile b of B in register B: with the high part both parts of A.
    template <int C, int A0, int B, int N, int b>
    static INLINE void products() {
        constexpr int DEEP_TILES = N / PARTS;
        Tiles::product<C, A0 + b % DEEP_TILES, B>();
        if constexpr (PARTS == 2 && b < DEEP_TILES) Tiles::product<C, A0 + DEEP_TILES + b, B>();
    }

    // N tiles to a row, 4 at most.
    template <int N>
    static void scores_of_few(const float* A, int64_t lda, const float* B, int64_t from, int64_t to, float* C) {
        if constexpr (N <= 2) scores_of_block<N>(A, lda, B, from, to, C);
        else scores_of_rows<N>(A, lda, B, from, to, C);
    }

    // All of A's 32 rows in registers 4 .. 7. A tile of sums is stored as soon as it is whole: stores in a row would keep products waiting.
    template <int N>
    static void scores_of_block(const float* A, int64_t lda, const float* B, int64_t from, int64_t to, float* C) {
        each<N>([&](auto a) {
            Tiles::load<4 + a()>(A + a() * SIDE, lda * 4);
            Tiles::load<4 + N + a()>(A + SIDE * lda + a() * SIDE, lda * 4);
        });
        for (int64_t j = from; j < to; j += SIDE) {
            const float* panel = B + j * N * SIDE;
            each<N>([&](auto b) { Tiles::load<2 + b()>(panel + b() * SIDE * SIDE, 64); });
            Tiles::zero<0>();
            each<N>([&](auto b) { products<0, 4, 2 + b(), N, b()>(); });
            Tiles::store<0>(C + j, WIDTH * 4);
            Tiles::zero<1>();
            each<N>([&](auto b) { products<1, 4 + N, 2 + b(), N, b()>(); });
            Tiles::store<1>(C + SIDE * WIDTH + j, WIDTH * 4);
        }
    }

    // 16 of A's rows at a time in registers 4 .. 7.
    template <int N>
    static void scores_of_rows(const float* A, int64_t lda, const float* B, int64_t from, int64_t to, float* C) {
        for (int q = 0; q < 2; q++, A += SIDE * lda, C += SIDE * WIDTH) {
            each<N>([&](auto a) { Tiles::load<4 + a()>(A + a() * SIDE, lda * 4); });
            for (int64_t j = from; j < to; j += SIDE) {
                const float* panel = B + j * N * SIDE;
                Tiles::zero<0>();
                each<N>([&](auto b) {
                    Tiles::load<2 + b() % 2>(panel + b() * SIDE * SIDE, 64);
                    products<0, 4, 2 + b() % 2, N, b()>();
                });
                Tiles::store<0>(C + j, WIDTH * 4);
            }
        }
    }

    // More of A than there are registers.
    static void scores_of_many(const float* A, int64_t lda, int64_t deep, const float* B, int64_t from, int64_t to, float* C) {
        for (int q = 0; q < 2; q++, A += SIDE * lda, C += SIDE * WIDTH)
            for (int64_t j = from; j < to; j += SIDE) {
                const float* panel = B + j * deep * PARTS * SIDE;
                Tiles::zero<0>();
                for (int64_t k = 0; k < deep; k++) {
                    Tiles::load<4>(A + k * SIDE, lda * 4), Tiles::load<2>(panel + k * SIDE * SIDE, 64);
                    Tiles::product<0, 4, 2>();
                    if constexpr (PARTS == 2) {
                        Tiles::load<5>(A + (deep + k) * SIDE, lda * 4);
                        Tiles::product<0, 5, 2>();
                        Tiles::load<3>(panel + (deep + k) * SIDE * SIDE, 64);
                        Tiles::product<0, 4, 3>();
                    }
                }
                Tiles::store<0>(C + j, WIDTH * 4);
            }
    }

    // One tile of depth: A's two tiles in 4 and 5, B's in 6 and 7. The last one stores each tile of sums once it is whole.
    template <bool LAST>
    static INLINE void step(float* C, int64_t ldc, const Operand& A, const Operand& B, int64_t k) {
        const float *a = A.at + k * SIDE, *b = B.at + k * SIDE * B.row;
        if constexpr (PARTS == 2) {
            four<false>(C, ldc, a, A.row, b + B.low, B.row);
            four<false>(C, ldc, a + A.low, A.row, b, B.row);
        }
        four<LAST>(C, ldc, a, A.row, b, B.row);
    }
    template <bool STORE>
    static INLINE void four(float* C, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb) {
        Tiles::load<4>(a, lda * 4), Tiles::load<6>(b, ldb * 4);
        Tiles::product<0, 4, 6>();
        if constexpr (STORE) Tiles::store<0>(C, ldc * 4);
        Tiles::load<7>(b + SIDE, ldb * 4);
        Tiles::product<1, 4, 7>();
        if constexpr (STORE) Tiles::store<1>(C + SIDE, ldc * 4);
        Tiles::load<5>(a + SIDE * lda, lda * 4);
        Tiles::product<2, 5, 6>();
        if constexpr (STORE) Tiles::store<2>(C + SIDE * ldc, ldc * 4);
        Tiles::product<3, 5, 7>();
        if constexpr (STORE) Tiles::store<3>(C + SIDE * ldc + SIDE, ldc * 4);
    }
};
#endif
