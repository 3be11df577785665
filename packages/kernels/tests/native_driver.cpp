// The native row without Python, for machines that only an emulator runs: one call forward and backward beside the definition in double.
//
// Two query heads share a kv head; causal, and a window; keys at even rows count twice. Then few rows over many keys: a short call and a decode step.
// Exits with 1 where a number differs.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attend.cpp"
#include "decode.h"

constexpr int64_t N = 150, HEADS = 2, DIM = 20, WIDE = 27;  // WIDE: of a row of v
typedef std::vector<float> Numbers;

static Numbers random_numbers(int64_t n) {
    Numbers x(n);
    for (float& y : x) y = float(rand()) / RAND_MAX * 2 - 1;
    return x;
}

static Tensor tensor(Numbers& x, int64_t heads, int64_t dim) {
    return Tensor{(char*)x.data(), N * heads * dim, heads * dim, dim, FLOAT32};
}

static int failures = 0;

static void near(const char* name, const Numbers& got, const std::vector<double>& expected, double tolerance = 2e-5) {
    int far = 0;  // NaN is far as well
    for (size_t i = 0; i < got.size(); i++) far += !(std::fabs(got[i] - expected[i]) < tolerance);
    printf("%s: %d of %zu far off\n", name, far, got.size());
    failures += far;
}

// softmax(scale * q k^T + log weight) v for one row over some keys; returns lse.
template <class Weight>
static double definition(const float* q, const float* k, const float* v, int64_t keys, double scale, Weight weight, double* out) {
    std::vector<double> p(keys);
    double total = 0;
    for (int64_t j = 0; j < keys; j++) {
        double s = 0;
        for (int64_t d = 0; d < DIM; d++) s += scale * q[d] * k[j * DIM + d];
        total += p[j] = weight(j) ? std::exp(s) : 0;
    }
    for (int64_t d = 0; d < WIDE; d++) out[d] = 0;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < WIDE && p[j] > 0; d++) out[d] += p[j] / total * v[j * WIDE + d];
    return std::log(total);
}

// The last 3 rows of MANY, causal, two heads to a kv head; and a decode step of 2 rows with a group of 3, whose every fifth key is hidden.
static void few_rows() {
    constexpr int64_t MANY = 2500, ROWS_HERE = 3;
    const int64_t far = int64_t(1) << 62;
    Numbers q = random_numbers(ROWS_HERE * HEADS * DIM), k = random_numbers(MANY * DIM), v = random_numbers(MANY * WIDE);
    Numbers out(ROWS_HERE * HEADS * WIDE, NAN), lse(ROWS_HERE * HEADS, NAN);
    RowSet keys{nullptr, 0, 0, 1, 1, nullptr, 1, nullptr, MANY, 0, 1, 0, far};
    Job job{0, 1, HEADS, 1, {nullptr, 0, 0, 1, 1, nullptr, 1, nullptr, ROWS_HERE, MANY - ROWS_HERE, 1, -far, far}, &keys, 1, 1};
    Call call{};
    call.q = tensor(q, HEADS, DIM), call.k = tensor(k, 1, DIM), call.v = tensor(v, 1, WIDE), call.out = tensor(out, HEADS, WIDE);
    call.lse = tensor(lse, HEADS, 1);
    call.jobs = &job, call.job_count = 1, call.batch = 1, call.queries = ROWS_HERE, call.keys = MANY, call.heads = HEADS;
    call.kv_heads = 1, call.dim = DIM, call.value_dim = WIDE, call.scale = 0.7, call.threads = 2;
    Numbers scratch(longattn_short_scratch(&call));
    call.scratch = scratch.data();
    longattn_attend_short(&call);
    std::vector<double> o(out.size()), l(lse.size());
    for (int64_t i = 0; i < ROWS_HERE * HEADS; i++) {
        const int64_t seen = MANY - ROWS_HERE + i / HEADS + 1;
        l[i] = definition(&q[i * DIM], k.data(), v.data(), seen, 0.7, [](int64_t) { return true; }, &o[i * WIDE]);
    }
    near("short out", out, o), near("short lse", lse, l);

    constexpr int64_t SLOTS = MANY / 2, GROUP = 3;
    q = random_numbers(2 * GROUP * DIM), out.assign(2 * GROUP * WIDE, NAN), o.resize(out.size());
    std::vector<uint8_t> hidden(2 * SLOTS);
    for (int64_t j = 0; j < 2 * SLOTS; j += 5) hidden[j] = 1, v[j * WIDE] = NAN;
    const Tensor rows{(char*)k.data(), SLOTS * DIM, DIM, 0, FLOAT32}, values{(char*)v.data(), SLOTS * WIDE, WIDE, 0, FLOAT32};
    Cache cache{rows, values, 2, SLOTS, DIM, WIDE};
    Apart apart{(const char*)q.data(), 4, hidden.data(), SLOTS, 1, nullptr};
    Step step{(const char*)q.data(), (char*)out.data(), GROUP, SLOTS, 0.7, 2, apart, nullptr};
    scratch.resize(scratch_of(step, cache));
    step.scratch = scratch.data();
    decode(cache, step);
    for (int64_t i = 0; i < 2 * GROUP; i++) {
        const int64_t begin = i / GROUP * SLOTS;
        definition(&q[i * DIM], &k[begin * DIM], &v[begin * WIDE], SLOTS, 0.7, [&](int64_t j) { return !hidden[begin + j]; }, &o[i * WIDE]);
    }
    near("decode", out, o);
}

// Queries see the keys at most `reach` positions behind them.
static void forward_and_backward(int64_t reach) {
    const double scale = 0.7;
    Numbers q = random_numbers(N * HEADS * DIM), k = random_numbers(N * DIM), v = random_numbers(N * WIDE);
    Numbers grad = random_numbers(N * HEADS * WIDE), out(grad.size(), NAN), lse(N * HEADS, NAN);
    Numbers dq(q.size(), NAN), dk(k.size(), 0), dv(v.size(), 0);
    const int64_t offsets[] = {0, 1};
    const float log2_count[] = {1, 0};
    const int64_t far = int64_t(1) << 62;
    RowSet keys{nullptr, 0, 0, 2, 2, offsets, 1, log2_count, N, 0, 1, 0, reach};
    Job job{0, 1, HEADS, 1, {nullptr, 0, 0, 1, 1, nullptr, 1, nullptr, N, 0, 1, -far, far}, &keys, 1, 1};
    Call call{};
    call.q = tensor(q, HEADS, DIM), call.k = tensor(k, 1, DIM), call.v = tensor(v, 1, WIDE), call.out = tensor(out, HEADS, WIDE);
    call.lse = tensor(lse, HEADS, 1);
    call.jobs = &job, call.job_count = 1, call.batch = 1, call.queries = call.keys = N, call.heads = HEADS, call.kv_heads = 1;
    call.dim = DIM, call.value_dim = WIDE, call.scale = scale, call.threads = 2, call.rows = 96, call.key_parts = 1;
    Numbers scratch(2 * longattn_scratch(&call));
    call.scratch = scratch.data();
    longattn_attend(&call);
    call.grad_out = tensor(grad, HEADS, WIDE), call.dq = tensor(dq, HEADS, DIM);
    call.dk = tensor(dk, 1, DIM), call.dv = tensor(dv, 1, WIDE);
    scratch.resize(2 * longattn_scratch(&call));
    call.scratch = scratch.data();
    longattn_attend_backward(&call);

    std::vector<double> o(out.size()), l(lse.size()), eq(q.size()), ek(k.size()), ev(v.size());
    for (int64_t i = 0; i < N; i++)
        for (int64_t h = 0; h < HEADS; h++) {
            const int64_t at = (i * HEADS + h) * DIM, to = (i * HEADS + h) * WIDE;
            const int64_t begin = most(0, i - reach);
            std::vector<double> p(i + 1);
            double total = 0, delta = 0;
            for (int64_t j = begin; j <= i; j++) {
                double s = 0;
                for (int64_t d = 0; d < DIM; d++) s += scale * q[at + d] * k[j * DIM + d];
                total += p[j] = std::exp(s) * (j % 2 ? 1 : 2);
            }
            l[i * HEADS + h] = std::log(total);
            for (int64_t j = begin; j <= i; j++)
                for (int64_t d = 0; d < WIDE; d++) o[to + d] += p[j] / total * v[j * WIDE + d];
            for (int64_t d = 0; d < WIDE; d++) delta += o[to + d] * grad[to + d];
            for (int64_t j = begin; j <= i; j++) {
                double dp = 0;
                for (int64_t d = 0; d < WIDE; d++) dp += grad[to + d] * v[j * WIDE + d];
                const double ds = p[j] / total * (dp - delta) * scale;
                for (int64_t d = 0; d < DIM; d++) {
                    eq[at + d] += ds * k[j * DIM + d];
                    ek[j * DIM + d] += ds * q[at + d];
                }
                for (int64_t d = 0; d < WIDE; d++) ev[j * WIDE + d] += p[j] / total * grad[to + d];
            }
        }
    near("out", out, o), near("lse", lse, l), near("dq", dq, eq), near("dk", dk, ek), near("dv", dv, ev);
}

typedef std::vector<uint16_t> Halves16;

static Halves16 rounded(Numbers& x) {
    Halves16 halves;
    for (float& y : x) halves.push_back(to_bfloat16(y)), y = from_bfloat16(halves.back());
    return halves;
}
static Numbers widened(const Halves16& x) {
    Numbers numbers;
    for (uint16_t y : x) numbers.push_back(from_bfloat16(y));
    return numbers;
}

// Everything in bfloat16, causal: as pairs where the processor multiplies them, beside float32 products of the same numbers.
static void half_precision() {
    Numbers q = random_numbers(N * HEADS * DIM), k = random_numbers(N * DIM), v = random_numbers(N * WIDE), grad = random_numbers(N * HEADS * WIDE);
    const Halves16 given[] = {rounded(q), rounded(k), rounded(v), rounded(grad)};
    const int64_t far = int64_t(1) << 62;
    RowSet keys{nullptr, 0, 0, 1, 1, nullptr, 1, nullptr, N, 0, 1, 0, far};
    Job job{0, 1, HEADS, 1, {nullptr, 0, 0, 1, 1, nullptr, 1, nullptr, N, 0, 1, -far, far}, &keys, 1, 1};
    std::vector<Numbers> results[2];
    for (int64_t pairs = 0; pairs < 2; pairs++) {
        Halves16 out(grad.size()), dq(q.size()), dk(k.size()), dv(v.size());
        Numbers lse(N * HEADS);
        auto half = [](const Halves16& x, int64_t heads, int64_t dim) {
            return Tensor{(char*)x.data(), N * heads * dim, heads * dim, dim, BFLOAT16};
        };
        Call call{};
        call.q = half(given[0], HEADS, DIM), call.k = half(given[1], 1, DIM), call.v = half(given[2], 1, WIDE), call.out = half(out, HEADS, WIDE);
        call.lse = tensor(lse, HEADS, 1), call.half = pairs ? HALVES : WHOLE_FLOATS;
        call.jobs = &job, call.job_count = 1, call.batch = 1, call.queries = call.keys = N, call.heads = HEADS, call.kv_heads = 1;
        call.dim = DIM, call.value_dim = WIDE, call.scale = 0.7, call.threads = 2, call.rows = 96, call.key_parts = 1;
        Numbers scratch(2 * longattn_scratch(&call));
        call.scratch = scratch.data();
        longattn_attend(&call);
        call.grad_out = half(given[3], HEADS, WIDE), call.dq = half(dq, HEADS, DIM), call.dk = half(dk, 1, DIM), call.dv = half(dv, 1, WIDE);
        scratch.resize(2 * longattn_scratch(&call));
        call.scratch = scratch.data();
        longattn_attend_backward(&call);
        results[pairs] = {widened(out), lse, widened(dq), widened(dk), widened(dv)};
    }
    const char* names[] = {"bfloat16 out", "bfloat16 lse", "bfloat16 dq", "bfloat16 dk", "bfloat16 dv"};
    for (int i = 0; i < 5; i++)
        near(names[i], results[1][i], {results[0][i].begin(), results[0][i].end()}, 3e-2);

    // A short call in bfloat16, of numbers as they are stored.
    Numbers first(q.begin(), q.begin() + HEADS * DIM), out(HEADS * WIDE);
    std::vector<double> o(out.size());
    Shared all{};
    all.rows = HEADS, all.dim = DIM, all.value_dim = WIDE, all.unit = float(0.7 * LOG2_E);
    for (int64_t r = 0; r < HEADS; r++) all.q[r] = (const char*)&given[0][r * DIM], all.end[r] = N;
    all.k = (const char*)given[1].data(), all.v = (const char*)given[2].data(), all.k_step = DIM * 2, all.v_step = WIDE * 2;
    Numbers part(all.floats()), row(all.wide());
    FewQueries<Stored16>(all).run(0, N, part.data());
    for (int64_t r = 0; r < HEADS; r++) {
        merge_parts<Stored16>(all, r, part.data(), 1, NONE, row.data());
        std::copy(row.begin(), row.begin() + WIDE, out.begin() + r * WIDE);
        definition(&q[r * DIM], k.data(), v.data(), N, 0.7, [](int64_t) { return true; }, &o[r * WIDE]);
    }
    near("bfloat16 few", out, o, 2e-3);
}

int main() {
    forward_and_backward(int64_t(1) << 62);
    forward_and_backward(20);
    few_rows();
    half_precision();
#if defined(LONGATTN_PAIRS)
    printf("pairs of bfloat16\n");
#endif
    printf("%d floats a vector\n", VL);
    return failures ? 1 : 0;
}
