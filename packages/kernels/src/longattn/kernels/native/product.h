// The one product that everything is made of: C (rows x columns) from A (rows x K, read one number at a time and broadcast) and B
// (K x columns, read in vectors), in tiles of MR x PW sums that stay in registers for the whole of K.
//
// A step of K is a 32-bit word of A and of B: one float32, or a pair of neighbouring bfloat16 that one instruction multiplies and adds.
#pragma once
#include "vectors.h"

// What every kind of product says of its shapes; register tiles share these.
struct RegisterTiles {
    static constexpr bool TILES = false;
    static constexpr int PARTS = 1;                    // bfloat16 that make one number
    static constexpr int TALL = MR;                    // rows that share a reach of keys
    static constexpr int PANEL = PW, WHOLE = PW;       // keys of a packed panel, and of what a tile of keys is a multiple
    static constexpr int COLUMNS = VL, DEEP = VL;      // of what columns of sums, and words of a row, are multiples
    static constexpr int WIDTH = 256;                  // most keys of a tile: K^T, V and a strip of scores stay in L2
    static constexpr int STRIP = 96, BACK_STRIP = 96;  // query rows whose scores are in memory at a time
};

struct Float32 : RegisterTiles {
    static constexpr int PAIR = 1;    // numbers in a step of K
    static constexpr int GROUP = VL;  // keys that are weighed at a time
    static constexpr int DEGREE = 5;  // of the polynomial for exp2
    static INLINE Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

#if defined(LONGATTN_PAIRS)
struct BFloat16 : RegisterTiles {
    static constexpr int PAIR = 2, GROUP = 2 * VL;
    static constexpr int DEGREE = 3;
    static INLINE Floats add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
    }
};
#endif

// One register tile of R x N vectors: begin(sums), then K steps, then end(sums). a(r, k) is at A[r * row + k * step].
template <class Op, int R, int N, class Begin, class End>
static INLINE void register_tile(
    int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, Begin begin, End end) {
    Floats sums[R][N];
    begin(sums);
    for (int64_t k = 0; k < K; k++) {
        Floats b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) b[n] = load(B + k * ldb + n * VL);  // B: L1 or L2 -> registers, once a tile of rows
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Floats a = splat_word(A + r * row + k * step);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sums[r][n] = Op::add(sums[r][n], a, b[n]);
        }
    }
    end(sums);
}
