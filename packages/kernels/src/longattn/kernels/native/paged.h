// A decode step over pages: keys and values lie in pages of a pool, a table says which pages are a row's, and each pair of a query and a slot
// has a number that is added to its score. Slots that no query of a row sees are not read.
#pragma once
#include "decode.h"

struct Paged {
    Tensor k, v;                       // (slots of the pool, dim), where `row` and `type` alone are used: a Type, or one of 8 bits
    const float *k_scale, *v_scale;    // (slots of the pool), or null
    const int32_t* pages;              // (rows, pages), where pages_row may be any
    int64_t pages_row, shift;          // slots of a page: 1 << shift
    int64_t rows, heads, dim, value_dim;  // row = batch element * heads + kv head
    const char* q;                     // (rows, group, dim), of `type`
    char* out;                         // (rows, group, value_dim), of `out_type`
    float* lse;                        // (rows, group)
    int64_t type, out_type, group, keys;
    const float* added;                // (batch, heads, group, keys), strides may be 0
    int64_t added_batch, added_head, added_query;
    double scale;
    int64_t threads;
    float* scratch;

    Blocks blocks() const { return {rows, group, ranges_of(keys), value_dim}; }
};

static int64_t scratch_of(const Paged& paged) { return paged.blocks().scratch(); }

template <class Stored>
class PagedDecode {
    const Paged& paged;
    const Blocks blocks;
    const int64_t size = Stored::BYTES / STEP;

    void share(int64_t row, int64_t block, Shared& all, Listed& listed) const {
        const int64_t g = block * MOST_FEW;
        listed = {paged.pages + row * paged.pages_row, paged.shift, paged.k_scale, paged.v_scale};
        all = Shared{};
        all.rows = least(MOST_FEW, paged.group - g), all.dim = paged.dim, all.value_dim = paged.value_dim;
        all.unit = float(paged.scale * LOG2_E);
        for (int64_t r = 0; r < all.rows; r++) {
            all.q[r] = paged.q + (row * paged.group + g + r) * paged.dim * size_of(paged.type);
            all.begin[r] = 0, all.end[r] = INT64_MAX;
        }
        all.k = paged.k.data, all.v = paged.v.data;
        all.k_step = paged.k.row * size, all.v_step = paged.v.row * size;
        all.asked = paged.type, all.listed = &listed, all.added_row = paged.added_query;
        all.added = paged.added + row / paged.heads * paged.added_batch + row % paged.heads * paged.added_head + g * paged.added_query;
    }

    void range(int64_t row, int64_t block, int64_t i, float* part) const {
        Shared all;
        Listed listed;
        share(row, block, all, listed);
        const int64_t many = blocks.ranges;
        FewQueries<Stored>(all).run(paged.keys * i / many, paged.keys * (i + 1) / many, part);
    }

    void finish(int64_t row, int64_t block, const float* parts) const {
        Shared all;
        Listed listed;
        share(row, block, all, listed);
        float numbers[MOST_WIDE];
        for (int64_t r = 0; r < all.rows; r++) {
            const int64_t at = row * paged.group + block * MOST_FEW + r;
            paged.lse[at] = merge_parts<Stored>(all, r, parts, blocks.ranges, NONE, numbers);
            store_floats(paged.out + at * paged.value_dim * size_of(paged.out_type), numbers, paged.out_type, paged.value_dim);
        }
    }

public:
    explicit PagedDecode(const Paged& paged) : paged(paged), blocks(paged.blocks()) {}

    void run() const {
        blocks.run(
            paged.threads, paged.rows * paged.keys * (paged.dim + paged.value_dim) * size, paged.scratch,
            [&](int64_t row, int64_t block, int64_t i, float* part) { range(row, block, i, part); },
            [&](int64_t row, int64_t block, const float* parts) { finish(row, block, parts); });
    }
};
