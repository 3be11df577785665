// Decode steps over a cache, and over pages of numbers that are stored as they are computed with: a library of its own.
#include "paged.h"

extern "C" {

int64_t longattn_sizes(int64_t which) {
    const int64_t sizes[] = {sizeof(Paged), sizeof(Cache), sizeof(Apart), RANGE};
    return sizes[which];
}

// Floats of scratch for the decode step.
int64_t longattn_decode_scratch(const Cache* cache, int64_t group, int64_t keys, int64_t first) {
    return scratch_of(Step{nullptr, nullptr, group, keys, 0, 0, {nullptr, first}, nullptr}, *cache);
}

// q (rows, group, dim) and out (rows, group, value_dim), of the cache's type. `apart` may be null.
void longattn_decode(const Cache* cache, const char* q, char* out, int64_t group, int64_t keys, double scale, int64_t threads,
                     float* scratch, const Apart* apart) {
    decode(*cache, Step{q, out, group, keys, scale, threads, apart ? *apart : Apart{}, scratch});
}

// Floats of scratch for a step over pages, and the step.
int64_t longattn_paged_scratch(const Paged* paged) { return scratch_of(*paged); }
void longattn_decode_paged(const Paged* paged) {
    if (paged->k.type == FLOAT32) PagedDecode<Stored32>(*paged).run();
    else if (paged->k.type == BFLOAT16) PagedDecode<Stored16>(*paged).run();
    else PagedDecode<StoredHalf>(*paged).run();
}
}
