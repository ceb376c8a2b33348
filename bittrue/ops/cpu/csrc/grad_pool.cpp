// The pooling of whole documents into compressed entries, and its backward: one task an entry, each writes what no other does.
#include "simd.h"

namespace {

constexpr int64_t CSA_RATIO = 4, HCA_RATIO = 128;

// Where an entry's tokens stand.
struct Entry {
    int64_t row;      // its own first token
    int64_t has_before;  // the four tokens before are of the same document
};

thread_local Scratch entry_scratch;

// The entries of all documents; offsets [documents + 1].
int64_t find_entries(const int32_t* offsets, int64_t documents, int64_t ratio, Entry*& entries) {
    entries = entry_scratch.get<Entry>(offsets[documents] / ratio + 1);
    int64_t num = 0;
    for (int64_t s = 0; s < documents; ++s)
        for (int64_t row = offsets[s]; row + ratio <= offsets[s + 1]; row += ratio)
            entries[num++] = {row, row > offsets[s]};
    return num;
}

// How the channels of a row are read and written: whole vectors need no mask.
struct Whole {
    BT f32x16 get(const float* p) const { return load(p); }
    BT void put(float* p, f32x16 v) const { store(p, v); }
};
struct Part {
    int64_t n;
    BT f32x16 get(const float* p) const { return load_n(p, n); }
    BT void put(float* p, f32x16 v) const { store_n(p, v, n); }
};
template <class Body> BT void for_channels(int64_t c, const Body& body) {
    int64_t i = 0;
    for (; i + 16 <= c; i += 16) body(i, Whole());
    if (i < c) body(i, Part{c - i});
}

// ---- CSA: the slots of an entry by their offsets in u and gate, half A of the four tokens before, then half B of its own

BT int64_t csa_slots(const Entry& entry, int64_t c, int64_t* slots) {
    int64_t num = 0;
    for (int64_t j = entry.has_before ? -CSA_RATIO : 0; j < CSA_RATIO; ++j)
        slots[num++] = (entry.row + j) * 2 * c + (j < 0 ? 0 : c);
    return num;
}

// The exponentials of the gates at channel i against the largest, and their sum: the arithmetic of csa_compress.
template <class Io> BT f32x16 csa_exponentials(const float* gate, const int64_t* slots, int64_t num, const Io& io, f32x16* e) {
    f32x16 top = e[0] = io.get(gate + slots[0]), total = zero();
    for (int64_t j = 1; j < num; ++j) {
        e[j] = io.get(gate + slots[j]);
        top = max(top, e[j]);
    }
    for (int64_t j = 0; j < num; ++j) {
        e[j] = exp(sub(e[j], top));
        total = add(total, e[j]);
    }
    return total;
}

template <class Io> BT f32x16 csa_weighted(const float* u, const int64_t* slots, int64_t num, const Io& io, const f32x16* e) {
    f32x16 weighted = zero();
    for (int64_t j = 0; j < num; ++j) weighted = fma(e[j], io.get(u + slots[j]), weighted);
    return weighted;
}

void csa_pool(const float* u, const float* gate, const Entry& entry, int64_t c, float* pooled) {
    int64_t slots[2 * CSA_RATIO];
    const int64_t num = csa_slots(entry, c, slots);
    for_channels(c, [&](int64_t i, auto io) __attribute__((always_inline)) {
        f32x16 e[2 * CSA_RATIO];
        const f32x16 total = csa_exponentials(gate + i, slots, num, io, e);
        io.put(pooled + i, div(csa_weighted(u + i, slots, num, io, e), total));
    });
}

void csa_pool_backward(const float* d_pooled, const float* u, const float* gate, const Entry& entry, int64_t c, float* d_u,
                       float* d_gate) {
    int64_t slots[2 * CSA_RATIO];
    const int64_t num = csa_slots(entry, c, slots);
    for_channels(c, [&](int64_t i, auto io) __attribute__((always_inline)) {
        f32x16 e[2 * CSA_RATIO];
        const f32x16 total = csa_exponentials(gate + i, slots, num, io, e);
        const f32x16 pooled = div(csa_weighted(u + i, slots, num, io, e), total);
        const f32x16 d = div(io.get(d_pooled + i), total);
        for (int64_t j = 0; j < num; ++j) {
            const f32x16 d_value = mul(e[j], d);
            io.put(d_gate + slots[j] + i, mul(d_value, sub(io.get(u + slots[j] + i), pooled)));
            io.put(d_u + slots[j] + i, d_value);
        }
    });
}

// ---- HCA: the entry's own tokens

// The arithmetic of hca_compress: a running largest gate, with the sums rescaled to it.
template <class Io> BT void hca_fold(const float* u, const float* gate, int64_t c, const Io& io, f32x16& top, f32x16& total, f32x16& weighted) {
    top = set1(-__builtin_inff()), total = zero(), weighted = zero();
    for (int64_t j = 0; j < HCA_RATIO; ++j) {
        const f32x16 g = io.get(gate + j * c);
        const mask16 higher = less(top, g);
        const f32x16 highest = select(higher, g, top);
        const f32x16 d = exp(sub(select(higher, top, g), highest));
        const f32x16 keep = select(higher, d, set1(1.0f)), e = select(higher, set1(1.0f), d);
        total = fma(total, keep, e);
        weighted = fma(weighted, keep, mul(e, io.get(u + j * c)));
        top = highest;
    }
}

void hca_pool(const float* u, const float* gate, const Entry& entry, int64_t c, float* pooled) {
    const int64_t row = entry.row * c;
    for_channels(c, [&](int64_t i, auto io) __attribute__((always_inline)) {
        f32x16 top, total, weighted;
        hca_fold(u + row + i, gate + row + i, c, io, top, total, weighted);
        io.put(pooled + i, div(weighted, total));
    });
}

void hca_pool_backward(const float* d_pooled, const float* u, const float* gate, const Entry& entry, int64_t c, float* d_u,
                       float* d_gate) {
    const int64_t row = entry.row * c;
    for_channels(c, [&](int64_t i, auto io) __attribute__((always_inline)) {
        const float *values = u + row + i, *gates = gate + row + i;
        f32x16 e[HCA_RATIO], top = io.get(gates), total = zero(), weighted = zero();
        for (int64_t j = 1; j < HCA_RATIO; ++j) top = max(top, io.get(gates + j * c));
        for (int64_t j = 0; j < HCA_RATIO; ++j) {
            e[j] = exp(sub(io.get(gates + j * c), top));
            total = add(total, e[j]);
            weighted = fma(e[j], io.get(values + j * c), weighted);
        }
        const f32x16 pooled = div(weighted, total), d = div(io.get(d_pooled + i), total);
        for (int64_t j = 0; j < HCA_RATIO; ++j) {
            const f32x16 d_value = mul(e[j], d);
            io.put(d_gate + row + i + j * c, mul(d_value, sub(io.get(values + j * c), pooled)));
            io.put(d_u + row + i + j * c, d_value);
        }
    });
}

// Channels from..from + n of rows first..end, width wide.
void clear(float* x, int64_t first, int64_t end, int64_t width, int64_t from, int64_t n) {
    for (int64_t row = first; row < end; ++row) std::memset(x + row * width + from, 0, size_t(n) * 4);
}

// What no entry pools: the tokens after the last whole entry, and for CSA half A of the last entry's own four.
void clear_rest(float* x, int64_t first, int64_t end, int64_t width, int64_t ratio) {
    const int64_t rest = first + (end - first) / ratio * ratio;
    if (ratio == HCA_RATIO) return clear(x, rest, end, width, 0, width);
    clear(x, rest > first ? rest - CSA_RATIO : first, end, width, 0, width / 2);
    clear(x, rest, end, width, width / 2, width / 2);
}

}  // namespace

// u, gate [tokens, width], offsets [documents + 1] -> pooled [entries, c]; c = width / 2 for ratio 4, width for ratio 128.
BITTRUE_EXPORT(grad_pool)(const float* u, const float* gate, const int32_t* offsets, int64_t documents, int64_t width,
                          int64_t ratio, float* pooled) {
    Entry* entries;
    const int64_t num = find_entries(offsets, documents, ratio, entries), c = ratio == CSA_RATIO ? width / 2 : width;
    PARALLEL_FOR(i, num, num * ratio * width * 2) {
        if (ratio == CSA_RATIO) csa_pool(u, gate, entries[i], c, pooled + i * c);
        else hca_pool(u, gate, entries[i], c, pooled + i * c);
    };
}

// The same with d_pooled [entries, c] -> d_u, d_gate [tokens, width], all of which is written.
BITTRUE_EXPORT(grad_pool_backward)(const float* d_pooled, const float* u, const float* gate, const int32_t* offsets,
                                   int64_t documents, int64_t width, int64_t ratio, float* d_u, float* d_gate) {
    Entry* entries;
    const int64_t num = find_entries(offsets, documents, ratio, entries), c = ratio == CSA_RATIO ? width / 2 : width;
    PARALLEL_FOR(i, num, num * ratio * width * 4) {
        if (ratio == CSA_RATIO) csa_pool_backward(d_pooled + i * c, u, gate, entries[i], c, d_u, d_gate);
        else hca_pool_backward(d_pooled + i * c, u, gate, entries[i], c, d_u, d_gate);
    };
    for (int64_t s = 0; s < documents; ++s) {
        clear_rest(d_u, offsets[s], offsets[s + 1], width, ratio);
        clear_rest(d_gate, offsets[s], offsets[s + 1], width, ratio);
    }
}
