/* Feeds tests/fuzz.c where libFuzzer is not at hand: weights that are close to sound, changed at random, always the same
 * ones. */
#include "hostile.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Offsets that climb to `count`, as even steps; then random bytes. Returns the length. */
static size_t make(uint8_t *data) {
    for (int i = 0; i < 4096; ++i) data[i] = (uint8_t)next_random(256);
    if (data[0] % 3 != 1) {
        const size_t rows = 1 + data[3] % 19;
        for (size_t row = 0; row <= rows; ++row) {
            const int64_t offset = (int64_t)(data[5] * row / rows);
            memcpy(data + 6 + 8 * row, &offset, 8);
        }
        if (data[0] % 3 == 0) {  /* as many bits as the row has values, from the first column on */
            const size_t stride = ((1 + data[4]) * (size_t)3 + 31) / 32 * 4;
            uint8_t *bits = data + 6 + 8 * (rows + 1);
            memset(bits, 0, rows * stride);
            for (size_t row = 0; row < rows; ++row) {
                const size_t many = data[5] * (row + 1) / rows - data[5] * row / rows;
                for (size_t c = 0; c < many && c < stride * 8; ++c) bits[row * stride + c / 8] |= (uint8_t)(1u << c % 8);
            }
        } else {  /* columns 0, 1, ... of each row */
            for (size_t row = 0; row < rows; ++row)
                for (size_t i = data[5] * row / rows, first = i; i < data[5] * (row + 1) / rows; ++i) {
                    const uint16_t column = (uint16_t)(i - first);
                    memcpy(data + 6 + 8 * (rows + 1) + 2 * i, &column, 2);
                }
        }
    }
    return 6 + next_random(4090);
}

static void test(void) {
    static uint8_t data[1 << 14];
    for (int round = 0; round < 2000; ++round) {
        const size_t size = make(data);
        for (int mutation = 0; mutation < 4; ++mutation) {
            LLVMFuzzerTestOneInput(data, size);
            data[6 + next_random(200)] ^= (uint8_t)(1u << next_random(8));
        }
    }
}

int main(void) {
    with_every_instruction_set(test);
    return 0;
}
