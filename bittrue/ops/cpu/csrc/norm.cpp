// rms_norm over rows.
#include "rowops.h"

namespace {

template <class T, class W>
void rms_norm(const T* __restrict x, const W* __restrict weight, T* __restrict out, int64_t rows, int64_t n,
              float eps) {
    PARALLEL_FOR(r, rows, rows * n) { rms_norm_row(x + r * n, weight, out + r * n, n, eps); };
}

template <class T>
void rms_norm(const void* x, const void* weight, int64_t weight_dtype, void* out, int64_t rows, int64_t n, float eps) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    if (weight_dtype == 0) rms_norm(from, static_cast<const float*>(weight), to, rows, n, eps);
    else rms_norm(from, static_cast<const bf16*>(weight), to, rows, n, eps);
}

}  // namespace

// x, out [rows, n]; weight [n] or null
BITTRUE_EXPORT(rms_norm)(const void* x, int64_t dtype, const void* weight, int64_t weight_dtype, void* out,
                         int64_t rows, int64_t n, float eps) {
    if (dtype == 0) rms_norm<float>(x, weight, weight_dtype, out, rows, n, eps);
    else rms_norm<bf16>(x, weight, weight_dtype, out, rows, n, eps);
}
BITTRUE_REPLAYABLE(rms_norm)
