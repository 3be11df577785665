// From row sets to tiles of at most KEYS keys, in order; what no query of a task can see, and what is padding, is left out.
#pragma once
#include "call.h"

constexpr int64_t NEAR = int64_t(1) << 30;

enum Visibility { NOTHING, SOME, ALL };

struct KeyTile {
    int64_t n, padded;              // keys, and the same rounded up to whole register tiles
    int64_t low, high;              // the band, the same for all
    int64_t first, last;            // smallest and largest position
    bool neighbours;                // rows follow one another in memory
    int64_t rows[KEYS], positions[KEYS];
    int64_t near[KEYS / VL], far[KEYS / VL];  // smallest and largest position of each vector of keys
    bool counted;                   // some key's bias is not zero
    int32_t after[KEYS];            // positions from `first` on, where all are below NEAR; else `wide`
    bool wide;
    float bias[KEYS];               // log2 of the count, -inf beyond n

    // What queries at positions from `nearest` to `farthest` see of it.
    Visibility seen(int64_t nearest, int64_t farthest) const {
        if (farthest - first < low || nearest - last > high) return NOTHING;
        return nearest - last >= low && farthest - first <= high ? ALL : SOME;
    }
    bool meets(int64_t vector, int64_t nearest, int64_t farthest) const {
        return farthest - near[vector] >= low && nearest - far[vector] <= high;
    }
};

// a / b, rounded up; b > 0.
static INLINE int64_t divide_up(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

class KeyStream {
    const Call& call;
    const Job& job;
    int64_t t, batch, nearest, farthest, row_begin, row_end;
    int64_t at = -1, i = 0, end = 0;

    // Members of a set without a list ascend: the first one whose row is not below `row`.
    int64_t search(const RowSet& set, int64_t row) const {
        int64_t lo = 0, hi = set.count;
        while (lo < hi) {
            int64_t mid = (lo + hi) / 2;
            if (set.row(t, mid) < row) lo = mid + 1;
            else hi = mid;
        }
        return lo;
    }

    void enter(const RowSet& set) {
        i = 0, end = set.count;
        if (set.starts) return;
        // Rows at positions that some query can see, and that the task owns.
        int64_t begin = most(row_begin, divide_up(nearest - set.high - set.origin, set.position_step));
        int64_t beyond = least(row_end, divide_up(farthest - set.low + 1 - set.origin, set.position_step));
        i = search(set, begin);
        end = most(i, search(set, beyond));
    }

    bool wanted(const RowSet& set, int64_t row, int64_t position) const {
        if (call.padding && call.padding[batch * call.padding_batch + row * call.padding_row]) return false;
        if (!set.starts) return true;
        return row >= row_begin && row < row_end && farthest - position >= set.low && nearest - position <= set.high;
    }

public:
    KeyStream(const Call& call, const Job& job, int64_t t, int64_t batch, int64_t nearest, int64_t farthest, int64_t row_begin,
              int64_t row_end)
        : call(call), job(job), t(t), batch(batch), nearest(nearest), farthest(farthest), row_begin(row_begin), row_end(row_end) {}

    // The next tile of at most Op::WIDTH keys; false where there is none. Keys of sets with different bands never share a tile.
    template <class Op>
    bool next(KeyTile& tile) {
        tile.n = 0;
        while (tile.n < Op::WIDTH) {
            if (at < 0 || i >= end) {
                if (at + 1 >= job.key_sets) break;
                const RowSet& coming = job.keys[at + 1];
                if (tile.n && (coming.low != tile.low || coming.high != tile.high)) break;
                enter(job.keys[++at]);
                continue;
            }
            const RowSet& set = job.keys[at];
            tile.low = set.low, tile.high = set.high;
            for (; i < end && tile.n < Op::WIDTH; i++) {
                int64_t row = set.row(t, i), position = set.position(row);
                if (!wanted(set, row, position)) continue;
                tile.rows[tile.n] = row;
                tile.positions[tile.n] = position;
                tile.bias[tile.n++] = set.log2_count ? set.log2_count[i % set.block] : 0.f;
            }
        }
        if (!tile.n) return false;
        tile.first = tile.last = tile.positions[0];
        tile.neighbours = true;
        for (int64_t j = 1; j < tile.n; j++) {
            tile.neighbours &= tile.rows[j] == tile.rows[0] + j;
            tile.first = least(tile.first, tile.positions[j]);
            tile.last = most(tile.last, tile.positions[j]);
        }
        tile.padded = round_up(tile.n, Op::WHOLE);
        tile.counted = tile.padded > tile.n;
        for (int64_t j = 0; j < tile.n; j++) tile.counted |= tile.bias[j] != 0;
        for (int64_t j = tile.n; j < tile.padded; j++) {
            tile.positions[j] = tile.positions[0];
            tile.bias[j] = NONE;
        }
        tile.wide = tile.last - tile.first >= NEAR;
        for (int64_t j = 0; j < tile.padded; j++) {
            int64_t &near = tile.near[j / VL], &far = tile.far[j / VL];
            near = j % VL ? least(near, tile.positions[j]) : tile.positions[j];
            far = j % VL ? most(far, tile.positions[j]) : tile.positions[j];
            tile.after[j] = int32_t(least(tile.positions[j] - tile.first, NEAR));
        }
        return true;
    }
};

// What each TALL rows of a strip meet of a tile of keys: the keys from .. to, in groups of GROUP. Work follows it, so that a
// narrow band costs little more than its pairs.
template <class Op>
struct Reach {
    static constexpr int64_t GROUP = Op::GROUP, TALL = Op::TALL, MOST = Op::BACK_STRIP / TALL;
    static_assert(GROUP % VL == 0 && Op::STRIP % TALL == 0 && Op::BACK_STRIP % TALL == 0 && Op::WIDTH % GROUP == 0, "whole tiles");
    static_assert(Op::WIDTH <= KEYS && Op::STRIP <= Op::BACK_STRIP && ROWS % TALL == 0, "room for all");
    int64_t from[MOST], to[MOST];

    // `rows` query rows from row `first` on; `visibility` is what they see of the tile together.
    Reach(const KeyTile& tile, Visibility visibility, const Queries& queries, int64_t first, int64_t rows) {
        for (int64_t r = 0; r < rows; r += TALL) {
            int64_t &begin = from[r / TALL] = 0, &end = to[r / TALL] = round_up(tile.padded, GROUP);
            if (visibility == ALL) continue;
            const int64_t near = queries.near[(first + r) / TALL], far = queries.far[(first + r) / TALL];
            while (begin < end && !met(tile, begin, near, far)) begin += GROUP;
            while (begin < end && !met(tile, end - GROUP, near, far)) end -= GROUP;
        }
    }

    // Of a row.
    int64_t begin(int64_t row) const { return from[row / TALL]; }
    int64_t end(int64_t row) const { return to[row / TALL]; }

private:
    static bool met(const KeyTile& tile, int64_t j, int64_t near, int64_t far) {
        for (int64_t v = j / VL; v < (j + GROUP) / VL; v++)
            if (tile.meets(v, near, far)) return true;
        return false;
    }
};
