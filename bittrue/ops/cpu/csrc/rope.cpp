// rope_angles and rope.
#include "rowops.h"

namespace {

template <class T>
void rope(const T* __restrict x, const float* __restrict cos, const float* __restrict sin, T* __restrict out,
          int64_t tokens, int64_t heads, int64_t dim, int64_t rope_dim, bool inverse) {
    PARALLEL_FOR(r, tokens * heads, tokens * heads * dim) {
        int64_t angles = r / heads * (rope_dim / 2);
        rope_row(x + r * dim, out + r * dim, dim, rope_dim, cos + angles, sin + angles, inverse);
    };
}

}  // namespace

// positions [tokens], inv_freq [half] -> cos, sin [tokens, half]
BITTRUE_EXPORT(rope_angles)(const int32_t* __restrict positions, const float* __restrict inv_freq,
                            float* __restrict cos, float* __restrict sin, int64_t tokens, int64_t half) {
    PARALLEL_FOR(t, tokens, tokens * half * 16) { rope_angles_row(positions[t], inv_freq, half, cos + t * half, sin + t * half); };
}
BITTRUE_REPLAYABLE(rope_angles)

// x, out [tokens, heads, dim]; cos, sin [tokens, rope_dim / 2]
BITTRUE_EXPORT(rope)(const void* x, int64_t dtype, const float* cos, const float* sin, void* out, int64_t tokens,
                     int64_t heads, int64_t dim, int64_t rope_dim, int64_t inverse) {
    if (dtype == 0)
        rope(static_cast<const float*>(x), cos, sin, static_cast<float*>(out), tokens, heads, dim, rope_dim,
             inverse != 0);
    else
        rope(static_cast<const bf16*>(x), cos, sin, static_cast<bf16*>(out), tokens, heads, dim, rope_dim,
             inverse != 0);
}
BITTRUE_REPLAYABLE(rope)
