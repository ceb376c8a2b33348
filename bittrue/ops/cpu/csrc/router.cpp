// route_topk and route_hash: scores of all experts, the chosen ids, and their weights.
#include "simd.h"

namespace {

thread_local Scratch score_scratch;

BT void scores_of(const float* logits, int64_t experts, float* scores) {
    for (int64_t e = 0; e < experts; e += 16)
        store_n(scores + e, sqrt(softplus(load_n(logits + e, experts - e))), experts - e);
}

// weights[j] = score of ids[j] over their sum in the order given, times scale.
BT void weights_of(const float* scores, const int32_t* ids, int64_t k, float scale, float* weights) {
    float total = 1e-20f;  // no NaN where every chosen score is zero; changes no bit of any other sum
    for (int64_t j = 0; j < k; ++j) total = total + scores[ids[j]];
    for (int64_t j = 0; j < k; ++j) weights[j] = scores[ids[j]] / total * scale;
}

// The k largest by (value descending, id ascending), as ascending ids: a sorted list of the best so far.
BT void choose(const float* values, int64_t experts, int64_t k, int32_t* ids) {
    int64_t kept = 0;
    const auto insert = [&](int64_t e) {
        if (kept == k && !(values[e] > values[ids[k - 1]])) return;
        int64_t j = kept < k ? kept++ : k - 1;
        for (; j > 0 && values[e] > values[ids[j - 1]]; --j) ids[j] = ids[j - 1];
        ids[j] = int32_t(e);
    };
    int64_t e = 0;
    for (; e < k; ++e) insert(e);
    for (; e + 16 <= experts; e += 16) {
        // Of sixteen values most are below the smallest kept; the others are looked at in order.
        uint32_t larger = to_bits(less(set1(values[ids[k - 1]]), load(values + e)));
        for (; larger != 0; larger &= larger - 1) insert(e + __builtin_ctz(larger));
    }
    for (; e < experts; ++e) insert(e);
    for (int64_t i = 1; i < k; ++i) {
        int32_t id = ids[i];
        int64_t j = i;
        for (; j > 0 && ids[j - 1] > id; --j) ids[j] = ids[j - 1];
        ids[j] = id;
    }
}

// table [k] names experts of one token: their ids and weights; only their scores are formed. False: not all are experts.
bool route_by_table(const float* logits, const int64_t* chosen, int64_t experts, int64_t k, float scale, int32_t* ids,
                    float* weights) {
    for (int64_t j = 0; j < k; ++j)
        if (chosen[j] < 0 || chosen[j] >= experts) return false;
    for (int64_t j = 0; j < k; ++j) ids[j] = int32_t(chosen[j]), weights[j] = logits[chosen[j]];
    scores_of(weights, k, weights);
    float total = 1e-20f;  // as in weights_of
    for (int64_t j = 0; j < k; ++j) total = total + weights[j];
    for (int64_t j = 0; j < k; ++j) weights[j] = weights[j] / total * scale;
    return true;
}

}  // namespace

// logits [tokens, experts], bias [experts] or null -> ids, weights [tokens, k]; k <= experts.
BITTRUE_EXPORT(route_topk)(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t k,
                           float scale, int32_t* ids, float* weights) {
    PARALLEL_FOR(t, tokens, tokens * experts * 4) {
        float* scores = score_scratch.get<float>(2 * experts);
        float* ranked = scores + experts;
        scores_of(logits + t * experts, experts, scores);
        for (int64_t e = 0; bias != nullptr && e < experts; e += 16)
            store_n(ranked + e, add(load_n(scores + e, experts - e), load_n(bias + e, experts - e)), experts - e);
        choose(bias != nullptr ? ranked : scores, experts, k, ids + t * k);
        weights_of(scores, ids + t * k, k, scale, weights + t * k);
    };
}
BITTRUE_REPLAYABLE(route_topk)

// logits [tokens, experts], token_ids [tokens], table [vocab, k] -> ids, weights [tokens, k]; ids 0 and weights NaN where the
// token is not in the table or the table names no expert.
BITTRUE_EXPORT(route_hash)(const float* logits, const int64_t* token_ids, const int64_t* table, int64_t vocab, int64_t tokens,
                           int64_t experts, int64_t k, float scale, int32_t* ids, float* weights) {
    PARALLEL_FOR(t, tokens, tokens * k * 16) {
        const int64_t id = token_ids[t];
        if (0 <= id && id < vocab &&
            route_by_table(logits + t * experts, table + id * k, experts, k, scale, ids + t * k, weights + t * k))
            return;
        for (int64_t j = 0; j < k; ++j) ids[t * k + j] = 0, weights[t * k + j] = __builtin_nanf("");
    };
}
BITTRUE_REPLAYABLE(route_hash)
