// Several calls in one: shards of query rows, each attended key step by key step, whose states merge.
//
// A step writes its state, out and lse in float32, into scratch of its own. A shard's states are merged once all are there, with weights in
// double, so that the error of a sum does not grow with the number of steps.
#pragma once
#include "short_call.h"

enum StepFlags : int64_t {
    FEW = 1,        // a short call
    PARTIAL = 2,    // not every row is written: the others saw nothing
    CONTINUES = 4,  // a later phase of the step before, on the same state
};

// Neighbouring calls that are one shard's steps, and where their merged state goes.
struct Shard {
    Tensor out, lse;
    int64_t first, count;
};

static void clear_state(const Call& call) {
    for (int64_t b = 0; b < call.batch; b++)
        for (int64_t n = 0; n < call.queries; n++)
            for (int64_t h = 0; h < call.heads; h++) {
                *(float*)call.lse.at(b, n, h) = NONE;
                std::memset(call.out.at(b, n, h), 0, call.value_dim * sizeof(float));
            }
}

// Row n of batch element b, all heads.
static void merge_row(const Shard& shard, const Call* calls, const int64_t* flags, int64_t b, int64_t n) {
    const Call& any = calls[shard.first];
    for (int64_t h = 0; h < any.heads; h++) {
        double top = -INFINITY, total = 0, sum[MOST_WIDE] = {};
        for (int64_t i = shard.first; i < shard.first + shard.count; i++) {
            const double lse = *(const float*)calls[i].lse.at(b, n, h);
            if (top == top && !(lse <= top)) top = lse;  // NaN as well, for good
        }
        for (int64_t i = shard.first; i < shard.first + shard.count && top != -INFINITY; i++) {
            if (flags[i] & CONTINUES) continue;
            const double weight = std::exp(double(*(const float*)calls[i].lse.at(b, n, h)) - top);
            const float* part = (const float*)calls[i].out.at(b, n, h);
            if (!(weight == 0)) for (int64_t d = 0; d < any.value_dim; d++) sum[d] += weight * part[d];
            total += weight;
        }
        float row[MOST_WIDE];
        for (int64_t d = 0; d < any.value_dim; d++) row[d] = total == 0 ? 0.f : float(sum[d] / total);
        store_floats(shard.out.at(b, n, h), row, shard.out.type, any.value_dim);
        *(float*)shard.lse.at(b, n, h) = top == -INFINITY ? NONE : float(top + std::log(total));
    }
}

template <class Attend>
static void attend_shards(const Call* calls, const int64_t* flags, const Shard* shards, int64_t count, Attend attend) {
    for (const Shard* shard = shards; shard < shards + count; shard++) {
        for (int64_t i = shard->first; i < shard->first + shard->count; i++) {
            if (flags[i] & PARTIAL) clear_state(calls[i]);
            attend(&calls[i], flags[i] & FEW);
        }
        const Call& any = calls[shard->first];
        const int64_t rows = any.batch * any.queries, worth = 1 + rows * any.heads * any.value_dim * shard->count / 65536;
        Pool::of_process().run(least(any.threads, worth), rows, [&](int64_t, int64_t i) {
            merge_row(*shard, calls, flags, i / any.queries, i % any.queries);
        });
    }
}
