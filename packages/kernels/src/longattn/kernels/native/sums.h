// float32 sums of dk and dv while the tasks of a kv head are computed, in the tensors themselves. In half precision these hold the upper 16 bits
// of each sum, and scratch the lower ones.
//
// Scratch has rows for the keys from the first one that a coming task meets to the last one that any met. Where tasks walk along the
// sequence, as those of segments and windows do, that is a few thousand rows however many there are. A row is rounded once, when no task
// is left that meets it, and its place is zero again for a row further on.
#pragma once
#include "keys.h"
#include "pack.h"

// Rows of keys, first <= row < end.
struct KeyRows {
    int64_t first, end;
};

// Whether some query head of a job has this kv head.
static bool reads(const Call& call, const Job& job, int64_t kv_head) {
    for (int64_t n = 0; n < job.heads; n++)
        if ((job.head + n * job.head_step) / (call.heads / call.kv_heads) == kv_head) return true;
    return false;
}

// visit(job, tile, first query row, query rows) for all tasks of a kv head in the order in which its owner computes them.
template <class Visit>
static void tasks_in_order(const Call& call, int64_t kv_head, Visit visit) {
    for (int64_t j = 0; j < call.job_count; j++) {
        const Job& job = call.jobs[j];
        if (!reads(call, job, kv_head)) continue;
        const int64_t parts = parts_of(call, job);
        for (int64_t t = 0; t < job.tiles; t++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t first = job.queries.count * part / parts, end = job.queries.count * (part + 1) / parts;
                visit(job, t, first, end - first);
            }
    }
}

// Whether each task of a job meets no key row before the first one that the task before it meets.
static bool walks(const Job& job) {
    auto ascends = [](const RowSet& set) { return !set.starts && set.tile_step >= 0 && set.period > 0 && set.position_step > 0; };
    const RowSet& queries = job.queries;
    // Tiles that interleave begin again where the one before them began.
    bool all = ascends(queries) && (job.tiles < 2 || queries.row(1, 0) > queries.row(0, queries.count - 1));
    for (int64_t i = 0; i < job.key_sets; i++) all &= ascends(job.keys[i]);
    return all;
}

// Rows that hold all keys which a task can see; of a job that does not walk, those that any of its tasks can.
static KeyRows met_by(const Call& call, const Job& job, int64_t t, int64_t first, int64_t count) {
    if (!walks(job)) return {job.first_key, call.keys};
    const RowSet& queries = job.queries;
    const int64_t nearest = queries.position(queries.row(t, first)), farthest = queries.position(queries.row(t, first + count - 1));
    KeyRows met{std::numeric_limits<int64_t>::max(), 0};
    for (int64_t i = 0; i < job.key_sets; i++) {
        const RowSet& set = job.keys[i];
        if (!set.count) continue;
        const int64_t begin = divide_up(nearest - set.high - set.origin, set.position_step);
        const int64_t beyond = divide_up(farthest - set.low + 1 - set.origin, set.position_step);
        met.first = least(met.first, most(begin, set.row(t, 0)));
        met.end = most(met.end, least(beyond, set.row(t, set.count - 1) + 1));
    }
    return met;
}

// The first row that a task or one behind it meets.
static int64_t first_needed(const Job& job, const KeyRows& met) { return least(met.first, job.later_key); }

// How many rows of sums a kv head's owner needs at a time, of the rows first .. end.
static int64_t rows_at_a_time(const Call& call, int64_t kv_head, int64_t first, int64_t end) {
    int64_t many = 1, last = first;
    tasks_in_order(call, kv_head, [&](const Job& job, int64_t t, int64_t row, int64_t rows) {
        const KeyRows met = met_by(call, job, t, row, rows);
        last = most(last, least(met.end, end));
        many = most(many, last - most(first, first_needed(job, met)));
    });
    return many;
}

class Sums {
    const Call& call;
    const bool split;
    const int64_t b, kv_head;
    uint16_t *dk_low = nullptr, *dv_low = nullptr;
    int64_t mask = -1, before = 0;             // the lower half of row n is at place (n - before) & mask
    int64_t given = 0, opened = 0, end = 0;    // rows before these are rounded; are zeros in the tensors, or sums

public:
    // Float32 sums.
    Sums(const Call& call, int64_t b, int64_t kv_head) : call(call), split(false), b(b), kv_head(kv_head) {}

    // Sums of the rows first .. end, with so many places for lower halves.
    Sums(const Call& call, int64_t b, int64_t kv_head, float* scratch, int64_t places, int64_t first, int64_t end)
        : call(call), split(true), b(b), kv_head(kv_head), dk_low((uint16_t*)scratch), dv_low(dk_low + places * call.dim), given(first),
          opened(first), end(end) {
        if (places < end - first) mask = places - 1;
        else before = first;
        memset(scratch, 0, places * (call.dim + call.value_dim) * sizeof(uint16_t));
    }

    // A power of two where rows take turns, so that a place is found by a mask; one for each row where there are no fewer.
    static int64_t places(int64_t needed, int64_t rows) {
        int64_t power = 1;
        while (power < needed) power *= 2;
        return least(power, rows);
    }
    static int64_t floats(const Call& call, int64_t places) { return (places * (call.dim + call.value_dim) + 1) / 2; }

    // Row n: dk += factor * dk_row, dv += dv_row.
    void add(int64_t n, const float* dk_row, float factor, const float* dv_row) {
        open(n);
        add_to(call.dk, dk_low, call.dim, n, dk_row, factor);
        add_to(call.dv, dv_low, call.value_dim, n, dv_row, 1);
    }

    // No task is left that meets a row before this one.
    void done_before(int64_t row) {
        if (!split) return;
        for (row = least(row, end); given < row; given++) {
            open(given);
            round(call.dk, dk_low, call.dim);
            round(call.dv, dv_low, call.value_dim);
        }
    }
    void done() { done_before(end); }

private:
    char* high(const Tensor& to, int64_t n) const { return to.at(b, n, kv_head); }
    uint16_t* low(uint16_t* halves, int64_t n, int64_t dim) const { return halves + ((n - before) & mask) * dim; }

    void open(int64_t n) {
        for (; split && opened <= n; opened++) {
            memset(high(call.dk, opened), 0, call.dim * sizeof(uint16_t));
            memset(high(call.dv, opened), 0, call.value_dim * sizeof(uint16_t));
        }
    }

    void add_to(const Tensor& to, uint16_t* halves, int64_t dim, int64_t n, const float* row, float factor) {
        if (!split) {
            float* sums = (float*)high(to, n);
            for (int64_t i = 0; i < dim; i++) sums[i] += row[i] * factor;
            return;
        }
        uint16_t *__restrict up = (uint16_t*)high(to, n), *__restrict down = low(halves, n, dim);
        for (int64_t i = 0; i < dim; i++) {
            const uint32_t sum = to_bits(from_bits(uint32_t(up[i]) << 16 | down[i]) + row[i] * factor);
            up[i] = uint16_t(sum >> 16), down[i] = uint16_t(sum);
        }
    }

    void round(const Tensor& to, uint16_t* halves, int64_t dim) const {
        const uint16_t* up = (const uint16_t*)high(to, given);
        uint16_t* down = low(halves, given, dim);
        float sums[MOST_WIDE];
        for (int64_t i = 0; i < dim; i++) sums[i] = from_bits(uint32_t(up[i]) << 16 | down[i]);
        store_floats(high(to, given), sums, to.type, dim);
        memset(down, 0, dim * sizeof(uint16_t));
    }
};
