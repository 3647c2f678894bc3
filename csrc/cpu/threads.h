// Threads for the length of one call: those of the process's OpenMP pool where it has one, else new ones. A new one
// takes some 20 us to start, and shares its core with an idle thread of the pool that still spins; so callers ask for
// one thread below about 0.2 ms of work. Work is dealt out in small parts, as not every thread has a core to itself.
#pragma once

#include <stddef.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

#ifdef __ELF__
// libgomp's, whose interface GCC and LLVM keep: null unless the process has loaded it, as it has with torch.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*function)(void *), void *data, unsigned threads,
                                                    unsigned flags);
#endif

namespace sparc3 {

constexpr int kMaxThreads = 64;

inline int available_threads(int threads) {
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    return std::clamp(threads, 1, kMaxThreads);
}

inline int parts_for(int threads) { return threads == 1 ? 1 : 4 * threads; }
constexpr int kMaxParts = 4 * kMaxThreads;

// Call body(thread, part) once for each part, on up to `threads` threads; body must not throw.
template <class Body>
void parallel(int threads, int parts, const Body &body) {
    std::atomic<int> next{0}, started{0};
    auto work = [&] {
        const int thread = started.fetch_add(1, std::memory_order_relaxed);
        for (int part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) body(thread, part);
    };
    if (threads == 1) return work();
#ifdef __ELF__
    if (GOMP_parallel)
        return GOMP_parallel([](void *data) { (*static_cast<decltype(work) *>(data))(); }, &work,
                             static_cast<unsigned>(threads), 0);
#endif
    std::thread others[kMaxThreads];
    int begun = 1;
    try {
        for (; begun < threads; ++begun) others[begun] = std::thread(work);
    } catch (const std::system_error &) {  // no more threads to be had: the others do the work
    }
    work();
    for (int t = 1; t < begun; ++t) others[t].join();
}

// Part `part` of `parts` of [0, n) cut at multiples of `step`: first index and length.
struct Slice {
    size_t begin, size;
};

inline Slice slice(size_t n, size_t step, int parts, int part) {
    const size_t steps = (n + step - 1) / step, p = static_cast<size_t>(part), of = static_cast<size_t>(parts);
    const size_t begin = std::min(n, steps * p / of * step);
    const size_t end = std::min(n, steps * (p + 1) / of * step);
    return {begin, end - begin};
}

}  // namespace sparc3
