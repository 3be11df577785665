// A decode step over pages: keys and values lie in pages of a pool, a table says which pages are a row's, and each pair of a query and a slot
// has a number that is added to its score. Slots that no query of a row sees are not read.
#pragma once
#include "decode.h"
#include "quantized.h"

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

    int64_t blocks() const { return (group + MOST_FEW - 1) / MOST_FEW; }
    int64_t ranges() const { return ranges_of(keys); }
    int64_t floats() const { return ranges() * MOST_FEW * (round_up(value_dim, STEP) + 2); }
};

static int64_t scratch_of(const Paged& paged) { return paged.ranges() > 1 ? paged.rows * paged.blocks() * paged.floats() : 0; }

template <class Stored>
class PagedDecode {
    const Paged& paged;
    const int64_t size = Stored::BYTES / STEP;

    void share(int64_t row, int64_t block, Shared& all, Listed& listed) const {
        const int64_t g = block * MOST_FEW;
        listed = {paged.pages + row * paged.pages_row, paged.shift, paged.k_scale, paged.v_scale,
                  paged.added + row / paged.heads * paged.added_batch + row % paged.heads * paged.added_head + g * paged.added_query, paged.added_query};
        all = Shared{};
        all.rows = least(MOST_FEW, paged.group - g), all.dim = paged.dim, all.value_dim = paged.value_dim;
        all.unit = float(paged.scale * LOG2_E);
        for (int64_t r = 0; r < all.rows; r++) {
            all.q[r] = paged.q + (row * paged.group + g + r) * paged.dim * size_of(paged.type);
            all.begin[r] = 0, all.end[r] = INT64_MAX;
        }
        all.k = paged.k.data, all.v = paged.v.data;
        all.k_step = paged.k.row * size, all.v_step = paged.v.row * size;
        all.asked = paged.type, all.listed = &listed;
    }

    void range(int64_t row, int64_t block, int64_t i, float* part) const {
        Shared all;
        Listed listed;
        share(row, block, all, listed);
        const int64_t many = paged.ranges();
        FewQueries<Stored>(all).run(paged.keys * i / many, paged.keys * (i + 1) / many, part);
    }

    void finish(int64_t row, int64_t block, const float* parts) const {
        Shared all;
        Listed listed;
        share(row, block, all, listed);
        float numbers[MOST_WIDE];
        for (int64_t r = 0; r < all.rows; r++) {
            const int64_t at = row * paged.group + block * MOST_FEW + r;
            paged.lse[at] = merge_parts<Stored>(all, r, parts, paged.ranges(), NONE, numbers);
            store_floats(paged.out + at * paged.value_dim * size_of(paged.out_type), numbers, paged.out_type, paged.value_dim);
        }
    }

public:
    explicit PagedDecode(const Paged& paged) : paged(paged) {}

    void run() const {
        const int64_t ranges = paged.ranges(), blocks = paged.blocks(), each = paged.floats();
        const int64_t threads = least(paged.threads, 1 + paged.rows * paged.keys * (paged.dim + paged.value_dim) * size / WORTH);
        if (ranges == 1) {
            Pool::of_process().run(threads, paged.rows * blocks, [&](int64_t, int64_t i) {
                alignas(64) float part[MOST_FEW * (MOST_WIDE + 2)];
                range(i / blocks, i % blocks, 0, part);
                finish(i / blocks, i % blocks, part);
            });
            return;
        }
        Pool::of_process().run(threads, paged.rows * blocks * ranges, [&](int64_t, int64_t i) {
            const int64_t block = i / ranges, rows = least(MOST_FEW, paged.group - block % blocks * MOST_FEW);
            float* parts = paged.scratch + block * each;
            range(block / blocks, block % blocks, i % ranges, parts + i % ranges * rows * (round_up(paged.value_dim, STEP) + 2));
        });
        for (int64_t i = 0; i < paged.rows * blocks; i++) finish(i / blocks, i % blocks, paged.scratch + i * each);
    }
};

template <class Stored>
static void decode_pages(const Paged& paged) {
    if (paged.type == BFLOAT16) PagedDecode<AsHalves<Stored>>(paged).run();
    else PagedDecode<Stored>(paged).run();
}

// Types of 8 bits, behind those of `Type`.
enum EightBits : int64_t { INT8 = 3, FLOAT8 = 4 };

static void decode_pages_of(const Paged& paged) {
    switch (paged.k.type) {
        case FLOAT32: return PagedDecode<Stored32>(paged).run();
        case BFLOAT16: return PagedDecode<Stored16>(paged).run();
        case FLOAT16: return PagedDecode<StoredHalf>(paged).run();
        case INT8: return decode_pages<StoredInt8>(paged);
        default: return decode_pages<StoredFloat8>(paged);
    }
}
