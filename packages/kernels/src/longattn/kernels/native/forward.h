// Forward: out = softmax(scale * q k^T + log counts) v and its lse, for the query rows of one task (FlashAttention, Dao et al. 2022).
//
// One task owns some rows of one tile of a job, for one head and batch element. Q and the running m, l, acc stay in L2 for all keys; a
// tile of keys is packed once and stays for all rows of the task; the scores of one strip are in memory at a time. Scores are in units in which
// exp is 2^(unit * score): q is scaled by what is left of scale * log2 e.
#pragma once
#include "flush.h"
#include "philox.h"
#include "strip.h"
#include "terms.h"

// scale * log2 e = q_factor * unit. Products of bfloat16 need a power of two for q, products of float32 take everything.
struct Units {
    float q_factor, unit;

    Units(double scale, bool half) {
        double whole = scale * LOG2_E;
        if (!half || whole == 0) {
            q_factor = float(whole), unit = 1;
            return;
        }
        int exponent;
        double mantissa = std::frexp(std::fabs(whole), &exponent);
        q_factor = float(std::ldexp(whole < 0 ? -1.0 : 1.0, exponent - 1)), unit = float(mantissa * 2);
    }
};

template <class Op>
class Forward {
protected:
    static constexpr int64_t STRIP = Op::STRIP, WIDTH = Op::WIDTH, HALVES = WIDTH / 2 * Op::PARTS;
    const Call& call;
    const Shape<Op> shape, values;  // of q and k; of v and out
    const Units units;
    const PairMask pair_mask;
    const ScoreTerms terms;
    float *Q, *acc, *m, *l, *Kt, *V, *stage, *scores, *top, *factor, *keep;
    float* halves;  // weights as words of bfloat16
    Queries* queries;
    KeyTile* tile;

public:
    // Lays out the scratch of one thread from `from` on; `floats` is how much of it there must be.
    Forward(const Call& call, float* from)
        : call(call), shape(call.dim), values(call.value_dim), units(call.scale, Op::PAIR == 2), pair_mask(call, float(LOG2_E / units.unit)),
          terms(call, units.unit) {
        float* at = from;
        auto take = [&](int64_t n) { float* mine = at; at += round_up(n, 16); return mine; };
        Q = take(ROWS * shape.wide);
        acc = take(ROWS * values.columns);
        m = take(ROWS);
        l = take(ROWS * VL);
        Kt = take(WIDTH * shape.wide);
        V = take(WIDTH / Op::PAIR * values.line);
        stage = take(most(VL * most(shape.wide, values.columns), values.line));
        scores = take(STRIP * WIDTH);
        top = take(STRIP * VL);
        factor = take(STRIP);
        keep = take(KEYS);
        halves = take(Op::PAIR == 2 ? STRIP * HALVES : 0);
        queries = (Queries*)take(sizeof(Queries) / 4 + 1);
        tile = (KeyTile*)take(sizeof(KeyTile) / 4 + 1);
        floats = at - from;
    }
    int64_t floats;

    void run(const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count) {
        int64_t rows = begin(job, b, h, t, first, count), nearest, farthest;
        queries->range(0, count, nearest, farthest);
        KeyStream stream(call, job, t, b, nearest, farthest, 0, call.keys);
        const int64_t kv_head = h / (call.heads / call.kv_heads);
        while (stream.template next<Op>(*tile)) {
            for (int64_t j = 0; j < tile->n; j++) tile->bias[j] /= units.unit;
            bool packed = false;
            for (int64_t r = 0; r < rows; r += STRIP) {
                int64_t height = least(STRIP, rows - r), real = least(height, count - r);
                queries->range(r, real, nearest, farthest);
                Visibility visibility = tile->seen(nearest, farthest);
                if (visibility == NOTHING) continue;
                if (!packed) pack(b, kv_head), packed = true;
                const Reach<Op> reach(*tile, visibility, *queries, r, real);
                scores_of<Op>(Q + r * shape.wide, height, Kt, shape, *tile, terms.start(*tile), reach, scores, top);
                if (terms.any()) terms.apply(*tile, reach, h, *queries, r, height, scores, top, nullptr);
                if (pair_mask.needed(visibility)) pair_mask.hide(*tile, visibility, reach, b, h, *queries, r, real, scores, top);
                for (int64_t i = 0; i < height; i++) softmax(r, i, reach.begin(i), reach.end(i), b, h);
                add_values(r, height, reach);
            }
        }
        const int64_t bytes = values.dim * size_of(call.out.type);
        for (int64_t r = 0; r < count; r++) {
            if (r + ROWS_AHEAD < count) ask_to_write(call.out.at(b, queries->rows[r + ROWS_AHEAD], h), bytes);
            finish(job, b, h, r, sum(load(l + r * VL)), acc + r * values.columns);
        }
    }

protected:
    // Q: memory -> L2, stays for all keys. Returns the rows, padded to whole register tiles.
    int64_t begin(const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count) {
        queries->take(job.queries, t, first, count, Op::TALL);
        int64_t rows = round_up(count, Op::TALL);
        const Flush none(false);  // a small q times the scale is what it is
        const int64_t bytes = shape.dim * size_of(call.q.type);
        for (int64_t r = 0; r < rows; r++) {
            if (r + ROWS_AHEAD < count) ask_for(call.q.at(b, queries->rows[r + ROWS_AHEAD], h), bytes);
            float* row = Q + r * shape.wide;
            if (r < count) load_words<Op>(row, call.q.at(b, queries->rows[r], h), call.q.type, shape.dim, shape.part, units.q_factor);
            else memset(row, 0, shape.wide * 4);
            m[r] = NONE;
        }
        memset(acc, 0, rows * values.columns * 4);
        memset(l, 0, rows * VL * 4);
        return rows;
    }

    // K^T and V: memory -> L2, replaced every tile of keys.
    void pack(int64_t b, int64_t kv_head) {
        const KeyTile& keys = *tile;
        pack_transposed<Op>(Kt, stage, call.k, shape, b, kv_head, keys.rows, keys.n, keys.padded);
        const int64_t bytes = values.dim * size_of(call.v.type);
        for (int64_t i = 0; i < least(keys.n, ROWS_AHEAD); i++) ask_for(call.v.at(b, keys.rows[i], kv_head), bytes);
        pack_rows<Op>(V, stage, values, call.v.type, keys.padded, 1, [&](int64_t i) -> const char* {
            if (i + ROWS_AHEAD < keys.n) ask_for(call.v.at(b, keys.rows[i + ROWS_AHEAD], kv_head), bytes);
            return i < keys.n ? call.v.at(b, keys.rows[i], kv_head) : nullptr;
        });
    }

    // One row: the running max moves, scores become weights, and what stood before is to be scaled by `factor`.
    void softmax(int64_t r, int64_t i, int64_t from, int64_t to, int64_t b, int64_t h) {
        if (from == to) return;
        float* row = scores + i * WIDTH;
        const float before = m[r + i], here = largest(load(top + i * VL)), now = here > before ? here : before;
        // Finite where nothing was seen yet, so that -inf - -inf does not arise.
        const float pivot = now == NONE ? 0.f : now * units.unit;
        // A product that is rounded and one that is not, as in a fused multiply-add, may differ by more than 2^x has room for.
        const bool far = std::fabs(pivot) > FAR;
        factor[i] = before == now ? 1.f : before == NONE ? 0.f : exp2<5>(splat(far ? (before - now) * units.unit : before * units.unit - pivot))[0];
        m[r + i] = now;
        Floats total = load(l + (r + i) * VL) * factor[i];
        for (int64_t j = from; far && j < to; j += VL) store(row + j, load(row + j) - now);
        const Floats unit = splat(units.unit), less = splat(far ? 0.f : pivot);
        if (call.drop > 0) keep_row(call, *tile, b, h, queries->positions[least(r + i, queries->n - 1)], keep);
        for (int64_t j = from; j < to; j += VL * Op::PAIR) {
            Floats p[2];
            for (int n = 0; n < Op::PAIR; n++) {
                p[n] = exp2<Op::DEGREE>(load(row + j + n * VL) * unit - less);
                total += p[n];
                if (call.drop > 0) p[n] *= load(keep + j + n * VL);
            }
            put(i, j, p);
        }
        store(l + (r + i) * VL, total);
    }

    INLINE void put(int64_t i, int64_t j, const Floats* p) {
        if constexpr (Op::PAIR == 2) store_in_order<Op::PARTS>(halves + i * HALVES + j / 2, WIDTH / 2, p[0], p[1]);
        else store(scores + i * WIDTH + j, p[0]);
    }

    // acc = acc * factor + weights V, for the strip from row r on.
    void add_values(int64_t r, int64_t height, const Reach<Op>& reach) {
        float* sums = acc + r * values.columns;
        if constexpr (Op::TILES) {
            for (int64_t i = 0; i < height; i++) {
                if (reach.begin(i) == reach.end(i) || factor[i] == 1) continue;
                float* row = sums + i * values.columns;
                for (int64_t c = 0; c < values.columns; c += VL) store(row + c, load(row + c) * factor[i]);
            }
            for (int64_t i = 0; i < height; i += Op::TALL)
                for (int64_t c = 0; c < values.columns; c += Op::COLUMNS) {
                    const int64_t from = reach.begin(i) / 2, deep = (reach.end(i) - reach.begin(i)) / 2 / Op::DEEP;
                    Op::add(sums + i * values.columns + c, values.columns, {halves + i * HALVES + from, HALVES, WIDTH / 2},
                            {V + from * values.line + c, values.line, values.columns}, deep);
                }
        } else
            accumulate<Op>(
                height, [&](int64_t i) { return Steps{reach.begin(i) / Op::PAIR, reach.end(i) / Op::PAIR}; },
                Op::PAIR == 2 ? halves : scores, WIDTH / Op::PAIR, 1, V, values.columns, sums,
                [&](int64_t i) { return splat(factor[i]); });
    }

    // A row of out and lse: L2 -> memory, once a task; onto what stands there where the row was written before.
    void finish(const Job& job, int64_t b, int64_t h, int64_t r, float total, float* row) {
        float lse = total > 0 ? float((double(m[r]) * units.unit + std::log2(double(total))) * LN_2) : NONE;
        if (total != total) lse = total;
        char* out = call.out.at(b, queries->rows[r], h);
        float* lse_at = (float*)call.lse.at(b, queries->rows[r], h);
        float mine = total > 0 || total != total ? 1 / total : 0;
        if (call.merges || !job.fresh) {
            float other = *lse_at, top = std::fmax(lse, other), theirs = 0;
            if (top != NONE) {
                double a = std::exp(double(lse) - top), c = std::exp(double(other) - top);
                mine *= float(a / (a + c)), theirs = float(c / (a + c));
                lse = float(top + std::log(a + c));
            } else theirs = 1;
            const float* old = (const float*)out;
            for (int64_t i = 0; i < values.dim; i++) row[i] = row[i] * mine + old[i] * theirs;
        } else
            for (int64_t i = 0; i < values.dim; i++) row[i] *= mine;
        store_floats(out, row, call.out.type, values.dim);
        *lse_at = lse;
    }
};
