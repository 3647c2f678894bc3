// Blocking:
//
//     batches of samples            about kBatchTokens tokens, so that a block of each operand fits the cache
//       blocks of columns           x packed once by each thread: [tokens x block_k], half of a level-2 cache
//         blocks of rows            dealt out to the threads; g packed: [tokens x kBlockN]
//           tiles                   all samples of the batch inside the tile; acc is read and written once
//
// Squares of tokens are formed while packing; the batch is one sample then, of any kBatchTokens tokens.
#include <algorithm>

#include "isa.h"
#include "sparc3/sparc3.h"
#include "threads.h"

namespace sparc3 {
namespace {

constexpr size_t kBatchTokens = 256;
constexpr size_t kBlockBytes = 768 << 10;
// Multiples of every instruction set's tile (rows 8, 6, 4; columns 48, 16, 8).
constexpr size_t kBlockN = 72, kStepN = 24, kStepK = 48;

struct Plan {
    size_t tokens;  // of a batch
    size_t block_k;
    int threads;

    Plan(int reduction, size_t samples, size_t length, size_t n, size_t k, int wanted) {
        const size_t total = samples * length, batches = (total + kBatchTokens - 1) / kBatchTokens;
        if (reduction == SPARC3_TOKEN_SQUARE)
            tokens = (total + batches - 1) / batches;
        else
            tokens = length * std::min(samples, std::max<size_t>(1, kBatchTokens / length));
        const size_t fits = kBlockBytes / sizeof(float) / tokens / kStepK * kStepK;
        block_k = std::clamp(fits, kStepK, (k + kStepK - 1) / kStepK * kStepK);
        // Below about 50 us of work a second thread does not pay.
        threads = total * n * k < (1u << 20) ? 1 : available_threads(wanted);
        threads = std::min<int>(threads, static_cast<int>(std::min<size_t>(kMaxThreads, (n + kStepN - 1) / kStepN)));
    }
    size_t floats_per_thread() const { return tokens * (block_k + kBlockN); }
};

struct Operand {
    const char *data;
    size_t element, width;
    const char *at(size_t token, size_t column) const { return data + (token * width + column) * element; }
};

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_weight_relevance_workspace_size(size_t samples, size_t tokens, size_t n, size_t k, int threads) {
    if (!samples || !tokens || !n || !k) return 0;
    const Plan by_sample(SPARC3_ABS, samples, tokens, n, k, threads);
    const Plan by_token(SPARC3_TOKEN_SQUARE, samples, tokens, n, k, threads);
    return std::max(by_sample.floats_per_thread(), by_token.floats_per_thread()) * sizeof(float) *
           static_cast<size_t>(by_sample.threads);
}

int sparc3_weight_relevance(int dtype, int reduction, const void *g, const void *x, size_t samples, size_t tokens,
                            size_t n, size_t k, float *acc, int threads, void *workspace, size_t workspace_size) {
    if (dtype < SPARC3_FP32 || dtype > SPARC3_FP16 || reduction < SPARC3_ABS || reduction > SPARC3_TOKEN_SQUARE)
        return SPARC3_ERROR_ARGUMENT;
    if (!samples || !tokens || !n || !k) return SPARC3_OK;
    if (!g || !x || !acc || !workspace) return SPARC3_ERROR_ARGUMENT;
    if (workspace_size < sparc3_weight_relevance_workspace_size(samples, tokens, n, k, threads))
        return SPARC3_ERROR_WORKSPACE;

    const Plan plan(reduction, samples, tokens, n, k, threads);
    const Kernels &isa = kernels();
    const size_t tile_n = static_cast<size_t>(isa.tile_n), tile_k = static_cast<size_t>(isa.tile_k);
    const size_t element = dtype == SPARC3_FP32 ? 4 : 2, total = samples * tokens;
    const bool squared = reduction == SPARC3_TOKEN_SQUARE;
    const Operand from_g{static_cast<const char *>(g), element, n}, from_x{static_cast<const char *>(x), element, k};

    for (size_t t = 0; t < total; t += plan.tokens) {
        const size_t rows = std::min(plan.tokens, total - t), length = squared ? rows : tokens;
        for (size_t k0 = 0; k0 < k; k0 += plan.block_k) {
            const size_t block_k = std::min(plan.block_k, k - k0);
            bool has_x[kMaxThreads] = {};
            parallel(plan.threads, parts_for(plan.threads), [&](int thread, int part) {
                const Slice mine = slice(n, kStepN, parts_for(plan.threads), part);
                if (!mine.size) return;
                float *packed_x = static_cast<float *>(workspace) + plan.floats_per_thread() * static_cast<size_t>(thread);
                float *packed_g = packed_x + plan.tokens * plan.block_k;
                if (!has_x[thread]) isa.pack(dtype, squared, from_x.at(t, k0), rows, k, block_k, isa.tile_k, packed_x);
                has_x[thread] = true;
                for (size_t n0 = mine.begin; n0 < mine.begin + mine.size; n0 += kBlockN) {
                    const size_t block_n = std::min(kBlockN, mine.begin + mine.size - n0);
                    isa.pack(dtype, squared, from_g.at(t, n0), rows, n, block_n, isa.tile_n, packed_g);
                    for (size_t i = 0; i < block_n; i += tile_n)
                        for (size_t j = 0; j < block_k; j += tile_k)
                            isa.tile(reduction, packed_g + i * rows, packed_x + j * rows, rows / length, length,
                                     acc + (n0 + i) * k + k0 + j, k, static_cast<int>(std::min(tile_n, block_n - i)),
                                     static_cast<int>(std::min(tile_k, block_k - j)));
                }
            });
        }
    }
    return SPARC3_OK;
}
