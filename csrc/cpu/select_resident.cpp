#include <string.h>

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "scores.h"

using namespace sparc3;

size_t sparc3_select_flat_workspace_size(int threads) {
    return sparc3_select_state_size() + sparc3_select_workspace_size(threads);
}

int sparc3_select_flat(int dtype, const void *scores, size_t n, uint64_t prune, uint8_t *bits, sparc3_threshold *out,
                       int threads, void *workspace, size_t workspace_size) {
    const int used = threads_for(n, threads);
    if (!workspace || workspace_size < sparc3_select_flat_workspace_size(used)) return SPARC3_ERROR_WORKSPACE;
    void *state = workspace, *bins = static_cast<char *>(workspace) + sparc3_select_state_size();
    const size_t bins_size = workspace_size - sparc3_select_state_size();
    int status = sparc3_select_init(state, dtype);
    for (int more = 1; status == SPARC3_OK && more;) {
        status = sparc3_select_count(state, scores, n, used, bins, bins_size);
        if (status == SPARC3_OK) status = sparc3_select_refine(state, prune, &more);
    }
    sparc3_threshold threshold;
    if (status == SPARC3_OK) status = sparc3_select_threshold(state, &threshold);
    if (status == SPARC3_OK && out) *out = threshold;
    if (status == SPARC3_OK && bits) status = sparc3_select_mask(dtype, scores, n, &threshold, bits, used);
    return status;
}

size_t sparc3_select_rows_workspace_size(size_t cols, int threads) {
    return rows_scratch(cols) * static_cast<size_t>(available_threads(threads));
}

int sparc3_select_rows(int dtype, const void *scores, size_t rows, size_t cols, size_t prune, uint8_t *bits,
                       int threads, void *workspace, size_t workspace_size) {
    if (!known(dtype) || prune > cols || cols > UINT32_MAX) return SPARC3_ERROR_ARGUMENT;
    if (!rows || !cols) return SPARC3_OK;
    if (!scores || !bits || !workspace) return SPARC3_ERROR_ARGUMENT;
    const int used = threads_for(rows * cols, threads);
    if (workspace_size < sparc3_select_rows_workspace_size(cols, used)) return SPARC3_ERROR_WORKSPACE;
    const Kernels &isa = kernels();
    std::atomic<bool> ok{true};
    parallel(used, [&](int t) {
        const Slice part = slice(rows, 8, used, t);  // eight rows always end at a byte
        void *scratch = static_cast<char *>(workspace) + rows_scratch(cols) * static_cast<size_t>(t);
        if (part.size && !isa.rows(dtype, at(dtype, scores, part.begin * cols), part.size, cols, prune,
                                   bits + part.begin * cols / 8, scratch))
            ok.store(false, std::memory_order_relaxed);
    });
    return ok ? SPARC3_OK : SPARC3_ERROR_NAN;
}

int sparc3_select_nm(int dtype, const void *scores, size_t n, int keep, int group, uint8_t *bits, int threads) {
    if (!known(dtype) || group < 1 || group > 32 || keep < 0 || keep > group || n % static_cast<size_t>(group))
        return SPARC3_ERROR_ARGUMENT;
    if (!n) return SPARC3_OK;
    if (!scores || !bits) return SPARC3_ERROR_ARGUMENT;
    const int used = threads_for(n, threads);
    const size_t width = static_cast<size_t>(group), groups = n / width;
    const Kernels &isa = kernels();
    std::atomic<bool> ok{true};
    parallel(used, [&](int t) {
        const Slice part = slice(groups, 8, used, t);
        if (part.size && !isa.nm(dtype, at(dtype, scores, part.begin * width), part.size, keep, group,
                                 bits + part.begin * width / 8))
            ok.store(false, std::memory_order_relaxed);
    });
    return ok ? SPARC3_OK : SPARC3_ERROR_NAN;
}
