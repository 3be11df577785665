// Numbers of 8 bits as they are stored, 2 * VL of them at a time, widened in registers: whole ones, and float8 (e4m3fn). What they are to be
// multiplied with, a scale for each row, is left to the scores and the weights. The order of a step is that of memory.
#pragma once
#include "stored.h"

typedef int8_t LooseBytes __attribute__((vector_size(VL), aligned(1), may_alias));

// What both are: Stored::widened is VL of them as floats.
template <class Stored>
struct StoredBytes : Widened {
    static constexpr int64_t BYTES = STEP;
    static INLINE Pair step(const char* p) { return {Stored::widened(p), Stored::widened(p + VL)}; }
    static INLINE Pair key(const char* p) { return step(p); }
    // The first n numbers, and zeros.
    static INLINE Pair step(const char* p, int64_t n) {
        alignas(64) char room[BYTES] = {};
        memcpy(room, p, n);
        return step(room);
    }
    static INLINE Pair key(const char* p, int64_t n) { return step(p, n); }
    static INLINE void in_order(float* to, Pair x) { store(to, x.a), store(to + VL, x.b); }
};

struct StoredInt8 : StoredBytes<StoredInt8> {
    static constexpr float UNIT = 1;  // what numbers in registers are to be multiplied with, beside the scale
    static INLINE Floats widened(const char* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
        return __builtin_convertvector(__builtin_convertvector(*(const LooseBytes*)p, Ints), Floats);
#endif
    }
};

// As float16 of the same fields a number is 256 times too small, subnormal ones included, so that the processor widens it. NaN is never stored.
struct StoredFloat8 : StoredBytes<StoredFloat8> {
    static constexpr float UNIT = 256;
    static INLINE Floats widened(const char* p) {
#if defined(__AVX512BW__)
        const __m256i halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8);
        return (Floats)_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(halves, 1), _mm256_set1_epi16(int16_t(0xbf80))));
#elif defined(__AVX2__) && !defined(__AVX512F__)
        const __m128i halves = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8);
        return (Floats)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(halves, 1), _mm_set1_epi16(int16_t(0xbf80))));
#else
        const Ints bits = __builtin_convertvector(*(const LooseBytes*)p, Ints), magnitude = bits & 0x7f;
        const Ints shifted = (magnitude << 20) + splat_int(112 << 23);
        const Ints small = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-17f);
        return (Floats)((magnitude < 8 ? small : shifted) | (bits & 0x80) << 24);
#endif
    }
};

// Keys of 8 bits as pairs of bfloat16, which has all their digits, for queries that are stored so.
#if defined(__AVX512BF16__)
template <class Stored>
struct AsHalves : Stored {
    typedef Floats Key;
    static constexpr int64_t QUERY = VL;
    static INLINE Key halves(Pair x) { return (Floats)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a); }
    static INLINE Key key(const char* p) { return halves(Stored::step(p)); }
    static INLINE Key key(const char* p, int64_t n) { return halves(Stored::step(p, n)); }
    static INLINE Floats multiply(Floats sum, const float* q, Key k) { return BFloat16::add(sum, load(q), k); }
};
#else
template <class Stored>
using AsHalves = Stored;
#endif
