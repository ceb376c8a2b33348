// The vector ops on one row: norm, rope, Hadamard, packed rows. Kernels that finish rows themselves call these, so that an
// entry gets the same bits whichever op wrote it.
#pragma once

#include "formats.h"

namespace {

// ---- reductions of one row: four accumulators taken in turn, then a fixed tree, so the order depends on n alone

template <class T> BT float sum_of_squares(const T* x, int64_t n) {
    f32x16 sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int64_t j = 0; j < 4; ++j) {
            f32x16 v = load(x + i + 16 * j);
            sums[j] = fma(v, v, sums[j]);
        }
    for (int64_t j = 0; i < n; i += 16, ++j) {
        f32x16 v = load_n(x + i, n - i);
        sums[j] = fma(v, v, sums[j]);
    }
    return hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// ---- rms_norm

// 1 / sqrt(mean(x^2) + eps)
template <class T> BT float inverse_rms(const T* x, int64_t n, float eps) {
    return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / float(n) + eps);
}

// out may be x; weight may be null.
template <class T, class W> inline void rms_norm_row(const T* x, const W* weight, T* out, int64_t n, float eps) {
    f32x16 factor = set1(inverse_rms(x, n, eps));
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = mul(load_n(x + i, n - i), factor);
        if (weight != nullptr) v = mul(v, load_n(weight + i, n - i));
        store_n(out + i, v, n - i);
    }
}

// ---- rope

constexpr int ANGLES = 16;
constexpr double LARGEST_ANGLE = 1.6e6;  // up to here n * PI_1 below is exact

// cos and sin of ANGLES angles in float64 within 1 ulp, rounded (the method and coefficients of fdlibm). A plain loop: the
// compiler makes vectors of it, and nothing in it may fuse.
inline void cos_sin(const double* angles, float* cos, float* sin) {
    constexpr double MAGIC = 0x1.8p52;  // adding it rounds to an integer in the low bits
    constexpr double PI_1 = 1.57079632673412561417e+00, PI_2 = 6.07710050630396597660e-11, PI_3 = 2.02226624879595063154e-21;
    for (int i = 0; i < ANGLES; ++i) {
        const double rounded = angles[i] * 6.36619772367581382433e-01 + MAGIC, n = rounded - MAGIC;
        uint64_t quarter;
        std::memcpy(&quarter, &rounded, 8);
        // x + tail = angle - n pi/2, pi/2 in three parts of which two have 33 bits
        const double a = angles[i] - n * PI_1, w = n * PI_2, b = a - w;
        const double low = n * PI_3 - ((a - b) - w);
        const double x = b - low, tail = (b - x) - low;
        const double z = x * x, v = z * x, zz = z * z, half = 0.5 * z, one = 1.0 - half;
        const double ps_high = 2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10);
        const double ps = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * ps_high);
        const double s = x - ((z * (0.5 * tail - v * ps) - tail) - v * -1.66666666666666324348e-01);
        const double pc_low = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * 2.48015872894767294178e-05);
        const double pc_high = -2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11);
        const double pc = z * pc_low + zz * zz * pc_high;
        const double c = one + (((1.0 - one) - half) + (z * pc - x * tail));
        uint64_t sine, cosine;
        std::memcpy(&sine, &s, 8);
        std::memcpy(&cosine, &c, 8);
        const uint64_t swap = (sine ^ cosine) & (0 - (quarter & 1));
        sine = (sine ^ swap) ^ (quarter & 2) << 62;
        cosine = (cosine ^ swap) ^ ((quarter + 1) & 2) << 62;
        double to_sin, to_cos;
        std::memcpy(&to_sin, &sine, 8);
        std::memcpy(&to_cos, &cosine, 8);
        sin[i] = float(to_sin);
        cos[i] = float(to_cos);
    }
}

// cos and sin [half] of f32(position) * inv_freq, from float64: an f32 sine is wrong at large angles.
inline void rope_angles_row(int64_t position, const float* inv_freq, int64_t half, float* cos, float* sin) {
    for (int64_t k = 0; k < half; k += ANGLES) {
        const int64_t n = half - k < ANGLES ? half - k : ANGLES;
        double angles[ANGLES] = {};
        float c[ANGLES], s[ANGLES];
        bool is_far = false;
        for (int64_t i = 0; i < n; ++i) {
            angles[i] = double(float(position) * inv_freq[k + i]);
            is_far |= !(__builtin_fabs(angles[i]) < LARGEST_ANGLE);
        }
        cos_sin(angles, c, s);
        for (int64_t i = 0; is_far && i < n; ++i) {
            c[i] = float(__builtin_cos(angles[i]));
            s[i] = float(__builtin_sin(angles[i]));
        }
        std::memcpy(cos + k, c, size_t(n) * 4);
        std::memcpy(sin + k, s, size_t(n) * 4);
    }
}

// Turns the adjacent pairs of n features by cos, sin [n / 2]; out may be x. No fma: both products are rounded alike.
template <class T>
inline void rope_pairs(const T* x, T* out, int64_t n, const float* cos, const float* sin, bool inverse) {
    // (a cos - b sin, a sin + b cos): in even lanes the partner's product is subtracted, in odd lanes added.
    f32x16 sign = blend_lanes<1>(set1(inverse ? 1.0f : -1.0f), set1(inverse ? -1.0f : 1.0f));
    for (int64_t i = 0; i < n; i += 16) {
        float c[8] = {}, s[8] = {};
        int64_t pairs = (n - i < 16 ? n - i : 16) / 2;
        std::memcpy(c, cos + i / 2, size_t(pairs) * 4);
        std::memcpy(s, sin + i / 2, size_t(pairs) * 4);
        f32x16 v = load_n(x + i, n - i);
        f32x16 partner = mul(mul(xor_lanes<1>(v), load_twice(s)), sign);
        store_n(out + i, add(mul(v, load_twice(c)), partner), n - i);
    }
}

// The last rope_dim of dim features turned, the others copied; out may be x.
template <class T>
inline void rope_row(const T* x, T* out, int64_t dim, int64_t rope_dim, const float* cos, const float* sin,
                     bool inverse) {
    int64_t kept = dim - rope_dim;
    if (out != x) std::memcpy(out, x, size_t(kept) * sizeof(T));
    rope_pairs(x + kept, out + kept, rope_dim, cos, sin, inverse);
}

// ---- Hadamard

template <int S> BT f32x16 butterfly(f32x16 v) {
    f32x16 other = xor_lanes<S>(v);
    return blend_lanes<S>(add(v, other), sub(other, v));
}

// n a power of two; work [max(n, 16)] f32 (may be x or out when T is float and n >= 16); out may be x.
template <class T> inline void hadamard_row(const T* x, T* out, int64_t n, float* work) {
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = load_n(x + i, n - i);
        if (n > 1) v = butterfly<1>(v);
        if (n > 2) v = butterfly<2>(v);
        if (n > 4) v = butterfly<4>(v);
        if (n > 8) v = butterfly<8>(v);
        store(work + i, v);
    }
    for (int64_t stride = 16; stride < n; stride *= 2)
        for (int64_t start = 0; start < n; start += 2 * stride)
            for (int64_t i = start; i < start + stride; i += 16) {
                f32x16 a = load(work + i), b = load(work + i + stride);
                store(work + i, add(a, b));
                store(work + i + stride, sub(a, b));
            }
    f32x16 factor = set1(float(1.0 / __builtin_sqrt(double(n))));
    for (int64_t i = 0; i < n; i += 16) store_n(out + i, mul(load(work + i), factor), n - i);
}

// ---- packed rows: RowFormat of config/formats.py

constexpr int64_t ROW_F32 = 0, ROW_BF16 = 1, ROW_FP8 = 2, ROW_FP4 = 3;
constexpr int64_t KV_GROUP = 64, FP4_GROUP = 32;

struct RowSpec {
    int64_t kind, dim, rope_dim;

    BT int64_t quantised() const { return dim - rope_dim; }  // the FP8 part of an fp8 row
    BT int64_t num_scales() const {
        if (kind == ROW_FP8) return (quantised() + KV_GROUP - 1) / KV_GROUP;
        return kind == ROW_FP4 ? (dim + FP4_GROUP - 1) / FP4_GROUP : 0;
    }
    BT int64_t bytes() const {
        if (kind == ROW_F32) return 4 * dim;
        if (kind == ROW_BF16) return 2 * dim;
        if (kind == ROW_FP8) return (quantised() + 2 * rope_dim + num_scales() + 7) / 8 * 8;
        return dim / 2 + num_scales();
    }
};

template <class From, class To> inline void convert_row(const From* x, To* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store_n(out + i, load_n(x + i, n - i), n - i);
}

// The bytes of E4M3 values (see fp8_byte), and the nibbles of E2M1 values (see fp4_nibble), in the low bits of the lanes.
BT i32x16 fp8_bytes(f32x16 values) {
    const i32x16 u = as_int(abs(values)), sign = bit_and(shift_right<24>(as_int(values)), set1(int32_t(0x80)));
    // Below 2^-6 the byte counts steps of 2^-9: adding 2^23 leaves their number in the low bits.
    const i32x16 steps = bit_and(as_int(add(mul(abs(values), set1(512.0f)), set1(0x1p23f))), set1(int32_t(0xff)));
    const i32x16 normal = sub(shift_right<20>(u), set1(int32_t(960)));
    const mask16 is_small = less(abs(values), set1(0x1p-6f));
    return bit_or(as_int(select(is_small, as_float(steps), as_float(normal))), sign);
}

BT i32x16 fp4_nibbles(f32x16 values) {
    const i32x16 u = as_int(abs(values)), sign = bit_and(shift_right<28>(as_int(values)), set1(int32_t(8)));
    const i32x16 normal = sub(shift_right<22>(u), set1(int32_t(252)));
    const f32x16 small = select(equal(values, zero()), zero(), as_float(set1(int32_t(1))));
    return bit_or(as_int(select(less(abs(values), set1(1.0f)), small, as_float(normal))), sign);
}

// Eight bytes, a nibble in each, to four bytes: the even ones in the low halves.
BT uint32_t paired(uint64_t nibbles) {
    uint64_t x = (nibbles | nibbles >> 4) & 0x00ff00ff00ff00ffull;
    x = (x | x >> 8) & 0x0000ffff0000ffffull;
    return uint32_t(x | x >> 16);
}

template <class T> inline void pack_fp8_row(const T* x, uint8_t* row, const RowSpec& spec) {
    const int64_t n = spec.quantised();
    uint8_t* scales = row + n + 2 * spec.rope_dim;
    for (int64_t g = 0; g < n; g += KV_GROUP) {
        int64_t end = g + KV_GROUP < n ? g + KV_GROUP : n;
        float scale = fp8_scale(group_amax(x + g, end - g));
        f32x16 inverse = set1(inverse_pow2(scale));
        scales[g / KV_GROUP] = scale_byte(scale);
        for (int64_t i = g; i < end; i += 16) {
            uint8_t codes[16];
            store_bytes(codes, fp8_bytes(fp8_round(mul(load_n(x + i, end - i), inverse))));
            std::memcpy(row + i, codes, size_t(end - i < 16 ? end - i : 16));
        }
    }
    convert_row(x + n, reinterpret_cast<bf16*>(row + n), spec.rope_dim);
    uint8_t* used = scales + spec.num_scales();
    std::memset(used, 0, size_t(row + spec.bytes() - used));
}

template <class T> inline void pack_fp4_row(const T* x, uint8_t* row, const RowSpec& spec) {
    const int64_t n = spec.dim;
    for (int64_t g = 0; g < n; g += FP4_GROUP) {
        int64_t end = g + FP4_GROUP < n ? g + FP4_GROUP : n;
        float scale = fp4_scale(group_amax(x + g, end - g));
        f32x16 inverse = set1(inverse_pow2(scale));
        row[n / 2 + g / FP4_GROUP] = scale_byte(scale);
        for (int64_t i = g; i < end; i += 16) {
            uint64_t nibbles[2];
            store_bytes(reinterpret_cast<uint8_t*>(nibbles), fp4_nibbles(fp4_round(mul(load_n(x + i, end - i), inverse))));
            const uint32_t codes[2] = {paired(nibbles[0]), paired(nibbles[1])};
            std::memcpy(row + i / 2, codes, size_t((end - i < 16 ? end - i : 16) / 2));
        }
    }
}

// x [dim] -> row [bytes]
template <class T> inline void pack_row(const T* x, uint8_t* row, const RowSpec& spec) {
    switch (spec.kind) {
        case ROW_F32: return convert_row(x, reinterpret_cast<float*>(row), spec.dim);
        case ROW_BF16: return convert_row(x, reinterpret_cast<bf16*>(row), spec.dim);
        case ROW_FP8: return pack_fp8_row(x, row, spec);
        default: return pack_fp4_row(x, row, spec);
    }
}

BT f32x16 scaled(f32x16 values, uint8_t scale) { return mul(values, set1(scale_value(scale))); }

// row [bytes] -> out [dim] f32, exact
inline void unpack_row(const uint8_t* row, float* out, const RowSpec& spec) {
    const int64_t n = spec.quantised();
    switch (spec.kind) {
        case ROW_F32: std::memcpy(out, row, size_t(spec.dim) * 4); return;
        case ROW_BF16: return convert_row(reinterpret_cast<const bf16*>(row), out, spec.dim);
        case ROW_FP8:
            for (int64_t i = 0; i < n; i += 16) {
                uint8_t scale = row[n + 2 * spec.rope_dim + i / KV_GROUP];
                f32x16 values = load_fp8_n(row + i, n - i);
                values = select(equal(abs(values), set1(480.0f)), set1(__builtin_nanf("")), values);  // its NaN bytes
                store_n(out + i, scaled(values, scale), n - i);
            }
            return convert_row(reinterpret_cast<const bf16*>(row + n), out + n, spec.rope_dim);
        default:
            for (int64_t i = 0; i < spec.dim; i += 16) {
                uint8_t scale = row[spec.dim / 2 + i / FP4_GROUP];
                store_n(out + i, scaled(load_fp4_n(row + i / 2, spec.dim - i), scale), spec.dim - i);
            }
    }
}

}  // namespace
