// The indexer: scores of all visible keys, 16 keys to a vector, and the exact choice of the best k.
#include "step.h"

namespace {

constexpr int64_t CSA_RATIO = 4;
constexpr int64_t KEY_BLOCK = 32;          // keys decoded and transposed at a time
constexpr int64_t KEY_CHUNK = 1024;        // keys of one unit of work
constexpr int64_t TOKEN_GROUP = 8;         // tokens of one sequence that share decoded keys
constexpr int64_t SCORE_BUDGET = 8 << 20;  // scores held at a time, unless one token has more
#if BITTRUE_ISA_CODE == 2
constexpr int64_t HEAD_TILE = 8, KEY_VECTORS = 2;
#else
constexpr int64_t HEAD_TILE = 4, KEY_VECTORS = 1;
#endif

thread_local Scratch scores_scratch, queries_scratch, groups_scratch;  // of the calling thread, for one pass
thread_local Scratch keys_scratch;

struct Index {
    const Step* step;
    Pages pages;
    RowSpec row;
    int64_t num_heads, k;
    const float* head_weights;

    BT int64_t visible(int64_t t) const { return (step->positions[t] + 1) / CSA_RATIO; }
};

// A group of tokens of one sequence, with the first of its units of work in the pass.
struct Group {
    int64_t first, count, seq, most, unit;  // most: entries visible to its last token
};

void transpose16(const float* rows, int64_t stride, float* out, int64_t out_stride) {
    f32x16 a[16];
    for (int64_t i = 0; i < 16; ++i) a[i] = load(rows + i * stride);
#define STAGE(S)                                                           \
    for (int i = 0; i < 16; ++i)                                           \
        if (!(i & S)) {                                                    \
            f32x16 x = a[i], y = a[i + S];                                 \
            a[i] = blend_lanes<S>(x, xor_lanes<S>(y));                     \
            a[i + S] = blend_lanes<S>(xor_lanes<S>(x), y);                 \
        }
    STAGE(1) STAGE(2) STAGE(4) STAGE(8)
#undef STAGE
    for (int64_t i = 0; i < 16; ++i) store(out + i * out_stride, a[i]);
}

// Keys first..first+n of sequence s as columns: out [ci padded, KEY_BLOCK]; the columns after n are 0.
void load_keys(const Index& x, int64_t s, int64_t first, int64_t n, float* rows, float* out) {
    const int64_t width = pad16(x.row.dim);
    for (int64_t j = 0; j < KEY_BLOCK; ++j) {
        float* row = rows + j * width;
        if (j < n) unpack_row(x.pages.entry(*x.step, s, first + j), row, x.row);
        for (int64_t i = j < n ? x.row.dim : 0; i < width; ++i) row[i] = 0.0f;
    }
    for (int64_t j = 0; j < KEY_BLOCK; j += 16)
        for (int64_t i = 0; i < width; i += 16) transpose16(rows + j * width + i, width, out + i * KEY_BLOCK + j, KEY_BLOCK);
}

// Adds the terms of HEADS heads, in ascending order, to the scores of V * 16 keys. The dot product is a chain over each
// group of 32 features, the groups added in ascending order: between FP4 values a group's sum is exact.
template <int64_t HEADS, int64_t V>
BT void score_heads(const float* q, const float* weights, const float* keys, int64_t dim, f32x16* scores) {
    f32x16 dots[HEADS * V];
    for (int64_t i = 0; i < HEADS * V; ++i) dots[i] = zero();
    for (int64_t g = 0; g < dim; g += FP4_GROUP) {
        const int64_t end = g + FP4_GROUP < dim ? g + FP4_GROUP : dim;
        f32x16 sums[HEADS * V];
        for (int64_t i = 0; i < HEADS * V; ++i) sums[i] = zero();
        for (int64_t d = g; d < end; ++d) {
            f32x16 key[V];
            for (int64_t v = 0; v < V; ++v) key[v] = load(keys + d * KEY_BLOCK + 16 * v);
            for (int64_t h = 0; h < HEADS; ++h)
                for (int64_t v = 0; v < V; ++v) sums[h * V + v] = fma(set1(q[h * dim + d]), key[v], sums[h * V + v]);
        }
        for (int64_t i = 0; i < HEADS * V; ++i) dots[i] = add(dots[i], sums[i]);
    }
    for (int64_t h = 0; h < HEADS; ++h)
        for (int64_t v = 0; v < V; ++v)
            scores[v] = add(scores[v], mul(set1(weights[h]), max(dots[h * V + v], zero())));
}

// Scores of one token for a block of keys, as integers that order like the floats.
void score_block(const Index& x, int64_t t, const float* q, const float* keys, int64_t n, uint32_t* out) {
    const int64_t dim = x.row.dim;
    const float* weights = x.head_weights + t * x.num_heads;
    for (int64_t j = 0; j < n; j += 16 * KEY_VECTORS) {
        f32x16 scores[KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; ++v) scores[v] = zero();
        int64_t h = 0;
        for (; h + HEAD_TILE <= x.num_heads; h += HEAD_TILE)
            score_heads<HEAD_TILE, KEY_VECTORS>(q + h * dim, weights + h, keys + j, dim, scores);
        for (; h < x.num_heads; ++h) score_heads<1, KEY_VECTORS>(q + h * dim, weights + h, keys + j, dim, scores);
        float values[16 * KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; ++v) store(values + 16 * v, scores[v]);
        for (int64_t i = 0; i < 16 * KEY_VECTORS && j + i < n; ++i) {
            uint32_t u = bits_of(values[i] + 0.0f);  // -0 becomes +0
            out[j + i] = u >> 31 ? ~u : u | 0x80000000u;
        }
    }
}

// One unit: KEY_CHUNK keys for the tokens of one group.
void score_chunk(const Index& x, const Group& g, int64_t from, const float* queries, uint32_t* const* scores) {
    const int64_t dim = x.row.dim, width = pad16(dim);
    float* rows = keys_scratch.get<float>(2 * KEY_BLOCK * width);
    float* keys = rows + KEY_BLOCK * width;
    const int64_t end = from + KEY_CHUNK < g.most ? from + KEY_CHUNK : g.most;
    for (int64_t first = from; first < end; first += KEY_BLOCK) {
        const int64_t n = end - first < KEY_BLOCK ? end - first : KEY_BLOCK;
        load_keys(x, g.seq, first, n, rows, keys);
        for (int64_t i = 0; i < g.count; ++i) {
            const int64_t left = x.visible(g.first + i) - first;
            if (left > 0)
                score_block(x, g.first + i, queries + i * x.num_heads * dim, keys, left < n ? left : n, scores[i] + first);
        }
    }
}

// Ids of the k largest of n scores, ties to the smaller id, ascending; n > k. The k-th largest is found byte by byte.
void choose(const uint32_t* scores, int64_t n, int64_t k, int32_t* ids) {
    uint32_t prefix = 0, mask = 0;
    int64_t wanted = k;  // how many of the scores with this prefix are chosen
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {};
        for (int64_t i = 0; i < n; ++i)
            if ((scores[i] & mask) == prefix) ++counts[(scores[i] >> shift) & 255];
        int64_t byte = 255;
        while (counts[byte] < wanted) wanted -= counts[byte--];
        prefix |= uint32_t(byte) << shift;
        mask |= 255u << shift;
    }
    for (int64_t i = 0, num = 0; num < k; ++i) {
        if (scores[i] < prefix) continue;
        if (scores[i] == prefix && wanted-- <= 0) continue;
        ids[num++] = int32_t(i);
    }
}

// Tokens first..end whose scores fit the budget, at least one; the number of their scores in *num.
int64_t pass_end(const Index& x, int64_t first, int64_t* num) {
    int64_t t = first;
    for (*num = 0; t < x.step->num_tokens; ++t) {
        const int64_t own = x.visible(t) > x.k ? x.visible(t) : 0;
        if (t > first && *num + own > SCORE_BUDGET) break;
        *num += own;
    }
    return t;
}

// Groups of tokens first..end; returns the number of groups, the number of units in *units.
int64_t make_groups(const Index& x, int64_t first, int64_t end, Group* groups, int64_t* units) {
    int64_t num = 0;
    *units = 0;
    for (int64_t t = first; t < end;) {
        Group g{t, 1, x.step->seq_ids[t], 0, *units};
        while (g.count < TOKEN_GROUP && t + g.count < end && x.step->seq_ids[t + g.count] == g.seq) ++g.count;
        g.most = x.visible(t + g.count - 1);
        t += g.count;
        // Tokens that see no more than k take all they see, unscored.
        while (g.count > 0 && x.visible(g.first) <= x.k) ++g.first, --g.count;
        if (g.count == 0) continue;
        *units += (g.most + KEY_CHUNK - 1) / KEY_CHUNK;
        groups[num++] = g;
    }
    return num;
}

template <class T> void run_pass(const Index& x, const T* q, int64_t first, int64_t end, int64_t num_scores, int32_t* ids) {
    const int64_t size = x.num_heads * x.row.dim;
    uint32_t* scores = scores_scratch.get<uint32_t>(num_scores);
    float* queries = queries_scratch.get<float>((end - first) * size);
    Group* groups = groups_scratch.get<Group>((end - first) + (end - first + 1) / 2);
    uint32_t** rows = reinterpret_cast<uint32_t**>(groups + (end - first));
    int64_t units;
    const int64_t num_groups = make_groups(x, first, end, groups, &units);
    for (int64_t t = first; t < end; ++t) {
        rows[t - first] = scores;
        if (x.visible(t) > x.k) scores += x.visible(t);
    }
    PARALLEL_FOR(i, end - first, (end - first) * size) { convert_row(q + (first + i) * size, queries + i * size, size); };
    PARALLEL_FOR(unit, units, num_scores * size / 8) {
        int64_t low = 0, high = num_groups;  // the last group that begins at or before the unit
        while (high - low > 1) (groups[(low + high) / 2].unit <= unit ? low : high) = (low + high) / 2;
        const Group& g = groups[low];
        score_chunk(x, g, (unit - g.unit) * KEY_CHUNK, queries + (g.first - first) * size, rows + (g.first - first));
    };
    PARALLEL_FOR(row, end - first, num_scores * 8) {
        const int64_t t = first + row, visible = x.visible(t);
        int32_t* own = ids + t * x.k;
        if (visible > x.k) {
            choose(rows[row], visible, x.k, own);
            return;
        }
        for (int64_t i = 0; i < x.k; ++i) own[i] = i < visible ? int32_t(i) : -1;
    };
}

}  // namespace

// q [T, Hi, ci] of `dtype`, head_weights [T, Hi] -> ids [T, k].
BITTRUE_EXPORT(index_topk)(const Step* step, const void* q, int64_t dtype, const float* head_weights, int64_t num_heads,
                           uint8_t* keys, int64_t per_page, int64_t kind, int64_t dim, int64_t k, int32_t* ids) {
    const RowSpec row{kind, dim, 0};
    const Index x{step, Pages{keys, per_page, row.bytes()}, row, num_heads, k, head_weights};
    for (int64_t first = 0; first < step->num_tokens;) {
        int64_t num_scores;
        const int64_t end = pass_end(x, first, &num_scores);
        if (dtype == 0) run_pass(x, static_cast<const float*>(q), first, end, num_scores, ids);
        else run_pass(x, static_cast<const bf16*>(q), first, end, num_scores, ids);
        first = end;
    }
}
BITTRUE_REPLAYABLE(index_topk)
