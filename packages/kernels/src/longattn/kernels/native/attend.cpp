// Attention on CPUs, called through ctypes: no torch and no Python in here, and no memory but what the caller brings.
#include "backward.h"
#include "narrow.h"
#include "shards.h"

// Tasks of one call in one row of numbers: job by job, then batch element, head, tile, part of the tile's query rows.
class Tasks {
    const Call& call;
    int64_t total = 0;

    int64_t of(const Job& job) const { return call.batch * job.heads * job.tiles * parts_of(call, job); }

public:
    explicit Tasks(const Call& call) : call(call) {
        for (int64_t j = 0; j < call.job_count; j++) total += of(call.jobs[j]);
    }
    int64_t count() const { return total; }

    // visit(job, batch, head, tile, first row, rows) of task i.
    template <class Visit>
    void at(int64_t i, Visit visit) const {
        const Job* job = call.jobs;
        for (; i >= of(*job); job++) i -= of(*job);
        int64_t many = parts_of(call, *job), part = i % many, tile = i / many % job->tiles;
        int64_t head = i / many / job->tiles % job->heads, b = i / many / job->tiles / job->heads;
        int64_t rows = job->queries.count, first = rows * part / many;
        visit(*job, b, job->head + head * job->head_step, tile, first, rows * (part + 1) / many - first);
    }
};

// The rows of keys that a part of `key_parts` owns.
static KeyRows owned(const Call& call, int64_t part) {
    return {call.keys * part / call.key_parts, call.keys * (part + 1) / call.key_parts};
}

// Places for rows of dk and dv that a task sums in scratch.
static int64_t places_in_scratch(const Call& call) {
    if (call.dk.type == FLOAT32) return 0;
    int64_t places = 0;
    for (int64_t part = 0; part < call.key_parts; part++) {
        const KeyRows mine = owned(call, part);
        for (int64_t head = 0; head < call.kv_heads; head++)
            places = most(places, Sums::places(rows_at_a_time(call, head, mine.first, mine.end), mine.end - mine.first));
    }
    return places;
}

template <class Op>
static void attend(const Call& call) {
    Tasks tasks(call);
    int64_t each = Forward<Op>(call, nullptr).floats;
    Pool::of_process().run(call.threads, tasks.count(), [&](int64_t thread, int64_t i) {
        std::conditional_t<Op::TILES, Forward<Op>, Narrow<Op>> forward(call, call.scratch + thread * each);
        tasks.at(i, [&](const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t rows) {
            forward.run(job, b, h, t, first, rows);
        });
    });
}

// key_parts: 0 makes dq only, job by job in parallel; 1 everything, a kv head to a task; more: dk and dv only, of as many ranges of rows.
template <class Op>
static void attend_backward(const Call& call) {
    const int64_t parts = call.key_parts, places = places_in_scratch(call), each = Backward<Op>(call, nullptr, places).floats;
    auto own = [&](int64_t thread) { return Backward<Op>(call, call.scratch + thread * each, places); };
    Tasks tasks(call);
    if (!parts) {
        Pool::of_process().run(call.threads, tasks.count(), [&](int64_t thread, int64_t i) {
            Backward<Op> backward = own(thread);
            tasks.at(i, [&](const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t rows) {
                backward.run(job, b, h, t, first, rows, Share{true, false, 0, call.keys, 0}, nullptr);
            });
        });
        return;
    }
    Pool::of_process().run(call.threads, call.batch * call.kv_heads * parts, [&](int64_t thread, int64_t i) {
        const int64_t part = i % parts, head = i / parts % call.kv_heads, b = i / parts / call.kv_heads;
        const KeyRows mine = owned(call, part);
        own(thread).keys(b, head, Share{parts == 1, true, mine.first, mine.end, part});
    });
}

template <class Op>
static int64_t floats_of(const Call& call) {
    return call.dk.data ? Backward<Op>(call, nullptr, places_in_scratch(call)).floats : Forward<Op>(call, nullptr).floats;
}

// visit(the products that the call asks for).
template <class Visit>
static int64_t of_numbers(const Call& call, Visit visit) {
#if defined(LONGATTN_TILES)
    if (call.half == HALVES) return visit(Tiled<1>());
    if (call.half == SPLIT) return visit(Tiled<2>());
#elif defined(LONGATTN_PAIRS)
    if (call.half == HALVES) return visit(BFloat16());
#endif
    return visit(Float32());
}

extern "C" {

int64_t longattn_sizes(int64_t which) {
    const int64_t sizes[] = {sizeof(Call), sizeof(Job), sizeof(RowSet), sizeof(Shard)};
    return sizes[which];
}

// Floats of scratch for each thread; a call with a dk is a backward.
int64_t longattn_scratch(const Call* call) {
    return of_numbers(*call, [&](auto op) { return floats_of<decltype(op)>(*call); });
}

void longattn_attend(const Call* call) {
    of_numbers(*call, [&](auto op) { return attend<decltype(op)>(*call), 0; });
}

void longattn_attend_backward(const Call* call) {
    of_numbers(*call, [&](auto op) { return attend_backward<decltype(op)>(*call), 0; });
}

// Floats of scratch for all of a short call.
int64_t longattn_short_scratch(const Call* call) {
    return of_short_call(*call, [&](const auto& made) {
        int64_t floats = 0;
        for (int64_t j = 0; j < call->job_count; j++) floats += made.floats(call->jobs[j]);
        return floats;
    });
}

void longattn_attend_short(const Call* call) {
    of_short_call(*call, [](const auto& made) { return made.run(), 0; });
}

// Calls in order, with scratch of each in place; each shard's merge into its out and lse.
void longattn_attend_shards(const Call* calls, const int64_t* flags, const Shard* shards, int64_t count) {
    attend_shards(calls, flags, shards, count,
                  [](const Call* call, bool few) { few ? longattn_attend_short(call) : longattn_attend(call); });
}
}
