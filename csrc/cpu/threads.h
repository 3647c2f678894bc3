// Threads for the length of one call. Starting one takes some 20 us, so callers ask for one thread below about 0.2 ms
// of work; a pool would have to survive fork and would spin beside the caller's own.
#pragma once

#include <stddef.h>

#include <algorithm>
#include <system_error>
#include <thread>

namespace sparc3 {

constexpr int kMaxThreads = 64;

inline int available_threads(int threads) {
    if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
    return std::clamp(threads, 1, kMaxThreads);
}

// Run body(0) .. body(threads - 1), each on a thread of its own; body must not throw.
template <class Body>
void parallel(int threads, const Body &body) {
    std::thread others[kMaxThreads];
    for (int t = 1; t < threads; ++t) {
        try {
            others[t] = std::thread(body, t);
        } catch (const std::system_error &) {  // no more threads to be had: do the work here
            body(t);
        }
    }
    body(0);
    for (int t = 1; t < threads; ++t)
        if (others[t].joinable()) others[t].join();
}

// Part `t` of `parts` of [0, n) cut at multiples of `step`: first index and length.
struct Slice {
    size_t begin, size;
};

inline Slice slice(size_t n, size_t step, int parts, int t) {
    const size_t steps = (n + step - 1) / step;
    const size_t begin = std::min(n, steps * t / parts * step);
    const size_t end = std::min(n, steps * (t + 1) / parts * step);
    return {begin, end - begin};
}

}  // namespace sparc3
