// Hyper-connections: the mixing coefficients of a token, the streams into a sub-layer, out of it and at the head.
#include "rowops.h"

namespace {

constexpr int64_t MAX_STREAMS = 8;
constexpr int64_t MAX_OUTPUTS = (2 + MAX_STREAMS) * MAX_STREAMS;
constexpr int64_t TILE = 4;  // tokens, and outputs, whose products are formed together so that loads are shared

// Products of TT rows of v [., n] with OO rows of fn [., n]. Each product has its own sixteen chains over n in order,
// so its bits do not depend on the tile it is in.
template <int TT, int OO, class T>
void products(const T* v, const float* fn, float* out, int64_t n, int64_t outputs) {
    f32x16 sums[TT][OO];
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) sums[t][o] = zero();
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 x[TT];
        for (int t = 0; t < TT; ++t) x[t] = load_n(v + t * n + i, n - i);
        for (int o = 0; o < OO; ++o) {
            f32x16 w = load_n(fn + o * n + i, n - i);
            for (int t = 0; t < TT; ++t) sums[t][o] = fma(x[t], w, sums[t][o]);
        }
    }
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) out[t * outputs + o] = hsum(sums[t][o]);
}

template <int TT, class T>
void products_of_tokens(const T* v, const float* fn, float* out, int64_t n, int64_t outputs, int64_t first) {
    if (first + TILE <= outputs) return products<TT, TILE>(v, fn + first * n, out + first, n, outputs);
    for (int64_t o = first; o < outputs; ++o) products<TT, 1>(v, fn + o * n, out + o, n, outputs);
}

// streams [tokens, n] -> mixes [tokens, outputs]: fn . v, not yet divided by rms(v)
template <class T>
void mix(const T* __restrict streams, const float* __restrict fn, float* __restrict mixes, int64_t tokens, int64_t n,
         int64_t outputs) {
    const int64_t blocks = (outputs + TILE - 1) / TILE;
    const int64_t tiles = (tokens + TILE - 1) / TILE;
    PARALLEL_FOR(job, tiles * blocks, tokens * n * outputs) {
        const int64_t token = job / blocks * TILE, first = job % blocks * TILE;
        const T* v = streams + token * n;
        float* out = mixes + token * outputs;
        switch (tokens - token) {
            case 1: products_of_tokens<1>(v, fn, out, n, outputs, first); break;
            case 2: products_of_tokens<2>(v, fn, out, n, outputs, first); break;
            case 3: products_of_tokens<3>(v, fn, out, n, outputs, first); break;
            default: products_of_tokens<4>(v, fn, out, n, outputs, first);
        }
    };
}

// out_i = factor * sigmoid(mix_i * scale + base_i) + eps, n <= MAX_STREAMS. Two roundings, not an fma: as the formula.
void coefficients(const float* mixes, const float* base, float scale, float factor, float eps, float* out, int64_t n) {
    f32x16 x = add(mul(load_n(mixes, n), set1(scale)), load_n(base, n));
    store_n(out, add(mul(set1(factor), sigmoid(x)), set1(eps)), n);
}

// Divides each column of c [m, m] by (its sum + eps).
void divide_columns(float* c, int64_t m, float eps) {
    for (int64_t k = 0; k < m; ++k) {
        float sum = c[k];
        for (int64_t j = 1; j < m; ++j) sum += c[j * m + k];
        sum += eps;
        for (int64_t j = 0; j < m; ++j) c[j * m + k] /= sum;
    }
}

void divide_rows(float* c, int64_t m, float eps) {
    for (int64_t j = 0; j < m; ++j) {
        float sum = c[j * m];
        for (int64_t k = 1; k < m; ++k) sum += c[j * m + k];
        sum += eps;
        for (int64_t k = 0; k < m; ++k) c[j * m + k] /= sum;
    }
}

// c [m, m] -> nearly doubly stochastic, in place.
void sinkhorn(float* c, int64_t m, int64_t iters, float eps) {
    for (int64_t j = 0; j < m; ++j) {
        float largest = c[j * m];
        for (int64_t k = 1; k < m; ++k) largest = c[j * m + k] > largest ? c[j * m + k] : largest;
        store_n(c + j * m, exp(sub(load_n(c + j * m, m), set1(largest))), m);
    }
    divide_rows(c, m, 0.0f);
    for (int64_t i = 0; i < m * m; ++i) c[i] += eps;
    divide_columns(c, m, eps);
    for (int64_t i = 1; i < iters; ++i) {
        divide_rows(c, m, eps);
        divide_columns(c, m, eps);
    }
}

// out [dim] = sum of factors_j * streams_j, j ascending
template <class T>
void mix_streams(const T* streams, const float* factors, T* out, int64_t m, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) {
        f32x16 sum = mul(set1(factors[0]), load_n(streams + i, dim - i));
        for (int64_t j = 1; j < m; ++j)
            sum = add(sum, mul(set1(factors[j]), load_n(streams + j * dim + i, dim - i)));
        store_n(out + i, sum, dim - i);
    }
}

template <class T>
void hc_pre(const T* __restrict streams, const float* __restrict mixes, const float* base, const float* scale,
            T* __restrict x, float* __restrict post, float* __restrict comb, int64_t tokens, int64_t m, int64_t dim,
            int64_t iters, float eps, float norm_eps) {
    const int64_t outputs = (2 + m) * m;
    PARALLEL_FOR(t, tokens, tokens * (m * dim + 4 * iters * m * m)) {
        const T* token = streams + t * m * dim;
        const float factor = inverse_rms(token, m * dim, norm_eps);
        float mixed[MAX_OUTPUTS], pre[MAX_STREAMS];
        for (int64_t i = 0; i < outputs; ++i) mixed[i] = mixes[t * outputs + i] * factor;
        coefficients(mixed, base, scale[0], 1.0f, eps, pre, m);
        coefficients(mixed + m, base + m, scale[1], 2.0f, 0.0f, post + t * m, m);
        float* c = comb + t * m * m;
        for (int64_t i = 0; i < m * m; ++i) c[i] = mixed[2 * m + i] * scale[2] + base[2 * m + i];
        sinkhorn(c, m, iters, eps);
        mix_streams(token, pre, x + t * dim, m, dim);
    };
}

template <class T>
void hc_head(const T* __restrict streams, const float* __restrict mixes, const float* base, const float* scale,
             T* __restrict x, int64_t tokens, int64_t m, int64_t dim, float eps, float norm_eps) {
    PARALLEL_FOR(t, tokens, tokens * m * dim) {
        const T* token = streams + t * m * dim;
        const float factor = inverse_rms(token, m * dim, norm_eps);
        float mixed[MAX_STREAMS], factors[MAX_STREAMS];
        for (int64_t i = 0; i < m; ++i) mixed[i] = mixes[t * m + i] * factor;
        coefficients(mixed, base, scale[0], 1.0f, eps, factors, m);
        mix_streams(token, factors, x + t * dim, m, dim);
    };
}

// M streams, or the run-time m when M is 0
template <int64_t M, class T>
void hc_post(const T* __restrict y, const T* __restrict streams, const float* post, const float* comb,
             T* __restrict out, int64_t tokens, int64_t run_time_m, int64_t dim) {
    const int64_t m = M ? M : run_time_m;
    PARALLEL_FOR(t, tokens, tokens * m * dim) {
        const float *p = post + t * m, *c = comb + t * m * m;
        const T* token = streams + t * m * dim;
        for (int64_t i = 0; i < dim; i += 16) {
            f32x16 input = load_n(y + t * dim + i, dim - i), h[M ? M : MAX_STREAMS];
            for (int64_t j = 0; j < m; ++j) h[j] = load_n(token + j * dim + i, dim - i);
            for (int64_t k = 0; k < m; ++k) {
                f32x16 sum = mul(set1(p[k]), input);
                for (int64_t j = 0; j < m; ++j) sum = add(sum, mul(set1(c[j * m + k]), h[j]));
                store_n(out + (t * m + k) * dim + i, sum, dim - i);
            }
        }
    };
}

template <class T>
void hc_post(const void* y, const void* streams, const float* post, const float* comb, void* out, int64_t tokens,
             int64_t m, int64_t dim) {
    const T *from = static_cast<const T*>(y), *h = static_cast<const T*>(streams);
    T* to = static_cast<T*>(out);
    if (m == 4) hc_post<4>(from, h, post, comb, to, tokens, m, dim);
    else hc_post<0>(from, h, post, comb, to, tokens, m, dim);
}

}  // namespace

// streams [tokens, n] -> mixes [tokens, outputs]
BITTRUE_EXPORT(hc_mix)(const void* streams, int64_t dtype, const float* fn, float* mixes, int64_t tokens, int64_t n,
                       int64_t outputs) {
    if (dtype == 0) mix(static_cast<const float*>(streams), fn, mixes, tokens, n, outputs);
    else mix(static_cast<const bf16*>(streams), fn, mixes, tokens, n, outputs);
}

// streams [tokens, m, dim], mixes [tokens, (2+m)m] from hc_mix -> x [tokens, dim], post [tokens, m], comb [tokens, m, m]
BITTRUE_EXPORT(hc_pre)(const void* streams, int64_t dtype, const float* mixes, const float* base, const float* scale,
                       void* x, float* post, float* comb, int64_t tokens, int64_t m, int64_t dim, int64_t iters,
                       float eps, float norm_eps) {
    if (dtype == 0)
        hc_pre(static_cast<const float*>(streams), mixes, base, scale, static_cast<float*>(x), post, comb, tokens, m,
               dim, iters, eps, norm_eps);
    else
        hc_pre(static_cast<const bf16*>(streams), mixes, base, scale, static_cast<bf16*>(x), post, comb, tokens, m,
               dim, iters, eps, norm_eps);
}

// streams [tokens, m, dim], mixes [tokens, m] from hc_mix -> x [tokens, dim]
BITTRUE_EXPORT(hc_head)(const void* streams, int64_t dtype, const float* mixes, const float* base, const float* scale,
                        void* x, int64_t tokens, int64_t m, int64_t dim, float eps, float norm_eps) {
    if (dtype == 0)
        hc_head(static_cast<const float*>(streams), mixes, base, scale, static_cast<float*>(x), tokens, m, dim, eps,
                norm_eps);
    else
        hc_head(static_cast<const bf16*>(streams), mixes, base, scale, static_cast<bf16*>(x), tokens, m, dim, eps,
                norm_eps);
}

// y [tokens, dim], streams and out [tokens, m, dim], post [tokens, m], comb [tokens, m, m]
BITTRUE_EXPORT(hc_post)(const void* y, const void* streams, int64_t dtype, const float* post, const float* comb,
                        void* out, int64_t tokens, int64_t m, int64_t dim) {
    if (dtype == 0) hc_post<float>(y, streams, post, comb, out, tokens, m, dim);
    else hc_post<bf16>(y, streams, post, comb, out, tokens, m, dim);
}
