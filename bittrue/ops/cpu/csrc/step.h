// Where the tokens of a step and their cache rows stand: the C side of Batch (ops/contracts.py).
#pragma once

#include "rowops.h"

namespace {

// Laid out as StepArgs in ops/cpu/cache.py.
struct Step {
    int64_t num_tokens, num_sequences, table_width;
    const int32_t *positions, *seq_ids, *offsets, *starts, *folds, *slots, *page_table, *kept;

    BT int64_t length(int64_t s) const { return offsets[s + 1] - offsets[s]; }
    BT int64_t end(int64_t s) const { return starts[s] + length(s); }
    // Entries that close on a token of sequence s and are written: first_written(s)..end(s) / ratio - 1. Those before stand.
    BT int64_t first_written(int64_t s, int64_t ratio) const {
        const int64_t from = kept[s] > starts[s] ? kept[s] : starts[s];
        return (from < end(s) ? from : end(s)) / ratio;
    }
    BT int64_t num_written(int64_t s, int64_t ratio) const { return end(s) / ratio - first_written(s, ratio); }
};

// Compressed entries of one layer: entry e of a sequence lies in page page_table[e / per_page] at e % per_page.
struct Pages {
    uint8_t* data;
    int64_t per_page, row_bytes;

    BT uint8_t* entry(const Step& step, int64_t s, int64_t e) const {
        int64_t page = step.page_table[s * step.table_width + e / per_page];
        return data + (page * per_page + e % per_page) * row_bytes;
    }
};

BT int64_t pad16(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace
