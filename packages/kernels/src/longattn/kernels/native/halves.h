// Numbers in memory and as operands: loops over rows in any storage type, and vectors of numbers as bfloat16, in order or in pairs.
#pragma once
#include "product.h"

typedef uint16_t Halves __attribute__((vector_size(VL * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VL * 2), aligned(2), may_alias));

// To nearest, ties to even, in the lower half of each lane.
static INLINE Ints rounded_halves(Floats x) {
#if defined(__AVX512BF16__)
    return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(LONGATTN_PAIRS)
    return (Ints)vmovl_u16(vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x)));
#else
    const Ints bits = (Ints)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 & 0xffff;
    return (bits & 0x7fffffff) > 0x7f800000 ? splat_int(0x7fc0) : rounded;
#endif
}
static INLINE void store_halves(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    *(LooseHalves*)to = __builtin_convertvector(rounded_halves(x), Halves);
#endif
}
// What is left of x beside its high part.
static INLINE Floats left_over(Floats x) { return x - (Floats)(rounded_halves(x) << 16); }

// Two vectors of numbers as neighbours in memory: their high parts at `to`, with PARTS = 2 the low ones `low` words further on.
template <int PARTS>
static INLINE void store_in_order(float* to, int64_t low, Floats first, Floats second) {
#if defined(__AVX512BF16__)
    store(to, (Floats)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    store_halves((uint16_t*)to, first), store_halves((uint16_t*)(to + VL / 2), second);
#endif
    if constexpr (PARTS == 2) store_in_order<1>(to + low, 0, left_over(first), left_over(second));
}
// Two rows of numbers as one of words (row 0, row 1).
template <int PARTS>
static INLINE void store_in_pairs(float* to, int64_t low, Floats even, Floats odd) {
    store(to, (Floats)(rounded_halves(even) | rounded_halves(odd) << 16));
    if constexpr (PARTS == 2) store_in_pairs<1>(to + low, 0, left_over(even), left_over(odd));
}
