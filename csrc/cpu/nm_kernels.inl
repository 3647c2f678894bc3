// N:M selection in one instruction set: included by kernels_*.cpp after select_kernels.inl.
//
// An element's rank is how many of its group beat it: the larger ones, and the equal ones before it. It is kept where
// the rank is below `keep`.

namespace {

template <int group>
struct Pattern {
    int32_t rotation[group][kLanes];  // lane i of rotation d: the element d places after i within its group
    uint64_t later[group];            // bits of the elements whose rotation d does not wrap

    constexpr Pattern() : rotation(), later() {
        for (int d = 0; d < group; ++d) {
            for (int i = 0; i < kLanes; ++i) rotation[d][i] = i / group * group + (i + d) % group;
            for (int i = 0; i < 64; ++i) later[d] |= (uint64_t)(i % group < group - d) << i;
        }
    }
};

// The mask bits of 64 keys, from comparisons alone: ranks are counted in bit planes, 64 at a time.
template <int group>
inline uint64_t keep_in_groups(const Keys *keys, int keep) {
    static constexpr Pattern<group> pattern;
    constexpr int kPlanes = group == 2 ? 1 : group == 4 ? 2 : group == 8 ? 3 : 4;
    uint64_t larger[group], plane[kPlanes] = {}, fewer = 0;
#pragma GCC unroll 16
    for (int d = 1; d < group; ++d) {
        larger[d] = 0;
        for (int v = 0; v < 4; ++v)
            larger[d] |= (uint64_t)greater(permute(keys[v], pattern.rotation[d]), keys[v]) << (16 * v);
    }
#pragma GCC unroll 16
    for (int d = 1; d < group; ++d) {
        // Element d places on: a later one must be larger; an earlier one (wrapped) must not be smaller.
        const uint64_t later = pattern.later[d];
        uint64_t carry = (larger[d] & later) | (~(larger[group - d] << (group - d)) & ~later);
        for (int p = 0; p < kPlanes; ++p) {
            const uint64_t sum = plane[p] ^ carry;
            carry &= plane[p];
            plane[p] = sum;
        }
    }
    for (int p = 0; p < kPlanes; ++p) {
        const uint64_t limit = keep >> p & 1 ? ~(uint64_t)0 : 0;
        fewer = (~plane[p] & limit) | (~(plane[p] ^ limit) & fewer);
    }
    return keep == group ? ~(uint64_t)0 : fewer;
}

template <int group, class Source>
bool small_group(const Source *scores, size_t n, int keep, int32_t infinity, BitWriter &out) {
    Keys keys[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
    int filled = 0, valid = 0;
    const auto write = [&] {
        uint64_t bits = keep_in_groups<group>(keys, keep);
        if (valid < 64) bits &= ((uint64_t)1 << valid) - 1;
        out.append((uint32_t)bits, valid < 32 ? valid : 32);
        if (valid > 32) out.append((uint32_t)(bits >> 32), valid - 32);
        filled = valid = 0;
    };
    const bool clean = for_keys(scores, n, infinity, [&](Keys k, int lanes) {
        keys[filled++] = k;
        valid += lanes;
        if (filled == 4) write();
    });
    if (filled) write();
    return clean;
}

// Sixteen groups side by side: element p of group g is keys[p][g], so that ranks are counted without a branch.
template <class Source>
bool any_group(const Source *scores, size_t groups, int keep, int group, int32_t infinity, BitWriter &out) {
    int32_t linear[32 * kLanes] = {}, keys[32][kLanes], rank[32][kLanes];
    uint32_t word[kLanes];
    for (size_t g = 0; g < groups; g += kLanes) {
        const int side = groups - g < kLanes ? (int)(groups - g) : kLanes;
        int32_t *next = linear;
        if (!for_keys(scores + g * (size_t)group, (size_t)(side * group), infinity, [&](Keys k, int) {
                store(next, k);
                next += kLanes;
            }))
            return false;
        for (int p = 0; p < group; ++p)
            for (int i = 0; i < kLanes; ++i) {
                keys[p][i] = linear[i * group + p];  // beyond `side`: stale, never written out
                rank[p][i] = 0;
            }
        for (int p = 1; p < group; ++p)
            for (int q = 0; q < p; ++q)
                for (int i = 0; i < kLanes; ++i) {
                    const int32_t later_wins = keys[p][i] > keys[q][i];
                    rank[q][i] += later_wins;
                    rank[p][i] += 1 - later_wins;
                }
        for (int i = 0; i < kLanes; ++i) word[i] = 0;
        for (int p = 0; p < group; ++p)
            for (int i = 0; i < kLanes; ++i) word[i] |= (uint32_t)(rank[p][i] < keep) << p;
        for (int i = 0; i < side; ++i) out.append(word[i], group);
    }
    return true;
}

template <class Source>
bool group_kernel(const Source *scores, size_t groups, int keep, int group, int32_t infinity, BitWriter &out) {
    const size_t n = groups * (size_t)group;
    switch (group) {
        case 2: return small_group<2>(scores, n, keep, infinity, out);
        case 4: return small_group<4>(scores, n, keep, infinity, out);
        case 8: return small_group<8>(scores, n, keep, infinity, out);
        case 16:
            if constexpr (kPermuted == 16) return small_group<16>(scores, n, keep, infinity, out);
    }
    return any_group(scores, groups, keep, group, infinity, out);
}

bool nm(int dtype, const void *scores, size_t groups, int keep, int group, uint8_t *bits) {
    BitWriter out{bits};
    const bool clean = typed(dtype, scores, [&](const auto *source) {
        return group_kernel(source, groups, keep, group, infinity_bits(dtype), out);
    });
    out.flush();
    return clean;
}

}  // namespace
