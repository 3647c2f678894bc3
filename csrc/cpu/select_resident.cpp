#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "isa.h"
#include "scores.h"

namespace sparc3 {
namespace {

constexpr size_t kSample = 16384;

// Keys lie within +-kLargest; the ends of a bracket that is open on a side are just outside.
constexpr int32_t kLargest = 0x7f800000;

int32_t key_of(int dtype, const void *scores, size_t i) {
    int32_t bits;
    if (dtype == SPARC3_FP32) {
        memcpy(&bits, at(dtype, scores, i), sizeof bits);
    } else {
        uint16_t half;
        memcpy(&half, at(dtype, scores, i), sizeof half);
        bits = static_cast<int32_t>(static_cast<uint32_t>(half) << 16);
    }
    return bits < 0 ? -(bits & 0x7fffffff) : bits;
}

// A guess of where the score of rank `rank` lies: the order statistics of a sample, four standard deviations to
// either side. One score of each stretch is taken at a hashed place, as a fixed stride could follow a column.
Bracket guess(int dtype, const void *scores, size_t n, uint64_t rank, int32_t *sample) {
    for (size_t i = 0; i < kSample; ++i) {
        const size_t begin = n / kSample * i, stretch = n / kSample;
        uint64_t hash = (i + 1) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
        sample[i] = key_of(dtype, scores, begin + hash % stretch);
    }
    const double share = static_cast<double>(rank) / static_cast<double>(n);
    const double middle = share * kSample, slack = 4 * std::sqrt(kSample * share * (1 - share)) + 8;
    Bracket bracket{-kLargest - 1, kLargest + 1, 0};
    if (middle - slack >= 0) {
        int32_t *low = sample + static_cast<size_t>(middle - slack);
        std::nth_element(sample, low, sample + kSample);
        bracket.low = *low;
    }
    if (middle + slack < kSample) {
        int32_t *high = sample + static_cast<size_t>(middle + slack);
        std::nth_element(sample, high, sample + kSample);
        bracket.high = *high;
    }
    return bracket;
}

// The keys inside are counted in `width` bins as narrow as they can be.
Bracket spread(Bracket bracket, size_t width) {
    bracket.shift = 0;
    while ((static_cast<uint32_t>(bracket.high) - static_cast<uint32_t>(bracket.low)) >> bracket.shift >= width)
        ++bracket.shift;
    return bracket;
}

// Bins of each thread, a power of two: more threads have fewer, so that a workspace of one size serves any number.
size_t width_for(int threads) {
    const size_t held = sparc3_select_flat_workspace_size(threads) / sizeof(uint32_t);
    size_t width = kBins;
    while (width * static_cast<size_t>(threads) > held) width /= 2;
    return width;
}

// Each thread counts into `width` bins of its own, added up in the first ones. False where a score is NaN.
bool count(int dtype, const void *scores, size_t n, Bracket bracket, int threads, size_t width, uint32_t *bins,
           Tally *sum) {
    Tally tallies[kMaxThreads] = {};
    std::atomic<bool> clean{true};
    memset(bins, 0, static_cast<size_t>(threads) * width * sizeof *bins);
    parallel(threads, parts_for(threads), [&](int t, int p) {
        const Slice part = slice(n, 64, parts_for(threads), p);
        uint32_t *mine = bins + width * static_cast<size_t>(t);
        if (!kernels().count_bracket32(dtype, at(dtype, scores, part.begin), part.size, bracket, &tallies[t], mine))
            clean.store(false, std::memory_order_relaxed);
    });
    *sum = tallies[0];
    for (int t = 1; t < threads; ++t) {
        sum->below += tallies[t].below;
        sum->at_low += tallies[t].at_low;
        sum->at_high += tallies[t].at_high;
        for (size_t i = 0; i < width; ++i) bins[i] += bins[width * static_cast<size_t>(t) + i];
    }
    return clean;
}

// Find the threshold of 0 < prune < n in one to three vector passes; false where the guess was wrong, which an unlucky
// or hostile order can bring about. Takes a quarter of the time of counting every score by its upper bits.
bool guessed_threshold(int dtype, const void *scores, size_t n, uint64_t prune, int threads, uint32_t *bins,
                       sparc3_threshold *found, int *status) {
    const size_t width = width_for(threads);
    Bracket bracket = spread(guess(dtype, scores, n, prune, reinterpret_cast<int32_t *>(bins)), width);
    for (;;) {
        Tally tally;
        *status = SPARC3_OK;
        if (!count(dtype, scores, n, bracket, threads, width, bins, &tally)) *status = SPARC3_ERROR_NAN;
        if (*status != SPARC3_OK) return true;
        if (prune <= tally.below) return false;
        uint64_t rank = prune - tally.below;
        const auto settle = [&](int32_t key, uint64_t equal) {
            *found = {key, 0, equal - rank};
            return true;
        };
        if (rank <= tally.at_low) return settle(bracket.low, tally.at_low);
        rank -= tally.at_low;
        size_t bin = 0;
        for (; bin < width && bins[bin] < rank; ++bin) rank -= bins[bin];
        if (bin == width) return rank <= tally.at_high && settle(bracket.high, tally.at_high);
        const int32_t floor = bracket.low + static_cast<int32_t>(static_cast<uint32_t>(bin) << bracket.shift);
        if (bracket.shift == 0) return settle(floor + 1, bins[bin]);
        // Keys of 16-bit scores are multiples of 2^16, so that a bin no wider holds one value.
        if (dtype != SPARC3_FP32 && bracket.shift <= 16) return settle((floor | 0xffff) + 1, bins[bin]);
        bracket = spread({floor, floor + (1 << bracket.shift) + 1, 0}, width);
    }
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_select_flat_workspace_size(int threads) {
    return sparc3_select_state_size() + sparc3_select_workspace_size(threads);
}

int sparc3_select_flat(int dtype, const void *scores, size_t n, uint64_t prune, uint8_t *bits, sparc3_threshold *out,
                       int threads, void *workspace, size_t workspace_size) {
    if (!known(dtype) || prune > n || (n && !scores)) return SPARC3_ERROR_ARGUMENT;
    const int used = threads_for(n, threads);
    if (!workspace || workspace_size < sparc3_select_flat_workspace_size(used)) return SPARC3_ERROR_WORKSPACE;
    int status = SPARC3_OK;
    sparc3_threshold threshold;
    const bool guessable = n >= kParallelScores && n < UINT32_MAX && prune && prune < n;
    if (!guessable ||
        !guessed_threshold(dtype, scores, n, prune, used, static_cast<uint32_t *>(workspace), &threshold, &status)) {
        char *bins = static_cast<char *>(workspace) + sparc3_select_state_size();
        status = sparc3_select_init(workspace, dtype);
        for (int more = 1; status == SPARC3_OK && more;) {
            status = sparc3_select_count(workspace, scores, n, used, bins, sparc3_select_workspace_size(used));
            if (status == SPARC3_OK) status = sparc3_select_refine(workspace, prune, &more);
        }
        if (status == SPARC3_OK) status = sparc3_select_threshold(workspace, &threshold);
    }
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
    parallel(used, parts_for(used), [&](int t, int p) {
        const Slice part = slice(rows, 8, parts_for(used), p);  // eight rows always end at a byte
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
    parallel(used, parts_for(used), [&](int, int p) {
        const Slice part = slice(groups, 8, parts_for(used), p);
        if (part.size && !isa.nm(dtype, at(dtype, scores, part.begin * width), part.size, keep, group,
                                 bits + part.begin * width / 8))
            ok.store(false, std::memory_order_relaxed);
    });
    return ok ? SPARC3_OK : SPARC3_ERROR_NAN;
}
