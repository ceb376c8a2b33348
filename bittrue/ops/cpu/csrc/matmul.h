// Products of f32 rows with a matrix as the checkpoint stores it: one arithmetic, whatever the format or the tile.
//
// Definition. Lane j of sixteen adds x[k] * w[k] for k = j mod 16 by fma in ascending k (absent k are zeros), then hsum.
// Every (row, output) pair has its own lanes, so tiles only decide what is read together, never a bit of the result.
#pragma once

#include "formats.h"

namespace {

constexpr int64_t FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_FP8 = 2, FORMAT_FP4 = 3;

// A matrix [outputs, inputs]; scale is null for f32 and bf16.
struct Matrix {
    const void* data;
    const uint8_t* scale;
    int64_t inputs;
};

BT int64_t padded(int64_t k) { return (k + 15) / 16 * 16; }

// One stored row: at(k) gives elements k..k+15 as exact f32, tail(k, n) the first n of them; enter(k) at every BLOCK.
template <class T> struct PlainRow {
    static constexpr bool IS_F32 = sizeof(T) == 4;
    static constexpr int64_t BLOCK = 128;
    const T* data;
    BT void open(const Matrix& m, int64_t o) { data = static_cast<const T*>(m.data) + o * m.inputs; }
    BT void enter(int64_t) {}
    BT f32x16 at(int64_t k) const { return load(data + k); }
    BT f32x16 tail(int64_t k, int64_t n) const { return load_n(data + k, n); }
};

struct Fp8Row {
    static constexpr bool IS_F32 = false;
    static constexpr int64_t BLOCK = 128;
    const uint8_t* data;
    const uint8_t* scales;
    f32x16 scale;
    BT void open(const Matrix& m, int64_t o) {
        data = static_cast<const uint8_t*>(m.data) + o * m.inputs;
        scales = m.scale + o / 128 * ((m.inputs + 127) / 128);
    }
    BT void enter(int64_t k) { scale = set1(scale_value(scales[k / 128])); }
    BT f32x16 at(int64_t k) const { return mul(load_fp8(data + k), scale); }
    BT f32x16 tail(int64_t k, int64_t n) const { return mul(load_fp8_n(data + k, n), scale); }
};

struct Fp4Row {
    static constexpr bool IS_F32 = false;
    static constexpr int64_t BLOCK = 32;
    const uint8_t* data;
    const uint8_t* scales;
    f32x16 scale;
    BT void open(const Matrix& m, int64_t o) {
        data = static_cast<const uint8_t*>(m.data) + o * (m.inputs / 2);
        scales = m.scale + o * ((m.inputs + 31) / 32);
    }
    BT void enter(int64_t k) { scale = set1(scale_value(scales[k / 32])); }
    BT f32x16 at(int64_t k) const { return mul(load_fp4(data + k / 2), scale); }
    BT f32x16 tail(int64_t k, int64_t n) const { return mul(load_fp4_n(data + k / 2, n), scale); }
};

// Accumulators that stay in registers: 32 vector registers, 16 of half the width, or memory.
#if BITTRUE_ISA_CODE == 2
constexpr int TILE_ROWS = 4, TILE_OUTPUTS = 6;
constexpr int direct_outputs(int rows) { return rows == 1 ? 8 : 4; }
#else
constexpr int TILE_ROWS = 2, TILE_OUTPUTS = 3;
constexpr int direct_outputs(int rows) { return rows == 1 ? 4 : 2; }
#endif
constexpr int64_t DIRECT_ROWS = 4;     // up to here a weight is decoded once for all rows, in registers
constexpr int64_t PANEL_OUTPUTS = 48;  // outputs of one task: their decoded weights stay in the second-level cache

template <int R, int C> BT void finish(const f32x16 (&acc)[R][C], float* sums) {
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r * C + c] = hsum(acc[r][c]);
}

// sums[r][c] of rows x[0..R) with the stored rows o..o+C.
template <class Row, int R, int C>
inline void direct_tile(const float* const* x, const Matrix& m, int64_t o, float* sums) {
    Row w[C];
    for (int c = 0; c < C; ++c) w[c].open(m, o + c);
    f32x16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t block = 0; block < m.inputs; block += Row::BLOCK) {
        int64_t end = block + Row::BLOCK < m.inputs ? block + Row::BLOCK : m.inputs;
        for (int c = 0; c < C; ++c) w[c].enter(block);
        int64_t k = block;
        for (; k + 16 <= end; k += 16)
            for (int c = 0; c < C; ++c) {
                f32x16 v = w[c].at(k);
                for (int r = 0; r < R; ++r) acc[r][c] = fma(load(x[r] + k), v, acc[r][c]);
            }
        if (k < end)
            for (int c = 0; c < C; ++c) {
                f32x16 v = w[c].tail(k, end - k);
                for (int r = 0; r < R; ++r) acc[r][c] = fma(load(x[r] + k), v, acc[r][c]);
            }
    }
    finish<R, C>(acc, sums);
}

// The same with decoded, padded rows w[0..C) of kp elements.
template <int R, int C> inline void tile(const float* const* x, const float* const* w, int64_t kp, float* sums) {
    const float* xr[R];
    const float* wc[C];
    for (int r = 0; r < R; ++r) xr[r] = x[r];
    for (int c = 0; c < C; ++c) wc[c] = w[c];
    f32x16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t k = 0; k < kp; k += 16) {
        f32x16 xv[R];
        for (int r = 0; r < R; ++r) xv[r] = load(xr[r] + k);
        for (int c = 0; c < C; ++c) {
            f32x16 v = load(wc[c] + k);
            for (int r = 0; r < R; ++r) acc[r][c] = fma(xv[r], v, acc[r][c]);
        }
    }
    finish<R, C>(acc, sums);
}

template <int C> inline void tile_rows(int64_t rows, const float* const* x, const float* const* w, int64_t kp, float* s) {
    if (rows == 4) {
        if constexpr (TILE_ROWS >= 4) tile<4, C>(x, w, kp, s);
    } else if (rows == 3) {
        if constexpr (TILE_ROWS >= 4) tile<3, C>(x, w, kp, s);
    } else if (rows == 2) {
        tile<2, C>(x, w, kp, s);
    } else {
        tile<1, C>(x, w, kp, s);
    }
}

template <class Out>
BT void put(Out* out, int64_t stride, int64_t row, int64_t rows, int64_t o, int64_t outputs, const float* sums) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < outputs; ++c) out[(row + r) * stride + o + c] = from_float<Out>(sums[r * outputs + c]);
}

template <class Row, int R, class Out>
inline void direct_panel(const float* const* x, const Matrix& m, int64_t o0, int64_t count, Out* out, int64_t stride) {
    constexpr int C = direct_outputs(R);
    float sums[R * C];
    int64_t c = 0;
    for (; c + C <= count; c += C) {
        direct_tile<Row, R, C>(x, m, o0 + c, sums);
        put(out, stride, 0, R, c, C, sums);
    }
    for (; c < count; ++c) {
        direct_tile<Row, R, 1>(x, m, o0 + c, sums);
        put(out, stride, 0, R, c, 1, sums);
    }
}

template <class Row> inline void decode_row(const Matrix& m, int64_t o, float* out) {
    Row w;
    w.open(m, o);
    for (int64_t block = 0; block < m.inputs; block += Row::BLOCK) {
        int64_t end = block + Row::BLOCK < m.inputs ? block + Row::BLOCK : m.inputs;
        w.enter(block);
        int64_t k = block;
        for (; k + 16 <= end; k += 16) store(out + k, w.at(k));
        if (k < end) store(out + k, w.tail(k, end - k));
    }
}

thread_local Scratch decoded_weights;

// out[r * stride + c] = x[r] . row o0 + c, for n rows and c in 0..count (at most PANEL_OUTPUTS). Rows x are padded f32.
template <class Row, class Out>
inline void panel(const float* const* x, int64_t n, const Matrix& m, int64_t o0, int64_t count, Out* out, int64_t stride) {
    if (n == 1) return direct_panel<Row, 1>(x, m, o0, count, out, stride);
    if (n == 2) return direct_panel<Row, 2>(x, m, o0, count, out, stride);
    if (n == 3) return direct_panel<Row, 3>(x, m, o0, count, out, stride);
    if (n == 4) return direct_panel<Row, 4>(x, m, o0, count, out, stride);
    const int64_t kp = padded(m.inputs);
    const float* w[PANEL_OUTPUTS];
    if (Row::IS_F32 && kp == m.inputs) {
        for (int64_t c = 0; c < count; ++c) w[c] = static_cast<const float*>(m.data) + (o0 + c) * m.inputs;
    } else {
        float* buffer = decoded_weights.get<float>(count * kp);
        for (int64_t c = 0; c < count; ++c) {
            decode_row<Row>(m, o0 + c, buffer + c * kp);
            w[c] = buffer + c * kp;
        }
    }
    float sums[TILE_ROWS * TILE_OUTPUTS];
    for (int64_t r = 0; r < n; r += TILE_ROWS) {
        int64_t rows = n - r < TILE_ROWS ? n - r : TILE_ROWS;
        int64_t c = 0;
        for (; c + TILE_OUTPUTS <= count; c += TILE_OUTPUTS) {
            tile_rows<TILE_OUTPUTS>(rows, x + r, w + c, kp, sums);
            put(out, stride, r, rows, c, TILE_OUTPUTS, sums);
        }
        for (; c < count; ++c) {
            tile_rows<1>(rows, x + r, w + c, kp, sums);
            put(out, stride, r, rows, c, 1, sums);
        }
    }
}

template <class Out>
inline void panel(int64_t format, const float* const* x, int64_t n, const Matrix& m, int64_t o0, int64_t count, Out* out,
                  int64_t stride) {
    if (n == 0 || count == 0) return;
    if (format == FORMAT_F32) panel<PlainRow<float>>(x, n, m, o0, count, out, stride);
    else if (format == FORMAT_BF16) panel<PlainRow<bf16>>(x, n, m, o0, count, out, stride);
    else if (format == FORMAT_FP8) panel<Fp8Row>(x, n, m, o0, count, out, stride);
    else panel<Fp4Row>(x, n, m, o0, count, out, stride);
}

// One row of k elements as f32, zero-padded to padded(k).
template <class T> inline void widen_row(const T* x, int64_t k, float* out) {
    for (int64_t i = 0; i < k; i += 16) store(out + i, load_n(x + i, k - i));
}

}  // namespace
