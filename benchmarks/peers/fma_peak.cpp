// Nothing but multiply-adds in registers, as many as asked for: what the arithmetic units can do.
#include "vectors.h"

#if defined(__x86_64__)
#define REGISTER(x) "+v"(x)
#else
#define REGISTER(x) "+w"(x)
#endif

#if defined(__AVX512BF16__)
static INLINE Floats multiply_add(Floats sum, Floats a, Floats b, bool half) {
    return half ? (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b) : sum + a * b;
}
#else
static INLINE Floats multiply_add(Floats sum, Floats a, Floats b, bool) { return sum + a * b; }
#endif

template <bool HALF>
static float spin(int64_t steps) {
    Floats sums[12], a = splat(0.5f), b = splat(0.25f), total = splat(0);
#pragma GCC unroll 12
    for (int n = 0; n < 12; n++) sums[n] = splat(float(n));  // equal sums would be one sum
    for (int64_t i = 0; i < steps; i++) {
        asm volatile("" : REGISTER(a));  // as if new each time: the product must not be known beforehand
#pragma GCC unroll 12
        for (int n = 0; n < 12; n++) sums[n] = multiply_add(sums[n], a, b, HALF);
    }
#pragma GCC unroll 12
    for (int n = 0; n < 12; n++) total += sums[n];
    return sum(total);
}

// Floating-point operations of one step, and `steps` of them.
extern "C" int64_t flops_of_step(int64_t half) { return 12 * VL * 2 * (half ? 2 : 1); }
extern "C" float multiply_adds(int64_t steps, int64_t half) { return half ? spin<true>(steps) : spin<false>(steps); }
