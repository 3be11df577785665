// Rows as they are stored, two vectors of numbers at a time, widened in registers on their way from memory.
//
// A step is 2 * VL neighbouring numbers. Each storage type decides which of them go to which vector: a sum over a row does not depend on
// it, and `in_order` restores the order of a row of results.
#pragma once
#include "halves.h"

constexpr int64_t STEP = 2 * VL;

// Words of two numbers, wherever such a number may begin.
typedef int32_t HalfAlignedInts __attribute__((vector_size(VL * 4), aligned(2), may_alias));

struct Pair {
    Floats a, b;
};

// A step of a key and of a query, whose products are summed lane by lane.
struct Widened {
    typedef Pair Key;
    static constexpr int64_t QUERY = STEP;  // floats of a step of a query
    static INLINE void keep(float* to, Key x) { store(to, x.a), store(to + VL, x.b); }
    static INLINE Floats multiply(Floats sum, const float* q, Key k) { return sum + load(q) * k.a + load(q + VL) * k.b; }
};

struct Stored32 : Widened {
    static constexpr int64_t BYTES = 4 * STEP;
    static INLINE Pair step(const char* p) { return {load((const float*)p), load((const float*)p + VL)}; }
    static INLINE Pair key(const char* p) { return step(p); }
#if defined(__AVX512BW__)
    static INLINE Pair key(const char* p, int64_t n) { return step(p, n); }
    static INLINE Pair step(const char* p, int64_t n) {
        const uint32_t seen = (uint64_t(1) << n) - 1;
        return {(Floats)_mm512_maskz_loadu_ps(seen, p), (Floats)_mm512_maskz_loadu_ps(seen >> VL, p + 4 * VL)};
    }
#endif
    static INLINE void in_order(float* to, Pair x) { store(to, x.a), store(to + VL, x.b); }
};

// The numbers at even places and those at odd ones: each is the upper half of a float32.
struct Stored16
#if defined(LONGATTN_PAIRS)
{
    // Products of bfloat16 as they are stored, two to a lane.
    typedef Floats Key;
    static constexpr int64_t QUERY = VL;
    static INLINE Key key(const char* p) { return (Floats)(Ints)*(const HalfAlignedInts*)p; }
#if defined(__AVX512BF16__)
    static INLINE Key key(const char* p, int64_t n) { return (Floats)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p); }
#endif
    static INLINE void keep(float* to, Key x) { store(to, x); }
    static INLINE Floats multiply(Floats sum, const float* q, Key k) { return BFloat16::add(sum, load(q), k); }
#else
    : Widened {
    static INLINE Pair key(const char* p) { return step(p); }
#if defined(__AVX512BW__)
    static INLINE Pair key(const char* p, int64_t n) { return step(p, n); }
#endif
#endif
    static constexpr int64_t BYTES = 2 * STEP;
    static INLINE Pair apart(Ints x) { return {(Floats)(x << 16), (Floats)(x & int32_t(0xffff0000))}; }
    static INLINE Pair step(const char* p) { return apart(*(const HalfAlignedInts*)p); }
#if defined(__AVX512BW__)
    static INLINE Pair step(const char* p, int64_t n) {
        return apart((Ints)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p));
    }
#endif
    static INLINE void in_order(float* to, Pair x) {
        for (int i = 0; i < VL; i++) to[2 * i] = x.a[i], to[2 * i + 1] = x.b[i];
    }
};

struct StoredHalf : Widened {
    static constexpr int64_t BYTES = 2 * STEP;
    static INLINE Floats widened(const char* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        Halves halves;
        memcpy(&halves, p, sizeof halves);
        const Ints bits = __builtin_convertvector(halves, Ints), magnitude = bits & 0x7fff;
        const Ints shifted = (magnitude << 13) + (magnitude >= 0x7c00 ? splat_int(0x70000000) : splat_int(0x38000000));
        const Ints small = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);  // as from_float16
        return (Floats)((magnitude < 0x400 ? small : shifted) | (bits & 0x8000) << 16);
#endif
    }
    static INLINE Pair step(const char* p) { return {widened(p), widened(p + 2 * VL)}; }
    static INLINE Pair key(const char* p) { return step(p); }
#if defined(__AVX512BW__)
    static INLINE Pair key(const char* p, int64_t n) { return step(p, n); }
    static INLINE Pair step(const char* p, int64_t n) {
        const __mmask32 seen = __mmask32((uint64_t(1) << n) - 1);
        const __m512i halves = _mm512_maskz_loadu_epi16(seen, p);
        return {(Floats)_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                (Floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    }
#endif
    static INLINE void in_order(float* to, Pair x) { store(to, x.a), store(to + VL, x.b); }
};

// The first n numbers of a step, 0 < n < STEP, and zeros: nothing beyond them is read. As values, and as a key.
template <class Stored>
static INLINE Pair step_of(const char* p, int64_t n) {
#if defined(__AVX512BW__)
    return Stored::step(p, n);
#else
    alignas(64) char room[Stored::BYTES] = {};
    memcpy(room, p, n * (Stored::BYTES / STEP));
    return Stored::step(room);
#endif
}
template <class Stored>
static INLINE typename Stored::Key key_of(const char* p, int64_t n) {
#if defined(__AVX512BW__)
    return Stored::key(p, n);
#else
    alignas(64) char room[Stored::BYTES] = {};
    memcpy(room, p, n * (Stored::BYTES / STEP));
    return Stored::key(room);
#endif
}

// The sums over lanes of VL vectors, sum i in lane i: log2(VL) rounds in which two vectors become one. Leaves nothing of x.
template <int WIDTH = 1>
static INLINE Floats sums_of_lanes(Floats (&x)[VL]) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; i += 2 * WIDTH)
        x[i] = lower_lanes<WIDTH>(x[i], x[i + WIDTH]) + upper_lanes<WIDTH>(x[i], x[i + WIDTH]);
    if constexpr (2 * WIDTH < VL) return sums_of_lanes<2 * WIDTH>(x);
    return x[0];
}
