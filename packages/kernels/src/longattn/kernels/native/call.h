// What one call is handed, mirrored field by field by arguments.py, and rows named by strides or by lists.
//
// Everything here was checked by the caller: pointers live, rows lie within their tensors, types are equal where they must be. All
// fields are 8 bytes wide, so that there is no padding to agree on.
#pragma once
#include "vectors.h"

constexpr int64_t KEYS = 256;    // most keys of a tile
constexpr int64_t MOST_WIDE = 256;  // most numbers of a row
constexpr int64_t ROWS = 768;    // most query rows that share one packing of a tile of keys

struct Tensor {
    char* data;
    int64_t batch, row, head;  // strides in elements; head_dim is contiguous
    int64_t type;

    INLINE char* at(int64_t b, int64_t n, int64_t h) const { return data + (b * batch + n * row + h * head) * size_of(type); }
};

// A number for each (batch, head, query, key), where strides may be 0: a bias, or a mask of bytes.
struct Lookup {
    const char* data;
    int64_t batch, head, row, key;  // strides in elements
    int64_t type;
};

// Rows of tile t, in order: member i is at starts[t][i / block], or start + t * tile_step + i / block * period, plus
// offsets[i % block], or i % block * step.
struct RowSet {
    const int64_t* starts;   // (tiles, tile_step), or null
    int64_t start, tile_step, period, block;
    const int64_t* offsets;  // (block), ascending, or null
    int64_t step;
    const float* log2_count; // (block): log2 of how often a key counts, or null: once
    int64_t count;
    int64_t origin, position_step;  // position = origin + position_step * row
    int64_t low, high;              // keys: visible iff low <= query position - key position <= high

    INLINE int64_t row(int64_t t, int64_t i) const {
        const int64_t b = block == 1 ? i : i / block, j = i - b * block;
        int64_t base = starts ? starts[t * tile_step + b] : start + t * tile_step + b * period;
        return base + (offsets ? offsets[j] : j * step);
    }
    INLINE int64_t position(int64_t row) const { return origin + position_step * row; }
};

// Query rows that see the same keys: `tiles` equal tiles, for some heads.
struct Job {
    int64_t head, head_step, heads, tiles;
    RowSet queries;
    const RowSet* keys;
    int64_t key_sets;
    int64_t fresh;  // no earlier phase wrote these rows
    int64_t first_key, later_key;  // smallest row of its keys, and of the keys of all jobs of its kv heads behind it
};

// Products of float32, of bfloat16, or of numbers split into two bfloat16; those that a library has not are float32's.
enum Products : int64_t { WHOLE_FLOATS, HALVES, SPLIT };

struct Call {
    Tensor q, k, v, out, grad_out, dq, dk, dv;
    Tensor lse, grad_lse;      // float32, (batch, row, head)
    Lookup mask, bias;         // 0 hides; added to the scaled scores, -inf hides
    const uint8_t* padding;    // (batch, keys), 1 hides, or null
    int64_t padding_batch, padding_row;
    const Job* jobs;
    int64_t job_count;
    int64_t batch, queries, keys, heads, kv_heads;
    int64_t dim, value_dim;    // of a row of q and k; of v, out and their gradients
    double scale;
    double drop;               // probability, and what philox counts with
    uint64_t seed;
    int64_t first_head;
    int64_t half;              // Products
    int64_t threads;
    int64_t rows;              // most query rows of a task, at most ROWS
    int64_t key_parts;         // backward: in how many parts the keys are owned; 1: one pass makes all gradients
    float* scratch;            // `scratch_floats` for each thread
    int64_t merges;            // 1: rows are merged onto what stands in out and lse; in a backward, dq is added to what stands there
    double softcap;            // scaled scores s become softcap * tanh(s / softcap); 0: they stay
    const float* by_distance;  // (heads, columns): what is added for each head and distance, or null
    int64_t by_distance_columns;  // 1: a slope; 2 + 2 * L: and a number for each distance from -L to L
    float* by_distance_grad;   // (key_parts, batch, heads, columns), to be added to, or null
};

static INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Into how many tasks the query rows of one tile of a job are divided.
static INLINE int64_t parts_of(const Call& call, const Job& job) { return (job.queries.count + call.rows - 1) / call.rows; }

// Query rows of one task.
struct Queries {
    int64_t n;
    int64_t rows[ROWS], positions[ROWS];
    int64_t tall;                             // rows that share a reach
    int64_t near[ROWS / 4], far[ROWS / 4];    // smallest and largest position of each `tall` rows

    void take(const RowSet& set, int64_t t, int64_t first, int64_t count, int64_t reach_rows) {
        n = count, tall = reach_rows;
        for (int64_t i = 0; i < n; i++) {
            rows[i] = set.row(t, first + i);
            const int64_t at = positions[i] = set.position(rows[i]), tile = i / tall;
            near[tile] = i % tall ? least(near[tile], at) : at;
            far[tile] = i % tall ? most(far[tile], at) : at;
        }
    }
    // Of `count` rows from row `first` on, a multiple of `tall`.
    void range(int64_t first, int64_t count, int64_t& nearest, int64_t& farthest) const {
        nearest = near[first / tall], farthest = far[first / tall];
        for (int64_t i = first / tall + 1; i < (first + count + tall - 1) / tall; i++) {
            nearest = least(nearest, near[i]);
            farthest = most(farthest, far[i]);
        }
    }
};
