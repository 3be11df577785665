// Calls with few query rows, job by job: each range of a tile's keys is a task, with the rows of all heads that share them.
//
// For jobs with one set of keys, evenly spaced at ascending positions and each counted once, of calls without mask, bias, dropout and
// prior; score terms are applied.
#pragma once
#include "decode.h"

template <class Stored>
class ShortCall {
    const Call& call;
    const ScoreTerms terms;
    const int64_t size = Stored::BYTES / STEP;

    // Rows of a tile that share keys, MOST_FEW at most; `first` counts heads of the group, then rows.
    struct Block {
        const Job& job;
        int64_t b, head, t, first;
    };

    // Heads of a task: those of a kv head, where the job has them all.
    int64_t group(const Job& job) const {
        const int64_t group = call.heads / call.kv_heads;
        return job.head_step == 1 && job.head % group == 0 && job.heads % group == 0 ? group : 1;
    }
    Blocks blocks(const Job& job) const {
        const int64_t many = group(job);
        return {call.batch * (job.heads / many) * job.tiles, job.queries.count * many, ranges_of(job.keys->count), call.value_dim};
    }

    // Block `piece` of row i of `blocks`.
    Block block(const Job& job, int64_t i, int64_t piece) const {
        const int64_t units = job.heads / group(job), unit = i / job.tiles % units;
        return {job, i / job.tiles / units, job.head + unit * group(job) * job.head_step, i % job.tiles, piece * MOST_FEW};
    }

    static int64_t floor_of(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

    // Of row r: where it is, and its head.
    int64_t row(const Block& at, int64_t r, int64_t& head) const {
        const int64_t i = at.first + r, g = group(at.job);
        head = at.head + i % g * at.job.head_step;
        return at.job.queries.row(at.t, i / g);
    }

    void share(const Block& at, Shared& all) const {
        const RowSet& keys = *at.job.keys;
        all.rows = least(MOST_FEW, at.job.queries.count * group(at.job) - at.first), all.dim = call.dim, all.value_dim = call.value_dim;
        all.unit = float(call.scale * LOG2_E);
        const int64_t begin = keys.row(at.t, 0), step = keys.period, kv_head = at.head / (call.heads / call.kv_heads);
        const int64_t origin = keys.position(begin), apart = keys.position_step * step;
        all.terms = terms.any() ? &terms : nullptr, all.added = nullptr, all.origin = origin, all.apart = apart;
        for (int64_t r = 0; r < all.rows; r++) {
            int64_t head, n = row(at, r, head), position = at.job.queries.position(n);
            all.q[r] = call.q.at(at.b, n, head), all.head[r] = head, all.position[r] = position;
            all.begin[r] = most(0, least(keys.count, -floor_of(origin + keys.high - position, apart)));
            all.end[r] = most(all.begin[r], least(keys.count, floor_of(position - keys.low - origin, apart) + 1));
        }
        all.k = call.k.at(at.b, begin, kv_head), all.v = call.v.at(at.b, begin, kv_head);
        all.k_step = step * call.k.row * size, all.v_step = step * call.v.row * size;
        all.hidden = call.padding ? call.padding + at.b * call.padding_batch + begin * call.padding_row : nullptr;
        all.hidden_step = step * call.padding_row;
    }

    // Range i of the keys that any row of a block sees, at `part`.
    void range(const Block& at, int64_t i, float* part) const {
        Shared all;
        share(at, all);
        int64_t first = all.begin[0], last = all.end[0];
        for (int64_t r = 1; r < all.rows; r++) first = least(first, all.begin[r]), last = most(last, all.end[r]);
        const int64_t n = most(0, last - first), many = blocks(at.job).ranges;
        FewQueries<Stored>(all).run(first + n * i / many, first + n * (i + 1) / many, part);
    }

    void finish(const Block& at, const float* parts) const {
        Shared all;
        share(at, all);
        float numbers[MOST_WIDE];
        for (int64_t r = 0; r < all.rows; r++) {
            int64_t head, n = row(at, r, head);
            const float lse = merge_parts<Stored>(all, r, parts, blocks(at.job).ranges, NONE, numbers);
            store_floats(call.out.at(at.b, n, head), numbers, call.out.type, call.value_dim);
            *(float*)call.lse.at(at.b, n, head) = lse;
        }
    }

public:
    explicit ShortCall(const Call& call) : call(call), terms(call, 1) {}

    // Floats for all parts of job j; 0 where they need not be kept.
    int64_t floats(const Job& job) const { return blocks(job).scratch(); }

    void run() const {
        float* scratch = call.scratch;
        for (int64_t j = 0; j < call.job_count; j++) {
            const Job& job = call.jobs[j];
            const Blocks all = blocks(job);
            all.run(
                call.threads, all.count() * job.keys->count * (call.dim + call.value_dim) * size, scratch,
                [&](int64_t row, int64_t piece, int64_t i, float* part) { range(block(job, row, piece), i, part); },
                [&](int64_t row, int64_t piece, const float* parts) { finish(block(job, row, piece), parts); });
            scratch += all.scratch();
        }
    }
};

// visit(call of its type).
template <class Visit>
static int64_t of_short_call(const Call& call, Visit visit) {
    if (call.k.type == FLOAT32) return visit(ShortCall<Stored32>(call));
    if (call.k.type == BFLOAT16) return visit(ShortCall<Stored16>(call));
    return visit(ShortCall<StoredHalf>(call));
}
