// What the backward kernels of the cache ops share: documents cut into blocks of queries, and tiles of f32 matrix products.
//
// A block is up to BLOCK_QUERIES queries of one document, its columns are (query, head) pairs. Blocks that follow each other form
// a group, at most MOST_GROUPS a document whatever its length: sums over queries are made group by group, each in its own memory,
// and added in order. None of this depends on the number of threads. Sums over features, rows or columns are fma chains, ascending.
#pragma once

#include "dots.h"

#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

constexpr int64_t BLOCK_QUERIES = 64;
constexpr int64_t MOST_GROUPS = 16;
constexpr int64_t TILE_HEADS = 4;  // heads of a query that are worked on together
constexpr int64_t TILE = 4;        // rows of a tile of a product
constexpr int64_t PANEL = 64;      // rows to a transposed panel
constexpr int64_t CHUNK = 64;      // columns added to the rows at a time: they stay in the first-level cache

BT int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BT int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
BT int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Range { int64_t from, to; };
BT Range overlap(Range a, Range b) { return {larger(a.from, b.from), smaller(a.to, b.to)}; }

// ---- products

// out[i][j] (+)= sum_k a[i * a_row + k * a_step] * b[k * b_row + j], i < R, j < 16 V
template <bool ADD, int R, int V>
BT void product_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t n, float* out, int64_t out_row) {
    f32x16 sums[R][V];
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int v = 0; v < V; ++v) sums[i][v] = ADD ? load(out + i * out_row + 16 * v) : zero();
    for (int64_t k = 0; k < n; ++k, a += a_step, b += b_row) {
        f32x16 x[V];
        UNROLL for (int v = 0; v < V; ++v) x[v] = load(b + 16 * v);
        UNROLL for (int i = 0; i < R; ++i) {
            const f32x16 f = set1(a[i * a_row]);
            UNROLL for (int v = 0; v < V; ++v) sums[i][v] = fma(f, x[v], sums[i][v]);
        }
    }
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int v = 0; v < V; ++v) store(out + i * out_row + 16 * v, sums[i][v]);
}

// The same over `vectors` vectors of features.
template <bool ADD, int R>
inline void product_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t n, float* out,
                         int64_t out_row, int64_t vectors) {
    int64_t v = 0;
    for (; v + ROW_VECTORS <= vectors; v += ROW_VECTORS)
        product_tile<ADD, R, ROW_VECTORS>(a, a_row, a_step, b + 16 * v, b_row, n, out + 16 * v, out_row);
    for (; v < vectors; ++v) product_tile<ADD, R, 1>(a, a_row, a_step, b + 16 * v, b_row, n, out + 16 * v, out_row);
}

template <bool ADD>
inline void product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t n, float* out,
                    int64_t out_row, int64_t vectors) {
    if (rows == 4) product_rows<ADD, 4>(a, a_row, a_step, b, b_row, n, out, out_row, vectors);
    else if (rows == 3) product_rows<ADD, 3>(a, a_row, a_step, b, b_row, n, out, out_row, vectors);
    else if (rows == 2) product_rows<ADD, 2>(a, a_row, a_step, b, b_row, n, out, out_row, vectors);
    else product_rows<ADD, 1>(a, a_row, a_step, b, b_row, n, out, out_row, vectors);
}

// rows [n, c], c a multiple of 16, to panels [n / PANEL][c][PANEL]; whole vectors of slots are written, zeros beyond n.
inline void transpose_panels(const float* rows, int64_t n, int64_t c, float* panels) {
    for (int64_t s = 0; s < n; s += 16)
        for (int64_t f = 0; f < c; f += 16) {
            i32x16 block[16];
            for (int64_t i = 0; i < 16; ++i) block[i] = as_int(s + i < n ? load(rows + (s + i) * c + f) : zero());
            transpose16(block);
            float* out = panels + s / PANEL * PANEL * c + f * PANEL + s % PANEL;
            for (int64_t i = 0; i < 16; ++i) store(out + i * PANEL, as_float(block[i]));
        }
}

// ---- one row of a sum that many columns add to

// row(id)[j] += sum_h (a_h[i] * x_h[j] + b_h[i] * y_h[j]), h < H, for each i < n, id = ids[i], features 0..16 V.
// x, y: H rows of c; a, b: H rows of `stride`. Without PAIRS only a and x.
template <bool PAIRS, int H, int V>
BT void scatter_tile(const int32_t* ids, int64_t n, const float* a, const float* b, int64_t stride, const float* x, const float* y,
                     int64_t c, float* rows) {
    f32x16 xs[H][V], ys[H][V];
    UNROLL for (int h = 0; h < H; ++h)
        UNROLL for (int v = 0; v < V; ++v) {
            xs[h][v] = load(x + h * c + 16 * v);
            ys[h][v] = PAIRS ? load(y + h * c + 16 * v) : zero();
        }
    for (int64_t i = 0; i < n; ++i) {
        float* row = rows + ids[i] * c;
        f32x16 sums[V];
        UNROLL for (int v = 0; v < V; ++v) sums[v] = load(row + 16 * v);
        UNROLL for (int h = 0; h < H; ++h) {
            const f32x16 f = set1(a[h * stride + i]);
            UNROLL for (int v = 0; v < V; ++v) sums[v] = fma(f, xs[h][v], sums[v]);
            if constexpr (PAIRS) {
                const f32x16 g = set1(b[h * stride + i]);
                UNROLL for (int v = 0; v < V; ++v) sums[v] = fma(g, ys[h][v], sums[v]);
            }
        }
        UNROLL for (int v = 0; v < V; ++v) store(row + 16 * v, sums[v]);
    }
}

template <bool PAIRS, int H>
inline void scatter_heads(const int32_t* ids, int64_t n, const float* a, const float* b, int64_t stride, const float* x, const float* y,
                          int64_t c, float* rows) {
    constexpr int V = BITTRUE_ISA_CODE == 2 ? 2 : 1;
    int64_t f = 0;
    for (; f + 16 * V <= c; f += 16 * V) scatter_tile<PAIRS, H, V>(ids, n, a, b, stride, x + f, y + f, c, rows + f);
    for (; f < c; f += 16) scatter_tile<PAIRS, H, 1>(ids, n, a, b, stride, x + f, y + f, c, rows + f);
}

template <bool PAIRS>
inline void scatter(int64_t heads, const int32_t* ids, int64_t n, const float* a, const float* b, int64_t stride, const float* x,
                    const float* y, int64_t c, float* rows) {
    if (heads == 4) scatter_heads<PAIRS, 4>(ids, n, a, b, stride, x, y, c, rows);
    else if (heads == 3) scatter_heads<PAIRS, 3>(ids, n, a, b, stride, x, y, c, rows);
    else if (heads == 2) scatter_heads<PAIRS, 2>(ids, n, a, b, stride, x, y, c, rows);
    else scatter_heads<PAIRS, 1>(ids, n, a, b, stride, x, y, c, rows);
}

// ---- documents

struct Group {
    Range rows;      // queries, as rows of the batch
    Range document;  // of the whole document
    Range entries;   // of the whole document
    int64_t index, count;  // which of the document's groups
    int64_t rows_at, entries_at;  // where its partial sums are, in rows
    int64_t touched;  // entries 0..touched of the document are added to
    int64_t is_bad;   // an id names no entry

    BT int64_t oldest(int64_t window) const { return larger(document.from, rows.from - window + 1); }
};

BT int64_t most_groups(const int32_t* offsets, int64_t num_sequences) {
    return offsets[num_sequences] / BLOCK_QUERIES + num_sequences;
}

// Writes the groups of all documents; returns how many. Sizes of the partial sums: rows with `window` - 1 before them, entries.
inline int64_t make_groups(const int32_t* offsets, int64_t num_sequences, int64_t ratio, int64_t window, Group* groups,
                           int64_t* partial_rows, int64_t* partial_entries) {
    int64_t num = 0, entries = 0;
    *partial_rows = *partial_entries = 0;
    for (int64_t s = 0; s < num_sequences; ++s) {
        const Range document{offsets[s], offsets[s + 1]};
        const int64_t length = document.to - document.from, own = length / ratio;
        const int64_t blocks = (length + BLOCK_QUERIES - 1) / BLOCK_QUERIES, each = (blocks + MOST_GROUPS - 1) / MOST_GROUPS;
        const int64_t count = blocks == 0 ? 0 : (blocks + each - 1) / each;
        for (int64_t i = 0; i < count; ++i, ++num) {
            const int64_t from = document.from + i * each * BLOCK_QUERIES;
            groups[num] = {{from, smaller(from + each * BLOCK_QUERIES, document.to)}, document, {entries, entries + own}, i, count,
                           *partial_rows, *partial_entries, 0, 0};
            if (count == 1) continue;  // its sums are the results
            *partial_rows += groups[num].rows.to - groups[num].oldest(window);
            *partial_entries += own;
        }
        entries += own;
    }
    return num;
}

// The entries of one query's list that are there, in its order, and the largest id + 1. An id of no entry of the document is left
// out and told.
inline int64_t read_ids(const int32_t* ids, int64_t k, int64_t num_entries, int32_t* found, int32_t* places, int64_t* end, int64_t* is_bad) {
    int64_t n = 0, last = k;
    *end = 0;
    while (last >= 16 && greater_bits(load(ids + last - 16), set1(int32_t(-1))) == 0) last -= 16;  // lists end in many -1
    for (int64_t i = 0; i < last; ++i) {
        if (ids[i] < 0) continue;
        if (ids[i] >= num_entries) {
            *is_bad = 1;
            continue;
        }
        found[n] = ids[i], places[n++] = int32_t(i);
        *end = larger(*end, ids[i] + 1);
    }
    return n;
}

// out[i] = sum of n parts, in order; part j is parts[j] or null.
inline void add_parts(const float* const* parts, int64_t n, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
        f32x16 sum = zero();
        for (int64_t j = 0; j < n; ++j)
            if (parts[j] != nullptr) sum = add(sum, load(parts[j] + i));
        store(out + i, sum);
    }
}

// The share of group g in adding its document's entries: out [entries, c] of all documents.
inline void reduce_entries(const Group* g, const float* partial, int64_t c, float* out) {
    const Group* first = g - g->index;
    const int64_t num = g->entries.to - g->entries.from;
    for (int64_t e = num * g->index / g->count; e < num * (g->index + 1) / g->count; ++e) {
        const float* parts[MOST_GROUPS];
        for (int64_t j = 0; j < g->count; ++j) parts[j] = e < first[j].touched ? partial + (first[j].entries_at + e) * c : nullptr;
        add_parts(parts, g->count, out + (g->entries.from + e) * c, c);
    }
}

// The rows of group g itself: what it and the groups after it have added.
inline void reduce_rows(const Group* g, const float* partial, int64_t window, int64_t c, float* out) {
    const int64_t after = g->count - g->index;
    for (int64_t r = g->rows.from; r < g->rows.to; ++r) {
        const float* parts[MOST_GROUPS];
        int64_t n = 0;
        for (; n < after && g[n].oldest(window) <= r; ++n) parts[n] = partial + (g[n].rows_at + r - g[n].oldest(window)) * c;
        add_parts(parts, n, out + r * c, c);
    }
}

}  // namespace
