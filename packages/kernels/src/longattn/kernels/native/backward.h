// Backward from the merged lse: P = 2^(s - lse), dS = P * (dO v - delta), delta = rowsum(dO * O) - dlse; dv = P^T dO, dk = dS^T q,
// dq = dS k. Every gradient has one owner, so there are no atomics and equal calls give equal bits.
//
// Rows of a task keep Q, dO and dq in L2, a tile of keys keeps K, K^T, V^T and its dk, dv; P and dS of one strip are in memory at a time. Either
// one pass makes all three (five products; who owns a kv head owns everything of it), or one pass makes dq and another dk and dv for a
// range of key rows (seven products, but as many owners as there are threads).
#pragma once
#include "forward.h"

// Which gradients a pass makes, and the rows of keys that it owns.
struct Share {
    bool dq, dkv;
    int64_t row_begin, row_end;
    int64_t part;  // which one of several
};

// float32 sums of dk and dv: the tensors themselves, or scratch from the share's first row on.
struct Sums {
    char *dk, *dv;
    int64_t dk_row, dv_row;  // floats from a row to the next
    int64_t first;

    float* dk_at(int64_t n) const { return (float*)dk + (n - first) * dk_row; }
    float* dv_at(int64_t n) const { return (float*)dv + (n - first) * dv_row; }
};

template <class Op>
class Backward {
    static constexpr bool PAIRS = Op::PAIR == 2;
    const Call& call;
    const Shape<Op> shape, values;  // of q and k; of v and out
    const Units units;
    const PairMask pair_mask;
    const ScoreTerms terms;
    float *Q, *dO, *Q_rows, *dO_rows, *dq, *lse, *delta, *Kt, *Vt, *K, *dk, *dv, *stage, *scores, *products, *keep, *steep;
    float *ds_rows, *p_pairs, *ds_pairs;  // bfloat16 operands; in float32 the scores and products themselves
    float* sums;
    Queries* queries;
    KeyTile* tile;

public:
    int64_t floats;

    // `key_rows` of dk and dv are summed in scratch: 0 where the tensors are float32.
    Backward(const Call& call, float* from, int64_t key_rows)
        : call(call), shape(call.dim), values(call.value_dim), units(call.scale, PAIRS), pair_mask(call, float(LOG2_E / units.unit)),
          terms(call, units.unit) {
        float* at = from;
        auto take = [&](int64_t n) { float* mine = at; at += round_up(n, 16); return mine; };
        Q = take(ROWS * shape.wide);
        dO = take(ROWS * values.wide);
        Q_rows = PAIRS ? take(ROWS / 2 * shape.columns) : Q;
        dO_rows = PAIRS ? take(ROWS / 2 * values.columns) : dO;
        dq = take(ROWS * shape.columns);
        lse = take(ROWS);
        delta = take(ROWS);
        Kt = take(KEYS * shape.wide);
        Vt = take(KEYS * values.wide);
        K = take(KEYS / Op::PAIR * shape.columns);
        // KEYS is no multiple of MR: the last register tile of rows reads and writes a few more.
        dk = take((KEYS + MR) * shape.columns);
        dv = take((KEYS + MR) * values.columns);
        stage = take(most(VL * most(shape.wide, values.wide), 2 * most(shape.columns, values.columns)));
        scores = take(STRIP * KEYS + VL);
        products = take(STRIP * KEYS + VL);
        keep = take(KEYS);
        steep = take(terms.capped() ? STRIP * KEYS : 0);
        ds_rows = PAIRS ? take(STRIP * KEYS / 2) : products;
        p_pairs = PAIRS ? take(STRIP / 2 * KEYS + VL) : scores;
        ds_pairs = PAIRS ? take(STRIP / 2 * KEYS + VL) : products;
        sums = take(key_rows * (shape.columns + values.columns));
        queries = (Queries*)take(sizeof(Queries) / 4 + 1);
        tile = (KeyTile*)take(sizeof(KeyTile) / 4 + 1);
        floats = at - from;
    }

    // dk, dv of a kv head's key rows from all query heads that share it, and their dq unless another pass makes it.
    void keys(int64_t b, int64_t kv_head, const Share& share) {
        const int64_t group = call.heads / call.kv_heads, rows = share.row_end - share.row_begin;
        Sums to{call.dk.at(b, 0, kv_head), call.dv.at(b, 0, kv_head), call.dk.row, call.dv.row, 0};
        const bool direct = call.dk.type == FLOAT32;
        if (!direct) {
            memset(sums, 0, rows * (shape.columns + values.columns) * 4);
            to = Sums{(char*)sums, (char*)(sums + rows * shape.columns), shape.columns, values.columns, share.row_begin};
        }
        for (int64_t j = 0; j < call.job_count; j++) {
            const Job& job = call.jobs[j];
            const int64_t parts = (job.queries.count + call.rows - 1) / call.rows;
            for (int64_t n = 0; n < job.heads; n++) {
                const int64_t h = job.head + n * job.head_step;
                if (h / group != kv_head) continue;
                for (int64_t t = 0; t < job.tiles; t++)
                    for (int64_t part = 0; part < parts; part++) {
                        const int64_t first = job.queries.count * part / parts, end = job.queries.count * (part + 1) / parts;
                        run(job, b, h, t, first, end - first, share, &to);
                    }
            }
        }
        for (int64_t n = share.row_begin; !direct && n < share.row_end; n++) {
            store_floats(call.dk.at(b, n, kv_head), to.dk_at(n), call.dk.type, shape.dim);
            store_floats(call.dv.at(b, n, kv_head), to.dv_at(n), call.dv.type, values.dim);
        }
    }

    // The query rows of one task.
    void run(const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count, const Share& share, const Sums* to) {
        const int64_t rows = round_up(count, MR), kv_head = h / (call.heads / call.kv_heads);
        int64_t nearest, farthest;
        queries->take(job.queries, t, first, count);
        queries->range(0, count, nearest, farthest);
        KeyStream stream(call, job, t, b, nearest, farthest, share.row_begin, share.row_end);
        bool begun = false;
        if (share.dq) memset(dq, 0, rows * shape.columns * 4);
        while (stream.next(*tile)) {
            for (int64_t j = 0; j < tile->n; j++) tile->bias[j] /= units.unit;
            bool packed = false;
            for (int64_t r = 0; r < rows; r += STRIP) {
                const int64_t height = least(STRIP, rows - r), real = least(height, count - r);
                queries->range(r, real, nearest, farthest);
                const Visibility visibility = tile->seen(nearest, farthest);
                if (visibility == NOTHING) continue;
                if (!begun) begin(b, h, count, rows), begun = true;
                if (!packed) pack(b, kv_head, share), packed = true;
                strip(r, height, real, visibility, b, h, share);
            }
            if (packed && share.dkv) add_keys(*to);
        }
        for (int64_t r = 0; share.dq && r < count; r++) finish(job, b, h, r);
    }

private:
    // Q, dO, lse, delta: memory -> L2, stay for all keys.
    void begin(int64_t b, int64_t h, int64_t count, int64_t rows) {
        const Flush none(false);  // a small q times the scale is what it is
        for (int64_t r = 0; r < rows; r++) {
            float *q_row = Q + r * shape.wide, *dO_row = dO + r * values.wide;
            lse[r] = -NONE, delta[r] = 0;
            memset(q_row, 0, shape.wide * 4);
            memset(dO_row, 0, values.wide * 4);
            if (r >= count) continue;
            const int64_t n = queries->rows[r];
            load_words<Op>(q_row, call.q.at(b, n, h), call.q.type, shape.dim, shape.wide, units.q_factor);
            load_words<Op>(dO_row, call.grad_out.at(b, n, h), call.grad_out.type, values.dim, values.wide, 1);
            // A row that saw nothing: 2^(s - inf) is 0.
            const float own = *(const float*)call.lse.at(b, n, h);
            lse[r] = own == NONE ? -NONE : float(own * LOG2_E);
            float *grad = stage, *out = stage + values.columns, total = 0;
            load_floats(grad, call.grad_out.at(b, n, h), call.grad_out.type, values.dim, 1);
            load_floats(out, call.out.at(b, n, h), call.out.type, values.dim, 1);
            for (int64_t i = 0; i < values.dim; i++) total += grad[i] * out[i];
            delta[r] = total - (call.grad_lse.data ? *(const float*)call.grad_lse.at(b, n, h) : 0.f);
        }
        if (!PAIRS) return;
        auto words = [rows](float* from, int64_t wide) {
            return [=](int64_t i) { return i < rows ? (const char*)(from + i * wide) : nullptr; };
        };
        pack_rows<Op>(Q_rows, stage, shape, BFLOAT16, rows, 1, words(Q, shape.wide));
        pack_rows<Op>(dO_rows, stage, values, BFLOAT16, rows, 1, words(dO, values.wide));
    }

    // K, K^T and V^T: memory -> L2, replaced every tile of keys.
    void pack(int64_t b, int64_t kv_head, const Share& share) {
        const KeyTile& keys = *tile;
        pack_transposed<Op>(Kt, stage, call.k, shape, b, kv_head, keys.rows, keys.n, keys.padded);
        pack_transposed<Op>(Vt, stage, call.v, values, b, kv_head, keys.rows, keys.n, keys.padded);
        if (share.dq)
            pack_rows<Op>(K, stage, shape, call.k.type, keys.padded, 1, [&](int64_t i) -> const char* {
                return i < keys.n ? call.k.at(b, keys.rows[i], kv_head) : nullptr;
            });
        if (!share.dkv) return;
        memset(dk, 0, round_up(keys.padded, MR) * shape.columns * 4);
        memset(dv, 0, round_up(keys.padded, MR) * values.columns * 4);
    }

    void strip(int64_t r, int64_t height, int64_t real, Visibility visibility, int64_t b, int64_t h, const Share& share) {
        const KeyTile& keys = *tile;
        float top[STRIP * VL];
        const Reach<Op::GROUP> reach(keys, visibility, *queries, r, real);
        scores_of<Op>(Q + r * shape.wide, height, Kt, shape, keys, terms.start(keys), reach, scores, top);
        if (terms.any()) terms.apply(keys, reach, h, *queries, r, height, scores, nullptr, steep);
        if (pair_mask.needed(visibility)) pair_mask.hide(keys, visibility, reach, b, h, *queries, r, real, scores, nullptr);
        products_of<Op>(dO + r * values.wide, height, Vt, values, keys.padded, reach, products);
        // Whoever owns keys owns a part of these sums; each pair is met once where dk and dv are made.
        const int64_t columns = call.by_distance_columns;
        float* by_distance = share.dkv && call.by_distance_grad
            ? call.by_distance_grad + ((share.part * call.batch + b) * call.heads + h) * columns
            : nullptr;
        for (int64_t i = 0; i < height; i += Op::PAIR) weigh(r, i, reach.from[i / MR], reach.to[i / MR], b, h, by_distance);
        const auto one = [](int64_t) { return splat(1.f); };
        const int64_t all = round_up(keys.padded, MR);
        if (share.dkv) {
            // Of each register tile of keys: the rows from the first to the last that meets it.
            Steps met[KEYS / MR + 1] = {};
            for (int64_t i = 0; i < height; i += MR)
                for (int64_t j = reach.from[i / MR] / MR; j * MR < reach.to[i / MR]; j++)
                    met[j] = {met[j].to ? met[j].from : i / Op::PAIR, least(height, i + MR) / Op::PAIR};
            const auto steps = [&](int64_t j) { return met[j / MR]; };
            accumulate<Op>(all, steps, p_pairs, 1, KEYS, dO_rows + r / Op::PAIR * values.columns, values.columns, dv, one);
            accumulate<Op>(all, steps, ds_pairs, 1, KEYS, Q_rows + r / Op::PAIR * shape.columns, shape.columns, dk, one);
        }
        if (share.dq)
            accumulate<Op>(
                height, [&](int64_t i) { return Steps{reach.from[i / MR] / Op::PAIR, reach.to[i / MR] / Op::PAIR}; }, ds_rows,
                KEYS / Op::PAIR, 1, K, shape.columns, dq + r * shape.columns, one);
    }

    // One row (or pair of rows) of scores and of dO v: in place they become P and dS, zeros but for the keys from .. to.
    INLINE void weigh(int64_t r, int64_t i, int64_t from, int64_t to, int64_t b, int64_t h, float* by_distance) {
        const Floats unit = splat(units.unit);
        for (int row = 0; row < Op::PAIR; row++) {
            float *p_row = scores + (i + row) * KEYS, *ds_row = products + (i + row) * KEYS;
            const Floats pivot = splat(lse[r + i + row]), less = splat(delta[r + i + row]);
            const int64_t position = queries->positions[least(r + i + row, queries->n - 1)];
            if (call.drop > 0) keep_row(call, *tile, b, h, position, keep);
            for (float* zeros : {p_row, ds_row}) {
                memset(zeros, 0, from * 4);
                memset(zeros + to, 0, (tile->padded - to) * 4);
            }
            for (int64_t j = from; j < to; j += VL) {
                Floats p = exp2<Op::DEGREE>(load(p_row + j) * unit - pivot), dp = load(ds_row + j);
                Floats kept = call.drop > 0 ? load(keep + j) : splat(1.f);
                store(ds_row + j, p * (dp * kept - less));
                store(p_row + j, p * kept);
            }
            if (by_distance) terms.add_gradients(*tile, position, from, to, ds_row, by_distance);
            if (!terms.capped()) continue;
            for (int64_t j = from; j < to; j += VL) store(ds_row + j, load(ds_row + j) * load(steep + (i + row) * KEYS + j));
        }
#if defined(__AVX512BF16__)
        for (int64_t j = 0; PAIRS && j < tile->padded; j += 2 * VL) {
            const float *p = scores + i * KEYS + j, *ds = products + i * KEYS + j;
            Floats even[2] = {load(ds), load(ds + VL)}, odd[2] = {load(ds + KEYS), load(ds + KEYS + VL)};
            store(ds_rows + (i * KEYS + j) / 2, in_order(even[0], even[1]));
            store(ds_rows + ((i + 1) * KEYS + j) / 2, in_order(odd[0], odd[1]));
            for (int n = 0; n < 2; n++) {
                store(ds_pairs + i / 2 * KEYS + j + n * VL, in_pairs(even[n], odd[n]));
                store(p_pairs + i / 2 * KEYS + j + n * VL, in_pairs(load(p + n * VL), load(p + KEYS + n * VL)));
            }
        }
#endif
    }

    // dk, dv of a tile: L2 -> memory, once for all rows of the task.
    void add_keys(const Sums& to) {
        const float factor = call.scale == 0 ? 0.f : float(call.scale / units.q_factor);
        for (int64_t j = 0; j < tile->n; j++) {
            float *dk_row = to.dk_at(tile->rows[j]), *dv_row = to.dv_at(tile->rows[j]);
            const float *dk_own = dk + j * shape.columns, *dv_own = dv + j * values.columns;
            for (int64_t i = 0; i < shape.dim; i++) dk_row[i] += dk_own[i] * factor;
            for (int64_t i = 0; i < values.dim; i++) dv_row[i] += dv_own[i];
        }
    }

    // dq: L2 -> memory, once; onto what stands there where an earlier phase wrote the row.
    void finish(const Job& job, int64_t b, int64_t h, int64_t r) {
        float* row = dq + r * shape.columns;
        char* to = call.dq.at(b, queries->rows[r], h);
        const float scale = float(call.scale);
        for (int64_t i = 0; i < shape.dim; i++) row[i] = row[i] * scale + (job.fresh ? 0.f : ((const float*)to)[i]);
        store_floats(to, row, call.dq.type, shape.dim);
    }
};
