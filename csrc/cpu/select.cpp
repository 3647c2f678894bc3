#include <string.h>

#include <algorithm>
#include <atomic>

#include "../select_state.h"
#include "isa.h"
#include "scores.h"

namespace sparc3 {
namespace {

// A thread's 32-bit counts cannot overflow within a block.
constexpr size_t kBlock = size_t{1} << 31;

// More threads do not count: the bins of a third would take the memory beyond 1 MB.
constexpr int kCountingThreads = 2;

const State *opened(const void *state) {
    const State *s = static_cast<const State *>(state);
    return s && !memcmp(s->magic, kMagic, sizeof kMagic) ? s : nullptr;
}
State *opened(void *state) { return const_cast<State *>(opened(static_cast<const void *>(state))); }

// The bin that holds the score of rank `rank` (from 1); there is one.
Boundary boundary(const State &state, uint64_t rank) {
    unsigned bin = 0;
    for (; state.bins[bin] < rank; ++bin) rank -= state.bins[bin];
    return {bin, rank, state.bins[bin]};
}

// The calling thread counts into the state, the others into 32-bit bins of their own.
int count_block(State &state, const void *scores, size_t n, int threads, uint32_t *bins) {
    const int32_t floor = static_cast<int32_t>(static_cast<uint32_t>(state.upper) << 16);
    const Bracket bracket{floor - 1, floor + static_cast<int32_t>(kBins), 0};  // the keys of the boundary bin
    const bool upper = state.stage == kUpper;
    const int dtype = static_cast<int>(state.dtype);
    const Kernels &isa = kernels();
    std::atomic<bool> ok{true};
    if (threads > 1) memset(bins, 0, static_cast<size_t>(threads - 1) * kBins * sizeof *bins);
    parallel(threads, parts_for(threads), [&](int t, int p) {
        const Slice part = slice(n, 64, parts_for(threads), p);
        const void *from = at(dtype, scores, part.begin);
        uint32_t *mine = t ? bins + kBins * static_cast<size_t>(t - 1) : nullptr;
        Tally tally{};  // the rank within the bin is known: only the bins matter
        const bool clean =
            upper ? (t ? isa.count_upper32(dtype, from, part.size, mine)
                       : isa.count_upper64(dtype, from, part.size, state.bins))
                  : (t ? isa.count_bracket32(dtype, from, part.size, bracket, &tally, mine)
                       : isa.count_bracket64(dtype, from, part.size, bracket, &tally, state.bins));
        if (!clean) ok.store(false, std::memory_order_relaxed);
    });
    for (int t = 1; t < threads; ++t)
        for (size_t i = 0; i < kBins; ++i) state.bins[i] += bins[kBins * static_cast<size_t>(t - 1) + i];
    return ok ? SPARC3_OK : SPARC3_ERROR_NAN;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_select_state_size(void) { return sizeof(State); }

size_t sparc3_select_workspace_size(int threads) {
    return static_cast<size_t>(std::min(available_threads(threads), kCountingThreads) - 1) * kBins * sizeof(uint32_t);
}

int sparc3_select_init(void *state, int dtype) {
    if (!state || !known(dtype)) return SPARC3_ERROR_ARGUMENT;
    State &fresh = *static_cast<State *>(state);
    memset(&fresh, 0, sizeof fresh);
    memcpy(fresh.magic, kMagic, sizeof kMagic);
    fresh.dtype = static_cast<uint32_t>(dtype);
    return SPARC3_OK;
}

int sparc3_select_count(void *state, const void *scores, size_t n, int threads, void *workspace,
                        size_t workspace_size) {
    State *s = opened(state);
    if (!s || s->stage == kDone) return SPARC3_ERROR_STATE;
    if (n && !scores) return SPARC3_ERROR_ARGUMENT;
    const int used = std::min(threads_for(n, threads), kCountingThreads);
    if (used > 1 && (!workspace || workspace_size < sparc3_select_workspace_size(used))) return SPARC3_ERROR_WORKSPACE;
    for (size_t i = 0; i < n; i += kBlock) {
        const int status = count_block(*s, at(static_cast<int>(s->dtype), scores, i), std::min(kBlock, n - i), used,
                                       static_cast<uint32_t *>(workspace));
        if (status != SPARC3_OK) return status;
    }
    return SPARC3_OK;
}

int sparc3_select_merge(void *state, const void *other) {
    State *s = opened(state);
    const State *o = opened(other);
    if (!s || !o || s->stage == kDone || s->stage != o->stage || s->dtype != o->dtype) return SPARC3_ERROR_STATE;
    if (s->stage == kLower && (s->upper != o->upper || s->prune != o->prune)) return SPARC3_ERROR_STATE;
    if (o->error) s->error = o->error;
    for (size_t i = 0; i < kBins; ++i) s->bins[i] += o->bins[i];
    return static_cast<int>(s->error);
}

int sparc3_select_refine(void *state, uint64_t prune, int *more) {
    State *s = opened(state);
    if (!more) return SPARC3_ERROR_ARGUMENT;
    if (!s || s->stage == kDone || (s->stage == kLower && prune != s->prune)) return SPARC3_ERROR_STATE;
    if (s->error) return static_cast<int>(s->error);
    *more = 0;
    uint64_t total = 0;
    for (size_t i = 0; i < kBins; ++i) total += s->bins[i];
    if (s->stage == kLower) {
        if (total != s->expected) return SPARC3_ERROR_CHANGED;
        settle(*s, prune, boundary(*s, s->rank));
        return SPARC3_OK;
    }
    if (prune > total) return SPARC3_ERROR_ARGUMENT;
    if (prune == 0 || prune == total) {  // no key lies below the first threshold or above the second
        finish(*s, prune ? INT32_MAX : INT32_MIN, 0);
        return SPARC3_OK;
    }
    *more = settle(*s, prune, boundary(*s, prune));
    if (*more) memset(s->bins, 0, sizeof s->bins);
    return SPARC3_OK;
}

int sparc3_select_threshold(const void *state, sparc3_threshold *out) {
    const State *s = opened(state);
    if (!out) return SPARC3_ERROR_ARGUMENT;
    if (s && s->error) return static_cast<int>(s->error);
    if (!s || s->stage != kDone) return SPARC3_ERROR_STATE;
    *out = s->threshold;
    return SPARC3_OK;
}

int sparc3_select_mask(int dtype, const void *scores, size_t n, sparc3_threshold *threshold, uint8_t *bits,
                       int threads) {
    if (!known(dtype) || !threshold || (n && (!scores || !bits))) return SPARC3_ERROR_ARGUMENT;
    const int used = threads_for(n, threads), parts = parts_for(used);
    const Kernels &isa = kernels();
    const int32_t key = threshold->key;
    uint64_t equal[kMaxParts] = {}, budget[kMaxParts], left[kMaxParts];
    // What a part may keep depends on the equal scores before it, so these are counted first.
    if (used > 1 && threshold->keep_equal)
        parallel(used, parts, [&](int, int p) {
            const Slice part = slice(n, 64, parts, p);
            equal[p] = isa.count_equal(dtype, at(dtype, scores, part.begin), part.size, key);
        });
    uint64_t keep = threshold->keep_equal;
    for (int p = 0; p < parts; ++p) {
        budget[p] = keep;
        keep -= std::min(keep, equal[p]);
    }
    parallel(used, parts, [&](int, int p) {
        const Slice part = slice(n, 64, parts, p);
        left[p] = isa.mask(dtype, at(dtype, scores, part.begin), part.size, key, budget[p], bits + part.begin / 8);
    });
    threshold->keep_equal = left[parts - 1];
    return SPARC3_OK;
}
