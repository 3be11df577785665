// Vectors of VL floats for whatever the compiler is told to build for, and the few operations on them that attention needs.
//
// GCC's and Clang's vector extension says almost everything once; what it has no word for (rounding to bfloat16, scaling by a power of
// two) is an intrinsic where AVX-512 has it and arithmetic elsewhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
// One instruction multiplies pairs of bfloat16 and adds them to a sum.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LONGATTN_PAIRS
#endif

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int VL = 16, NV = 4;  // 32 registers: a tile of 6 x 4 sums, 4 of B, 1 of A
#elif defined(__AVX2__)
constexpr int VL = 8, NV = 2;  // 16 registers: 6 x 2, 2, 1
#elif defined(__aarch64__)
constexpr int VL = 4, NV = 4;
#else
constexpr int VL = 4, NV = 2;
#endif
constexpr int MR = 6;         // rows of a register tile
constexpr int PW = NV * VL;   // columns of a register tile

typedef float Floats __attribute__((vector_size(VL * 4)));
typedef int32_t Ints __attribute__((vector_size(VL * 4)));
typedef float LooseFloats __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t Word __attribute__((may_alias));

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float FAR = 1 << 20;  // scores of which float32 knows no fractions that matter; see far_rows.py
constexpr double LOG2_E = 1.4426950408889634074, LN_2 = 0.69314718055994530942;

static INLINE Floats load(const float* p) { return *(const LooseFloats*)p; }
static INLINE void store(float* p, Floats x) { *(LooseFloats*)p = x; }
// x - 0 is x for every x, so that this is one broadcast; for a word of two bfloat16 it must be integer arithmetic.
static INLINE Floats splat(float x) { return x - Floats{}; }
static INLINE Floats splat_word(const float* p) { return (Floats)(*(const Word*)p - Ints{}); }
static INLINE Ints splat_int(int32_t x) { return x - Ints{}; }
// Of two operands with a NaN both take the second.
static INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
static INLINE Floats min(Floats a, Floats b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// Of two vectors, in blocks of WIDTH lanes: the first's even block, then the second's; and the same of the odd ones. Numbers of lanes are
// constants, as the one shuffle that GCC and Clang share asks.
constexpr int lower_lane(int lane, int width) { return lane & width ? lane - width + VL : lane; }
constexpr int upper_lane(int lane, int width) { return lane & width ? lane + VL : lane + width; }
template <int WIDTH, class Vector, int... LANE>
static INLINE Vector lower_lanes(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, lower_lane(LANE, WIDTH)...);
}
template <int WIDTH, class Vector, int... LANE>
static INLINE Vector upper_lanes(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, upper_lane(LANE, WIDTH)...);
}
template <int WIDTH, class Vector>
static INLINE Vector lower_lanes(Vector a, Vector b) { return lower_lanes<WIDTH>(a, b, std::make_integer_sequence<int, VL>()); }
template <int WIDTH, class Vector>
static INLINE Vector upper_lanes(Vector a, Vector b) { return upper_lanes<WIDTH>(a, b, std::make_integer_sequence<int, VL>()); }

// Lanes halved until one is left.
template <int WIDTH = VL / 2, class Join>
static INLINE float joined(Floats x, Join join) {
    x = join(x, upper_lanes<WIDTH>(x, x));
    if constexpr (WIDTH > 1) return joined<WIDTH / 2>(x, join);
    return x[0];
}
static INLINE float sum(Floats x) { return joined(x, [](Floats a, Floats b) { return a + b; }); }
static INLINE float largest(Floats x) { return joined(x, [](Floats a, Floats b) { return max(a, b); }); }

// 2^x for x <= 127; 0 where the result would be below 2^-126, -inf included; NaN where x is. Relative error 1e-7 (DEGREE 5) or 7.5e-5 (DEGREE 3, for
// probabilities that are rounded to bfloat16 next): minimax polynomials of the fraction.
template <int DEGREE>
static INLINE Floats exp2(Floats x) {
#if defined(__AVX512DQ__)
    x = (Floats)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // of two operands with a NaN it takes the second
    Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = max(splat(-127.f), min(splat(127.f), x));
    const Floats rounded = x + 12582912.f;  // 1.5 * 2^23: the sum's last bits are the nearest whole number
    const Floats f = x - (rounded - 12582912.f);
#endif
    Floats p;
#if defined(__AVX512DQ__)
    if (DEGREE == 3) {
        p = f * 0.07802452147006989f + 0.2260671705007553f;
        p = p * f + 0.6958335041999817f;
        p = p * f + 0.9999251961708069f;
    } else {
        p = f * 0.0018775766948238015f + 0.008989340625703335f;
        p = p * f + 0.05582631751894951f;
        p = p * f + 0.24015361070632935f;
        p = p * f + 0.6931530833244324f;
        p = p * f + 0.9999999403953552f;
    }
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    if (DEGREE == 3) {
        p = f * 0.0551716685295105f + 0.2426111251115799f;
        p = p * f + 0.6932609677314758f;
        p = p * f + 0.9999280571937561f;
    } else {
        p = f * 0.001326472731307149f + 0.009671512991189957f;
        p = p * f + 0.05550733581185341f;
        p = p * f + 0.24022242426872253f;
        p = p * f + 0.6931470036506653f;
        p = p * f + 1.f;
    }
    return p * (Floats)(((Ints)rounded << 23) + 0x3f800000);  // of -127 the exponent field is 0, and so is the number
#endif
}

// Of a normal number above 0; absolute error 1e-7. The exponent, and twice the atanh series of the fraction between 2^-0.5 and 2^0.5.
static INLINE Floats log2(Floats x) {
    const Ints bits = (Ints)x - 0x3f3504f3, exponent = bits >> 23;
    const Floats f = (Floats)((bits & 0x007fffff) + 0x3f3504f3), s = (f - 1) / (f + 1), square = s * s;
    const Floats series = 1 + square * (1 / 3.f + square * (1 / 5.f + square * (1 / 7.f + square * (1 / 9.f))));
    return __builtin_convertvector(exponent, Floats) + s * series * float(2 * LOG2_E);
}

// Storage types. Numbers in memory are float32, bfloat16 or float16; arithmetic is float32, or bfloat16 products summed in float32.
enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
static INLINE int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

static INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static INLINE float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
static INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
// float16's exponent bias is 112 less than float32's; a denormal is its mantissa times 2^-24. No number on the way is a denormal float32.
static INLINE float from_float16(uint16_t x) {
    const uint32_t magnitude = x & 0x7fff, shifted = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    const uint32_t small = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
    return from_bits((magnitude < 0x400 ? small : shifted) | uint32_t(x & 0x8000) << 16);
}
static INLINE uint16_t to_float16(float x) {
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    // Below 2^-14 the sum with 0.5 rounds to float16's denormals by itself; above, round the mantissa and move the exponent.
    uint32_t small = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
    uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000u) >> 13;
    uint32_t half = bits < 0x38800000u ? small : bits >= 0x477ff000u ? 0x7c00u : normal;
    return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00u : half));
}
