/* Packed weights against hostile input: null pointers, wrong sizes, overlaps and contents changed at random get a status
 * and never touch memory that is not theirs. Built with sanitizers by tests/csrc; every buffer is exactly as long as the
 * header says, so that one byte too many is seen. */
#include "hostile.h"

static void bitmap_and_csr(int dtype, size_t rows, size_t columns, size_t batch) {
    const size_t size = size_of(dtype), stride = (columns + 31) / 32 * 4;
    void *weight = make_weight(dtype, rows * columns, next_random(9));
    int64_t *offsets = exactly((rows + 1) * sizeof *offsets);
    CHECK(sparc3_count_kept(dtype, weight, rows, columns, offsets, 2) == SPARC3_OK);
    const size_t count = (size_t)offsets[rows];
    uint8_t *bits = exactly(rows * stride);
    void *values = exactly(count * size), *out = exactly(rows * columns * size), *values2 = exactly(count * size);
    uint16_t *indices = exactly(count * sizeof *indices);
    CHECK(sparc3_bitmap_pack(dtype, weight, rows, columns, offsets, bits, values, count, 2) == SPARC3_OK);
    CHECK(sparc3_csr_pack(dtype, weight, rows, columns, offsets, indices, values2, count, 2) == SPARC3_OK);
    sparc3_bitmap bitmap = {dtype, rows, columns, count, bits, values, offsets};
    sparc3_csr csr = {dtype, rows, columns, count, indices, values2, offsets};
    CHECK(sparc3_bitmap_check(&bitmap, 1) == SPARC3_OK && sparc3_csr_check(&csr, 1) == SPARC3_OK);
    CHECK(sparc3_bitmap_unpack(&bitmap, out, 1) == SPARC3_OK && !memcmp(out, weight, rows * columns * size));
    memset(out, 1, rows * columns * size);
    CHECK(sparc3_csr_unpack(&csr, out, 1) == SPARC3_OK && !memcmp(out, weight, rows * columns * size));

    const size_t work_size = sparc3_linear_workspace_size(rows, columns, batch, 1);
    void *x = exactly(batch * columns * size), *y = exactly(batch * rows * size), *work = exactly(work_size);
    memset(x, 0, batch * columns * size);
    for (int mutation = 0; mutation < 12; ++mutation) {
        CHECK(allowed(sparc3_bitmap_linear(&bitmap, x, batch, NULL, y, 1, work, work_size)));
        CHECK(allowed(sparc3_csr_linear(&csr, x, batch, NULL, y, 1, work, work_size)));
        CHECK(allowed(sparc3_bitmap_unpack(&bitmap, out, 1)));
        CHECK(allowed(sparc3_csr_unpack(&csr, out, 1)));
        CHECK(allowed(sparc3_bitmap_check(&bitmap, 1)));
        CHECK(allowed(sparc3_csr_check(&csr, 1)));
        switch (next_random(4)) {
            case 0: bits[next_random((uint32_t)(rows * stride))] ^= (uint8_t)(1u << next_random(8)); break;
            case 1: offsets[next_random((uint32_t)rows + 1)] = (int64_t)next_random(100000) - 50000; break;
            case 2: offsets[next_random((uint32_t)rows + 1)] ^= (int64_t)((uint64_t)1 << next_random(64)); break;
            default:
                if (count) indices[next_random((uint32_t)count)] = (uint16_t)next_random(65536);
        }
    }
    free(weight), free(offsets), free(bits), free(values), free(out), free(values2), free(indices);
    free(x), free(y), free(work);
}

static void nm(int dtype, size_t rows, size_t groups, int n, int m, size_t batch) {
    const size_t size = size_of(dtype), columns = groups * (size_t)m, kept = groups * (size_t)n;
    const size_t index_bytes = (kept * (m <= 4 ? 2 : 4) + 7) / 8;
    void *values = exactly(rows * kept * size), *out = exactly(rows * columns * size);
    uint8_t *indices = exactly(rows * index_bytes), *weight = exactly(rows * columns * size);
    memset(weight, 0, rows * columns * size);
    for (size_t g = 0; g < rows * groups; ++g)
        for (int k = 0; k < n; ++k) weight[(g * (size_t)m + next_random((uint32_t)m)) * size] = 1;
    uint64_t wrong = 0;
    CHECK(sparc3_nm_pack(dtype, weight, rows, columns, n, m, values, indices, &wrong, 2) == SPARC3_OK);
    sparc3_nm packed = {dtype, n, m, rows, columns, values, indices};
    CHECK(sparc3_nm_check(&packed, 1) == SPARC3_OK);
    CHECK(sparc3_nm_unpack(&packed, out, 1) == SPARC3_OK && !memcmp(out, weight, rows * columns * size));
    const size_t work_size = sparc3_linear_workspace_size(rows, columns, batch, 1);
    void *x = exactly(batch * columns * size), *y = exactly(batch * rows * size), *work = exactly(work_size);
    memset(x, 0, batch * columns * size);
    for (int mutation = 0; mutation < 6; ++mutation) {
        CHECK(allowed(sparc3_nm_linear(&packed, x, batch, NULL, y, 1, work, work_size)));
        CHECK(allowed(sparc3_nm_unpack(&packed, out, 1)));
        CHECK(allowed(sparc3_nm_check(&packed, 1)));
        indices[next_random((uint32_t)(rows * index_bytes))] = (uint8_t)next_random(256);
    }
    memset(weight, 1, rows * columns * size);
    if (n < m) {
        CHECK(sparc3_nm_pack(dtype, weight, rows, columns, n, m, values, indices, &wrong, 1) == SPARC3_ERROR_PATTERN);
        CHECK(wrong == 0);
    }
    free(values), free(out), free(indices), free(weight), free(x), free(y), free(work);
}

static void bad_arguments(void) {
    float weight[32] = {1}, x[32] = {0}, y[8], values[1] = {1};
    uint8_t bits[4] = {1}, indices[8] = {0};
    uint16_t column[1] = {0};
    int64_t offsets[2] = {0, 1};
    char work[8192];
    sparc3_bitmap b = {SPARC3_FP32, 1, 32, 1, bits, values, offsets};
    sparc3_csr c = {SPARC3_FP32, 1, 32, 1, column, values, offsets};
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, y, 1, work, sizeof work) == SPARC3_OK);
    CHECK(sparc3_csr_linear(&c, x, 1, NULL, y, 1, work, sizeof work) == SPARC3_OK);
    CHECK(sparc3_bitmap_linear(NULL, x, 1, NULL, y, 1, work, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_linear(&b, NULL, 1, NULL, y, 1, work, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, NULL, 1, work, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, y, 1, NULL, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, y, 1, work, 8) == SPARC3_ERROR_WORKSPACE);
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, x, 1, work, sizeof work) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_bitmap_linear(&b, x, 1, NULL, values, 1, work, sizeof work) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_bitmap_linear(&b, x, SIZE_MAX / 8, NULL, y, 1, work, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_unpack(&b, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_unpack(&b, values, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_csr_linear(NULL, x, 1, NULL, y, 1, work, sizeof work) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_csr_unpack(&c, column, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_nm_unpack(NULL, y, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_pack(SPARC3_FP32, weight, 1, 30, 2, 4, y, indices, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_pack(SPARC3_FP32, weight, 1, 32, 5, 4, y, indices, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_pack(SPARC3_FP32, weight, 1, 32, 2, 4, weight, indices, NULL, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_count_kept(SPARC3_FP32, NULL, 1, 32, offsets, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_count_kept(7, weight, 1, 32, offsets, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_count_kept(SPARC3_FP32, weight, SIZE_MAX, 32, offsets, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_pack(SPARC3_FP32, weight, 1, 32, offsets, bits, weight, 1, 1) == SPARC3_ERROR_OVERLAP);
    offsets[1] = 0;
    CHECK(sparc3_bitmap_pack(SPARC3_FP32, weight, 1, 32, offsets, bits, values, 0, 1) == SPARC3_ERROR_FORMAT);
    b.values = NULL;
    CHECK(sparc3_bitmap_check(&b, 1) == SPARC3_ERROR_ARGUMENT);
    b.dtype = 9;
    CHECK(sparc3_bitmap_check(&b, 1) == SPARC3_ERROR_ARGUMENT);
    sparc3_advise_huge_pages(NULL, 1 << 22);
    sparc3_advise_huge_pages(weight, sizeof weight);
}

static void test(void) {
    bad_arguments();
    for (int round = 0; round < 60; ++round) {
        const int dtype = (int)next_random(3), m = 1 + (int)next_random(16), n = 1 + (int)next_random((uint32_t)m);
        const size_t rows = 1 + next_random(20), batch = 1 + next_random(20);
        bitmap_and_csr(dtype, rows, 1 + next_random(900), batch);
        nm(dtype, rows, 1 + next_random(40), n, m, batch);
        nm(dtype, rows, 1 + next_random(1200), round % 2 ? 2 : 4, round % 2 ? 4 : 8, batch);
    }
}

int main(void) {
    with_every_instruction_set(test);
    return 0;
}
