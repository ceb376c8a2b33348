// experts: the routed and the shared experts of a layer. Tokens are sorted by expert, so that a step reads each chosen expert once,
// and added back in slot order. Two parallel loops: gate, up and SwiGLU by panels of hidden features, down and the sum by panels of
// the result.
#include "matmul.h"

namespace {

constexpr int64_t HIDDEN_PANEL = 128;  // hidden features of one task: a group of the quantisation lies in one
constexpr int64_t HIDDEN_ROWS = 128;   // rows of one pass: gate and up of the panel stay in the second-level cache

template <class T> BT void swiglu_row(const T* gate, const T* up, T* out, int64_t n, float limit, float weight) {
    const f32x16 high = set1(limit), low = set1(-limit), w = set1(weight);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 g = min(high, load_n(gate + i, n - i));  // in this order a NaN stays one
        f32x16 u = max(low, min(high, load_n(up + i, n - i)));
        f32x16 silu = div(g, add(set1(1.0f), exp(neg(g))));
        store_n(out + i, mul(mul(w, silu), u), n - i);
    }
}

// One matrix of an expert; its inputs are known from which one it is. Laid out as records in ops/cpu/matrix.py.
struct Stored {
    const void* data;
    const uint8_t* scale;
    int64_t format;
};

struct Expert {
    Stored w1, w3, w2;
};

// What one call works on. A pair is (token, slot); slot number `slots` is the shared expert, which has number num_experts.
struct Job {
    int64_t tokens, slots, width, hidden, shared_hidden, num_experts;
    const int32_t* ids;    // [tokens, slots]
    const float* weights;  // [tokens, slots]
    const Expert* bank;    // [num_experts], then the shared expert if shared_hidden > 0
    float limit;
    bool quantize;

    bool has_shared() const { return shared_hidden > 0; }
    int64_t stride() const { return slots + has_shared(); }
    int64_t pairs() const { return tokens * stride(); }
    int64_t expert_of(int64_t pair) const {
        const int64_t slot = pair % stride();
        return slot == slots ? num_experts : ids[pair / stride() * slots + slot];
    }
    float weight_of(int64_t pair) const {
        const int64_t slot = pair % stride();
        return slot == slots ? 1.0f : weights[pair / stride() * slots + slot];
    }
    int64_t hidden_of(int64_t expert) const { return expert == num_experts ? shared_hidden : hidden; }
    int64_t most_hidden() const { return hidden > shared_hidden ? hidden : shared_hidden; }
    RowForm form(const Stored& m) const { return row_form(m.format, quantize); }
};

Matrix matrix(const Stored& m, int64_t inputs) { return {m.data, m.scale, m.format, inputs}; }

thread_local Scratch order_scratch, prepared_scratch, pointer_scratch, hidden_scratch, gate_scratch, result_scratch;

// The pairs sorted by expert: those of active[a] stand at offsets[a]..offsets[a + 1].
struct Order {
    int64_t num_active;
    int64_t *active, *offsets, *pair_at, *place;  // place[pair] = -1 where the expert does not exist
    bool has_wrong_id;
    int64_t wrong_id;
};

Order sort_pairs(const Job& job) {
    const int64_t pairs = job.pairs(), experts = job.num_experts + 1;
    int64_t* memory = order_scratch.get<int64_t>(3 * experts + 1 + 2 * pairs);
    Order o{0, memory, memory + experts, memory + 3 * experts + 1, memory + 3 * experts + 1 + pairs, false, 0};
    int64_t* counts = memory + 2 * experts + 1;  // then: where the next pair of an expert goes
    for (int64_t e = 0; e < experts; ++e) counts[e] = 0;
    for (int64_t p = 0; p < pairs; ++p) {
        const int64_t e = job.expert_of(p);
        const bool exists = e >= 0 && (e < job.num_experts || p % job.stride() == job.slots);
        o.place[p] = exists ? e : -1;
        if (exists) ++counts[e];
        else o.has_wrong_id = true, o.wrong_id = e;
    }
    o.offsets[0] = 0;
    for (int64_t e = 0, at = 0; e < experts; ++e) {
        const int64_t count = counts[e];
        counts[e] = at;
        if (count == 0) continue;
        at += count;
        o.active[o.num_active] = e;
        o.offsets[++o.num_active] = at;
    }
    for (int64_t p = 0; p < pairs; ++p) {
        if (o.place[p] < 0) continue;
        o.place[p] = counts[o.place[p]]++;
        o.pair_at[o.place[p]] = p;
    }
    return o;
}

// rows[form][place]: the input row of every pair, in the forms that the active experts' matrices need. Returns room for the
// pointers to the hidden rows.
template <class T> const float** prepare_inputs(const Job& job, const T* x, const Order& order, const float** (&rows)[ROW_FORMS]) {
    const int64_t pairs = order.offsets[order.num_active], wp = padded(job.width);
    bool is_needed[ROW_FORMS] = {};
    for (int64_t a = 0; a < order.num_active; ++a) {
        const Expert& e = job.bank[order.active[a]];
        is_needed[job.form(e.w1).index()] = is_needed[job.form(e.w3).index()] = true;
    }
    int64_t forms = 0;
    for (int64_t f = 0; f < ROW_FORMS; ++f) forms += is_needed[f];
    float* copy = prepared_scratch.get<float>(forms * job.tokens * wp);
    const float** pointers = pointer_scratch.get<const float*>((forms + 1) * pairs);
    for (int64_t f = 0; f < ROW_FORMS; ++f) {
        if (!is_needed[f]) continue;
        PARALLEL_FOR(t, job.tokens, job.tokens * wp * (f >= 2 ? 4 : 1)) {
            prepare_row(x + t * job.width, job.width, row_form(f), copy + t * wp);
        };
        for (int64_t i = 0; i < pairs; ++i) pointers[i] = copy + order.pair_at[i] / job.stride() * wp;
        rows[f] = pointers;
        copy += job.tokens * wp;
        pointers += pairs;
    }
    return pointers;
}

// Places begin..end of expert e: the hidden features o..o+n, rounded to T, as the down product wants them.
template <class T>
void hidden_panel(const Job& job, const Order& order, int64_t e, int64_t begin, int64_t end, int64_t o, int64_t n,
                  const float** const (&rows)[ROW_FORMS], float* hidden, int64_t stride) {
    const Expert& expert = job.bank[e];
    T* gate = gate_scratch.get<T>(2 * HIDDEN_ROWS * HIDDEN_PANEL);
    T* up = gate + HIDDEN_ROWS * HIDDEN_PANEL;
    for (int64_t first = begin; first < end; first += HIDDEN_ROWS) {
        const int64_t count = end - first < HIDDEN_ROWS ? end - first : HIDDEN_ROWS;
        for (int64_t p = 0; p < n; p += PANEL_OUTPUTS) {
            const int64_t outputs = n - p < PANEL_OUTPUTS ? n - p : PANEL_OUTPUTS;
            panel(rows[job.form(expert.w1).index()] + first, count, matrix(expert.w1, job.width), o + p, outputs,
                  Target{gate + p, HIDDEN_PANEL, sizeof(T) == 2});
            panel(rows[job.form(expert.w3).index()] + first, count, matrix(expert.w3, job.width), o + p, outputs,
                  Target{up + p, HIDDEN_PANEL, sizeof(T) == 2});
        }
        for (int64_t i = 0; i < count; ++i) {
            T* g = gate + i * HIDDEN_PANEL;
            swiglu_row(g, up + i * HIDDEN_PANEL, g, n, job.limit, job.weight_of(order.pair_at[first + i]));
            prepare_row(g, n, job.form(expert.w2), hidden + (first + i) * stride + o);
        }
    }
}

// Features o..o+n of the result: every expert's part, rounded to T, then added token by token in slot order.
template <class T>
void result_panel(const Job& job, const Order& order, int64_t o, int64_t n, const float* const* hidden, T* out) {
    T* parts = result_scratch.get<T>(order.offsets[order.num_active] * PANEL_OUTPUTS);
    for (int64_t a = 0; a < order.num_active; ++a) {
        const int64_t e = order.active[a], begin = order.offsets[a];
        panel(hidden + begin, order.offsets[a + 1] - begin, matrix(job.bank[e].w2, job.hidden_of(e)), o, n,
              Target{parts + begin * PANEL_OUTPUTS, PANEL_OUTPUTS, sizeof(T) == 2});
    }
    for (int64_t t = 0; t < job.tokens; ++t) {
        const int64_t* place = order.place + t * job.stride();
        for (int64_t i = 0; i < n; i += 16) {
            f32x16 sum = zero();
            for (int64_t s = 0; s < job.stride(); ++s)
                sum = add(sum, place[s] < 0 ? set1(__builtin_nanf("")) : load_n(parts + place[s] * PANEL_OUTPUTS + i, n - i));
            store_n(out + t * job.width + o + i, sum, n - i);
        }
    }
}

template <class T> void run(const Job& job, const T* x, T* out, int64_t* fault) {
    const Order order = sort_pairs(job);
    const int64_t pairs = order.offsets[order.num_active], stride = padded(job.most_hidden());
    const float** rows[ROW_FORMS] = {};
    const float** hidden_rows = prepare_inputs(job, x, order, rows);

    // Experts vary fastest: one with many rows, as the shared one has, is spread over the ranges that threads claim.
    float* hidden = hidden_scratch.get<float>(pairs * stride);
    const int64_t hidden_panels = (job.most_hidden() + HIDDEN_PANEL - 1) / HIDDEN_PANEL;
    PARALLEL_FOR(task, hidden_panels * order.num_active, 2 * pairs * job.width * job.most_hidden()) {
        const int64_t a = task % order.num_active, o = task / order.num_active * HIDDEN_PANEL;
        const int64_t e = order.active[a], left = job.hidden_of(e) - o;
        if (left > 0)
            hidden_panel<T>(job, order, e, order.offsets[a], order.offsets[a + 1], o, left < HIDDEN_PANEL ? left : HIDDEN_PANEL,
                            rows, hidden, stride);
    };

    for (int64_t i = 0; i < pairs; ++i) hidden_rows[i] = hidden + i * stride;
    const int64_t panels = (job.width + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    PARALLEL_FOR(p, panels, pairs * job.width * job.most_hidden()) {
        const int64_t o = p * PANEL_OUTPUTS, left = job.width - o;
        result_panel(job, order, o, left < PANEL_OUTPUTS ? left : PANEL_OUTPUTS, hidden_rows, out);
    };
    if (order.has_wrong_id) fault[0] = 1, fault[1] = order.wrong_id;
}

}  // namespace

// x [tokens, width] (dtype) -> out [tokens, width] (dtype), see Job. A token with an id that is no expert's gets NaN; fault
// becomes (1, that id), and is left alone where all is well.
BITTRUE_EXPORT(experts)(const void* x, int64_t dtype, int64_t tokens, int64_t slots, int64_t width, int64_t hidden,
                        int64_t shared_hidden, int64_t num_experts, const int32_t* ids, const float* weights,
                        const void* bank, float limit, int64_t quantize, void* out, int64_t* fault) {
    const Job job{tokens, slots,   width, hidden, shared_hidden, num_experts, ids, weights, static_cast<const Expert*>(bank),
                  limit,  quantize != 0};
    if (dtype == 0) run(job, static_cast<const float*>(x), static_cast<float*>(out), fault);
    else run(job, static_cast<const bf16*>(x), static_cast<bf16*>(out), fault);
}
BITTRUE_REPLAYABLE(experts)
