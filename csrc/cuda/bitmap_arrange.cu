// From the bitmap of the files, which belongs to no device, to the order of bitmap_tiles.h.
#include "bitmap_tiles.h"
#include "scan.h"

namespace sparc3 {
namespace {

// 16 bits of a row from `column` on; rows are whole 32-bit words, column divides by 16.
__device__ __forceinline__ unsigned bits_at(const uint8_t *row, int row_bytes, int column) {
    const int byte = column / 8;
    return byte < row_bytes ? row[byte] | static_cast<unsigned>(row[byte + 1]) << 8 : 0;
}

// 0xABCD -> 0x0A0B0C0D: room for the other row between the fours.
__device__ __forceinline__ unsigned spread(unsigned bits) {
    return (bits & 0xf) | (bits & 0xf0) << 4 | (bits & 0xf00) << 8 | (bits & 0xf000) << 12;
}

// One warp a chunk: its masks, its size in 16 bytes at starts[chunk + 1], and the most words of a lane.
__global__ void __launch_bounds__(32) masks_kernel(const uint8_t *bits, int rows, int row_bytes, int chunks,
                                                   uint4 *masks, unsigned *starts, unsigned *deepest) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const size_t index = blockIdx.x;
    const int strip = static_cast<int>(index / chunks), first = static_cast<int>(index % chunks) * kChunk;
    const auto quarter = [&](int q) {
        unsigned found = 0;
        for (int upper = 0; upper < 2; ++upper) {
            const int row = strip * kStripRows + g + 8 * upper;
            if (row < rows)
                found |= spread(bits_at(bits + static_cast<size_t>(row) * row_bytes, row_bytes, first + 64 * q + 16 * t))
                         << (4 * upper);
        }
        return found;
    };
    const uint4 mask{quarter(0), quarter(1), quarter(2), quarter(3)};
    masks[index * kChunkMasks + lane] = mask;
    const unsigned words = static_cast<unsigned>(words_of_lane(mask));
    const unsigned all = __reduce_add_sync(kAllLanes, words), most = __reduce_max_sync(kAllLanes, words);
    if (lane) return;
    starts[index + 1] = (all + 3) / 4;
    atomicMax(deepest, most);
}

// Where the next value of each of a lane's two rows is in the file's order.
struct Source {
    const uint16_t *values;
    unsigned quarters[4], from[4][2];  // by quarter and row
    int q = 0;

    __device__ __forceinline__ uint16_t next() {
        while (!quarters[q]) ++q;
        const unsigned lowest = quarters[q] & (0u - quarters[q]);
        quarters[q] -= lowest;
        return values[from[q][lowest & kUpperRow ? 1 : 0]++];
    }
};

// One warp a strip. `from` counts in 32 bits: offsets are relative to the first value of the strip.
__global__ void __launch_bounds__(32)
    values_kernel(const uint4 *masks, const unsigned *starts, const int64_t *offsets, const uint16_t *values, int rows,
                  int chunks, uint16_t *out) {
    const unsigned lane = threadIdx.x, before = (1u << lane) - 1;
    const int strip = static_cast<int>(blockIdx.x), g = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4);
    const int64_t first = offsets[strip * kStripRows];
    unsigned reached[2];  // the first value of this chunk in rows g and g + 8
    for (int upper = 0; upper < 2; ++upper)
        reached[upper] = static_cast<unsigned>(offsets[min(rows, strip * kStripRows + g + 8 * upper)] - first);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const size_t index = static_cast<size_t>(strip) * chunks + chunk;
        const uint4 mask = masks[index * kChunkMasks + lane];
        Source source{values + first, {mask.x, mask.y, mask.z, mask.w}, {}};
        for (int q = 0; q < 4; ++q)
            for (int upper = 0; upper < 2; ++upper) {
                const int kept = __popc(source.quarters[q] & (upper ? kUpperRow : ~kUpperRow));
                source.from[q][upper] = reached[upper];
                for (int other = 0; other < 4; ++other) {
                    const unsigned theirs = static_cast<unsigned>(__shfl_sync(kAllLanes, kept, other, 4));
                    if (other < t) source.from[q][upper] += theirs;
                    reached[upper] += theirs;
                }
            }
        const int kept = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w), words = (kept + 1) / 2;
        const int most = __reduce_max_sync(kAllLanes, words);
        uint16_t *to = out + static_cast<size_t>(starts[index]) * 8;
        for (int word = 0; word < most; ++word) {
            const unsigned have = __ballot_sync(kAllLanes, words > word);
            if (words > word) {
                uint16_t *pair = to + 2 * __popc(have & before);
                pair[0] = source.next();
                pair[1] = 2 * word + 1 < kept ? source.next() : static_cast<uint16_t>(0);
            }
            to += 2 * __popc(have);
        }
        uint16_t *stop = out + static_cast<size_t>(starts[index + 1]) * 8;
        if (to + lane < stop) to[lane] = 0;  // at most six to the next 16 bytes
    }
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_cuda_bitmap_chunks(size_t rows, size_t columns) { return strips_of(rows) * chunks_of(columns); }

int sparc3_cuda_bitmap_arrange_masks(const uint8_t *bits, size_t rows, size_t columns, uint32_t *masks,
                                     uint32_t *starts, uint32_t *deepest, void *stream) {
    if (!fits(rows, columns) || !starts || !deepest) return SPARC3_ERROR_ARGUMENT;
    const size_t chunks = chunks_of(columns), all = strips_of(rows) * chunks;
    if (all && (!bits || !masks || !is_aligned(masks, 16))) return SPARC3_ERROR_ARGUMENT;
    int status = status_of(cudaMemsetAsync(deepest, 0, sizeof *deepest, static_cast<cudaStream_t>(stream)));
    if (status) return status;
    if (all) {
        status = launch(masks_kernel, dim3(static_cast<unsigned>(all)), dim3(32), 0, stream, bits,
                        static_cast<int>(rows), static_cast<int>(ceil_div(columns, 32) * 4), static_cast<int>(chunks),
                        reinterpret_cast<uint4 *>(masks), starts, deepest);
        if (status) return status;
    }
    return launch(scan_kernel<uint32_t>, dim3(1), dim3(kScanThreads), 0, stream, starts, all);
}

int sparc3_cuda_bitmap_arrange_values(int dtype, const int64_t *offsets, const void *values, size_t rows,
                                      size_t columns, const uint32_t *masks, const uint32_t *starts, void *arranged,
                                      void *stream) {
    if (!is_half(dtype) || !fits(rows, columns)) return SPARC3_ERROR_ARGUMENT;
    const size_t chunks = chunks_of(columns);
    if (!rows || !chunks) return SPARC3_OK;
    if (!offsets || !masks || !starts || !is_aligned(masks, 16)) return SPARC3_ERROR_ARGUMENT;
    return launch(values_kernel, dim3(static_cast<unsigned>(strips_of(rows))), dim3(32), 0, stream,
                  reinterpret_cast<const uint4 *>(masks), starts, offsets, static_cast<const uint16_t *>(values),
                  static_cast<int>(rows), static_cast<int>(chunks), static_cast<uint16_t *>(arranged));
}
