// The team of threads that kernels share: fork and join in under a microsecond, and no wait for a thread that sleeps.
//
// A loop is published as a counter of unclaimed iterations. The caller works too and waits only for ranges that others have
// claimed: a worker that is asleep or was descheduled costs nothing, it merely finds less to do. Workers spin for a while
// after a loop (the next one of a step follows within microseconds), then sleep. OpenMP's regions wait for every thread at
// both ends: with spinning they ruin a shared machine, without it each costs a system call.
#include "team.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BITTRUE_C extern "C" __attribute__((visibility("default")))

namespace {

using Body = void (*)(const void*, int64_t, int64_t);
constexpr auto SPIN = std::chrono::microseconds(50);

// Plain globals, never destroyed: workers live until the process ends.
struct Loop {
    alignas(64) std::atomic<uint32_t> open{0};   // number of the loop at hand, 0 between loops
    alignas(64) std::atomic<int64_t> next{0};    // first unclaimed iteration
    alignas(64) std::atomic<int64_t> inside{0};  // workers that may be reading the fields below
    alignas(64) int64_t n, grain;
    Body body;
    const void* context;
    int64_t helpers;  // workers that may join: the team may be larger than the threads asked for
};

Loop loop;
std::atomic<uint32_t> bell{0};        // changes with every loop; workers sleep on it
std::atomic<int64_t> sleepers{0};
std::atomic<int64_t> wanted{0};       // 0: as many as this process may run on
std::mutex busy;                      // held by the caller whose loop is open
int64_t num_workers = 0;              // guarded by busy
int64_t most_workers = INT64_MAX;     // guarded by busy; as many as there are, once the system refused one
uint32_t last_number = 0;             // guarded by busy
thread_local bool is_sharing = false; // this thread is inside a loop: a loop within it is not shared again

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

int64_t processors() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    const int64_t told = std::thread::hardware_concurrency();  // 0: it cannot tell
    return told > 0 ? told : 1;
}

void claim_ranges() {
    for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
        if (begin >= loop.n) return;
        loop.body(loop.context, begin, begin + loop.grain < loop.n ? begin + loop.grain : loop.n);
    }
}

void work(int64_t index) {
    uint32_t done = 0;
    auto idle_since = std::chrono::steady_clock::now();
    for (int64_t round = 1;; ++round) {
        const uint32_t number = loop.open.load(std::memory_order_acquire);
        if (number != 0 && number != done) {
            // Announced first, then asked again: either the caller sees this worker inside, or the loop is seen closed.
            loop.inside.fetch_add(1);
            if (loop.open.load() == number) {
                is_sharing = true;
                if (index < loop.helpers) claim_ranges();
                is_sharing = false;
                done = number;
            }
            loop.inside.fetch_sub(1, std::memory_order_release);
            idle_since = std::chrono::steady_clock::now();
            continue;
        }
        relax();
        if (round % 64 != 0 || std::chrono::steady_clock::now() - idle_since < SPIN) continue;
        const uint32_t heard = bell.load();
        sleepers.fetch_add(1);
        const uint32_t still = loop.open.load();
        if (still == 0 || still == done) bell.wait(heard);
        sleepers.fetch_sub(1);
        idle_since = std::chrono::steady_clock::now();
    }
}

// A forked child has the memory of the team, but not its threads.
void forget_workers() {
    new (&busy) std::mutex;
    num_workers = 0;
    most_workers = INT64_MAX;
    loop.open.store(0);
    loop.inside.store(0);
    sleepers.store(0);
}

// Fewer than `count` where the system gives no more threads (limits of memory or processes): a loop is whole with any number.
void hire(int64_t count) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_workers); });
    try {
        for (; num_workers < count && num_workers < most_workers; ++num_workers) std::thread(work, num_workers).detach();
    } catch (const std::system_error&) {
        most_workers = num_workers;
    }
}

}  // namespace

BITTRUE_C int64_t bittrue_threads() {
    const int64_t n = wanted.load(std::memory_order_relaxed);
    if (n > 0) return n;
    static const int64_t all = processors();
    return all;
}

BITTRUE_C void bittrue_set_threads(int64_t n) { wanted.store(n, std::memory_order_relaxed); }

extern "C" void bittrue_run_ranges(int64_t n, int64_t grain, Body body, const void* context) {
    // Another Python thread's loop is open: this one is run by its caller alone.
    const int64_t helpers = bittrue_threads() - 1;
    if (is_sharing || helpers < 1 || !busy.try_lock()) return body(context, 0, n);
    is_sharing = true;
    hire(helpers);
    loop.n = n, loop.grain = grain, loop.body = body, loop.context = context, loop.helpers = helpers;
    loop.next.store(0, std::memory_order_relaxed);
    if (++last_number == 0) last_number = 1;
    loop.open.store(last_number);
    bell.fetch_add(1);
    if (sleepers.load() != 0) bell.notify_all();
    claim_ranges();
    loop.open.store(0);
    while (loop.inside.load() != 0) relax();
    is_sharing = false;
    busy.unlock();
}
