// Writes the step's rows into the window rings, each at its position modulo the ring.
#include "step.h"

BITTRUE_EXPORT(store_window)(const Step* step, const uint8_t* rows, int64_t row_bytes, uint8_t* window, int64_t ring) {
    PARALLEL_FOR(s, step->num_sequences, step->num_tokens * row_bytes) {
        const int64_t length = step->length(s);
        uint8_t* own = window + step->slots[s] * ring * row_bytes;
        for (int64_t j = length > ring ? length - ring : 0; j < length; ++j)
            std::memcpy(own + (step->starts[s] + j) % ring * row_bytes, rows + (step->offsets[s] + j) * row_bytes,
                        size_t(row_bytes));
    };
}
BITTRUE_REPLAYABLE(store_window)
