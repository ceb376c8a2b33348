// experts and swiglu: tokens sorted by expert so that a step reads each chosen expert once, added back in slot order.
#include "matmul.h"

namespace {

template <class T> BT void swiglu_row(const T* gate, const T* up, T* out, int64_t n, float limit, bool weighted, float weight) {
    const f32x16 high = set1(limit), low = set1(-limit), w = set1(weight);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 g = min(high, load_n(gate + i, n - i));  // in this order a NaN stays one
        f32x16 u = max(low, min(high, load_n(up + i, n - i)));
        f32x16 silu = div(g, add(set1(1.0f), exp(neg(g))));
        if (weighted) silu = mul(w, silu);
        store_n(out + i, mul(silu, u), n - i);
    }
}

template <class T>
void swiglu_rows(const T* gate, const T* up, const float* weight, T* out, int64_t rows, int64_t n, float limit) {
    PARALLEL_FOR(t, rows, rows * n * 16) {
        swiglu_row(gate + t * n, up + t * n, out + t * n, n, limit, weight != nullptr, weight ? weight[t] : 1.0f);
    };
}

// What one call works on. Pairs are (token, slot); sorted by expert, pair p stands at place[p].
struct Job {
    int64_t tokens, slots, width, hidden, active, format;
    const int32_t* segment;   // [tokens, slots] index of the pair's expert among the active ones
    const float* weights;     // [tokens, slots]
    const int64_t* pointers;  // [active, 6] data and scale of w1, w3, w2
    float limit;
    bool quantize;
};

thread_local Scratch order_scratch, offset_scratch, wide_scratch, pointer_scratch, gate_scratch, up_scratch,
    hidden_scratch, result_scratch;

Matrix matrix_of(const Job& job, int64_t expert, int64_t which, int64_t inputs) {
    const int64_t* p = job.pointers + expert * 6 + which * 2;
    return {reinterpret_cast<const void*>(p[0]), reinterpret_cast<const uint8_t*>(p[1]), inputs};
}

// Counting sort: offsets[a]..offsets[a + 1] are the places of expert a; place[pair] and pair_at[place] map both ways.
void sort_pairs(const Job& job, int64_t* offsets, int64_t* place, int64_t* pair_at) {
    const int64_t pairs = job.tokens * job.slots;
    for (int64_t a = 0; a <= job.active; ++a) offsets[a] = 0;
    for (int64_t p = 0; p < pairs; ++p) ++offsets[job.segment[p] + 1];
    for (int64_t a = 0; a < job.active; ++a) offsets[a + 1] += offsets[a];
    for (int64_t p = 0; p < pairs; ++p) place[p] = offsets[job.segment[p]]++;
    for (int64_t a = job.active; a > 0; --a) offsets[a] = offsets[a - 1];
    offsets[0] = 0;
    for (int64_t p = 0; p < pairs; ++p) pair_at[place[p]] = p;
}

// Every expert's rows by its matrices first..first + count: out[j] [pairs, outputs] in sorted order.
template <class T>
void product(const Job& job, const int64_t* offsets, const float* const* rows, int64_t first, int64_t count,
             int64_t inputs, int64_t outputs, T* const* out) {
    const int64_t panels = (outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    const int64_t tasks = job.active * count * panels;
    PARALLEL_FOR(task, tasks, offsets[job.active] * count * inputs * outputs) {
        const int64_t expert = task / (count * panels), j = task / panels % count;
        const int64_t o = task % panels * PANEL_OUTPUTS, start = offsets[expert];
        const int64_t n = outputs - o < PANEL_OUTPUTS ? outputs - o : PANEL_OUTPUTS;
        panel(job.format, rows + start, offsets[expert + 1] - start, matrix_of(job, expert, first + j, inputs), o, n,
              out[j] + start * outputs + o, outputs);
    };
}

template <class T> void widen_rows(const Job& job, const T* x, int64_t rows, int64_t n, float* out) {
    const int64_t np = padded(n);
    PARALLEL_FOR(i, rows, rows * n * 4) {
        widen_row(x + i * n, n, out + i * np);
        if (job.quantize) quant_fp8_row(out + i * np, out + i * np, n, int64_t(128));
    };
}

template <class T> void run(const Job& job, const T* x, float* out) {
    const int64_t pairs = job.tokens * job.slots, dp = padded(job.width), ip = padded(job.hidden);
    int64_t* place = order_scratch.get<int64_t>(2 * pairs);
    int64_t* pair_at = place + pairs;
    int64_t* offsets = offset_scratch.get<int64_t>(job.active + 1);
    sort_pairs(job, offsets, place, pair_at);

    float* wide = wide_scratch.get<float>(job.tokens * dp);
    widen_rows(job, x, job.tokens, job.width, wide);
    const float** rows = pointer_scratch.get<const float*>(pairs);
    for (int64_t i = 0; i < pairs; ++i) rows[i] = wide + pair_at[i] / job.slots * dp;
    T* gate_up[2] = {gate_scratch.get<T>(pairs * job.hidden), up_scratch.get<T>(pairs * job.hidden)};
    product(job, offsets, rows, 0, 2, job.width, job.hidden, gate_up);

    T* hidden = gate_up[0];
    PARALLEL_FOR(i, pairs, pairs * job.hidden * 16) {
        swiglu_row(gate_up[0] + i * job.hidden, gate_up[1] + i * job.hidden, hidden + i * job.hidden, job.hidden,
                   job.limit, true, job.weights[pair_at[i]]);
    };
    float* wide_hidden = hidden_scratch.get<float>(pairs * ip);
    widen_rows(job, hidden, pairs, job.hidden, wide_hidden);
    for (int64_t i = 0; i < pairs; ++i) rows[i] = wide_hidden + i * ip;
    T* result = result_scratch.get<T>(pairs * job.width);
    product(job, offsets, rows, 2, 1, job.hidden, job.width, &result);

    PARALLEL_FOR(t, job.tokens, pairs * job.width) {
        for (int64_t i = 0; i < job.width; i += 16) {
            f32x16 sum = zero();
            for (int64_t s = 0; s < job.slots; ++s)
                sum = add(sum, load_n(result + place[t * job.slots + s] * job.width + i, job.width - i));
            store_n(out + t * job.width + i, sum, job.width - i);
        }
    };
}

}  // namespace

// gate, up [rows, n] -> out [rows, n]; weight [rows] f32 or null.
BITTRUE_EXPORT(swiglu)(const void* gate, const void* up, const float* weight, void* out, int64_t dtype, int64_t rows,
                       int64_t n, float limit) {
    if (dtype == 0)
        swiglu_rows(static_cast<const float*>(gate), static_cast<const float*>(up), weight, static_cast<float*>(out),
                    rows, n, limit);
    else
        swiglu_rows(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), weight, static_cast<bf16*>(out), rows,
                    n, limit);
}
BITTRUE_REPLAYABLE(swiglu)

// x [tokens, width] (dtype) -> out [tokens, width] f32, see Job.
BITTRUE_EXPORT(experts)(const void* x, int64_t dtype, int64_t tokens, int64_t slots, int64_t width, int64_t hidden,
                        const int32_t* segment, const float* weights, int64_t active, const int64_t* pointers,
                        int64_t format, float limit, int64_t quantize, float* out) {
    const Job job{tokens, slots, width, hidden, active, format, segment, weights, pointers, limit, quantize != 0};
    if (dtype == 0) run(job, static_cast<const float*>(x), out);
    else run(job, static_cast<const bf16*>(x), out);
}
BITTRUE_REPLAYABLE(experts)
