// What the three packed formats share: products of rows, however the mask of a row comes about, and the threads for it.
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

inline void write(int dtype, float value, void *y, size_t i) {
    if (dtype == SPARC3_FP32)
        static_cast<float *>(y)[i] = value;
    else if (dtype == SPARC3_BF16)
        from_float(value, static_cast<BFloat16 *>(y) + i);
    else
        from_float(value, static_cast<Float16 *>(y) + i);
}

inline float read(int dtype, const void *x, size_t i) {
    if (dtype == SPARC3_FP32) return static_cast<const float *>(x)[i];
    if (dtype == SPARC3_BF16) return to_float(static_cast<const BFloat16 *>(x)[i]);
    return to_float(static_cast<const Float16 *>(x)[i]);
}

// A row of a packed weight; null values where the weight is corrupt.
struct PackedRow {
    const uint8_t *mask = nullptr;
    const void *values = nullptr;
};

// Memory of a thread, out of the caller's workspace.
struct Scratch {
    uint8_t *mask;   // bits of a row, for formats that have none
    char *values;    // of a row that ends too close to the end of the buffer to be read beyond it
    char *dense;     // a strip of prepared rows
};

struct LinearPlan {
    // Vectors stream past a strip of rows: the more rows, the less often; it should fit the level-2 cache.
    static constexpr size_t kStripBytes = 512 << 10, kMostRows = 16;

    size_t padded, strip, mask_size, values_size, dense_size, prepared_size;
    int threads;

    LinearPlan(size_t rows, size_t columns, size_t batch, int wanted)
        : padded(words_of(columns) * kWord),
          strip(std::clamp(kStripBytes / (padded * sizeof(float) + 1) / kTileRows * kTileRows, size_t{kTileRows},
                           kMostRows)),
          mask_size(aligned(padded / 8 + 64)),
          values_size(aligned(padded * sizeof(float) + kOverread)),
          dense_size(batch > kFusedBatch ? aligned(strip * padded * sizeof(float)) : 0),
          // CSR takes vectors in strips of kLanes16, and a column more.
          prepared_size(aligned((batch == 1 ? 1 : (batch + kLanes16 - 1) / kLanes16 * kLanes16) * (padded + 1) *
                                sizeof(float))),
          threads(threads_for_weights(rows * columns, wanted)) {}

    size_t thread_size() const { return mask_size + values_size + dense_size; }
    size_t workspace() const { return 64 + prepared_size + thread_size() * static_cast<size_t>(threads); }
};

inline int check_linear(int dtype, size_t rows, size_t columns, const void *x, size_t batch, const void *bias,
                        const void *y, int threads, const void *workspace, size_t workspace_size) {
    if (!y || !workspace || (columns && !x) || !countable(batch, columns) || !countable(batch, rows))
        return SPARC3_ERROR_ARGUMENT;
    if (workspace_size < LinearPlan(rows, columns, batch, threads).workspace()) return SPARC3_ERROR_WORKSPACE;
    const size_t size = size_of(dtype), out = batch * rows * size;
    const bool overlaps = overlap(y, out, x, batch * columns * size) || (bias && overlap(y, out, bias, rows * size)) ||
                          overlap(y, out, workspace, workspace_size) ||
                          overlap(x, batch * columns * size, workspace, workspace_size);
    return overlaps ? SPARC3_ERROR_OVERLAP : SPARC3_OK;
}

// Y [batch, rows] = X [batch, columns] W^T + bias; `row(r, scratch)` gives row r of W.
template <class Row>
int multiply(int dtype, size_t rows, size_t columns, const void *x, size_t batch, const void *bias, void *y,
             int wanted, void *workspace, const Row &row) {
    const PackedKernels &isa = packed_kernels();
    const LinearPlan plan(rows, columns, batch, wanted);
    char *memory = reinterpret_cast<char *>(aligned(reinterpret_cast<uintptr_t>(workspace)));
    const size_t element = isa.prepared_element(dtype), words = words_of(columns);
    char *prepared = memory;
    for (size_t b = 0; b < batch; ++b)
        isa.prepare(dtype, static_cast<const char *>(x) + b * columns * size_of(dtype), columns,
                    prepared + b * plan.padded * element);
    std::atomic<bool> sound{true};
    parallel(plan.threads, parts_for(plan.threads), [&](int thread, int part) {
        const Slice mine = slice(rows, plan.strip, parts_for(plan.threads), part);
        char *own = memory + plan.prepared_size + plan.thread_size() * static_cast<size_t>(thread);
        const Scratch scratch{reinterpret_cast<uint8_t *>(own), own + plan.mask_size,
                              own + plan.mask_size + plan.values_size};
        const auto finish = [&](size_t r, size_t b, float sum) {
            write(dtype, bias ? sum + read(dtype, bias, r) : sum, y, b * rows + r);
        };
        if (batch <= kFusedBatch) {
            float sums[kFusedBatch];
            for (size_t r = mine.begin; r < mine.begin + mine.size; ++r) {
                const PackedRow packed = row(r, scratch);
                if (!packed.values) return sound.store(false, std::memory_order_relaxed);
                isa.dot(dtype, packed.mask, words, packed.values, prepared, plan.padded, static_cast<int>(batch),
                        sums);
                for (size_t b = 0; b < batch; ++b) finish(r, b, sums[b]);
            }
            return;
        }
        float sums[kTileRows * 16];
        const size_t row_size = plan.padded * element, step = static_cast<size_t>(isa.tile_batch);
        for (size_t r = mine.begin; r < mine.begin + mine.size; r += plan.strip) {
            const size_t height = std::min(plan.strip, mine.begin + mine.size - r);
            for (size_t i = 0; i < height; ++i) {
                const PackedRow packed = row(r + i, scratch);
                if (!packed.values) return sound.store(false, std::memory_order_relaxed);
                isa.expand(dtype, packed.mask, words, packed.values, scratch.dense + i * row_size);
            }
            // A tile is whole: the rows that it has too many are zeros.
            const size_t whole = (height + kTileRows - 1) / kTileRows * kTileRows;
            memset(scratch.dense + height * row_size, 0, (whole - height) * row_size);
            for (size_t b = 0; b < batch; b += step) {
                const size_t width = std::min(step, batch - b);
                for (size_t t = 0; t < height; t += kTileRows) {
                    isa.tile(dtype, scratch.dense + t * row_size, prepared + b * row_size, plan.padded,
                             static_cast<int>(width), sums);
                    for (size_t i = 0; i < std::min<size_t>(kTileRows, height - t); ++i)
                        for (size_t j = 0; j < width; ++j) finish(r + t + i, b + j, sums[i * width + j]);
                }
            }
        }
    });
    return sound ? SPARC3_OK : SPARC3_ERROR_FORMAT;
}

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
