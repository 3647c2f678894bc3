// Selection in one instruction set: included by kernels_*.cpp after simd.h.

namespace {

using sparc3::Bracket;
using sparc3::kDigitBins;
using sparc3::Tally;

// Bits of a +inf of this dtype, as `load` puts them; a larger magnitude is NaN.
inline int32_t infinity_bits(int dtype) { return dtype == SPARC3_FP16 ? 0x7c000000 : 0x7f800000; }

// Call body(source) with the scores as the integers that hold their bits.
template <class Body>
inline auto typed(int dtype, const void *scores, const Body &body) {
    return dtype == SPARC3_FP32 ? body((const int32_t *)scores) : body((const uint16_t *)scores);
}

// Call body(keys, valid lanes) for each 16 scores, the last ones padded with +0.
template <class Source, class Body>
inline bool for_keys(const Source *scores, size_t n, int32_t infinity, const Body &body) {
    Keys largest = broadcast(0);
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Keys bits = load(scores + i), size = magnitude(bits);
        largest = max(largest, size);
        body(signed_key(bits, size), kLanes);
    }
    if (i < n) {
        Source rest[kLanes] = {};
        memcpy(rest, scores + i, (n - i) * sizeof(Source));
        const Keys bits = load(rest), size = magnitude(bits);
        largest = max(largest, size);
        body(signed_key(bits, size), (int)(n - i));
    }
    return max_of(largest) <= infinity;
}

inline uint32_t lane_mask(int lanes) { return (1u << lanes) - 1; }

// bins[index] += 1 for each valid lane. Equal neighbours (zeros, sorted scores) are added at once: repeated updates
// of one address would each wait for the store before.
template <class Count>
inline void count_lanes(Count *bins, Keys digits, int lanes) {
    int32_t index[kLanes];
    store(index, digits);
    if (all_equal(digits)) {
        bins[index[0]] += (Count)lanes;
        return;
    }
    if (lanes == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) ++bins[index[i]];
    } else {
        for (int i = 0; i < lanes; ++i) ++bins[index[i]];
    }
}

// The same for the upper halves of kLanes scores that are not negative, which are their digits: taken from memory by
// the word, as a vector of digits would have to go through a store.
template <class Count, class Source>
inline void count_halves(Count *bins, const Source *scores) {
    constexpr size_t kWords = kLanes * sizeof(Source) / sizeof(uint64_t);
#pragma GCC unroll 8
    for (size_t i = 0; i < kWords; ++i) {
        uint64_t word;
        memcpy(&word, scores + i * (sizeof word / sizeof *scores), sizeof word);
        if (sizeof(Source) == 2) {
            ++bins[word & 0xffff];
            ++bins[word >> 32 & 0xffff];
        }
        ++bins[word >> 16 & 0xffff];
        ++bins[word >> 48];
    }
}

// Counting fills the window of instructions, so that a processor hardly runs ahead into the next page by itself.
constexpr size_t kAheadOfCount = 2048;

template <class Count, class Source>
bool count_upper_of(const Source *scores, size_t n, int32_t infinity, Count *centre) {
    const size_t whole = n / kLanes * kLanes;
    const Keys zero = broadcast(0);
    Keys largest = zero;
    for (size_t i = 0; i < whole; i += kLanes) {
        __builtin_prefetch((const char *)(scores + i) + kAheadOfCount);
        const Keys bits = load(scores + i), size = magnitude(bits), digits = shift_right<16>(bits);
        largest = max(largest, size);
        if (greater(zero, bits) || all_equal(digits))
            count_lanes(centre, shift_right<16>(signed_key(bits, size)), kLanes);
        else
            count_halves(centre, scores + i);
    }
    return max_of(largest) <= infinity && for_keys(scores + whole, n - whole, infinity, [&](Keys keys, int lanes) {
               count_lanes(centre, shift_right<16>(keys), lanes);
           });
}

template <class Count>
bool count_upper(int dtype, const void *scores, size_t n, Count *bins) {
    return typed(dtype, scores, [&](const auto *source) {
        return count_upper_of(source, n, infinity_bits(dtype), bins + sparc3::kBins / 2);
    });
}

// Few keys are inside, at unpredictable places: they are collected without a branch and counted 16 at a time.
template <class Count>
bool count_bracket(int dtype, const void *scores, size_t n, Bracket bracket, Tally *tally, Count *bins) {
    const Keys low = broadcast(bracket.low), high = broadcast(bracket.high);
    int32_t inside[2 * kLanes];
    int waiting = 0;
    uint64_t below = 0, at_low = 0, at_high = 0;
    const auto count_waiting = [&](int lanes) {
        int32_t index[kLanes];
        for (int i = 0; i < kLanes; ++i)
            index[i] = (int32_t)(((uint32_t)inside[i] - (uint32_t)bracket.low - 1) >> bracket.shift);
        count_lanes(bins, load(index), lanes);
    };
    const bool clean = typed(dtype, scores, [&](const auto *source) {
        return for_keys(source, n, infinity_bits(dtype), [&](Keys keys, int lanes) {
            const uint32_t valid = lane_mask(lanes), under = greater(low, keys) & valid;
            const uint32_t lowest = equal(keys, low) & valid, highest = equal(keys, high) & valid;
            below += (uint64_t)__builtin_popcount(under);
            at_low += (uint64_t)__builtin_popcount(lowest);
            at_high += (uint64_t)__builtin_popcount(highest);
            waiting += compress(inside + waiting, greater(high, keys) & ~under & ~lowest & valid, keys);
            if (waiting >= kLanes) {
                count_waiting(kLanes);
                waiting -= kLanes;
                store(inside, load(inside + kLanes));
            }
        });
    });
    if (waiting) count_waiting(waiting);
    tally->below += below;
    tally->at_low += at_low;
    tally->at_high += at_high;
    return clean;
}

uint64_t count_equal(int dtype, const void *scores, size_t n, int32_t key) {
    return typed(dtype, scores, [&](const auto *source) {
        const Keys wanted = broadcast(key);
        uint64_t found = 0;
        for_keys(source, n, infinity_bits(dtype), [&](Keys keys, int lanes) {
            found += (uint64_t)__builtin_popcount(equal(keys, wanted) & lane_mask(lanes));
        });
        return found;
    });
}

// The mask bits of 16 keys; `keep_equal` goes down by the equal ones that are kept.
inline uint32_t kept(Keys keys, Keys threshold, int lanes, uint64_t &keep_equal) {
    const uint32_t above = greater(keys, threshold) & lane_mask(lanes);
    uint32_t level = equal(keys, threshold) & lane_mask(lanes);
    const uint32_t found = (uint32_t)__builtin_popcount(level);
    if (found > keep_equal) level = lowest_bits(level, (uint32_t)keep_equal);
    keep_equal -= found > keep_equal ? keep_equal : found;
    return above | level;
}

uint64_t mask(int dtype, const void *scores, size_t n, int32_t key, uint64_t keep_equal, uint8_t *bits) {
    typed(dtype, scores, [&](const auto *source) {
        const Keys threshold = broadcast(key);
        return for_keys(source, n, infinity_bits(dtype), [&](Keys keys, int lanes) {
            const uint32_t keep = kept(keys, threshold, lanes, keep_equal);
            *bits++ = (uint8_t)keep;
            if (lanes > 8) *bits++ = (uint8_t)(keep >> 8);
        });
    });
    return keep_equal;
}

// Appends runs of bits; the last ones are written by `flush`.
struct BitWriter {
    uint8_t *next;
    uint64_t pending = 0;
    int count = 0;

    void append(uint32_t bits, int n) {  // n <= 32
        pending |= (uint64_t)bits << count;
        count += n;
        if (count >= 32) {
            const uint32_t word = (uint32_t)pending;
            memcpy(next, &word, sizeof word);
            next += sizeof word;
            pending >>= 32;
            count -= 32;
        }
    }
    void flush() {
        for (; count > 0; count -= 8, pending >>= 8) *next++ = (uint8_t)pending;
    }
};

struct Boundary {
    int32_t digit;
    size_t rank, count;  // how many of the digit's `count` keys are pruned
};

// Find the bin that holds the key of rank `rank` (from 1), adding both halves of the histogram, and clear it.
inline Boundary find_digit(uint32_t *bins, size_t rank) {
    constexpr size_t kBlock = 64;
    size_t below = 0, block = 0;
    for (;; ++block) {
        uint32_t sum = 0;
        for (size_t i = 0; i < kBlock; ++i) sum += bins[block * kBlock + i] + bins[kDigitBins + block * kBlock + i];
        if (below + sum >= rank) break;
        below += sum;
    }
    size_t bin = block * kBlock;
    uint32_t here;
    while (here = bins[bin] + bins[kDigitBins + bin], below + here < rank) {
        below += here;
        ++bin;
    }
    memset(bins, 0, 2 * kDigitBins * sizeof(uint32_t));
    return {(int32_t)bin, rank - below, here};
}

// Count digits into two interleaved histograms, so that a value common at random places (zero) waits half as often.
inline void count_digits(uint32_t *bins, Keys digits, int lanes) {
    int32_t index[kLanes];
    store(index, digits);
    if (all_equal(digits)) {
        bins[index[0]] += (uint32_t)lanes;
        return;
    }
    for (int i = 0; i < lanes; ++i) ++bins[index[i] + (i & 1) * (int)kDigitBins];
}

// Keep in `keys` the n keys whose digit is the boundary's.
template <int shift>
inline size_t narrow(int32_t *keys, size_t n, Boundary boundary, uint32_t digit_mask) {
    size_t left = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t key = keys[i];
        keys[left] = key;
        left += (((uint32_t)key >> shift) & digit_mask) == (uint32_t)boundary.digit;
    }
    return left;
}

inline void count_candidates(uint32_t *bins, const int32_t *keys, size_t n, int shift, uint32_t digit_mask) {
    for (size_t i = 0; i < n; ++i) ++bins[(((uint32_t)keys[i] >> shift) & digit_mask) + (i & 1) * kDigitBins];
}

template <class Source>
bool row(const Source *scores, size_t cols, size_t prune, int32_t infinity, BitWriter &out, uint32_t *bins,
         int32_t *candidates) {
    int32_t key = prune ? INT32_MAX : INT32_MIN;  // all pruned or all kept, unless a threshold is found below
    uint64_t keep_equal = 0;
    uint32_t *centre = bins + kDigitBins / 2;
    if (!for_keys(scores, cols, infinity,
                  [&](Keys keys, int lanes) { count_digits(centre, shift_right<21>(keys), lanes); }))
        return false;
    if (prune && prune < cols) {
        Boundary found = find_digit(bins, prune);
        const int32_t top = found.digit - (int32_t)kDigitBins / 2;
        const Keys wanted = broadcast(top);
        size_t n = 0;
        for_keys(scores, cols, infinity, [&](Keys keys, int lanes) {
            n += (size_t)compress(candidates + n, equal(shift_right<21>(keys), wanted) & lane_mask(lanes), keys);
        });
        count_candidates(bins, candidates, n, 10, 0x7ff);
        found = find_digit(bins, found.rank);
        key = (int32_t)((uint32_t)top << 21 | (uint32_t)found.digit << 10);
        n = narrow<10>(candidates, n, found, 0x7ff);
        count_candidates(bins, candidates, n, 0, 0x3ff);
        found = find_digit(bins, found.rank);
        key |= found.digit;
        keep_equal = found.count - found.rank;
    } else {
        memset(bins, 0, 2 * kDigitBins * sizeof(uint32_t));
    }
    const Keys threshold = broadcast(key);
    return for_keys(scores, cols, infinity, [&](Keys keys, int lanes) {
        out.append(kept(keys, threshold, lanes, keep_equal), lanes);
    });
}

bool rows(int dtype, const void *scores, size_t rows, size_t cols, size_t prune, uint8_t *bits, void *scratch) {
    uint32_t *bins = (uint32_t *)scratch;
    int32_t *candidates = (int32_t *)scratch + 2 * kDigitBins;
    memset(bins, 0, 2 * kDigitBins * sizeof(uint32_t));
    BitWriter out{bits};
    const bool ok = typed(dtype, scores, [&](const auto *source) {
        for (size_t r = 0; r < rows; ++r)
            if (!row(source + r * cols, cols, prune, infinity_bits(dtype), out, bins, candidates)) return false;
        return true;
    });
    out.flush();
    return ok;
}

}  // namespace
