// The derivative of attention over whole documents, block of queries by block.
//
// The logits of a block are computed again as a banded product with the rows it reads; entries are further columns of it where its
// queries read about the same ones, else each query gathers its own. Then, with P the probabilities and dS = P (dP - delta):
// d_q = dS R and d_rows = dS^T q + P^T d_out, the same band. For 4096 tokens of 4 heads of 64 and a window of 128: 1.3 Gflop in
// five products, bound by them.
#include "grad_tiles.h"

namespace {

thread_local Scratch groups_scratch, partial_scratch, sinks_scratch;  // of the caller
thread_local Scratch block_scratch, lists_scratch;                    // of a task's thread

// Laid out as AttentionGradArgs in ops/cpu/grad_cache.py. c is a multiple of 16.
struct AttentionGrad {
    const float *d_out, *q, *rows, *entries, *sink;
    const int32_t *ids, *offsets;
    int64_t num_sequences, heads, c, k, window, ratio;
    float *d_q, *d_rows, *d_entries, *d_sink, *mass;
    int64_t* is_bad;
    double scale;
};

// Takes parts of one piece of memory: counted first, given then.
struct Layout {
    char* base = nullptr;
    int64_t size = 0;
    template <class T> T* take(int64_t count) {
        T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + size);
        size += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return at;
    }
};

struct Block {
    const AttentionGrad& a;
    const Group& group;
    int64_t first, count, oldest;  // queries, and the first row they read
    float *d_rows, *d_entries, *d_sink;  // of row 0 of the batch, of entry 0 of the document

    int64_t window_slots = 0, entry_slots = 0, stride = 0;  // stride: of a column of p
    bool is_dense = false;     // all queries read entries 0, 1, .. in the same slots
    const float* pool = nullptr;  // the document's entries

    int32_t *lists = nullptr, *places = nullptr;  // [count, k]
    int64_t *listed = nullptr, *ends = nullptr;   // [count]: how many, and the largest id + 1
    int64_t* extents = nullptr;                   // [count]: slots of entries that are written, not descending
    float *masks = nullptr, *q = nullptr, *d_out = nullptr, *d_q = nullptr, *p = nullptr, *ds = nullptr;
    float *window_panels = nullptr, *entry_panels = nullptr, *gathered = nullptr, *shares = nullptr;

    int64_t heads = 0, head = 0;  // of this pass

    void read_lists(int64_t* touched, int64_t* is_bad);
    void plan();
    void lay_out(Layout& layout);
    void fill_masks() const;
    void load_columns() const;
    void logits() const;
    void softmax(int64_t i) const;
    void add_mass(int64_t i) const;
    void own_entries(int64_t i) const;
    void queries_of(const float* rows, int64_t slot0, bool of_entries) const;
    void rows_of(float* d, int64_t slot0, int64_t num, bool of_entries) const;
    void run();
    void run_parts();

    BT int64_t columns() const { return count * heads; }
    BT const float* row(int64_t slot) const { return a.rows + (oldest + slot) * a.c; }
    // Slots of the window that query i reads.
    BT Range window_of(int64_t i) const {
        return {larger(0, first + i - a.window + 1 - oldest), first + i + 1 - oldest};
    }
    // Queries of the columns of a tile.
    BT Range queries(int64_t column) const { return {column / heads, smaller(column + TILE - 1, columns() - 1) / heads + 1}; }
    // Slots that the queries of a tile read, of one part of the slots.
    BT Range slots_of(Range tile, bool of_entries) const {
        if (of_entries) return {0, extents[tile.to - 1]};
        return {window_of(tile.from).from, window_of(tile.to - 1).to};
    }
};

void Block::read_lists(int64_t* touched, int64_t* is_bad) {
    const int64_t num = a.entries == nullptr ? 0 : group.entries.to - group.entries.from;
    for (int64_t i = 0; i < count; ++i) {
        if (a.ids == nullptr) {
            listed[i] = ends[i] = smaller((first + i - group.document.from + 1) / a.ratio, num);
        } else {
            const int64_t t = first + i;
            listed[i] = read_ids(a.ids + t * a.k, a.k, num, lists + i * a.k, places + i * a.k, ends + i, is_bad);
        }
        *touched = larger(*touched, ends[i]);
    }
}

// Whether the entries are shared, and how many slots that takes.
void Block::plan() {
    constexpr int64_t GATHERING = 3;  // two rows gathered cost as much as three that are shared
    oldest = larger(group.document.from, first - a.window + 1);
    window_slots = rounded_up(first + count - oldest, PANEL);
    pool = a.entries == nullptr ? nullptr : a.entries + group.entries.from * a.c;
    int64_t all = 0, shared = 0, most = 0, end = 0;
    for (int64_t i = 0; i < count; ++i) {
        end = larger(end, ends[i]);
        all += listed[i], shared += end, most = larger(most, listed[i]);
    }
    is_dense = a.ids == nullptr || 2 * shared <= GATHERING * all;
    entry_slots = rounded_up(is_dense ? end : most, PANEL);
    end = 0;
    for (int64_t i = 0; i < count; ++i) {
        end = larger(end, ends[i]);
        extents[i] = is_dense ? end : listed[i];
    }
    stride = window_slots + entry_slots;
    if (stride / 16 % 2 == 0) stride += 16;  // columns of a power of two would share their places in the cache
}

void Block::lay_out(Layout& layout) {
    const int64_t most = count * smaller(a.heads, TILE_HEADS), gathers = is_dense ? 0 : entry_slots;
    masks = layout.take<float>(count * stride);
    q = layout.take<float>(most * a.c);
    d_out = layout.take<float>(most * a.c);
    d_q = layout.take<float>(most * a.c);
    p = layout.take<float>(most * stride);
    ds = layout.take<float>(most * stride);
    window_panels = layout.take<float>(window_slots * a.c);
    entry_panels = layout.take<float>(entry_slots * a.c);
    gathered = layout.take<float>(gathers * a.c);
    shares = layout.take<float>(entry_slots);
}

// 0 where a query reads the slot, else -inf.
void Block::fill_masks() const {
    const f32x16 none = set1(-__builtin_inff());
    for (int64_t i = 0; i < count; ++i) {
        float* mask = masks + i * stride;
        for (int64_t s = 0; s < stride; s += 16) store(mask + s, none);
        const Range own = window_of(i);
        for (int64_t s = own.from; s < own.to; ++s) mask[s] = 0.0f;
        mask += window_slots;
        for (int64_t j = 0; j < listed[i]; ++j) mask[is_dense && a.ids != nullptr ? lists[i * a.k + j] : j] = 0.0f;
    }
}

void Block::load_columns() const {
    const f32x16 scale = set1(float(a.scale));
    for (int64_t i = 0; i < count; ++i)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t from = ((first + i) * a.heads + head + h) * a.c, to = (i * heads + h) * a.c;
            for (int64_t f = 0; f < a.c; f += 16) {
                store(q + to + f, mul(load(a.q + from + f), scale));
                store(d_out + to + f, load(a.d_out + from + f));
            }
        }
    std::memset(d_q, 0, size_t(columns() * a.c) * 4);
}

// Logits and dP of all columns over the slots they share.
void Block::logits() const {
    for (const bool of_entries : {false, true}) {
        if (of_entries && !is_dense) continue;
        const float* panels = of_entries ? entry_panels : window_panels;
        const int64_t slot0 = of_entries ? window_slots : 0, num = of_entries ? entry_slots : window_slots;
        for (int64_t s = 0; s < num; s += PANEL, panels += PANEL * a.c)
            for (int64_t column = 0; column < columns(); column += TILE) {
                Range own = slots_of(queries(column), of_entries);
                own = overlap({own.from / 16 * 16, rounded_up(own.to, 16)}, {s, s + PANEL});
                if (own.from >= own.to) continue;
                const int64_t rows = smaller(TILE, columns() - column), at = column * stride + slot0 + own.from;
                const float* panel = panels + own.from - s;
                const int64_t vectors = (own.to - own.from) / 16;
                product<false>(rows, q + column * a.c, a.c, 1, panel, PANEL, a.c, p + at, stride, vectors);
                product<false>(rows, d_out + column * a.c, a.c, 1, panel, PANEL, a.c, ds + at, stride, vectors);
            }
    }
}

// The logits of query i become P, its dP become dS; its share of d_sink.
void Block::softmax(int64_t i) const {
    const float* mask = masks + i * stride;
    for (int64_t h = 0; h < heads; ++h) {
        // What the products read of this column: the slots of its tile.
        const Range tile = queries((i * heads + h) / TILE * TILE), window = slots_of(tile, false);
        const int64_t num = is_dense ? slots_of(tile, true).to : extents[i];
        const Range parts[2] = {{window.from / 16 * 16, rounded_up(window.to, 16)}, {window_slots, window_slots + rounded_up(num, 16)}};
        float *own_p = p + (i * heads + h) * stride, *own_ds = ds + (i * heads + h) * stride;
        f32x16 top = set1(-__builtin_inff());
        for (const Range& part : parts)
            for (int64_t s = part.from; s < part.to; s += 16) {
                const f32x16 x = add(load(own_p + s), load(mask + s));
                top = max(top, x);
                store(own_p + s, x);
            }
        const f32x16 m = set1(hmax(top));
        f32x16 sum = zero(), weighted = zero();
        for (const Range& part : parts)
            for (int64_t s = part.from; s < part.to; s += 16) {
                const f32x16 e = exp(sub(load(own_p + s), m));
                sum = add(sum, e);
                weighted = fma(e, load(own_ds + s), weighted);
                store(own_p + s, e);
            }
        float sinks[16];
        store(sinks, exp(sub(set1(a.sink[head + h]), m)));
        const float inverse = 1.0f / (hsum(sum) + sinks[0]), delta = hsum(weighted) * inverse;
        // A sink far above every logit takes all.
        d_sink[head + h] -= (sinks[0] > 3e38f ? 1.0f : sinks[0] * inverse) * delta;
        for (const Range& part : parts)
            for (int64_t s = part.from; s < part.to; s += 16) {
                const f32x16 share = mul(load(own_p + s), set1(inverse));
                store(own_p + s, share);
                store(own_ds + s, mul(share, sub(load(own_ds + s), set1(delta))));
            }
    }
}

void Block::add_mass(int64_t i) const {
    if (a.mass == nullptr) return;
    for (int64_t s = 0; s < extents[i]; s += 16) {
        f32x16 sum = zero();
        for (int64_t h = 0; h < heads; ++h) sum = add(sum, load(p + (i * heads + h) * stride + window_slots + s));
        store(shares + s, sum);
    }
    float* mass = a.mass + (first + i) * a.k;
    if (head == 0) std::memset(mass, 0, size_t(a.k) * 4);
    for (int64_t j = 0; j < listed[i]; ++j)
        mass[places[i * a.k + j]] += shares[is_dense ? lists[i * a.k + j] : j];
}

// All that query i does with entries of its own, its softmax included.
void Block::own_entries(int64_t i) const {
    const int64_t num = listed[i], vectors = rounded_up(num, 16) / 16;
    const int32_t* list = lists + i * a.k;
    for (int64_t j = 0; j < num; ++j) std::memcpy(gathered + j * a.c, pool + list[j] * a.c, size_t(a.c) * 4);
    transpose_panels(gathered, num, a.c, entry_panels);
    const int64_t at = i * heads * a.c, slot = i * heads * stride + window_slots;
    for (int64_t v = 0; v < vectors; v += PANEL / 16) {
        const float* panel = entry_panels + v * 16 * a.c;
        const int64_t part = smaller(PANEL / 16, vectors - v);
        product<false>(heads, q + at, a.c, 1, panel, PANEL, a.c, p + slot + 16 * v, stride, part);
        product<false>(heads, d_out + at, a.c, 1, panel, PANEL, a.c, ds + slot + 16 * v, stride, part);
    }
    softmax(i);
    product<true>(heads, ds + slot, stride, 1, gathered, a.c, num, d_q + at, a.c, a.c / 16);
    scatter<true>(heads, list, num, ds + slot, p + slot, stride, q + at, d_out + at, a.c, d_entries);
}

// d_q of all columns += dS times the rows of one part of the slots.
void Block::queries_of(const float* rows, int64_t slot0, bool of_entries) const {
    const int64_t num = slots_of({0, count}, of_entries).to;
    for (int64_t s = 0; s < num; s += PANEL)
        for (int64_t column = 0; column < columns(); column += TILE) {
            const Range own = overlap(slots_of(queries(column), of_entries), {s, s + PANEL});
            if (own.from >= own.to) continue;
            product<true>(smaller(TILE, columns() - column), ds + column * stride + slot0 + own.from, stride, 1, rows + own.from * a.c, a.c,
                          own.to - own.from, d_q + column * a.c, a.c, a.c / 16);
        }
}

// d of the slots of one part += dS^T q + P^T d_out.
void Block::rows_of(float* d, int64_t slot0, int64_t num, bool of_entries) const {
    for (int64_t chunk = 0; chunk < columns(); chunk += CHUNK) {
        const Range own{chunk, smaller(chunk + CHUNK, columns())};
        int64_t reader = 0;  // the first query whose slots reach this one
        for (int64_t s = 0; s < num; s += TILE) {
            Range readers{0, count};
            if (of_entries) {
                while (reader < count && extents[reader] <= s) ++reader;
                readers.from = reader;
            } else {
                // Row s is read by the queries from its own position on, the last row of the tile `window` - 1 later yet.
                readers = {larger(0, oldest + s - first), smaller(count, oldest + s + TILE - 1 + a.window - first)};
            }
            const Range part = overlap({readers.from * heads, readers.to * heads}, own);
            if (part.from >= part.to) continue;
            const int64_t rows = smaller(TILE, num - s), n = part.to - part.from, from = part.from * stride + slot0 + s;
            product<true>(rows, ds + from, 1, stride, q + part.from * a.c, a.c, n, d + s * a.c, a.c, a.c / 16);
            product<true>(rows, p + from, 1, stride, d_out + part.from * a.c, a.c, n, d + s * a.c, a.c, a.c / 16);
        }
    }
}

void Block::run() {
    Layout sizes;
    lay_out(sizes);
    Layout layout{block_scratch.get<char>(sizes.size)};
    lay_out(layout);
    fill_masks();
    const int64_t num_rows = first + count - oldest, num_entries = is_dense ? extents[count - 1] : 0;
    transpose_panels(row(0), num_rows, a.c, window_panels);
    if (is_dense) transpose_panels(pool, num_entries, a.c, entry_panels);
    for (head = 0; head < a.heads; head += TILE_HEADS) {
        heads = smaller(TILE_HEADS, a.heads - head);
        load_columns();
        logits();
        for (int64_t i = 0; i < count; ++i) {
            if (is_dense) softmax(i);
            else own_entries(i);
            add_mass(i);
        }
        queries_of(row(0), 0, false);
        rows_of(d_rows + oldest * a.c, 0, num_rows, false);
        if (num_entries > 0) {
            queries_of(pool, window_slots, true);
            rows_of(d_entries, window_slots, num_entries, true);
        }
        const f32x16 scale = set1(float(a.scale));
        for (int64_t i = 0; i < columns(); ++i)
            for (int64_t f = 0; f < a.c; f += 16)
                store(a.d_q + ((first + i / heads) * a.heads + head + i % heads) * a.c + f, mul(load(d_q + i * a.c + f), scale));
    }
}

// Of long lists in parts of fewer queries: the probabilities of a part should stay in the second-level cache.
void Block::run_parts() {
    constexpr int64_t MOST_PROBABILITIES = 64 * 1024, LEAST_QUERIES = 8;
    plan();
    int64_t each = BLOCK_QUERIES;
    while (each > LEAST_QUERIES && each * smaller(a.heads, TILE_HEADS) * stride > MOST_PROBABILITIES) each /= 2;
    for (int64_t i = 0; i < count; i += each) {
        Block part = *this;
        part.first = first + i, part.count = smaller(each, count - i);
        part.lists = lists + i * a.k, part.places = places + i * a.k;
        part.listed = listed + i, part.ends = ends + i, part.extents = extents + i;
        part.plan();
        part.run();
    }
}

void run_group(const AttentionGrad& a, Group& group, float* partial_rows, float* partial_entries, float* d_sink) {
    const int64_t oldest = group.oldest(a.window), queries = group.rows.to - group.rows.from, listed = queries * a.k;
    Layout sizes;
    for (int64_t i = 0; i < 2; ++i) sizes.take<int32_t>(listed), sizes.take<int64_t>(queries);
    sizes.take<int64_t>(queries);
    Layout layout{lists_scratch.get<char>(sizes.size)};
    int32_t *lists = layout.take<int32_t>(listed), *places = layout.take<int32_t>(listed);
    int64_t *counts = layout.take<int64_t>(queries), *ends = layout.take<int64_t>(queries), *extents = layout.take<int64_t>(queries);
    const bool is_alone = group.count == 1;
    float* d_rows = is_alone ? a.d_rows + oldest * a.c : partial_rows + group.rows_at * a.c;
    float* d_entries = nullptr;
    if (a.entries != nullptr)
        d_entries = is_alone ? a.d_entries + group.entries.from * a.c : partial_entries + group.entries_at * a.c;
    std::memset(d_rows, 0, size_t((group.rows.to - oldest) * a.c) * 4);
    std::memset(d_sink, 0, size_t(a.heads) * 4);
    const auto for_blocks = [&](auto&& body) {
        for (int64_t t = group.rows.from; t < group.rows.to; t += BLOCK_QUERIES) {
            Block block{a, group, t, smaller(BLOCK_QUERIES, group.rows.to - t), 0, d_rows - oldest * a.c, d_entries, d_sink};
            const int64_t at = t - group.rows.from;
            block.lists = lists + at * a.k, block.places = places + at * a.k;
            block.listed = counts + at, block.ends = ends + at, block.extents = extents + at;
            body(block);
        }
    };
    for_blocks([&](Block& block) { block.read_lists(&group.touched, &group.is_bad); });
    const int64_t num = group.entries.to - group.entries.from;
    if (a.entries != nullptr) std::memset(d_entries, 0, size_t((is_alone ? num : group.touched) * a.c) * 4);
    for_blocks([](Block& block) { block.run_parts(); });
}

}  // namespace

BITTRUE_EXPORT(attention_backward)(const AttentionGrad* args) {
    const AttentionGrad& a = *args;
    Group* groups = groups_scratch.get<Group>(most_groups(a.offsets, a.num_sequences));
    int64_t num_rows, num_entries;
    const int64_t num = make_groups(a.offsets, a.num_sequences, a.ratio, a.window, groups, &num_rows, &num_entries);
    float* partial_rows = partial_scratch.get<float>((num_rows + (a.entries == nullptr ? 0 : num_entries)) * a.c);
    float* partial_entries = partial_rows + num_rows * a.c;
    float* sinks = sinks_scratch.get<float>(num * a.heads);
    const int64_t work = int64_t(a.offsets[a.num_sequences]) * a.heads * a.c * 64;
    // The last groups of a long document may have the most entries: they begin first.
    PARALLEL_FOR(i, num, work) {
        const int64_t at = num - 1 - i;
        run_group(a, groups[at], partial_rows, partial_entries, sinks + at * a.heads);
    };
    PARALLEL_FOR(i, num, work / 64) {
        if (groups[i].count == 1) return;
        reduce_rows(groups + i, partial_rows, a.window, a.c, a.d_rows);
        if (a.entries != nullptr) reduce_entries(groups + i, partial_entries, a.c, a.d_entries);
    };
    for (int64_t h = 0; h < a.heads; ++h) {
        float sum = 0.0f;
        for (int64_t i = 0; i < num; ++i) sum += sinks[i * a.heads + h];
        a.d_sink[h] = sum;
    }
    for (int64_t i = 0; i < num; ++i) *a.is_bad |= groups[i].is_bad;
}
