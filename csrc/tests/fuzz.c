/* A libFuzzer target: any bytes as a packed weight. Whatever the library says of it, it may touch no other memory, and
 * what its check calls sound it must unpack.
 *
 *     clang -g -fsanitize=fuzzer,address,undefined -Iinclude tests/fuzz.c <libsparc3 built with the same sanitizers>
 *
 * Without libFuzzer tests/fuzz_driver.c feeds it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "sparc3/sparc3.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

/* A buffer of its own, exactly `size` bytes, filled from the input and with zeros after its end. */
static void *take(input *from, size_t size) {
    const size_t given = size < from->left ? size : from->left;
    uint8_t *memory = malloc(size ? size : 1);
    if (!memory) abort();
    memcpy(memory, from->at, given);
    memset(memory + given, 0, size - given);
    from->at += given;
    from->left -= given;
    return memory;
}

static void agree(int checked, int unpacked, int multiplied) {
    if (checked == SPARC3_OK && (unpacked != SPARC3_OK || multiplied != SPARC3_OK)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 6) return 0;
    const int format = data[0] % 3, dtype = data[1] % 3, m = 1 + data[2] % 16, n = 1 + data[2] / 16 % m;
    const size_t element = dtype == SPARC3_FP32 ? 4 : 2, rows = 1 + data[3] % 19, count = data[5];
    const size_t columns = format == 1 ? (1 + data[4] % 40) * (size_t)m : (1 + data[4]) * (size_t)3;
    input rest = {data + 6, size - 6};
    void *out = malloc(rows * columns * element + 1), *y = malloc(rows * element + 1);
    void *x = calloc(columns + 1, element);
    const size_t work_size = sparc3_linear_workspace_size(rows, columns, 1, 1);
    void *work = malloc(work_size + 1), *parts[3] = {NULL, NULL, NULL};
    if (!out || !y || !x || !work) abort();
    if (format == 0) {
        int64_t *offsets = parts[0] = take(&rest, (rows + 1) * 8);
        uint8_t *bits = parts[1] = take(&rest, rows * ((columns + 31) / 32 * 4));
        parts[2] = take(&rest, count * element);
        const sparc3_bitmap weight = {dtype, rows, columns, count, bits, parts[2], offsets};
        agree(sparc3_bitmap_check(&weight, 1), sparc3_bitmap_unpack(&weight, out, 1),
              sparc3_bitmap_linear(&weight, x, 1, NULL, y, 1, work, work_size));
    } else if (format == 1) {
        const size_t kept = columns / (size_t)m * (size_t)n;
        uint8_t *indices = parts[0] = take(&rest, rows * ((kept * (m <= 4 ? 2 : 4) + 7) / 8));
        parts[1] = take(&rest, rows * kept * element);
        const sparc3_nm weight = {dtype, n, m, rows, columns, parts[1], indices};
        agree(sparc3_nm_check(&weight, 1), sparc3_nm_unpack(&weight, out, 1),
              sparc3_nm_linear(&weight, x, 1, NULL, y, 1, work, work_size));
    } else {
        int64_t *offsets = parts[0] = take(&rest, (rows + 1) * 8);
        void *indices = parts[1] = take(&rest, count * 2);
        parts[2] = take(&rest, count * element);
        const sparc3_csr weight = {dtype, rows, columns, count, indices, parts[2], offsets};
        agree(sparc3_csr_check(&weight, 1), sparc3_csr_unpack(&weight, out, 1),
              sparc3_csr_linear(&weight, x, 1, NULL, y, 1, work, work_size));
    }
    for (int i = 0; i < 3; ++i) free(parts[i]);
    free(out), free(y), free(x), free(work);
    return 0;
}
