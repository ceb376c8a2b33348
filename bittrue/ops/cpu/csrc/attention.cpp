// Attention of each token over its own ordered rows: heads to the lanes for the logits, features for the values.
//
// Every logit is one fma chain over the features, every output one fma chain over the rows in list order, every denominator
// sixteen partial sums by row index modulo 16 and a tree: nothing depends on tiles, neighbours or threads.
#include "step.h"

namespace {

constexpr int64_t HCA_RATIO = 128;
constexpr int64_t ROW_BLOCK = 32;            // rows decoded at a time
constexpr int64_t KEPT_FLOATS = 256 * 1024;  // a list up to this size is decoded once, a longer one once per use
constexpr int64_t HEADS_PER_UNIT = 64;
#if BITTRUE_ISA_CODE == 2
constexpr int64_t LOGIT_ROWS = 6, LOGIT_VECTORS = 4, VALUE_HEADS = 4, VALUE_VECTORS = 4;
#else
constexpr int64_t LOGIT_ROWS = 6, LOGIT_VECTORS = 1, VALUE_HEADS = 2, VALUE_VECTORS = 2;
#endif

thread_local Scratch turned_scratch, list_scratch, rows_scratch, query_scratch, probs_scratch, out_scratch;

// Laid out as AttentionArgs in ops/cpu/cache.py.
struct Attention {
    const void* q;
    int64_t act;  // dtype code of q and out
    void* out;
    const float *cos, *sin;
    int64_t rope_dim, num_heads;
    RowSpec row;
    const uint8_t *step_rows, *window_rows;
    int64_t ring, window;
    uint8_t* pages;
    int64_t per_page;
    const int32_t* ids;
    int64_t num_ids;
    const float* sink;
    double scale, norm_eps;
    int64_t round_probs;
};

// The rows of token t in the order of the contract; returns their number.
int64_t list_rows(const Step& step, const Attention& a, int64_t t, const uint8_t** list) {
    const int64_t s = step.seq_ids[t], position = step.positions[t], start = step.starts[s], bytes = a.row.bytes();
    const uint8_t* ring = a.window_rows + step.slots[s] * a.ring * bytes;
    int64_t n = 0;
    for (int64_t p = position - a.window + 1 > 0 ? position - a.window + 1 : 0; p <= position; ++p)
        list[n++] = p >= start ? a.step_rows + (step.offsets[s] + p - start) * bytes : ring + p % a.ring * bytes;
    if (a.pages == nullptr) return n;
    const Pages pages{a.pages, a.per_page, bytes};
    if (a.ids == nullptr)
        for (int64_t e = 0; e < (position + 1) / HCA_RATIO; ++e) list[n++] = pages.entry(step, s, e);
    else
        for (int64_t i = 0; i < a.num_ids; ++i)
            if (const int64_t e = a.ids[t * a.num_ids + i]; e >= 0) list[n++] = pages.entry(step, s, e);
    return n;
}

// Decoded rows of a list, all at once where they fit, else block by block.
struct Rows {
    const uint8_t** list;
    int64_t n, width;
    float* data;
    bool kept;
    const RowSpec* spec;

    void decode(int64_t first, int64_t count, float* out) const {
        for (int64_t j = 0; j < count; ++j) {
            float* row = out + j * width;
            unpack_row(list[first + j], row, *spec);
            for (int64_t i = spec->dim; i < width; ++i) row[i] = 0.0f;
        }
    }
    BT const float* block(int64_t first, int64_t count) const {
        if (kept) return data + first * width;
        decode(first, count, data);
        return data;
    }
};

// logits[j, h] = scale * (rows[j] . query[., h]) for R rows and V vectors of heads; query [c, heads], logits [n, heads].
template <int64_t R, int64_t V>
BT void logit_tile(const float* rows, int64_t width, const float* query, int64_t c, int64_t heads, f32x16 scale,
                   float* logits) {
    f32x16 sums[R * V];
    for (int64_t i = 0; i < R * V; ++i) sums[i] = zero();
    for (int64_t d = 0; d < c; ++d) {
        f32x16 q[V];
        for (int64_t v = 0; v < V; ++v) q[v] = load(query + d * heads + 16 * v);
        for (int64_t r = 0; r < R; ++r) {
            f32x16 x = set1(rows[r * width + d]);
            for (int64_t v = 0; v < V; ++v) sums[r * V + v] = fma(x, q[v], sums[r * V + v]);
        }
    }
    for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) store(logits + r * heads + 16 * v, mul(sums[r * V + v], scale));
}

template <int64_t V>
void logit_rows(const float* rows, int64_t count, int64_t width, const float* query, int64_t c, int64_t heads,
                f32x16 scale, float* logits) {
    int64_t r = 0;
    for (; r + LOGIT_ROWS <= count; r += LOGIT_ROWS)
        logit_tile<LOGIT_ROWS, V>(rows + r * width, width, query, c, heads, scale, logits + r * heads);
    for (; r < count; ++r) logit_tile<1, V>(rows + r * width, width, query, c, heads, scale, logits + r * heads);
}

void logit_block(const float* rows, int64_t count, int64_t width, const float* query, int64_t c, int64_t heads,
                 f32x16 scale, float* logits) {
    int64_t h = 0;
    for (; h + 16 * LOGIT_VECTORS <= heads; h += 16 * LOGIT_VECTORS)
        logit_rows<LOGIT_VECTORS>(rows, count, width, query + h, c, heads, scale, logits + h);
    for (; h < heads; h += 16) logit_rows<1>(rows, count, width, query + h, c, heads, scale, logits + h);
}

// logits [n, heads] become the numerators, 16 heads at a time; totals [16] their sums with the sink's.
void softmax_column(float* logits, int64_t n, int64_t heads, f32x16 sink, bool round_probs, float* totals) {
    f32x16 top = load(logits);
    for (int64_t j = 1; j < n; ++j) top = max(top, load(logits + j * heads));
    f32x16 sums[16];
    for (int64_t i = 0; i < 16; ++i) sums[i] = zero();
    for (int64_t j = 0; j < n; ++j) {
        f32x16 p = exp(sub(load(logits + j * heads), top));
        sums[j % 16] = add(sums[j % 16], p);
        if (round_probs) {
            bf16 rounded[16];
            store(rounded, p);
            p = load(rounded);
        }
        store(logits + j * heads, p);
    }
    for (int64_t s = 8; s > 0; s /= 2)
        for (int64_t i = 0; i < s; ++i) sums[i] = add(sums[i], sums[i + s]);
    store(totals, add(sums[0], exp(sub(sink, top))));
}

// out[h, .] += sum of probs[j, h] * rows[j] over a block of rows, for H heads and F vectors of features.
template <int64_t H, int64_t F>
BT void value_tile(const float* rows, int64_t count, int64_t width, const float* probs, int64_t heads, float* out) {
    f32x16 sums[H * F];
    for (int64_t h = 0; h < H; ++h)
        for (int64_t f = 0; f < F; ++f) sums[h * F + f] = load(out + h * width + 16 * f);
    for (int64_t j = 0; j < count; ++j) {
        f32x16 x[F];
        for (int64_t f = 0; f < F; ++f) x[f] = load(rows + j * width + 16 * f);
        for (int64_t h = 0; h < H; ++h) {
            f32x16 p = set1(probs[j * heads + h]);
            for (int64_t f = 0; f < F; ++f) sums[h * F + f] = fma(p, x[f], sums[h * F + f]);
        }
    }
    for (int64_t h = 0; h < H; ++h)
        for (int64_t f = 0; f < F; ++f) store(out + h * width + 16 * f, sums[h * F + f]);
}

template <int64_t H>
void value_heads(const float* rows, int64_t count, int64_t width, const float* probs, int64_t heads, float* out) {
    int64_t d = 0;
    for (; d + 16 * VALUE_VECTORS <= width; d += 16 * VALUE_VECTORS)
        value_tile<H, VALUE_VECTORS>(rows + d, count, width, probs, heads, out + d);
    for (; d < width; d += 16) value_tile<H, 1>(rows + d, count, width, probs, heads, out + d);
}

void value_block(const float* rows, int64_t count, int64_t width, const float* probs, int64_t heads, int64_t real,
                 float* out) {
    int64_t h = 0;
    for (; h + VALUE_HEADS <= real; h += VALUE_HEADS)
        value_heads<VALUE_HEADS>(rows, count, width, probs + h, heads, out + h * width);
    for (; h < real; ++h) value_heads<1>(rows, count, width, probs + h, heads, out + h * width);
}

// Token t, heads h0..h0+real of num_heads.
template <class T>
void attend(const Step& step, const Attention& a, const T* q, int64_t t, int64_t h0, int64_t real, T* out) {
    const int64_t c = a.row.dim, width = pad16(c), heads = pad16(real);
    const int64_t most = a.window + (a.ids != nullptr ? a.num_ids : (step.positions[t] + 1) / HCA_RATIO);
    const uint8_t** list = list_scratch.get<const uint8_t*>(most);
    const int64_t n = list_rows(step, a, t, list);
    const bool kept = n * width <= KEPT_FLOATS;
    Rows rows{list, n, width, rows_scratch.get<float>((kept ? n : ROW_BLOCK) * width), kept, &a.row};
    if (kept) rows.decode(0, n, rows.data);
    float* query = query_scratch.get<float>(c * heads);
    std::memset(query, 0, size_t(c * heads) * 4);
    const T* own = q + (t * a.num_heads + h0) * c;
    const float *cos = a.cos + t * a.rope_dim / 2, *sin = a.sin + t * a.rope_dim / 2;
    T* turned = turned_scratch.get<T>(c);
    for (int64_t h = 0; h < real; ++h) {
        rms_norm_row<T, float>(own + h * c, nullptr, turned, c, float(a.norm_eps));
        rope_row(turned, turned, c, a.rope_dim, cos, sin, false);
        for (int64_t d = 0; d < c; ++d) query[d * heads + h] = to_float(turned[d]);
    }
    float* probs = probs_scratch.get<float>(n * heads + 2 * heads);
    float *totals = probs + n * heads, *sink = totals + heads;
    for (int64_t h = 0; h < heads; ++h) sink[h] = h < real ? a.sink[h0 + h] : 0.0f;
    for (int64_t j = 0; j < n; j += ROW_BLOCK) {
        const int64_t count = n - j < ROW_BLOCK ? n - j : ROW_BLOCK;
        logit_block(rows.block(j, count), count, width, query, c, heads, set1(float(a.scale)), probs + j * heads);
    }
    for (int64_t h = 0; h < heads; h += 16)
        softmax_column(probs + h, n, heads, load(sink + h), a.round_probs != 0, totals + h);
    float* sums = out_scratch.get<float>(real * width);
    std::memset(sums, 0, size_t(real * width) * 4);
    for (int64_t j = 0; j < n; j += ROW_BLOCK) {
        const int64_t count = n - j < ROW_BLOCK ? n - j : ROW_BLOCK;
        value_block(rows.block(j, count), count, width, probs + j * heads, heads, real, sums);
    }
    T* result = out + (t * a.num_heads + h0) * c;
    for (int64_t h = 0; h < real; ++h)
        for (int64_t d = 0; d < c; d += 16)
            store_n(result + h * c + d, div(load(sums + h * width + d), set1(totals[h])), c - d);
    // Keys are values, so the output carries the rotation of the rows it read: undone at the query's position.
    for (int64_t h = 0; h < real; ++h) rope_row(result + h * c, result + h * c, c, a.rope_dim, cos, sin, true);
}

template <class T> void attend_all(const Step& step, const Attention& a, const T* q, T* out) {
    int64_t per_unit = HEADS_PER_UNIT;
    // Few tokens: their heads go to different threads.
    while (per_unit > 16 && step.num_tokens * ((a.num_heads + per_unit - 1) / per_unit) < bittrue_threads()) per_unit /= 2;
    const int64_t units = (a.num_heads + per_unit - 1) / per_unit;
    PARALLEL_FOR(i, step.num_tokens * units, step.num_tokens * a.num_heads * a.row.dim * a.window / 8) {
        const int64_t h0 = i % units * per_unit;
        attend(step, a, q, i / units, h0, a.num_heads - h0 < per_unit ? a.num_heads - h0 : per_unit, out);
    };
}

}  // namespace

// q, out [T, N, c]; cos, sin [T, rope_dim / 2].
BITTRUE_EXPORT(attention)(const Step* step, const Attention* a) {
    if (a->act == 0) attend_all(*step, *a, static_cast<const float*>(a->q), static_cast<float*>(a->out));
    else attend_all(*step, *a, static_cast<const bf16*>(a->q), static_cast<bf16*>(a->out));
}
BITTRUE_REPLAYABLE(attention)
