// Derivatives of the hyper-connections: one pass over the streams, the small matrices of sixteen tokens side by side in the lanes.
#include "rowops.h"

namespace {

constexpr int64_t MAX_STREAMS = 8;
constexpr int64_t MAX_OUTPUTS = (2 + MAX_STREAMS) * MAX_STREAMS;
constexpr int64_t GROUP = 16;          // tokens whose small matrices are computed together, one in each lane
constexpr int64_t BLOCK_TOKENS = 256;  // tokens of one partial sum of a weight's gradient: their number decides the bits
// Streams and fn are copied to tiles of 64 features of one stream, filled up with zeros: rows as they stand, powers of two
// apart, would fight for the same few lines of the first cache.
constexpr int64_t TILE = 64, VECTORS = TILE / 16;
constexpr int64_t NEAR_TILES = 16;  // tiles of four tokens and six outputs that fit the first cache
// Sums that are in registers together. Every sum has its own order, so they decide no bit.
constexpr bool IS_WIDE = BITTRUE_ISA_CODE == 2;
constexpr int TOKENS = IS_WIDE ? 4 : 2, OUTPUTS = IS_WIDE ? 6 : 2, FEATURES = IS_WIDE ? 4 : 2;  // FEATURES in vectors

thread_local Scratch fn_scratch, partial_scratch;  // of the calling thread
thread_local Scratch group_scratch;

// ---- sixteen vectors at a time

// Lane i of the result: the sum of the lanes of rows[16 i ..], by the tree of hsum.
BT f32x16 lane_sums(const float* rows) {
    f32x16 a[16];
    for (int k = 0; k < 16; ++k) a[k] = load(rows + 16 * k);
    const auto halve = [&](auto stride) __attribute__((always_inline)) {
        constexpr int S = decltype(stride)::value;
        for (int k = 0; k < S; ++k)
            a[k] = add(blend_lanes<S>(a[k], a[k + S]), xor_lanes<S>(blend_lanes<S>(a[k + S], a[k])));
    };
    halve(std::integral_constant<int, 8>());
    halve(std::integral_constant<int, 4>());
    halve(std::integral_constant<int, 2>());
    halve(std::integral_constant<int, 1>());
    return a[0];
}

BT void transpose(f32x16 (&a)[16]) {
    const auto exchange = [&](auto stride) __attribute__((always_inline)) {
        constexpr int S = decltype(stride)::value;
        for (int k = 0; k < 16; ++k) {
            if (k & S) continue;
            const f32x16 low = a[k], high = a[k | S];
            a[k] = blend_lanes<S>(low, xor_lanes<S>(high));
            a[k | S] = blend_lanes<S>(xor_lanes<S>(low), high);
        }
    };
    exchange(std::integral_constant<int, 8>());
    exchange(std::integral_constant<int, 4>());
    exchange(std::integral_constant<int, 2>());
    exchange(std::integral_constant<int, 1>());
}

// rows [count, width], count and width <= 16 -> width vectors, one token in a lane, 0 where there is no token.
BT void load_lanes(const float* rows, int64_t count, int64_t width, f32x16* out) {
    f32x16 a[16];
    for (int64_t t = 0; t < 16; ++t) a[t] = t < count ? load_n(rows + t * width, width) : zero();
    transpose(a);
    for (int64_t i = 0; i < width; ++i) out[i] = a[i];
}

// ---- what a group of tokens needs

struct Task {
    const float *d_x, *d_post, *d_comb;  // d_post and d_comb are null at the head
    const float *streams, *fn, *base, *scale, *norm;
    float* d_streams;
    int64_t tokens, m, dim, outputs, iters;
    float eps, norm_eps;
    const float* tiles_of_fn;  // [tiles, outputs, TILE]

    int64_t n() const { return m * dim; }
    int64_t scales() const { return outputs == m ? 1 : 3; }
    int64_t stream_tiles() const { return (dim + TILE - 1) / TILE; }
    int64_t tiles() const { return m * stream_tiles(); }
    int64_t width(int64_t tile) const {  // features of a tile
        const int64_t left = dim - tile % stream_tiles() * TILE;
        return left < TILE ? left : TILE;
    }
    int64_t feature(int64_t tile) const { return tile / stream_tiles() * dim + tile % stream_tiles() * TILE; }
    // Of one partial sum: d_fn as tiles_of_fn, d_norm [dim], d_base [outputs], d_scale [3].
    int64_t fn_size() const { return tiles() * outputs * TILE; }
    int64_t partial_size() const { return fn_size() + dim + outputs + 3; }
};

// Scratch of a group, every row of 16 floats one token a lane unless said otherwise.
struct Group {
    const float* d_x;
    float* d_streams;
    int64_t first, count;  // tokens first..first+count
    const float* next;     // streams of the group after this one, next_size floats
    int64_t next_size;

    float* streams;       // [tiles, 16 tokens, TILE], zeros where there is no token
    float* hidden;        // [stream_tiles, 16 tokens, TILE]: the mixed streams, then their gradient
    float* chains;        // [outputs, 16 tokens, 16]
    float* sums;          // [2 + 2 m, 16 tokens, 16]: products over features, before their lanes are added
    float* mixes;         // [outputs, 16]
    float* d_mixes;       // [outputs, 16]: of fn . v, before the division by the rms
    float* sigmoids;      // [2 m, 16]
    float* pre;           // [m, 16]
    float* softmax;       // [m m, 16]
    float* comb;          // [m m, 16]
    float* denominators;  // [2 iters, 2, m, 16]: of each half round, and their inverses
    float* back;          // [16]: d_streams += back * streams
    float* totals;        // [outputs + 3, 16]: d_base and d_scale of the block, one sum a lane

    int64_t size = 0;  // floats of scratch; `memory` may be null to learn it

    Group(const Task& w, float* memory) {
        const auto take = [&](int64_t rows) { return memory + std::exchange(size, size + rows * 16); };
        streams = take(w.tiles() * TILE);
        hidden = take(w.stream_tiles() * TILE);
        chains = take(w.outputs * 16);
        sums = take((2 + 2 * w.m) * 16);
        mixes = take(w.outputs);
        d_mixes = take(w.outputs);
        sigmoids = take(2 * w.m);
        pre = take(w.m);
        softmax = take(w.m * w.m);
        comb = take(w.m * w.m);
        denominators = take(4 * (w.iters > 1 ? w.iters : 1) * w.m);
        back = take(1);
        totals = take(w.outputs + 3);
    }
};

// ---- copies to tiles

// row: features of one stream or output -> to + tile * stride
template <class Use> BT void copy_to_tile(const Task& w, const float* row, int64_t tile, float* to, const Use& use) {
    const float* from = row + w.feature(tile);
    const int64_t width = w.width(tile);
    for (int64_t f = 0; f < VECTORS; ++f) {
        const int64_t left = width - f * 16;
        const f32x16 v = left > 0 ? load_n(from + f * 16, left) : zero();
        store(to + f * 16, v);
        use(f, v);
    }
}

// fn [outputs, n] -> [tiles, outputs, TILE]
void copy_fn(const Task& w, float* to) {
    for (int64_t q = 0; q < w.tiles(); ++q)
        for (int64_t o = 0; o < w.outputs; ++o)
            copy_to_tile(w, w.fn + o * w.n(), q, to + (q * w.outputs + o) * TILE, [](int64_t, f32x16) {});
}

// The group's streams to their tiles; the squares of each token's features, one token a lane.
f32x16 copy_streams(const Task& w, const Group& g) {
    if (g.count < GROUP) std::memset(g.streams, 0, size_t(w.tiles()) * GROUP * TILE * 4);
    alignas(64) float squares[GROUP * 16] = {};
    for (int64_t t = 0; t < g.count; ++t) {
        const float* row = w.streams + (g.first + t) * w.n();
        f32x16 sums[VECTORS] = {zero(), zero(), zero(), zero()};
        for (int64_t q = 0; q < w.tiles(); ++q)
            copy_to_tile(w, row, q, g.streams + (q * GROUP + t) * TILE,
                         [&](int64_t f, f32x16 v) __attribute__((always_inline)) { sums[f] = fma(v, v, sums[f]); });
        store(squares + t * 16, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    }
    return lane_sums(squares);
}

// ---- products of tokens and fn

// Asks the memory for parts first..first+count of `parts` of rows that are read or written soon: the products below take long.
BT void prefetch(const float* rows, int64_t size, int64_t first, int64_t count, int64_t parts) {
    for (int64_t i = size * first / parts; i < size * (first + count) / parts; i += 16) __builtin_prefetch(rows + i);
}

// TT tokens by OO outputs: chains += sixteen chains each over `tiles` tiles.
template <int TT, int OO> void extend_chains(const float* v, const float* fn, int64_t outputs, int64_t tiles, float* chains) {
    f32x16 sums[TT][OO];
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) sums[t][o] = load(chains + (o * 16 + t) * 16);
    for (int64_t q = 0; q < tiles; ++q, v += GROUP * TILE, fn += outputs * TILE)
        for (int64_t i = 0; i < TILE; i += 16) {
            f32x16 x[TT];
            for (int t = 0; t < TT; ++t) x[t] = load(v + t * TILE + i);
            for (int o = 0; o < OO; ++o) {
                const f32x16 w = load(fn + o * TILE + i);
                for (int t = 0; t < TT; ++t) sums[t][o] = fma(x[t], w, sums[t][o]);
            }
        }
    for (int t = 0; t < TT; ++t)
        for (int o = 0; o < OO; ++o) store(chains + (o * 16 + t) * 16, sums[t][o]);
}

// body(first output, number of outputs as a constant), over all outputs
template <class Body> BT void for_outputs(int64_t outputs, const Body& body) {
    int64_t o = 0;
    for (; o + OUTPUTS <= outputs; o += OUTPUTS) body(o, std::integral_constant<int, OUTPUTS>());
    for (; o + 2 <= outputs; o += 2) body(o, std::integral_constant<int, 2>());
    for (; o < outputs; ++o) body(o, std::integral_constant<int, 1>());
}

// mixes = fn . streams, not divided by their rms yet
void mix(const Task& w, const Group& g) {
    std::memset(g.chains, 0, size_t(w.outputs) * 16 * 16 * 4);
    for (int64_t q = 0; q < w.tiles(); q += NEAR_TILES) {
        const int64_t tiles = w.tiles() - q < NEAR_TILES ? w.tiles() - q : NEAR_TILES;
        for_outputs(w.outputs, [&](int64_t o, auto number) {
            constexpr int OO = decltype(number)::value;
            for (int64_t t = 0; t < GROUP; t += TOKENS) {
                if (q == 0) prefetch(g.d_streams, g.count * w.n(), o * GROUP + t * OO, OO * TOKENS, w.outputs * GROUP);
                extend_chains<TOKENS, OO>(g.streams + (q * GROUP + t) * TILE, w.tiles_of_fn + (q * w.outputs + o) * TILE,
                                          w.outputs, tiles, g.chains + (o * 16 + t) * 16);
            }
        });
    }
    for (int64_t o = 0; o < w.outputs; ++o) store(g.mixes + o * 16, lane_sums(g.chains + o * 256));
}

// A part of a tile of d_streams, TOKENS tokens by FEATURES vectors: pre_j d_hidden + back * streams + fn^T d_mixes.
// v and d: the tokens' streams and d_hidden; fn [outputs, TILE]; out: d_streams of the first, of which `left` features stand.
BT void streams_part(const Task& w, const float* v, const float* d, const float* fn, const float* d_mixes, const float* pre,
                     const float* back, float* out, int64_t count, int64_t left) {
    f32x16 sums[TOKENS][FEATURES];
    for (int t = 0; t < TOKENS; ++t)
        for (int f = 0; f < FEATURES; ++f)
            sums[t][f] = fma(set1(pre[t]), load(d + t * TILE + f * 16), mul(set1(back[t]), load(v + t * TILE + f * 16)));
    for (int64_t o = 0; o < w.outputs; ++o, fn += TILE, d_mixes += 16) {
        f32x16 x[FEATURES];
        for (int f = 0; f < FEATURES; ++f) x[f] = load(fn + f * 16);
        for (int t = 0; t < TOKENS; ++t) {
            const f32x16 dm = set1(d_mixes[t]);
            for (int f = 0; f < FEATURES; ++f) sums[t][f] = fma(dm, x[f], sums[t][f]);
        }
    }
    for (int t = 0; t < TOKENS && t < count; ++t)
        for (int f = 0; f < FEATURES && f * 16 < left; ++f) store_n(out + t * w.n() + f * 16, sums[t][f], left - f * 16);
}

// A part of a tile of d_fn, OO outputs by FEATURES vectors: each token's d_mix * streams is added, first to last.
template <int OO> BT void fn_part(const float* v, const float* d_mixes, float* d_fn) {
    f32x16 sums[OO][FEATURES];
    for (int o = 0; o < OO; ++o)
        for (int f = 0; f < FEATURES; ++f) sums[o][f] = load(d_fn + o * TILE + f * 16);
    for (int64_t t = 0; t < GROUP; ++t, v += TILE) {
        f32x16 x[FEATURES];
        for (int f = 0; f < FEATURES; ++f) x[f] = load(v + f * 16);
        for (int o = 0; o < OO; ++o) {
            const f32x16 dm = set1(d_mixes[o * 16 + t]);
            for (int f = 0; f < FEATURES; ++f) sums[o][f] = fma(dm, x[f], sums[o][f]);
        }
    }
    for (int o = 0; o < OO; ++o)
        for (int f = 0; f < FEATURES; ++f) store(d_fn + o * TILE + f * 16, sums[o][f]);
}

// d_streams and what the group adds to d_fn [tiles, outputs, TILE], tile by tile
void products_backward(const Task& w, const Group& g, float* d_fn) {
    for (int64_t q = 0; q < w.tiles(); ++q) {
        const float *v = g.streams + q * GROUP * TILE, *hidden = g.hidden + q % w.stream_tiles() * GROUP * TILE;
        const float *fn = w.tiles_of_fn + q * w.outputs * TILE, *pre = g.pre + q / w.stream_tiles() * 16;
        float *out = g.d_streams + w.feature(q), *to = d_fn + q * w.outputs * TILE;
        for (int64_t i = 0; i < w.width(q); i += FEATURES * 16) {
            for (int64_t t = 0; t < g.count; t += TOKENS) {
                if (i == 0) prefetch(g.next, g.next_size, q * GROUP + t, TOKENS, w.tiles() * GROUP);
                streams_part(w, v + t * TILE + i, hidden + t * TILE + i, fn + i, g.d_mixes + t, pre + t, g.back + t,
                             out + t * w.n() + i, g.count - t, w.width(q) - i);
            }
            for_outputs(w.outputs, [&](int64_t o, auto number) {
                fn_part<decltype(number)::value>(v + i, g.d_mixes + o * 16, to + o * TILE + i);
            });
        }
    }
}

// ---- Sinkhorn rounds of sixteen matrices. M streams, or the run-time m when M is 0.

// Divides every line of c by (its sum + eps). Element e of line l is c[l * line + e * step]. What was divided by, and its
// inverse, go to kept [2, m, 16].
template <int64_t M> BT void divide_lines(f32x16* c, int64_t run_time_m, int64_t line, int64_t step, float eps, float* kept) {
    const int64_t m = M ? M : run_time_m;
    for (int64_t l = 0; l < m; ++l) {
        f32x16* e = c + l * line;
        f32x16 sum = e[0];
        for (int64_t k = 1; k < m; ++k) sum = add(sum, e[k * step]);
        sum = add(sum, set1(eps));
        const f32x16 inverse = div(set1(1.0f), sum);
        for (int64_t k = 0; k < m; ++k) e[k * step] = mul(e[k * step], inverse);
        store(kept + l * 16, sum);
        store(kept + (m + l) * 16, inverse);
    }
}

// Undoes it: c is what divide_lines left and becomes what it was given; d, the gradient of the former, that of the latter.
template <int64_t M>
BT void undo_lines(f32x16* c, f32x16* d, int64_t run_time_m, int64_t line, int64_t step, const float* kept) {
    const int64_t m = M ? M : run_time_m;
    for (int64_t l = 0; l < m; ++l) {
        f32x16 *e = c + l * line, *de = d + l * line;
        f32x16 product = mul(de[0], e[0]);
        for (int64_t k = 1; k < m; ++k) product = fma(de[k * step], e[k * step], product);
        const f32x16 sum = load(kept + l * 16), inverse = load(kept + (m + l) * 16);
        for (int64_t k = 0; k < m; ++k) {
            de[k * step] = mul(sub(de[k * step], product), inverse);
            e[k * step] = mul(e[k * step], sum);
        }
    }
}

// c: logits -> nearly doubly stochastic
template <int64_t M> void sinkhorn(f32x16* c, const Task& w, const Group& g) {
    const int64_t m = M ? M : w.m;
    for (int64_t j = 0; j < m; ++j) {
        f32x16 largest = c[j * m];
        for (int64_t k = 1; k < m; ++k) largest = max(c[j * m + k], largest);
        for (int64_t k = 0; k < m; ++k) c[j * m + k] = exp(sub(c[j * m + k], largest));
    }
    float* kept = g.denominators;
    divide_lines<M>(c, m, m, 1, 0.0f, kept);
    for (int64_t i = 0; i < m * m; ++i) {
        store(g.softmax + i * 16, c[i]);
        c[i] = add(c[i], set1(w.eps));
    }
    divide_lines<M>(c, m, 1, m, w.eps, kept += 2 * m * 16);
    for (int64_t i = 1; i < w.iters; ++i) {
        divide_lines<M>(c, m, m, 1, w.eps, kept += 2 * m * 16);
        divide_lines<M>(c, m, 1, m, w.eps, kept += 2 * m * 16);
    }
}

// d: gradient of the result -> of the logits; c is the result and is lost.
template <int64_t M> void sinkhorn_backward(f32x16* c, f32x16* d, const Task& w, const Group& g) {
    const int64_t m = M ? M : w.m, half = 2 * m * 16;
    const float* kept = g.denominators + (w.iters > 1 ? 2 * w.iters - 1 : 1) * half;
    for (int64_t i = w.iters - 1; i > 0; --i) {
        undo_lines<M>(c, d, m, 1, m, kept);
        undo_lines<M>(c, d, m, m, 1, kept - half);
        kept -= 2 * half;
    }
    undo_lines<M>(c, d, m, 1, m, kept);
    for (int64_t j = 0; j < m; ++j) {
        f32x16 product = zero();
        for (int64_t k = 0; k < m; ++k) product = fma(d[j * m + k], load(g.softmax + (j * m + k) * 16), product);
        for (int64_t k = 0; k < m; ++k) d[j * m + k] = mul(sub(d[j * m + k], product), load(g.softmax + (j * m + k) * 16));
    }
}

// ---- one token in each lane

// 1 / sqrt(sums / n + eps), 0 in lanes without a token
BT f32x16 inverse_rms_lanes(f32x16 sums, int64_t n, float eps, int64_t count) {
    const f32x16 root = sqrt(add(div(sums, set1(float(n))), set1(eps)));
    return select(lanes_below(count), div(set1(1.0f), root), zero());
}

// mixes (divided by the rms from here on) -> sigmoids, pre, comb
template <int64_t M> void coefficients(const Task& w, const Group& g, f32x16 inverse) {
    const int64_t m = M ? M : w.m;
    f32x16 c[M ? M * M : MAX_STREAMS * MAX_STREAMS];
    for (int64_t o = 0; o < w.outputs; ++o) {
        const f32x16 mixed = mul(load(g.mixes + o * 16), inverse);
        store(g.mixes + o * 16, mixed);
        const f32x16 logit = add(mul(mixed, set1(w.scale[o < m ? 0 : o < 2 * m ? 1 : 2])), set1(w.base[o]));
        if (o >= 2 * m) {
            c[o - 2 * m] = logit;
            continue;
        }
        const f32x16 s = sigmoid(logit);
        store(g.sigmoids + o * 16, s);
        if (o < m) store(g.pre + o * 16, add(s, set1(w.eps)));
    }
    if (w.d_comb == nullptr) return;
    sinkhorn<M>(c, w, g);
    for (int64_t i = 0; i < m * m; ++i) store(g.comb + i * 16, c[i]);
}

// The mixed streams of each token, and what their norm and their factors need:
// sums [2 + 2 m]: h . h, gw . h, gw . stream_j, h . stream_j, with gw = d_x * norm.
template <int64_t M> void hidden_products(const Task& w, const Group& g) {
    const int64_t m = M ? M : w.m, apart = w.stream_tiles() * GROUP * TILE;
    for (int64_t t = 0; t < g.count; ++t) {
        f32x16 hh = zero(), gh = zero(), gs[M ? M : MAX_STREAMS], hs[M ? M : MAX_STREAMS], pre[M ? M : MAX_STREAMS];
        for (int64_t j = 0; j < m; ++j) {
            gs[j] = hs[j] = zero();
            pre[j] = set1(g.pre[j * 16 + t]);
        }
        for (int64_t i = 0; i < w.dim; i += 16) {
            const int64_t left = w.dim - i, place = (i / TILE * GROUP + t) * TILE + i % TILE;
            f32x16 v[M ? M : MAX_STREAMS], h = zero();
            for (int64_t j = 0; j < m; ++j) {
                v[j] = load(g.streams + j * apart + place);
                h = fma(pre[j], v[j], h);
            }
            const f32x16 gw = mul(load_n(g.d_x + t * w.dim + i, left), load_n(w.norm + i, left));
            hh = fma(h, h, hh);
            gh = fma(gw, h, gh);
            for (int64_t j = 0; j < m; ++j) {
                gs[j] = fma(gw, v[j], gs[j]);
                hs[j] = fma(h, v[j], hs[j]);
            }
            store(g.hidden + place, h);
        }
        store(g.sums + t * 16, hh);
        store(g.sums + (16 + t) * 16, gh);
        for (int64_t j = 0; j < m; ++j) {
            store(g.sums + ((2 + j) * 16 + t) * 16, gs[j]);
            store(g.sums + ((2 + m + j) * 16 + t) * 16, hs[j]);
        }
    }
}

// The mixed streams become d_hidden = near * (d_x * norm) + far * hidden; d_norm takes d_x * hidden / rms(hidden).
void hidden_backward(const Task& w, const Group& g, f32x16 near, f32x16 far, float* d_norm) {
    alignas(64) float nears[16], fars[16];
    store(nears, near);
    store(fars, far);
    for (int64_t i = 0; i < w.dim; i += 16) {
        const int64_t left = w.dim - i;
        float* hidden = g.hidden + i / TILE * GROUP * TILE + i % TILE;
        f32x16 total = load_n(d_norm + i, left);
        const f32x16 norm = load_n(w.norm + i, left);
        for (int64_t t = 0; t < g.count; ++t) {
            const f32x16 d = load_n(g.d_x + t * w.dim + i, left), h = load(hidden + t * TILE);
            const f32x16 r = set1(nears[t]);
            total = fma(mul(d, h), r, total);
            store(hidden + t * TILE, fma(set1(fars[t]), h, mul(mul(d, norm), r)));
        }
        store_n(d_norm + i, total, left);
    }
}

// Gradients of the logits -> d_mixes, the factor of the streams that their rms gives, and the sums of base and scale.
template <int64_t M> void coefficients_backward(const Task& w, const Group& g, f32x16 inverse, f32x16 near, f32x16 far) {
    const int64_t m = M ? M : w.m;
    f32x16 d[MAX_OUTPUTS];
    for (int64_t j = 0; j < m; ++j)
        d[j] = fma(far, lane_sums(g.sums + (2 + m + j) * 256), mul(near, lane_sums(g.sums + (2 + j) * 256)));
    if (w.d_comb != nullptr) {
        load_lanes(w.d_post + g.first * m, g.count, m, d + m);
        for (int64_t j = 0; j < m; ++j) d[m + j] = add(d[m + j], d[m + j]);
        f32x16* dc = d + 2 * m;
        if constexpr (M == 4) load_lanes(w.d_comb + g.first * 16, g.count, 16, dc);
        else
            for (int64_t i = 0; i < m * m; ++i) {
                alignas(64) float lanes[16] = {};
                for (int64_t t = 0; t < g.count; ++t) lanes[t] = w.d_comb[(g.first + t) * m * m + i];
                dc[i] = load(lanes);
            }
        f32x16 c[M ? M * M : MAX_STREAMS * MAX_STREAMS];
        for (int64_t i = 0; i < m * m; ++i) c[i] = load(g.comb + i * 16);
        sinkhorn_backward<M>(c, dc, w, g);
    }
    f32x16 product = zero(), scaled[3] = {zero(), zero(), zero()};
    for (int64_t o = 0; o < w.outputs; ++o) {
        const int64_t part = o < m ? 0 : o < 2 * m ? 1 : 2;
        if (part < 2) {
            const f32x16 s = load(g.sigmoids + o * 16);
            d[o] = mul(d[o], mul(s, sub(set1(1.0f), s)));
        }
        const f32x16 mixed = load(g.mixes + o * 16), d_mixed = mul(d[o], set1(w.scale[part]));
        store(g.totals + o * 16, add(load(g.totals + o * 16), d[o]));
        scaled[part] = fma(d[o], mixed, scaled[part]);
        product = fma(d_mixed, mixed, product);
        store(g.d_mixes + o * 16, mul(d_mixed, inverse));
    }
    for (int64_t i = 0; i < 3; ++i) {
        float* total = g.totals + (w.outputs + i) * 16;
        store(total, add(load(total), scaled[i]));
    }
    store(g.back, mul(mul(div(product, set1(-float(w.n()))), inverse), inverse));
}

template <int64_t M> void group_backward(const Task& w, Group& g, int64_t first, int64_t count, float* partial) {
    g.first = first;
    g.count = count;
    g.next = w.streams + (first + count) * w.n();
    g.next_size = (w.tokens - first - count < GROUP ? w.tokens - first - count : GROUP) * w.n();
    g.d_x = w.d_x + first * w.dim;
    g.d_streams = w.d_streams + first * w.n();
    const f32x16 inverse = inverse_rms_lanes(copy_streams(w, g), w.n(), w.norm_eps, count);
    mix(w, g);
    coefficients<M>(w, g, inverse);
    if (count < GROUP) std::memset(g.sums, 0, size_t(2 + 2 * w.m) * 16 * 16 * 4);
    hidden_products<M>(w, g);
    const f32x16 near = inverse_rms_lanes(lane_sums(g.sums), w.dim, w.norm_eps, count);
    const f32x16 mean = div(lane_sums(g.sums + 256), set1(-float(w.dim)));
    const f32x16 far = mul(mul(mul(mean, near), near), near);
    coefficients_backward<M>(w, g, inverse, near, far);
    hidden_backward(w, g, near, far, partial + w.fn_size());
    products_backward(w, g, partial);
}

// The sum of `count` floats at `at` of each block's partial sums, first to last
void add_blocks(const float* at, int64_t blocks, int64_t stride, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        f32x16 sum = zero();
        for (int64_t b = 0; b < blocks; ++b) sum = add(sum, load_n(at + b * stride + i, count - i));
        store_n(out + i, sum, count - i);
    }
}

// d_streams, and the gradients of the weights
void mixing_backward(Task w, float* d_fn, float* d_base, float* d_scale, float* d_norm) {
    const int64_t stride = w.partial_size(), blocks = (w.tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    float* tiles_of_fn = fn_scratch.get<float>(w.fn_size());
    float* partials = partial_scratch.get<float>(blocks * stride);
    copy_fn(w, tiles_of_fn);
    w.tiles_of_fn = tiles_of_fn;
    PARALLEL_FOR(b, blocks, w.tokens * w.n() * w.outputs * 3) {
        Group g(w, group_scratch.get<float>(Group(w, nullptr).size));
        float *partial = partials + b * stride, *sums = partial + w.fn_size() + w.dim;
        std::memset(partial, 0, size_t(stride) * 4);
        std::memset(g.totals, 0, size_t(w.outputs + 3) * 16 * 4);
        const int64_t end = (b + 1) * BLOCK_TOKENS < w.tokens ? (b + 1) * BLOCK_TOKENS : w.tokens;
        for (int64_t t = b * BLOCK_TOKENS; t < end; t += GROUP) {
            const int64_t count = end - t < GROUP ? end - t : GROUP;
            if (w.m == 4) group_backward<4>(w, g, t, count, partial);
            else group_backward<0>(w, g, t, count, partial);
        }
        for (int64_t o = 0; o < w.outputs + 3; ++o) sums[o] = hsum(load(g.totals + o * 16));
    };
    PARALLEL_FOR(row, w.tiles() * w.outputs, blocks * w.fn_size()) {
        const int64_t q = row / w.outputs, o = row % w.outputs;
        add_blocks(partials + row * TILE, blocks, stride, d_fn + o * w.n() + w.feature(q), w.width(q));
    };
    const float* small = partials + w.fn_size();
    add_blocks(small, blocks, stride, d_norm, w.dim);
    add_blocks(small + w.dim, blocks, stride, d_base, w.outputs);
    add_blocks(small + w.dim + w.outputs, blocks, stride, d_scale, w.scales());
}

// ---- hc_post: a source (y or a stream) goes into the m outputs with m factors.

// d_source = sum over k of factor_k * d_out_k; dots_k = source . d_out_k, its lanes not yet added.
template <int64_t M>
BT void source_backward(const float* d_out, const float* source, const float* factors, float* d_source, f32x16* dots,
                        int64_t run_time_m, int64_t dim) {
    const int64_t m = M ? M : run_time_m;
    for (int64_t k = 0; k < m; ++k) dots[k] = zero();
    for (int64_t i = 0; i < dim; i += 16) {
        const f32x16 v = load_n(source + i, dim - i);
        f32x16 sum = zero();
        for (int64_t k = 0; k < m; ++k) {
            const f32x16 d = load_n(d_out + k * dim + i, dim - i);
            sum = fma(set1(factors[k]), d, sum);
            dots[k] = fma(v, d, dots[k]);
        }
        store_n(d_source + i, sum, dim - i);
    }
}

template <int64_t M>
void post_backward(const float* d_out, const float* y, const float* streams, const float* post, const float* comb, float* d_y,
                   float* d_streams, float* d_post, float* d_comb, int64_t tokens, int64_t run_time_m, int64_t dim) {
    const int64_t m = M ? M : run_time_m;
    PARALLEL_FOR(t, tokens, tokens * m * dim * 4) {
        const float *d = d_out + t * m * dim, *h = streams + t * m * dim;
        f32x16 dots[M ? M * M : MAX_STREAMS];
        source_backward<M>(d, y + t * dim, post + t * m, d_y + t * dim, dots, m, dim);
        for (int64_t k = 0; k < m; ++k) d_post[t * m + k] = hsum(dots[k]);
        for (int64_t j = 0; j < m; ++j) {
            f32x16* of_stream = M ? dots + j * M : dots;
            source_backward<M>(d, h + j * dim, comb + (t * m + j) * m, d_streams + (t * m + j) * dim, of_stream, m, dim);
            for (int64_t k = 0; M == 0 && k < m; ++k) d_comb[(t * m + j) * m + k] = hsum(of_stream[k]);
        }
        if constexpr (M == 4) {
            alignas(64) float rows[256];
            for (int k = 0; k < 16; ++k) store(rows + k * 16, dots[k]);
            store(d_comb + t * 16, lane_sums(rows));
        }
    };
}

}  // namespace

// d_x [tokens, dim], d_post [tokens, m], d_comb [tokens, m, m], streams, d_streams [tokens, m, dim], fn, d_fn [(2 + m) m, m dim]
BITTRUE_EXPORT(hc_pre_backward)(const float* d_x, const float* d_post, const float* d_comb, const float* streams,
                                const float* fn, const float* base, const float* scale, const float* norm,
                                float* d_streams, float* d_fn, float* d_base, float* d_scale, float* d_norm,
                                int64_t tokens, int64_t m, int64_t dim, int64_t iters, float eps, float norm_eps) {
    const Task task{d_x, d_post, d_comb, streams, fn, base, scale, norm, d_streams,
                    tokens, m, dim, (2 + m) * m, iters, eps, norm_eps, nullptr};
    mixing_backward(task, d_fn, d_base, d_scale, d_norm);
}

// d_out [tokens, dim], streams, d_streams [tokens, m, dim], fn, d_fn [m, m dim]
BITTRUE_EXPORT(hc_head_backward)(const float* d_out, const float* streams, const float* fn, const float* base,
                                 const float* scale, const float* norm, float* d_streams, float* d_fn, float* d_base,
                                 float* d_scale, float* d_norm, int64_t tokens, int64_t m, int64_t dim, float eps,
                                 float norm_eps) {
    const Task task{d_out, nullptr, nullptr, streams, fn, base, scale, norm, d_streams,
                    tokens, m, dim, m, 0, eps, norm_eps, nullptr};
    mixing_backward(task, d_fn, d_base, d_scale, d_norm);
}

// d_out, streams, d_streams [tokens, m, dim], y, d_y [tokens, dim], post, d_post [tokens, m], comb, d_comb [tokens, m, m]
BITTRUE_EXPORT(hc_post_backward)(const float* d_out, const float* y, const float* streams, const float* post,
                                 const float* comb, float* d_y, float* d_streams, float* d_post, float* d_comb,
                                 int64_t tokens, int64_t m, int64_t dim) {
    if (m == 4) post_backward<4>(d_out, y, streams, post, comb, d_y, d_streams, d_post, d_comb, tokens, m, dim);
    else post_backward<0>(d_out, y, streams, post, comb, d_y, d_streams, d_post, d_comb, tokens, m, dim);
}
