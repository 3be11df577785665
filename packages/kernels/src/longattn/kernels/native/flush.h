// How this thread treats results below 2^-126 while a Flush object lives; its destructor restores the earlier setting.
//
// On Intel's x86 processors a result that small is made by microcode (64 ns for a vector of powers 2^x), and every vector that holds a
// hidden score pays it. So tasks flush such results to zero. They do not take small inputs for zeros: a key of 1e-40 is what it is, and
// float16's denormals are ordinary float32. aarch64 makes small results at full speed, and its switch would take inputs for zeros too.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

class Flush {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();

    static void set(unsigned state) {
        asm volatile("" ::: "memory");  // what was computed before is stored before
        _mm_setcsr(state);
        asm volatile("" ::: "memory");
    }

public:
    explicit Flush(bool on) { set((before & ~0x8040u) | (on ? 0x8000u : 0u)); }
    ~Flush() { set(before); }
#else
public:
    explicit Flush(bool) {}
    ~Flush() {}
#endif
    Flush(const Flush&) = delete;
    Flush& operator=(const Flush&) = delete;
};
