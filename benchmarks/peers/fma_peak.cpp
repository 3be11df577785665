// Nothing but multiply-adds in registers, as many as asked for: what the arithmetic units can do.
#include "vectors.h"

#if defined(__AVX512BF16__)
static INLINE Floats multiply_add(Floats sum, Floats a, Floats b, bool half) {
    return half ? (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b) : sum + a * b;
}
#else
static INLINE Floats multiply_add(Floats sum, Floats a, Floats b, bool) { return sum + a * b; }
#endif

template <bool HALF>
static float spin(int64_t steps) {
    Floats sums[12], a = splat(0.5f), b = splat(0.25f);
    for (Floats& sum : sums) sum = splat(1);
    for (int64_t i = 0; i < steps; i++) {
        for (Floats& sum : sums) sum = multiply_add(sum, a, b, HALF);
        asm volatile("" : : : "memory");
    }
    float total = 0;
    for (Floats& sum : sums) total += sum[0];
    return total;
}

// Floating-point operations of one step, and `steps` of them.
extern "C" int64_t flops_of_step(int64_t half) { return 12 * VL * 2 * (half ? 2 : 1); }
extern "C" float multiply_adds(int64_t steps, int64_t half) { return half ? spin<true>(steps) : spin<false>(steps); }
