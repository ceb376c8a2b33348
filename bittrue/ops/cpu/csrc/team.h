// Parallel loops over independent iterations. The team of threads is one for the process (team.cpp).
//
//   PARALLEL_FOR(i, n, work) { ... };        for (int64_t i = 0; i < n; ++i), `work` = scalar operations in all, about
//
// The body runs once for every i, on any thread and in any order: it must not depend on either. `return` ends an iteration.
#pragma once

#include <cstdint>

// Number of threads a kernel may use, the caller among them.
extern "C" int64_t bittrue_threads();
// Calls body(context, begin, end) over ranges that cover 0..n once, each of at most `grain` iterations.
extern "C" void bittrue_run_ranges(int64_t n, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context);

namespace {

constexpr int64_t WORTH_SHARING = 20000;  // scalar operations: some microseconds, a handful of what handing over costs

template <class Body> void run_range(const void* context, int64_t begin, int64_t end) {
    const Body& body = *static_cast<const Body*>(context);
    for (int64_t i = begin; i < end; ++i) body(i);
}

struct ParallelFor {
    int64_t n, work;

    template <class Body> void operator%(const Body& body) const {
        const int64_t threads = work > WORTH_SHARING && n > 1 ? bittrue_threads() : 1;
        if (threads == 1) return run_range<Body>(&body, 0, n);
        // Eight ranges a thread: who starts late or is interrupted leaves its share to the others.
        const int64_t grain = n / (threads * 8);
        bittrue_run_ranges(n, grain > 1 ? grain : 1, run_range<Body>, &body);
    }
};

}  // namespace

#define PARALLEL_FOR(i, n, work) ParallelFor{(n), (work)} % [&](int64_t i)
