// The index scores over given keys, and their derivative, block of queries by block.
//
// As grad_attention.cpp: keys are the columns of a matrix product where the queries of a block read about the same ones, panel by
// panel; else each query gathers its own.
#include "grad_tiles.h"

namespace {

thread_local Scratch groups_scratch, partial_scratch;  // of the caller
thread_local Scratch floats_scratch, ints_scratch;     // of a task's thread

// Laid out as IndexGradArgs in ops/cpu/grad_cache.py. c is a multiple of 16. Without d_scores: forward.
struct IndexGrad {
    const float *q, *weights, *keys, *d_scores;
    const int32_t *ids, *offsets;
    int64_t num_sequences, heads, c, k, ratio;
    float *scores, *d_q, *d_weights, *d_keys;
    int64_t* is_bad;
};

// One block and its memory; slots are entries where the block shares them, else places in a query's list.
struct Block {
    const IndexGrad& a;
    int64_t first, count;
    const float* pool;  // the document's keys
    float* d_pool;
    const int32_t *lists, *places;  // [count, k]
    const int64_t *listed, *ends;
    bool is_dense;
    int64_t slots;      // of a query, a multiple of PANEL
    int64_t* extents;   // [count]: slots in use, not descending where they are shared
    float *values;      // [count, slots]: scores, or d_scores, by slot
    float *dots;        // [count * TILE_HEADS, PANEL]
    float *sums;        // [count * TILE_HEADS, 16]: of d_weights
    float *q, *d_q;     // [count * TILE_HEADS, c]
    float *panels, *gathered;
    int64_t heads = 0, head = 0;

    BT int64_t slot_of(int64_t i, int64_t j) const { return is_dense ? lists[i * a.k + j] : j; }

    void load_values() const {
        std::memset(values, 0, size_t(count * slots) * 4);
        if (a.d_scores == nullptr) return;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < listed[i]; ++j)
                values[i * slots + slot_of(i, j)] = a.d_scores[(first + i) * a.k + places[i * a.k + j]];
    }

    void store_scores() const {
        std::memset(a.scores + first * a.k, 0, size_t(count * a.k) * 4);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < listed[i]; ++j)
                a.scores[(first + i) * a.k + places[i * a.k + j]] = values[i * slots + slot_of(i, j)];
    }

    // The dots of query i over `vectors` vectors of slots from s on: scores, or the factors of q and the keys in their place.
    void finish_dots(int64_t i, int64_t s, int64_t vectors) const {
        float* own = values + i * slots + s;
        const float* weights = a.weights + (first + i) * a.heads + head;
        for (int64_t h = 0; h < heads; ++h) {
            float *d = dots + (i * heads + h) * PANEL, *sum = sums + (i * heads + h) * 16;
            const f32x16 w = set1(weights[h]);
            for (int64_t v = 0; v < 16 * vectors; v += 16) {
                const f32x16 dot = max(load(d + v), zero()), g = load(own + v);
                if (a.d_scores == nullptr) {
                    store(own + v, fma(w, dot, g));
                } else {
                    store(sum, fma(g, dot, load(sum)));
                    store(d + v, select(less(zero(), dot), mul(g, w), zero()));
                }
            }
        }
    }

    void own_keys(int64_t i) const {
        const int32_t* list = lists + i * a.k;
        for (int64_t j = 0; j < listed[i]; ++j) std::memcpy(gathered + j * a.c, pool + list[j] * a.c, size_t(a.c) * 4);
        transpose_panels(gathered, listed[i], a.c, panels);
        const int64_t at = i * heads;
        for (int64_t s = 0; s < listed[i]; s += PANEL) {
            const int64_t num = smaller(PANEL, listed[i] - s), vectors = rounded_up(num, 16) / 16;
            product<false>(heads, q + at * a.c, a.c, 1, panels + s * a.c, PANEL, a.c, dots + at * PANEL, PANEL, vectors);
            finish_dots(i, s, vectors);
            if (a.d_scores == nullptr) continue;
            product<true>(heads, dots + at * PANEL, PANEL, 1, gathered + s * a.c, a.c, num, d_q + at * a.c, a.c, a.c / 16);
            scatter<false>(heads, list + s, num, dots + at * PANEL, nullptr, PANEL, q + at * a.c, nullptr, a.c, d_pool);
        }
    }

    // Slots from s on of one panel, of all queries that reach it.
    void shared_keys(int64_t s) const {
        int64_t reader = 0;
        while (reader < count && extents[reader] <= s) ++reader;
        const int64_t num = smaller(PANEL, extents[count - 1] - s), columns = count * heads;
        // In tiles of columns: from the tile of the first reader on.
        const int64_t from = reader * heads;
        for (int64_t column = from; column < columns; column += TILE) {
            const int64_t rows = smaller(TILE, columns - column);
            const int64_t last = (column + rows - 1) / heads, vectors = rounded_up(smaller(num, extents[last] - s), 16) / 16;
            product<false>(rows, q + column * a.c, a.c, 1, panels + s * a.c, PANEL, a.c, dots + column * PANEL, PANEL, vectors);
        }
        for (int64_t i = reader; i < count; ++i) finish_dots(i, s, rounded_up(smaller(num, extents[i] - s), 16) / 16);
        if (a.d_scores == nullptr) return;
        for (int64_t i = reader; i < count; ++i)
            product<true>(heads, dots + i * heads * PANEL, PANEL, 1, pool + s * a.c, a.c, smaller(num, extents[i] - s),
                          d_q + i * heads * a.c, a.c, a.c / 16);
        for (int64_t chunk = from; chunk < columns; chunk += CHUNK) {
            const int64_t end = smaller(chunk + CHUNK, columns);
            int64_t own = reader;
            for (int64_t r = 0; r < num; r += TILE) {
                while (extents[own] <= s + r) ++own;
                const int64_t begin = larger(chunk, own * heads);
                if (begin >= end) continue;
                product<true>(smaller(TILE, num - r), dots + begin * PANEL + r, 1, PANEL, q + begin * a.c, a.c, end - begin,
                              d_pool + (s + r) * a.c, a.c, a.c / 16);
            }
        }
    }

    void load_columns() const {
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(q + i * heads * a.c, a.q + ((first + i) * a.heads + head) * a.c, size_t(heads * a.c) * 4);
        if (a.d_scores == nullptr) return;
        std::memset(d_q, 0, size_t(count * heads * a.c) * 4);
        std::memset(sums, 0, size_t(count * heads) * 64);
    }

    void store_columns() const {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = (first + i) * a.heads + head;
            std::memcpy(a.d_q + at * a.c, d_q + i * heads * a.c, size_t(heads * a.c) * 4);
            for (int64_t h = 0; h < heads; ++h) a.d_weights[at + h] = hsum(load(sums + (i * heads + h) * 16));
        }
    }

    void run() {
        load_values();
        if (is_dense) transpose_panels(pool, extents[count - 1], a.c, panels);
        for (head = 0; head < a.heads; head += TILE_HEADS) {
            heads = smaller(TILE_HEADS, a.heads - head);
            load_columns();
            if (is_dense)
                for (int64_t s = 0; s < extents[count - 1]; s += PANEL) shared_keys(s);
            else
                for (int64_t i = 0; i < count; ++i) own_keys(i);
            if (a.d_scores != nullptr) store_columns();
        }
        if (a.d_scores == nullptr) store_scores();
    }
};

// first..first + count of the group's queries
void run_block(const IndexGrad& a, const Group& group, int64_t first, int64_t count, const int32_t* lists, const int32_t* places,
               const int64_t* listed, const int64_t* ends, int64_t* extents, float* d_pool) {
    constexpr int64_t GATHERING = 3;  // two rows gathered cost as much as three that are shared
    int64_t all = 0, shared = 0, most = 0, end = 0;
    for (int64_t i = 0; i < count; ++i) {
        end = larger(end, ends[i]);
        extents[i] = end;
        all += listed[i], shared += end, most = larger(most, listed[i]);
    }
    const bool is_dense = 2 * shared <= GATHERING * all;
    const int64_t slots = rounded_up(is_dense ? end : most, PANEL), columns = count * smaller(a.heads, TILE_HEADS);
    float* memory = floats_scratch.get<float>(count * slots + columns * (PANEL + 16 + 2 * a.c) + 2 * slots * a.c);
    const auto take = [&](int64_t n) {
        float* at = memory;
        memory += n;
        return at;
    };
    Block block{a, first, count, a.keys + group.entries.from * a.c, d_pool, lists, places, listed, ends, is_dense, slots, extents,
                take(count * slots), take(columns * PANEL), take(columns * 16), take(columns * a.c), take(columns * a.c),
                take(slots * a.c), take(slots * a.c)};
    block.run();
}

void run_group(const IndexGrad& a, Group& group, float* partial) {
    const int64_t queries = group.rows.to - group.rows.from, num = group.entries.to - group.entries.from;
    int64_t* memory = ints_scratch.get<int64_t>(3 * queries + queries * a.k);
    int64_t *listed = memory, *ends = memory + queries, *extents = memory + 2 * queries;
    int32_t *lists = reinterpret_cast<int32_t*>(memory + 3 * queries), *places = lists + queries * a.k;
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t at = i * a.k;
        listed[i] = read_ids(a.ids + group.rows.from * a.k + at, a.k, num, lists + at, places + at, ends + i, &group.is_bad);
        group.touched = larger(group.touched, ends[i]);
    }
    float* d_pool = nullptr;
    if (a.d_scores != nullptr) {
        const bool is_alone = group.count == 1;
        d_pool = is_alone ? a.d_keys + group.entries.from * a.c : partial + group.entries_at * a.c;
        std::memset(d_pool, 0, size_t((is_alone ? num : group.touched) * a.c) * 4);
    }
    for (int64_t i = 0; i < queries; i += BLOCK_QUERIES)
        run_block(a, group, group.rows.from + i, smaller(BLOCK_QUERIES, queries - i), lists + i * a.k, places + i * a.k, listed + i,
                  ends + i, extents + i, d_pool);
}

}  // namespace

BITTRUE_EXPORT(index_scores)(const IndexGrad* args) {
    const IndexGrad& a = *args;
    Group* groups = groups_scratch.get<Group>(most_groups(a.offsets, a.num_sequences));
    int64_t num_rows, num_keys;
    const int64_t num = make_groups(a.offsets, a.num_sequences, a.ratio, 1, groups, &num_rows, &num_keys);
    float* partial = partial_scratch.get<float>(a.d_scores == nullptr ? 0 : num_keys * a.c);
    const int64_t work = int64_t(a.offsets[a.num_sequences]) * a.heads * a.c * smaller(a.k, 64);
    // The last groups of a long document may have the most keys: they begin first.
    PARALLEL_FOR(i, num, work) { run_group(a, groups[num - 1 - i], partial); };
    for (int64_t i = 0; i < num; ++i) *a.is_bad |= groups[i].is_bad;
    if (a.d_scores == nullptr) return;
    PARALLEL_FOR(i, num, num_keys * a.c) {
        if (groups[i].count > 1) reduce_entries(groups + i, partial, a.c, a.d_keys);
    };
}
