// The residual streams: from the embedding, into a sub-layer (mixed and normalised), out of it, and at the head.
#include "rowops.h"

namespace {

constexpr int64_t MAX_STREAMS = 8;
constexpr int64_t MAX_OUTPUTS = (2 + MAX_STREAMS) * MAX_STREAMS;

// ---- products of tokens with fn: [tokens, n] . [outputs, n]. Each product has its own sixteen chains over n in order, so its
// bits depend on no tile, block or group below. All of these only decide what is still in a near cache when it is read again.

// Tokens and outputs whose chains are in registers together; thirty-two wide registers hold twenty-four chains.
constexpr int64_t TOKEN_TILE = BITTRUE_ISA_CODE == 2 ? 4 : 2;
constexpr int64_t OUTPUT_TILE = 6;
constexpr int64_t BLOCK = 1024;  // features of a token tile and of an output tile that fit the first cache
constexpr int64_t GROUP = 16;    // tokens that share what they read of fn
constexpr int64_t FUSED = 64;    // from here on a group of tokens is mixed and finished by one thread

thread_local Scratch chain_scratch;
thread_local Scratch mix_scratch;  // of the calling thread

// chains [TT, OO, 16], tokens `stride` apart: goes on with n features of v and fn, whose rows are `width` apart.
template <int TT, int OO, class T>
void extend_chains(const T* v, const float* fn, int64_t width, int64_t n, float* chains, int64_t stride) {
    f32x16 sums[TT][OO];
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) sums[t][o] = load(chains + t * stride + o * 16);
    const auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
        f32x16 x[TT];
        for (int t = 0; t < TT; ++t) x[t] = read(v + t * width + i, n - i);
        for (int o = 0; o < OO; ++o) {
            const f32x16 w = read(fn + o * width + i, n - i);
            for (int t = 0; t < TT; ++t) sums[t][o] = fma(x[t], w, sums[t][o]);
        }
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) step(i, [](const auto* p, int64_t) __attribute__((always_inline)) { return load(p); });
    if (i < n) step(i, [](const auto* p, int64_t left) __attribute__((always_inline)) { return load_n(p, left); });
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) store(chains + t * stride + o * 16, sums[t][o]);
}

template <int TT, class T>
void extend_outputs(const T* v, const float* fn, int64_t width, int64_t n, float* chains, int64_t stride, int64_t outputs) {
    constexpr int WIDE = TT == 1 || BITTRUE_ISA_CODE == 2 ? 6 : 2;
    int64_t o = 0;
    for (; o + WIDE <= outputs; o += WIDE) extend_chains<TT, WIDE>(v, fn + o * width, width, n, chains + o * 16, stride);
    for (; o + 2 <= outputs; o += 2) extend_chains<TT, 2>(v, fn + o * width, width, n, chains + o * 16, stride);
    for (; o < outputs; ++o) extend_chains<TT, 1>(v, fn + o * width, width, n, chains + o * 16, stride);
}

// tokens [count, n] . outputs first..first+wanted of fn -> mixes [count, outputs], count <= GROUP
template <class T>
void mix_group(const T* tokens, const float* fn, float* mixes, int64_t count, int64_t n, int64_t outputs, int64_t first,
               int64_t wanted) {
    float* chains = chain_scratch.get<float>(count * wanted * 16);
    std::memset(chains, 0, size_t(count * wanted) * 64);
    for (int64_t k = 0; k < n; k += BLOCK) {
        const int64_t size = n - k < BLOCK ? n - k : BLOCK;
        for (int64_t o = 0; o < wanted; o += OUTPUT_TILE) {
            const int64_t tile = wanted - o < OUTPUT_TILE ? wanted - o : OUTPUT_TILE;
            for (int64_t t = 0; t < count;) {
                const T* v = tokens + t * n + k;
                const float* w = fn + (first + o) * n + k;
                float* c = chains + (t * wanted + o) * 16;
                if (t + TOKEN_TILE <= count) {
                    extend_outputs<TOKEN_TILE>(v, w, n, size, c, wanted * 16, tile);
                    t += TOKEN_TILE;
                } else {
                    extend_outputs<1>(v, w, n, size, c, wanted * 16, tile);
                    t += 1;
                }
            }
        }
    }
    for (int64_t t = 0; t < count; ++t)
        for (int64_t o = 0; o < wanted; ++o) mixes[t * outputs + first + o] = hsum(load(chains + (t * wanted + o) * 16));
}

// For every token: mixes [outputs] = fn . its streams [n], not yet divided by their rms; then finish(first token, count,
// mixes of the first token), count being 1 or 4.
template <class T, class Finish>
void for_mixed_tokens(const T* streams, const float* fn, int64_t tokens, int64_t n, int64_t outputs, const Finish& finish) {
    float* mixes = mix_scratch.get<float>(tokens * outputs);
    const int64_t groups = (tokens + GROUP - 1) / GROUP;
    const auto finish_tokens = [&](int64_t t, int64_t end) {
        for (; t + 4 <= end; t += 4) finish(t, int64_t(4), mixes + t * outputs);
        for (; t < end; ++t) finish(t, int64_t(1), mixes + t * outputs);
    };
    if (tokens >= FUSED) {
        PARALLEL_FOR(g, groups, tokens * n * outputs) {
            const int64_t t = g * GROUP, count = tokens - t < GROUP ? tokens - t : GROUP;
            mix_group(streams + t * n, fn, mixes + t * outputs, count, n, outputs, 0, outputs);
            finish_tokens(t, t + count);
        };
        return;
    }
    const int64_t tiles = (outputs + OUTPUT_TILE - 1) / OUTPUT_TILE;
    PARALLEL_FOR(job, groups * tiles, tokens * n * outputs / 4) {
        const int64_t t = job / tiles * GROUP, count = tokens - t < GROUP ? tokens - t : GROUP;
        const int64_t first = job % tiles * OUTPUT_TILE;
        mix_group(streams + t * n, fn, mixes + t * outputs, count, n, outputs, first,
                  outputs - first < OUTPUT_TILE ? outputs - first : OUTPUT_TILE);
    };
    const int64_t quads = (tokens + 3) / 4;
    PARALLEL_FOR(q, quads, tokens * n) { finish_tokens(4 * q, 4 * q + 4 < tokens ? 4 * q + 4 : tokens); };
}

// ---- coefficients

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

// The same for M = 4: a matrix is one vector, row j in lanes 4j..4j+3. The additions keep the order of the loops above.
BT f32x16 divided_rows(f32x16 c, f32x16 eps) {
    const f32x16 sum = add(add(add(lane_of_fours<0>(c), lane_of_fours<1>(c)), lane_of_fours<2>(c)), lane_of_fours<3>(c));
    return div(c, add(sum, eps));
}

BT f32x16 divided_columns(f32x16 c, f32x16 eps) {
    const f32x16 sum = add(add(add(four_in_all<0>(c), four_in_all<1>(c)), four_in_all<2>(c)), four_in_all<3>(c));
    return div(c, add(sum, eps));
}

// Several matrices at once: one alone waits for its own divisions.
template <int N> BT void sinkhorn4(f32x16 (&c)[N], int64_t iters, float eps) {
    const f32x16 e = set1(eps);
    for (int t = 0; t < N; ++t) {
        f32x16 largest = max(lane_of_fours<1>(c[t]), lane_of_fours<0>(c[t]));
        largest = max(lane_of_fours<3>(c[t]), max(lane_of_fours<2>(c[t]), largest));
        c[t] = divided_columns(add(divided_rows(exp(sub(c[t], largest)), zero()), e), e);
    }
    for (int64_t i = 1; i < iters; ++i)
        for (int t = 0; t < N; ++t) c[t] = divided_columns(divided_rows(c[t], e), e);
}

// ---- rows

// out [dim] = rms_norm(sum of factors_j * streams_j, j ascending), rounded before the norm as it is after. M streams, or the
// run-time m when M is 0.
template <int64_t M, class T, class W>
void mix_and_norm(const T* streams, const float* factors, const W* norm, T* out, int64_t run_time_m, int64_t dim, float eps) {
    const int64_t m = M ? M : run_time_m;
    for (int64_t i = 0; i < dim; i += 16) {
        f32x16 sum = mul(set1(factors[0]), load_n(streams + i, dim - i));
        for (int64_t j = 1; j < m; ++j)
            sum = add(sum, mul(set1(factors[j]), load_n(streams + j * dim + i, dim - i)));
        store_n(out + i, sum, dim - i);
    }
    rms_norm_row(out, norm, out, dim, eps);
}

struct Weights {
    const float *fn, *base, *scale;
    const void* norm;
    int64_t norm_dtype;
    int64_t iters;
    float eps, norm_eps;
};

template <class T>
void mix_and_norm(const T* streams, const float* factors, const Weights& w, T* out, int64_t m, int64_t dim) {
    const float* n32 = static_cast<const float*>(w.norm);
    const bf16* n16 = static_cast<const bf16*>(w.norm);
    if (m == 4)
        return w.norm_dtype == 0 ? mix_and_norm<4>(streams, factors, n32, out, m, dim, w.norm_eps)
                                 : mix_and_norm<4>(streams, factors, n16, out, m, dim, w.norm_eps);
    return w.norm_dtype == 0 ? mix_and_norm<0>(streams, factors, n32, out, m, dim, w.norm_eps)
                             : mix_and_norm<0>(streams, factors, n16, out, m, dim, w.norm_eps);
}

// N tokens of four streams, mixes [N, 24].
template <int N, class T>
void pre4(const T* streams, const float* mixes, const Weights& w, T* x, float* post, float* comb, int64_t dim) {
    // Lanes 0-3 make the factors of x, lanes 4-7 those of y.
    const mask16 of_x = lanes_below(4);
    const f32x16 scale = select(of_x, set1(w.scale[0]), set1(w.scale[1]));
    const f32x16 factor = select(of_x, set1(1.0f), set1(2.0f)), shift = select(of_x, set1(w.eps), zero());
    alignas(64) float factors[N][16];
    f32x16 c[N];
    for (int t = 0; t < N; ++t) {
        const f32x16 inverse = set1(inverse_rms(streams + t * 4 * dim, 4 * dim, w.norm_eps));
        const f32x16 logits = add(mul(mul(load_n(mixes + t * 24, 8), inverse), scale), load_n(w.base, 8));
        store(factors[t], add(mul(factor, sigmoid(logits)), shift));
        std::memcpy(post + t * 4, factors[t] + 4, 16);
        c[t] = add(mul(mul(load(mixes + t * 24 + 8), inverse), set1(w.scale[2])), load(w.base + 8));
    }
    sinkhorn4(c, w.iters, w.eps);
    for (int t = 0; t < N; ++t) {
        store(comb + t * 16, c[t]);
        mix_and_norm(streams + t * 4 * dim, factors[t], w, x + t * dim, 4, dim);
    }
}

template <class T>
void pre(const T* streams, const float* mixes, const Weights& w, T* x, float* post, float* comb, int64_t m, int64_t dim) {
    const float inverse = inverse_rms(streams, m * dim, w.norm_eps);
    float mixed[MAX_OUTPUTS], factors[MAX_STREAMS];
    for (int64_t i = 0; i < (2 + m) * m; ++i) mixed[i] = mixes[i] * inverse;
    coefficients(mixed, w.base, w.scale[0], 1.0f, w.eps, factors, m);
    coefficients(mixed + m, w.base + m, w.scale[1], 2.0f, 0.0f, post, m);
    for (int64_t i = 0; i < m * m; ++i) comb[i] = mixed[2 * m + i] * w.scale[2] + w.base[2 * m + i];
    sinkhorn(comb, m, w.iters, w.eps);
    mix_and_norm(streams, factors, w, x, m, dim);
}

template <class T>
void hc_pre(const T* streams, const Weights& w, T* x, float* post, float* comb, int64_t tokens, int64_t m, int64_t dim) {
    const int64_t outputs = (2 + m) * m;
    for_mixed_tokens(streams, w.fn, tokens, m * dim, outputs, [&](int64_t t, int64_t count, const float* mixes) {
        const T* from = streams + t * m * dim;
        if (m == 4 && count == 4) return pre4<4>(from, mixes, w, x + t * dim, post + t * 4, comb + t * 16, dim);
        for (int64_t i = 0; i < count; ++i, ++t, from += m * dim, mixes += outputs) {
            if (m == 4) pre4<1>(from, mixes, w, x + t * dim, post + t * 4, comb + t * 16, dim);
            else pre(from, mixes, w, x + t * dim, post + t * m, comb + t * m * m, m, dim);
        }
    });
}

template <class T> void hc_head(const T* streams, const Weights& w, T* x, int64_t tokens, int64_t m, int64_t dim) {
    for_mixed_tokens(streams, w.fn, tokens, m * dim, m, [&](int64_t t, int64_t count, const float* mixes) {
        for (const int64_t end = t + count; t < end; ++t, mixes += m) {
            const T* from = streams + t * m * dim;
            const float inverse = inverse_rms(from, m * dim, w.norm_eps);
            float mixed[MAX_STREAMS], factors[MAX_STREAMS];
            for (int64_t i = 0; i < m; ++i) mixed[i] = mixes[i] * inverse;
            coefficients(mixed, w.base, w.scale[0], 1.0f, w.eps, factors, m);
            mix_and_norm(from, factors, w, x + t * dim, m, dim);
        }
    });
}

template <class From, class To>
void embed(const int64_t* ids, const From* table, int64_t vocab, To* out, int64_t tokens, int64_t m, int64_t dim) {
    PARALLEL_FOR(t, tokens, tokens * m * dim / 4) {
        const int64_t id = ids[t];
        const bool is_known = 0 <= id && id < vocab;
        const From* row = table + (is_known ? id : 0) * dim;
        To* to = out + t * m * dim;
        for (int64_t i = 0; i < dim; i += 16) {
            const f32x16 v = is_known ? load_n(row + i, dim - i) : set1(__builtin_nanf(""));
            for (int64_t j = 0; j < m; ++j) store_n(to + j * dim + i, v, dim - i);
        }
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

// ids [tokens], table [vocab, dim] -> out [tokens, m, dim]; rows of unknown ids are NaN
BITTRUE_EXPORT(embed)(const int64_t* ids, const void* table, int64_t table_dtype, int64_t vocab, void* out, int64_t dtype,
                      int64_t tokens, int64_t m, int64_t dim) {
    const float* t32 = static_cast<const float*>(table);
    const bf16* t16 = static_cast<const bf16*>(table);
    float* o32 = static_cast<float*>(out);
    bf16* o16 = static_cast<bf16*>(out);
    if (table_dtype == 0 && dtype == 0) embed(ids, t32, vocab, o32, tokens, m, dim);
    else if (table_dtype == 0) embed(ids, t32, vocab, o16, tokens, m, dim);
    else if (dtype == 0) embed(ids, t16, vocab, o32, tokens, m, dim);
    else embed(ids, t16, vocab, o16, tokens, m, dim);
}
BITTRUE_REPLAYABLE(embed)

// streams [tokens, m, dim] -> x [tokens, dim], post [tokens, m], comb [tokens, m, m]
BITTRUE_EXPORT(hc_pre)(const void* streams, int64_t dtype, const float* fn, const float* base, const float* scale,
                       const void* norm, int64_t norm_dtype, void* x, float* post, float* comb, int64_t tokens, int64_t m,
                       int64_t dim, int64_t iters, float eps, float norm_eps) {
    const Weights w{fn, base, scale, norm, norm_dtype, iters, eps, norm_eps};
    if (dtype == 0) hc_pre(static_cast<const float*>(streams), w, static_cast<float*>(x), post, comb, tokens, m, dim);
    else hc_pre(static_cast<const bf16*>(streams), w, static_cast<bf16*>(x), post, comb, tokens, m, dim);
}
BITTRUE_REPLAYABLE(hc_pre)

// streams [tokens, m, dim] -> x [tokens, dim]
BITTRUE_EXPORT(hc_head)(const void* streams, int64_t dtype, const float* fn, const float* base, const float* scale,
                        const void* norm, int64_t norm_dtype, void* x, int64_t tokens, int64_t m, int64_t dim, float eps,
                        float norm_eps) {
    const Weights w{fn, base, scale, norm, norm_dtype, 0, eps, norm_eps};
    if (dtype == 0) hc_head(static_cast<const float*>(streams), w, static_cast<float*>(x), tokens, m, dim);
    else hc_head(static_cast<const bf16*>(streams), w, static_cast<bf16*>(x), tokens, m, dim);
}
BITTRUE_REPLAYABLE(hc_head)

// y [tokens, dim], streams and out [tokens, m, dim], post [tokens, m], comb [tokens, m, m]
BITTRUE_EXPORT(hc_post)(const void* y, const void* streams, int64_t dtype, const float* post, const float* comb,
                        void* out, int64_t tokens, int64_t m, int64_t dim) {
    if (dtype == 0) hc_post<float>(y, streams, post, comb, out, tokens, m, dim);
    else hc_post<bf16>(y, streams, post, comb, out, tokens, m, dim);
}
BITTRUE_REPLAYABLE(hc_post)
