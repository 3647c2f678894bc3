// Y = X W^T + bias with a packed W, however a row of it is stored.
#pragma once

#include "packed.h"

namespace sparc3 {

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

// Memory of a thread for one row, out of the caller's workspace.
struct Scratch {
    uint8_t *mask;  // bits of a row, for formats that have none
    char *values;   // of rows that end too close to the end of the buffer to be read beyond it

    // Only the last such row but one can be longer than kOverread, so together they are hardly longer than a row.
    PackedRow hold(const PackedRow &row) {
        char *const to = values;
        memcpy(to, row.values, row.size());
        values += row.size();
        return {row.mask, to, values};
    }
};

static_assert(kLanes16 <= kMostPanelRows, "a panel has room for a block of each vector of a strip");

struct LinearPlan {
    size_t padded, strips, mask_size, masks_size, values_size, panel_size, sums_size, prepared_size;
    int threads;

    LinearPlan(size_t rows, size_t columns, size_t batch, int wanted)
        : padded(words_of(columns) * kWord),
          strips((batch + kLanes16 - 1) / kLanes16),
          mask_size(aligned(padded / 8 + 64)),
          masks_size((batch == 1 ? 1 : kMostPanelRows) * mask_size),
          values_size(aligned(padded * sizeof(float) + 2 * kOverread)),
          panel_size(batch == 1 ? 0 : kMostPanelRows * kPanelStride),
          sums_size(batch == 1 ? 0 : strips * kMostPanelRows * kLanes16 * sizeof(float)),
          // CSR takes a column more.
          prepared_size(aligned((batch == 1 ? 1 : strips * kLanes16) * (padded + 1) * sizeof(float))),
          threads(threads_for_weights(rows * columns, wanted)) {}

    // Vectors of a strip: the last one is narrower where few are left.
    bool few(size_t strip, size_t batch) const { return batch - strip * kLanes16 <= kLanes8; }
    size_t lanes(size_t strip, size_t batch) const { return few(strip, batch) ? kLanes8 : kLanes16; }
    size_t thread_size() const { return masks_size + values_size + panel_size + sums_size; }
    size_t workspace() const { return 64 + prepared_size + thread_size() * static_cast<size_t>(threads); }
};

// What a call of a linear is given, but for the weight.
struct LinearCall {
    int dtype;
    size_t rows, columns;
    const void *x;
    size_t batch;
    const void *bias;
    void *y;
    int threads;
    void *workspace;
    size_t workspace_size;

    char *memory() const { return reinterpret_cast<char *>(aligned(reinterpret_cast<uintptr_t>(workspace))); }
    const char *vector(size_t b) const { return static_cast<const char *>(x) + b * columns * size_of(dtype); }
    void finish(size_t r, size_t b, float sum) const {
        write(dtype, bias ? sum + read(dtype, bias, r) : sum, y, b * rows + r);
    }
};

inline int check_linear(const LinearCall &call) {
    if (!call.y || !call.workspace || (call.columns && !call.x) || !countable(call.batch, call.columns) ||
        !countable(call.batch, call.rows))
        return SPARC3_ERROR_ARGUMENT;
    if (call.workspace_size < LinearPlan(call.rows, call.columns, call.batch, call.threads).workspace())
        return SPARC3_ERROR_WORKSPACE;
    const size_t size = size_of(call.dtype), in = call.batch * call.columns * size;
    const size_t out = call.batch * call.rows * size;
    const bool overlaps = overlap(call.y, out, call.x, in) ||
                          (call.bias && overlap(call.y, out, call.bias, call.rows * size)) ||
                          overlap(call.y, out, call.workspace, call.workspace_size) ||
                          overlap(call.x, in, call.workspace, call.workspace_size);
    return overlaps ? SPARC3_ERROR_OVERLAP : SPARC3_OK;
}

// Up to kFusedBatch vectors: `row(r, scratch)` gives row r of W as a PackedRow.
template <class Row>
int multiply_rows(const LinearCall &call, const Row &row) {
    const PackedKernels &isa = packed_kernels();
    const LinearPlan plan(call.rows, call.columns, call.batch, call.threads);
    const size_t words = words_of(call.columns);
    char *prepared = call.memory();
    for (size_t b = 0; b < call.batch; ++b)
        isa.prepare(call.dtype, call.vector(b), call.columns,
                    prepared + b * plan.padded * isa.prepared_element(call.dtype));
    std::atomic<bool> sound{true};
    parallel(plan.threads, parts_for(plan.threads), [&](int thread, int part) {
        const Slice mine = slice(call.rows, 1, parts_for(plan.threads), part);
        char *own = prepared + plan.prepared_size + plan.thread_size() * static_cast<size_t>(thread);
        float sums[kFusedBatch];
        for (size_t r = mine.begin; r < mine.begin + mine.size; ++r) {
            Scratch scratch{reinterpret_cast<uint8_t *>(own), own + plan.masks_size};
            const PackedRow packed = row(r, scratch);
            if (!packed.values || !isa.dot(call.dtype, packed.mask, words, packed.values, packed.end, prepared,
                                           plan.padded, static_cast<int>(call.batch), sums))
                return sound.store(false, std::memory_order_relaxed);
            for (size_t b = 0; b < call.batch; ++b) call.finish(r, b, sums[b]);
        }
    });
    return sound ? SPARC3_OK : SPARC3_ERROR_FORMAT;
}

// Blocks of kBlockUnits of each vector, interleaved by lanes: to[block][strip][unit][lane]. Static, as a thread that
// runs it would be an exported type.
static inline void interleave(const LinearCall &call, const LinearPlan &plan, char *to) {
    const PackedKernels &isa = packed_kernels();
    const size_t element = isa.prepared_element(call.dtype), step = 4 * kBlockUnits / element;
    const size_t blocks = (plan.padded + step - 1) / step;
    parallel(plan.threads, static_cast<int>(plan.strips * blocks), [&](int thread, int part) {
        const size_t strip = static_cast<size_t>(part) / blocks, begin = static_cast<size_t>(part) % blocks * step;
        const size_t columns = std::min(step, call.columns - begin), units = words_of(columns) * kWord * element / 4;
        char *panel = to + plan.prepared_size + plan.thread_size() * static_cast<size_t>(thread);
        const size_t lanes = plan.lanes(strip, call.batch);
        for (size_t lane = 0; lane < lanes; ++lane) {
            const size_t b = strip * kLanes16 + lane;
            if (b < call.batch)
                isa.prepare(call.dtype, call.vector(b) + begin * size_of(call.dtype), columns,
                            panel + lane * kPanelStride);
            else
                memset(panel + lane * kPanelStride, 0, 4 * units);
        }
        char *out = to + (begin * element * plan.strips + 4 * units * strip) * kLanes16;
        for (size_t u = 0; u < units; ++u)
            for (size_t lane = 0; lane < lanes; ++lane, out += 4) memcpy(out, panel + lane * kPanelStride + 4 * u, 4);
    });
}

// Any number of vectors. Rows are expanded block by block into a panel in the level-1 cache, which all vectors are
// multiplied with. `row(r, scratch)` gives the state of row r, null values where the weight is corrupt;
// `expand(state, begin, columns, out)` writes its next block of columns as a prepared vector and returns false where
// the weight turns out to be corrupt; `start(r)` is where the values of row r should lie: it is fetched before they
// are checked.
template <class Row, class Expand, class Start>
int multiply_panels(const LinearCall &call, const Row &row, const Expand &expand, const Start &start) {
    const PackedKernels &isa = packed_kernels();
    const LinearPlan plan(call.rows, call.columns, call.batch, call.threads);
    const size_t element = isa.prepared_element(call.dtype), step = 4 * kBlockUnits / element;
    const size_t height = static_cast<size_t>(isa.panel_rows), tile = height * kLanes16;
    char *prepared = call.memory();
    interleave(call, plan, prepared);
    std::atomic<bool> sound{true};
    parallel(plan.threads, parts_for(plan.threads), [&](int thread, int part) {
        const Slice mine = slice(call.rows, height, parts_for(plan.threads), part);
        char *own = prepared + plan.prepared_size + plan.thread_size() * static_cast<size_t>(thread);
        char *held = own + plan.masks_size, *panel = held + plan.values_size;
        float *sums = reinterpret_cast<float *>(panel + plan.panel_size);
        for (size_t first = mine.begin; first < mine.begin + mine.size; first += height) {
            const size_t many = std::min(height, mine.begin + mine.size - first);
            Scratch scratch{reinterpret_cast<uint8_t *>(own), held};
            decltype(row(first, scratch)) states[kMostPanelRows];
            const char *ahead[kMostPanelRows] = {};
            for (size_t i = 0; i < many; ++i, scratch.mask += plan.mask_size) {
                states[i] = row(first + i, scratch);
                if (!states[i].values) return sound.store(false, std::memory_order_relaxed);
            }
            memset(sums, 0, plan.strips * tile * sizeof(float));
            memset(panel + many * kPanelStride, 0, (height - many) * kPanelStride);
            for (size_t begin = 0; begin < call.columns; begin += step) {
                const size_t columns = std::min(step, call.columns - begin);
                for (size_t i = 0; i < many; ++i) {
                    if (!expand(states[i], begin, columns, panel + i * kPanelStride))
                        return sound.store(false, std::memory_order_relaxed);
                    const bool last = begin + columns == call.columns;
                    const void *next = last ? start(std::min(first + height + i, call.rows - 1)) : states[i].values;
                    ahead[i] = static_cast<const char *>(next);
                }
                const size_t units = words_of(columns) * kWord * element / 4;
                const char *x = prepared + begin * element * plan.strips * kLanes16;
                for (size_t s = 0; s < plan.strips; ++s, x += 4 * units * kLanes16)
                    isa.tile(call.dtype, plan.few(s, call.batch), panel, x, units, ahead, sums + s * tile);
            }
            for (size_t b = 0; b < call.batch; ++b) {
                const size_t s = b / kLanes16, lanes = plan.lanes(s, call.batch);
                for (size_t i = 0; i < many; ++i)
                    call.finish(first + i, b, sums[s * tile + i * lanes + b % kLanes16]);
            }
        }
    });
    return sound ? SPARC3_OK : SPARC3_ERROR_FORMAT;
}

// Rows as PackedRow, for any number of vectors.
template <class Row, class Start>
int multiply(const LinearCall &call, const Row &row, const Start &start) {
    if (call.batch <= kFusedBatch) return multiply_rows(call, row);
    const PackedKernels &isa = packed_kernels();
    const auto expand = [&](PackedRow &rest, size_t begin, size_t columns, char *out) {
        const size_t words = words_of(columns);
        const uint8_t *mask = rest.mask + begin / 8;
        __builtin_prefetch(mask + 8 * words - 1);  // the last line of the next block
        rest.values = isa.expand(call.dtype, mask, words, rest.values, rest.end, out);
        return begin + columns < call.columns ? rest.values != nullptr : rest.values == rest.end;
    };
    return multiply_panels(call, row, expand, start);
}

}  // namespace sparc3
