// Calls with few query rows: ranges of keys as tasks, so that one head keeps every thread busy, and the merge of what they leave.
#pragma once
#include "few_queries.h"
#include "pool.h"

constexpr int64_t RANGE = 1024, MOST_RANGES = 64;  // keys of a range, as a rule; ranges of a row
constexpr int64_t WORTH = 1 << 18;                 // bytes for which it pays to wake a thread

// How many ranges keys are cut into. It depends on the number of keys alone, so that the bits of a result depend on nothing else.
static INLINE int64_t ranges_of(int64_t keys) { return least(MOST_RANGES, most(1, (keys + RANGE - 1) / RANGE)); }

// Query rows that share keys: `group` of them in each of `rows`, in blocks of MOST_FEW. A block's keys are cut into ranges.
struct Blocks {
    int64_t rows, group, ranges, value_dim;

    int64_t of_row() const { return (group + MOST_FEW - 1) / MOST_FEW; }
    int64_t count() const { return rows * of_row(); }
    // Floats between the parts of one block and the next, and of all of them; 0 where they need not be kept.
    int64_t floats() const { return ranges * MOST_FEW * (round_up(value_dim, STEP) + 2); }
    int64_t scratch() const { return ranges > 1 ? count() * floats() : 0; }

    // range(row, block, i, part) leaves the part of range i, and finish(row, block, parts) merges a block's. `bytes` are read by all.
    template <class Range, class Finish>
    void run(int64_t threads, int64_t bytes, float* scratch, Range range, Finish finish) const {
        const int64_t many = of_row();
        threads = least(threads, 1 + bytes / WORTH);
        if (ranges == 1) {
            Pool::of_process().run(threads, count(), [&](int64_t, int64_t i) {
                alignas(64) float part[MOST_FEW * (MOST_WIDE + 2)];
                range(i / many, i % many, 0, part);
                finish(i / many, i % many, part);
            });
            return;
        }
        // Where a block's parts lie one after the other: a part is as long as its block has rows.
        Pool::of_process().run(threads, count() * ranges, [&](int64_t, int64_t task) {
            const int64_t i = task / ranges, tall = least(MOST_FEW, group - i % many * MOST_FEW);
            range(i / many, i % many, task % ranges, scratch + i * floats() + task % ranges * tall * (round_up(value_dim, STEP) + 2));
        });
        for (int64_t i = 0; i < count(); i++) finish(i / many, i % many, scratch + i * floats());
    }
};

// Keys and values of a cache as Python checked them: (rows, slots, dim) and (rows, slots, value_dim), where `head` of both is unused.
struct Cache {
    Tensor k, v;
    int64_t rows, slots, dim, value_dim;
};

// What is not the same for all keys of a step.
struct Apart {
    const char* first_q;  // other queries for the first `first` keys, like q; or null
    int64_t first;
    const uint8_t* hidden;  // (rows, keys): 1 hides; or null
    int64_t hidden_row, hidden_step;
    const float* sinks;  // (rows, group), or null
    const float* added;  // (rows, group, added_row): added to the score of a key, after the cap; or null
    int64_t added_row;
    double softcap;      // scaled scores s become softcap * tanh(s / softcap); 0: they stay
};

struct Step {
    const char* q;  // (rows, group, dim), of the cache's type
    char* out;      // (rows, group, value_dim), likewise
    int64_t group, keys;  // the first so many slots
    double scale;
    int64_t threads;
    Apart apart;
    float* scratch;

    // The first keys are a range of their own where they have queries of their own.
    Blocks blocks(const Cache& cache) const {
        return {cache.rows, group, ranges_of(keys - apart.first) + (apart.first > 0), cache.value_dim};
    }
};

static int64_t scratch_of(const Step& step, const Cache& cache) { return step.blocks(cache).scratch(); }

template <class Stored>
class Decode {
    const Cache& cache;
    const Step& step;
    const Apart& apart;
    const ScoreTerms terms;
    const Blocks blocks;
    const int64_t size = Stored::BYTES / STEP;

    // Some query rows of a row of the cache.
    void share(int64_t row, int64_t block, bool first, Shared& all) const {
        const int64_t g = block * MOST_FEW;
        all.rows = least(MOST_FEW, step.group - g), all.dim = cache.dim, all.value_dim = cache.value_dim;
        all.unit = float(step.scale * LOG2_E);
        const char* q = first ? apart.first_q : step.q;
        for (int64_t r = 0; r < all.rows; r++) {
            all.q[r] = q + (row * step.group + g + r) * cache.dim * size;
            all.begin[r] = 0, all.end[r] = step.keys;
        }
        all.k = cache.k.at(row, 0, 0), all.v = cache.v.at(row, 0, 0);
        all.k_step = cache.k.row * size, all.v_step = cache.v.row * size;
        all.hidden = apart.hidden ? apart.hidden + row * apart.hidden_row : nullptr;
        all.hidden_step = apart.hidden_step;
        all.terms = terms.any() ? &terms : nullptr;
        all.added = apart.added ? apart.added + (row * step.group + g) * apart.added_row : nullptr, all.added_row = apart.added_row;
    }

    // Range i of a block, at `part`.
    void range(int64_t row, int64_t block, int64_t i, float* part) const {
        Shared all;
        const int64_t own = apart.first > 0, many = blocks.ranges - own, j = i - own, n = step.keys - apart.first;
        share(row, block, j < 0, all);
        FewQueries<Stored> few(all);
        if (j < 0) few.run(0, apart.first, part);
        else few.run(apart.first + n * j / many, apart.first + n * (j + 1) / many, part);
    }

    void finish(int64_t row, int64_t block, const float* parts) const {
        Shared all;
        share(row, block, false, all);
        float numbers[MOST_WIDE];
        for (int64_t r = 0; r < all.rows; r++) {
            const int64_t at = row * step.group + block * MOST_FEW + r;
            merge_parts<Stored>(all, r, parts, blocks.ranges, apart.sinks ? float(apart.sinks[at] * LOG2_E) : NONE, numbers);
            store_floats(step.out + at * cache.value_dim * size, numbers, cache.k.type, cache.value_dim);
        }
    }

public:
    Decode(const Cache& cache, const Step& step)
        : cache(cache), step(step), apart(step.apart), terms(step.apart.softcap), blocks(step.blocks(cache)) {}

    void run() const {
        blocks.run(
            step.threads, cache.rows * step.keys * (cache.dim + cache.value_dim) * size, step.scratch,
            [&](int64_t row, int64_t block, int64_t i, float* part) { range(row, block, i, part); },
            [&](int64_t row, int64_t block, const float* parts) { finish(row, block, parts); });
    }
};

static void decode(const Cache& cache, const Step& step) {
    if (cache.k.type == FLOAT32) Decode<Stored32>(cache, step).run();
    else if (cache.k.type == BFLOAT16) Decode<Stored16>(cache, step).run();
    else Decode<StoredHalf>(cache, step).run();
}
