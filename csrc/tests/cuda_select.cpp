// The selection kernels, emulated, against the CPU library: states and masks byte for byte, for chips with much and
// little shared memory, in both orders of blocks, warps and lanes.
#include <stdio.h>

#include <random>
#include <string>
#include <vector>

#include "cuda_emulation.h"
#include "sparc3/sparc3_cuda.h"

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, current_case.c_str());    \
            return 1;                                                                                    \
        }                                                                                                \
    } while (0)

namespace {

std::string current_case;
const char *const kKinds[] = {"any bits", "normal",    "one value", "two values", "five values", "zeros",
                              "sorted",   "neighbours", "infinite",  "subnormal"};

// Bits of a score in the upper half or all of the word.
uint32_t narrowed(int dtype, float value) {
    uint32_t bits = (uint32_t)emulation::bits_of(value);
    if (dtype == SPARC3_FP32) return bits;
    if (dtype == SPARC3_BF16) return bits & 0xffff0000u;
    // fp16: any numbers will do.
    return (bits & 0x80000000u) | ((bits & 0x7fffffffu) / 3 & 0x7bff0000u);
}

bool is_nan(int dtype, uint32_t bits) { return (bits & 0x7fffffff) > (dtype == SPARC3_FP16 ? 0x7c000000u : 0x7f800000u); }

// n scores of a dtype in memory that begins `skew` scores after 64 bytes.
struct Scores {
    int dtype;
    size_t n, skew;
    std::vector<uint8_t> memory;

    Scores(int dtype, size_t n, size_t skew, const std::string &kind) : dtype(dtype), n(n), skew(skew) {
        memory.resize((n + skew) * size() + 64);
        std::mt19937 random(static_cast<unsigned>(n * 31 + skew));
        std::normal_distribution<float> normal;
        std::vector<uint32_t> bits(n);
        const uint32_t infinity = dtype == SPARC3_FP16 ? 0x7c000000u : 0x7f800000u;
        for (size_t i = 0; i < n; ++i) {
            const uint32_t dice = (uint32_t)random();
            if (kind == "any bits") bits[i] = is_nan(dtype, dice) ? dice & 0x80ffffffu : dice;
            if (kind == "normal" || kind == "sorted") bits[i] = narrowed(dtype, normal(random));
            if (kind == "one value") bits[i] = narrowed(dtype, -0.75f);
            if (kind == "two values") bits[i] = narrowed(dtype, dice % 3 ? 1.5f : -2.0f);
            if (kind == "five values") bits[i] = narrowed(dtype, (float)(dice % 5) - 2);
            if (kind == "zeros") bits[i] = dice % 4 ? dice & 0x80000000u : narrowed(dtype, normal(random));
            if (kind == "neighbours") bits[i] = narrowed(dtype, 1) + (dtype == SPARC3_FP32 ? dice % 70000 : 0);
            if (kind == "infinite") bits[i] = dice % 2 ? infinity | (dice & 0x80000000u) : narrowed(dtype, normal(random));
            if (kind == "subnormal") bits[i] = dice & 0x800fffffu;
        }
        if (kind == "sorted")
            std::sort(bits.begin(), bits.end(), [](uint32_t a, uint32_t b) { return (int32_t)a < (int32_t)b; });
        for (size_t i = 0; i < n; ++i) put(i, bits[i]);
    }
    size_t size() const { return dtype == SPARC3_FP32 ? 4 : 2; }
    uint8_t *data() { return memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64 + skew * size(); }
    uint8_t *at(size_t i) { return data() + i * size(); }
    void put(size_t i, uint32_t bits) {
        const uint32_t value = dtype == SPARC3_FP32 ? bits : bits >> 16;
        memcpy(at(i), &value, size());
    }
};

using State = std::vector<uint64_t>;

int check_stream(Scores &scores, const std::vector<size_t> &ends, uint64_t prune) {
    State state(sparc3_select_state_size() / 8), expected = state;
    sparc3_threshold threshold, left;
    CHECK(sparc3_cuda_select_state_size() == sparc3_select_state_size());
    CHECK(sparc3_cuda_select_init(state.data(), scores.dtype, nullptr) == SPARC3_OK);
    CHECK(sparc3_select_init(expected.data(), scores.dtype) == SPARC3_OK);
    for (int more = 1; more;) {
        size_t begin = 0;
        for (size_t end : ends) {
            CHECK(sparc3_cuda_select_count(state.data(), scores.dtype, scores.at(begin), end - begin, nullptr) == SPARC3_OK);
            CHECK(sparc3_select_count(expected.data(), scores.at(begin), end - begin, 1, nullptr, 0) == SPARC3_OK);
            begin = end;
        }
        CHECK(state == expected);
        CHECK(sparc3_cuda_select_threshold(state.data(), &left, nullptr) == SPARC3_ERROR_STATE);
        CHECK(sparc3_cuda_select_refine(state.data(), prune, nullptr) == SPARC3_OK);
        CHECK(sparc3_select_refine(expected.data(), prune, &more) == SPARC3_OK);
        CHECK(state == expected);
    }
    CHECK(sparc3_cuda_select_threshold(state.data(), &threshold, nullptr) == SPARC3_OK);
    size_t begin = 0;
    for (size_t end : ends) {
        const size_t n = end - begin;
        std::vector<uint8_t> bits((n + 7) / 8 + 1, 0xee), wanted = bits;
        std::vector<uint8_t> workspace(sparc3_cuda_select_mask_workspace_size(n));
        CHECK(sparc3_cuda_select_mask(state.data(), scores.dtype, scores.at(begin), n, bits.data(), workspace.data(),
                                      workspace.size(), nullptr) == SPARC3_OK);
        CHECK(sparc3_select_mask(scores.dtype, scores.at(begin), n, &threshold, wanted.data(), 1) == SPARC3_OK);
        CHECK(bits == wanted);
        CHECK(sparc3_select_threshold(state.data(), &left) == SPARC3_OK && left.keep_equal == threshold.keep_equal);
        begin = end;
    }
    return 0;
}

int check_rows(Scores &scores, size_t rows, size_t cols, size_t prune) {
    std::vector<uint8_t> bits((rows * cols + 7) / 8 + 1, 0xee), wanted = bits;
    std::vector<uint8_t> workspace(sparc3_select_rows_workspace_size(cols, 1));
    uint32_t error = 99;
    CHECK(sparc3_cuda_select_rows(scores.dtype, scores.data(), rows, cols, prune, bits.data(), &error, nullptr) == SPARC3_OK);
    CHECK(error == SPARC3_OK);
    CHECK(sparc3_select_rows(scores.dtype, scores.data(), rows, cols, prune, wanted.data(), 1, workspace.data(),
                             workspace.size()) == SPARC3_OK);
    CHECK(bits == wanted);
    return 0;
}

int check_streams(int dtype) {
    for (const char *kind : kKinds) {
        for (size_t n : {1, 33, 5000, 150001}) {
            Scores scores(dtype, n, n % 5, kind);
            // Chunks that begin anywhere, one of them empty.
            const std::vector<size_t> ends = {n / 7, n / 7, n / 2, n};
            for (uint64_t prune : {(uint64_t)0, (uint64_t)n / 3, (uint64_t)n - 1, (uint64_t)n}) {
                if (n == 150001 && prune != n / 3) continue;  // the large ones take long
                current_case = std::string(kind) + ", dtype " + std::to_string(dtype) + ", " + std::to_string(n) +
                               " scores, pruned " + std::to_string(prune) + ", backwards " +
                               std::to_string(emulation::backwards);
                if (check_stream(scores, ends, prune)) return 1;
            }
        }
    }
    return 0;
}

int check_all_rows(int dtype) {
    // Rows in one to eight steps and read again, that begin at bytes or not; fewer and more than the blocks.
    const struct {
        size_t rows, cols;
    } shapes[] = {{1, 1}, {70, 3}, {5, 8}, {19, 131}, {3, 4096}, {9, 4101}, {3, 9000}, {2, 32760}, {2, 40001}};
    for (const char *kind : kKinds)
        for (const auto &shape : shapes) {
            Scores scores(dtype, shape.rows * shape.cols, shape.cols % 3, kind);
            for (size_t prune : {(size_t)0, shape.cols / 2, shape.cols - 1, shape.cols}) {
                if (shape.cols > 8000 && prune != shape.cols / 2) continue;  // the large ones take long
                current_case = std::string(kind) + ", dtype " + std::to_string(dtype) + ", " +
                               std::to_string(shape.rows) + " x " + std::to_string(shape.cols) + ", pruned " +
                               std::to_string(prune) + ", backwards " + std::to_string(emulation::backwards);
                if (check_rows(scores, shape.rows, shape.cols, prune)) return 1;
            }
        }
    return 0;
}

// More of each value in one block than a 16-bit counter takes, and more values than registers count.
int check_overflow(int dtype) {
    current_case = "overflow, dtype " + std::to_string(dtype);
    emulation::processors = 1;
    Scores scores(dtype, 400000, 0, "five values");
    const int failed = check_stream(scores, {scores.n}, scores.n / 2);
    emulation::processors = 2;
    return failed;
}

// Chunks counted by a device and by the CPU, added up.
int check_merge() {
    current_case = "merge";
    Scores scores(SPARC3_FP32, 20000, 0, "any bits");
    State one(sparc3_select_state_size() / 8), other = one, whole = one;
    CHECK(sparc3_cuda_select_init(one.data(), SPARC3_FP32, nullptr) == SPARC3_OK);
    CHECK(sparc3_select_init(other.data(), SPARC3_FP32) == SPARC3_OK);
    CHECK(sparc3_select_init(whole.data(), SPARC3_FP32) == SPARC3_OK);
    CHECK(sparc3_cuda_select_count(one.data(), SPARC3_FP32, scores.data(), 7001, nullptr) == SPARC3_OK);
    CHECK(sparc3_select_count(other.data(), scores.at(7001), 12999, 1, nullptr, 0) == SPARC3_OK);
    CHECK(sparc3_select_count(whole.data(), scores.data(), 20000, 1, nullptr, 0) == SPARC3_OK);
    CHECK(sparc3_select_merge(one.data(), other.data()) == SPARC3_OK);
    CHECK(one == whole);
    return 0;
}

int check_errors(int dtype) {
    current_case = "errors, dtype " + std::to_string(dtype);
    State state(sparc3_select_state_size() / 8);
    sparc3_threshold threshold;
    int more;
    uint8_t bits[64];
    uint32_t error;
    for (uint32_t nan : {0x7fff0000u, 0xffff0000u, dtype == SPARC3_FP16 ? 0x7c010000u : 0x7f810000u})
        for (size_t place : {0, 37, 499}) {
            Scores scores(dtype, 500, 1, "normal");
            scores.put(place, nan);
            CHECK(sparc3_cuda_select_init(state.data(), dtype, nullptr) == SPARC3_OK);
            CHECK(sparc3_cuda_select_count(state.data(), dtype, scores.data(), 500, nullptr) == SPARC3_OK);
            CHECK(sparc3_cuda_select_refine(state.data(), 250, nullptr) == SPARC3_OK);
            CHECK(sparc3_select_refine(state.data(), 250, &more) == SPARC3_ERROR_NAN);
            CHECK(sparc3_select_threshold(state.data(), &threshold) == SPARC3_ERROR_NAN);
            CHECK(sparc3_cuda_select_rows(dtype, scores.data(), 4, 125, 60, bits, &error, nullptr) == SPARC3_OK);
            CHECK(error == SPARC3_ERROR_NAN);
        }
    Scores scores(dtype, 500, 0, "normal");
    CHECK(sparc3_cuda_select_init(state.data(), dtype, nullptr) == SPARC3_OK);
    CHECK(sparc3_cuda_select_count(state.data(), dtype, scores.data(), 500, nullptr) == SPARC3_OK);
    CHECK(sparc3_cuda_select_refine(state.data(), 501, nullptr) == SPARC3_OK);
    CHECK(sparc3_select_threshold(state.data(), &threshold) == SPARC3_ERROR_ARGUMENT);

    CHECK(sparc3_cuda_select_init(state.data(), 3, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_select_init(nullptr, dtype, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_select_count(state.data(), dtype, nullptr, 1, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_select_mask(state.data(), dtype, scores.data(), 500, bits, bits, 3, nullptr) == SPARC3_ERROR_WORKSPACE);
    CHECK(sparc3_cuda_select_rows(dtype, scores.data(), 4, 125, 126, bits, &error, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_select_rows(dtype, nullptr, 4, 125, 60, bits, &error, nullptr) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_cuda_select_rows(dtype, nullptr, 0, 125, 60, nullptr, &error, nullptr) == SPARC3_OK);
    return 0;
}

// fp32 scores that are others in the second pass.
int check_changed() {
    current_case = "changed";
    State state(sparc3_select_state_size() / 8);
    sparc3_threshold threshold;
    Scores first(SPARC3_FP32, 500, 0, "normal"), second(SPARC3_FP32, 500, 0, "one value");
    CHECK(sparc3_cuda_select_init(state.data(), SPARC3_FP32, nullptr) == SPARC3_OK);
    for (Scores *scores : {&first, &second}) {
        CHECK(sparc3_cuda_select_count(state.data(), SPARC3_FP32, scores->data(), 500, nullptr) == SPARC3_OK);
        CHECK(sparc3_cuda_select_refine(state.data(), 250, nullptr) == SPARC3_OK);
    }
    CHECK(sparc3_cuda_select_threshold(state.data(), &threshold, nullptr) == SPARC3_ERROR_CHANGED);
    return 0;
}

}  // namespace

int main() {
    // Each order with one of the two kinds of chips; rows take little shared memory on any.
    for (const bool order : {false, true}) {
        emulation::backwards = order;
        emulation::shared_limit = (order ? 99 : 227) << 10;
        for (int dtype : {SPARC3_FP32, SPARC3_BF16, SPARC3_FP16})
            if (check_streams(dtype) || check_overflow(dtype) || check_errors(dtype) || check_all_rows(dtype)) return 1;
        if (check_merge() || check_changed()) return 1;
    }
    printf("passed\n");
    return 0;
}
