// Tile operations of AMX behind one type in two forms: the processor's, and the same in plain C++, equal in every bit.
//
// A tile is 16 rows of 64 bytes; there are 8, named by constants. product<C, A, B>() adds A (16 x 32 bfloat16) B (32 x 16, rows in pairs:
// 16 rows of 16 words of two bfloat16) to C (16 x 16 float32). LONGATTN_TILES names the form that the library is built with.
#pragma once
#include "vectors.h"

// In the order of Intel's Software Developer's Manual for TDPBF16PS: products at even and at odd places of a row are summed apart by fused
// multiply-adds, then both sums together, then onto C. Denormals are zeros, read and made, whatever the thread's settings are.
struct PlainTiles {
    struct Tile {
        alignas(64) unsigned char bytes[16][64];
    };
    // How this thread's tiles are set up while it lives; nothing here.
    struct State {
        State() {}
        ~State() {}
    };

    template <int T>
    static void zero() { memset(&tile(T), 0, sizeof(Tile)); }
    template <int T>
    static void load(const void* from, int64_t stride) {
        for (int i = 0; i < 16; i++) memcpy(tile(T).bytes[i], (const char*)from + i * stride, 64);
    }
    template <int T>
    static void store(void* to, int64_t stride) {
        for (int i = 0; i < 16; i++) memcpy((char*)to + i * stride, tile(T).bytes[i], 64);
    }
    template <int C, int A, int B>
    static void product() { add(tile(C), tile(A), tile(B)); }

private:
    static Tile& tile(int i) {
        static thread_local Tile tiles[8];
        return tiles[i];
    }
    static INLINE Floats flushed(Floats x) {
        const Ints bits = (Ints)x, magnitude = bits & 0x7fffffff;
        return (Floats)(bits & (magnitude < 0x00800000 ? splat_int(int32_t(0x80000000)) : splat_int(-1)));
    }
    // a * b + c in one rounding. The product of two bfloat16 is whole in float32, but not where it under- or overflows.
    static INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
        return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
        return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
        for (int i = 0; i < VL; i++) c[i] = std::fma(a[i], b[i], c[i]);
        return c;
#endif
    }
    static INLINE Floats upper(Ints words) { return flushed((Floats)(words & int32_t(0xffff0000))); }
    static void add(Tile& c, const Tile& a, const Tile& b) {
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 16; n += VL) {
                Floats even = {}, odd = {};
                for (int k = 0; k < 16; k++) {
                    const Ints pair = *(const LooseInts*)(b.bytes[k] + 4 * n), factor = splat_int(((const Word*)a.bytes[m])[k]);
                    even = flushed(fused(upper(factor << 16), upper(pair << 16), even));
                    odd = flushed(fused(upper(factor), upper(pair), odd));
                }
                float* sum = (float*)c.bytes[m] + n;
                store_floats(sum, flushed(flushed(load_floats(sum)) + flushed(even + odd)));
            }
    }
    static INLINE Floats load_floats(const float* p) { return ::load(p); }
    static INLINE void store_floats(float* p, Floats x) { ::store(p, x); }
};

#if defined(__AMX_BF16__)
struct HardwareTiles {
    // Sets up eight whole tiles for this thread; its end restores what was set up before, also when a task throws.
    class State {
        struct Layout {
            alignas(64) uint8_t bytes[64];
        };
        Layout before;

    public:
        State() {
            Layout whole = {};
            whole.bytes[0] = 1;  // palette
            for (int i = 0; i < 8; i++) whole.bytes[16 + 2 * i] = 64, whole.bytes[48 + i] = 16;
            asm volatile("sttilecfg %0" : "=m"(before));
            // GCC 12's intrinsic names 8 of these 64 bytes, and the rest may never be written.
            asm volatile("ldtilecfg %0" : : "m"(whole));
        }
        ~State() { asm volatile("ldtilecfg %0" : : "m"(before)); }
        State(const State&) = delete;
        State& operator=(const State&) = delete;
    };

    template <int T>
    static INLINE void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
    template <int T>
    static INLINE void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
    }
    template <int T>
    static INLINE void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
    }
    template <int C, int A, int B>
    static INLINE void product() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
};
#endif

#if defined(LONGATTN_TILES)
typedef LONGATTN_TILES Tiles;
typedef Tiles::State TileState;
#else
struct TileState {
    TileState() {}
    ~TileState() {}
};
#endif
