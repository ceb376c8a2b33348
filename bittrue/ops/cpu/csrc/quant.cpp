// quant_fp8, quant_fp4, hadamard, pack_rows, kv_rows and unpack_rows over rows.
#include "rowops.h"

namespace {

thread_local Scratch hadamard_work, row_work;

template <class T> void quant(const void* x, void* out, int64_t rows, int64_t n, int64_t group, bool fp8) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    PARALLEL_FOR(r, rows, rows * n) {
        if (fp8) quant_fp8_row(from + r * n, to + r * n, n, group);
        else quant_fp4_row(from + r * n, to + r * n, n, group);
    };
}

template <class T> void hadamard(const void* x, void* out, int64_t rows, int64_t n) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    PARALLEL_FOR(r, rows, rows * n) { hadamard_row(from + r * n, to + r * n, n, hadamard_work.get<float>(n < 16 ? 16 : n)); };
}

template <class T> void pack(const void* x, uint8_t* __restrict out, int64_t rows, const RowSpec& spec) {
    const T* from = static_cast<const T*>(x);
    PARALLEL_FOR(r, rows, rows * spec.dim) { pack_row(from + r * spec.dim, out + r * spec.bytes(), spec); };
}

template <class T, class W>
void kv_rows(const T* kv, const W* norm, const float* cos, const float* sin, float eps, uint8_t* out, int64_t rows,
             const RowSpec& spec, int64_t turned) {
    PARALLEL_FOR(r, rows, rows * spec.dim * 2) {
        T* x = row_work.get<T>(spec.dim);
        rms_norm_row(kv + r * spec.dim, norm, x, spec.dim, eps);
        rope_row(x, x, spec.dim, turned, cos + r * (turned / 2), sin + r * (turned / 2), false);
        pack_row(x, out + r * spec.bytes(), spec);
    };
}

template <class T>
void kv_rows(const void* kv, const void* norm, int64_t norm_dtype, const float* cos, const float* sin, float eps,
             uint8_t* out, int64_t rows, const RowSpec& spec, int64_t turned) {
    const T* x = static_cast<const T*>(kv);
    if (norm_dtype == 0) kv_rows(x, static_cast<const float*>(norm), cos, sin, eps, out, rows, spec, turned);
    else kv_rows(x, static_cast<const bf16*>(norm), cos, sin, eps, out, rows, spec, turned);
}

}  // namespace

// x, out [rows, n]
BITTRUE_EXPORT(quant_fp8)(const void* x, int64_t dtype, void* out, int64_t rows, int64_t n, int64_t group) {
    if (dtype == 0) quant<float>(x, out, rows, n, group, true);
    else quant<bf16>(x, out, rows, n, group, true);
}
BITTRUE_REPLAYABLE(quant_fp8)

BITTRUE_EXPORT(quant_fp4)(const void* x, int64_t dtype, void* out, int64_t rows, int64_t n, int64_t group) {
    if (dtype == 0) quant<float>(x, out, rows, n, group, false);
    else quant<bf16>(x, out, rows, n, group, false);
}
BITTRUE_REPLAYABLE(quant_fp4)

// x, out [rows, n], n a power of two
BITTRUE_EXPORT(hadamard)(const void* x, int64_t dtype, void* out, int64_t rows, int64_t n) {
    if (dtype == 0) hadamard<float>(x, out, rows, n);
    else hadamard<bf16>(x, out, rows, n);
}
BITTRUE_REPLAYABLE(hadamard)

// x [rows, dim] -> out [rows, bytes]; kind as ROW_F32 ...
BITTRUE_EXPORT(pack_rows)(const void* x, int64_t dtype, uint8_t* out, int64_t rows, int64_t kind, int64_t dim,
                          int64_t rope_dim) {
    const RowSpec spec{kind, dim, rope_dim};
    if (dtype == 0) pack<float>(x, out, rows, spec);
    else pack<bf16>(x, out, rows, spec);
}
BITTRUE_REPLAYABLE(pack_rows)

// kv [rows, dim], norm [dim], cos, sin [rows, turned / 2] -> out [rows, bytes]; the last `turned` features are rotated
BITTRUE_EXPORT(kv_rows)(const void* kv, int64_t dtype, const void* norm, int64_t norm_dtype, const float* cos,
                        const float* sin, int64_t turned, float eps, uint8_t* out, int64_t rows, int64_t kind, int64_t dim,
                        int64_t rope_dim) {
    const RowSpec spec{kind, dim, rope_dim};
    if (dtype == 0) kv_rows<float>(kv, norm, norm_dtype, cos, sin, eps, out, rows, spec, turned);
    else kv_rows<bf16>(kv, norm, norm_dtype, cos, sin, eps, out, rows, spec, turned);
}
BITTRUE_REPLAYABLE(kv_rows)

// bytes [rows, bytes] -> out [rows, dim] f32
BITTRUE_EXPORT(unpack_rows)(const uint8_t* __restrict bytes, float* __restrict out, int64_t rows, int64_t kind,
                            int64_t dim, int64_t rope_dim) {
    const RowSpec spec{kind, dim, rope_dim};
    PARALLEL_FOR(r, rows, rows * dim) { unpack_row(bytes + r * spec.bytes(), out + r * dim, spec); };
}
BITTRUE_REPLAYABLE(unpack_rows)
