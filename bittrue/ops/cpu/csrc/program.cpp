// Runs a captured step: a list of kernel calls with their arguments, one after the other, without Python between them.
#include <chrono>
#include <cstdint>

#define BITTRUE_C extern "C" __attribute__((visibility("default")))

// program: for each call the address of a <kernel>_replay function, the number of its slots, and the slots.
BITTRUE_C void bittrue_run_program(const uint64_t* program, int64_t num_calls) {
    for (int64_t i = 0; i < num_calls; ++i) {
        reinterpret_cast<void (*)(const uint64_t*)>(program[0])(program + 2);
        program += 2 + program[1];
    }
}

// The same, and the nanoseconds of every call.
BITTRUE_C void bittrue_time_program(const uint64_t* program, int64_t num_calls, int64_t* nanoseconds) {
    using Clock = std::chrono::steady_clock;
    for (int64_t i = 0; i < num_calls; ++i) {
        const auto start = Clock::now();
        reinterpret_cast<void (*)(const uint64_t*)>(program[0])(program + 2);
        nanoseconds[i] = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
        program += 2 + program[1];
    }
}
