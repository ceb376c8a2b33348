// The backward of route_topk and route_hash: from the weights of the chosen experts to their logits.
#include "simd.h"

namespace {

thread_local Scratch route_scratch;

constexpr float FAR_BELOW = -20.0f;  // softplus(x) = e^x (1 - e^x / 2 + ..): below, e^x is less than half a unit of f32

// sqrt(softplus(x)) and its derivative 0.5 sigmoid(x) / sqrt(softplus(x)); far below both are e^(x/2), times 0.5. In that form
// neither is 0 / 0 where softplus vanishes.
BT void scores_with_slopes(f32x16 x, f32x16& score, f32x16& slope) {
    const f32x16 half = set1(0.5f), small = exp(mul(half, x));
    const mask16 is_far = less(x, set1(FAR_BELOW));
    const f32x16 near = max(x, set1(FAR_BELOW)), root = sqrt(softplus(near));
    score = select(is_far, small, root);
    slope = select(is_far, mul(half, small), div(mul(half, sigmoid(near)), root));
}

}  // namespace

// d_weights [tokens, k], logits [tokens, experts], ids [tokens, k] -> d_logits [tokens, experts]. An id that is no expert's:
// its token gets NaN, and fault becomes (1, that id).
BITTRUE_EXPORT(grad_route)(const float* d_weights, const float* logits, const int32_t* ids, int64_t tokens, int64_t experts,
                           int64_t k, float scale, float* d_logits, int64_t* fault) {
    for (int64_t i = 0; i < tokens * k; ++i)
        if (ids[i] < 0 || ids[i] >= experts) {
            fault[0] = 1, fault[1] = ids[i];
            return;
        }
    const int64_t kp = (k + 15) / 16 * 16;
    PARALLEL_FOR(t, tokens, tokens * (experts + kp * 8 + k * k * 2)) {
        float* scores = route_scratch.get<float>(2 * kp);
        float* slopes = scores + kp;
        const float* d = d_weights + t * k;
        float* out = d_logits + t * experts;
        for (int64_t j = 0; j < k; ++j) scores[j] = logits[t * experts + ids[t * k + j]];
        for (int64_t j = 0; j < k; j += 16) {
            f32x16 score, slope;
            scores_with_slopes(load_n(scores + j, k - j), score, slope);
            store(scores + j, score);
            store(slopes + j, slope);
        }
        float total = 1e-20f;  // as in the forward op
        for (int64_t j = 0; j < k; ++j) total = total + scores[j];
        std::memset(out, 0, size_t(experts) * 4);
        for (int64_t e = 0; e < k; ++e) {
            // d_e - sum_j p_j d_j, where the p_j and 1e-20 / total add up to one: as differences nothing cancels.
            float sum = 1e-20f / total * d[e];
            for (int64_t j = 0; j < k; ++j) sum = sum + scores[j] / total * (d[e] - d[j]);
            const int64_t id = ids[t * k + e];
            out[id] = out[id] + sum * (scale / total * slopes[e]);
        }
    };
}
