// Products of f32 rows with a matrix as the checkpoint stores it: one arithmetic, whatever the format or the tile.
//
// Definition. Lane j of sixteen adds x[k] * w[k] for k = j mod 16 by fma in ascending k (absent k are zeros), then hsum.
// Every (row, output) pair has its own lanes, so tiles only decide what is read together, never a bit of the result.
//
// Few rows: weights are decoded in registers, for up to six rows at a time (direct_tile). One row is bound by memory, for FP4 also
// by decoding: four vector instructions for eight bytes. Many rows: the outputs of a task are decoded into the second-level cache
// (an f32 matrix of whole vectors is read in place) and multiplied there, tile by tile (block_tile): one fma a cycle.
#pragma once

#include "formats.h"

// Loops over registers must vanish, or the compiler keeps the accumulators in memory.
#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int64_t FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_FP8 = 2, FORMAT_FP4 = 3;

// A matrix [outputs, inputs]; scale is null for f32 and bf16.
struct Matrix {
    const void* data;
    const uint8_t* scale;
    int64_t format, inputs;
};

// Where a product goes: row r at data + r * stride (elements), rounded once to its dtype.
struct Target {
    void* data;
    int64_t stride;
    bool is_bf16;

    // Reads whole vectors of sums. Masked stores are slow on some processors: none for f32.
    BT void put(int64_t row, const float* sums, int64_t n) const {
        if (!is_bf16) {
            std::memcpy(static_cast<float*>(data) + row * stride, sums, size_t(n) * 4);
            return;
        }
        bf16* out = static_cast<bf16*>(data) + row * stride;
        for (int64_t i = 0; i < n; i += 16) store_n(out + i, load(sums + i), n - i);
    }
};

BT int64_t padded(int64_t k) { return (k + 15) / 16 * 16; }

// ---- the rows of the input

// How a row must be prepared for a matrix: quantised or not, in which order of lanes.
struct RowForm {
    bool is_quantised, is_fp4_order;
    BT int64_t index() const { return is_quantised * 2 + is_fp4_order; }
};
constexpr int64_t ROW_FORMS = 4;
BT RowForm row_form(int64_t index) { return {(index & 2) != 0, (index & 1) != 0}; }
BT RowForm row_form(int64_t format, bool quantize) {
    return {quantize && format >= FORMAT_FP8, FP4_HAS_OWN_ORDER && format == FORMAT_FP4};
}

// One row of k elements as f32 in this form, zero-padded to padded(k).
template <class T> inline void prepare_row(const T* x, int64_t k, RowForm form, float* out) {
    for (int64_t i = 0; i < k; i += 16) store(out + i, load_n(x + i, k - i));
    if (form.is_quantised) quant_fp8_row(out, out, k, int64_t(128));
    for (int64_t i = 0; form.is_fp4_order && i < k; i += 16) store(out + i, to_fp4_order(load(out + i)));
}

// ---- the rows of the matrix
// at(k) gives elements k..k+15 as exact f32, tail(k, n) the first n; enter(k) at every BLOCK. PER_LINE: elements of a cache line.
// DIRECT_ROWS: up to so many rows decoding in registers, again for every six, is faster than decoding to memory once (measured).

template <class T> struct PlainRow {
    static constexpr bool IS_F32 = sizeof(T) == 4;
    static constexpr int64_t DIRECT_ROWS = IS_F32 ? 6 : 64;
    static constexpr int64_t PER_LINE = 64 / sizeof(T);
    BT const char* line(int64_t k) const { return reinterpret_cast<const char*>(data + k); }
    static constexpr bool IS_FP4 = false;
    static constexpr int64_t BLOCK = 128;
    const T* data;
    BT void open(const Matrix& m, int64_t o) { data = static_cast<const T*>(m.data) + o * m.inputs; }
    BT void enter(int64_t) {}
    BT f32x16 at(int64_t k) const { return load(data + k); }
    BT f32x16 tail(int64_t k, int64_t n) const { return load_n(data + k, n); }
};

// 256 times a scale above 2^119 is no number: rows with one take two products, as exact.
constexpr uint8_t HUGE_SCALE = 247;
template <bool HAS_HUGE_SCALES> struct Fp8Row {
    static constexpr bool IS_F32 = false;
    static constexpr bool IS_FP4 = false;
    static constexpr int64_t DIRECT_ROWS = 16;
    static constexpr int64_t PER_LINE = 64;
    static constexpr int64_t BLOCK = 128;
    const uint8_t* data;
    const uint8_t* scales;
    f32x16 factor;
    BT const char* line(int64_t k) const { return reinterpret_cast<const char*>(data + k); }
    BT void open(const Matrix& m, int64_t o) {
        data = static_cast<const uint8_t*>(m.data) + o * m.inputs;
        scales = m.scale + o / 128 * ((m.inputs + 127) / 128);
    }
    BT void enter(int64_t k) { factor = set1(scale_value(scales[k / 128]) * (HAS_HUGE_SCALES ? 1.0f : 256.0f)); }
    BT f32x16 scaled(f32x16 low) const { return mul(HAS_HUGE_SCALES ? mul(low, set1(256.0f)) : low, factor); }
    BT f32x16 at(int64_t k) const { return scaled(fp8_low(data + k)); }
    BT f32x16 tail(int64_t k, int64_t n) const {
        uint8_t bytes[16] = {};
        std::memcpy(bytes, data + k, size_t(n));
        return scaled(fp8_low(bytes));
    }
};
inline bool has_huge_scales(const Matrix& m, int64_t o, int64_t count) {
    const int64_t blocks = (m.inputs + 127) / 128;
    for (int64_t i = o / 128 * blocks; i < ((o + count - 1) / 128 + 1) * blocks; ++i)
        if (m.scale[i] >= HUGE_SCALE) return true;
    return false;
}

struct Fp4Row {
    static constexpr bool IS_F32 = false;
    static constexpr int64_t DIRECT_ROWS = 64;
    static constexpr int64_t PER_LINE = 128;
    BT const char* line(int64_t k) const { return reinterpret_cast<const char*>(data + k / 2); }
    static constexpr bool IS_FP4 = true;
    static constexpr int64_t BLOCK = 32;
    const uint8_t* data;
    const uint8_t* scales;
    const float* values;
    BT void open(const Matrix& m, int64_t o) {
        data = static_cast<const uint8_t*>(m.data) + o * (m.inputs / 2);
        scales = m.scale + o * ((m.inputs + 31) / 32);
    }
    BT void enter(int64_t k) { values = FP4_SCALED.of[scales[k / 32]]; }
    BT f32x16 at(int64_t k) const { return fp4_lanes(data + k / 2, values); }
    BT f32x16 tail(int64_t k, int64_t n) const {
        uint8_t bytes[8] = {};
        std::memcpy(bytes, data + k / 2, size_t(n / 2));
        return fp4_lanes(bytes, values);
    }
};

// ---- sums

// Adds the lanes of N vectors by hsum's tree, sixteen vectors at a time: sums[i] of vector i. Writes whole vectors: sums has
// room for N rounded up to sixteen.
template <int S> BT f32x16 fold(f32x16 a, f32x16 b) {  // lanes without bit S: a[i] + a[i + S], the others b[i - S] + b[i]
    return add(blend_lanes<S>(a, xor_lanes<S>(b)), blend_lanes<S>(xor_lanes<S>(a), b));
}
template <int N> BT void sum_lanes(const f32x16* a, float* sums) {
    if constexpr (N < 5) {
        for (int i = 0; i < N; ++i) sums[i] = hsum(a[i]);
    } else {
        f32x16 v[16];
        UNROLL for (int i = 0; i < 8; ++i) v[i] = i < N ? fold<8>(a[i], i + 8 < N ? a[i + 8] : a[i]) : a[0];
        UNROLL for (int i = 0; i < 4; ++i) v[i] = fold<4>(v[i], v[i + 4 < N ? i + 4 : i]);
        UNROLL for (int i = 0; i < 2; ++i) v[i] = fold<2>(v[i], v[i + 2]);
        const f32x16 total = fold<1>(v[0], v[1]);
        store(sums, total);
        if constexpr (N > 16) sum_lanes<N - 16>(a + 16, sums + 16);
    }
}

// ---- tiles

// Accumulators that stay in registers: 32 vector registers, 16 of half the width, or memory.
#if BITTRUE_ISA_CODE == 2
constexpr int TILE_OUTPUTS = 6, DIRECT_TILE_ROWS = 6;
constexpr int direct_outputs(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 6 : 4; }
#else
constexpr int TILE_OUTPUTS = 1, DIRECT_TILE_ROWS = 4;
constexpr int direct_outputs(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif
constexpr int TILE_ROWS = 4;
constexpr int64_t PANEL_OUTPUTS = 24;  // outputs of one task: their decoded weights stay in the second-level cache
constexpr int64_t SUMS_STRIDE = (PANEL_OUTPUTS + 15) / 16 * 16 + 16;

// Asks for some lines of memory: to the second-level cache, far ahead.
template <int LINES> BT void prefetch(const char* p) {
    UNROLL for (int i = 0; i < LINES; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
}
// acc[r][c] += x[r] * v(c), one vector of k: whichever of the two is more numerous is read one by one.
template <int R, int C, class Decode> BT void multiply(const float* const (&x)[R], int64_t k, f32x16 (&acc)[R][C], const Decode& decode) {
    if constexpr (R >= C) {
        f32x16 v[C];
        UNROLL for (int c = 0; c < C; ++c) v[c] = decode(c);
        UNROLL for (int r = 0; r < R; ++r) {
            const f32x16 xv = load(x[r] + k);
            UNROLL for (int c = 0; c < C; ++c) acc[r][c] = fma(xv, v[c], acc[r][c]);
        }
    } else {
        f32x16 xv[R];
        UNROLL for (int r = 0; r < R; ++r) xv[r] = load(x[r] + k);
        UNROLL for (int c = 0; c < C; ++c) {
            const f32x16 v = decode(c);
            UNROLL for (int r = 0; r < R; ++r) acc[r][c] = fma(xv[r], v, acc[r][c]);
        }
    }
}

// sums[r][c] of rows x[0..R) with the stored rows o..o+C; rows beyond `last` are `last` again.
template <class Row, int R, int C>
inline void direct_tile(const float* const* x, const Matrix& m, int64_t o, int64_t last, float* sums, int64_t stride) {
    Row w[C];
    UNROLL for (int c = 0; c < C; ++c) w[c].open(m, o + c < last ? o + c : last);
    const int64_t ahead = C * m.inputs * 64 / Row::PER_LINE;  // the rows of the next tile
    const float* xr[R];
    UNROLL for (int r = 0; r < R; ++r) xr[r] = x[r];
    f32x16 acc[R][C];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t block = 0; block < m.inputs; block += Row::BLOCK) {
        const int64_t end = block + Row::BLOCK < m.inputs ? block + Row::BLOCK : m.inputs;
        UNROLL for (int c = 0; c < C; ++c) w[c].enter(block);
        // The hardware follows long rows of f32 by itself, and few rows leave no time for more instructions.
        if ((!Row::IS_F32 || R > 4) && block % 128 == 0)
            UNROLL for (int c = 0; c < C; ++c) prefetch<128 / Row::PER_LINE>(w[c].line(block) + ahead);
        int64_t k = block;
        if (Row::BLOCK == 32 && end - block == 32) {  // spares the loop of two
            multiply<R, C>(xr, k, acc, [&](int c) __attribute__((always_inline)) { return w[c].at(k); });
            multiply<R, C>(xr, k + 16, acc, [&](int c) __attribute__((always_inline)) { return w[c].at(k + 16); });
            continue;
        }
        for (; k + 16 <= end; k += 16)
            multiply<R, C>(xr, k, acc, [&](int c) __attribute__((always_inline)) { return w[c].at(k); });
        if (k < end)
            multiply<R, C>(xr, k, acc, [&](int c) __attribute__((always_inline)) { return w[c].tail(k, end - k); });
    }
    UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (Row::IS_FP4) UNROLL for (int c = 0; c < C; ++c) acc[r][c] = from_fp4_order(acc[r][c]);
        sum_lanes<C>(acc[r], sums + r * stride);
    }
}

template <class Row, int R>
inline void direct_rows(const float* const* x, const Matrix& m, int64_t o, int64_t count, Target out, int64_t row) {
    constexpr int C = direct_outputs(R);
    alignas(64) float sums[R * SUMS_STRIDE];
    for (int64_t c = 0; c < count; c += C)
        direct_tile<Row, R, C>(x, m, o + c, o + count - 1, sums + c, SUMS_STRIDE);
    for (int r = 0; r < R; ++r) out.put(row + r, sums + r * SUMS_STRIDE, count);
}

template <class Row>
inline void direct_panel(const float* const* x, int64_t n, const Matrix& m, int64_t o, int64_t count, Target out) {
    const int64_t passes = (n + DIRECT_TILE_ROWS - 1) / DIRECT_TILE_ROWS;
    for (int64_t row = 0, pass = 1; row < n; ++pass) {
        const int64_t rows = n * pass / passes - row;  // about as many in each
        const float* const* xr = x + row;
        if (rows == 1) direct_rows<Row, 1>(xr, m, o, count, out, row);
        else if (rows == 2) direct_rows<Row, 2>(xr, m, o, count, out, row);
        else if (rows == 3) direct_rows<Row, 3>(xr, m, o, count, out, row);
        else if (rows == 4) direct_rows<Row, 4>(xr, m, o, count, out, row);
        if constexpr (DIRECT_TILE_ROWS > 4) {
            if (rows == 5) direct_rows<Row, 5>(xr, m, o, count, out, row);
            else if (rows == 6) direct_rows<Row, 6>(xr, m, o, count, out, row);
        }
        row += rows;
    }
}

// Stored row o as padded f32.
template <class Row> inline void decode_row(const Matrix& m, int64_t o, float* out) {
    Row w;
    w.open(m, o);
    for (int64_t block = 0; block < m.inputs; block += Row::BLOCK) {
        const int64_t end = block + Row::BLOCK < m.inputs ? block + Row::BLOCK : m.inputs;
        w.enter(block);
        int64_t k = block;
        for (; k + 16 <= end; k += 16) store(out + k, w.at(k));
        if (k < end) store(out + k, w.tail(k, end - k));
    }
}

// out[r][c] = row x[r] by the decoded, padded row w[c] of kp elements.
template <int R, int C>
inline void block_tile(const float* const* x, const float* const* w, int64_t kp, bool is_fp4_order, float* out) {
    const float* xr[R];
    const float* wc[C];
    UNROLL for (int r = 0; r < R; ++r) xr[r] = x[r];
    UNROLL for (int c = 0; c < C; ++c) wc[c] = w[c];
    f32x16 acc[R][C];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t k = 0; k < kp; k += 16)
        multiply<R, C>(xr, k, acc, [&](int c) __attribute__((always_inline)) { return load(wc[c] + k); });
    if (is_fp4_order)
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) acc[r][c] = from_fp4_order(acc[r][c]);
    alignas(64) float sums[(R * C + 15) / 16 * 16];
    sum_lanes<R * C>(acc[0], sums);
    UNROLL for (int r = 0; r < R; ++r) std::memcpy(out + r * SUMS_STRIDE, sums + r * C, C * 4);
}

template <int C>
inline void block_rows(int64_t rows, const float* const* x, const float* const* w, int64_t kp, bool is_fp4_order, float* sums) {
    if (rows == 1) return block_tile<1, C>(x, w, kp, is_fp4_order, sums);
    if (rows == 2) return block_tile<2, C>(x, w, kp, is_fp4_order, sums);
    if (rows == 3) return block_tile<3, C>(x, w, kp, is_fp4_order, sums);
    return block_tile<4, C>(x, w, kp, is_fp4_order, sums);
}

thread_local Scratch decoded_weights;

template <class Row>
inline void block_panel(const float* const* x, int64_t n, const Matrix& m, int64_t o, int64_t count, Target out) {
    constexpr int64_t C = TILE_OUTPUTS, PADDED_OUTPUTS = (PANEL_OUTPUTS + C - 1) / C * C;
    const int64_t kp = padded(m.inputs);
    const float* w[PADDED_OUTPUTS];
    if (Row::IS_F32 && kp == m.inputs) {
        for (int64_t c = 0; c < count; ++c) w[c] = static_cast<const float*>(m.data) + (o + c) * m.inputs;
    } else {
        float* buffer = decoded_weights.get<float>(count * kp);
        for (int64_t c = 0; c < count; ++c) {
            decode_row<Row>(m, o + c, buffer + c * kp);
            w[c] = buffer + c * kp;
        }
    }
    for (int64_t c = count; c < PADDED_OUTPUTS; ++c) w[c] = w[count - 1];
    alignas(64) float sums[TILE_ROWS * SUMS_STRIDE];
    for (int64_t r = 0; r < n; r += TILE_ROWS) {
        const int64_t rows = n - r < TILE_ROWS ? n - r : TILE_ROWS;
        for (int64_t c = 0; c < count; c += C)
            block_rows<C>(rows, x + r, w + c, kp, FP4_HAS_OWN_ORDER && Row::IS_FP4, sums + c);
        for (int64_t i = 0; i < rows; ++i) out.put(r + i, sums + i * SUMS_STRIDE, count);
    }
}

// out[r][c] = x[r] . row o + c of m, for n rows and c in 0..count (at most PANEL_OUTPUTS). Rows x have m's form, see RowForm.
template <class Row>
inline void panel(const float* const* x, int64_t n, const Matrix& m, int64_t o, int64_t count, Target out) {
    if (n <= Row::DIRECT_ROWS) direct_panel<Row>(x, n, m, o, count, out);
    else block_panel<Row>(x, n, m, o, count, out);
}
inline void panel(const float* const* x, int64_t n, const Matrix& m, int64_t o, int64_t count, Target out) {
    if (n == 0 || count == 0) return;
    if (m.format == FORMAT_F32) panel<PlainRow<float>>(x, n, m, o, count, out);
    else if (m.format == FORMAT_BF16) panel<PlainRow<bf16>>(x, n, m, o, count, out);
    else if (m.format == FORMAT_FP4) panel<Fp4Row>(x, n, m, o, count, out);
    else if (has_huge_scales(m, o, count)) panel<Fp8Row<true>>(x, n, m, o, count, out);
    else panel<Fp8Row<false>>(x, n, m, o, count, out);
}

}  // namespace
