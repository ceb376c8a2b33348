// Attention of each token over its own ordered rows: rows to the lanes for the logits, features for the values.
//
// Tokens of one sequence that follow each other form a tile: it decodes the rows they share once. A row has a slot: window
// rows by position, so that slot mod 16 is position mod 16 in every tile, then, from a multiple of 16 on, the entries in
// list order. Every logit is one chain over the features (dots.h); a denominator is sixteen partial sums by slot mod 16 and
// a tree; an output is one chain over the rows, in pairs of slots 2 i, 2 i + 1 with the second first. None of this depends
// on tiles, neighbours or threads. Norm and rotations are those of rms_norm and rope, row by row.
#include "dots.h"
#include "step.h"

namespace {

constexpr int64_t HCA_RATIO = 128;
constexpr int64_t TILE_COLUMNS = 64;       // (token, head) of a tile, unless one token has more heads
constexpr int64_t TILE_TOKENS = 16;
constexpr int64_t KEPT_WORDS = 256 * 1024; // rows up to this size are decoded once, longer lists once per use
constexpr int64_t BLOCK_WORDS = 16;        // words of a row to a step of the values: two vectors of features
#if BITTRUE_ISA_CODE == 2
constexpr int64_t VALUE_COLUMNS = 4, VALUE_BLOCKS = 2;
#else
constexpr int64_t VALUE_COLUMNS = 2, VALUE_BLOCKS = 1;
#endif

thread_local Scratch tiles_scratch, list_scratch, rows_scratch, query_scratch, logits_scratch, out_scratch;  // of a tile's thread
thread_local Scratch block_scratch, columns_scratch, turned_scratch;

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

// Tokens first..first+count of one sequence and where their rows stand.
struct Tile {
    int64_t first, count;
    int64_t origin;        // position of slot 0
    int64_t window_slots;  // slots of the window, then of the entries; both multiples of 16
    int64_t entry_slots;
    bool owns_entries;     // each token has its own entries (CSA), else they share them (HCA)
    const uint8_t** list;  // row of each slot, null where there is none; own entries token after token
    int64_t entries[TILE_TOKENS];  // of each token

    BT int64_t slots() const { return window_slots + entry_slots; }
    BT int64_t num_rows() const { return window_slots + entry_slots * (owns_entries ? count : 1); }
    // Where the row of a slot of token i stands in the list.
    BT int64_t place(int64_t i, int64_t slot) const {
        return slot + (owns_entries && slot >= window_slots ? i * entry_slots : 0);
    }
};

struct Range { int64_t from, to; };

BT Range window_range(const Step& step, const Attention& a, const Tile& tile, int64_t i) {
    const int64_t position = step.positions[tile.first + i], oldest = position - a.window + 1;
    return {(oldest > 0 ? oldest : 0) - tile.origin, position + 1 - tile.origin};
}

BT int64_t num_entries(const Step& step, const Attention& a, int64_t t) {
    if (a.pages == nullptr) return 0;
    if (a.ids == nullptr) return (step.positions[t] + 1) / HCA_RATIO;
    int64_t n = 0;
    while (n < a.num_ids && a.ids[t * a.num_ids + n] >= 0) ++n;
    return n;
}

BT Range entry_range(const Tile& tile, int64_t i) { return {tile.window_slots, tile.window_slots + tile.entries[i]}; }

Tile make_tile(const Step& step, const Attention& a, int64_t first, int64_t count) {
    const int64_t s = step.seq_ids[first], position = step.positions[first], last = position + count - 1;
    const int64_t oldest = position - a.window + 1 > 0 ? position - a.window + 1 : 0, bytes = a.row.bytes();
    Tile tile{first, count, oldest / 16 * 16, 0, 0, a.pages != nullptr && a.ids != nullptr, nullptr, {}};
    tile.window_slots = pad16(last + 1 - tile.origin);
    for (int64_t i = 0; i < count; ++i) {
        tile.entries[i] = num_entries(step, a, first + i);
        const int64_t n = pad16(tile.entries[i]);
        tile.entry_slots = n > tile.entry_slots ? n : tile.entry_slots;
    }
    tile.list = list_scratch.get<const uint8_t*>(tile.num_rows());
    std::memset(tile.list, 0, size_t(tile.num_rows()) * sizeof(*tile.list));
    const uint8_t* ring = a.window_rows + step.slots[s] * a.ring * bytes;
    for (int64_t p = oldest; p <= last; ++p)
        tile.list[p - tile.origin] = p >= step.starts[s] ? a.step_rows + (step.offsets[s] + p - step.starts[s]) * bytes
                                                         : ring + p % a.ring * bytes;
    const Pages pages{a.pages, a.per_page, bytes};
    const uint8_t** entries = tile.list + tile.window_slots;
    if (tile.owns_entries)
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < tile.entries[i]; ++j)
                entries[i * tile.entry_slots + j] = pages.entry(step, s, a.ids[(first + i) * a.num_ids + j]);
    else
        for (int64_t e = 0; e < tile.entries[count - 1]; ++e) entries[e] = pages.entry(step, s, e);
    return tile;
}

// ---- rows

// What the words of rows and columns take.
template <Words W> struct Widths {
    int64_t pairs, words;  // of a dot product
    int64_t row;           // words of a decoded row, zeros after its features: a multiple of what the values step over
    int64_t query;         // words of a query

    explicit Widths(int64_t c) : pairs((c + 1) / 2), words(W == Words::F32 ? 2 * pairs : pairs) {
        row = W == Words::F32 ? (c + 31) / 32 * 32 : pad16(pairs);
        query = W == Words::PAIRS ? pad16(pairs) : pad16(2 * pairs);
    }
    BT int64_t features() const { return W == Words::F32 ? row : 2 * row; }
};
template <Words W> constexpr int64_t STEP_WORDS = W == Words::F32 ? 2 * BLOCK_WORDS : BLOCK_WORDS;  // 32 features

// Words from..to of a row. Pairs: features 2 from .. 2 to.
template <Words W> inline void decode_row(const uint8_t* row, const RowSpec& spec, int64_t from, int64_t to, int32_t* out) {
    if (row == nullptr) {
        std::memset(out, 0, size_t(to - from) * 4);
        return;
    }
    if constexpr (W == Words::F32) {
        float* values = turned_scratch.get<float>(pad16(spec.dim) + 32);
        unpack_row(row, values, spec);
        for (int64_t i = spec.dim; i < to; ++i) values[i] = 0.0f;
        std::memcpy(out, values + from, size_t(to - from) * 4);
    } else {
        pairs_row(row, spec, 2 * from, 2 * to, out);
    }
}

// Rows lie anywhere, so the processor does not foresee them: the `left` rows of the list are fetched ahead of their turn.
template <Words W>
void decode_rows(const uint8_t* const* list, int64_t num, int64_t left, const RowSpec& spec, int64_t from, int64_t to, int32_t* out) {
    const int64_t bytes = spec.bytes(), width = W == Words::F32 ? to - from : 2 * (to - from);
    // About the part of the row that is read, and its end, where the scales are.
    const int64_t first = spec.kind == ROW_FP8 ? 2 * from : bytes * from / (W == Words::F32 ? spec.dim : (spec.dim + 1) / 2), part = width >= spec.dim ? bytes : bytes * width / spec.dim + 64;
    const int64_t ahead = part > 256 ? 4 : 16;
    for (int64_t j = 0; j < num; ++j) {
        if (j + ahead < left && list[j + ahead] != nullptr) {
            const uint8_t* next = list[j + ahead];
            for (int64_t i = first; i < first + part && i < bytes; i += 64) __builtin_prefetch(next + i);
            __builtin_prefetch(next + bytes - 1);
        }
        decode_row<W>(list[j], spec, from, to, out + j * (to - from));
    }
}

// ---- logits

template <Words W, int64_t V>
BT void logit_vectors(const int32_t* columns, const int32_t* queries, int64_t num, const Widths<W>& widths, f32x16 scale,
                      float* logits, int64_t slots) {
    int64_t q = 0;
    for (; q + TILE_QUERIES <= num; q += TILE_QUERIES) {
        f32x16 sums[TILE_QUERIES * V];
        for (int64_t i = 0; i < TILE_QUERIES * V; ++i) sums[i] = zero();
        dot_tile<W, V, TILE_QUERIES>(columns, BLOCK_ROWS, queries + q * widths.query, widths.query, widths.pairs, sums);
        for (int64_t i = 0; i < TILE_QUERIES; ++i)
            for (int64_t v = 0; v < V; ++v) store(logits + (q + i) * slots + 16 * v, mul(sums[i * V + v], scale));
    }
    for (; q < num; ++q) {
        f32x16 sums[V];
        for (int64_t v = 0; v < V; ++v) sums[v] = zero();
        dot_tile<W, V, 1>(columns, BLOCK_ROWS, queries + q * widths.query, widths.query, widths.pairs, sums);
        for (int64_t v = 0; v < V; ++v) store(logits + q * slots + 16 * v, mul(sums[v], scale));
    }
}

// Logits of the queries of one token over the vectors v0..v1 of a transposed block.
template <Words W>
void logit_block(const int32_t* columns, int64_t v0, int64_t v1, const int32_t* queries, int64_t num, const Widths<W>& widths,
                 f32x16 scale, float* logits, int64_t slots) {
    int64_t v = v0;
    for (; v + ROW_VECTORS <= v1; v += ROW_VECTORS)
        logit_vectors<W, ROW_VECTORS>(columns + 16 * v, queries, num, widths, scale, logits + 16 * v, slots);
    if constexpr (ROW_VECTORS > 2)
        for (; v + 2 <= v1; v += 2) logit_vectors<W, 2>(columns + 16 * v, queries, num, widths, scale, logits + 16 * v, slots);
    for (; v < v1; ++v) logit_vectors<W, 1>(columns + 16 * v, queries, num, widths, scale, logits + 16 * v, slots);
}

// ---- softmax

// One column's logits over its two ranges become numerators; returns their sum with the sink's. PAIRS: bf16 in the first half
// of the column's room; ROUND: rounded to bf16, and what dots.h flushes is 0.
template <bool PAIRS, bool ROUND> float softmax_column(float* logits, Range window, Range entries, float sink) {
    const Range ranges[2] = {window, entries};
    const f32x16 least = set1(-__builtin_inff());
    auto inside = [](f32x16 x, const Range& range, int64_t s, f32x16 other) {
        if (s >= range.from && s + 16 <= range.to) return x;
        const int64_t from = range.from - s, to = range.to - s;
        x = select(lanes_below(to < 16 ? to : 16), x, other);
        return from > 0 ? select(lanes_below(from), other, x) : x;
    };
    f32x16 top = least;
    for (const Range& range : ranges)
        for (int64_t s = range.from / 16 * 16; s < range.to; s += 16) top = max(top, inside(load(logits + s), range, s, least));
    const float m = hmax(top);
    f32x16 sum = zero();
    bf16* halves = reinterpret_cast<bf16*>(logits);
    for (const Range& range : ranges)
        for (int64_t s = range.from / 16 * 16; s < range.to; s += 16) {
            f32x16 p = inside(exp(sub(load(logits + s), set1(m))), range, s, zero());
            sum = add(sum, p);
            if constexpr (ROUND) {
                bf16 rounded[16];
                store(rounded, p);
                p = flushed(load(rounded));
            }
            if constexpr (PAIRS) store(halves + s, p);
            else store(logits + s, p);
        }
    float last[16];
    store(last, exp(sub(set1(sink), set1(m))));
    return hsum(sum) + last[0];
}

// ---- values

// One row into the sums of H columns: 32 B features, their vectors as value_tile has them.
template <Words W, bool PAIRS, int64_t H, int64_t B>
BT void value_row(const int32_t* row, const void* const* probs, int64_t slot, f32x16* sums) {
    f32x16 x[2 * B];
    for (int64_t b = 0; b < B; ++b) {
        const i32x16 words = load(row + b * STEP_WORDS<W>);
        x[2 * b] = W == Words::F32 ? as_float(words) : low_of(words);
        x[2 * b + 1] = W == Words::F32 ? as_float(load(row + b * STEP_WORDS<W> + 16)) : high_of(words);
    }
    for (int64_t h = 0; h < H; ++h) {
        const f32x16 p = set1(PAIRS ? to_float(static_cast<const bf16*>(probs[h])[slot]) : static_cast<const float*>(probs[h])[slot]);
        for (int64_t i = 0; i < 2 * B; ++i) sums[h * 2 * B + i] = fma(x[i], p, sums[h * 2 * B + i]);
    }
}

// The rows of slots from..to into the sums of H columns. rows: of slot 0, `stride` words apart. PAIRS: numerators are bf16.
template <Words W, bool PAIRS, int64_t H, int64_t B>
BT void value_tile(const int32_t* rows, int64_t stride, Range range, const void* const* probs, float* out, int64_t out_stride) {
    f32x16 sums[H * 2 * B];
    for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < 2 * B; ++i) sums[h * 2 * B + i] = load(out + h * out_stride + 16 * i);
    int64_t s = range.from;
    if (s < range.to && s % 2 == 1) {
        value_row<W, PAIRS, H, B>(rows + s * stride, probs, s, sums);
        ++s;
    }
    for (; s + 2 <= range.to; s += 2) {
        const int32_t *first = rows + s * stride, *second = first + stride;
        if constexpr (PAIRS) {
            i32x16 even[B], odd[B];  // features, of both rows
            for (int64_t b = 0; b < B; ++b) {
                const i32x16 x = load(first + b * 16), y = load(second + b * 16);
                even[b] = bit_or(bit_and(x, set1(int32_t(0xffff))), shift_left<16>(y));
                odd[b] = bit_or(shift_right<16>(x), bit_and(y, set1(int32_t(0xffff0000))));
            }
            for (int64_t h = 0; h < H; ++h) {
                int32_t both;
                std::memcpy(&both, static_cast<const bf16*>(probs[h]) + s, 4);
                const i32x16 p = set1(both);
                for (int64_t b = 0; b < B; ++b) {
                    sums[(h * B + b) * 2] = dot_pairs(sums[(h * B + b) * 2], even[b], p);
                    sums[(h * B + b) * 2 + 1] = dot_pairs(sums[(h * B + b) * 2 + 1], odd[b], p);
                }
            }
        } else {
            value_row<W, false, H, B>(second, probs, s + 1, sums);
            value_row<W, false, H, B>(first, probs, s, sums);
        }
    }
    if (s < range.to) value_row<W, PAIRS, H, B>(rows + s * stride, probs, s, sums);
    for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < 2 * B; ++i) store(out + h * out_stride + 16 * i, sums[h * 2 * B + i]);
}

template <Words W, bool PAIRS, int64_t B>
void value_columns(const int32_t* rows, int64_t stride, Range range, const float* logits, int64_t slots, int64_t num, float* out,
                   int64_t out_stride) {
    const void* probs[VALUE_COLUMNS];
    int64_t h = 0;
    for (; h + VALUE_COLUMNS <= num; h += VALUE_COLUMNS) {
        for (int64_t i = 0; i < VALUE_COLUMNS; ++i) probs[i] = logits + (h + i) * slots;
        value_tile<W, PAIRS, VALUE_COLUMNS, B>(rows, stride, range, probs, out + h * out_stride, out_stride);
    }
    for (; h < num; ++h) {
        probs[0] = logits + h * slots;
        value_tile<W, PAIRS, 1, B>(rows, stride, range, probs, out + h * out_stride, out_stride);
    }
}

// ---- one tile

template <Words W, class T> struct Work {
    const Step& step;
    const Attention& a;
    const Tile& tile;
    Widths<W> widths;
    int32_t *queries, *kept;     // kept: all rows decoded, or null
    float *logits, *sums, *totals;

    BT int64_t columns() const { return tile.count * a.num_heads; }

    void query(int64_t column) const {
        const int64_t t = tile.first + column / a.num_heads, c = a.row.dim, angles = t * a.rope_dim / 2;
        T* row = turned_scratch.get<T>(c);
        rms_norm_row<T, float>(static_cast<const T*>(a.q) + (tile.first * a.num_heads + column) * c, nullptr, row, c, float(a.norm_eps));
        rope_row(row, row, c, a.rope_dim, a.cos + angles, a.sin + angles, false);
        query_words<W>(row, c, queries + column * widths.query, widths.query);
    }

    BT Range range(int64_t i, bool of_entries) const {
        return of_entries ? entry_range(tile, i) : window_range(step, a, tile, i);
    }

    // Logits over the slots from..to, of all tokens or (own entries) of token `only`.
    void logits_of(int64_t from, int64_t to, int64_t only) const {
        const int64_t num = to - from, place = tile.place(only, from);
        int32_t* rows = kept != nullptr ? kept + place * widths.row : block_scratch.get<int32_t>(BLOCK_ROWS * widths.row);
        decode_rows<W>(tile.list + place, num, tile.num_rows() - place, a.row, 0, widths.row, rows);
        int32_t* transposed = columns_scratch.get<int32_t>(BLOCK_ROWS * widths.words);
        for (int64_t j = 0; j < num; j += 16) {
            const int32_t* own[16];
            for (int64_t i = 0; i < 16; ++i) own[i] = rows + (j + i) * widths.row;
            transpose_rows<false>(own, widths.words, transposed + j, BLOCK_ROWS);
        }
        const bool of_entries = from >= tile.window_slots, is_own = of_entries && tile.owns_entries;
        for (int64_t i = is_own ? only : 0; i < (is_own ? only + 1 : tile.count); ++i) {
            const Range own = range(i, of_entries);
            const int64_t low = own.from > from ? own.from : from, high = own.to < to ? own.to : to;
            if (low >= high) continue;
            const int64_t column = i * a.num_heads;
            logit_block<W>(transposed, (low - from) / 16, (high - from + 15) / 16, queries + column * widths.query, a.num_heads,
                           widths, set1(float(a.scale)), logits + column * tile.slots() + from, tile.slots());
        }
    }

    void softmax(int64_t column) const {
        const int64_t i = column / a.num_heads;
        float* own = logits + column * tile.slots();
        const Range window = range(i, false), entries = range(i, true);
        const float sink = a.sink[column % a.num_heads];
        if (a.round_probs == 0) totals[column] = softmax_column<false, false>(own, window, entries, sink);
        else if (W == Words::F32) totals[column] = softmax_column<false, true>(own, window, entries, sink);
        else totals[column] = softmax_column<W == Words::PAIRS, true>(own, window, entries, sink);
    }

    // The sums of B steps of words, from word `at`, over the slots from..to of all tokens or of token `only`.
    template <int64_t B> void values_of(int64_t at, int64_t from, int64_t to, int64_t only) const {
        const int64_t place = tile.place(only, from), slots = tile.slots(), width = B * STEP_WORDS<W>;
        const int32_t* rows;
        int64_t stride = widths.row;
        if (kept != nullptr) {
            rows = kept + place * widths.row + at;
        } else {
            int32_t* block = block_scratch.get<int32_t>(BLOCK_ROWS * width);
            decode_rows<W>(tile.list + place, to - from, tile.num_rows() - place, a.row, at, at + width, block);
            rows = block, stride = width;
        }
        const bool of_entries = from >= tile.window_slots, is_own = of_entries && tile.owns_entries;
        const int64_t feature = W == Words::F32 ? at : 2 * at, features = widths.features();
        for (int64_t i = is_own ? only : 0; i < (is_own ? only + 1 : tile.count); ++i) {
            Range own = range(i, of_entries);
            own.from = own.from > from ? own.from : from, own.to = own.to < to ? own.to : to;
            if (own.from >= own.to) continue;
            const int64_t column = i * a.num_heads;
            const float* probs = logits + column * slots;
            float* out = sums + column * features + feature;
            const int32_t* origin = rows - from * stride;
            if (W == Words::PAIRS && a.round_probs != 0)
                value_columns<W, W == Words::PAIRS, B>(origin, stride, own, probs, slots, a.num_heads, out, features);
            else
                value_columns<W, false, B>(origin, stride, own, probs, slots, a.num_heads, out, features);
        }
    }

    template <int64_t B> void values(int64_t at) const {
        const int64_t step_slots = kept != nullptr ? tile.slots() + 16 : BLOCK_ROWS;
        for (int64_t from = 0; from < tile.window_slots; from += step_slots)
            values_of<B>(at, from, from + step_slots < tile.window_slots ? from + step_slots : tile.window_slots, 0);
        for (int64_t i = 0; i < (tile.owns_entries ? tile.count : 1); ++i)
            for (int64_t from = tile.window_slots; from < tile.slots(); from += step_slots)
                values_of<B>(at, from, from + step_slots < tile.slots() ? from + step_slots : tile.slots(), i);
    }

    void finish(int64_t column) const {
        const int64_t c = a.row.dim, angles = (tile.first + column / a.num_heads) * a.rope_dim / 2;
        const float* own = sums + column * widths.features();
        T* out = static_cast<T*>(a.out) + (tile.first * a.num_heads + column) * c;
        const f32x16 total = set1(totals[column]);
        for (int64_t d = 0; d < c; d += 32) {
            const f32x16 x = div(load(own + d), total), y = div(load(own + d + 16), total);
            float low[16], high[16], both[32];
            store(low, x), store(high, y);
            for (int64_t i = 0; i < 16; ++i) {
                both[W == Words::F32 ? i : 2 * i] = low[i];
                both[W == Words::F32 ? 16 + i : 2 * i + 1] = high[i];
            }
            store_n(out + d, load(both), c - d < 16 ? c - d : 16);
            if (c - d > 16) store_n(out + d + 16, load(both + 16), c - d < 32 ? c - d - 16 : 16);
        }
        // Keys are values, so the output carries the rotation of the rows it read: undone at the query's position.
        rope_row(out, out, c, a.rope_dim, a.cos + angles, a.sin + angles, true);
    }
};

template <Words W, class T> void attend(const Step& step, const Attention& a, int64_t first, int64_t count) {
    const Tile tile = make_tile(step, a, first, count);
    const Widths<W> widths(a.row.dim);
    const int64_t columns = count * a.num_heads, slots = tile.slots(), features = widths.features();
    const bool keeps = tile.num_rows() * widths.row <= KEPT_WORDS;
    float* logits = logits_scratch.get<float>(columns * (slots + features + 1));
    const Work<W, T> work{step, a, tile, widths, query_scratch.get<int32_t>(columns * widths.query),
                          keeps ? rows_scratch.get<int32_t>(tile.num_rows() * widths.row) : nullptr,
                          logits, logits + columns * slots, logits + columns * (slots + features)};
    std::memset(work.sums, 0, size_t(columns * features) * 4);
    // Alone in its loop, a tile's work is shared within it.
    const int64_t products = columns * slots * a.row.dim / 16;
    PARALLEL_FOR(i, columns, columns * a.row.dim) { work.query(i); };
    const int64_t window_blocks = (tile.window_slots + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t entry_blocks = (tile.entry_slots + BLOCK_ROWS - 1) / BLOCK_ROWS;
    PARALLEL_FOR(i, window_blocks + entry_blocks * (tile.owns_entries ? count : 1), products) {
        const bool of_entries = i >= window_blocks;
        const int64_t block = of_entries ? (i - window_blocks) % entry_blocks : i, end = of_entries ? slots : tile.window_slots;
        const int64_t from = block * BLOCK_ROWS + (of_entries ? tile.window_slots : 0);
        work.logits_of(from, from + BLOCK_ROWS < end ? from + BLOCK_ROWS : end, of_entries ? (i - window_blocks) / entry_blocks : 0);
    };
    PARALLEL_FOR(i, columns, columns * slots) { work.softmax(i); };
    const int64_t unit = VALUE_BLOCKS * STEP_WORDS<W>;
    PARALLEL_FOR(i, (widths.row + unit - 1) / unit, products) {
        if (i * unit + unit <= widths.row) work.template values<VALUE_BLOCKS>(i * unit);
        else work.template values<1>(i * unit);
    };
    PARALLEL_FOR(i, columns, columns * a.row.dim) { work.finish(i); };
}

template <Words W, class T> void attend_all(const Step& step, const Attention& a) {
    int64_t most = TILE_COLUMNS / a.num_heads;
    most = most < 1 ? 1 : most > TILE_TOKENS ? TILE_TOKENS : most;
    Range* tiles = tiles_scratch.get<Range>(step.num_tokens);
    int64_t num = 0;
    for (int64_t t = 0; t < step.num_tokens; ++num) {
        tiles[num] = {t, t + 1};
        for (++t; t < step.num_tokens && t - tiles[num].from < most && step.seq_ids[t] == step.seq_ids[t - 1]; ++t) tiles[num].to = t + 1;
    }
    if (num < bittrue_threads()) {
        for (int64_t i = 0; i < num; ++i) attend<W, T>(step, a, tiles[i].from, tiles[i].to - tiles[i].from);
        return;
    }
    PARALLEL_FOR(i, num, step.num_tokens * a.num_heads * a.row.dim * a.window / 8) {
        attend<W, T>(step, a, tiles[i].from, tiles[i].to - tiles[i].from);
    };
}

}  // namespace

// q, out [T, N, c]; cos, sin [T, rope_dim / 2].
BITTRUE_EXPORT(attention)(const Step* step, const Attention* a) {
    if (a->act == 0) return attend_all<Words::F32, float>(*step, *a);
    if (a->row.kind == ROW_F32) return attend_all<Words::F32, bf16>(*step, *a);
    if (has_dot_pairs()) return attend_all<Words::PAIRS, bf16>(*step, *a);
    attend_all<Words::MIXED, bf16>(*step, *a);
}
BITTRUE_REPLAYABLE(attention)
