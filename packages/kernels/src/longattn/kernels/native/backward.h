// Backward from the merged lse: P = 2^(s - lse), dS = P * (dO v - delta), delta = rowsum(dO * O) - dlse; dv = P^T dO, dk = dS^T q,
// dq = dS k. Every gradient has one owner, so there are no atomics and equal calls give equal bits.
//
// Rows of a task keep Q, dO and dq in L2, a tile of keys keeps K, K^T, V^T and its dk, dv; P and dS of one strip are in memory at a time. Either
// one pass makes all three (five products; who owns a kv head owns everything of it), or one pass makes dq and another dk and dv for a
// range of key rows (seven products, but as many owners as there are threads).
#pragma once
#include "forward.h"
#include "sums.h"

// Which gradients a pass makes, and the rows of keys that it owns.
struct Share {
    bool dq, dkv;
    int64_t row_begin, row_end;
    int64_t part;  // which one of several
};

template <class Op>
class Backward {
    static constexpr bool PAIRS = Op::PAIR == 2;
    static constexpr int64_t STRIP = Op::BACK_STRIP, WIDTH = Op::WIDTH, HALVES = WIDTH / 2 * Op::PARTS;
    static constexpr int64_t PAIRS_LOW = STRIP / 2 * WIDTH;  // from the high part of a strip's pairs to the low one
    const Call& call;
    const int64_t places;
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

    // `places` for rows of dk and dv to be summed in scratch: 0 where the tensors are float32.
    Backward(const Call& call, float* from, int64_t places)
        : call(call), places(places), shape(call.dim), values(call.value_dim), units(call.scale, PAIRS), pair_mask(call, float(LOG2_E / units.unit)),
          terms(call, units.unit) {
        float* at = from;
        auto take = [&](int64_t n) { float* mine = at; at += round_up(n, 16); return mine; };
        Q = take(ROWS * shape.wide);
        dO = take(ROWS * values.wide);
        Q_rows = PAIRS ? take(ROWS / 2 * shape.line) : Q;
        dO_rows = PAIRS ? take(ROWS / 2 * values.line) : dO;
        dq = take(ROWS * shape.columns);
        lse = take(ROWS);
        delta = take(ROWS);
        Kt = take(WIDTH * shape.wide);
        Vt = take(WIDTH * values.wide);
        K = take(WIDTH / Op::PAIR * shape.line);
        // WIDTH is no multiple of MR: the last register tile of rows reads and writes a few more.
        dk = take((WIDTH + MR) * shape.columns);
        dv = take((WIDTH + MR) * values.columns);
        stage = take(most(most(VL * most(shape.wide, values.wide), 2 * most(shape.line, values.line)), VL * most(2 * VL, shape.columns + values.columns)));
        scores = take(STRIP * WIDTH + VL);
        products = take(STRIP * WIDTH + VL);
        keep = take(KEYS);
        steep = take(terms.capped() ? STRIP * WIDTH : 0);
        ds_rows = PAIRS ? take(STRIP * HALVES) : products;
        p_pairs = PAIRS ? take(PAIRS_LOW * Op::PARTS + VL) : scores;
        ds_pairs = PAIRS ? take(PAIRS_LOW * Op::PARTS + VL) : products;
        sums = take(Sums::floats(call, places));
        queries = (Queries*)take(sizeof(Queries) / 4 + 1);
        tile = (KeyTile*)take(sizeof(KeyTile) / 4 + 1);
        floats = at - from;
    }

    // dk, dv of a kv head's key rows from all query heads that share it, and their dq unless another pass makes it.
    void keys(int64_t b, int64_t kv_head, const Share& share) {
        const int64_t group = call.heads / call.kv_heads;
        Sums to = call.dk.type == FLOAT32
            ? Sums(call, b, kv_head)
            : Sums(call, b, kv_head, sums, places, share.row_begin, share.row_end);
        tasks_in_order(call, kv_head, [&](const Job& job, int64_t t, int64_t first, int64_t count) {
            to.done_before(first_needed(job, met_by(call, job, t, first, count)));
            for (int64_t n = 0; n < job.heads; n++) {
                const int64_t h = job.head + n * job.head_step;
                if (h / group == kv_head) run(job, b, h, t, first, count, share, &to);
            }
        });
        to.done();
    }

    // The query rows of one task.
    void run(const Job& job, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count, const Share& share, Sums* to) {
        const int64_t rows = round_up(count, Op::TALL), kv_head = h / (call.heads / call.kv_heads);
        int64_t nearest, farthest;
        queries->take(job.queries, t, first, count, Op::TALL);
        queries->range(0, count, nearest, farthest);
        KeyStream stream(call, job, t, b, nearest, farthest, share.row_begin, share.row_end);
        bool begun = false;
        if (share.dq) memset(dq, 0, rows * shape.columns * 4);
        while (stream.template next<Op>(*tile)) {
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
        const int64_t bytes = shape.dim * size_of(call.q.type), value_bytes = values.dim * size_of(call.grad_out.type);
        for (int64_t r = 0; r < rows; r++) {
            if (r + ROWS_AHEAD < count) {
                const int64_t ahead = queries->rows[r + ROWS_AHEAD];
                ask_for(call.q.at(b, ahead, h), bytes);
                ask_for(call.grad_out.at(b, ahead, h), value_bytes);
                if (call.out.data) ask_for(call.out.at(b, ahead, h), value_bytes);
            }
            float *q_row = Q + r * shape.wide, *dO_row = dO + r * values.wide;
            lse[r] = -NONE, delta[r] = 0;
            memset(q_row, 0, shape.wide * 4);
            memset(dO_row, 0, values.wide * 4);
            if (r >= count) continue;
            const int64_t n = queries->rows[r];
            load_words<Op>(q_row, call.q.at(b, n, h), call.q.type, shape.dim, shape.part, units.q_factor);
            load_words<Op>(dO_row, call.grad_out.at(b, n, h), call.grad_out.type, values.dim, values.part, 1);
            // A row that saw nothing: 2^(s - inf) is 0.
            const float own = *(const float*)call.lse.at(b, n, h);
            lse[r] = own == NONE ? -NONE : float(own * LOG2_E);
            float *grad = stage, *out = stage + values.columns, total = 0;
            load_floats(grad, call.grad_out.at(b, n, h), call.grad_out.type, values.dim, 1);
            if (call.out.data) {  // without, dlse holds -delta
                load_floats(out, call.out.at(b, n, h), call.out.type, values.dim, 1);
                for (int64_t i = 0; i < values.dim; i++) total += grad[i] * out[i];
            }
            delta[r] = total - (call.grad_lse.data ? *(const float*)call.grad_lse.at(b, n, h) : 0.f);
        }
        if (!PAIRS) return;
        if constexpr (Op::TILES) {
            pack_columns<Op>(Q_rows, ROWS / 2, stage, Q, shape, rows);
            pack_columns<Op>(dO_rows, ROWS / 2, stage, dO, values, rows);
            return;
        }
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
        const int64_t all = Op::TILES ? WIDTH : round_up(keys.padded, MR);
        memset(dk, 0, all * shape.columns * 4);
        memset(dv, 0, all * values.columns * 4);
    }

    void strip(int64_t r, int64_t height, int64_t real, Visibility visibility, int64_t b, int64_t h, const Share& share) {
        const KeyTile& keys = *tile;
        float top[STRIP * VL];
        const Reach<Op> reach(keys, visibility, *queries, r, real);
        scores_of<Op>(Q + r * shape.wide, height, Kt, shape, keys, terms.start(keys), reach, scores, top);
        if (terms.any()) terms.apply(keys, reach, h, *queries, r, height, scores, nullptr, steep);
        if (pair_mask.needed(visibility)) pair_mask.hide(keys, visibility, reach, b, h, *queries, r, real, scores, nullptr);
        products_of<Op>(dO + r * values.wide, height, Vt, values, keys.padded, reach, products);
        // Whoever owns keys owns a part of these sums; each pair is met once where dk and dv are made.
        const int64_t columns = call.by_distance_columns;
        float* by_distance = share.dkv && call.by_distance_grad
            ? call.by_distance_grad + ((share.part * call.batch + b) * call.heads + h) * columns
            : nullptr;
        for (int64_t i = 0; i < height; i += Op::PAIR) weigh(r, i, reach.begin(i), reach.end(i), b, h, by_distance);
        if constexpr (Op::TILES) return add_in_tiles(r, height, reach, share);
        else add(r, height, reach, share);
    }

    // dv += P^T dO, dk += dS^T q, dq += dS K, for the strip from row r on.
    void add(int64_t r, int64_t height, const Reach<Op>& reach, const Share& share) {
        const auto one = [](int64_t) { return splat(1.f); };
        const int64_t all = round_up(tile->padded, MR);
        if (share.dkv) {
            // Of each register tile of keys: the rows from the first to the last that meets it.
            Steps met[WIDTH / MR + 1] = {};
            for (int64_t i = 0; i < height; i += MR)
                for (int64_t j = reach.begin(i) / MR; j * MR < reach.end(i); j++)
                    met[j] = {met[j].to ? met[j].from : i / Op::PAIR, least(height, i + MR) / Op::PAIR};
            const auto steps = [&](int64_t j) { return met[j / MR]; };
            accumulate<Op>(all, steps, p_pairs, 1, WIDTH, dO_rows + r / Op::PAIR * values.columns, values.columns, dv, one);
            accumulate<Op>(all, steps, ds_pairs, 1, WIDTH, Q_rows + r / Op::PAIR * shape.columns, shape.columns, dk, one);
        }
        if (share.dq)
            accumulate<Op>(
                height, [&](int64_t i) { return Steps{reach.begin(i) / Op::PAIR, reach.end(i) / Op::PAIR}; }, ds_rows,
                WIDTH / Op::PAIR, 1, K, shape.columns, dq + r * shape.columns, one);
    }

    // The same in tiles, where dv and dk stand transposed, (columns, WIDTH): dv^T += dO^T P, dk^T += q^T dS.
    void add_in_tiles(int64_t r, int64_t height, const Reach<Op>& reach, const Share& share) {
        for (int64_t j = 0; share.dkv && j < tile->padded; j += Op::GROUP) {
            Steps met = {};
            for (int64_t i = 0; i < height; i += Op::TALL)
                if (reach.begin(i) <= j && j < reach.end(i)) met = {met.to ? met.from : i / 2, (i + Op::TALL) / 2};
            const int64_t deep = (met.to - met.from) / Op::DEEP, at = r / 2 + met.from, pairs = met.from * WIDTH + j;
            for (int64_t d = 0; d < values.columns; d += Op::COLUMNS)
                Op::add(dv + d * WIDTH + j, WIDTH, {dO_rows + d * (ROWS / 2) + at, ROWS / 2, values.columns * (ROWS / 2)},
                        {p_pairs + pairs, WIDTH, PAIRS_LOW}, deep);
            for (int64_t d = 0; d < shape.columns; d += Op::COLUMNS)
                Op::add(dk + d * WIDTH + j, WIDTH, {Q_rows + d * (ROWS / 2) + at, ROWS / 2, shape.columns * (ROWS / 2)},
                        {ds_pairs + pairs, WIDTH, PAIRS_LOW}, deep);
        }
        for (int64_t i = 0; share.dq && i < height; i += Op::TALL)
            for (int64_t c = 0; c < shape.columns; c += Op::COLUMNS) {
                const int64_t from = reach.begin(i) / 2, deep = (reach.end(i) - reach.begin(i)) / 2 / Op::DEEP;
                Op::add(dq + (r + i) * shape.columns + c, shape.columns, {ds_rows + i * HALVES + from, HALVES, WIDTH / 2},
                        {K + from * shape.line + c, shape.line, shape.columns}, deep);
            }
    }

    // One row (or pair of rows) of scores and of dO v: in place they become P and dS, zeros but for the keys from .. to.
    INLINE void weigh(int64_t r, int64_t i, int64_t from, int64_t to, int64_t b, int64_t h, float* by_distance) {
        const Floats unit = splat(units.unit);
        for (int row = 0; row < Op::PAIR; row++) {
            float *p_row = scores + (i + row) * WIDTH, *ds_row = products + (i + row) * WIDTH;
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
            for (int64_t j = from; j < to; j += VL) store(ds_row + j, load(ds_row + j) * load(steep + (i + row) * WIDTH + j));
        }
        if constexpr (PAIRS)
            for (int64_t j = 0; j < tile->padded; j += 2 * VL) {
                const float *p = scores + i * WIDTH + j, *ds = products + i * WIDTH + j;
                const Floats even[2] = {load(ds), load(ds + VL)}, odd[2] = {load(ds + WIDTH), load(ds + WIDTH + VL)};
                store_in_order<Op::PARTS>(ds_rows + i * HALVES + j / 2, WIDTH / 2, even[0], even[1]);
                store_in_order<Op::PARTS>(ds_rows + (i + 1) * HALVES + j / 2, WIDTH / 2, odd[0], odd[1]);
                for (int n = 0; n < 2; n++) {
                    const int64_t to = i / 2 * WIDTH + j + n * VL;
                    store_in_pairs<Op::PARTS>(ds_pairs + to, PAIRS_LOW, even[n], odd[n]);
                    store_in_pairs<Op::PARTS>(p_pairs + to, PAIRS_LOW, load(p + n * VL), load(p + WIDTH + n * VL));
                }
            }
    }

    // dk, dv of a tile: L2 -> memory, once for all rows of the task.
    void add_keys(Sums& to) {
        const float factor = call.scale == 0 ? 0.f : float(call.scale / units.q_factor);
        for (int64_t j = 0; j < tile->n; j++) {
            const float *dk_own = dk + j * shape.columns, *dv_own = dv + j * values.columns;
            if constexpr (Op::TILES) {
                float *dk_rows = stage, *dv_rows = stage + VL * shape.columns;
                if (j % VL == 0) upright(dk_rows, dk + j, shape.columns), upright(dv_rows, dv + j, values.columns);
                dk_own = dk_rows + j % VL * shape.columns, dv_own = dv_rows + j % VL * values.columns;
            }
            to.add(tile->rows[j], dk_own, factor, dv_own);
        }
    }

    // (columns, WIDTH) as rows: VL of them.
    static void upright(float* to, const float* from, int64_t columns) {
        for (int64_t d = 0; d < columns; d += VL) transpose(from + d * WIDTH, WIDTH, to + d, columns);
    }

    // dq: L2 -> memory, once; onto what stands there where an earlier phase, or rectangle, wrote the row.
    void finish(const Job& job, int64_t b, int64_t h, int64_t r) {
        float* row = dq + r * shape.columns;
        char* to = call.dq.at(b, queries->rows[r], h);
        const float scale = float(call.scale);
        for (int64_t i = 0; i < shape.dim; i++) row[i] = row[i] * scale + (job.fresh && !call.merges ? 0.f : ((const float*)to)[i]);
        store_floats(to, row, call.dq.type, shape.dim);
    }
};
