// The backward of experts around its matrix products: pairs sorted by expert, rows gathered, SwiGLU, rows added back.
#include "simd.h"

namespace {

// The sums over a row are taken lane by lane, then as hsum's tree: the order depends on the length alone.
BT void swiglu_backward_row(float* gate, float* up, float* d_z, int64_t n, float limit, float weight, float* d_weight) {
    const f32x16 high = set1(limit), low = set1(-limit), w = set1(weight), one = set1(1.0f);
    f32x16 sum = zero();
    const auto channels = [&](f32x16& gate, f32x16& up, f32x16& d_z) __attribute__((always_inline)) {
        const f32x16 g = min(high, gate), u = max(low, min(high, up));  // in this order a NaN stays one
        const f32x16 s = sigmoid(g), silu = mul(g, s), slope = fma(silu, sub(one, s), s);
        const f32x16 product = mul(silu, u), d = mul(d_z, w);
        sum = fma(d_z, product, sum);
        const f32x16 d_gate = mul(mul(d, u), slope), d_up = mul(d, silu);
        gate = select(less(high, gate), zero(), d_gate);
        up = select(less(high, abs(up)), zero(), d_up);
        d_z = mul(w, product);
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 g = load(gate + i), u = load(up + i), d = load(d_z + i);
        channels(g, u, d);
        store(gate + i, g);
        store(up + i, u);
        store(d_z + i, d);
    }
    if (i < n) {
        f32x16 g = load_n(gate + i, n - i), u = load_n(up + i, n - i), d = load_n(d_z + i, n - i);
        channels(g, u, d);
        store_n(gate + i, g, n - i);
        store_n(up + i, u, n - i);
        store_n(d_z + i, d, n - i);
    }
    if (d_weight != nullptr) *d_weight = hsum(sum);
}

}  // namespace

// ids [pairs] -> the pairs in order of their expert, then of their number: pair_at [pairs], those of expert e at
// offsets[e]..offsets[e + 1] (experts + 1 of them), and place[pair] where it stands. An id that is no expert's: fault becomes
// (1, that id) and nothing else may be used.
BITTRUE_EXPORT(grad_experts_sort)(const int32_t* ids, int64_t pairs, int64_t experts, int64_t* pair_at, int64_t* place,
                                  int64_t* offsets, int64_t* fault) {
    for (int64_t e = 0; e <= experts; ++e) offsets[e] = 0;
    for (int64_t p = 0; p < pairs; ++p) {
        if (ids[p] < 0 || ids[p] >= experts) {
            fault[0] = 1, fault[1] = ids[p];
            return;
        }
        ++offsets[ids[p] + 1];
    }
    // offsets[e + 1] counts the pairs of e, then stands where its next one goes; at the end that is where e ends.
    for (int64_t e = 0, at = 0; e < experts; ++e) {
        const int64_t count = offsets[e + 1];
        offsets[e + 1] = at;
        at += count;
    }
    for (int64_t p = 0; p < pairs; ++p) {
        const int64_t at = offsets[ids[p] + 1]++;
        place[p] = at;
        pair_at[at] = p;
    }
}

// Rows pair_at[i] / slots of x and d_out, width wide, to x_rows and d_rows.
BITTRUE_EXPORT(grad_experts_gather)(const float* x, const float* d_out, const int64_t* pair_at, int64_t count, int64_t slots,
                                    int64_t width, float* x_rows, float* d_rows) {
    PARALLEL_FOR(i, count, 2 * count * width) {
        const int64_t t = pair_at[i] / slots;
        std::memcpy(x_rows + i * width, x + t * width, size_t(width) * 4);
        std::memcpy(d_rows + i * width, d_out + t * width, size_t(width) * 4);
    };
}

// In place: gate_up [count, 2 * hidden] (gate, then up) becomes its gradient, d_z [count, hidden] becomes z, the value that w2
// takes. Row i has weight weights[pair_at[i]], and the gradient of that goes to d_weights; pair_at null: weight 1, no gradient.
BITTRUE_EXPORT(grad_experts_swiglu)(float* gate_up, float* d_z, const int64_t* pair_at, const float* weights, int64_t count,
                                    int64_t hidden, float limit, float* d_weights) {
    PARALLEL_FOR(i, count, count * hidden * 4) {
        float* gate = gate_up + 2 * i * hidden;
        const bool routed = pair_at != nullptr;
        swiglu_backward_row(gate, gate + hidden, d_z + i * hidden, hidden, limit, routed ? weights[pair_at[i]] : 1.0f,
                            routed ? d_weights + pair_at[i] : nullptr);
    };
}

// d_x [tokens, width]: the rows of a token's pairs added in slot order from zero.
BITTRUE_EXPORT(grad_experts_scatter)(const float* rows, const int64_t* place, int64_t tokens, int64_t slots, int64_t width,
                                     float* d_x) {
    PARALLEL_FOR(t, tokens, tokens * (slots + 1) * width) {
        const int64_t* at = place + t * slots;
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) {
            f32x16 sum = zero();
            for (int64_t s = 0; s < slots; ++s) sum = add(sum, load(rows + at[s] * width + i));
            store(d_x + t * width + i, sum);
        }
        if (i < width) {
            f32x16 sum = zero();
            for (int64_t s = 0; s < slots; ++s) sum = add(sum, load_n(rows + at[s] * width + i, width - i));
            store_n(d_x + t * width + i, sum, width - i);
        }
    };
}
