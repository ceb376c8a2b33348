// The two compressors: pooling per channel in the order of positions, then the finishing of whole entries.
#include "step.h"

namespace {

constexpr int64_t CSA_RATIO = 4, HCA_RATIO = 128;
constexpr int64_t CHANNEL_BLOCK = 64;

// What finishes an entry; laid out as FinishArgs in ops/cpu/cache.py.
struct Finish {
    const float* ape;
    const void* norm;
    int64_t norm_dtype;
    const float* inv_freq;
    int64_t rope_dim, act_dtype, hadamard;
    RowSpec row;
    double eps;
};

thread_local Scratch pooled_scratch;  // of the calling thread: the closed entries of the step
thread_local Scratch finish_scratch;

template <class T, class W>
void finish_as(float* pooled, const W* norm, const Finish& f, int64_t position, uint8_t* out) {
    const int64_t c = f.row.dim, half = f.rope_dim / 2;
    float* work = finish_scratch.get<float>(2 * pad16(c) + 2 * pad16(half));
    T* x = reinterpret_cast<T*>(work + pad16(c));
    float *cos = work + 2 * pad16(c), *sin = cos + pad16(half);
    convert_row(pooled, x, c);
    rms_norm_row(x, norm, x, c, float(f.eps));
    rope_angles_row(position, f.inv_freq, half, cos, sin);
    rope_row(x, x, c, f.rope_dim, cos, sin, false);
    if (f.hadamard) hadamard_row(x, x, c, work);
    pack_row(x, out, f.row);
}

// pooled [c] f32 -> the bytes of the entry: round, norm, rope at `position`, Hadamard, pack.
void finish(float* pooled, const Finish& f, int64_t position, uint8_t* out) {
    const float* n32 = static_cast<const float*>(f.norm);
    const bf16* n16 = static_cast<const bf16*>(f.norm);
    if (f.act_dtype == 0)
        return f.norm_dtype == 0 ? finish_as<float>(pooled, n32, f, position, out)
                                 : finish_as<float>(pooled, n16, f, position, out);
    return f.norm_dtype == 0 ? finish_as<bf16>(pooled, n32, f, position, out)
                             : finish_as<bf16>(pooled, n16, f, position, out);
}

// ---- CSA: entry i pools half A of tokens 4(i-1)..4i-1 and half B of tokens 4i..4i+3

struct CsaSlot {
    const float *u, *gate, *ape;  // ape null: it is already in gate
};

struct Csa {
    const float *u, *gate;
    float* state;
    int64_t ring, width;  // width = 2c

    BT float* state_row(const Step& step, int64_t s, int64_t p) const {
        return state + (step.slots[s] * ring + p % ring) * 2 * width;
    }
    BT CsaSlot slot(const Step& step, const float* ape, int64_t s, int64_t p, int64_t half) const {
        const int64_t at = half * (width / 2);
        if (p < step.starts[s]) {
            const float* row = state_row(step, s, p) + at;
            return {row, row + width, nullptr};
        }
        const int64_t t = (step.offsets[s] + p - step.starts[s]) * width + at;
        return {u + t, gate + t, ape + p % CSA_RATIO * width + at};
    }
};

BT f32x16 biased(const CsaSlot& slot, int64_t i, int64_t n) {
    f32x16 g = load_n(slot.gate + i, n);
    return slot.ape == nullptr ? g : add(g, load_n(slot.ape + i, n));
}

void csa_pool(const Step& step, const Csa& csa, const float* ape, int64_t s, int64_t entry, float* pooled) {
    const int64_t c = csa.width / 2;
    CsaSlot slots[2 * CSA_RATIO];
    int64_t num = 0;
    for (int64_t p = CSA_RATIO * (entry - 1); p < CSA_RATIO * entry; ++p)
        if (p >= 0) slots[num++] = csa.slot(step, ape, s, p, 0);
    for (int64_t p = CSA_RATIO * entry; p < CSA_RATIO * (entry + 1); ++p) slots[num++] = csa.slot(step, ape, s, p, 1);
    for (int64_t i = 0; i < c; i += 16) {
        f32x16 gates[2 * CSA_RATIO];
        f32x16 top = gates[0] = biased(slots[0], i, c - i);
        for (int64_t j = 1; j < num; ++j) {
            gates[j] = biased(slots[j], i, c - i);
            top = max(top, gates[j]);
        }
        f32x16 total = zero(), weighted = zero();
        for (int64_t j = 0; j < num; ++j) {
            f32x16 e = exp(sub(gates[j], top));
            total = add(total, e);
            weighted = fma(e, load_n(slots[j].u + i, c - i), weighted);
        }
        store_n(pooled + i, div(weighted, total), c - i);
    }
}

// After every entry is written: the step's last rows, for the entries of later steps.
void csa_keep(const Step& step, const Csa& csa, const float* ape, int64_t s) {
    const int64_t start = step.starts[s], end = step.end(s), w = csa.width;
    for (int64_t p = end - csa.ring > start ? end - csa.ring : start; p < end; ++p) {
        float* row = csa.state_row(step, s, p);
        const int64_t t = (step.offsets[s] + p - start) * w;
        std::memcpy(row, csa.u + t, size_t(w) * 4);
        const float* bias = ape + p % CSA_RATIO * w;
        for (int64_t i = 0; i < w; i += 16)
            store_n(row + w + i, add(load_n(csa.gate + t + i, w - i), load_n(bias + i, w - i)), w - i);
    }
}

// ---- HCA: a running (max, sum, weighted sum) over the open window, one token after the other

struct Hca {
    const float *u, *gate;
    float *fold, *pending;
    int64_t max_draft;
};

// Positions folds[s]..end of one sequence, channels from..from+n (n <= CHANNEL_BLOCK). Windows that close on a token of the
// step leave their pooled channels in pooled[0], pooled[c], ...
void hca_pool(const Step& step, const Hca& h, const Finish& f, int64_t s, int64_t from, int64_t n, float* pooled) {
    constexpr int64_t VECTORS = CHANNEL_BLOCK / 16;
    const int64_t c = f.row.dim, start = step.starts[s], end = step.end(s), first = step.folds[s];
    const int64_t folded = end - h.max_draft > first ? end - h.max_draft : first;
    const float minus_inf = -__builtin_inff();
    float* fold = h.fold + step.slots[s] * 3 * c + from;
    float* pending = h.pending + step.slots[s] * h.max_draft * 2 * c + from;
    f32x16 m[VECTORS], sum[VECTORS], weighted[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) {
        m[v] = set1(minus_inf), sum[v] = zero(), weighted[v] = zero();
        if (first % HCA_RATIO == 0) continue;  // what the state holds there belongs to another sequence
        m[v] = load_n(fold + 16 * v, n - 16 * v > 0 ? n - 16 * v : 0);
        sum[v] = load_n(fold + c + 16 * v, n - 16 * v > 0 ? n - 16 * v : 0);
        weighted[v] = load_n(fold + 2 * c + 16 * v, n - 16 * v > 0 ? n - 16 * v : 0);
    }
    for (int64_t p = first; p <= end; ++p) {
        if (p == folded)
            for (int64_t v = 0; 16 * v < n; ++v) {
                store_n(fold + 16 * v, m[v], n - 16 * v);
                store_n(fold + c + 16 * v, sum[v], n - 16 * v);
                store_n(fold + 2 * c + 16 * v, weighted[v], n - 16 * v);
            }
        if (p == end) break;
        const float *u, *gate, *bias = nullptr;
        if (p < start) {
            u = pending + p % h.max_draft * 2 * c;
            gate = u + c;
        } else {
            const int64_t t = (step.offsets[s] + p - start) * c + from;
            u = h.u + t, gate = h.gate + t, bias = f.ape + p % HCA_RATIO * c + from;
        }
        for (int64_t v = 0; 16 * v < n; ++v) {
            const int64_t left = n - 16 * v;
            f32x16 g = load_n(gate + 16 * v, left);
            if (bias != nullptr) g = add(g, load_n(bias + 16 * v, left));
            // Of exp(m - m') and exp(g - m') one is exp(0) = 1: the other is the exponential of the distance.
            mask16 higher = less(m[v], g);
            f32x16 top = select(higher, g, m[v]);
            f32x16 d = exp(sub(select(higher, m[v], g), top));
            f32x16 keep = select(higher, d, set1(1.0f)), e = select(higher, set1(1.0f), d);
            sum[v] = fma(sum[v], keep, e);
            weighted[v] = fma(weighted[v], keep, mul(e, load_n(u + 16 * v, left)));
            m[v] = top;
        }
        if ((p + 1) % HCA_RATIO != 0) continue;
        for (int64_t v = 0; v < VECTORS; ++v) {
            if (p >= start && 16 * v < n) store_n(pooled + from + 16 * v, div(weighted[v], sum[v]), n - 16 * v);
            m[v] = set1(minus_inf), sum[v] = zero(), weighted[v] = zero();
        }
        if (p >= start) pooled += c;
    }
    for (int64_t p = folded > start ? folded : start; p < end; ++p) {
        float* row = pending + p % h.max_draft * 2 * c;
        const int64_t t = (step.offsets[s] + p - start) * c + from;
        const float* bias = f.ape + p % HCA_RATIO * c + from;
        for (int64_t i = 0; i < n; i += 16) {
            store_n(row + i, load_n(h.u + t + i, n - i), n - i);
            store_n(row + c + i, add(load_n(h.gate + t + i, n - i), load_n(bias + i, n - i)), n - i);
        }
    }
}

// The entries that close on a token of sequence s.
BT int64_t num_closed(const Step& step, int64_t s, int64_t ratio) {
    return step.end(s) / ratio - step.starts[s] / ratio;
}

// Sequence and number of the n-th entry that closes in the step.
BT void find_closed(const Step& step, int64_t ratio, int64_t n, int64_t* s, int64_t* entry) {
    for (*s = 0; n >= num_closed(step, *s, ratio); ++*s) n -= num_closed(step, *s, ratio);
    *entry = step.starts[*s] / ratio + n;
}

BT int64_t all_closed(const Step& step, int64_t ratio) {
    int64_t n = 0;
    for (int64_t s = 0; s < step.num_sequences; ++s) n += num_closed(step, s, ratio);
    return n;
}

}  // namespace

// u, gate [T, 2c]; state [slots, ring, 2, 2c].
BITTRUE_EXPORT(csa_compress)(const Step* step, const Finish* f, const float* u, const float* gate, float* state,
                             int64_t ring, uint8_t* pages, int64_t per_page) {
    const int64_t c = f->row.dim, closed = all_closed(*step, CSA_RATIO);
    const Csa csa{u, gate, state, ring, 2 * c};
    const Pages out{pages, per_page, f->row.bytes()};
    PARALLEL_FOR(n, closed, closed * c * 400) {
        int64_t s, entry;
        find_closed(*step, CSA_RATIO, n, &s, &entry);
        float* pooled = pooled_scratch.get<float>(c);
        csa_pool(*step, csa, f->ape, s, entry, pooled);
        finish(pooled, *f, CSA_RATIO * entry, out.entry(*step, s, entry));
    };
    PARALLEL_FOR(s, step->num_sequences, step->num_sequences * ring * c) { csa_keep(*step, csa, f->ape, s); };
}
BITTRUE_REPLAYABLE(csa_compress)

// u, gate [T, c]; fold [slots, 3, c]; pending [slots, max draft, 2, c].
BITTRUE_EXPORT(hca_compress)(const Step* step, const Finish* f, const float* u, const float* gate, float* fold,
                             float* pending, int64_t max_draft, uint8_t* pages, int64_t per_page) {
    const int64_t c = f->row.dim, closed = all_closed(*step, HCA_RATIO);
    const int64_t blocks = (c + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK;
    const Hca hca{u, gate, fold, pending, max_draft};
    const Pages out{pages, per_page, f->row.bytes()};
    float* pooled = pooled_scratch.get<float>(closed * c);
    PARALLEL_FOR(unit, step->num_sequences * blocks, step->num_tokens * c * 40) {
        const int64_t s = unit / blocks, from = unit % blocks * CHANNEL_BLOCK;
        if (step->length(s) == 0) return;
        int64_t before = 0;
        for (int64_t other = 0; other < s; ++other) before += num_closed(*step, other, HCA_RATIO);
        hca_pool(*step, hca, *f, s, from, c - from < CHANNEL_BLOCK ? c - from : CHANNEL_BLOCK, pooled + before * c);
    };
    PARALLEL_FOR(n, closed, closed * c * 100) {
        int64_t s, entry;
        find_closed(*step, HCA_RATIO, n, &s, &entry);
        finish(pooled + n * c, *f, HCA_RATIO * entry, out.entry(*step, s, entry));
    };
}
BITTRUE_REPLAYABLE(hca_compress)
