// The CSR format; the header describes it.
#include "formats.h"
#include "packed_linear.h"

namespace sparc3 {
namespace {

// What is left of a row, for products of panels.
struct Rest {
    const char *indices = nullptr, *values = nullptr;
    size_t count = 0;
};

// Whether panels of expanded rows are faster than multiplying each kept weight with the vectors at its column. On Zen 4
// the latter takes 5 cycles a kept weight and strip; a panel takes 2 to expand it, and half a cycle for every weight,
// kept or not, and strip, or a quarter where the strip has few vectors.
bool expands(const sparc3_csr &w, size_t batch) {
    if (batch == 1) return false;
    const bool one_full_strip = batch > kLanes8 && batch <= kLanes16;
    return w.count * (one_full_strip ? 4 : 8) > w.rows * w.columns;
}

int multiply_expanded(const LinearCall &call, const sparc3_csr &w) {
    const size_t size = size_of(w.dtype), index = index_size(w.columns);
    const auto row = [&](size_t r, Scratch &) -> Rest {
        if (!inside(w, r)) return {};
        const size_t begin = static_cast<size_t>(w.offsets[r]);
        return {static_cast<const char *>(w.indices) + begin * index,
                static_cast<const char *>(w.values) + begin * size, static_cast<size_t>(w.offsets[r + 1]) - begin};
    };
    const auto expand = [&](Rest &rest, size_t begin, size_t columns, char *out) {
        const size_t done = packed_kernels().scatter(w.dtype, is_wide(w.columns), rest.indices, rest.values,
                                                     rest.count, begin, columns, out);
        rest.indices += done * index;
        rest.values += done * size;
        rest.count -= done;
        // Columns that do not ascend are met by no block.
        return begin + columns < w.columns || !rest.count;
    };
    return multiply_panels(call, row, expand, [&](size_t r) { return unchecked(w.values, w.offsets[r], size); });
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

int sparc3_csr_pack(int dtype, const void *weight, size_t rows, size_t columns, const int64_t *offsets, void *indices,
                    void *values, size_t count, int threads) {
    if (!is_dtype(dtype) || !countable(rows, columns) || columns > INT32_MAX) return SPARC3_ERROR_ARGUMENT;
    if (!rows || !columns) return count ? SPARC3_ERROR_FORMAT : SPARC3_OK;
    if (!weight || !offsets || (count && (!values || !indices))) return SPARC3_ERROR_ARGUMENT;
    const size_t size = size_of(dtype), in = rows * columns * size, all = count * index_size(columns);
    if (overlap(weight, in, values, count * size) || overlap(weight, in, indices, all) ||
        overlap(values, count * size, indices, all))
        return SPARC3_ERROR_OVERLAP;
    return each_row(rows, columns, threads, [&](size_t r) {
        const int64_t end = offsets[r + 1];
        int64_t next = offsets[r];
        if (next < 0 || end < next || static_cast<uint64_t>(end) > count) return false;
        const char *row = static_cast<const char *>(weight) + r * columns * size;
        for (size_t c = 0; c < columns; ++c) {
            uint32_t bits = 0;
            memcpy(&bits, row + c * size, size);
            if (bits << (33 - 8 * size) == 0) continue;
            if (next == end) return false;
            const size_t at = static_cast<size_t>(next++);
            memcpy(static_cast<char *>(values) + at * size, row + c * size, size);
            put_index(indices, is_wide(columns), at, c);
        }
        return next == end;
    });
}

int sparc3_csr_check(const sparc3_csr *weight, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows) return status;
    const sparc3_csr &w = *weight;
    if (w.offsets[0] != 0 || w.offsets[w.rows] != static_cast<int64_t>(w.count)) return SPARC3_ERROR_FORMAT;
    return each_row(w.rows, w.columns, threads, [&](size_t r) { return each_column(w, r, [](size_t, size_t) {}); });
}

int sparc3_csr_unpack(const sparc3_csr *weight, void *out, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    const sparc3_csr &w = *weight;
    const size_t size = size_of(w.dtype);
    if (!out) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(out, w.rows * w.columns * size, w)) return SPARC3_ERROR_OVERLAP;
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        if (!inside(w, r)) return false;
        char *to = static_cast<char *>(out) + r * w.columns * size;
        memset(to, 0, w.columns * size);
        return each_column(w, r, [&](size_t i, size_t column) {
            memcpy(to + column * size, static_cast<const char *>(w.values) + i * size, size);
        });
    });
}

int sparc3_csr_linear(const sparc3_csr *weight, const void *x, size_t batch, const void *bias, void *y, int threads,
                      void *workspace, size_t workspace_size) {
    int status = check_arguments(weight);
    if (status || !weight->rows || !batch) return status;
    const sparc3_csr &w = *weight;
    const LinearCall call{w.dtype, w.rows, w.columns, x, batch, bias, y, threads, workspace, workspace_size};
    status = check_linear(call);
    if (status) return status;
    if (!clear_of(y, batch * w.rows * size_of(w.dtype), w)) return SPARC3_ERROR_OVERLAP;
    if (expands(w, batch)) return multiply_expanded(call, w);

    const PackedKernels &isa = packed_kernels();
    float *prepared = reinterpret_cast<float *>(call.memory());
    const bool one = batch == 1, wide = is_wide(w.columns);
    const size_t lanes = one ? 1 : kLanes16, strips = (batch + lanes - 1) / lanes, strip = (w.columns + 1) * lanes;
    // Column by column, the vectors of a strip side by side; a column of zeros last.
    for (size_t s = 0; s < strips; ++s) {
        float *to = prepared + s * strip;
        for (size_t l = 0; l < lanes; ++l) {
            const size_t b = s * lanes + l;
            for (size_t c = 0; c < w.columns; ++c)
                to[c * lanes + l] = b < batch ? read(w.dtype, x, b * w.columns + c) : 0;
            to[w.columns * lanes + l] = 0;
        }
    }
    // A kept weight costs about as much as 8 pruned ones of a bitmap.
    const int workers = threads_for_weights(8 * w.count * strips, threads), parts = parts_for(workers);
    std::atomic<bool> sound{true};
    parallel(workers, parts, [&](int, int part) {
        const Slice mine = slice(w.rows, 1, parts, part);
        for (size_t r = mine.begin; r < mine.begin + mine.size; ++r) {
            if (!inside(w, r)) return sound.store(false, std::memory_order_relaxed);
            const size_t begin = static_cast<size_t>(w.offsets[r]), count = static_cast<size_t>(w.offsets[r + 1]) - begin;
            const char *indices = static_cast<const char *>(w.indices) + begin * index_size(w.columns);
            const char *values = static_cast<const char *>(w.values) + begin * size_of(w.dtype);
            for (size_t s = 0; s < strips; ++s) {
                float sums[kLanes16];
                const auto product = one ? isa.gather : isa.gather_lanes;
                if (!product(w.dtype, wide, indices, values, count, prepared + s * strip, w.columns, sums))
                    return sound.store(false, std::memory_order_relaxed);
                for (size_t l = 0; l < lanes && s * lanes + l < batch; ++l)
                    call.finish(r, s * lanes + l, sums[l]);
            }
        }
    });
    return sound ? SPARC3_OK : SPARC3_ERROR_FORMAT;
}
