// The CUDA kernels of packed weights on the CPU (cuda_emulation.h): arranged, restored bit by bit, and multiplied
// against fp64, in both orders of the emulation.
#include "cuda_packed.h"

namespace {

struct Arranged {
    std::vector<uint4> masks, values;
    std::vector<uint32_t> starts;
    sparc3_cuda_bitmap w;
};

int arrange(const Weight &weight, Arranged *out) {
    const size_t rows = weight.rows, columns = weight.columns, chunks = sparc3_cuda_bitmap_chunks(rows, columns);
    std::vector<int64_t> offsets(rows + 1);
    CHECK(!sparc3_count_kept(weight.dtype, weight.at(), rows, columns, offsets.data(), 1));
    const size_t count = static_cast<size_t>(offsets[rows]);
    std::vector<uint8_t> bits(rows * 4 * ((columns + 31) / 32));
    std::vector<uint16_t> values(count);
    CHECK(!sparc3_bitmap_pack(weight.dtype, weight.at(), rows, columns, offsets.data(), bits.data(), values.data(), count, 1));

    out->masks.assign(chunks * 32, uint4{7, 7, 7, 7});
    out->starts.assign(chunks + 1, 7);
    uint32_t *masks = reinterpret_cast<uint32_t *>(out->masks.data()), deepest = 7;
    CHECK(!sparc3_cuda_bitmap_arrange_masks(bits.data(), rows, columns, masks, out->starts.data(), &deepest, nullptr));
    out->values.assign(out->starts[chunks], uint4{7, 7, 7, 7});
    CHECK(!sparc3_cuda_bitmap_arrange_values(weight.dtype, offsets.data(), values.data(), rows, columns, masks,
                                             out->starts.data(), out->values.data(), nullptr));
    // Odd counts of lanes and ends on 16 bytes are all that is added.
    CHECK(out->values.size() * 8 >= count && out->values.size() * 8 <= count + chunks * (32 + 8));
    CHECK(deepest <= 64 && (deepest > 0) == (count > 0));
    out->w = {weight.dtype, rows, columns, masks, out->starts.data(), out->values.data(), deepest};
    return 0;
}

int test_bitmap(const Weight &weight, const std::vector<size_t> &batches) {
    Arranged arranged;
    CHECK(!arrange(weight, &arranged));
    std::vector<uint16_t> dense(weight.bits.size(), 7);
    CHECK(!sparc3_cuda_bitmap_unpack(&arranged.w, dense.data(), nullptr));
    CHECK(same_bits(dense, weight));
    for (size_t batch : batches) {
        const Product product(weight, batch);
        std::vector<float> workspace(
            sparc3_cuda_bitmap_linear_workspace_size(weight.rows, weight.columns, batch) / sizeof(float) + 1);
        for (bool biased : {false, true}) {
            std::vector<uint16_t> y(batch * weight.rows, 0x7fff);
            CHECK(!sparc3_cuda_bitmap_linear(&arranged.w, product.x(), batch, biased ? product.bias() : nullptr,
                                             y.data(), workspace.data(), workspace.size() * 4, nullptr));
            CHECK(product.close(y, biased));
        }
    }
    return 0;
}

int test_two_of_four(const Weight &weight, const std::vector<size_t> &batches) {
    const size_t rows = weight.rows, columns = weight.columns, steps = sparc3_cuda_two_of_four_steps(rows, columns);
    std::vector<uint16_t> kept(rows * columns / 2);
    std::vector<uint8_t> indices(rows * ((columns / 2 + 3) / 4));
    CHECK(!sparc3_nm_pack(weight.dtype, weight.at(), rows, columns, 2, 4, kept.data(), indices.data(), nullptr, 1));
    const sparc3_nm neutral{weight.dtype, 2, 4, rows, columns, kept.data(), indices.data()};
    std::vector<uint4> values(steps * 64, uint4{7, 7, 7, 7});
    std::vector<uint32_t> places(steps * 32, 7);
    CHECK(!sparc3_cuda_two_of_four_arrange(&neutral, values.data(), places.data(), nullptr));
    for (uint32_t word : places)  // what the ordered form of mma.sp wants
        for (int i = 0; i < 32; i += 4) CHECK((word >> i & 3) < (word >> (i + 2) & 3));
    const sparc3_cuda_two_of_four w{weight.dtype, rows, columns, values.data(), places.data()};
    std::vector<uint16_t> dense(weight.bits.size(), 7);
    CHECK(!sparc3_cuda_two_of_four_unpack(&w, dense.data(), nullptr));
    CHECK(same_bits(dense, weight));
    for (size_t batch : batches) {
        const Product product(weight, batch);
        std::vector<float> workspace(sparc3_cuda_two_of_four_linear_workspace_size(rows, columns, batch) / 4 + 1);
        for (bool biased : {false, true}) {
            std::vector<uint16_t> y(batch * rows, 0x7fff);
            CHECK(!sparc3_cuda_two_of_four_linear(&w, product.x(), batch, biased ? product.bias() : nullptr, y.data(),
                                                  workspace.data(), workspace.size() * 4, nullptr));
            CHECK(product.close(y, biased));
        }
    }
    return 0;
}

int test_two_of_four_refusals() {
    const Weight weight = two_of_four_weight(SPARC3_FP16, 3, 8);
    std::vector<uint16_t> kept(12), x(9), y(3);
    std::vector<uint8_t> indices(3);
    CHECK(!sparc3_nm_pack(weight.dtype, weight.at(), 3, 8, 2, 4, kept.data(), indices.data(), nullptr, 1));
    std::vector<uint4> values(64);
    std::vector<uint32_t> places(32);
    sparc3_nm neutral{SPARC3_FP16, 2, 4, 3, 8, kept.data(), indices.data()};
    CHECK(!sparc3_cuda_two_of_four_arrange(&neutral, values.data(), places.data(), nullptr));
    neutral.m = 8;
    CHECK(sparc3_cuda_two_of_four_arrange(&neutral, values.data(), places.data(), nullptr) == SPARC3_ERROR_ARGUMENT);
    sparc3_cuda_two_of_four w{SPARC3_FP16, 3, 8, values.data(), places.data()};
    std::vector<float> workspace(sparc3_cuda_two_of_four_linear_workspace_size(3, 8, 1) / 4);
    const auto linear = [&](const void *from, size_t size) {
        return sparc3_cuda_two_of_four_linear(&w, from, 1, nullptr, y.data(), workspace.data(), size, nullptr);
    };
    const size_t size = workspace.size() * 4;
    CHECK(linear(x.data(), size) == SPARC3_OK);
    CHECK(linear(x.data() + 1, size) == SPARC3_ERROR_ARGUMENT);  // two bytes off
    CHECK(linear(y.data(), size) == SPARC3_ERROR_OVERLAP);
    CHECK(linear(x.data(), size - 1) == SPARC3_ERROR_WORKSPACE);
    w.columns = 6;
    CHECK(linear(x.data(), size) == SPARC3_ERROR_ARGUMENT);
    w.columns = 8;
    w.places = nullptr;
    CHECK(linear(x.data(), size) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_two_of_four_unpack(&w, y.data(), nullptr) == SPARC3_ERROR_ARGUMENT);
    return 0;
}

int test_refusals() {
    const Weight weight = random_weight(SPARC3_BF16, 20, 64, 0.5);
    Arranged arranged;
    CHECK(!arrange(weight, &arranged));
    std::vector<uint16_t> x(64), y(20);
    std::vector<float> workspace(sparc3_cuda_bitmap_linear_workspace_size(20, 64, 1) / 4);
    const size_t size = workspace.size() * 4;
    sparc3_cuda_bitmap w = arranged.w;
    const auto linear = [&](const void *from, void *to, size_t workspace_size) {
        return sparc3_cuda_bitmap_linear(&w, from, 1, nullptr, to, workspace.data(), workspace_size, nullptr);
    };
    CHECK(linear(x.data(), y.data(), size) == SPARC3_OK);
    CHECK(linear(nullptr, y.data(), size) == SPARC3_ERROR_ARGUMENT);
    CHECK(linear(x.data(), nullptr, size) == SPARC3_ERROR_ARGUMENT);
    CHECK(linear(x.data(), y.data(), size - 1) == SPARC3_ERROR_WORKSPACE);
    CHECK(linear(x.data(), x.data(), size) == SPARC3_ERROR_OVERLAP);
    CHECK(linear(x.data(), workspace.data(), size) == SPARC3_ERROR_OVERLAP);
    w.dtype = SPARC3_FP32;
    CHECK(linear(x.data(), y.data(), size) == SPARC3_ERROR_ARGUMENT);
    w = arranged.w;
    w.deepest = 65;
    CHECK(linear(x.data(), y.data(), size) == SPARC3_ERROR_ARGUMENT);
    w = arranged.w;
    w.masks = nullptr;
    CHECK(sparc3_cuda_bitmap_unpack(&w, y.data(), nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_unpack(nullptr, y.data(), nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_bitmap_unpack(&arranged.w, nullptr, nullptr) == SPARC3_ERROR_ARGUMENT);
    uint32_t deepest;
    CHECK(sparc3_cuda_bitmap_arrange_masks(nullptr, 20, 64, nullptr, arranged.starts.data(), &deepest, nullptr) ==
          SPARC3_ERROR_ARGUMENT);
    return 0;
}

}  // namespace

int main() {
    for (bool order : {false, true}) {
        emulation::backwards = order;
        for (int dtype : {SPARC3_BF16, SPARC3_FP16}) {
            // One weight, odd sizes, whole chunks and strips, a rest of each, parts of several chunks.
            for (auto [rows, columns] : {std::pair<size_t, size_t>{1, 1}, {3, 40}, {16, 256}, {33, 300}, {20, 1027}})
                for (double sparsity : {0.0, 0.5, 0.97, 1.0})
                    CHECK(!test_bitmap(random_weight(dtype, rows, columns, sparsity), {1, 5, 16}));
            // Dense rows beside empty ones, so that lanes have from no to 64 words; every number of tiles, two passes.
            CHECK(!test_bitmap(striped_weight(dtype, 37, 520), {2, 8, 9, 17, 33, 65}));
            CHECK(!test_bitmap(random_weight(dtype, 4, 0, 0.5), {1, 9}));
            CHECK(!test_bitmap(random_weight(dtype, 0, 9, 0.5), {1}));
        }
        // Every part of several chunks: both buffers are used again.
        emulation::processors = 1;
        CHECK(!test_bitmap(random_weight(SPARC3_BF16, 260, 1290, 0.6), {3}));
        emulation::processors = 2;
        CHECK(!test_refusals());

        for (int dtype : {SPARC3_BF16, SPARC3_FP16}) {
            for (auto [rows, columns] : {std::pair<size_t, size_t>{1, 4}, {3, 40}, {16, 64}, {33, 300}, {70, 1028}})
                CHECK(!test_two_of_four(two_of_four_weight(dtype, rows, columns), {1, 5, 8, 16}));
            CHECK(!test_two_of_four(two_of_four_weight(dtype, 37, 132), {2, 9, 17, 33, 65}));
            CHECK(!test_two_of_four(two_of_four_weight(dtype, 4, 0), {1, 9}));
            CHECK(!test_two_of_four(two_of_four_weight(dtype, 0, 8), {1}));
        }
        CHECK(!test_two_of_four_refusals());
        CHECK(!test_conversions());
    }
    printf("passed\n");
    return 0;
}
