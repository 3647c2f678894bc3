// The order in which the tensor cores take a bitmap.
//
// A weight is cut into strips of 16 rows and these into chunks of 256 columns. Lane 4 g + t of the warp that multiplies
// a chunk owns 128 of its elements: of rows g and g + 8, in each quarter q of 64 columns, the 16 columns from
// 64 q + 16 t on.
//
//     columns of a quarter    0 .. 15   16 .. 31   32 .. 47   48 .. 63
//     rows g and g + 8         t = 0      t = 1      t = 2      t = 3
//
// Four of them, 4f to 4f + 3, are the A fragment f of the lane: mma's k 2t, 2t + 1, 2t + 8 and 2t + 9. As long as the
// vectors are taken in the same order any order of k will do, and with this one both the bits of a lane and its piece
// of x lie together.
//
//     masks   [strip][chunk][lane][q]  word q: bits 8f to 8f + 3 are row g, columns 4f to 4f + 3; bits 8f + 4 to 8f + 7
//                                      row g + 8
//     values                           kept elements of a lane in the order of its bits, two a 32-bit word (the last
//                                      one alone if they are odd). A chunk begins with word 0 of all lanes that have
//                                      one, in order of lanes, then word 1, and so on, and ends on 16 bytes.
//     starts  [strip][chunk], end      where the values of a chunk begin, in 16 bytes
//
// In shared memory word w of a lane lies in its own column, at [w][lane]: lanes read at places of their own, and no two
// meet in a bank.
#pragma once

#include "linear.h"

namespace sparc3 {

constexpr int kChunk = 256;          // columns
constexpr int kChunkMasks = 32;      // uint4 of a chunk
constexpr unsigned kUpperRow = 0xf0f0f0f0u;  // the bits of row g + 8

inline size_t chunks_of(size_t columns) { return ceil_div(columns, kChunk); }

// Bytes of the columns of a chunk; taking no element after the last one still reads three words.
inline __host__ __device__ int column_bytes(int deepest) { return (deepest + 3) * 32 * 4; }

__device__ __forceinline__ int words_of_lane(const uint4 &mask) {
    return (__popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w) + 1) / 2;
}

// Begin to copy the values of a chunk into columns [word][lane].
__device__ __forceinline__ void fetch_chunk(const uint4 &mask, const uint4 *values, unsigned *columns) {
    const unsigned lane = threadIdx.x % 32, before = (1u << lane) - 1;
    const int words = words_of_lane(mask);
    const int every = __reduce_min_sync(kAllLanes, words), most = __reduce_max_sync(kAllLanes, words);
    // Words that every lane has are rows of 128 bytes already.
    for (int i = static_cast<int>(lane); i < every * 8; i += 32)
        __pipeline_memcpy_async(reinterpret_cast<uint4 *>(columns) + i, values + i, sizeof(uint4));
    const unsigned *from = reinterpret_cast<const unsigned *>(values) + every * 32;
    for (int word = every; word < most; ++word) {
        const unsigned have = __ballot_sync(kAllLanes, words > word);
        if (words > word)
            __pipeline_memcpy_async(columns + word * 32 + lane, from + __popc(have & before), sizeof(unsigned));
        from += __popc(have);
    }
    __pipeline_commit();
}

// How four elements of a lane are put into two registers, by their four bits: selectors of __byte_perm in the lower
// halves; in the upper ones 16 times the number of elements that the first register takes, and 64 times that of both.
__device__ __forceinline__ uint2 pick_of(unsigned bits) {
    const auto selector = [](unsigned two) {
        return two == 3 ? 0x3210u : two == 2 ? 0x1044u : two == 1 ? 0x4410u : 0x4444u;
    };
    return uint2{selector(bits & 3) | static_cast<unsigned>(__popc(bits & 3)) << 20,
                 selector(bits >> 2) | static_cast<unsigned>(__popc(bits)) << 22};
}
constexpr int kPicks = 16;

// __byte_perm, which spends an instruction on clearing bits of the selector that do not count.
__device__ __forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
#ifdef SPARC3_CUDA_EMULATION
    return __byte_perm(a, b, selector);
#else
    unsigned found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
#endif
}

// The values of one lane, taken four places at a time: about 15 instructions, less than 4 a weight.
struct Taker {
    const char *shared;  // dynamic shared memory
    unsigned at;         // byte in it where the row of the next value begins, 64 for its second half
    unsigned lane;       // bytes before the lane's column in a row
    const uint2 *picks;

    __device__ __forceinline__ Taker(const uint4 *shared, unsigned begin, const uint2 *picks)
        : shared(reinterpret_cast<const char *>(shared)), at(begin), lane(threadIdx.x % 32 * 4), picks(picks) {}

    // Put the values of the places whose `bits` (lower four) are set there, 0 elsewhere.
    __device__ __forceinline__ void take(unsigned bits, unsigned &first, unsigned &second) {
        const unsigned *words = reinterpret_cast<const unsigned *>(shared + ((at & ~127u) | lane));
        const unsigned w0 = words[0], w1 = words[32], w2 = words[64];
        const uint2 pick = picks[bits & 15];
        // 0 or 16, as __funnelshift_r wraps at 32.
        const unsigned low = __funnelshift_r(w0, w1, at >> 2), high = __funnelshift_r(w1, w2, at >> 2);
        first = permute_bytes(low, 0, pick.x);
        second = permute_bytes(__funnelshift_rc(low, high, pick.x >> 16), 0, pick.y);
        at += pick.y >> 16;
    }
};

__device__ __forceinline__ unsigned quarter_of(const uint4 &mask, int q) {
    return q == 0 ? mask.x : q == 1 ? mask.y : q == 2 ? mask.z : mask.w;
}

}  // namespace sparc3
