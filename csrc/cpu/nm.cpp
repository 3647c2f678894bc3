// The N:M format; the header describes it.
#include "formats.h"
#include "packed_linear.h"

namespace sparc3 {
namespace {

// Mask bits of a row, padded with zeros to words; false where a place is beyond its group.
bool masks(const Shape &shape, const uint8_t *indices, size_t columns, uint8_t *mask) {
    const size_t bytes = (columns + 7) / 8, all = 4 * words_of(columns);
    if (shape.n == 2 && shape.m == 4) {
        packed_kernels().masks_2_4(indices, bytes, mask);
        if (columns % 8) mask[bytes - 1] &= 0x0f;
        memset(mask + bytes, 0, all - bytes);
        return true;
    }
    if (shape.n == 4 && shape.m == 8) {
        packed_kernels().masks_4_8(indices, bytes, mask);
        memset(mask + bytes, 0, all - bytes);
        return true;
    }
    memset(mask, 0, all);
    size_t i = 0;
    for (size_t g = 0; g < shape.groups; ++g)
        for (size_t k = 0; k < shape.n; ++k, ++i) {
            const size_t place = shape.place(indices, i), c = g * shape.m + place;
            if (place >= shape.m) return false;
            set_bit(mask, c);
        }
    return true;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

int sparc3_nm_pack(int dtype, const void *weight, size_t rows, size_t columns, int n, int m, void *values,
                   uint8_t *indices, uint64_t *wrong, int threads) {
    if (!is_dtype(dtype) || !is_pattern(n, m) || !countable(rows, columns) || columns % static_cast<size_t>(m))
        return SPARC3_ERROR_ARGUMENT;
    if (!rows || !columns) return SPARC3_OK;
    if (!weight || !values || !indices) return SPARC3_ERROR_ARGUMENT;
    const Shape shape(columns, n, m);
    const size_t size = size_of(dtype), in = rows * columns * size, out = rows * shape.kept * size;
    const size_t index_size = rows * shape.index_bytes;
    if (overlap(weight, in, values, out) || overlap(weight, in, indices, index_size) ||
        overlap(values, out, indices, index_size))
        return SPARC3_ERROR_OVERLAP;
    WrongGroup first;
    each_row(rows, columns, threads, [&](size_t r) {
        const char *row = static_cast<const char *>(weight) + r * columns * size;
        uint8_t *row_indices = indices + r * shape.index_bytes;
        memset(row_indices, 0, shape.index_bytes);
        for (size_t g = 0; g < shape.groups; ++g)
            if (!pack_group(row + g * shape.m * size, size, shape, g * shape.n,
                            static_cast<char *>(values) + r * shape.kept * size, row_indices)) {
                first.note(r * shape.groups + g);
                break;
            }
        return true;
    });
    return first.status(wrong);
}

int sparc3_nm_check(const sparc3_nm *weight, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    const Shape shape(weight->columns, weight->n, weight->m);
    return each_row(weight->rows, weight->columns, threads, [&](size_t r) {
        return each_place(shape, weight->indices + r * shape.index_bytes, 0, [](size_t, size_t) {});
    });
}

int sparc3_nm_unpack(const sparc3_nm *weight, void *out, int threads) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    const sparc3_nm &w = *weight;
    const Shape shape(w.columns, w.n, w.m);
    const size_t size = size_of(w.dtype);
    if (!out) return SPARC3_ERROR_ARGUMENT;
    if (!clear_of(out, w.rows * w.columns * size, w)) return SPARC3_ERROR_OVERLAP;
    const bool fast = (w.n == 2 && w.m == 4) || (w.n == 4 && w.m == 8);
    return each_row(w.rows, w.columns, threads, [&](size_t r) {
        const uint8_t *indices = w.indices + r * shape.index_bytes;
        const char *values = static_cast<const char *>(w.values) + r * shape.kept * size;
        char *to = static_cast<char *>(out) + r * w.columns * size;
        size_t column = 0;
        if (fast) {
            // Pieces of a row whose mask fits the stack, while nothing is read beyond the values.
            constexpr size_t kPiece = 2048;
            uint8_t mask[kPiece / 8];
            const size_t rest = (w.rows - r) * shape.kept * size;
            for (; column + kPiece <= w.columns; column += kPiece) {
                const size_t done = column / 2;
                if (done * size + kPiece / 2 * size + kOverread > rest) break;
                masks(shape, indices + done * shape.width / 8, kPiece, mask);
                if (packed_kernels().count(mask, kPiece / kWord) != kPiece / 2) return false;
                packed_kernels().unpack(w.dtype, mask, kPiece, values + done * size, to + column * size);
            }
        }
        memset(to + column * size, 0, (w.columns - column) * size);
        return each_place(shape, indices, column / shape.m,
                          [&](size_t k, size_t c) { memcpy(to + c * size, values + k * size, size); });
    });
}

int sparc3_nm_linear(const sparc3_nm *weight, const void *x, size_t batch, const void *bias, void *y, int threads,
                     void *workspace, size_t workspace_size) {
    int status = check_arguments(weight);
    if (status || !weight->rows || !batch) return status;
    sparc3_nm w = *weight;
    const LinearCall call{w.dtype, w.rows, w.columns, x, batch, bias, y, threads, workspace, workspace_size};
    status = check_linear(call);
    if (status) return status;
    const Shape shape(w.columns, w.n, w.m);
    const size_t size = size_of(w.dtype);
    if (!clear_of(y, batch * w.rows * size, w)) return SPARC3_ERROR_OVERLAP;
    const uint8_t none = 0;
    if (!w.columns) w.values = w.indices = &none;
    const auto values_of = [&](size_t r) { return static_cast<const char *>(w.values) + r * shape.kept * size; };
    const auto row = [&](size_t r, Scratch &scratch) -> PackedRow {
        if (!masks(shape, w.indices + r * shape.index_bytes, w.columns, scratch.mask)) return {};
        const PackedRow claimed{scratch.mask, values_of(r), values_of(r + 1)};
        return (w.rows - r - 1) * shape.kept * size < kOverread ? scratch.hold(claimed) : claimed;
    };
    return multiply(call, row, values_of);
}
