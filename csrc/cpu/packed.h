// What the three packed formats share: checks of arguments, and threads for rows.
#pragma once

#include <string.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "half.h"
#include "isa.h"
#include "sparc3/sparc3.h"
#include "threads.h"

namespace sparc3 {

inline bool is_dtype(int dtype) { return dtype >= SPARC3_FP32 && dtype <= SPARC3_FP16; }
inline size_t size_of(int dtype) { return dtype == SPARC3_FP32 ? 4 : 2; }
inline size_t aligned(size_t size) { return (size + 63) / 64 * 64; }

// Whether rows * columns elements of any format have sizes that a size_t holds.
inline bool countable(size_t rows, size_t columns) {
    constexpr size_t kMost = size_t{1} << (8 * sizeof(size_t) - 8);
    return columns < kMost && rows < kMost && (columns == 0 || rows <= kMost / columns);
}

inline bool overlap(const void *a, size_t size_a, const void *b, size_t size_b) {
    const char *x = static_cast<const char *>(a), *y = static_cast<const char *>(b);
    return size_a && size_b && x < y + size_b && y < x + size_a;
}

// Below about 0.1 ms of work a second thread does not pay.
inline int threads_for_weights(size_t weights, int threads) {
    return weights < (size_t{1} << 20) ? 1 : available_threads(threads);
}

// An address that may be wrong: to be fetched ahead, not read.
inline const char *unchecked(const void *from, int64_t elements, size_t size) {
    return reinterpret_cast<const char *>(reinterpret_cast<uintptr_t>(from) + static_cast<size_t>(elements) * size);
}

// A row given by mask bits, or what is left of it; null values where the weight is corrupt.
struct PackedRow {
    const uint8_t *mask = nullptr;
    const void *values = nullptr, *end = nullptr;

    size_t size() const {
        return static_cast<size_t>(static_cast<const char *>(end) - static_cast<const char *>(values));
    }
};

// Rows dealt out to threads; body(r) returns false where the weight is corrupt.
template <class Body>
int each_row(size_t rows, size_t columns, int wanted, const Body &body) {
    const int threads = threads_for_weights(rows * columns, wanted), parts = parts_for(threads);
    std::atomic<bool> sound{true};
    parallel(threads, parts, [&](int, int part) {
        const Slice mine = slice(rows, 1, parts, part);
        for (size_t r = mine.begin; r < mine.begin + mine.size; ++r)
            if (!body(r)) return sound.store(false, std::memory_order_relaxed);
    });
    return sound ? SPARC3_OK : SPARC3_ERROR_FORMAT;
}

}  // namespace sparc3
