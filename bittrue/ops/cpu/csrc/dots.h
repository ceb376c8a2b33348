// Dot products that do more than one product a lane, between columns: sixteen rows to a vector, one query broadcast.
//
// Rows are kept as "words" of 32 bits: a pair of bf16 features (the even one in the low half), or one f32 feature. A block of
// rows is transposed once, so that a dot product is one chain in each lane and needs no horizontal sum.
//
// The order of every chain over features (and of every chain over rows in attention.cpp) is the same for all formats:
// pairs ascending, the second of a pair first. It is what VDPBF16PS does in one instruction, which is used where it exists:
// it is fma(low, low, fma(high, high, sum)) but for subnormal numbers. Pairs hold no magnitude below 2^-50 other than 0
// (flush_pairs), so every sum is a multiple of 2^-114 and no subnormal number can arise.
#pragma once

#include "rowops.h"

namespace {

#if BITTRUE_ISA_CODE == 2
constexpr int64_t ROW_VECTORS = 4;  // vectors of rows in a tile of four queries
#else
constexpr int64_t ROW_VECTORS = 1;
#endif
constexpr int64_t TILE_QUERIES = 4;
constexpr int64_t BLOCK_ROWS = 64;  // rows transposed at a time

// ---- what simd.h lacks: integers

#if BITTRUE_ISA_CODE == 2
BT i32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
BT i32x16 load_n(const int32_t* p, int64_t n) { return {_mm512_maskz_loadu_epi32(first_lanes(n), p)}; }
BT void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
BT i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
BT i32x16 min(i32x16 a, i32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
BT i32x16 shift_left(i32x16 a, i32x16 by) { return {_mm512_sllv_epi32(a.v, by.v)}; }
// Bit i: a > b in lane i, signed.
BT uint32_t greater_bits(i32x16 a, i32x16 b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
// Every byte i < 16 of `index` becomes byte i of `table` (16 bytes).
BT i32x16 lookup_bytes(const uint8_t* table, i32x16 index) {
    __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm512_shuffle_epi8(t, index.v)};
}
#elif BITTRUE_ISA_CODE == 1
BT i32x16 load(const int32_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
BT i32x16 load_n(const int32_t* p, int64_t n) {
    return {_mm256_maskload_epi32(p, first_lanes8(n)), _mm256_maskload_epi32(p + 8, first_lanes8(n - 8))};
}
BT void store(int32_t* p, i32x16 a) {
    __m256i* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a.lo);
    _mm256_storeu_si256(q + 1, a.hi);
}
BT i32x16 max(i32x16 a, i32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
BT i32x16 min(i32x16 a, i32x16 b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
BT i32x16 shift_left(i32x16 a, i32x16 by) { return {_mm256_sllv_epi32(a.lo, by.lo), _mm256_sllv_epi32(a.hi, by.hi)}; }
BT uint32_t greater_bits(i32x16 a, i32x16 b) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.lo, b.lo)))) |
           uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.hi, b.hi)))) << 8;
}
BT i32x16 lookup_bytes(const uint8_t* table, i32x16 index) {
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, index.lo), _mm256_shuffle_epi8(t, index.hi)};
}
#else
BT i32x16 load(const int32_t* p) {
    i32x16 r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
BT i32x16 load_n(const int32_t* p, int64_t n) {
    i32x16 r;
    BITTRUE_LANES r.v[i] = i < n ? p[i] : 0;
    return r;
}
BT void store(int32_t* p, i32x16 a) { std::memcpy(p, &a, sizeof a); }
BITTRUE_BINARY(max, i32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
BITTRUE_BINARY(min, i32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
BITTRUE_BINARY(shift_left, i32x16, int32_t(uint32_t(a.v[i]) << b.v[i]))
BT uint32_t greater_bits(i32x16 a, i32x16 b) {
    uint32_t m = 0;
    BITTRUE_LANES m |= uint32_t(a.v[i] > b.v[i]) << i;
    return m;
}
BT i32x16 lookup_bytes(const uint8_t* table, i32x16 index) {
    uint8_t bytes[64];
    std::memcpy(bytes, &index, 64);
    for (int i = 0; i < 64; ++i) bytes[i] = table[bytes[i] & 15];
    std::memcpy(&index, bytes, 64);
    return index;
}
#endif

// Row i, lane j becomes row j, lane i.
#if BITTRUE_ISA_CODE == 2
BT void transpose16(i32x16* a) {
    __m512i t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(a[i].v, a[i + 1].v);
        t[i + 1] = _mm512_unpackhi_epi32(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // u[4 r + j], quarter q: lane 4 q + j of rows 4 r .. 4 r + 3
    for (int j = 0; j < 4; ++j) {
        __m512i even0 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        __m512i even1 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88), odd1 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        a[j].v = _mm512_shuffle_i32x4(even0, even1, 0x88);
        a[4 + j].v = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        a[8 + j].v = _mm512_shuffle_i32x4(even0, even1, 0xdd);
        a[12 + j].v = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    }
}
#elif BITTRUE_ISA_CODE == 1
BT void transpose8(__m256i* a) {
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        a[j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x20);
        a[4 + j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x31);
    }
}
BT void transpose16(i32x16* a) {
    __m256i block[4][8];  // rows 0-7 and 8-15 by lanes 0-7 and 8-15
    for (int i = 0; i < 8; ++i) {
        block[0][i] = a[i].lo, block[1][i] = a[i].hi;
        block[2][i] = a[8 + i].lo, block[3][i] = a[8 + i].hi;
    }
    for (int b = 0; b < 4; ++b) transpose8(block[b]);
    for (int i = 0; i < 8; ++i) {
        a[i] = {block[0][i], block[2][i]};
        a[8 + i] = {block[1][i], block[3][i]};
    }
}
#else
BT void transpose16(i32x16* a) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) {
            int32_t x = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = x;
        }
}
#endif

// ---- bytes: sum + the four products of the unsigned bytes of a with the signed bytes of b. Two of them fit 15 bits.

#if BITTRUE_ISA_CODE == 2
template <bool FAST> BT i32x16 dot_bytes(i32x16 sum, i32x16 a, i32x16 b) {
    if constexpr (FAST) {  // spelled as assembly: the file is compiled for processors without it
        asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
        return sum;
    }
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_maddubs_epi16(a.v, b.v), _mm512_set1_epi16(1)))};
}
#elif BITTRUE_ISA_CODE == 1
template <bool FAST> BT i32x16 dot_bytes(i32x16 sum, i32x16 a, i32x16 b) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(a.lo, b.lo), one)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(a.hi, b.hi), one))};
}
#else
template <bool FAST> BT i32x16 dot_bytes(i32x16 sum, i32x16 a, i32x16 b) {
    const uint8_t* x = reinterpret_cast<const uint8_t*>(&a);
    const int8_t* y = reinterpret_cast<const int8_t*>(&b);
    for (int i = 0; i < 64; ++i) sum.v[i / 4] += int32_t(x[i]) * int32_t(y[i]);
    return sum;
}
#endif

// ---- pairs of bf16

BT int32_t pair_of(bf16 low, bf16 high) { return int32_t(uint32_t(low.bits) | uint32_t(high.bits) << 16); }
BT f32x16 low_of(i32x16 pairs) { return as_float(shift_left<16>(pairs)); }
BT f32x16 high_of(i32x16 pairs) { return as_float(bit_and(pairs, set1(int32_t(0xffff0000)))); }

constexpr float LEAST_FACTOR = 0x1p-50f;
BT f32x16 flushed(f32x16 x) { return select(less(abs(x), set1(LEAST_FACTOR)), zero(), x); }
BT i32x16 pairs_of(f32x16 low, f32x16 high) {
    return bit_or(shift_right<16>(as_int(low)), bit_and(as_int(high), set1(int32_t(0xffff0000))));
}
// The same on pairs: 0x2680 is 2^-50. NaN is kept.
#if BITTRUE_ISA_CODE == 2
BT i32x16 flush_pairs(i32x16 pairs) {
    __m512i size = _mm512_and_si512(pairs.v, _mm512_set1_epi16(0x7fff));
    return {_mm512_maskz_mov_epi16(_mm512_cmpgt_epi16_mask(size, _mm512_set1_epi16(0x267f)), pairs.v)};
}
#elif BITTRUE_ISA_CODE == 1
BT __m256i flush_pairs(__m256i pairs) {
    __m256i size = _mm256_and_si256(pairs, _mm256_set1_epi16(0x7fff));
    return _mm256_and_si256(_mm256_cmpgt_epi16(size, _mm256_set1_epi16(0x267f)), pairs);
}
BT i32x16 flush_pairs(i32x16 pairs) { return {flush_pairs(pairs.lo), flush_pairs(pairs.hi)}; }
#else
BT i32x16 flush_pairs(i32x16 pairs) { return pairs_of(flushed(low_of(pairs)), flushed(high_of(pairs))); }
#endif

// Sixteen rows of `words` words to columns: out[w * out_stride + row]. FLUSH: rows are pairs as stored.
template <bool FLUSH> inline void transpose_rows(const int32_t* const* rows, int64_t words, int32_t* out, int64_t out_stride) {
    for (int64_t w = 0; w < words; w += 16) {
        const int64_t n = words - w < 16 ? words - w : 16;
        i32x16 a[16];
        for (int64_t i = 0; i < 16; ++i) {
            a[i] = n == 16 ? load(rows[i] + w) : load_n(rows[i] + w, n);
            if constexpr (FLUSH) a[i] = flush_pairs(a[i]);
        }
        transpose16(a);
        for (int64_t i = 0; i < n; ++i) store(out + (w + i) * out_stride, a[i]);
    }
}

#if BITTRUE_ISA_CODE == 2
BT f32x16 dot_pairs(f32x16 sum, i32x16 a, i32x16 b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
}

// Whether VDPBF16PS exists and gives the bits of two fused multiply-adds, the second of the pair first.
inline bool try_dot_pairs() {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    uint32_t state = 1;
    auto next = [&state](int64_t spread) {
        state = state * 1664525u + 1013904223u;
        return (state & 0x80000000u) | (127u - uint32_t(spread) + (state >> 8) % uint32_t(2 * spread)) << 23 |
               ((state >> 3) & 0x7fffffu);
    };
    for (int64_t round = 0; round < 256; ++round) {
        alignas(64) int32_t a[16], b[16];
        float sum[16], got[16], want[16];
        const int64_t spread = 1 + round % 40;
        for (int64_t i = 0; i < 16; ++i) {
            a[i] = int32_t((next(spread) & 0xffff0000u) | next(spread) >> 16);
            b[i] = int32_t((next(spread) & 0xffff0000u) | next(spread) >> 16);
            sum[i] = float_of(next(spread));
        }
        const i32x16 x = load(a), y = load(b);
        const f32x16 s = load(sum);
        store(got, dot_pairs(s, x, y));
        store(want, fma(low_of(x), low_of(y), fma(high_of(x), high_of(y), s)));
        if (std::memcmp(got, want, sizeof got) != 0) return false;
    }
    return true;
}
inline bool has_dot_pairs() {
    static const bool has = try_dot_pairs();
    return has;
}
inline bool has_dot_bytes() {
    static const bool has = __builtin_cpu_supports("avx512vnni");
    return has;
}
#else
BT f32x16 dot_pairs(f32x16 sum, i32x16 a, i32x16 b) { return fma(low_of(a), low_of(b), fma(high_of(a), high_of(b), sum)); }
inline bool has_dot_pairs() { return false; }
inline bool has_dot_bytes() { return false; }
#endif

// ---- dot products of queries with a block of transposed rows

// How the words of rows and queries are laid out.
enum class Words {
    F32,    // rows and queries f32
    MIXED,  // rows pairs of bf16, queries f32
    PAIRS,  // rows and queries pairs of bf16
};

template <Words W> constexpr int64_t words_of(int64_t features) { return W == Words::F32 ? features : (features + 1) / 2; }

// sums[q * V + v] += rows . query q over `pairs` pairs of features; columns [words, stride], queries q_stride words apart.
template <Words W, int64_t V, int64_t Q>
BT void dot_tile(const int32_t* columns, int64_t stride, const int32_t* queries, int64_t q_stride, int64_t pairs, f32x16* sums) {
    const float* q32 = reinterpret_cast<const float*>(queries);
    for (int64_t d = 0; d < pairs; ++d) {
        if constexpr (W == Words::PAIRS) {
            i32x16 x[V];
            for (int64_t v = 0; v < V; ++v) x[v] = load(columns + d * stride + 16 * v);
            for (int64_t q = 0; q < Q; ++q) {
                const i32x16 y = set1(queries[q * q_stride + d]);
                for (int64_t v = 0; v < V; ++v) sums[q * V + v] = dot_pairs(sums[q * V + v], x[v], y);
            }
        } else {
            f32x16 low[V], high[V];
            for (int64_t v = 0; v < V; ++v) {
                if constexpr (W == Words::F32) {
                    low[v] = as_float(load(columns + 2 * d * stride + 16 * v));
                    high[v] = as_float(load(columns + (2 * d + 1) * stride + 16 * v));
                } else {
                    const i32x16 x = load(columns + d * stride + 16 * v);
                    low[v] = low_of(x), high[v] = high_of(x);
                }
            }
            for (int64_t q = 0; q < Q; ++q)
                for (int64_t v = 0; v < V; ++v)
                    sums[q * V + v] = fma(low[v], set1(q32[q * q_stride + 2 * d]),
                                          fma(high[v], set1(q32[q * q_stride + 2 * d + 1]), sums[q * V + v]));
        }
    }
}

// n features of type T (pairs: bf16) as the words of a query; `room` words, zeros after the features.
template <Words W, class T> inline void query_words(const T* x, int64_t n, int32_t* out, int64_t room) {
    if constexpr (W == Words::PAIRS) {
        static_assert(sizeof(T) == 2);
        std::memset(out + n / 2, 0, size_t(room - n / 2) * 4);
        std::memcpy(out, x, size_t(n) * 2);
        for (int64_t i = 0; i < room; i += 16) store(out + i, flush_pairs(load(out + i)));
    } else {
        float* values = reinterpret_cast<float*>(out);
        for (int64_t i = 0; i < room; i += 16) {
            f32x16 v = i < n ? load_n(x + i, n - i < 16 ? n - i : 16) : zero();
            if constexpr (W == Words::MIXED) v = flushed(v);
            store(values + i, v);
        }
    }
}

// ---- rows to pairs

#if BITTRUE_ISA_CODE == 2
// 32 E4M3 values times 2^(scale - 127), for scales that make none of them smaller than 2^-50 or too large.
constexpr uint8_t LEAST_FP8_SCALE = 127 - 41, MOST_FP8_SCALE = 200;
BT i32x16 fp8_pairs(const uint8_t* bytes, uint8_t scale) {
    // As bf16, exponent and mantissa keep their order: the exponent gains the difference of the biases and the scale.
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i gain = _mm512_set1_epi16(int16_t((int32_t(scale) - 127) * 128));
    const __m512i size = _mm512_and_si512(w, _mm512_set1_epi16(0x7f));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_add_epi16(gain, _mm512_set1_epi16(120 * 128)));
    // Subnormal ones, m 2^-9, from a table; the index is the low five bits.
    const __m512i table = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i scaled_table = _mm512_mask_add_epi16(table, 0xfe, table, gain);
    const __mmask32 subnormal = _mm512_testn_epi16_mask(w, _mm512_set1_epi16(0x78));
    bits = _mm512_mask_permutexvar_epi16(bits, subnormal, w, scaled_table);
    bits = _mm512_or_si512(bits, _mm512_slli_epi16(_mm512_and_si512(w, _mm512_set1_epi16(0x80)), 8));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
    return {_mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7fc0))};
}
#endif

// Features from..to (even) of a stored bf16 or fp8 row as pairs, 0 after the last feature; out [(to - from) / 2].
inline void pairs_row(const uint8_t* row, const RowSpec& spec, int64_t from, int64_t to, int32_t* out) {
    const int64_t plain = spec.kind == ROW_FP8 ? spec.quantised() : 0;  // where the features stored as bf16 begin
    const uint8_t* scales = row + plain + 2 * spec.rope_dim;
    uint16_t* halves = reinterpret_cast<uint16_t*>(out) - from;
    int64_t i = from;
    for (; i < to && i < plain; i += 32) {
        const int64_t n = plain - i < to - i ? plain - i : to - i;
        const uint8_t scale = scales[i / KV_GROUP];
#if BITTRUE_ISA_CODE == 2
        if (n >= 32 && scale >= LEAST_FP8_SCALE && scale <= MOST_FP8_SCALE) {
            const i32x16 pairs = fp8_pairs(row + i, scale);
            std::memcpy(halves + i, &pairs, 64);
            continue;
        }
#endif
        for (int64_t j = i; j < i + n && j < i + 32; j += 16) {
            const int64_t left = i + n - j;
            f32x16 values = load_fp8_n(row + j, left);
            values = select(equal(abs(values), set1(480.0f)), set1(__builtin_nanf("")), values);
            store_n(reinterpret_cast<bf16*>(halves + j), flushed(scaled(values, scale)), left);
        }
    }
    if (i > plain) i = plain;
    if (i < from) i = from;
    const int64_t end = to < spec.dim ? to : spec.dim;
    if (i < end) {
        const uint16_t* stored = reinterpret_cast<const uint16_t*>(spec.kind == ROW_FP8 ? row + plain : row);
        for (; i + 32 <= end; i += 32) {
            i32x16 pairs;
            std::memcpy(&pairs, stored + (i - plain), 64);
            pairs = flush_pairs(pairs);
            std::memcpy(halves + i, &pairs, 64);
        }
        for (; i < end; ++i) {
            const uint16_t x = stored[i - plain];
            halves[i] = (x & 0x7fff) < 0x2680 ? 0 : x;
        }
    }
    for (i = i < from ? from : i; i < to; ++i) halves[i] = 0;
}

}  // namespace
