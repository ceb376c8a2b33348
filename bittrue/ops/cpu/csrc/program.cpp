// Runs a captured step: a list of kernel calls with their arguments, one after the other, without Python between them.
#include <cstdint>

// program: for each call the address of a <kernel>_replay function, the number of its slots, and the slots.
extern "C" __attribute__((visibility("default"))) void bittrue_run_program(const uint64_t* program, int64_t num_calls) {
    for (int64_t i = 0; i < num_calls; ++i) {
        const auto kernel = reinterpret_cast<void (*)(const uint64_t*)>(program[0]);
        kernel(program + 2);
        program += 2 + program[1];
    }
}
