// Derivatives of rms_norm over rows and of the embedding.
#include "rowops.h"

namespace {

constexpr int64_t BLOCK_ROWS = 256;  // rows of one partial sum of d_weight: their number decides the bits
constexpr int64_t SHARES = 8;        // parts of the vocabulary: all tokens of one id are added by one thread

thread_local Scratch partial_scratch;  // of the calling thread

// One row, with r = 1 / rms(x): d_x = r (g w) - x r^3 mean(g w x); g x r is added to d_weight. Without a weight both are null.
template <bool IS_WEIGHTED>
void rms_norm_row_backward(const float* __restrict g, const float* __restrict x, const float* __restrict weight,
                           float* __restrict d_x, float* __restrict d_weight, int64_t n, float eps) {
    const auto weighted = [&](int64_t i) __attribute__((always_inline)) {
        const f32x16 d = load_n(g + i, n - i);
        return IS_WEIGHTED ? mul(d, load_n(weight + i, n - i)) : d;
    };
    f32x16 squares[2] = {zero(), zero()}, products[2] = {zero(), zero()};
    for (int64_t i = 0, which = 0; i < n; i += 16, which ^= 1) {
        const f32x16 v = load_n(x + i, n - i);
        squares[which] = fma(v, v, squares[which]);
        products[which] = fma(weighted(i), v, products[which]);
    }
    const float r = 1.0f / __builtin_sqrtf(hsum(add(squares[0], squares[1])) / float(n) + eps);
    const f32x16 factor = set1(r), back = set1(-(hsum(add(products[0], products[1])) / float(n)) * r * r * r);
    for (int64_t i = 0; i < n; i += 16) {
        const f32x16 v = load_n(x + i, n - i);
        store_n(d_x + i, fma(v, back, mul(weighted(i), factor)), n - i);
        if (IS_WEIGHTED)
            store_n(d_weight + i, fma(mul(load_n(g + i, n - i), v), factor, load_n(d_weight + i, n - i)), n - i);
    }
}

}  // namespace

// d_out, x, d_x [rows, n]; weight and d_weight [n], or both null
BITTRUE_EXPORT(rms_norm_backward)(const float* d_out, const float* x, const float* weight, float* d_x, float* d_weight,
                                  int64_t rows, int64_t n, float eps) {
    if (weight == nullptr) {
        PARALLEL_FOR(r, rows, rows * n * 2) {
            rms_norm_row_backward<false>(d_out + r * n, x + r * n, nullptr, d_x + r * n, nullptr, n, eps);
        };
        return;
    }
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    float* partials = partial_scratch.get<float>(blocks * n);
    PARALLEL_FOR(b, blocks, rows * n * 2) {
        float* partial = partials + b * n;
        std::memset(partial, 0, size_t(n) * 4);
        const int64_t end = (b + 1) * BLOCK_ROWS < rows ? (b + 1) * BLOCK_ROWS : rows;
        for (int64_t r = b * BLOCK_ROWS; r < end; ++r)
            rms_norm_row_backward<true>(d_out + r * n, x + r * n, weight, d_x + r * n, partial, n, eps);
    };
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 sum = zero();
        for (int64_t b = 0; b < blocks; ++b) sum = add(sum, load_n(partials + b * n + i, n - i));
        store_n(d_weight + i, sum, n - i);
    }
}

// d_out [tokens, m, dim]: the rows of each token, added over m, are added to d_table [vocab, dim] at its id, token after token.
// An id outside the table has no row.
BITTRUE_EXPORT(embed_backward)(const float* d_out, const int64_t* ids, float* d_table, int64_t vocab, int64_t tokens,
                               int64_t m, int64_t dim) {
    PARALLEL_FOR(share, SHARES, tokens * m * dim) {
        for (int64_t t = 0; t < tokens; ++t) {
            if (ids[t] < 0 || ids[t] >= vocab || ids[t] % SHARES != share) continue;
            const float* d = d_out + t * m * dim;
            float* row = d_table + ids[t] * dim;
            for (int64_t i = 0; i < dim; i += 16) {
                f32x16 sum = load_n(d + i, dim - i);
                for (int64_t j = 1; j < m; ++j) sum = add(sum, load_n(d + j * dim + i, dim - i));
                store_n(row + i, add(load_n(row + i, dim - i), sum), dim - i);
            }
        }
    };
}
