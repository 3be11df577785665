// Few query rows over many keys: softmax(scale * q k^T) v where reading k and v is most of the work.
//
// One task owns up to MOST_FEW query rows that share keys (all heads of a kv head's group) and a range of those keys. Keys and values are
// streamed once, in their storage type, a tile of both at a time; Q, scores and the running m, l, acc stay in L1. A range leaves a part
// (acc, m, l), and parts of a row merge. Scores are in units in which exp is 2^score.
#pragma once
#include "few_tiles.h"
#include "pack.h"
#include "stored.h"
#include "terms.h"

constexpr int64_t FEW_KEYS = 64;   // keys of a tile
constexpr int64_t MOST_FEW = 16;   // query rows of a task

// Numbers that are stored with a scale for each row.
template <class Stored>
constexpr bool eight_bits() { return Stored::BYTES == STEP; }

// Slots of pages in place of rows of k: entry i is slot pages[i >> shift] << shift | the last `shift` bits of i, with a scale of its key and of its
// value where they are stored in 8 bits. An entry to whose scores -inf is added for all queries is not read.
struct Listed {
    const int32_t* pages;
    int64_t shift;
    const float *k_scale, *v_scale;
};

// Query rows and the keys that they share. Key i is at k + i * k_step, in bytes; row r sees the keys begin[r] <= i < end[r].
struct Shared {
    int64_t rows, dim, value_dim;
    float unit;  // what makes a product of q and k a score
    const char* q[MOST_FEW];
    int64_t begin[MOST_FEW], end[MOST_FEW];
    const char *k, *v;
    int64_t k_step, v_step;
    const uint8_t* hidden;  // key i is hidden where hidden[i * hidden_step] is 1, and is not read; null: none
    int64_t hidden_step;
    const ScoreTerms* terms = nullptr;            // of scores; null: none
    int64_t head[MOST_FEW] = {}, position[MOST_FEW] = {};  // of row r, for terms that ask for them
    int64_t origin, apart;                        // key i is at position origin + i * apart
    const float* added = nullptr;                 // (rows, added_row): what is added for row r and key i after that, -inf hides; null: nothing
    int64_t added_row;
    int64_t asked = FLOAT32;  // the type of q over keys of 8 bits; over others q has theirs
    const Listed* listed = nullptr;  // keys are its entries, and nothing is in `hidden`; null: rows of k

    int64_t wide() const { return round_up(value_dim, STEP); }
    // Floats of a part: acc (rows, wide), m (rows), l (rows).
    int64_t floats() const { return rows * (wide() + 2); }
};

template <class Stored>
class FewQueries {
    static constexpr bool QUICK_SCORES = !eight_bits<Stored>();  // numbers of 8 bits are widened for scores as well
    const Shared& all;
    const int64_t whole, rest;  // of a row of q and k: steps, and numbers of the step behind them
    const int64_t value_whole, value_rest, wide;  // of v: the same, and numbers of a row of acc
    float *acc, *m, *l;
    alignas(64) float Q[MOST_FEW * MOST_WIDE];
    alignas(64) float scores[MOST_FEW * FEW_KEYS];
    float factor[MOST_FEW];
    int64_t at[FEW_KEYS], n;          // the tile's keys
    struct {
        int64_t first, positions[FEW_KEYS];
        int32_t after[FEW_KEYS];      // positions from `first` on, where all are below NEAR; else `wide`
        bool wide;
    } places;                         // of the tile's keys, for terms
    int64_t entry[FEW_KEYS];          // of `listed`
    int64_t ahead;                    // rows from the tile's keys to those of the next, as far as that is known
    const bool narrow;                // rows of at most 256 bytes
    bool in_line;                     // whether entries and slots of the tile's keys are neighbours, in order

public:
    explicit FewQueries(const Shared& all)
        : all(all), whole(all.dim / STEP), rest(all.dim % STEP), value_whole(all.value_dim / STEP), value_rest(all.value_dim % STEP),
          wide(all.wide()), narrow(QUICK_SCORES && most(all.dim, all.value_dim) * Stored::BYTES <= 256 * STEP) {}

    // The part of the keys first .. last, at `part`.
    void run(int64_t first, int64_t last, float* part) {
        acc = part, m = acc + all.rows * wide, l = m + all.rows;
        for (int64_t r = 0; r < all.rows; r++) {
            keep_query(all.q[r], Q + r * MOST_WIDE);
            m[r] = NONE, l[r] = 0;
        }
#if defined(LONGATTN_TILES)
        if constexpr (std::is_same<Stored, Stored16>::value)
            if (all.rows >= LEAST_TILED && !all.listed) return run_in_tiles(first, last);
#endif
        memset(acc, 0, all.rows * wide * 4);
        while (first < last) {
            first = take(first, last);
            if (!n) continue;
            ahead = rows_ahead(first, last);
            by_rows([&](auto R, int64_t r) { score<R()>(r); });
            if constexpr (eight_bits<Stored>()) multiply_scores(all.listed->k_scale);
            apply_terms();
            add();
            for (int64_t r = 0; r < all.rows; r++) softmax(r);
            if constexpr (eight_bits<Stored>()) multiply_scores(all.listed->v_scale);  // which are weights by now, and their sum is known
            by_rows([&](auto R, int64_t r) { add_values<R()>(r); });
        }
    }

private:
#if defined(LONGATTN_TILES)
    void run_in_tiles(int64_t first, int64_t last) {
        FewTiles<FEW_KEYS, MOST_WIDE> tiles(all.rows, all.dim, all.value_dim);
        tiles.open(all.q);
        while (first < last) {
            first = take(first, last);
            if (!n) continue;
            tiles.scores(all.k, all.k_step, at, n, all.unit, scores);
            apply_terms();
            add();
            for (int64_t r = 0; r < all.rows; r++) softmax(r);
            tiles.add_values(all.v, all.v_step, at, n, scores, factor);
        }
        tiles.close(acc, wide);
    }
#endif

    void keep_query(const char* from, float* q) const {
        if constexpr (!eight_bits<Stored>()) keep_as<Stored>(from, q);
        else if constexpr (Stored::QUERY != STEP) keep_as<Stored16>(from, q);
        else if (all.asked == FLOAT32) keep_in_order<Stored32>(from, q);
        else if (all.asked == BFLOAT16) keep_in_order<Stored16>(from, q);
        else keep_in_order<StoredHalf>(from, q);
    }

    template <class Asked>
    void keep_as(const char* from, float* q) const {
        for (int64_t c = 0; c < whole; c++, q += Asked::QUERY) Asked::keep(q, Asked::key(from + c * Asked::BYTES));
        if (rest) Asked::keep(q, key_of<Asked>(from + whole * Asked::BYTES, rest));
    }

    template <class Asked>
    void keep_in_order(const char* from, float* q) const {
        for (int64_t c = 0; c < whole; c++, q += STEP) Asked::in_order(q, Asked::step(from + c * Asked::BYTES));
        if (rest) Asked::in_order(q, step_of<Asked>(from + whole * Asked::BYTES, rest));
    }

    // Of the tile's keys, one a lane: the numbers at `index`, times unit.
    INLINE void gather(const float* from, const int64_t* index, float unit, float* to) const {
        if (in_line) {
            for (int64_t j = 0; j < n; j++) to[j] = from[index[0] + j] * unit;
            for (int64_t j = n; j < round_up(n, VL); j++) to[j] = to[n - 1];
        } else
            for (int64_t j = 0; j < round_up(n, VL); j++) to[j] = from[index[j]] * unit;
    }

    // Scores of the tile's keys, or weights, by a number for each key.
    void multiply_scores(const float* scales) {
        alignas(64) float scale[FEW_KEYS];
        gather(scales, at, Stored::UNIT, scale);
        for (int64_t r = 0; r < all.rows; r++)
            for (int64_t j = 0; j < n; j += VL) store(scores + r * FEW_KEYS + j, load(scores + r * FEW_KEYS + j) * load(scale + j));
    }

    // What is added to scores of the tile's keys.
    void add() {
        alignas(64) float plus[FEW_KEYS];
        for (int64_t r = 0; all.added && r < all.rows; r++) {
            gather(all.added + r * all.added_row, all.listed ? entry : at, float(LOG2_E), plus);
            for (int64_t j = 0; j < n; j += VL) store(scores + r * FEW_KEYS + j, load(scores + r * FEW_KEYS + j) + load(plus + j));
        }
    }

    template <int N>
    struct Number {
        constexpr int operator()() const { return N; }
    };

    // The lines of a step of the next tile: into L1, or, where rows are long, into L2, so as not to push out what is in use.
    INLINE void fetch(const char* p) const {
        if (QUICK_SCORES && narrow) {
            __builtin_prefetch(p, 0, 3);
            if (Stored::BYTES > 64) __builtin_prefetch(p + 64, 0, 3);
        } else {
            __builtin_prefetch(p, 0, 2);
            if (Stored::BYTES > 64) __builtin_prefetch(p + 64, 0, 2);
        }
    }

    // All of a row of k. A loop that stays one: in loops that are unrolled it would be most of what there is to compile.
    INLINE void fetch_row(const char* p) const {
#pragma GCC unroll 1
        for (int64_t c = 0; c < whole; c++) fetch(p + c * Stored::BYTES);
    }

    template <class Visit>
    INLINE void by_rows(Visit visit) {
        int64_t r = 0;
        for (; r + 4 <= all.rows; r += 4) visit(Number<4>(), r);
        if (all.rows - r >= 2) visit(Number<2>(), r), r += 2;
        if (r < all.rows) visit(Number<1>(), r);
    }

    // Where the next tile, of keys from i on, is expected: behind this one, but for pages.
    INLINE int64_t rows_ahead(int64_t i, int64_t last) const {
        if (!all.listed) return FEW_KEYS;
        if (i >= last) return 0;
        const int64_t shift = all.listed->shift, inside = (int64_t(1) << shift) - 1;
        return (int64_t(all.listed->pages[i >> shift]) << shift | (i & inside)) - at[0];
    }

    // The next keys that are not hidden. Returns where to go on.
    INLINE int64_t take(int64_t i, int64_t last) {
        if (all.listed) {
            const Listed& listed = *all.listed;
            const int64_t inside = (int64_t(1) << listed.shift) - 1;
            for (n = 0; i < last && n < FEW_KEYS;) {
                const int64_t many = least(FEW_KEYS - n, last - i);
                float top[FEW_KEYS];
                memcpy(top, all.added + i, many * 4);
                for (int64_t r = 1; r < all.rows; r++) {
                    const float* added = all.added + r * all.added_row + i;
                    for (int64_t j = 0; j < many; j++) top[j] = top[j] > added[j] ? top[j] : added[j];
                }
                for (int64_t j = 0; j < many; j++, i++) {
                    at[n] = int64_t(listed.pages[i >> listed.shift]) << listed.shift | (i & inside);
                    entry[n] = i;
                    n += top[j] != NONE;
                }
            }
            in_line = n && entry[n - 1] - entry[0] == n - 1 && entry[0] >> listed.shift == entry[n - 1] >> listed.shift;
            for (int64_t j = n; n && j < round_up(n, VL); j++) entry[j] = entry[n - 1];
        } else if (!all.hidden) {
            n = least(FEW_KEYS, last - i);
            for (int64_t j = 0; j < n; j++) at[j] = i + j;
            i += n;
        } else
            for (n = 0; i < last && n < FEW_KEYS; i++) {
                at[n] = i;
                n += !all.hidden[i * all.hidden_step];
            }
        if (!all.listed) in_line = n && at[n - 1] - at[0] == n - 1;
        // The list is filled up with its last key.
        for (int64_t j = n; n && j < round_up(n, VL); j++) at[j] = at[n - 1];
        return i;
    }

    template <int R>
    void score(int64_t r0) {
        const int64_t steps = rest ? 0 : whole;
        if (steps == 2) return score_steps<R, 2>(r0);
        if (steps == 4) return score_steps<R, 4>(r0);
        // Each is compiled anew: numbers of 8 bits have the commonest ones alone.
        if constexpr (!eight_bits<Stored>()) {
            if (steps == 1) return score_steps<R, 1>(r0);
            if (steps == 3) return score_steps<R, 3>(r0);
        }
        score_steps<R, 0>(r0);
    }

    // W: steps of a row, where that is known.
    template <int R, int W>
    void score_steps(int64_t r0) {
        const float* q = Q + r0 * MOST_WIDE;
        // k: memory -> registers; it was on its way while values of the tile before were added, or this far ahead.
        const bool fetches = !QUICK_SCORES && !r0;
        for (int64_t j = 0; j < n; j += VL) {
            Floats sums[R][VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) {
                const char* row = all.k + at[j + i] * all.k_step;
                if (fetches) fetch_row(row + ahead * all.k_step);
                Floats s[R] = {};
#pragma GCC unroll 4
                for (int64_t c = 0; c < (W ? W : whole); c++, row += Stored::BYTES) multiply<R>(s, q + c * Stored::QUERY, Stored::key(row));
                if (!W && rest) multiply<R>(s, q + whole * Stored::QUERY, key_of<Stored>(row, rest));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums[r][i] = s[r];
            }
            for (int r = 0; r < R; r++) store(scores + (r0 + r) * FEW_KEYS + j, sums_of_lanes(sums[r]) * all.unit);
        }
    }

    template <int R>
    static INLINE void multiply(Floats (&s)[R], const float* q, typename Stored::Key k) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) s[r] = Stored::multiply(s[r], q + r * MOST_WIDE, k);
    }

    void apply_terms() {
        if (!all.terms) return;
        const int64_t padded = round_up(n, VL);
        if (all.terms->needs_positions()) {
            places.first = all.origin + at[0] * all.apart, places.wide = (at[n - 1] - at[0]) * all.apart >= NEAR;
            for (int64_t j = 0; j < padded; j++) {
                places.positions[j] = all.origin + at[j] * all.apart;
                places.after[j] = int32_t(least(places.positions[j] - places.first, NEAR));
            }
        }
        for (int64_t r = 0; r < all.rows; r++)
            all.terms->apply_to_row(places, padded, all.head[r], all.position[r], scores + r * FEW_KEYS);
    }

    // One row: the running max moves, scores become weights, and what stood before is to be scaled by `factor`.
    INLINE void softmax(int64_t r) {
        float* row = scores + r * FEW_KEYS;
        const int64_t padded = round_up(n, VL);
        for (int64_t j = n; j < padded; j++) row[j] = NONE;
        if (at[0] < all.begin[r] || at[n - 1] >= all.end[r])
            for (int64_t j = 0; j < n; j++) row[j] = at[j] >= all.begin[r] && at[j] < all.end[r] ? row[j] : NONE;
        Floats top = splat(m[r]);
        for (int64_t j = 0; j < padded; j += VL) top = max(top, load(row + j));
        const float before = m[r], now = largest(top);
        // Finite where nothing was seen yet, so that -inf - -inf does not arise.
        const float pivot = now == NONE ? 0.f : now;
        factor[r] = before == now ? 1.f : exp2<5>(splat(before - pivot))[0];
        Floats total = {};
        for (int64_t j = 0; j < padded; j += VL) {
            const Floats p = exp2<5>(load(row + j) - pivot);
            store(row + j, p);
            total += p;
        }
        m[r] = now;
        l[r] = l[r] * factor[r] + sum(total);
    }

    template <int R>
    void add_values(int64_t r0) {
        constexpr int P = R > 2 ? 2 : 4;  // sums of R x P pairs stay in registers
        int64_t c = 0;
        for (; c + P <= value_whole; c += P) add_columns<R, P, true>(r0, c);
        if (P > 2 && c + 2 <= value_whole) add_columns<R, 2, true>(r0, c), c += 2;
        for (; c < value_whole; c++) add_columns<R, 1, true>(r0, c);
        if (value_rest) add_columns<R, 1, false>(r0, c);
    }

    template <int R, int P, bool WHOLE>
    void add_columns(int64_t r0, int64_t c0) {
        Floats s[R][2 * P];
        float* to = acc + r0 * wide + c0 * STEP;
        const float* p = scores + r0 * FEW_KEYS;
        // Where scores are quick, and values are not, both of the next tile are fetched while these are added.
        const bool fetches = !r0, keys = QUICK_SCORES && fetches && !c0;
        for (int r = 0; r < R; r++)
            for (int x = 0; x < 2 * P; x++) s[r][x] = load(to + r * wide + x * VL) * factor[r0 + r];
        for (int64_t j = 0; j < n; j++) {
            // v: memory -> registers
            const char* row = all.v + at[j] * all.v_step + c0 * Stored::BYTES;
            if (keys) fetch_row(all.k + (at[j] + ahead) * all.k_step);
#pragma GCC unroll 4
            for (int x = 0; x < P; x++) {
                const char* from = row + x * Stored::BYTES;
                if (fetches) fetch(from + ahead * all.v_step);
                const Pair v = WHOLE ? Stored::step(from) : step_of<Stored>(from, value_rest);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const Floats weight = splat(p[r * FEW_KEYS + j]);
                    s[r][2 * x] += weight * v.a;
                    s[r][2 * x + 1] += weight * v.b;
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int x = 0; x < 2 * P; x++) store(to + r * wide + x * VL, s[r][x]);
    }
};

// Row r of a block: its parts, one after the other in memory, become one row of numbers in their order. `sink` is a score without a value.
// Returns lse, natural log, without the sink.
template <class Stored>
static float merge_parts(const Shared& all, int64_t r, const float* parts, int64_t count, float sink, float* row) {
    const int64_t wide = all.wide(), each = all.floats();
    float top = sink;
    for (int64_t i = 0; i < count; i++) top = std::fmax(top, parts[i * each + all.rows * wide + r]);
    double total = 0;
    Floats sums[MOST_WIDE / VL] = {};
    for (int64_t i = 0; i < count; i++) {
        const float *part = parts + i * each, *m = part + all.rows * wide;
        if (m[r] == NONE && m[all.rows + r] == 0) continue;
        const double factor = std::exp2(double(m[r]) - top);
        total += factor * m[all.rows + r];
        for (int64_t x = 0; x < wide / VL; x++) sums[x] += load(part + r * wide + x * VL) * float(factor);
    }
    const double whole = total + (sink == NONE ? 0 : std::exp2(double(sink) - top));
    const float share = total > 0 || total != total ? float(1 / whole) : 0;
    for (int64_t x = 0; x < wide / VL; x += 2) Stored::in_order(row + x * VL, {sums[x] * share, sums[x + 1] * share});
    return total > 0 || total != total ? float((top + std::log2(total)) * LN_2) : NONE;
}
