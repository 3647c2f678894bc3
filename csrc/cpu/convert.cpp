// From one packed format to another, row by row. The bitmap is the middle: CSR has its values and offsets, and N:M has
// its rows in groups.
#include "formats.h"

using namespace sparc3;

int sparc3_bitmap_to_csr(const sparc3_bitmap *weight, void *indices, int threads) {
    const int status = check_arguments(weight);
    if (status) return status;
    if (weight->columns > INT32_MAX) return SPARC3_ERROR_ARGUMENT;
    if (!weight->rows || !weight->count) return SPARC3_OK;
    const sparc3_bitmap &w = *weight;
    if (!indices) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(indices, w.count * index_size(w.columns), w)) return SPARC3_ERROR_OVERLAP;
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        const PackedRow row = row_of(w, r);
        if (!row.values) return false;
        size_t next = static_cast<size_t>(w.offsets[r]);
        for (size_t begin = 0; begin < w.columns; begin += kWord) {
            uint32_t word;
            memcpy(&word, row.mask + begin / 8, sizeof word);
            for (; word; word &= word - 1)
                put_index(indices, is_wide(w.columns), next++, begin + static_cast<size_t>(__builtin_ctz(word)));
        }
        return true;
    });
}

int sparc3_csr_to_bitmap(const sparc3_csr *weight, uint8_t *bits, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    const sparc3_csr &w = *weight;
    if (!bits) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(bits, w.rows * row_bytes(w.columns), w)) return SPARC3_ERROR_OVERLAP;
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        uint8_t *row = bits + r * row_bytes(w.columns);
        memset(row, 0, row_bytes(w.columns));
        return each_column(w, r, [&](size_t, size_t c) { set_bit(row, c); });
    });
}

int sparc3_bitmap_to_nm(const sparc3_bitmap *weight, int n, int m, void *values, uint8_t *indices, uint64_t *wrong,
                        int threads) {
    int status = check_arguments(weight);
    if (status) return status;
    if (!is_pattern(n, m) || weight->columns % static_cast<size_t>(m)) return SPARC3_ERROR_ARGUMENT;
    if (!weight->rows || !weight->columns) return SPARC3_OK;
    sparc3_bitmap w = *weight;
    const Shape shape(w.columns, n, m);
    const size_t size = size_of(w.dtype), out = w.rows * shape.kept * size, index_size = w.rows * shape.index_bytes;
    if (!values || !indices) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(values, out, w) || !clear_of(indices, index_size, w) || overlap(values, out, indices, index_size))
        return SPARC3_ERROR_OVERLAP;
    const char none = 0;
    if (!w.values) w.values = &none;
    WrongGroup first;
    status = each_row(w.rows, w.columns, threads, [&](size_t r) {
        const PackedRow row = row_of(w, r);
        if (!row.values) return false;
        const char *from = static_cast<const char *>(row.values);
        uint8_t *row_indices = indices + r * shape.index_bytes;
        memset(row_indices, 0, shape.index_bytes);
        for (size_t g = 0; g < shape.groups; ++g) {
            char group[16 * sizeof(float)] = {};
            for (size_t i = 0; i < shape.m; ++i) {
                const size_t c = g * shape.m + i;
                if (!(row.mask[c >> 3] >> (c & 7) & 1)) continue;
                memcpy(group + i * size, from, size);
                from += size;
            }
            if (!pack_group(group, size, shape, g * shape.n, static_cast<char *>(values) + r * shape.kept * size,
                            row_indices)) {
                first.note(r * shape.groups + g);
                break;
            }
        }
        return true;
    });
    return status ? status : first.status(wrong);
}

int sparc3_nm_count_kept(const sparc3_nm *weight, int64_t *offsets, int threads) {
    const int status = check_arguments(weight);
    if (status) return status;
    const sparc3_nm &w = *weight;
    const Shape shape(w.columns, w.n, w.m);
    if (!offsets) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(offsets, (w.rows + 1) * sizeof *offsets, w)) return SPARC3_ERROR_OVERLAP;
    return sparc3_count_kept(w.dtype, w.values, w.rows, shape.kept, offsets, threads);
}

int sparc3_nm_to_bitmap(const sparc3_nm *weight, const int64_t *offsets, uint8_t *bits, void *values, size_t count,
                        int threads) {
    const int status = check_arguments(weight);
    if (status) return status;
    if (!weight->rows || !weight->columns) return count ? SPARC3_ERROR_FORMAT : SPARC3_OK;
    const sparc3_nm &w = *weight;
    const Shape shape(w.columns, w.n, w.m);
    const size_t size = size_of(w.dtype), out = count * size, all = w.rows * row_bytes(w.columns);
    if (!offsets || !bits || (count && !values) || !countable(count, 1)) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(bits, all, w) || !clear_of(values, out, w) || overlap(bits, all, values, out) ||
        overlap(bits, all, offsets, (w.rows + 1) * sizeof *offsets) ||
        overlap(values, out, offsets, (w.rows + 1) * sizeof *offsets))
        return SPARC3_ERROR_OVERLAP;
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        const int64_t begin = offsets[r], end = offsets[r + 1];
        if (begin < 0 || end < begin || static_cast<uint64_t>(end) > count) return false;
        uint8_t *row = bits + r * row_bytes(w.columns);
        memset(row, 0, row_bytes(w.columns));
        const char *from = static_cast<const char *>(w.values) + r * shape.kept * size;
        size_t next = static_cast<size_t>(begin), last = static_cast<size_t>(end), beyond = 0;
        const bool sound = each_place(shape, w.indices + r * shape.index_bytes, 0, [&](size_t k, size_t c) {
            if (!is_nonzero(from + k * size, size)) return;
            if (next == last) {
                ++beyond;
                return;
            }
            set_bit(row, c);
            memcpy(static_cast<char *>(values) + next++ * size, from + k * size, size);
        });
        return sound && !beyond && next == last;
    });
}
