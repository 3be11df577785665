// Dropout: Philox4x32-10 (Salmon et al. 2011), counted by (key / 4, query, head, batch), so that every row of the dispatch table drops
// the same pairs. philox.py says the same in torch.
#pragma once
#include "call.h"
#include "keys.h"

static INLINE uint32_t philox_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, uint32_t lane) {
    for (int round = 0; round < 10; round++) {
        uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(second >> 32) ^ c1 ^ k0;
        c1 = uint32_t(second);
        c2 = uint32_t(first >> 32) ^ c3 ^ k1;
        c3 = uint32_t(first);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    uint32_t low = lane & 1 ? c1 : c0, high = lane & 1 ? c3 : c2;
    return lane & 2 ? high : low;
}

// keep[j]: what dropout multiplies the weight of key j of the tile with, 0 or 1 / (1 - p).
static void keep_row(const Call& call, const KeyTile& tile, int64_t batch, int64_t head, int64_t position, float* keep) {
    const uint32_t threshold = uint32_t(call.drop * 4294967296.0), k0 = uint32_t(call.seed), k1 = uint32_t(call.seed >> 32);
    const float kept = float(1 / (1 - call.drop));
    const uint32_t h = uint32_t(call.first_head + head), b = uint32_t(batch), i = uint32_t(position);
    for (int64_t j = 0; j < tile.padded; j++) {
        uint64_t key = uint64_t(tile.positions[j]);
        uint32_t word = philox_word(uint32_t(key >> 2), i, h, b, k0, k1, uint32_t(key & 3));
        keep[j] = word >= threshold ? kept : 0.f;
    }
}
