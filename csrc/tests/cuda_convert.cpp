// The CUDA kernels that turn one packed format into another, byte by byte against what the CPU library packs.
#include "cuda_packed.h"

namespace {

int test_conversion(int dtype, size_t rows, size_t groups, int n, int m) {
    const size_t columns = groups * static_cast<size_t>(m), kept = groups * static_cast<size_t>(n);
    const size_t size = dtype == SPARC3_FP32 ? 4 : 2, words = (columns + 31) / 32, wide = columns > 65536 ? 4 : 2;
    const size_t places_size = rows * ((kept * (m <= 4 ? 2 : 4) + 7) / 8);
    std::mt19937 random(static_cast<unsigned>(rows * 7 + columns));
    std::vector<uint8_t> weight(rows * columns * size);
    // Some rows are empty; some groups have fewer than n; any bits, so also NaN, and -0 among the zeros.
    for (size_t r = 0; r < rows; ++r)
        for (size_t g = 0; g < groups && r % 3 != 1; ++g)
            for (int k = 0; k < n; ++k) {
                const size_t at = r * columns + g * static_cast<size_t>(m) + random() % static_cast<unsigned>(m);
                for (size_t b = 0; b < size; ++b) weight[at * size + b] = static_cast<uint8_t>(random());
                if (random() % 5 == 0) {
                    for (size_t b = 0; b < size; ++b) weight[at * size + b] = 0;
                    weight[at * size + size - 1] = 0x80;
                }
            }
    std::vector<int64_t> offsets(rows + 1), offsets2(rows + 1, 7);
    CHECK(!sparc3_count_kept(dtype, weight.data(), rows, columns, offsets.data(), 1));
    const size_t count = static_cast<size_t>(offsets[rows]);
    std::vector<uint32_t> bits(rows * words), bits2(rows * words, 7);
    std::vector<uint8_t> values(count * size), values2(count * size, 7), indices(count * wide), indices2(count * wide, 7);
    std::vector<uint8_t> grouped(rows * kept * size), grouped2(rows * kept * size, 7);
    std::vector<uint8_t> places(places_size), places2(places_size, 7);
    const auto bytes = [](std::vector<uint32_t> &from) { return reinterpret_cast<uint8_t *>(from.data()); };
    CHECK(!sparc3_bitmap_pack(dtype, weight.data(), rows, columns, offsets.data(), bytes(bits), values.data(), count, 1));
    CHECK(!sparc3_csr_pack(dtype, weight.data(), rows, columns, offsets.data(), indices.data(), values2.data(), count, 1));
    CHECK(!sparc3_nm_pack(dtype, weight.data(), rows, columns, n, m, grouped.data(), places.data(), nullptr, 1));
    const sparc3_bitmap bitmap{dtype, rows, columns, count, bytes(bits), values.data(), offsets.data()};
    const sparc3_csr csr{dtype, rows, columns, count, indices.data(), values.data(), offsets.data()};
    const sparc3_nm nm{dtype, n, m, rows, columns, grouped.data(), places.data()};

    CHECK(!sparc3_cuda_bitmap_to_csr(&bitmap, indices2.data(), nullptr));
    CHECK(indices2 == indices);
    CHECK(!sparc3_cuda_csr_to_bitmap(&csr, bytes(bits2), nullptr));
    CHECK(bits2 == bits);
    uint64_t wrong = 7;
    CHECK(!sparc3_cuda_bitmap_to_nm(&bitmap, n, m, grouped2.data(), places2.data(), &wrong, nullptr));
    CHECK(wrong == UINT64_MAX && grouped2 == grouped && places2 == places);
    CHECK(!sparc3_cuda_nm_count_kept(&nm, offsets2.data(), nullptr));
    CHECK(offsets2 == offsets);
    bits2.assign(bits2.size(), 7);
    values2.assign(values2.size(), 7);
    CHECK(!sparc3_cuda_nm_to_bitmap(&nm, offsets2.data(), bytes(bits2), values2.data(), count, nullptr));
    CHECK(bits2 == bits && values2 == values);
    return 0;
}

int test_refusals() {
    const uint32_t bits[] = {0x6f, 0x7};
    const uint16_t values[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const int64_t offsets[] = {0, 6, 9};
    sparc3_bitmap bitmap{SPARC3_BF16, 2, 8, 9, reinterpret_cast<const uint8_t *>(bits), values, offsets};
    uint16_t to[8];
    uint8_t places[4];
    uint64_t wrong;
    CHECK(!sparc3_cuda_bitmap_to_nm(&bitmap, 2, 4, to, places, &wrong, nullptr));
    CHECK(wrong == 0);
    bitmap.rows = 1, bitmap.bits += 4, bitmap.offsets += 1;
    CHECK(!sparc3_cuda_bitmap_to_nm(&bitmap, 2, 4, to, places, &wrong, nullptr));
    CHECK(wrong == 0);
    CHECK(sparc3_cuda_bitmap_to_nm(&bitmap, 2, 4, to, places, nullptr, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_to_nm(&bitmap, 3, 2, to, places, &wrong, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_to_nm(&bitmap, 2, 3, to, places, &wrong, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_to_nm(nullptr, 2, 4, to, places, &wrong, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_to_csr(nullptr, to, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_to_csr(&bitmap, nullptr, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_csr_to_bitmap(nullptr, places, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_nm_count_kept(nullptr, nullptr, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_nm_to_bitmap(nullptr, offsets, places, to, 8, nullptr) == SPARC3_ERROR_ARGUMENT);
    bitmap.dtype = 3;
    CHECK(sparc3_cuda_bitmap_to_csr(&bitmap, to, nullptr) == SPARC3_ERROR_ARGUMENT);
    return 0;
}

}  // namespace

int test_conversions() {
    for (int dtype : {SPARC3_FP32, SPARC3_BF16, SPARC3_FP16})
        for (auto [n, m] : {std::pair<int, int>{1, 1}, {1, 2}, {2, 3}, {1, 4}, {2, 4}, {3, 4}, {4, 4}, {5, 7}, {4, 8}, {3, 11}, {16, 16}})
            // Sets of groups that end within a word, within a warp, and in its second round; no groups or rows.
            for (auto [rows, groups] : {std::pair<size_t, size_t>{1, 1}, {4, 13}, {3, 271}, {2, 0}, {0, 5}})
                CHECK(!test_conversion(dtype, rows, groups, n, m));
    CHECK(!test_conversion(SPARC3_BF16, 2, 16385, 2, 4));  // indices of 32 bits
    return test_refusals();
}
