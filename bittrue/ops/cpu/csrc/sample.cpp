// argmax and log_softmax over rows of logits, and Gumbel noise from Philox-4x32-10.
#include "simd.h"

namespace {

float row_max(const float* x, int64_t n) {
    const f32x16 least = set1(-__builtin_inff());
    f32x16 m = least;
    for (int64_t i = 0; i < n; i += 16) m = max(m, select(lanes_below(n - i), load_n(x + i, n - i), least));
    return hmax(m);
}

constexpr int64_t CHUNK = 4096;  // values that one thread takes at a time
constexpr int64_t BLOCK = 1024;  // a vocabulary is long enough for a single chain to lose digits: blocks, then the blocks

thread_local Scratch chunk_scratch;  // of the calling thread

// Sixteen chains of exp(x - largest) over n <= BLOCK values.
f32x16 sum_exp(const float* x, int64_t n, f32x16 largest) {
    f32x16 block = zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) block = add(block, exp(sub(load(x + i), largest)));
    if (i < n) block = add(block, select(lanes_below(n - i), exp(sub(load_n(x + i, n - i), largest)), zero()));
    return block;
}

// What is subtracted from a row: max + log(sum of the blocks, in order). `blocks` are [count, 16].
f32x16 log_shift(float largest, const float* blocks, int64_t count) {
    f32x16 total = zero();
    for (int64_t b = 0; b < count; ++b) total = add(total, load(blocks + 16 * b));
    return add(set1(largest), log(set1(hsum(total))));
}

void subtract(const float* x, f32x16 shift, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store_n(out + i, sub(load_n(x + i, n - i), shift), n - i);
}

void sum_blocks(const float* x, int64_t n, float largest, float* blocks) {
    for (int64_t i = 0; i < n; i += BLOCK)
        store(blocks + i / BLOCK * 16, sum_exp(x + i, n - i < BLOCK ? n - i : BLOCK, set1(largest)));
}

// Rows one by one, each by one thread while it is in its cache.
void log_softmax_rows(const float* x, float* out, int64_t rows, int64_t n) {
    const int64_t count = (n + BLOCK - 1) / BLOCK;
    PARALLEL_FOR(r, rows, rows * n) {
        float* blocks = chunk_scratch.get<float>(count * 16);
        const float largest = row_max(x + r * n, n);
        sum_blocks(x + r * n, n, largest, blocks);
        subtract(x + r * n, log_shift(largest, blocks, count), out + r * n, n);
    };
}

// One row by all threads; the blocks and their order are those of the row by itself.
void log_softmax_long_row(const float* x, float* out, int64_t n) {
    const int64_t count = (n + BLOCK - 1) / BLOCK, chunks = (n + CHUNK - 1) / CHUNK;
    float* blocks = chunk_scratch.get<float>(count * 16 + chunks);
    float* tops = blocks + count * 16;
    const auto size = [&](int64_t c) { return n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK; };
    PARALLEL_FOR(c, chunks, n / 4) { tops[c] = row_max(x + c * CHUNK, size(c)); };
    const float largest = row_max(tops, chunks);
    PARALLEL_FOR(c, chunks, n) { sum_blocks(x + c * CHUNK, size(c), largest, blocks + c * (CHUNK / BLOCK) * 16); };
    const f32x16 shift = log_shift(largest, blocks, count);
    PARALLEL_FOR(c, chunks, n / 4) { subtract(x + c * CHUNK, shift, out + c * CHUNK, size(c)); };
}

// ---- noise. Plain loops over LANES counters: the compiler makes vectors of them, and no operation here may fuse.

constexpr int LANES = 16;

// Words w[i][0..3] of Philox-4x32-10 with counters (first + i, position low, position high, 0).
void philox(uint32_t first, uint64_t position, uint64_t seed, uint32_t w[4][LANES]) {
    for (int i = 0; i < LANES; ++i) {
        w[0][i] = first + uint32_t(i);
        w[1][i] = uint32_t(position);
        w[2][i] = uint32_t(position >> 32);
        w[3][i] = 0;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < LANES; ++i) {
            const uint64_t p0 = uint64_t(w[0][i]) * 0xD2511F53u, p1 = uint64_t(w[2][i]) * 0xCD9E8D57u;
            w[0][i] = uint32_t(p1 >> 32) ^ w[1][i] ^ k0;
            w[1][i] = uint32_t(p1);
            w[2][i] = uint32_t(p0 >> 32) ^ w[3][i] ^ k1;
            w[3][i] = uint32_t(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// x[i] <- -ln x[i] in float64 for normal x > 0, within 1 ulp (the method and coefficients of fdlibm).
void negative_log(double* x, int n) {
    const double magic = 0x1.8p52;  // adding it leaves an integer in the low bits of the sum
    for (int i = 0; i < n; ++i) {
        uint64_t u;
        std::memcpy(&u, &x[i], 8);
        u += 0x3ff0000000000000ull - 0x3fe6a09e00000000ull;  // split at sqrt(1/2): the mantissa lies about 1
        const uint64_t biased = (u >> 52) + 0x4338000000000000ull;
        const uint64_t mantissa = (u & 0x000fffffffffffffull) + 0x3fe6a09e00000000ull;
        double k, m;
        std::memcpy(&k, &biased, 8);
        std::memcpy(&m, &mantissa, 8);
        k = (k - magic) - 1023.0;
        const double f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
        const double t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
        const double t2 =
            z * (6.666666666666735130e-01 +
                 w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
        const double half = 0.5 * f * f;
        const double low = s * (half + (t1 + t2)) + k * 1.90821492927058770002e-10;
        x[i] = ((half - low) - f) - k * 6.93147180369123816490e-01;
    }
}

// out [begin..end): -log(-log((h + 1/2) / 2^24)), h the top 24 bits of each word; begin a multiple of 4 * LANES
void gumbel_values(uint64_t seed, uint64_t position, float* out, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += 4 * LANES) {
        uint32_t words[4][LANES];
        philox(uint32_t(first / 4), position, seed, words);
        double u[4 * LANES];
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < LANES; ++i) u[4 * i + j] = (double(int32_t(words[j][i] >> 8)) + 0.5) * 0x1p-24;
        negative_log(u, 4 * LANES);
        negative_log(u, 4 * LANES);
        for (int64_t i = 0; i < 4 * LANES && first + i < end; ++i) out[first + i] = float(u[i]);
    }
}

// ---- argmax: the largest of every chunk, then the first chunk that holds the largest of all

// The largest value of x [n], or a NaN when there is one.
float row_max_or_nan(const float* x, int64_t n) {
    f32x16 m = set1(-__builtin_inff());
    uint32_t nan = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const f32x16 v = load_n(x + i, n - i);
        nan |= ~to_bits(equal(v, v)) & 0xffffu;
        m = max(select(lanes_below(n - i), v, m), m);
    }
    return nan != 0 ? __builtin_nanf("") : hmax(m);
}

int64_t argmax_row(const float* x, const float* tops, int64_t n) {
    int64_t best = 0;
    for (int64_t c = 0; c * CHUNK < n; ++c) {
        if (tops[c] != tops[c]) {
            best = c;
            break;
        }
        if (tops[c] > tops[best]) best = c;
    }
    const float top = tops[best];
    for (int64_t i = best * CHUNK;; i += 16) {
        const f32x16 v = load_n(x + i, n - i);
        uint32_t found = top != top ? ~to_bits(equal(v, v)) : to_bits(equal(v, set1(top)));
        found &= to_bits(lanes_below(n - i));
        if (found != 0) return i + __builtin_ctz(found);
    }
}

}  // namespace

// logits [rows, n] -> out [rows], n > 0
BITTRUE_EXPORT(argmax)(const float* __restrict logits, int64_t* __restrict out, int64_t rows, int64_t n) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    float* tops = chunk_scratch.get<float>(rows * chunks);
    PARALLEL_FOR(job, rows * chunks, rows * n / 4) {
        const int64_t start = job % chunks * CHUNK;
        tops[job] = row_max_or_nan(logits + job / chunks * n + start, n - start < CHUNK ? n - start : CHUNK);
    };
    for (int64_t r = 0; r < rows; ++r) out[r] = argmax_row(logits + r * n, tops + r * chunks, n);
}
BITTRUE_REPLAYABLE(argmax)

// logits, out [rows, n]
BITTRUE_EXPORT(log_softmax)(const float* __restrict logits, float* __restrict out, int64_t rows, int64_t n) {
    if (rows > 4) return log_softmax_rows(logits, out, rows, n);
    for (int64_t r = 0; r < rows; ++r) log_softmax_long_row(logits + r * n, out + r * n, n);
}
BITTRUE_REPLAYABLE(log_softmax)

// seeds, positions [rows] -> out [rows, n]
BITTRUE_EXPORT(gumbel)(const int64_t* __restrict seeds, const int64_t* __restrict positions, float* __restrict out,
                       int64_t rows, int64_t n) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    PARALLEL_FOR(job, rows * chunks, rows * n * 16) {
        const int64_t r = job / chunks, begin = job % chunks * CHUNK, end = n - begin < CHUNK ? n : begin + CHUNK;
        gumbel_values(uint64_t(seeds[r]), uint64_t(positions[r]), out + r * n, begin, end);
    };
}
BITTRUE_REPLAYABLE(gumbel)
