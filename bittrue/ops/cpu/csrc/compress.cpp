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

thread_local Scratch pooled_scratch;  // of the calling thread: the written entries of the step
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

// How the channels of a row are read: all rows of a multiple of sixteen need no mask.
struct Whole {
    BT f32x16 operator()(const float* p, int64_t) const { return load(p); }
};
struct Part {
    BT f32x16 operator()(const float* p, int64_t n) const { return load_n(p, n); }
};

// Slots in order into pooled [n] at channel i.
template <class Read>
BT void csa_pool_channels(const CsaSlot* slots, int64_t num, int64_t i, int64_t n, float* pooled, Read read) {
    f32x16 gates[2 * CSA_RATIO];
    f32x16 top = set1(-__builtin_inff());
    for (int64_t j = 0; j < num; ++j) {
        f32x16 g = read(slots[j].gate + i, n);
        if (slots[j].ape != nullptr) g = add(g, read(slots[j].ape + i, n));
        gates[j] = g;
        top = j == 0 ? g : max(top, g);
    }
    f32x16 total = zero(), weighted = zero();
    for (int64_t j = 0; j < num; ++j) {
        f32x16 e = exp(sub(gates[j], top));
        total = add(total, e);
        weighted = fma(e, read(slots[j].u + i, n), weighted);
    }
    store_n(pooled + i, div(weighted, total), n);
}

void csa_pool(const Step& step, const Csa& csa, const float* ape, int64_t s, int64_t entry, float* pooled) {
    const int64_t c = csa.width / 2;
    CsaSlot slots[2 * CSA_RATIO];
    int64_t num = 0;
    for (int64_t p = CSA_RATIO * (entry - 1); p < CSA_RATIO * entry; ++p)
        if (p >= 0) slots[num++] = csa.slot(step, ape, s, p, 0);
    for (int64_t p = CSA_RATIO * entry; p < CSA_RATIO * (entry + 1); ++p) slots[num++] = csa.slot(step, ape, s, p, 1);
    int64_t i = 0;
    for (; i + 16 <= c; i += 16) csa_pool_channels(slots, num, i, 16, pooled, Whole());
    if (i < c) csa_pool_channels(slots, num, i, c - i, pooled, Part());
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

    // `fold` stands here when the step is over: later tokens can still be undone.
    BT int64_t folded(const Step& step, int64_t s) const {
        const int64_t at = step.end(s) - max_draft;
        return at > step.folds[s] ? at : step.folds[s];
    }
};

// The channels one thread folds at once, and what it reads of the row of a token.
struct Channels {
    int64_t from, n;  // n <= CHANNEL_BLOCK
};

constexpr int64_t VECTORS = CHANNEL_BLOCK / 16;

struct Pool {
    f32x16 m[VECTORS], sum[VECTORS], weighted[VECTORS];

    BT void clear() {
        for (int64_t v = 0; v < VECTORS; ++v) m[v] = set1(-__builtin_inff()), sum[v] = zero(), weighted[v] = zero();
    }
    // state: (max, sum, weighted sum), c apart
    BT void load_from(const float* state, int64_t c, int64_t n) {
        clear();
        for (int64_t v = 0; 16 * v < n; ++v) {
            m[v] = load_n(state + 16 * v, n - 16 * v);
            sum[v] = load_n(state + c + 16 * v, n - 16 * v);
            weighted[v] = load_n(state + 2 * c + 16 * v, n - 16 * v);
        }
    }
    BT void store_to(float* state, int64_t c, int64_t n) const {
        for (int64_t v = 0; 16 * v < n; ++v) {
            store_n(state + 16 * v, m[v], n - 16 * v);
            store_n(state + c + 16 * v, sum[v], n - 16 * v);
            store_n(state + 2 * c + 16 * v, weighted[v], n - 16 * v);
        }
    }
    template <class Read> BT void take(int64_t v, const float* u, const float* gate, const float* bias, int64_t n, Read read) {
        f32x16 g = read(gate, n);
        if (bias != nullptr) g = add(g, read(bias, n));
        // Of exp(m - m') and exp(g - m') one is exp(0) = 1: the other is the exponential of the distance.
        const mask16 higher = less(m[v], g);
        const f32x16 top = select(higher, g, m[v]);
        const f32x16 d = exp(sub(select(higher, m[v], g), top));
        const f32x16 keep = select(higher, d, set1(1.0f)), e = select(higher, set1(1.0f), d);
        sum[v] = fma(sum[v], keep, e);
        weighted[v] = fma(weighted[v], keep, mul(e, read(u, n)));
        m[v] = top;
    }
};

// Folds the positions of window w of one sequence that the step has to, in order. A window whose entry is written leaves its
// pooled channels in pooled [written entries, c]; the window that holds position folded(s) leaves the state of that position.
// Windows do not depend on each other, except that the first reads the state that the last writes.
void hca_window(const Step& step, const Hca& h, const Finish& f, int64_t s, int64_t w, Channels channels, float* pooled) {
    const int64_t c = f.row.dim, n = channels.n, start = step.starts[s], end = step.end(s), first = step.folds[s];
    const int64_t begin = w * HCA_RATIO, next = begin + HCA_RATIO, folded = h.folded(step, s);
    const int64_t nth = w - step.first_written(s, HCA_RATIO);
    const bool writes = next <= end && nth >= 0, keeps = begin <= folded && folded < next;
    float* fold = h.fold + step.slots[s] * 3 * c + channels.from;
    const float* pending = h.pending + step.slots[s] * h.max_draft * 2 * c + channels.from;
    Pool pool;
    // What the state holds at the start of a window belongs to another sequence.
    if (first > begin) pool.load_from(fold, c, n);
    else pool.clear();
    for (int64_t p = first > begin ? first : begin;; ++p) {
        if (keeps && p == folded) pool.store_to(fold, c, n);
        if (writes ? p == next : !keeps || p == folded) break;
        const float *u, *gate, *bias = nullptr;
        if (p < start) {
            u = pending + p % h.max_draft * 2 * c;
            gate = u + c;
        } else {
            const int64_t t = (step.offsets[s] + p - start) * c + channels.from;
            u = h.u + t, gate = h.gate + t, bias = f.ape + p % HCA_RATIO * c + channels.from;
        }
        if (n == CHANNEL_BLOCK)
            for (int64_t v = 0; v < VECTORS; ++v)
                pool.take(v, u + 16 * v, gate + 16 * v, bias == nullptr ? nullptr : bias + 16 * v, 16, Whole());
        else
            for (int64_t v = 0; 16 * v < n; ++v)
                pool.take(v, u + 16 * v, gate + 16 * v, bias == nullptr ? nullptr : bias + 16 * v, n - 16 * v, Part());
    }
    if (!writes) return;
    float* out = pooled + nth * c + channels.from;
    for (int64_t v = 0; 16 * v < n; ++v) store_n(out + 16 * v, div(pool.weighted[v], pool.sum[v]), n - 16 * v);
}

// The rows after folded(s), for later steps; when every window has read what an earlier step left there.
void hca_keep(const Step& step, const Hca& h, const Finish& f, int64_t s) {
    const int64_t c = f.row.dim, start = step.starts[s], end = step.end(s), folded = h.folded(step, s);
    float* pending = h.pending + step.slots[s] * h.max_draft * 2 * c;
    for (int64_t p = folded > start ? folded : start; p < end; ++p) {
        float* row = pending + p % h.max_draft * 2 * c;
        const int64_t t = (step.offsets[s] + p - start) * c;
        const float* bias = f.ape + p % HCA_RATIO * c;
        std::memcpy(row, h.u + t, size_t(c) * 4);
        for (int64_t i = 0; i < c; i += 16)
            store_n(row + c + i, add(load_n(h.gate + t + i, c - i), load_n(bias + i, c - i)), c - i);
    }
}

// Sequence and number of the n-th entry that the step writes.
BT void find_written(const Step& step, int64_t ratio, int64_t n, int64_t* s, int64_t* entry) {
    for (*s = 0; n >= step.num_written(*s, ratio); ++*s) n -= step.num_written(*s, ratio);
    *entry = step.first_written(*s, ratio) + n;
}

// The entries that the first ``num_sequences`` sequences write.
BT int64_t count_written(const Step& step, int64_t ratio, int64_t num_sequences) {
    int64_t n = 0;
    for (int64_t s = 0; s < num_sequences; ++s) n += step.num_written(s, ratio);
    return n;
}

}  // namespace

// u, gate [T, 2c]; state [slots, ring, 2, 2c].
BITTRUE_EXPORT(csa_compress)(const Step* step, const Finish* f, const float* u, const float* gate, float* state,
                             int64_t ring, uint8_t* pages, int64_t per_page) {
    const int64_t c = f->row.dim, written = count_written(*step, CSA_RATIO, step->num_sequences);
    const Csa csa{u, gate, state, ring, 2 * c};
    const Pages out{pages, per_page, f->row.bytes()};
    PARALLEL_FOR(n, written, written * c * 40) {
        int64_t s, entry;
        find_written(*step, CSA_RATIO, n, &s, &entry);
        float* pooled = pooled_scratch.get<float>(c);
        csa_pool(*step, csa, f->ape, s, entry, pooled);
        finish(pooled, *f, CSA_RATIO * entry, out.entry(*step, s, entry));
    };
    PARALLEL_FOR(s, step->num_sequences, step->num_tokens * c) { csa_keep(*step, csa, f->ape, s); };
}
BITTRUE_REPLAYABLE(csa_compress)

// u, gate [T, c]; fold [slots, 3, c]; pending [slots, max draft, 2, c].
BITTRUE_EXPORT(hca_compress)(const Step* step, const Finish* f, const float* u, const float* gate, float* fold,
                             float* pending, int64_t max_draft, uint8_t* pages, int64_t per_page) {
    const int64_t c = f->row.dim, written = count_written(*step, HCA_RATIO, step->num_sequences);
    const int64_t blocks = (c + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK;
    const Hca hca{u, gate, fold, pending, max_draft};
    const Pages out{pages, per_page, f->row.bytes()};
    float* pooled = pooled_scratch.get<float>(written * c);
    int64_t windows = 1;  // that any sequence meets in this step
    for (int64_t s = 0; s < step->num_sequences; ++s) {
        const int64_t met = step->end(s) / HCA_RATIO - step->folds[s] / HCA_RATIO + 1;
        windows = met > windows ? met : windows;
    }
    PARALLEL_FOR(unit, step->num_sequences * windows * blocks, step->num_tokens * c * 10) {
        const int64_t s = unit / blocks / windows, nth = unit / blocks % windows, from = unit % blocks * CHANNEL_BLOCK;
        if (step->length(s) == 0) return;
        const Channels channels{from, c - from < CHANNEL_BLOCK ? c - from : CHANNEL_BLOCK};
        float* own = pooled + count_written(*step, HCA_RATIO, s) * c;
        const int64_t first = step->folds[s] / HCA_RATIO, last = hca.folded(*step, s) / HCA_RATIO;
        const auto fold = [&](int64_t w) { hca_window(*step, hca, *f, s, w, channels, own); };
        // The first reads the state that the last writes: one thread, in this order.
        if (nth == 0) fold(first);
        if (nth == 0 && last != first) fold(last);
        if (nth > 0 && first + nth != last && first + nth <= step->end(s) / HCA_RATIO) fold(first + nth);
    };
    if (max_draft > 0)
        PARALLEL_FOR(s, step->num_sequences, step->num_tokens * c) { hca_keep(*step, hca, *f, s); };
    PARALLEL_FOR(n, written, written * c * 20) {
        int64_t s, entry;
        find_written(*step, HCA_RATIO, n, &s, &entry);
        finish(pooled + n * c, *f, HCA_RATIO * entry, out.entry(*step, s, entry));
    };
}
BITTRUE_REPLAYABLE(hca_compress)
