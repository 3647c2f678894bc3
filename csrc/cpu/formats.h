// The three packed formats of the header, row by row: what products, unpacking and conversion share.
#pragma once

#include "packed.h"

namespace sparc3 {

// ---- bitmap

inline size_t row_bytes(size_t columns) { return 4 * words_of(columns); }

inline void set_bit(uint8_t *row, size_t c) { row[c >> 3] = static_cast<uint8_t>(row[c >> 3] | 1u << (c & 7)); }

inline int check_arguments(const sparc3_bitmap *w) {
    if (!w || !is_dtype(w->dtype) || !countable(w->rows, w->columns)) return SPARC3_ERROR_ARGUMENT;
    if (!w->rows) return SPARC3_OK;
    if (!w->offsets || (w->columns && !w->bits) || (w->count && !w->values)) return SPARC3_ERROR_ARGUMENT;
    return countable(w->count, 1) ? SPARC3_OK : SPARC3_ERROR_ARGUMENT;
}

inline bool clear_of(const void *out, size_t size, const sparc3_bitmap &w) {
    return !overlap(out, size, w.values, w.count * size_of(w.dtype)) &&
           !overlap(out, size, w.bits, w.rows * row_bytes(w.columns)) &&
           !overlap(out, size, w.offsets, (w.rows + 1) * sizeof *w.offsets);
}

inline const char *values_of(const sparc3_bitmap &w, size_t r) {
    return static_cast<const char *>(w.values) + static_cast<size_t>(w.offsets[r]) * size_of(w.dtype);
}

// Row r with as many values as its offsets say, or nothing where they make no sense. The values may not be null.
inline PackedRow claimed_row(const sparc3_bitmap &w, size_t r) {
    const int64_t begin = w.offsets[r], end = w.offsets[r + 1];
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > w.count) return {};
    if (static_cast<uint64_t>(end - begin) > w.columns) return {};
    const uint8_t *mask = w.bits + r * row_bytes(w.columns);
    if (w.columns % kWord) {
        uint32_t last;
        memcpy(&last, mask + row_bytes(w.columns) - 4, sizeof last);
        if (last >> w.columns % kWord) return {};
    }
    return {mask, values_of(w, r), values_of(w, r + 1)};
}

// Row r, or nothing where bits, offsets and values disagree.
inline PackedRow row_of(const sparc3_bitmap &w, size_t r) {
    const PackedRow row = claimed_row(w, r);
    if (!row.values) return {};
    const size_t kept = packed_kernels().count(row.mask, words_of(w.columns));
    return kept * size_of(w.dtype) == row.size() ? row : PackedRow{};
}

// ---- CSR

inline bool is_wide(size_t columns) { return columns > 65536; }
inline size_t index_size(size_t columns) { return is_wide(columns) ? 4 : 2; }

inline size_t index_at(const void *indices, bool wide, size_t i) {
    return wide ? static_cast<const uint32_t *>(indices)[i] : static_cast<const uint16_t *>(indices)[i];
}

inline void put_index(void *indices, bool wide, size_t i, size_t column) {
    if (wide)
        static_cast<uint32_t *>(indices)[i] = static_cast<uint32_t>(column);
    else
        static_cast<uint16_t *>(indices)[i] = static_cast<uint16_t>(column);
}

inline int check_arguments(const sparc3_csr *w) {
    if (!w || !is_dtype(w->dtype) || !countable(w->rows, w->columns) || w->columns > INT32_MAX)
        return SPARC3_ERROR_ARGUMENT;
    if (!w->rows) return SPARC3_OK;
    if (!w->offsets || (w->count && (!w->values || !w->indices))) return SPARC3_ERROR_ARGUMENT;
    return countable(w->count, 1) ? SPARC3_OK : SPARC3_ERROR_ARGUMENT;
}

inline bool clear_of(const void *out, size_t size, const sparc3_csr &w) {
    return !overlap(out, size, w.values, w.count * size_of(w.dtype)) &&
           !overlap(out, size, w.indices, w.count * index_size(w.columns)) &&
           !overlap(out, size, w.offsets, (w.rows + 1) * sizeof *w.offsets);
}

// Values [begin, end) of a row lie within the buffer.
inline bool inside(const sparc3_csr &w, size_t r) {
    return w.offsets[r] >= 0 && w.offsets[r + 1] >= w.offsets[r] &&
           static_cast<uint64_t>(w.offsets[r + 1]) <= w.count;
}

// Call body(index of a value, its column) along row r; false where the row is not sound.
template <class Body>
bool each_column(const sparc3_csr &w, size_t r, const Body &body) {
    if (!inside(w, r)) return false;
    size_t least = 0;
    for (int64_t i = w.offsets[r]; i < w.offsets[r + 1]; ++i) {
        const size_t at = static_cast<size_t>(i), column = index_at(w.indices, is_wide(w.columns), at);
        if (column < least || column >= w.columns) return false;
        body(at, column);
        least = column + 1;
    }
    return true;
}

// ---- N:M

inline bool is_pattern(int n, int m) { return n >= 1 && n <= m && m <= 16; }

// Sizes of a row, and the places in it.
struct Shape {
    size_t n, m, groups, kept, width, index_bytes;

    Shape(size_t columns, int n_, int m_)
        : n(static_cast<size_t>(n_)),
          m(static_cast<size_t>(m_)),
          groups(columns / m),
          kept(groups * n),
          width(m <= 4 ? 2 : 4),
          index_bytes((kept * width + 7) / 8) {}
    size_t place(const uint8_t *indices, size_t i) const {
        return indices[i * width / 8] >> (i * width % 8) & ((1u << width) - 1);
    }
};

inline int check_arguments(const sparc3_nm *w) {
    if (!w || !is_dtype(w->dtype) || !is_pattern(w->n, w->m) || !countable(w->rows, w->columns) ||
        w->columns % static_cast<size_t>(w->m))
        return SPARC3_ERROR_ARGUMENT;
    return w->rows && w->columns && (!w->values || !w->indices) ? SPARC3_ERROR_ARGUMENT : SPARC3_OK;
}

inline bool clear_of(const void *out, size_t size, const sparc3_nm &w) {
    const Shape shape(w.columns, w.n, w.m);
    return !overlap(out, size, w.values, w.rows * shape.kept * size_of(w.dtype)) &&
           !overlap(out, size, w.indices, w.rows * shape.index_bytes);
}

// Call body(index of a value in the row, its column) along a row; false where the row is not sound.
template <class Body>
bool each_place(const Shape &shape, const uint8_t *indices, size_t first_group, const Body &body) {
    for (size_t g = first_group; g < shape.groups; ++g)
        for (size_t k = g * shape.n, least = 0; k < (g + 1) * shape.n; ++k) {
            const size_t place = shape.place(indices, k);
            if (place < least || place >= shape.m) return false;
            body(k, g * shape.m + place);
            least = place + 1;
        }
    return true;
}

inline bool is_nonzero(const char *weight, size_t size) {
    uint32_t bits = 0;
    memcpy(&bits, weight, size);
    return (bits << (33 - 8 * size)) != 0;
}

// Pack m weights as the group whose first value is the row's value `first`, over indices of zeros; false where more
// than n of them are nonzero.
inline bool pack_group(const char *group, size_t size, const Shape &shape, size_t first, char *values,
                       uint8_t *indices) {
    size_t kept = 0, nonzeros = 0;
    for (size_t i = 0; i < shape.m; ++i) nonzeros += is_nonzero(group + i * size, size);
    if (nonzeros > shape.n) return false;
    size_t fill = shape.n - nonzeros;
    for (size_t i = 0; i < shape.m; ++i) {
        const bool nonzero = is_nonzero(group + i * size, size);
        if (!nonzero && !fill) continue;
        char *to = values + (first + kept) * size;
        if (nonzero) {
            memcpy(to, group + i * size, size);
        } else {
            memset(to, 0, size);
            --fill;
        }
        const size_t at = (first + kept++) * shape.width;
        indices[at / 8] = static_cast<uint8_t>(indices[at / 8] | i << at % 8);
    }
    return true;
}

// The first group, counted over all rows, that is not N:M; groups come in any order, from any thread.
class WrongGroup {
public:
    void note(uint64_t group) {
        uint64_t before = first_;
        while (group < before && !first_.compare_exchange_weak(before, group)) {
        }
    }
    int status(uint64_t *wrong) const {
        if (first_ == UINT64_MAX) return SPARC3_OK;
        if (wrong) *wrong = first_;
        return SPARC3_ERROR_PATTERN;
    }

private:
    std::atomic<uint64_t> first_{UINT64_MAX};
};

}  // namespace sparc3
