// Blocking, for the rows of acc that a thread has taken:
//
//     batches of samples            about kBatchTokens tokens, so that a block of each operand fits the cache
//       blocks of columns           x packed once:   [tokens x block_k], half of a level-2 cache
//         blocks of rows            g packed:        [tokens x kBlockN]
//           tiles                   all samples of the batch inside the tile; acc is read and written once
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
    size_t batch;    // samples
    size_t tokens;   // of a batch
    size_t block_k;
    int threads;

    Plan(size_t samples, size_t length, size_t n, size_t k, int wanted) {
        batch = std::min(samples, std::max<size_t>(1, kBatchTokens / length));
        tokens = batch * length;
        const size_t fits = kBlockBytes / sizeof(float) / tokens / kStepK * kStepK;
        block_k = std::clamp(fits, kStepK, (k + kStepK - 1) / kStepK * kStepK);
        // Below about 50 us of work a second thread does not pay.
        threads = samples * length * n * k < (1u << 20) ? 1 : available_threads(wanted);
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
    const Plan plan(samples, tokens, n, k, threads);
    return plan.floats_per_thread() * sizeof(float) * static_cast<size_t>(plan.threads);
}

int sparc3_weight_relevance(int dtype, int reduction, const void *g, const void *x, size_t samples, size_t tokens,
                            size_t n, size_t k, float *acc, int threads, void *workspace, size_t workspace_size) {
    if (dtype < SPARC3_FP32 || dtype > SPARC3_FP16 || reduction < SPARC3_ABS || reduction > SPARC3_SQUARE)
        return SPARC3_ERROR_ARGUMENT;
    if (!samples || !tokens || !n || !k) return SPARC3_OK;
    if (!g || !x || !acc || !workspace) return SPARC3_ERROR_ARGUMENT;
    const Plan plan(samples, tokens, n, k, threads);
    const size_t needed = sparc3_weight_relevance_workspace_size(samples, tokens, n, k, threads);
    if (workspace_size < needed) return SPARC3_ERROR_WORKSPACE;

    const Kernels &isa = kernels();
    const size_t tile_n = static_cast<size_t>(isa.tile_n), tile_k = static_cast<size_t>(isa.tile_k);
    const size_t element = dtype == SPARC3_FP32 ? 4 : 2;
    const Operand from_g{static_cast<const char *>(g), element, n}, from_x{static_cast<const char *>(x), element, k};

    parallel(plan.threads, parts_for(plan.threads), [&](int thread, int part) {
        const Slice mine = slice(n, kStepN, parts_for(plan.threads), part);
        if (!mine.size) return;
        float *packed_x = static_cast<float *>(workspace) + plan.floats_per_thread() * static_cast<size_t>(thread);
        float *packed_g = packed_x + plan.tokens * plan.block_k;
        for (size_t s = 0; s < samples; s += plan.batch) {
            const size_t batch = std::min(plan.batch, samples - s), rows = batch * tokens;
            for (size_t k0 = 0; k0 < k; k0 += plan.block_k) {
                const size_t block_k = std::min(plan.block_k, k - k0);
                isa.pack(dtype, from_x.at(s * tokens, k0), rows, k, block_k, isa.tile_k, packed_x);
                for (size_t n0 = mine.begin; n0 < mine.begin + mine.size; n0 += kBlockN) {
                    const size_t block_n = std::min(kBlockN, mine.begin + mine.size - n0);
                    isa.pack(dtype, from_g.at(s * tokens, n0), rows, n, block_n, isa.tile_n, packed_g);
                    for (size_t i = 0; i < block_n; i += tile_n)
                        for (size_t j = 0; j < block_k; j += tile_k)
                            isa.tile(reduction == SPARC3_SQUARE, packed_g + i * rows, packed_x + j * rows, batch,
                                     tokens, acc + (n0 + i) * k + k0 + j, k,
                                     static_cast<int>(std::min(tile_n, block_n - i)),
                                     static_cast<int>(std::min(tile_k, block_k - j)));
                }
            }
        }
    });
    return SPARC3_OK;
}
