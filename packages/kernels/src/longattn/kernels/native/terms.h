// Score terms: c * tanh(s / c) of scaled scores s, and what is added for each head and distance. terms.py says the same in torch.
#pragma once
#include "keys.h"

// Relative error 5e-7; NaN of NaN. Near zero a power series, because 1 - e^(-2x) has lost its digits there.
static INLINE Floats tanh_of(Floats x) {
    const Ints sign = (Ints)x & splat_int(int32_t(0x80000000));
    const Floats a = (Floats)((Ints)x ^ sign), square = a * a;
    const Floats far = exp2<5>(a * float(-2 * LOG2_E));
    const Floats series = a + a * square * (-1 / 3.f + square * (2 / 15.f + square * (-17 / 315.f)));
    const Floats found = a < splat(0.2f) ? series : (1 - far) / (1 + far);
    return (Floats)((Ints)found | sign);
}

static INLINE Floats numbers_at(const float* table, Ints at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
    return (Floats)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
    Floats found;
    for (int i = 0; i < VL; i++) found[i] = table[at[i]];
    return found;
#endif
}

class ScoreTerms {
    const float* by_distance;  // (heads, columns), or null
    const int64_t columns;
    const float factor;  // converts what is added to the units of the scores
    const float cap;     // in those units; 0: none

    // VL keys from key j on, seen from `position`: how far they are, and which numbers of a table are theirs. Of keys it reads `first`,
    // `after`, `positions` and `wide`, as KeyTile has them.
    struct Distances {
        Floats far;
        Ints at;

        template <class Keys>
        Distances(const Keys& keys, int64_t j, int64_t position, int64_t most) {
            const int64_t ahead = keys.first - position;
            if (!keys.wide && ahead > -NEAR && ahead < NEAR) {
                const Ints d = *(const LooseInts*)(keys.after + j) + int32_t(ahead), end = splat_int(int32_t(least(most, NEAR)));
                const Ints low = d < -end ? -end : d;
                at = (low > end ? end : low) + end;
                far = __builtin_convertvector(d < 0 ? -d : d, Floats);
                return;
            }
            for (int i = 0; i < VL; i++) {
                const int64_t d = keys.positions[j + i] - position;
                far[i] = float(d < 0 ? -d : d);
                at[i] = int32_t(least(most, ::most(-most, d)) + most);
            }
        }
    };

    int64_t most_distance() const { return table() ? columns / 2 - 1 : 0; }
    bool table() const { return columns > 1; }
    const float* of_head(int64_t h) const { return by_distance ? by_distance + h * columns : nullptr; }

    INLINE Floats added(Floats x, const Distances& d, const float* own) const {
        x += d.far * (-own[0] * factor);
        return table() ? x + numbers_at(own + 1, d.at) * factor : x;
    }

public:
    // `unit`: exp is 2^(unit * score).
    ScoreTerms(const Call& call, float unit)
        : by_distance(call.by_distance), columns(call.by_distance_columns), factor(float(LOG2_E / unit)),
          cap(float(call.softcap * LOG2_E / unit)) {}
    // A cap alone, where exp is 2^score.
    explicit ScoreTerms(double softcap) : by_distance(nullptr), columns(0), factor(float(LOG2_E)), cap(float(softcap * LOG2_E)) {}

    bool any() const { return cap > 0 || by_distance; }
    bool capped() const { return cap > 0; }
    bool needs_positions() const { return by_distance; }

    // What sums of products start from: the keys' log counts, or nothing where these are added after the cap.
    const float* start(const KeyTile& tile) const {
        static const float nothing[KEYS] = {};
        return cap > 0 ? nothing : tile.bias;
    }

    // A strip of scores, `rows` of them padded ones included; `top`, where given, is made again. `steep` gets the cap's derivative.
    template <class Op>
    void apply(const KeyTile& tile, const Reach<Op>& reach, int64_t h, const Queries& queries, int64_t first, int64_t rows,
               float* scores, float* top, float* steep) const {
        const float* own = of_head(h);
        const float per_cap = cap > 0 ? 1 / cap : 0.f;
        const int64_t most = most_distance();
        for (int64_t r = 0; r < rows; r++) {
            float* row = scores + r * Op::WIDTH;
            const int64_t position = queries.positions[least(first + r, queries.n - 1)];
            Floats highest = splat(NONE);
            for (int64_t j = reach.begin(r); j < reach.end(r); j += VL) {
                Floats x = load(row + j);
                if (cap > 0) {
                    const Floats t = tanh_of(x * per_cap);
                    if (steep) store(steep + r * Op::WIDTH + j, 1 - t * t);
                    x = t * cap + load(tile.bias + j);
                }
                if (own) x = added(x, Distances(tile, j, position, most), own);
                store(row + j, x);
                highest = max(highest, x);
            }
            if (top) store(top + r * VL, highest);
        }
    }

    // One row of scores of few queries, of the first n keys, rounded up to whole vectors.
    template <class Keys>
    void apply_to_row(const Keys& keys, int64_t n, int64_t h, int64_t position, float* row) const {
        const float* own = of_head(h);
        const float per_cap = cap > 0 ? 1 / cap : 0.f;
        for (int64_t j = 0; j < n; j += VL) {
            Floats x = load(row + j);
            if (cap > 0) x = tanh_of(x * per_cap) * cap;
            if (own) x = added(x, Distances(keys, j, position, most_distance()), own);
            store(row + j, x);
        }
    }

    // Adds to the gradient of a head's numbers those of a row of scores, for the keys from .. to of a tile.
    void add_gradients(const KeyTile& tile, int64_t position, int64_t from, int64_t to, const float* ds, float* total) const {
        const int64_t most = most_distance();
        Floats slope = {};
        for (int64_t j = from; j < to; j += VL) {
            const Distances d(tile, j, position, most);
            slope += load(ds + j) * d.far;
            for (int i = 0; table() && i < VL; i++) total[1 + d.at[i]] += ds[j + i];
        }
        total[0] -= sum(slope);
    }
};
