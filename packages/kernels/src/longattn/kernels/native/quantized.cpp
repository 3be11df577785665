// Decode steps over pages of 8 bits: a library of its own.
#include "paged.h"
#include "quantized.h"

// Types of 8 bits, behind those of `Type`.
enum EightBits : int64_t { INT8 = 3, FLOAT8 = 4 };

template <class Stored>
static void decode_pages(const Paged& paged) {
    if (paged.type == BFLOAT16) PagedDecode<AsHalves<Stored>>(paged).run();
    else PagedDecode<Stored>(paged).run();
}

extern "C" {

int64_t longattn_sizes(int64_t) { return sizeof(Paged); }

// Floats of scratch for a step, and the step.
int64_t longattn_paged_scratch(const Paged* paged) { return scratch_of(*paged); }
void longattn_decode_paged(const Paged* paged) {
    paged->k.type == INT8 ? decode_pages<StoredInt8>(*paged) : decode_pages<StoredFloat8>(*paged);
}
}
