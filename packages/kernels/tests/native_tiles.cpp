// Tile operations in plain C++ beside TDPBF16PS as Intel's manual writes it, number by number; where the processor has tiles and this was
// compiled for them, the processor's beside both. Exits with 1 where a bit differs, and prints what was compared.
#include <cstdio>
#include <cstdlib>

#include "flush.h"
#include "tiles.h"

alignas(64) static uint16_t A[512], B[512];
alignas(64) static float C[256], plain[256], written[256];

static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
static float number(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return flushed(y);
}

static void as_written() {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; k++) {
                even = flushed(std::fma(number(A[m * 32 + 2 * k]), number(B[k * 32 + 2 * n]), even));
                odd = flushed(std::fma(number(A[m * 32 + 2 * k + 1]), number(B[k * 32 + 2 * n + 1]), odd));
            }
            written[m * 16 + n] = flushed(flushed(C[m * 16 + n]) + flushed(even + odd));
        }
}

template <class Form>
static void in_tiles(float* to) {
    const typename Form::State state;
    Form::template load<0>(C, 64), Form::template load<1>(A, 64), Form::template load<2>(B, 64);
    Form::template product<0, 1, 2>();
    Form::template store<0>(to, 64);
}

static int differing(const float* x, const float* y) {
    int bad = 0;
    for (int i = 0; i < 256; i++) bad += memcmp(x + i, y + i, 4) != 0 && !(x[i] != x[i] && y[i] != y[i]);
    return bad;
}

int main(int count, char**) {
    const bool processors = count > 1;  // an argument says that this process may use the processor's tiles
    int bad = 0, off = 0, compared = 0;
    auto any = [] { return uint16_t(rand() >> 7); };
    for (int trial = 0; trial < 400; trial++) {
        const int kind = trial % 4;  // near 1; any number up to 2; denormals and the smallest normal numbers; anything
        auto make = [&] { return uint16_t(kind == 0 ? (any() & 0x80ff) | 0x3f00 : kind == 1 ? any() & 0xbfff : kind == 2 ? any() & 0x81ff : any()); };
        for (auto& x : A) x = make();
        for (auto& x : B) x = kind == 2 ? uint16_t(any() & 0xbfff) : make();
        for (auto& x : C) x = kind == 2 ? 1e-39f * (rand() % 100) : (rand() % 2000 - 1000) * 1e-3f;
        const Flush small(trial % 8 < 4);  // whatever the thread does with small results
        as_written();
        in_tiles<PlainTiles>(plain);
        bad += differing(plain, written), compared += 256;
#if defined(__AMX_BF16__)
        if (processors) {
            alignas(64) float real[256];
            in_tiles<HardwareTiles>(real);
            off += differing(real, written);
        }
#endif
    }
    printf("plain: %d of %d differ\n", bad, compared);
    if (processors) printf("processor: %d of %d differ\n", off, compared);
    return bad || off;
}
