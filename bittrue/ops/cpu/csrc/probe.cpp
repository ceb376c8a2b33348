// Exposes the building blocks of simd.h, formats.h and dots.h over arrays, so that tests can compare instruction sets bit for bit.
#include "dots.h"

namespace {

BT f32x16 apply(int64_t which, f32x16 a, f32x16 b, f32x16 c) {
    switch (which) {
        case 0: return exp(a);
        case 1: return log(a);
        case 2: return log1p(a);
        case 3: return softplus(a);
        case 4: return sigmoid(a);
        case 5: return fma(a, b, c);
        case 6: return max(a, b);
        case 7: return min(a, b);
        case 8: return select(less(a, b), a, c);
        case 9: return set1(hsum(a));
        case 10: return set1(hmax(a));
        case 11: return fp8_round(a);
        case 12: return fp4_round(a);
        case 13: return add(xor_lanes<1>(a), mul(xor_lanes<2>(b), add(xor_lanes<4>(c), xor_lanes<8>(a))));
        case 14: return blend_lanes<8>(blend_lanes<1>(a, b), blend_lanes<2>(blend_lanes<4>(b, c), a));
        case 15: return copysign(sqrt(abs(a)), b);
        default: return div(a, b);
    }
}

}  // namespace

// out[i] = function `which` of a[i], b[i], c[i]; n elements with a masked tail, written through `dtype`.
BITTRUE_EXPORT(probe_vector)(int64_t which, const float* a, const float* b, const float* c, void* out, int64_t dtype,
                             int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 r = apply(which, load_n(a + i, n - i), load_n(b + i, n - i), load_n(c + i, n - i));
        if (dtype == 0) store_n(static_cast<float*>(out) + i, r, n - i);
        else store_n(static_cast<bf16*>(out) + i, r, n - i);
    }
}

// n elements of a packed format (0 fp8, 1 fp4, 2 ue8m0, 3 bf16) to f32.
BITTRUE_EXPORT(probe_decode)(int64_t format, const uint8_t* bytes, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        if (format == 0) store_n(out + i, load_fp8_n(bytes + i, n - i), n - i);
        if (format == 1) store_n(out + i, load_fp4_n(bytes + i / 2, n - i), n - i);
        if (format == 3) store_n(out + i, load_n(reinterpret_cast<const bf16*>(bytes) + i, n - i), n - i);
    }
    for (int64_t i = 0; format == 2 && i < n; ++i) out[i] = scale_value(bytes[i]);
}

// Bytes of values that are already representable (0 fp8, 1 fp4 one nibble per byte).
BITTRUE_EXPORT(probe_encode)(int64_t format, const float* values, uint8_t* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = format == 0 ? fp8_byte(values[i]) : fp4_nibble(values[i]);
}

// The dot products of dots.h, 16 sums at a time, by the instruction made for them where the processor has it (fast) or as every
// processor does them. kind 0: bytes, a unsigned; 1: pairs of bf16, sums f32.
BITTRUE_EXPORT(probe_dots)(int64_t kind, int64_t fast, const int32_t* sums, const int32_t* a, const int32_t* b, int32_t* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const i32x16 x = load(a + i), y = load(b + i), sum = load(sums + i);
        if (kind == 0) {
            store(out + i, fast != 0 && has_dot_bytes() ? dot_bytes<true>(sum, x, y) : dot_bytes<false>(sum, x, y));
        } else {
            const f32x16 s = as_float(sum), plain = fma(low_of(x), low_of(y), fma(high_of(x), high_of(y), s));
            store(out + i, as_int(fast != 0 && has_dot_pairs() ? dot_pairs(s, x, y) : plain));
        }
    }
}
