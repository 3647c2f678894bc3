/* Conversion of packed weights: what packing the unpacked weight gives, byte by byte, with NaN, -0 and empty and full
 * rows; and hostile input as in packed.c. */
#include "hostile.h"

/* Rows that are empty, full or in between; NaN with payloads and -0 among the values. */
static uint8_t *weight_with_specials(int dtype, size_t rows, size_t columns, size_t most_of, size_t group) {
    const size_t size = size_of(dtype);
    uint8_t *weight = exactly(rows * columns * size);
    memset(weight, 0, rows * columns * size);
    for (size_t r = 0; r < rows; ++r) {
        const uint32_t kept_in_8 = next_random(9);
        for (size_t c = 0; c < columns; ++c) {
            uint8_t *at = weight + (r * columns + c) * size;
            if (next_random(11) == 0) at[size - 1] = 0x80; /* -0 */
            if (next_random(8) >= kept_in_8) continue;
            size_t nonzeros = 0;
            for (size_t k = c / group * group; k < c; ++k) {
                const uint8_t *other = weight + (r * columns + k) * size;
                for (size_t b = 0; b < size; ++b)
                    if (other[b] & (b + 1 == size ? 0x7f : 0xff)) {
                        ++nonzeros;
                        break;
                    }
            }
            if (nonzeros == most_of) continue;
            for (size_t b = 0; b < size; ++b) at[b] = (uint8_t)(1 + next_random(255));
            if (next_random(5) == 0) at[size - 1] = 0xff, at[size - 2] |= 0xc0; /* NaN */
        }
    }
    return weight;
}

static void equal(const void *found, const void *expected, size_t size) { CHECK(!size || !memcmp(found, expected, size)); }

static void conversions(int dtype, size_t rows, size_t groups, int n, int m) {
    const size_t size = size_of(dtype), columns = groups * (size_t)m, kept = groups * (size_t)n;
    const size_t stride = (columns + 31) / 32 * 4, index_bytes = (kept * (m <= 4 ? 2 : 4) + 7) / 8;
    uint8_t *weight = weight_with_specials(dtype, rows, columns, (size_t)n, (size_t)m);
    int64_t *offsets = exactly((rows + 1) * sizeof *offsets), *offsets2 = exactly((rows + 1) * sizeof *offsets2);
    CHECK(sparc3_count_kept(dtype, weight, rows, columns, offsets, 1) == SPARC3_OK);
    const size_t count = (size_t)offsets[rows], wide = columns > 65536 ? 4 : 2;
    uint8_t *bits = exactly(rows * stride), *bits2 = exactly(rows * stride);
    void *values = exactly(count * size), *values2 = exactly(count * size);
    void *columns1 = exactly(count * wide), *columns2 = exactly(count * wide);
    void *nm_values = exactly(rows * kept * size), *nm_values2 = exactly(rows * kept * size);
    uint8_t *places = exactly(rows * index_bytes), *places2 = exactly(rows * index_bytes);
    CHECK(sparc3_bitmap_pack(dtype, weight, rows, columns, offsets, bits, values, count, 1) == SPARC3_OK);
    CHECK(sparc3_csr_pack(dtype, weight, rows, columns, offsets, columns1, values2, count, 1) == SPARC3_OK);
    CHECK(sparc3_nm_pack(dtype, weight, rows, columns, n, m, nm_values, places, NULL, 1) == SPARC3_OK);
    const sparc3_bitmap bitmap = {dtype, rows, columns, count, bits, values, offsets};
    const sparc3_csr csr = {dtype, rows, columns, count, columns1, values, offsets};
    const sparc3_nm nm = {dtype, n, m, rows, columns, nm_values, places};

    CHECK(sparc3_bitmap_to_csr(&bitmap, columns2, 2) == SPARC3_OK);
    equal(columns2, columns1, count * wide);
    CHECK(sparc3_csr_to_bitmap(&csr, bits2, 2) == SPARC3_OK);
    equal(bits2, bits, rows * stride);
    CHECK(sparc3_bitmap_to_nm(&bitmap, n, m, nm_values2, places2, NULL, 2) == SPARC3_OK);
    equal(nm_values2, nm_values, rows * kept * size);
    equal(places2, places, rows * index_bytes);
    CHECK(sparc3_nm_count_kept(&nm, offsets2, 2) == SPARC3_OK);
    equal(offsets2, offsets, (rows + 1) * sizeof *offsets);
    memset(bits2, 7, rows * stride);
    CHECK(sparc3_nm_to_bitmap(&nm, offsets2, bits2, values2, count, 2) == SPARC3_OK);
    equal(bits2, bits, rows * stride);
    equal(values2, values, count * size);

    for (int mutation = 0; mutation < 12; ++mutation) {
        switch (next_random(4)) {
            case 0: bits[next_random((uint32_t)(rows * stride))] ^= (uint8_t)(1u << next_random(8)); break;
            case 1: offsets[next_random((uint32_t)rows + 1)] = (int64_t)next_random(100000) - 50000; break;
            case 2: places[next_random((uint32_t)(rows * index_bytes))] = (uint8_t)next_random(256); break;
            default:
                if (count) ((uint8_t *)columns1)[next_random((uint32_t)(count * wide))] = (uint8_t)next_random(256);
        }
        CHECK(allowed(sparc3_bitmap_to_csr(&bitmap, columns2, 1)));
        CHECK(allowed(sparc3_csr_to_bitmap(&csr, bits2, 1)));
        const int status = sparc3_bitmap_to_nm(&bitmap, n, m, nm_values2, places2, NULL, 1);
        CHECK(allowed(status) || status == SPARC3_ERROR_PATTERN);
        CHECK(allowed(sparc3_nm_to_bitmap(&nm, offsets, bits2, values2, count, 1)));
    }
    free(weight), free(offsets), free(offsets2), free(bits), free(bits2), free(values), free(values2);
    free(columns1), free(columns2), free(nm_values), free(nm_values2), free(places), free(places2);
}

static void bad_arguments(void) {
    float values[4] = {1, 2, 3, 4}, out[4];
    uint8_t bits[4] = {0x66}, places[1] = {0xcc}, made[4];
    uint16_t columns[4] = {1, 2, 5, 6};
    int64_t offsets[2] = {0, 4};
    uint64_t wrong = 7;
    sparc3_bitmap b = {SPARC3_FP32, 1, 8, 4, bits, values, offsets};
    sparc3_csr c = {SPARC3_FP32, 1, 8, 4, columns, values, offsets};
    sparc3_nm w = {SPARC3_FP32, 2, 4, 1, 8, values, places};
    CHECK(sparc3_bitmap_to_csr(NULL, columns, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_csr(&b, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_csr(&b, values, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_csr_to_bitmap(NULL, made, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_csr_to_bitmap(&c, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_csr_to_bitmap(&c, (uint8_t *)offsets, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_bitmap_to_nm(NULL, 2, 4, out, made, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_nm(&b, 5, 4, out, made, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_nm(&b, 1, 3, out, made, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_nm(&b, 2, 4, NULL, made, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_bitmap_to_nm(&b, 2, 4, values, made, NULL, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_bitmap_to_nm(&b, 2, 4, out, (uint8_t *)out, NULL, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_bitmap_to_nm(&b, 1, 2, out, made, &wrong, 1) == SPARC3_OK && wrong == 7);
    CHECK(sparc3_bitmap_to_nm(&b, 1, 4, out, made, &wrong, 1) == SPARC3_ERROR_PATTERN && wrong == 0);
    CHECK(sparc3_nm_count_kept(NULL, offsets, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_count_kept(&w, NULL, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_count_kept(&w, (int64_t *)(void *)values, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_nm_to_bitmap(&w, NULL, made, out, 4, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_to_bitmap(&w, offsets, NULL, out, 4, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_to_bitmap(&w, offsets, made, NULL, 4, 1) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_nm_to_bitmap(&w, offsets, made, values, 4, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_nm_to_bitmap(&w, offsets, (uint8_t *)out, out, 4, 1) == SPARC3_ERROR_OVERLAP);
    CHECK(sparc3_nm_to_bitmap(&w, offsets, made, offsets, 4, 1) == SPARC3_ERROR_OVERLAP);
    offsets[1] = 3; /* one value more than there is room for, then one less */
    CHECK(sparc3_nm_to_bitmap(&w, offsets, made, out, 3, 1) == SPARC3_ERROR_FORMAT);
    offsets[1] = 4;
    values[3] = -0.0f;
    CHECK(sparc3_nm_to_bitmap(&w, offsets, made, out, 4, 1) == SPARC3_ERROR_FORMAT);
}

static void test(void) {
    bad_arguments();
    for (int round = 0; round < 60; ++round) {
        const int m = 1 + (int)next_random(16), n = 1 + (int)next_random((uint32_t)m);
        conversions((int)next_random(3), 1 + next_random(9), 1 + next_random(40), n, m);
    }
    conversions(SPARC3_BF16, 2, 16385, 2, 4); /* 65540 columns: indices of 32 bits */
}

int main(void) {
    with_every_instruction_set(test);
    return 0;
}
