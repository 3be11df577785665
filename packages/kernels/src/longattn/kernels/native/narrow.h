// Forward of narrow bands: where a query sees few keys, VL queries lie in the lanes of a vector, and each key that any of them sees is one step.
//
// Scores and weights are (keys, queries), sums (numbers of v, queries): softmax needs no sums over lanes, the band is a comparison of
// lanes, and tiles begin and end with any few keys. K^T and V are packed as for wide bands; here their words are broadcast.
#pragma once
#include "forward.h"

template <class Op>
class Narrow : public Forward<Op> {
    typedef Forward<Op> Base;
    using Base::acc, Base::call, Base::halves, Base::Kt, Base::l, Base::m, Base::Q, Base::queries, Base::scores, Base::shape, Base::stage,
        Base::terms, Base::tile, Base::units, Base::V, Base::values;
    static constexpr int64_t NARROW = 128 * Op::PAIR;      // most keys that a query sees: beyond, both forms are as fast
    static constexpr int64_t GRAIN = 4;                    // keys of which a range is a multiple
    static constexpr int64_t DEEP = VL == 8 || PW < 16 ? 8 : 16;  // sums at a time: so many that none waits for the one before
    static_assert(PW % DEEP == 0 && DEEP % GRAIN == 0, "whole panels");

    struct Lanes {
        Ints low, high;  // positions from tile.first on that the query of each lane sees
    };

public:
    using Base::Base;

    void run(const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count) {
        if (!serves(job)) return Base::run(job, b, h, t, first, count);
        int64_t nearest, farthest;
        queries->take(job.queries, t, first, count, VL);
        queries->range(0, count, nearest, farthest);
        KeyStream stream(call, job, t, b, nearest, farthest, 0, call.keys);
        const int64_t kv_head = h / (call.heads / call.kv_heads), blocks = (count + VL - 1) / VL;
        int64_t begun = 0, ended = 0;  // blocks
        while (stream.template next<Op>(*tile)) {
            for (int64_t j = 0; j < tile->n; j++) tile->bias[j] /= units.unit;
            bool packed = false;
            for (int64_t i = ended; i < blocks; i++) {
                const Visibility visibility = tile->seen(queries->near[i], queries->far[i]);
                if (visibility == NOTHING) continue;
                if (!packed) this->pack(b, kv_head), packed = true;
                for (; begun <= i; begun++) begin(begun, b, h);
                attend(i, visibility);
                // Keys ascend: all that come are too far ahead for a block whose farthest query this tile reaches.
                while (ended <= i && queries->far[ended] - tile->last <= tile->low) end(job, ended++, b, h);
            }
        }
        for (; ended < blocks; ended++) {
            for (; begun <= ended; begun++) begin(begun, b, h);
            end(job, ended, b, h);
        }
    }

private:
    // Whether a job's queries see so few keys that this is the faster form.
    bool serves(const Job& job) const {
        if (job.key_sets != 1 || call.mask.data || call.bias.data || call.softcap > 0 || call.by_distance || call.drop > 0) return false;
        const RowSet &rows = job.queries, &keys = *job.keys;
        const int64_t apart = keys.period * keys.position_step / keys.block;
        if (rows.starts || rows.block != 1 || keys.starts || apart < 1 || rows.period * rows.position_step > apart) return false;
        return keys.low > -NEAR && keys.high < NEAR && (keys.high - keys.low) / apart < NARROW;
    }

    // Q^T of VL rows: memory -> L2.
    void begin(int64_t block, int64_t b, int64_t h) {
        const Flush none(false);  // a small q times the scale is what it is
        const int64_t row = block * VL, bytes = shape.dim * size_of(call.q.type);
        for (int64_t r = row + VL; r < least(row + 2 * VL, queries->n); r++) ask_for(call.q.at(b, queries->rows[r], h), bytes);
        for (int64_t i = 0; i < VL; i++) {
            float* to = stage + i * shape.wide;
            if (row + i < queries->n)
                load_words<Op>(to, call.q.at(b, queries->rows[row + i], h), call.q.type, shape.dim, shape.part, units.q_factor);
            else memset(to, 0, shape.wide * 4);
        }
        for (int64_t w = 0; w < shape.wide; w += VL) transpose(stage + w, shape.wide, Q + row * shape.wide + w * VL, VL);
        store(m + row, splat(NONE)), store(l + row, Floats{});
        memset(acc + row * values.columns, 0, VL * values.columns * 4);
    }

    bool met(int64_t key, int64_t block) const {
        const int64_t at = tile->positions[key];
        return queries->far[block] - at >= tile->low && queries->near[block] - at <= tile->high;
    }

    void attend(int64_t block, Visibility visibility) {
        const int64_t near = queries->near[block], far = queries->far[block];
        int64_t from = 0, to = tile->padded;
        if (visibility == SOME) {
            while (from < to && !tile->meets(from / VL, near, far)) from += VL;
            while (from < to && !tile->meets(to / VL - 1, near, far)) to -= VL;
            while (from < to && !met(from, block)) from++;
            while (from < to && !met(to - 1, block)) to--;
            if (from == to) return;
            from = from / GRAIN * GRAIN, to = round_up(to, GRAIN);
        }
        const Floats factor = softmax(block, from, to, score(block, visibility, from, to));
        const float* weights = Op::PAIR == 2 ? halves : scores;
        float* sums = acc + block * VL * values.columns;
        for (int64_t d = 0; d < values.columns; d += DEEP) {
            register_tile<Op, DEEP, 1>(
                (to - from) / Op::PAIR, V + from / Op::PAIR * values.line + d, 1, values.line, weights + from / Op::PAIR * VL, VL,
                [&](Floats(&s)[DEEP][1]) {
#pragma GCC unroll 16
                    for (int i = 0; i < DEEP; i++) s[i][0] = load(sums + (d + i) * VL) * factor;
                },
                [&](Floats(&s)[DEEP][1]) {
#pragma GCC unroll 16
                    for (int i = 0; i < DEEP; i++) store(sums + (d + i) * VL, s[i][0]);
                });
        }
    }

    // Scores of the keys from .. to; returns the largest of each lane.
    Floats score(int64_t block, Visibility visibility, int64_t from, int64_t to) {
        const Lanes lanes = lanes_of(block);
        const bool hides = visibility == SOME;
        Floats top = splat(NONE);
        for (int64_t j = from, n; j < to; j += n) {
            n = least(least(DEEP, to - j), PW - j % PW);
            with_count<DEEP / GRAIN>(n / GRAIN, [&](auto count) {
                constexpr int N = decltype(count)::value * GRAIN;
                register_tile<Op, N, 1>(
                    shape.words, Kt + j / PW * PW * shape.wide + j % PW, 1, PW, Q + block * VL * shape.wide, VL,
                    [&](Floats(&s)[N][1]) {
#pragma GCC unroll 16
                        for (int i = 0; i < N; i++) s[i][0] = splat(tile->bias[j + i]);
                    },
                    [&](Floats(&s)[N][1]) {
#pragma GCC unroll 16
                        for (int i = 0; i < N; i++) {
                            if (hides) s[i][0] = seen(block, j + i, lanes, s[i][0]);
                            top = max(top, s[i][0]);
                            store(scores + (j + i) * VL, s[i][0]);
                        }
                    });
            });
        }
        return top;
    }

    Lanes lanes_of(int64_t block) const {
        Lanes lanes;
        for (int64_t i = 0; i < VL; i++) {
            const int64_t at = queries->positions[least(block * VL + i, queries->n - 1)] - tile->first;
            lanes.low[i] = int32_t(most(-1, least(NEAR, at - tile->high)));
            lanes.high[i] = int32_t(most(-1, least(NEAR, at - tile->low)));
        }
        return lanes;
    }

    // The scores of a key, -inf where the lane's query does not see it.
    INLINE Floats seen(int64_t block, int64_t key, const Lanes& lanes, Floats x) const {
        if (!tile->wide) {
            const Ints at = splat_int(tile->after[key]);
            return ((at >= lanes.low) & (at <= lanes.high)) ? x : splat(NONE);
        }
        for (int64_t i = 0; i < VL; i++) {
            const int64_t distance = queries->positions[least(block * VL + i, queries->n - 1)] - tile->positions[key];
            if (distance < tile->low || distance > tile->high) x[i] = NONE;
        }
        return x;
    }

    // Scores become weights; returns what the sums before them are to be scaled by.
    Floats softmax(int64_t block, int64_t from, int64_t to, Floats top) {
        const Floats before = load(m + block * VL), now = max(before, top);
        // Finite where nothing was seen yet, so that -inf - -inf does not arise.
        const Floats pivot = now == NONE ? Floats{} : now;
        const Floats factor = exp2<5>((before - pivot) * units.unit);
        Floats total = load(l + block * VL) * factor;
        for (int64_t j = from; j < to; j += Op::PAIR) {
            Floats p[2];
            for (int n = 0; n < Op::PAIR; n++) {
                p[n] = exp2<Op::DEGREE>((load(scores + (j + n) * VL) - pivot) * units.unit);
                total += p[n];
            }
            if constexpr (Op::PAIR == 2) store_in_pairs<1>(halves + j / 2 * VL, 0, p[0], p[1]);
            else store(scores + j * VL, p[0]);
        }
        store(m + block * VL, now), store(l + block * VL, total);
        return factor;
    }

    // out and lse of a block: L2 -> memory, once.
    void end(const Job& job, int64_t block, int64_t b, int64_t h) {
        const int64_t row = block * VL, count = least(VL, queries->n - row);
        const int64_t bytes = values.dim * size_of(call.out.type);
        for (int64_t r = row + VL; r < least(row + 2 * VL, queries->n); r++) ask_to_write(call.out.at(b, queries->rows[r], h), bytes);
        float* sums = acc + row * values.columns;
        const Floats total = load(l + row);
        const bool onto = call.merges || !job.fresh;
        const Floats none = splat(0.f), share = total == none ? none : 1 / total;
        for (int64_t d = 0; d < values.columns; d += VL) {
            for (int64_t i = 0; i < VL && !onto; i++) store(sums + (d + i) * VL, load(sums + (d + i) * VL) * share);
            transpose(sums + d * VL, VL, stage + d, values.columns);
        }
        Floats lse = (load(m + row) * units.unit + log2(total)) * float(LN_2);
        lse = total == none ? splat(NONE) : total == total ? lse : total;
        for (int64_t i = 0; i < count; i++) {
            if (onto) {
                this->finish(job, b, h, row + i, total[i], stage + i * values.columns);
                continue;
            }
            store_floats(call.out.at(b, queries->rows[row + i], h), stage + i * values.columns, call.out.type, values.dim);
            *(float*)call.lse.at(b, queries->rows[row + i], h) = lse[i];
        }
    }
};
