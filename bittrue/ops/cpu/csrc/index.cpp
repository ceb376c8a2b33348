// The indexer: scores of all visible keys, 16 keys to a vector, and the exact choice of the best k as they are found.
//
// score = sum over heads, ascending, as one fma chain of head weight * relu(dot). Queries and keys in FP4: a dot product is
// the f32 sum, ascending, over groups of 32 features of exact group sums; elsewhere one chain as in dots.h.
// FP4 values are small integers times powers of two. Where the powers of the groups are near each other (and of no extreme
// size) the sum over the groups is exact too, and one integer dot product gives its bits; elsewhere it is found in f32.
#include "dots.h"
#include "step.h"

namespace {

constexpr int64_t CSA_RATIO = 4;
constexpr int64_t TILE_TOKENS = 16;   // tokens of one sequence that share a block of keys
constexpr int64_t PASS_TOKENS = 128;  // tokens whose queries are held at a time
constexpr int64_t PART_PRODUCTS = 1 << 19;  // products of one token worth a unit of work of their own
constexpr int64_t MOST_SHIFT = 2;     // groups of one vector may differ by this power of two
constexpr int32_t BYTE_BIAS = 12 << MOST_SHIFT;
// Integers: twice an E2M1 value. Exponents and weights that keep every product and sum of the integer path a normal number.
constexpr int32_t LEAST_EXPONENT = 97, MOST_EXPONENT = 157;
constexpr float LEAST_WEIGHT = 0x1p-40f, MOST_WEIGHT = 0x1p40f;
alignas(64) constexpr int8_t FP4_TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(64) constexpr uint8_t FP4_LEAST_BIAS[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

thread_local Scratch query_scratch, found_scratch;  // of the calling thread, for one pass
thread_local Scratch tile_scratch, words_scratch, work_scratch, choose_scratch;

// Laid out as IndexArgs in ops/cpu/cache.py.
struct Index {
    const void* q;
    int64_t act;  // dtype code of q
    const float *head_weights, *cos, *sin;
    int64_t rope_dim, num_heads;
    uint8_t* keys;
    int64_t per_page;
    RowSpec row;
    int64_t k;
    int32_t* ids;
    double weight_scale;

    BT int64_t visible(const Step& step, int64_t t) const { return (step.positions[t] + 1) / CSA_RATIO; }
    BT bool is_fp4() const { return row.kind == ROW_FP4; }
};

// The queries of one pass: per token `heads` queries of `room` words, their weights and, in FP4, what the integers need.
struct Queries {
    int64_t heads, room;
    int32_t* words;   // FP4: twice the E2M1 values in bytes, in the order of the features
    int32_t* bytes;   // FP4: the same, shifted to one power of two a head and in the order of key_columns
    int32_t* start;   // FP4: what undoes the keys' bias
    uint8_t* scales;  // FP4: [heads, groups]
    float* weights;   // of the chain: times the power of two of the head's integers
    float* plain;     // the weights themselves
    uint8_t *integer_heads, *integer;  // the integers do for this head, for all heads of this token
};

struct Tile {
    int64_t first, count, seq, most;  // tokens first..first+count of sequence seq; entries visible to the last
};

// The best of the scores met so far, ascending by id; scores are integers that order like the floats.
struct Found {
    int32_t *scores, *ids;
    int64_t count, threshold_set;
    int32_t threshold;  // the k-th best: only what is larger matters, because later ids lose a tie
};

BT int64_t found_room(int64_t k) { return (2 * k + 8 * BLOCK_ROWS + 15) / 16 * 16; }

// ---- the choice

// Of n scores with ascending ids keeps the k largest, ties to the smaller id, in the order they have; returns the k-th.
int32_t keep_best(int32_t* scores, int32_t* ids, int64_t n, int64_t k) {
    const int32_t lowest = int32_t(0x80000000);
    for (int64_t i = n; i % 16 != 0; ++i) scores[i] = lowest;
    // The k-th largest bit by bit: the largest bound that k scores reach.
    uint32_t bound = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
        const i32x16 below = set1(int32_t(((bound | bit) - 1) ^ 0x80000000u));
        int64_t reach = 0;
        for (int64_t i = 0; i < n; i += 16) reach += __builtin_popcount(greater_bits(load(scores + i), below));
        if (reach >= k) bound |= bit;
    }
    const int32_t kth = int32_t(bound ^ 0x80000000u);
    int64_t ties = k;  // how many of those equal to it are kept
    for (int64_t i = 0; i < n; i += 16) ties -= __builtin_popcount(greater_bits(load(scores + i), set1(kth)));
    int64_t num = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t score = scores[i];
        const int64_t tied = score == kth && ties > 0, kept = score > kth || tied;
        scores[num] = score;
        ids[num] = ids[i];
        ties -= tied;
        num += kept;
    }
    return kth;
}

void compact(Found& found, int64_t k) {
    if (found.count <= k) return;
    found.threshold = keep_best(found.scores, found.ids, found.count, k);
    found.threshold_set = 1;
    found.count = k;
}

// Sixteen scores of keys id..id+15, of which the first n are visible.
BT void offer(Found& found, f32x16 scores, int64_t id, int64_t n) {
    const i32x16 bits = as_int(add(scores, zero()));  // -0 becomes +0
    const i32x16 flip = bit_and(shift_right_signed<31>(bits), set1(int32_t(0x7fffffff)));
    const i32x16 order = sub(bit_or(bits, flip), bit_and(bits, flip));  // exclusive or
    uint32_t better = n >= 16 ? 0xffffu : (1u << n) - 1u;
    if (found.threshold_set) better &= greater_bits(order, set1(found.threshold));
    if (better == 0) return;
    int32_t lanes[16];
    store(lanes, order);
    for (; better != 0; better &= better - 1) {
        const int64_t i = __builtin_ctz(better);
        found.scores[found.count] = lanes[i];
        found.ids[found.count++] = int32_t(id + i);
    }
}

// ---- queries

// One head's query in FP4, its integers and scales; false when its groups need different powers of two.
template <class T> bool fp4_query(const T* x, int64_t n, int8_t* twice, int8_t* bytes, int32_t* start, uint8_t* scales,
                                  int32_t* exponent) {
    int32_t least = 1 << 20, most = -1;
    for (int64_t g = 0; g < n; g += FP4_GROUP) {
        const int64_t end = g + FP4_GROUP < n ? g + FP4_GROUP : n;
        const float scale = fp4_scale(group_amax(x + g, end - g));
        const f32x16 inverse = set1(inverse_pow2(scale));
        bool is_zero = true;
        for (int64_t i = g; i < end; i += 16) {
            float values[16];
            store(values, fp4_round(mul(load_n(x + i, end - i < 16 ? end - i : 16), inverse)));
            for (int64_t j = 0; j < 16 && i + j < end; ++j) {
                twice[i + j] = int8_t(2.0f * values[j]);
                is_zero = is_zero && values[j] == 0.0f;
            }
        }
        const int32_t byte = scale_byte(scale);
        scales[g / FP4_GROUP] = uint8_t(byte);
        if (is_zero) continue;  // zeros have every power of two
        least = byte < least ? byte : least;
        most = byte > most ? byte : most;
    }
    if (most < 0) least = most = 127;
    *exponent = least;
    if (n % FP4_GROUP != 0 || most - least > MOST_SHIFT || least < LEAST_EXPONENT || most > MOST_EXPONENT) return false;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t by = scales[i / FP4_GROUP] - least;
        const int32_t value = twice[i] == 0 ? 0 : int32_t(twice[i]) * (1 << by);
        // Word 2 w of a key holds its features 8 w + 0, 2, 4, 6, word 2 w + 1 the odd ones.
        bytes[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = int8_t(value);
        sum += value;
    }
    *start = -BYTE_BIAS * sum;
    return true;
}

// Head h of token t, the `at`-th of the pass.
template <Words W, class T> void prepare(const Index& x, const Queries& to, int64_t t, int64_t at, int64_t h) {
    const int64_t n = x.row.dim, half = x.rope_dim / 2, i = at * to.heads + h;
    T* row = reinterpret_cast<T*>(work_scratch.get<float>(2 * pad16(n)));
    float* work = reinterpret_cast<float*>(row) + pad16(n);
    rope_row(static_cast<const T*>(x.q) + (t * to.heads + h) * n, row, n, x.rope_dim, x.cos + t * half, x.sin + t * half, false);
    const float weight = x.head_weights[t * to.heads + h] * float(x.weight_scale);
    to.plain[i] = to.weights[i] = weight;
    to.integer_heads[i] = 0;
    int32_t* words = to.words + i * to.room;
    if (!x.is_fp4()) return query_words<W>(row, n, words, to.room);
    hadamard_row(row, row, n, work);
    int32_t exponent;
    const float size = weight < 0.0f ? -weight : weight;
    if (!fp4_query(row, n, reinterpret_cast<int8_t*>(words), reinterpret_cast<int8_t*>(to.bytes + i * to.room), to.start + i,
                   to.scales + i * x.row.num_scales(), &exponent) ||
        (size != 0.0f && !(size >= LEAST_WEIGHT && size <= MOST_WEIGHT)))
        return;
    to.weights[i] = weight * float_of(uint32_t(exponent - 1) << 23);  // the integers are doubled
    to.integer_heads[i] = 1;
}

// ---- keys

// The stored rows of 16 keys of sequence s; those after `most` are its last.
BT void key_rows(const Step& step, const Pages& pages, int64_t s, int64_t first, int64_t most, const uint8_t** rows) {
    if (first >= most) first = most - 1;
    const int64_t last = most - 1 - first, at = first % pages.per_page;
    const uint8_t* row = pages.entry(step, s, first);
    if (at + 16 <= pages.per_page)
        for (int64_t j = 0; j < 16; ++j) rows[j] = row + (j < last ? j : last) * pages.row_bytes;
    else
        for (int64_t j = 0; j < 16; ++j) rows[j] = pages.entry(step, s, first + (j < last ? j : last));
}

// Asks for the keys that follow a block: pages lie anywhere, so the processor does not foresee them.
BT void fetch_block(const Step& step, const Pages& pages, int64_t s, int64_t first, int64_t most) {
    for (int64_t j = first; j < first + BLOCK_ROWS && j < most; j += 16) {
        const uint8_t* row = pages.entry(step, s, j);
        for (int64_t i = 0; i < 16 * pages.row_bytes; i += 64) __builtin_prefetch(row + i);
    }
}

// The least scale may be that of a group of zeros, which has every power of two: it gets the least of the key's others.
void align_zeros(const uint8_t* const* rows, const RowSpec& row, int32_t (*shifts)[16], i32x16* least, i32x16* most) {
    int32_t low[16], high[16];
    for (int64_t j = 0; j < 16; ++j) {
        bool is_zero[16];
        low[j] = 255, high[j] = 0;
        for (int64_t g = 0; g < row.num_scales(); ++g) {
            is_zero[g] = true;
            for (int64_t i = 0; i < FP4_GROUP / 2; ++i) is_zero[g] = is_zero[g] && (rows[j][g * FP4_GROUP / 2 + i] & 0x77) == 0;
            if (is_zero[g]) continue;
            low[j] = shifts[g][j] < low[j] ? shifts[g][j] : low[j];
            high[j] = shifts[g][j] > high[j] ? shifts[g][j] : high[j];
        }
        if (high[j] == 0 && low[j] == 255) low[j] = high[j] = 127;
        for (int64_t g = 0; g < row.num_scales(); ++g)
            if (is_zero[g]) shifts[g][j] = low[j];
    }
    *least = load(low), *most = load(high);
}

// FP4 keys as bytes with BYTE_BIAS, 16 a vector: out [dim / 4, BLOCK_ROWS]; scales [16] their powers of two. False when a
// key's groups need different ones.
bool key_bytes(const uint8_t* const* rows, const RowSpec& row, int32_t* out, float* scales) {
    const int64_t groups = row.num_scales(), code_bytes = row.dim / 2;
    int32_t shifts[16][16];
    i32x16 least = set1(int32_t(255)), most = set1(int32_t(0));
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t j = 0; j < 16; ++j) shifts[g][j] = rows[j][code_bytes + g];
        least = min(least, load(shifts[g]));
        most = max(most, load(shifts[g]));
    }
    if (greater_bits(set1(int32_t(2)), least) != 0) align_zeros(rows, row, shifts, &least, &most);
    const uint32_t apart = greater_bits(sub(most, least), set1(int32_t(MOST_SHIFT))) |
                           greater_bits(set1(int32_t(LEAST_EXPONENT)), least) | greater_bits(most, set1(int32_t(MOST_EXPONENT)));
    if (apart != 0) return false;
    store(scales, as_float(shift_left<23>(sub(least, set1(int32_t(1))))));
    const i32x16 nibbles = set1(int32_t(0x0f0f0f0f));
    for (int64_t w = 0; w < code_bytes / 4; w += 16) {
        const int64_t n = code_bytes / 4 - w < 16 ? code_bytes / 4 - w : 16;
        i32x16 codes[16];
        for (int64_t j = 0; j < 16; ++j) {
            const int32_t* from = reinterpret_cast<const int32_t*>(rows[j] + 4 * w);
            codes[j] = n == 16 ? load(from) : load_n(from, n);
        }
        transpose16(codes);
        for (int64_t i = 0; i < n; ++i) {
            const i32x16 by = sub(load(shifts[(w + i) * 8 / FP4_GROUP]), least);
            const i32x16 rest = sub(set1(int32_t(BYTE_BIAS * 0x01010101)), shift_left(set1(int32_t(12 * 0x01010101)), by));
            const i32x16 even = lookup_bytes(FP4_LEAST_BIAS, bit_and(codes[i], nibbles));
            const i32x16 odd = lookup_bytes(FP4_LEAST_BIAS, bit_and(shift_right<4>(codes[i]), nibbles));
            store(out + 2 * (w + i) * BLOCK_ROWS, add(shift_left(even, by), rest));
            store(out + (2 * (w + i) + 1) * BLOCK_ROWS, add(shift_left(odd, by), rest));
        }
    }
    return true;
}

// Keys as the words of a query_words<W> query, transposed: out [words, BLOCK_ROWS].
template <Words W> void key_words(const uint8_t* const* rows, const RowSpec& row, int64_t words, int32_t* out) {
    const int32_t* own[16];
    if (W != Words::F32 && row.dim % 2 == 0) {
        for (int64_t j = 0; j < 16; ++j) own[j] = reinterpret_cast<const int32_t*>(rows[j]);
        return transpose_rows<true>(own, row.dim / 2, out, BLOCK_ROWS);
    }
    int32_t* natural = words_scratch.get<int32_t>(16 * words);
    std::memset(natural, 0, size_t(16 * words) * 4);
    for (int64_t j = 0; j < 16; ++j) {
        own[j] = natural + j * words;
        if constexpr (W == Words::F32) unpack_row(rows[j], reinterpret_cast<float*>(natural + j * words), row);
        else std::memcpy(natural + j * words, rows[j], size_t(row.dim) * 2);
    }
    transpose_rows<W != Words::F32>(own, words, out, BLOCK_ROWS);
}

// ---- scores

// One block of up to BLOCK_ROWS keys of one sequence.
struct Block {
    int32_t* columns;  // FP4: bytes; else words
    int32_t* wide;     // FP4: f32 words, filled when a token or key needs them
    float* scales;     // FP4: [BLOCK_ROWS]
    bool integer, has_wide;
    int64_t first, count;
};

template <bool FAST, int64_t V, int64_t H>
BT void integer_heads(const int32_t* columns, const int32_t* bytes, int64_t room, int64_t words, const int32_t* start,
                      const float* weights, f32x16* scores) {
    i32x16 sums[H * V];
    for (int64_t h = 0; h < H; ++h)
        for (int64_t v = 0; v < V; ++v) sums[h * V + v] = set1(start[h]);
    for (int64_t w = 0; w < words; ++w) {
        i32x16 x[V];
        for (int64_t v = 0; v < V; ++v) x[v] = load(columns + w * BLOCK_ROWS + 16 * v);
        for (int64_t h = 0; h < H; ++h) {
            const i32x16 y = set1(bytes[h * room + w]);
            for (int64_t v = 0; v < V; ++v) sums[h * V + v] = dot_bytes<FAST>(sums[h * V + v], x[v], y);
        }
    }
    for (int64_t h = 0; h < H; ++h)
        for (int64_t v = 0; v < V; ++v)
            scores[v] = fma(set1(weights[h]), convert(max(sums[h * V + v], set1(int32_t(0)))), scores[v]);
}

template <bool FAST>
void score_integers(const Index& x, const Queries& q, int64_t at, const Block& block, int64_t n, Found& found) {
    const int64_t words = x.row.dim / 4;
    for (int64_t j = 0; j < n; j += 16 * ROW_VECTORS) {
        f32x16 scores[ROW_VECTORS];
        for (int64_t v = 0; v < ROW_VECTORS; ++v) scores[v] = zero();
        int64_t h = 0, i = at * q.heads;
        for (; h + TILE_QUERIES <= q.heads; h += TILE_QUERIES, i += TILE_QUERIES)
            integer_heads<FAST, ROW_VECTORS, TILE_QUERIES>(block.columns + j, q.bytes + i * q.room, q.room, words, q.start + i,
                                                           q.weights + i, scores);
        for (; h < q.heads; ++h, ++i)
            integer_heads<FAST, ROW_VECTORS, 1>(block.columns + j, q.bytes + i * q.room, q.room, words, q.start + i, q.weights + i,
                                                scores);
        for (int64_t v = 0; v < ROW_VECTORS && j + 16 * v < n; ++v)
            offer(found, mul(scores[v], load(block.scales + j + 16 * v)), block.first + j + 16 * v, n - j - 16 * v);
    }
}

// The dot products of Q queries, each the ascending sum of chains over `group` pairs of features.
template <Words W, int64_t V, int64_t Q>
BT void word_heads(const int32_t* columns, const int32_t* queries, int64_t room, int64_t pairs, int64_t group,
                   const float* weights, f32x16* scores) {
    constexpr int64_t words = W == Words::F32 ? 2 : 1;  // of a pair
    f32x16 dots[Q * V];
    for (int64_t i = 0; i < Q * V; ++i) dots[i] = zero();
    for (int64_t d = 0; d < pairs; d += group) {
        f32x16 sums[Q * V];
        for (int64_t i = 0; i < Q * V; ++i) sums[i] = zero();
        const int64_t num = pairs - d < group ? pairs - d : group;
        const int64_t query_words_each = W == Words::PAIRS ? 1 : 2;
        dot_tile<W, V, Q>(columns + d * words * BLOCK_ROWS, BLOCK_ROWS, queries + d * query_words_each, room, num, sums);
        for (int64_t i = 0; i < Q * V; ++i) dots[i] = d == 0 ? sums[i] : add(dots[i], sums[i]);
    }
    for (int64_t q = 0; q < Q; ++q)
        for (int64_t v = 0; v < V; ++v) scores[v] = fma(set1(weights[q]), max(dots[q * V + v], zero()), scores[v]);
}

template <Words W>
void score_words(const int32_t* columns, const int32_t* queries, int64_t room, int64_t heads, int64_t pairs, int64_t group,
                 const float* weights, int64_t first, int64_t n, Found& found) {
    for (int64_t j = 0; j < n; j += 16 * ROW_VECTORS) {
        f32x16 scores[ROW_VECTORS];
        for (int64_t v = 0; v < ROW_VECTORS; ++v) scores[v] = zero();
        int64_t h = 0;
        for (; h + TILE_QUERIES <= heads; h += TILE_QUERIES)
            word_heads<W, ROW_VECTORS, TILE_QUERIES>(columns + j, queries + h * room, room, pairs, group, weights + h, scores);
        for (; h < heads; ++h)
            word_heads<W, ROW_VECTORS, 1>(columns + j, queries + h * room, room, pairs, group, weights + h, scores);
        for (int64_t v = 0; v < ROW_VECTORS && j + 16 * v < n; ++v) offer(found, scores[v], first + j + 16 * v, n - j - 16 * v);
    }
}

// FP4 in f32: for queries or keys that the integers do not hold.
void score_wide(const Step& step, const Index& x, const Queries& q, int64_t at, int64_t seq, int64_t most, Block& block,
                int64_t n, Found& found) {
    const int64_t dim = x.row.dim, room = pad16(dim), groups = x.row.num_scales();
    const Pages pages{x.keys, x.per_page, x.row.bytes()};
    if (!block.has_wide)
        for (int64_t j = 0; j < BLOCK_ROWS; j += 16) {
            const uint8_t* rows[16];
            key_rows(step, pages, seq, block.first + j, most, rows);
            key_words<Words::F32>(rows, x.row, room, block.wide + j);
        }
    block.has_wide = true;
    float* queries = work_scratch.get<float>(q.heads * room);
    std::memset(queries, 0, size_t(q.heads * room) * 4);
    for (int64_t h = 0; h < q.heads; ++h) {
        const int8_t* twice = reinterpret_cast<const int8_t*>(q.words + (at * q.heads + h) * q.room);
        const uint8_t* scales = q.scales + (at * q.heads + h) * groups;
        for (int64_t i = 0; i < dim; ++i) queries[h * room + i] = 0.5f * float(twice[i]) * scale_value(scales[i / FP4_GROUP]);
    }
    score_words<Words::F32>(block.wide, reinterpret_cast<const int32_t*>(queries), room, q.heads, (dim + 1) / 2, FP4_GROUP / 2,
                            q.plain + at * q.heads, block.first, n, found);
}

// Keys from..to of a tile's sequence, offered to each of its tokens that can see them.
template <Words W>
void score_part(const Step& step, const Index& x, const Queries& q, const Tile& tile, int64_t at, int64_t from, int64_t to,
                Found* found) {
    const Pages pages{x.keys, x.per_page, x.row.bytes()};
    const int64_t dim = x.row.dim, pairs = (dim + 1) / 2;
    const int64_t words = x.is_fp4() ? pad16(dim / 4) : pad16(W == Words::F32 ? 2 * pairs : pairs);
    const int64_t wide = x.is_fp4() ? pad16(dim) : 0;
    int32_t* memory = tile_scratch.get<int32_t>((words + wide + 1) * BLOCK_ROWS);
    Block block{memory, memory + words * BLOCK_ROWS, reinterpret_cast<float*>(memory + (words + wide) * BLOCK_ROWS),
                true, false, 0, 0};
    for (int64_t first = from; first < to; first += BLOCK_ROWS) {
        block.first = first, block.count = to - first < BLOCK_ROWS ? to - first : BLOCK_ROWS;
        block.integer = true, block.has_wide = false;
        for (int64_t j = 0; j < BLOCK_ROWS; j += 16) {
            const uint8_t* rows[16];
            key_rows(step, pages, tile.seq, first + j, tile.most, rows);
            if (!x.is_fp4()) key_words<W>(rows, x.row, words, block.columns + j);
            else if (dim % FP4_GROUP != 0 || dim > 16 * FP4_GROUP) block.integer = false;
            else block.integer = key_bytes(rows, x.row, block.columns + j, block.scales + j) && block.integer;
        }
        fetch_block(step, pages, tile.seq, first + BLOCK_ROWS, to);
        for (int64_t i = 0; i < tile.count; ++i) {
            const int64_t left = x.visible(step, tile.first + i) - first, n = left < block.count ? left : block.count;
            if (n <= 0) continue;
            if (found[i].count + BLOCK_ROWS > found_room(x.k)) compact(found[i], x.k);
            if (!x.is_fp4())
                score_words<W>(block.columns, q.words + (at + i) * q.heads * q.room, q.room, q.heads, pairs, pairs,
                               q.plain + (at + i) * q.heads, first, n, found[i]);
            else if (!block.integer || !q.integer[at + i]) score_wide(step, x, q, at + i, tile.seq, tile.most, block, n, found[i]);
            else if (has_dot_bytes()) score_integers<true>(x, q, at + i, block, n, found[i]);
            else score_integers<false>(x, q, at + i, block, n, found[i]);
        }
    }
    for (int64_t i = 0; i < tile.count; ++i) compact(found[i], x.k);
}

// The best k of what the parts of one token's keys found; parts go by ascending ids.
void merge(const Found* parts, int64_t stride, int64_t num_parts, int64_t k, int32_t* ids) {
    int64_t n = 0;
    for (int64_t p = 0; p < num_parts; ++p) n += parts[p * stride].count;
    int32_t *scores = choose_scratch.get<int32_t>(2 * pad16(n)), *own = scores + pad16(n);
    n = 0;
    for (int64_t p = 0; p < num_parts; ++p) {
        const Found& part = parts[p * stride];
        std::memcpy(scores + n, part.scores, size_t(part.count) * 4);
        std::memcpy(own + n, part.ids, size_t(part.count) * 4);
        n += part.count;
    }
    if (n > k) keep_best(scores, own, n, k);
    std::memcpy(ids, own, size_t(k) * 4);
}

// ---- passes

// Tiles of the tokens first..end that see more than k entries; the others take all they see, unscored.
int64_t make_tiles(const Step& step, const Index& x, int64_t first, int64_t end, Tile* tiles) {
    int64_t num = 0;
    for (int64_t t = first; t < end; ++t) {
        const int64_t visible = x.visible(step, t);
        if (visible <= x.k) {
            for (int64_t i = 0; i < x.k; ++i) x.ids[t * x.k + i] = i < visible ? int32_t(i) : -1;
            continue;
        }
        const bool joins = num > 0 && tiles[num - 1].first + tiles[num - 1].count == t &&
                           tiles[num - 1].count < TILE_TOKENS && tiles[num - 1].seq == step.seq_ids[t];
        if (!joins) tiles[num++] = Tile{t, 0, step.seq_ids[t], 0};
        ++tiles[num - 1].count;
        tiles[num - 1].most = visible;
    }
    return num;
}

template <Words W, class T> void run_pass(const Step& step, const Index& x, int64_t first, int64_t end) {
    const int64_t tokens = end - first, heads = x.num_heads, groups = x.row.num_scales();
    Tile tiles[PASS_TOKENS];
    const int64_t num_tiles = make_tiles(step, x, first, end, tiles);
    if (num_tiles == 0) return;
    const int64_t room = x.is_fp4() ? pad16((x.row.dim + 3) / 4) : pad16(W == Words::PAIRS ? (x.row.dim + 1) / 2 : x.row.dim + 1);
    const int64_t num = tokens * heads;
    int32_t* memory = query_scratch.get<int32_t>(num * (2 * room + 3) + (num * (groups + 1) + tokens + 3) / 4 + 1);
    Queries q{heads, room, memory, memory + num * room, memory + 2 * num * room, nullptr, nullptr, nullptr, nullptr, nullptr};
    q.weights = reinterpret_cast<float*>(q.start + num);
    q.plain = q.weights + num;
    q.scales = reinterpret_cast<uint8_t*>(q.plain + num);
    q.integer_heads = q.scales + num * groups;
    q.integer = q.integer_heads + num;
    int64_t keys = 0, most = 0, widest = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
        keys += tiles[i].most * tiles[i].count;
        most = tiles[i].most > most ? tiles[i].most : most;
        widest = tiles[i].count > widest ? tiles[i].count : widest;
    }
    PARALLEL_FOR(i, num, num * x.row.dim * 4) {
        const int64_t t = i / heads;
        if (x.visible(step, first + t) > x.k) prepare<W, T>(x, q, first + t, t, i % heads);
    };
    for (int64_t t = 0; t < tokens; ++t) {
        q.integer[t] = 1;
        for (int64_t h = 0; h < heads; ++h) q.integer[t] &= q.integer_heads[t * heads + h];
    }
    // Few tiles: their keys go to different threads.
    int64_t parts = num_tiles < 4 * bittrue_threads() ? (8 * bittrue_threads() + num_tiles - 1) / num_tiles : 1;
    const int64_t worth = most * heads * x.row.dim / PART_PRODUCTS;
    if (parts > worth) parts = worth > 0 ? worth : 1;
    const int64_t part_keys = ((most + parts - 1) / parts + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    const int64_t cells = num_tiles * parts * widest, cell = 2 * found_room(x.k);
    char* places = found_scratch.get<char>(cells * (int64_t(sizeof(Found)) + 4 * cell));
    Found* found = reinterpret_cast<Found*>(places);
    int32_t* values = reinterpret_cast<int32_t*>(found + cells);
    PARALLEL_FOR(unit, num_tiles * parts, keys * heads * x.row.dim / 16) {
        const Tile& tile = tiles[unit / parts];
        const int64_t from = unit % parts * part_keys, to = from + part_keys < tile.most ? from + part_keys : tile.most;
        Found* own = found + unit * widest;
        for (int64_t i = 0; i < tile.count; ++i) {
            int32_t* at = values + (unit * widest + i) * cell;
            own[i] = Found{at, at + cell / 2, 0, 0, 0};
        }
        score_part<W>(step, x, q, tile, tile.first - first, from, to, own);
    };
    PARALLEL_FOR(i, num_tiles * widest, num_tiles * widest * parts * x.k * 4) {
        const Tile& tile = tiles[i / widest];
        const int64_t t = i % widest;
        if (t < tile.count) merge(found + i / widest * parts * widest + t, widest, parts, x.k, x.ids + (tile.first + t) * x.k);
    };
}

template <Words W, class T> void run(const Step& step, const Index& x) {
    for (int64_t first = 0; first < step.num_tokens; first += PASS_TOKENS)
        run_pass<W, T>(step, x, first, first + PASS_TOKENS < step.num_tokens ? first + PASS_TOKENS : step.num_tokens);
}

}  // namespace

BITTRUE_EXPORT(index_topk)(const Step* step, const Index* x) {
    if (x->act == 0) return run<Words::F32, float>(*step, *x);
    if (x->row.kind != ROW_BF16) return run<Words::F32, bf16>(*step, *x);
    if (has_dot_pairs()) return run<Words::PAIRS, bf16>(*step, *x);
    run<Words::MIXED, bf16>(*step, *x);
}
BITTRUE_REPLAYABLE(index_topk)
