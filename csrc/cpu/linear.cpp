// Few tokens by a weight that comes from memory: each element of the weight is read once a call, and meets a group of
// 16 tokens at a time from registers.
#include <string.h>

#include <algorithm>

#include "isa.h"
#include "sparc3/sparc3.h"
#include "threads.h"

namespace sparc3 {
namespace {

size_t groups_of(size_t tokens) { return (tokens + kTokenGroup - 1) / kTokenGroup; }

// A thread more for every 2^20 products: below that it takes longer to wake than to help.
int threads_for(size_t tokens, size_t n, size_t k, int wanted) {
    const size_t useful = 1 + (groups_of(tokens) * kTokenGroup * n * k >> 20);
    return static_cast<int>(std::min<size_t>(useful, static_cast<size_t>(available_threads(wanted))));
}

size_t padded(size_t columns) { return (columns + kTokenGroup - 1) / kTokenGroup * kTokenGroup; }

// Rows of the weight are summed up in so many chunks, and these in order: whole rows read like a stream, and the bits
// do not depend on the number of threads.
size_t chunks_of(size_t n) { return std::clamp<size_t>(n / 256, 1, 32); }

// packed[group][column][token of the group] = source[token][column], zeros beyond the last token.
void pack_tokens(const float *source, size_t tokens, size_t width, float *packed) {
    for (size_t t0 = 0; t0 < tokens; t0 += kTokenGroup, packed += width * kTokenGroup) {
        const size_t live = std::min(kTokenGroup, tokens - t0);
        for (size_t c0 = 0; c0 < width; c0 += kTokenGroup) {
            const size_t columns = std::min(kTokenGroup, width - c0);
            float *to = packed + c0 * kTokenGroup;
            if (live < kTokenGroup) memset(to, 0, columns * kTokenGroup * sizeof(float));
            for (size_t t = 0; t < live; ++t)
                for (size_t c = 0; c < columns; ++c) to[c * kTokenGroup + t] = source[(t0 + t) * width + c0 + c];
        }
    }
}

int check(const float *a, const float *w, const float *out, size_t tokens, size_t n, size_t k, const void *workspace,
          size_t workspace_size, size_t needed) {
    if (!tokens || !n || !k) return SPARC3_OK;
    if (!a || !w || !out || !workspace) return SPARC3_ERROR_ARGUMENT;
    return workspace_size < needed ? SPARC3_ERROR_WORKSPACE : SPARC3_OK;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_dense_linear_workspace_size(size_t tokens, size_t k) {
    return groups_of(tokens) * kTokenGroup * k * sizeof(float);
}

int sparc3_dense_linear(const float *x, const float *w, size_t tokens, size_t n, size_t k, float *y, int threads,
                        void *workspace, size_t workspace_size) {
    const size_t needed = sparc3_dense_linear_workspace_size(tokens, k);
    if (int status = check(x, w, y, tokens, n, k, workspace, workspace_size, needed)) return status;
    if (!tokens || !n) return SPARC3_OK;
    if (!k) return memset(y, 0, tokens * n * sizeof(float)), SPARC3_OK;
    float *packed = static_cast<float *>(workspace);
    pack_tokens(x, tokens, k, packed);
    const Kernels &isa = kernels();
    const int used = threads_for(tokens, n, k, threads);
    parallel(used, parts_for(used), [&](int, int part) {
        const Slice mine = slice(n, static_cast<size_t>(isa.linear_rows), parts_for(used), part);
        isa.linear(packed, w, tokens, n, k, mine.begin, mine.begin + mine.size, y);
    });
    return SPARC3_OK;
}

size_t sparc3_dense_input_gradient_workspace_size(size_t tokens, size_t n, size_t k) {
    return groups_of(tokens) * kTokenGroup * (n + chunks_of(n) * padded(k)) * sizeof(float);
}

int sparc3_dense_input_gradient(const float *g, const float *w, size_t tokens, size_t n, size_t k, float *dx,
                                int threads, void *workspace, size_t workspace_size) {
    const size_t needed = sparc3_dense_input_gradient_workspace_size(tokens, n, k);
    if (int status = check(g, w, dx, tokens, n, k, workspace, workspace_size, needed)) return status;
    if (!tokens || !k) return SPARC3_OK;
    if (!n) return memset(dx, 0, tokens * k * sizeof(float)), SPARC3_OK;
    const size_t groups = groups_of(tokens), chunks = chunks_of(n), of_group = padded(k) * kTokenGroup;
    float *packed = static_cast<float *>(workspace), *sums = packed + groups * kTokenGroup * n;
    pack_tokens(g, tokens, n, packed);
    const Kernels &isa = kernels();
    const int used = threads_for(tokens, n, k, threads);
    parallel(used, static_cast<int>(chunks), [&](int, int chunk) {
        const Slice mine = slice(n, 1, static_cast<int>(chunks), chunk);
        for (size_t group = 0; group < groups; ++group)
            isa.input_gradient(packed + group * kTokenGroup * n, w, n, k, mine.begin, mine.begin + mine.size,
                               sums + (static_cast<size_t>(chunk) * groups + group) * of_group);
    });
    for (size_t t = 0; t < tokens; ++t)
        for (size_t column = 0; column < k; column += kTokenGroup) {
            const float *from = sums + t / kTokenGroup * of_group + (column + t % kTokenGroup) * kTokenGroup;
            float total[kTokenGroup] = {};
            for (size_t chunk = 0; chunk < chunks; ++chunk, from += groups * of_group)
                for (size_t i = 0; i < kTokenGroup; ++i) total[i] += from[i];
            memcpy(dx + t * k + column, total, std::min(kTokenGroup, k - column) * sizeof(float));
        }
    return SPARC3_OK;
}
