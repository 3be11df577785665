// Rows of q, k, v from memory into the layouts that register tiles read, and results back. Each row is converted once.
#pragma once
#include "call.h"
#include "halves.h"

// How wide rows are in words (one float32, or two bfloat16): as an A operand, `wide`, of PARTS parts; and as columns of a B operand, a
// `line`, of PARTS times `columns`. Parts follow one another.
template <class Op>
struct Shape {
    int64_t dim, words, part, wide, columns, line;
    explicit Shape(int64_t dim)
        : dim(dim), words((dim + Op::PAIR - 1) / Op::PAIR), part(round_up(words, Op::DEEP)), wide(part * Op::PARTS),
          columns(round_up(dim, Op::COLUMNS)), line(columns * Op::PARTS) {}
};

// Rows of one head lie far apart, so that no processor foresees the next one: it is asked for while others are converted.
constexpr int64_t ROWS_AHEAD = 16;  // rows
static INLINE void ask_for(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}
static INLINE void ask_to_write(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 1);
}

// Rows are short: a call of memcpy for each costs as much as it does.
static INLINE void copy_row(void* to, const char* from, int64_t bytes) {
    constexpr int64_t WHOLE = VL * 4;
    int64_t i = 0;
    for (; i + WHOLE <= bytes; i += WHOLE) store((float*)((char*)to + i), load((const float*)(from + i)));
    if (i < bytes) memcpy((char*)to + i, from + i, bytes - i);
}

static INLINE void load_floats(float* to, const char* from, int64_t type, int64_t n, float factor) {
    const uint16_t* halves = (const uint16_t*)from;
    // No product with 1: in a task it would make a denormal zero.
    if (type == FLOAT32 && factor == 1) copy_row(to, from, n * 4);
    else if (type == BFLOAT16 && factor == 1)
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(halves[i]);
    else if (type == FLOAT32)
        for (int64_t i = 0; i < n; i++) to[i] = ((const float*)from)[i] * factor;
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(halves[i]) * factor;
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_float16(halves[i]) * factor;
}

static INLINE void store_floats(char* to, const float* from, int64_t type, int64_t n) {
    uint16_t* halves = (uint16_t*)to;
    if (type == FLOAT32)
        for (int64_t i = 0; i < n; i++) ((float*)to)[i] = from[i];
    else if (type == BFLOAT16) {
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store_halves(halves + i, load(from + i));
        for (; i < n; i++) halves[i] = to_bfloat16(from[i]);
    } else
        for (int64_t i = 0; i < n; i++) halves[i] = to_float16(from[i]);
}

// A number as the sum of two bfloat16; what is not finite has no low part.
static INLINE void split(float x, uint16_t& high, uint16_t& low) {
    high = to_bfloat16(x);
    const float rest = x - from_bfloat16(high);
    low = rest - rest == 0 ? to_bfloat16(rest) : 0;
}
template <class Number>
static INLINE void load_parts(uint16_t* to, int64_t dim, int64_t part, Number number) {
    for (int64_t i = 0; i < dim; i++) split(number(i), to[i], to[part + i]);
    for (int64_t i = dim; i < part; i++) to[i] = to[part + i] = 0;
}

// A row of PARTS parts of `width` words, zero beyond `dim` numbers; `factor` is a power of two where words are bfloat16.
template <class Op>
static INLINE void load_words(float* to, const char* from, int64_t type, int64_t dim, int64_t width, float factor) {
    if (Op::PAIR == 1) {
        load_floats(to, from, type, dim, factor);
        for (int64_t i = dim; i < width; i++) to[i] = 0;
        return;
    }
    uint16_t* halves = (uint16_t*)to;
    if constexpr (Op::PARTS == 2) {
        const uint16_t* given = (const uint16_t*)from;
        if (type == FLOAT32) load_parts(halves, dim, width * 2, [=](int64_t i) { return ((const float*)from)[i] * factor; });
        else if (type == BFLOAT16) load_parts(halves, dim, width * 2, [=](int64_t i) { return from_bfloat16(given[i]) * factor; });
        else load_parts(halves, dim, width * 2, [=](int64_t i) { return from_float16(given[i]) * factor; });
        return;
    }
    if (type == BFLOAT16 && factor == 1) copy_row(halves, from, dim * 2);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < dim; i++) halves[i] = to_bfloat16(from_bfloat16(((const uint16_t*)from)[i]) * factor);
    else
        for (int64_t i = 0; i < dim; i++) halves[i] = to_bfloat16(((const float*)from)[i] * factor);
    for (int64_t i = dim; i < width * 2; i++) halves[i] = 0;
}

// One round of a transposition: rows whose numbers differ in the bit WIDTH exchange lanes; then the wider ones.
template <int WIDTH>
static INLINE void exchange(Ints (&x)[VL]) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
        if (i & WIDTH) continue;
        const Ints low = lower_lanes<WIDTH>(x[i], x[i + WIDTH]), high = upper_lanes<WIDTH>(x[i], x[i + WIDTH]);
        x[i] = low, x[i + WIDTH] = high;
    }
    if constexpr (2 * WIDTH < VL) exchange<2 * WIDTH>(x);
}

// VL x VL words, transposed in registers: log2(VL) rounds.
static INLINE void transpose(const float* from, int64_t ldf, float* to, int64_t ldt) {
    Ints x[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) x[i] = *(const LooseInts*)(from + i * ldf);
    exchange<1>(x);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) *(LooseInts*)(to + i * ldt) = x[i];
}

// Rows of k (or v) as panels of PANEL keys, (panels, wide, PANEL) words, transposed; `stage` holds VL rows.
template <class Op>
static void pack_transposed(float* to, float* stage, const Tensor& x, const Shape<Op>& shape, int64_t b, int64_t h,
                            const int64_t* rows, int64_t n, int64_t padded) {
    const int64_t bytes = shape.dim * size_of(x.type);
    for (int64_t i = 0; i < least(n, ROWS_AHEAD); i++) ask_for(x.at(b, rows[i], h), bytes);
    for (int64_t first = 0; first < padded; first += VL) {
        for (int64_t i = 0; i < VL; i++) {
            if (first + i + ROWS_AHEAD < n) ask_for(x.at(b, rows[first + i + ROWS_AHEAD], h), bytes);
            float* row = stage + i * shape.wide;
            if (first + i < n) load_words<Op>(row, x.at(b, rows[first + i], h), x.type, shape.dim, shape.part, 1);
            else memset(row, 0, shape.wide * 4);
        }
        constexpr int64_t PANEL = Op::PANEL;
        float* panel = to + first / PANEL * PANEL * shape.wide + first % PANEL;
        for (int64_t w = 0; w < shape.wide; w += VL) transpose(stage + w, shape.wide, panel + w * PANEL, PANEL);
    }
}

// Rows as a B operand whose K is the rows: (rows / PAIR, line) words. `row(i)` is the i-th source, null beyond the last: zeros.
template <class Op, class Row>
static INLINE void pack_rows(float* to, float* stage, const Shape<Op>& shape, int64_t type, int64_t padded, float factor, Row row) {
    for (int64_t i = 0; i < padded; i += Op::PAIR) {
        float* line = to + i / Op::PAIR * shape.line;
        if (Op::PAIR == 1) {
            if (const char* from = row(i)) load_words<Op>(line, from, type, shape.dim, shape.columns, factor);
            else memset(line, 0, shape.columns * 4);
            continue;
        }
        uint16_t* even = (uint16_t*)stage;
        uint16_t* odd = even + shape.line;
        for (int64_t j = 0; j < 2; j++) {
            uint16_t* half = j ? odd : even;
            if (const char* from = row(i + j)) load_words<Op>((float*)half, from, type, shape.dim, shape.columns / 2, factor);
            else memset(half, 0, shape.line * 2);
        }
        uint32_t* words = (uint32_t*)line;
        for (int64_t j = 0; j < shape.line; j++) words[j] = even[j] | uint32_t(odd[j]) << 16;
    }
}

// Rows of words of neighbouring numbers, (rows, wide), as columns of words of neighbouring rows: number d of rows 2 i and 2 i + 1 is word i
// of line d, and the low part of all lines follows the high one. `stage` holds 2 VL vectors.
template <class Op>
static void pack_columns(float* to, int64_t ldt, float* stage, const float* from, const Shape<Op>& shape, int64_t rows) {
    for (int64_t part = 0; part < Op::PARTS; part++, from += shape.part, to += shape.columns * ldt)
        for (int64_t i = 0; i < rows / 2; i += VL)
            for (int64_t w = 0; w < shape.columns / 2; w += VL) {
                for (int64_t x = 0; x < VL; x++) {
                    const float* row = from + 2 * (i + x) * shape.wide + w;
                    const Ints even = *(const LooseInts*)row, odd = *(const LooseInts*)(row + shape.wide);
                    *(LooseInts*)(stage + x * VL) = (even & 0xffff) | odd << 16;
                    *(LooseInts*)(stage + (VL + x) * VL) = (even >> 16 & 0xffff) | (odd & int32_t(0xffff0000));
                }
                transpose(stage, VL, to + 2 * w * ldt + i, 2 * ldt);
                transpose(stage + VL * VL, VL, to + (2 * w + 1) * ldt + i, 2 * ldt);
            }
}
