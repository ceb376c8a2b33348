// The stored number formats of the checkpoint and the cache: exact decoding, and rounding by the published rules.
#pragma once

#include "simd.h"

namespace {

// ---- ue8m0: 2^(byte - 127). Byte 0 is subnormal, byte 255 (NaN) is refused when a checkpoint is read.
BT float scale_value(uint8_t byte) { return float_of(byte == 0 ? 0x00400000u : uint32_t(byte) << 23); }
// The byte of a scale that is a power of two.
BT uint8_t scale_byte(float scale) { return uint8_t(bits_of(scale) >> 23); }
// 2^ceil(log2(x)) for normal x > 0.
BT float ceil_pow2(float x) {
    uint32_t u = bits_of(x);
    return float_of((u & 0x7fffffu) != 0 ? (u & 0x7f800000u) + 0x00800000u : u);
}
// 1 / scale, exact, for a power of two between 2^-126 and 2^126.
BT float inverse_pow2(float scale) { return float_of((254u << 23) - bits_of(scale)); }

// ---- E4M3 (no infinities, 0x7f and 0xff are NaN)
BT float fp8_value(uint8_t byte) {
    uint32_t magnitude = byte & 0x7fu;
    float value = magnitude == 0x7f ? __builtin_nanf("") : float_of(magnitude << 20) * 0x1p120f;
    return float_of(bits_of(value) | uint32_t(byte & 0x80u) << 24);
}

// The byte of a value that is already one of E4M3's (see fp8_round).
BT uint8_t fp8_byte(float value) {
    uint32_t u = bits_of(value);
    uint32_t sign = (u >> 24) & 0x80u;
    u &= 0x7fffffffu;
    uint32_t magnitude = u < 0x3c800000u ? uint32_t(float_of(u) * 512.0f) : (u >> 20) - 960u;
    return uint8_t(sign | magnitude);
}

// Nearest E4M3 value, ties to even; |x| <= 448.
BT f32x16 fp8_round(f32x16 x) {
    f32x16 a = abs(x);
    i32x16 u = as_int(a);
    i32x16 odd = bit_and(shift_right<20>(u), set1(int32_t(1)));
    u = add(u, add(odd, set1(int32_t(0x7ffff))));
    f32x16 normal = as_float(bit_and(u, set1(int32_t(0xfff00000))));
    f32x16 subnormal = sub(add(a, set1(24576.0f)), set1(24576.0f));  // 1.5 * 2^14 has steps of 2^-9
    return copysign(select(less(a, set1(0x1p-6f)), subnormal, normal), x);
}

// ---- E2M1: magnitudes 0 .5 1 1.5 2 3 4 6, bit 3 the sign
alignas(64) constexpr float FP4_VALUES[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

BT float fp4_value(uint8_t nibble) { return FP4_VALUES[nibble & 15]; }

// The nibble of a value that is already one of E2M1's (see fp4_round).
BT uint8_t fp4_nibble(float value) {
    uint32_t u = bits_of(value);
    uint32_t sign = (u >> 28) & 8u;
    u &= 0x7fffffffu;
    uint32_t magnitude = u < 0x3f800000u ? (u != 0) : (u >> 22) - 252u;  // normals: exponent and one mantissa bit
    return uint8_t(sign | magnitude);
}

// Nearest E2M1 value of x clipped to +-6, ties to even.
BT f32x16 fp4_round(f32x16 x) {
    f32x16 a = min(abs(x), set1(6.0f));
    f32x16 fine = sub(add(a, set1(6291456.0f)), set1(6291456.0f));      // steps of 0.5
    f32x16 middle = sub(add(a, set1(12582912.0f)), set1(12582912.0f));  // 1
    f32x16 coarse = sub(add(a, set1(25165824.0f)), set1(25165824.0f));  // 2
    f32x16 r = select(less(a, set1(4.0f)), middle, coarse);
    return copysign(select(less(a, set1(2.0f)), fine, r), x);
}

// Sixteen scaled values for every scale byte: value nibble of byte b is FP4_SCALED[b][nibble]. Sixteen kilobytes, of which a
// matrix touches the lines of the few scales it has; a lookup replaces the product with the scale.
struct Fp4Scaled {
    alignas(64) float of[256][16];
};
constexpr float fp4_scaled(int nibble, int byte) {
    const int magnitude = nibble & 7, half = magnitude > 1 ? magnitude & 1 : 0;
    const int exponent = (magnitude == 1 ? -1 : magnitude / 2 - 1) + byte - 127;
    uint32_t bits = uint32_t(exponent + 127) << 23 | uint32_t(half) << 22;
    if (exponent < -126) bits = uint32_t(2 + half) << (exponent + 148);  // subnormal, in units of 2^-149
    if (exponent > 127) bits = 0x7f800000u;
    if (magnitude == 0) bits = 0;
    return __builtin_bit_cast(float, bits | uint32_t(nibble & 8) << 28);
}
constexpr Fp4Scaled fp4_scaled_values() {
    Fp4Scaled table{};
    for (int byte = 0; byte < 256; ++byte)
        for (int nibble = 0; nibble < 16; ++nibble) table.of[byte][nibble] = fp4_scaled(nibble, byte);
    return table;
}
constexpr Fp4Scaled FP4_SCALED = fp4_scaled_values();

// ---- sixteen at a time
// fp8_low(p): 2^-8 times the values. A byte's four exponent bits become the low four of a half's five; the half's own
// conversion does the subnormals.
// fp4_lanes(p, values): values[nibble] in fp4's order of lanes. AVX-512 spreads one 64-bit load over all lanes and shifts each:
// lane 2i holds element i, lane 2i + 1 element 8 + i. Inputs are brought to this order once, results back to the natural one.
#if BITTRUE_ISA_CODE > 0
BT __m256i fp8_halves(const uint8_t* p) {
    __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(int16_t(0xbf80)));
}
#endif
#if BITTRUE_ISA_CODE == 2
constexpr bool FP4_HAS_OWN_ORDER = true;
BT f32x16 fp8_low(const uint8_t* p) { return {_mm512_cvtph_ps(fp8_halves(p))}; }
BT f32x16 fp4_lanes(const uint8_t* p, const float* values) {
    int64_t bits;
    std::memcpy(&bits, p, 8);
    const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i w = _mm512_srlv_epi32(_mm512_set1_epi64(bits), shifts);
    return {_mm512_permutexvar_ps(w, _mm512_load_ps(values))};  // reads the low four bits of each index
}
BT f32x16 to_fp4_order(f32x16 a) {
    const __m512i from = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return {_mm512_permutexvar_ps(from, a.v)};
}
BT f32x16 from_fp4_order(f32x16 a) {
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return {_mm512_permutexvar_ps(from, a.v)};
}
#else
constexpr bool FP4_HAS_OWN_ORDER = false;
BT f32x16 to_fp4_order(f32x16 a) { return a; }
BT f32x16 from_fp4_order(f32x16 a) { return a; }
#endif
#if BITTRUE_ISA_CODE == 1
BT f32x16 fp8_low(const uint8_t* p) {
    __m256i h = fp8_halves(p);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
BT __m256 fp4_lanes8(const uint8_t* p, __m256 magnitudes) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    __m256i w = _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    __m256i sign = _mm256_and_si256(_mm256_slli_epi32(w, 28), _mm256_set1_epi32(int32_t(0x80000000)));
    // The permutation reads the low three bits of each index.
    return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, w), _mm256_castsi256_ps(sign));
}
BT f32x16 fp4_lanes(const uint8_t* p, const float* values) {
    __m256 magnitudes = _mm256_load_ps(values);
    return {fp4_lanes8(p, magnitudes), fp4_lanes8(p + 4, magnitudes)};
}
#elif BITTRUE_ISA_CODE == 0
BT f32x16 fp8_low(const uint8_t* p) {
    f32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = float_of((p[i] & 0x7fu) << 20 | (p[i] & 0x80u) << 24) * 0x1p112f;
    return r;
}
BT f32x16 fp4_lanes(const uint8_t* p, const float* values) {
    f32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = values[(p[i / 2] >> (4 * (i & 1))) & 15];
    return r;
}
#endif

BT f32x16 load_fp8(const uint8_t* p) { return mul(fp8_low(p), set1(256.0f)); }
BT f32x16 load_fp4(const uint8_t* p) { return from_fp4_order(fp4_lanes(p, FP4_VALUES)); }
// NaN bytes decode as +-480 in load_fp8: they never reach a kernel. p of load_fp4 holds element 2i in the low nibble.

// The first n of sixteen elements, the rest 0.
BT f32x16 load_fp8_n(const uint8_t* p, int64_t n) {
    if (n >= 16) return load_fp8(p);
    uint8_t lanes[16] = {};
    std::memcpy(lanes, p, size_t(n));
    return load_fp8(lanes);
}
BT f32x16 load_fp4_n(const uint8_t* p, int64_t n) {
    if (n >= 16) return load_fp4(p);
    uint8_t lanes[8] = {};
    std::memcpy(lanes, p, size_t((n + 1) / 2));
    if (n % 2) lanes[n / 2] &= 15;
    return load_fp4(lanes);
}

// ---- the published scale rules (spec 2.9): rounded up to a power of two, so that nothing clips
template <class T> BT float group_amax(const T* x, int64_t n) {
    f32x16 m = zero();
    for (int64_t i = 0; i < n; i += 16) m = max(m, abs(load_n(x + i, n - i)));
    return hmax(m);
}
BT float fp8_scale(float amax) { return ceil_pow2((amax > 1e-4f ? amax : 1e-4f) / 448.0f); }
BT float fp4_scale(float amax) {
    const float least = 6.0f * 0x1p-126f;
    return ceil_pow2((amax > least ? amax : least) / 6.0f);
}

// Quantise-dequantise one row of n elements in groups (the last may be short). x and out may be the same.
template <class T> inline void quant_fp8_row(const T* x, T* out, int64_t n, int64_t group) {
    for (int64_t g = 0; g < n; g += group) {
        int64_t end = g + group < n ? g + group : n;
        float scale = fp8_scale(group_amax(x + g, end - g));
        f32x16 s = set1(scale), inverse = set1(inverse_pow2(scale));
        for (int64_t i = g; i < end; i += 16)
            store_n(out + i, mul(fp8_round(mul(load_n(x + i, end - i), inverse)), s), end - i);
    }
}

template <class T> inline void quant_fp4_row(const T* x, T* out, int64_t n, int64_t group) {
    for (int64_t g = 0; g < n; g += group) {
        int64_t end = g + group < n ? g + group : n;
        float scale = fp4_scale(group_amax(x + g, end - g));
        f32x16 s = set1(scale), inverse = set1(inverse_pow2(scale));
        for (int64_t i = g; i < end; i += 16)
            store_n(out + i, mul(fp4_round(mul(load_n(x + i, end - i), inverse)), s), end - i);
    }
}

}  // namespace
