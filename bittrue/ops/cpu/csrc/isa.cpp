// Which instruction sets this processor runs, and how many threads the kernels use; compiled once, for any processor.
#include <atomic>
#include <cstdint>

#include <omp.h>

#define BITTRUE_C extern "C" __attribute__((visibility("default")))

namespace {
std::atomic<int64_t> threads{0};  // 0: what OpenMP gives
}

// 0 portable, 1 avx2, 2 avx512.
BITTRUE_C int64_t bittrue_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    return 1;
#else
    return 0;
#endif
}

BITTRUE_C int64_t bittrue_threads() {
    int64_t n = threads.load(std::memory_order_relaxed);
    return n > 0 ? n : omp_get_max_threads();
}

BITTRUE_C void bittrue_set_threads(int64_t n) { threads.store(n, std::memory_order_relaxed); }
