// Sixteen float lanes with the same bits on every instruction set: the only file that spells intrinsics (with formats.h
// and dots.h).
//
// How to add a kernel
//  1. Write csrc/<op>.cpp: #include "simd.h" (and "formats.h"), all helpers inside `namespace { ... }`, and the entry as
//     BITTRUE_EXPORT(my_op)(const void* x, int64_t dtype, int64_t rows, ...) { ... }     // returns void, C ABI
//     Sizes are int64_t, flags and dtype codes too (0 = f32, 1 = bf16); float arguments are float. No exceptions, no std
//     containers or algorithms (their weak symbols of one instruction set would serve another): Scratch, plain loops.
//  2. Write each kernel once, templated on the element type (float or bf16): load/store convert. Each file is compiled per
//     ISA; f32x16 code gives the same bits on all three because only fma() fuses and hsum()/hmax() are fixed trees.
//     For tails use load_n/store_n with n in 0..16 (absent lanes read as 0): never a separate scalar formula.
//  3. Parallel only at the outermost loop over rows: PARALLEL_FOR(i, n, work) { ... }; see team.h. No reductions.
//     A kernel of the forward pass is followed by BITTRUE_REPLAYABLE(my_op): it can be part of a captured step.
//  4. Bind it in bittrue/ops/cpu/<module>.py: fn = kernels.bind("my_op", PTR, I64, I64, F32); check shapes first.
//  5. Rebuild: `flock build/.lock cmake --build build/dev`.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "team.h"

#define BITTRUE_CAT2(a, b) a##b
#define BITTRUE_CAT(a, b) BITTRUE_CAT2(a, b)
#define BITTRUE_ISA_CODE_portable 0
#define BITTRUE_ISA_CODE_avx2 1
#define BITTRUE_ISA_CODE_avx512 2
#define BITTRUE_ISA_CODE BITTRUE_CAT(BITTRUE_ISA_CODE_, BITTRUE_ISA)

// Opens the definition of the exported function bittrue_<name>_<isa>.
#define BITTRUE_EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) void BITTRUE_CAT(BITTRUE_CAT(bittrue_##name, _), BITTRUE_ISA)
#define BT inline __attribute__((always_inline))
// After the definition: bittrue_<name>_<isa>_replay calls it with arguments from an array of 8-byte slots (program.cpp).
#define BITTRUE_REPLAYABLE(name)                                                                                     \
    extern "C" __attribute__((visibility("default"))) void BITTRUE_CAT(                                              \
        BITTRUE_CAT(BITTRUE_CAT(bittrue_##name, _), BITTRUE_ISA), _replay)(const uint64_t* slots) {                  \
        call_with_slots(BITTRUE_CAT(BITTRUE_CAT(bittrue_##name, _), BITTRUE_ISA), slots);                            \
    }

#if BITTRUE_ISA_CODE > 0
#include <immintrin.h>
#endif

namespace {

// The argument in a slot: pointers and integers take all of it, a float its low four bytes.
template <class A> BT A slot_value(uint64_t slot) {
    static_assert(std::is_pointer_v<A> || std::is_same_v<A, int64_t> || std::is_same_v<A, float>);
    A value;
    std::memcpy(&value, &slot, sizeof value);  // little-endian, as all this runs on
    return value;
}
template <class... A, std::size_t... I>
BT void call_with_slots(void (*kernel)(A...), const uint64_t* slots, std::index_sequence<I...>) {
    kernel(slot_value<A>(slots[I])...);
}
template <class... A> BT void call_with_slots(void (*kernel)(A...), const uint64_t* slots) {
    call_with_slots(kernel, slots, std::index_sequence_for<A...>{});
}

struct bf16 {
    uint16_t bits;
};

BT uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

BT float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

BT float to_float(float x) { return x; }
BT float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

// Round to nearest even; every NaN becomes 0x7fc0.
BT bf16 to_bf16(float x) {
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <class T> T from_float(float x);
template <> BT float from_float<float>(float x) { return x; }
template <> BT bf16 from_float<bf16>(float x) { return to_bf16(x); }

// Memory of one thread, grown on demand and kept: declare as `thread_local Scratch name;` in the kernel's file.
struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    template <class T> T* get(int64_t count) {
        size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size) {
            std::free(data);
            data = std::aligned_alloc(64, bytes);
            if (data == nullptr) std::abort();
            size = bytes;
        }
        return static_cast<T*>(data);
    }
};

#if BITTRUE_ISA_CODE == 2

struct f32x16 { __m512 v; };
struct i32x16 { __m512i v; };
struct mask16 { __mmask16 v; };

BT __mmask16 first_lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1u); }
BT f32x16 zero() { return {_mm512_setzero_ps()}; }
BT f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
BT f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
BT f32x16 load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
BT void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
BT void store_n(float* p, f32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
BT f32x16 widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
BT f32x16 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
BT f32x16 load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
BT __m256i narrow(f32x16 a) {
    __m512i u = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
BT void store(bf16* p, f32x16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
BT void store_n(bf16* p, f32x16 a, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a)); }

BT f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
BT f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
BT f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
BT f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
BT f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BT f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
BT f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
BT f32x16 sqrt(f32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
BT mask16 less(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
BT mask16 less_equal(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
BT mask16 equal(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
BT f32x16 select(mask16 m, f32x16 a, f32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
BT mask16 lanes_below(int64_t n) { return {first_lanes(n)}; }
BT uint32_t to_bits(mask16 m) { return m.v; }

BT i32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
BT i32x16 as_int(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
BT f32x16 as_float(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
BT f32x16 convert(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
BT i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
BT i32x16 sub(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
BT i32x16 bit_and(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
BT i32x16 bit_or(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> BT i32x16 shift_left(i32x16 a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> BT i32x16 shift_right(i32x16 a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> BT i32x16 shift_right_signed(i32x16 a) { return {_mm512_srai_epi32(a.v, N)}; }

template <int S> BT f32x16 xor_lanes(f32x16 a) {
    if constexpr (S == 1) return {_mm512_permute_ps(a.v, 0xb1)};
    if constexpr (S == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    if constexpr (S == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if constexpr (S == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
template <int S> BT f32x16 blend_lanes(f32x16 a, f32x16 b) {
    constexpr __mmask16 odd = S == 1 ? 0xaaaa : S == 2 ? 0xcccc : S == 4 ? 0xf0f0 : 0xff00;
    return {_mm512_mask_blend_ps(odd, a.v, b.v)};
}
BT void store_bytes(uint8_t* p, i32x16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
template <int K> BT f32x16 lane_of_fours(f32x16 a) { return {_mm512_permute_ps(a.v, K * 0x55)}; }
template <int J> BT f32x16 four_in_all(f32x16 a) { return {_mm512_shuffle_f32x4(a.v, a.v, J * 0x55)}; }
BT f32x16 load_twice(const float* p) {
    const __m512i pairs = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return {_mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
}
BT __m256 low_half(f32x16 a) { return _mm512_castps512_ps256(a.v); }
BT __m256 high_half(f32x16 a) { return _mm512_extractf32x8_ps(a.v, 1); }

#elif BITTRUE_ISA_CODE == 1

struct f32x16 { __m256 lo, hi; };
struct i32x16 { __m256i lo, hi; };
struct mask16 { __m256 lo, hi; };

BT __m256i first_lanes8(int64_t n) {  // all ones in lanes below n
    int32_t count = n < 0 ? 0 : n > 8 ? 8 : int32_t(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
BT f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
BT f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
BT f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
BT f32x16 load_n(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first_lanes8(n)), _mm256_maskload_ps(p + 8, first_lanes8(n - 8))};
}
BT void store(float* p, f32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
BT void store_n(float* p, f32x16 a, int64_t n) {
    _mm256_maskstore_ps(p, first_lanes8(n), a.lo);
    _mm256_maskstore_ps(p + 8, first_lanes8(n - 8), a.hi);
}
BT __m256 widen8(const bf16* p) {
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
BT f32x16 load(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
BT f32x16 load_n(const bf16* p, int64_t n) {
    if (n >= 16) return load(p);
    bf16 lanes[16] = {};
    std::memcpy(lanes, p, size_t(n) * 2);
    return load(lanes);
}
BT __m256i narrow8(__m256 a) {
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
BT void store(bf16* p, f32x16 a) {
    __m256i packed = _mm256_packus_epi32(narrow8(a.lo), narrow8(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
BT void store_n(bf16* p, f32x16 a, int64_t n) {
    if (n >= 16) return store(p, a);
    bf16 lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, size_t(n) * 2);
}

BT f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
BT f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
BT f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
BT f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
BT f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
BT f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
BT f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
BT f32x16 sqrt(f32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
BT mask16 less(f32x16 a, f32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
BT mask16 less_equal(f32x16 a, f32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
BT mask16 equal(f32x16 a, f32x16 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
BT f32x16 select(mask16 m, f32x16 a, f32x16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
BT mask16 lanes_below(int64_t n) {
    return {_mm256_castsi256_ps(first_lanes8(n)), _mm256_castsi256_ps(first_lanes8(n - 8))};
}
BT uint32_t to_bits(mask16 m) {
    return uint32_t(_mm256_movemask_ps(m.lo)) | uint32_t(_mm256_movemask_ps(m.hi)) << 8;
}

BT i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
BT i32x16 as_int(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
BT f32x16 as_float(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
BT f32x16 convert(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
BT i32x16 add(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
BT i32x16 sub(i32x16 a, i32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
BT i32x16 bit_and(i32x16 a, i32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
BT i32x16 bit_or(i32x16 a, i32x16 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int N> BT i32x16 shift_left(i32x16 a) { return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)}; }
template <int N> BT i32x16 shift_right(i32x16 a) { return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)}; }
template <int N> BT i32x16 shift_right_signed(i32x16 a) {
    return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}

template <int S> BT f32x16 xor_lanes(f32x16 a) {
    if constexpr (S == 1) return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
    if constexpr (S == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
    if constexpr (S == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
    if constexpr (S == 8) return {a.hi, a.lo};
}
template <int S> BT f32x16 blend_lanes(f32x16 a, f32x16 b) {
    if constexpr (S == 8) return {a.lo, b.hi};
    constexpr int odd = S == 1 ? 0xaa : S == 2 ? 0xcc : 0xf0;
    return {_mm256_blend_ps(a.lo, b.lo, odd), _mm256_blend_ps(a.hi, b.hi, odd)};
}
BT void store_bytes(uint8_t* p, i32x16 a) {
    const __m256i low = _mm256_set1_epi32(0xff);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
template <int K> BT f32x16 lane_of_fours(f32x16 a) {
    return {_mm256_permute_ps(a.lo, K * 0x55), _mm256_permute_ps(a.hi, K * 0x55)};
}
template <int J> BT f32x16 four_in_all(f32x16 a) {
    __m256 half = J < 2 ? a.lo : a.hi;
    half = _mm256_permute2f128_ps(half, half, J % 2 * 0x11);
    return {half, half};
}
BT f32x16 load_twice(const float* p) {
    __m256 a = _mm256_loadu_ps(p);
    return {_mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
BT __m256 low_half(f32x16 a) { return a.lo; }
BT __m256 high_half(f32x16 a) { return a.hi; }

#else

struct alignas(64) f32x16 { float v[16]; };
struct alignas(64) i32x16 { int32_t v[16]; };
struct mask16 { uint32_t v; };

#define BITTRUE_LANES for (int i = 0; i < 16; ++i)
#define BITTRUE_BINARY(name, type, expression)           \
    BT type name(type a, type b) {                       \
        type r;                                          \
        BITTRUE_LANES r.v[i] = expression;               \
        return r;                                        \
    }

BT f32x16 set1(float x) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = x;
    return r;
}
BT f32x16 zero() { return set1(0.0f); }
BT f32x16 load(const float* p) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = p[i];
    return r;
}
BT f32x16 load_n(const float* p, int64_t n) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = i < n ? p[i] : 0.0f;
    return r;
}
BT void store(float* p, f32x16 a) { BITTRUE_LANES p[i] = a.v[i]; }
BT void store_n(float* p, f32x16 a, int64_t n) {
    for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
}
BT f32x16 load(const bf16* p) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = to_float(p[i]);
    return r;
}
BT f32x16 load_n(const bf16* p, int64_t n) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = i < n ? to_float(p[i]) : 0.0f;
    return r;
}
BT void store(bf16* p, f32x16 a) { BITTRUE_LANES p[i] = to_bf16(a.v[i]); }
BT void store_n(bf16* p, f32x16 a, int64_t n) {
    for (int i = 0; i < 16 && i < n; ++i) p[i] = to_bf16(a.v[i]);
}

BITTRUE_BINARY(add, f32x16, a.v[i] + b.v[i])
BITTRUE_BINARY(sub, f32x16, a.v[i] - b.v[i])
BITTRUE_BINARY(mul, f32x16, a.v[i] * b.v[i])
BITTRUE_BINARY(div, f32x16, a.v[i] / b.v[i])
BITTRUE_BINARY(max, f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
BITTRUE_BINARY(min, f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
BT f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return r;
}
BT f32x16 sqrt(f32x16 a) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = __builtin_sqrtf(a.v[i]);
    return r;
}
BT mask16 less(f32x16 a, f32x16 b) {
    mask16 m{0};
    BITTRUE_LANES m.v |= uint32_t(a.v[i] < b.v[i]) << i;
    return m;
}
BT mask16 less_equal(f32x16 a, f32x16 b) {
    mask16 m{0};
    BITTRUE_LANES m.v |= uint32_t(a.v[i] <= b.v[i]) << i;
    return m;
}
BT mask16 equal(f32x16 a, f32x16 b) {
    mask16 m{0};
    BITTRUE_LANES m.v |= uint32_t(a.v[i] == b.v[i]) << i;
    return m;
}
BT f32x16 select(mask16 m, f32x16 a, f32x16 b) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = (m.v >> i) & 1u ? a.v[i] : b.v[i];
    return r;
}
BT mask16 lanes_below(int64_t n) { return {n >= 16 ? 0xffffu : (1u << n) - 1u}; }
BT uint32_t to_bits(mask16 m) { return m.v; }

BT i32x16 set1(int32_t x) {
    i32x16 r;
    BITTRUE_LANES r.v[i] = x;
    return r;
}
BT i32x16 as_int(f32x16 a) {
    i32x16 r;
    std::memcpy(&r, &a, sizeof r);
    return r;
}
BT f32x16 as_float(i32x16 a) {
    f32x16 r;
    std::memcpy(&r, &a, sizeof r);
    return r;
}
BT f32x16 convert(i32x16 a) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = float(a.v[i]);
    return r;
}
BITTRUE_BINARY(add, i32x16, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])))
BITTRUE_BINARY(sub, i32x16, int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])))
BITTRUE_BINARY(bit_and, i32x16, a.v[i] & b.v[i])
BITTRUE_BINARY(bit_or, i32x16, a.v[i] | b.v[i])
template <int N> BT i32x16 shift_left(i32x16 a) {
    i32x16 r;
    BITTRUE_LANES r.v[i] = int32_t(uint32_t(a.v[i]) << N);
    return r;
}
template <int N> BT i32x16 shift_right(i32x16 a) {
    i32x16 r;
    BITTRUE_LANES r.v[i] = int32_t(uint32_t(a.v[i]) >> N);
    return r;
}
template <int N> BT i32x16 shift_right_signed(i32x16 a) {
    i32x16 r;
    BITTRUE_LANES r.v[i] = a.v[i] >> N;
    return r;
}

template <int S> BT f32x16 xor_lanes(f32x16 a) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = a.v[i ^ S];
    return r;
}
template <int S> BT f32x16 blend_lanes(f32x16 a, f32x16 b) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = i & S ? b.v[i] : a.v[i];
    return r;
}
BT void store_bytes(uint8_t* p, i32x16 a) { BITTRUE_LANES p[i] = uint8_t(a.v[i]); }
template <int K> BT f32x16 lane_of_fours(f32x16 a) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = a.v[i / 4 * 4 + K];
    return r;
}
template <int J> BT f32x16 four_in_all(f32x16 a) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = a.v[4 * J + i % 4];
    return r;
}
BT f32x16 load_twice(const float* p) {
    f32x16 r;
    BITTRUE_LANES r.v[i] = p[i / 2];
    return r;
}

#endif

// What the functions above mean, on every instruction set:
//   max(a, b) = a > b ? a : b, min(a, b) = a < b ? a : b (a NaN in either gives b); less and equal are false on NaN.
//   select(m, a, b): a where m, else b.  xor_lanes<S>: lane i takes lane i ^ S.  blend_lanes<S>: a where !(i & S), else b.
//   store_bytes(p, a): the low bytes of the sixteen lanes.
//   lane_of_fours<K>: lane i takes lane K of its own four lanes.  four_in_all<J>: lane i takes lane 4J + i % 4.
//   load_twice(p): p[0], p[0], p[1], p[1], ... of 8 floats.  lanes_below(n): lanes 0..n-1.

// Sum of the lanes as a fixed tree: distance 8, then 4, 2, 1.
#if BITTRUE_ISA_CODE > 0
BT float hsum(f32x16 a) {
    __m256 s8 = _mm256_add_ps(low_half(a), high_half(a));
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
#else
BT float hsum(f32x16 a) {
    for (int s = 8; s > 0; s /= 2)
        for (int i = 0; i < s; ++i) a.v[i] = a.v[i] + a.v[i + s];
    return a.v[0];
}
#endif

// Largest lane (no NaN among them).
BT float hmax(f32x16 a) {
    a = max(a, xor_lanes<8>(a));
    a = max(a, xor_lanes<4>(a));
    a = max(a, xor_lanes<2>(a));
    a = max(a, xor_lanes<1>(a));
    float lanes[16];
    store(lanes, a);
    return lanes[0];
}

BT f32x16 neg(f32x16 a) { return sub(set1(-0.0f), a); }
BT f32x16 abs(f32x16 a) { return as_float(bit_and(as_int(a), set1(int32_t(0x7fffffff)))); }
// Magnitude of a, sign of b.
BT f32x16 copysign(f32x16 a, f32x16 b) {
    return as_float(bit_or(as_int(abs(a)), bit_and(as_int(b), set1(int32_t(0x80000000)))));
}

// 2^n for n in -126..127.
BT f32x16 pow2(i32x16 n) { return as_float(shift_left<23>(add(n, set1(int32_t(127))))); }

// e^x within 2 ulp, subnormal results included; -inf gives 0, large x +inf, NaN NaN.
BT f32x16 exp(f32x16 x) {
    const f32x16 magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    f32x16 c = max(min(x, set1(89.0f)), set1(-104.0f));
    f32x16 t = fma(c, set1(1.44269504088896341f), magic);
    f32x16 n = sub(t, magic);
    i32x16 k = sub(as_int(t), as_int(magic));
    f32x16 r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), set1(1.0f));
    i32x16 half = shift_right_signed<1>(k);  // in two steps: 2^k itself may not be a normal number
    f32x16 y = mul(mul(p, pow2(half)), pow2(sub(k, half)));
    return select(equal(x, x), y, x);
}

// ln(x (1 + c / x)) for normal x > 0 and a correction c far below x: the core of log and log1p (coefficients of fdlibm).
BT f32x16 log_core(f32x16 x, f32x16 c, f32x16 exponent_shift) {
    i32x16 u = add(as_int(x), set1(int32_t(0x3f800000 - 0x3f3504f3)));
    f32x16 k = add(convert(sub(shift_right<23>(u), set1(int32_t(127)))), exponent_shift);
    f32x16 m = as_float(add(bit_and(u, set1(int32_t(0x007fffff))), set1(int32_t(0x3f3504f3))));
    f32x16 f = sub(m, set1(1.0f));
    f32x16 s = div(f, add(f, set1(2.0f)));
    f32x16 z = mul(s, s);
    f32x16 w = mul(z, z);
    f32x16 t1 = mul(w, fma(w, set1(0.24279078841f), set1(0.40000972152f)));
    f32x16 t2 = mul(z, fma(w, set1(0.28498786688f), set1(0.66666662693f)));
    f32x16 h = mul(mul(f, f), set1(0.5f));
    f32x16 low = add(mul(k, set1(9.0580006145e-6f)), div(c, x));
    f32x16 tail = fma(s, add(h, add(t1, t2)), low);
    return sub(mul(k, set1(6.9313812256e-1f)), sub(sub(h, tail), f));
}

// ln x within 2 ulp, subnormal x included; 0 gives -inf, negative x NaN, +inf +inf.
BT f32x16 log(f32x16 x) {
    const float inf = __builtin_inff();
    mask16 tiny = less(x, set1(1.17549435e-38f));
    f32x16 scaled = select(tiny, mul(x, set1(33554432.0f)), x);
    f32x16 y = log_core(scaled, zero(), select(tiny, set1(-25.0f), zero()));
    y = select(equal(x, zero()), set1(-inf), y);
    y = select(equal(x, set1(inf)), x, y);
    return select(less_equal(zero(), x), y, set1(__builtin_nanf("")));
}

// ln(1 + x) within 2 ulp for finite x >= 0.
BT f32x16 log1p(f32x16 x) {
    f32x16 u = add(x, set1(1.0f));
    // What the addition lost; for x >= 1 it is taken from the other operand.
    f32x16 c = select(less(x, set1(1.0f)), sub(x, sub(u, set1(1.0f))), sub(set1(1.0f), sub(u, x)));
    return log_core(u, c, zero());
}

// ln(1 + e^x), stable for large |x|.
BT f32x16 softplus(f32x16 x) { return add(max(x, zero()), log1p(exp(neg(abs(x))))); }

BT f32x16 sigmoid(f32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(neg(x)))); }

}  // namespace
