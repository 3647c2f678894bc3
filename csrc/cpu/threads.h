// Threads for the length of one call. Starting one takes some 20 us, so callers ask for one thread below about 0.2 ms
// of work; a pool would have to survive fork. Work is dealt out in small parts, because the caller's own pool (OpenMP)
// may still be spinning on the other cores.
#pragma once

#include <stddef.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

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
    std::atomic<int> next{0};
    const auto work = [&](int thread) {
        for (int part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) body(thread, part);
    };
    std::thread others[kMaxThreads];
    int started = 1;
    try {
        for (; started < threads; ++started) others[started] = std::thread(work, started);
    } catch (const std::system_error &) {  // no more threads to be had: the others do the work
    }
    work(0);
    for (int t = 1; t < started; ++t) others[t].join();
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
