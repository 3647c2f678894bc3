// The bitmap format; the header describes it.
#include "formats.h"
#include "packed_linear.h"

namespace sparc3 {
namespace {

bool is_zero(const uint32_t *w, size_t i) { return (w[i] << 1) == 0; }
bool is_zero(const uint16_t *w, size_t i) { return static_cast<uint16_t>(w[i] << 1) == 0; }

// Call body with weights as unsigned integers.
template <class Body>
auto as_bits(int dtype, const void *weight, const Body &body) {
    return dtype == SPARC3_FP32 ? body(static_cast<const uint32_t *>(weight))
                                : body(static_cast<const uint16_t *>(weight));
}

template <class T>
bool pack_row(const T *weight, size_t columns, uint8_t *bits, T *values, size_t count) {
    size_t kept = 0;
    for (size_t begin = 0; begin < columns; begin += kWord) {
        uint32_t word = 0;
        for (size_t i = 0; i < std::min(kWord, columns - begin); ++i) {
            if (is_zero(weight, begin + i)) continue;
            if (kept == count) return false;
            word |= uint32_t{1} << i;
            values[kept++] = weight[begin + i];
        }
        memcpy(bits + begin / 8, &word, sizeof word);
    }
    return kept == count;
}

bool may_overread(const sparc3_bitmap &w, size_t r) {
    return (w.count - static_cast<size_t>(w.offsets[r + 1])) * size_of(w.dtype) >= kOverread;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

int sparc3_count_kept(int dtype, const void *weight, size_t rows, size_t columns, int64_t *offsets, int threads) {
    if (!is_dtype(dtype) || !offsets || (!weight && rows && columns) || !countable(rows, columns))
        return SPARC3_ERROR_ARGUMENT;
    if (overlap(offsets, (rows + 1) * sizeof *offsets, weight, rows * columns * size_of(dtype)))
        return SPARC3_ERROR_OVERLAP;
    each_row(rows, columns, threads, [&](size_t r) {
        offsets[r + 1] = as_bits(dtype, weight, [&](const auto *w) {
            int64_t kept = 0;
            for (size_t c = 0; c < columns; ++c) kept += !is_zero(w + r * columns, c);
            return kept;
        });
        return true;
    });
    offsets[0] = 0;
    for (size_t r = 0; r < rows; ++r) offsets[r + 1] += offsets[r];
    return SPARC3_OK;
}

int sparc3_bitmap_pack(int dtype, const void *weight, size_t rows, size_t columns, const int64_t *offsets,
                       uint8_t *bits, void *values, size_t count, int threads) {
    if (!is_dtype(dtype) || !countable(rows, columns)) return SPARC3_ERROR_ARGUMENT;
    if (!rows || !columns) return count ? SPARC3_ERROR_FORMAT : SPARC3_OK;
    if (!weight || !offsets || !bits || (count && !values)) return SPARC3_ERROR_ARGUMENT;
    const size_t in = rows * columns * size_of(dtype), out = count * size_of(dtype), all = rows * row_bytes(columns);
    if (overlap(weight, in, bits, all) || overlap(weight, in, values, out) || overlap(bits, all, values, out))
        return SPARC3_ERROR_OVERLAP;
    return each_row(rows, columns, threads, [&](size_t r) {
        const int64_t begin = offsets[r], end = offsets[r + 1];
        if (begin < 0 || end < begin || static_cast<uint64_t>(end) > count) return false;
        return as_bits(dtype, weight, [&](const auto *w) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
            return pack_row(w + r * columns, columns, bits + r * row_bytes(columns), static_cast<T *>(values) + begin,
                            static_cast<size_t>(end - begin));
        });
    });
}

int sparc3_bitmap_check(const sparc3_bitmap *weight, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows) return status;
    const sparc3_bitmap &w = *weight;
    if (w.offsets[0] != 0 || w.offsets[w.rows] != static_cast<int64_t>(w.count)) return SPARC3_ERROR_FORMAT;
    const char none = 0;  // an empty weight has no values, but its rows are sound
    sparc3_bitmap checked = w;
    if (!checked.values) checked.values = &none;
    return each_row(w.rows, w.columns, threads, [&](size_t r) { return row_of(checked, r).values != nullptr; });
}

int sparc3_bitmap_unpack(const sparc3_bitmap *weight, void *out, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    sparc3_bitmap w = *weight;
    const size_t size = size_of(w.dtype);
    if (!out) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(out, w.rows * w.columns * size, w)) return SPARC3_ERROR_OVERLAP;
    const char none = 0;
    if (!w.values) w.values = &none;
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        const PackedRow row = row_of(w, r);
        if (!row.values) return false;
        char *to = static_cast<char *>(out) + r * w.columns * size;
        if (may_overread(w, r)) {
            packed_kernels().unpack(w.dtype, row.mask, w.columns, row.values, to);
            return true;
        }
        const char *from = static_cast<const char *>(row.values);
        memset(to, 0, w.columns * size);
        for (size_t c = 0; c < w.columns; ++c)
            if (row.mask[c >> 3] >> (c & 7) & 1) {
                memcpy(to + c * size, from, size);
                from += size;
            }
        return true;
    });
}

size_t sparc3_linear_workspace_size(size_t rows, size_t columns, size_t batch, int threads) {
    return LinearPlan(rows, columns, batch, threads).workspace();
}

int sparc3_bitmap_linear(const sparc3_bitmap *weight, const void *x, size_t batch, const void *bias, void *y,
                         int threads, void *workspace, size_t workspace_size) {
    int status = check_arguments(weight);
    if (status || !weight->rows || !batch) return status;
    sparc3_bitmap w = *weight;
    const LinearCall call{w.dtype, w.rows, w.columns, x, batch, bias, y, threads, workspace, workspace_size};
    status = check_linear(call);
    if (status) return status;
    const size_t size = size_of(w.dtype);
    if (!clear_of(y, batch * w.rows * size, w)) return SPARC3_ERROR_OVERLAP;
    const char none = 0;
    if (!w.values) w.values = &none;
    const auto row = [&](size_t r, Scratch &scratch) {
        const PackedRow claimed = claimed_row(w, r);
        return claimed.values && !may_overread(w, r) ? scratch.hold(claimed) : claimed;
    };
    return multiply(call, row, [&](size_t r) {
        __builtin_prefetch(w.bits + r * row_bytes(w.columns));
        return unchecked(w.values, w.offsets[r], size);
    });
}
