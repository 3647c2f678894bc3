// Rows from scores to mask bits in one kernel: a block reads a row once, into registers where it has at most 32,768
// scores, finds the threshold by 11, 11 and 10 bits of the keys, and writes the mask.
//
// A thread takes the eight scores of a byte of the mask, at places that divide by 8 in the whole tensor. Where rows
// begin within a byte, a block takes eight rows, which end at one, and carries the byte between two rows along. While
// it works on a row the next one is on its way into the L2 cache.
#include "scores.h"

namespace sparc3 {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxSteps = 8;  // bytes of a thread that registers hold
constexpr unsigned kDigits = 2048, kEach = kDigits / kThreads;

struct Shared {
    unsigned digits[kDigits];
    unsigned sums[2][kThreads / 32];
    unsigned digit, rank, count;
    unsigned carry;  // bits of the byte that the next row begins in
};

struct Found {
    unsigned digit, rank, count;  // how many of the digit's `count` keys are pruned
};

// The digit that holds the key of rank `rank` (from 1). Clears the digits.
__device__ Found find_digit(Shared &shared, unsigned rank) {
    __syncthreads();
    unsigned *mine = shared.digits + threadIdx.x * kEach, sum = 0, total;
#pragma unroll
    for (unsigned i = 0; i < kEach; ++i) sum += mine[i];
    const unsigned before = scan_block<unsigned, kThreads>(sum, shared.sums[0], &total);
    if (before < rank && rank <= before + sum) {
        unsigned left = rank - before, i = 0;
        for (; mine[i] < left; ++i) left -= mine[i];
        shared.digit = threadIdx.x * kEach + i;
        shared.rank = left;
        shared.count = mine[i];
    }
#pragma unroll
    for (unsigned i = 0; i < kEach; ++i) mine[i] = 0;
    __syncthreads();
    return {shared.digit, shared.rank, shared.count};
}

// kSteps = 0: the row is read anew each time it is needed.
template <class Score, int kSteps>
struct Row {
    const Score *scores;
    bool aligned;
    uint64_t size, begin, end;  // scores of the tensor; the row's first and the one after its last
    uint64_t byte;              // where the row's first bit lies
    int steps;
    int32_t infinity;
    bool nan;
    int32_t keys[kSteps ? kSteps : 1][8];

    __device__ void load(int step, int32_t *eight) {
        const uint64_t first = (byte + (uint64_t)step * kThreads + threadIdx.x) * 8;
        load_keys(scores, aligned, first, begin, end, size, infinity, eight, nan);
    }
    __device__ void load() {
        if constexpr (kSteps > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) load(step, keys[step]);
        }
    }
    // body(step, eight keys)
    template <class Body>
    __device__ void each(const Body &body) {
        if constexpr (kSteps > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) body(step, keys[step]);
        } else {
            for (int step = 0; step < steps; ++step) {
                int32_t eight[8];
                load(step, eight);
                body(step, eight);
            }
        }
    }
    // Count the digits of the keys with key >> above == prefix.
    __device__ void count(Shared &shared, int above, int32_t prefix, int shift, unsigned offset) {
        each([&](int, const int32_t *eight) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (above == 32 || eight[i] >> (above & 31) == prefix)
                    atomicAdd(&shared.digits[((uint32_t)(eight[i] >> shift) + offset) % kDigits], 1u);
        });
    }
};

template <class Score, int kSteps>
__device__ void select_row(Row<Score, kSteps> &row, Shared &shared, unsigned prune, bool last, uint8_t *bits) {
    const unsigned cols = (unsigned)(row.end - row.begin);
    int32_t threshold = prune ? INT32_MAX : INT32_MIN;
    unsigned keep_equal = 0, equal = 0;
    const unsigned carry = shared.carry;
    row.load();
    __syncthreads();  // before the row's last byte leaves its own carry
    if (prune && prune < cols) {
        // Places outside of the row come first: their key is the lowest, and they are pruned on top.
        const unsigned slots = (unsigned)row.steps * kThreads * 8;
        row.count(shared, 32, 0, 21, kDigits / 2);
        Found found = find_digit(shared, prune + (slots - cols));
        const int32_t top = (int32_t)found.digit - (int32_t)kDigits / 2;
        row.count(shared, 21, top, 10, 0);
        found = find_digit(shared, found.rank);
        threshold = (int32_t)((uint32_t)top << 21 | found.digit << 10);
        if (sizeof(Score) == 4) {  // the lower half of other keys is zero
            row.count(shared, 10, threshold >> 10, 0, 0);  // bit 10 is the prefix's: the same for all
            found = find_digit(shared, found.rank);
            threshold |= (int32_t)(found.digit & 0x3ff);
        }
        equal = found.count;
        keep_equal = found.count - found.rank;
    }

    const uint64_t last_byte = (row.end - 1) / 8;
    unsigned before = 0;
    row.each([&](int step, const int32_t *eight) {
        uint32_t above = 0, level = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            above |= (eight[i] > threshold ? 1u : 0u) << i;
            level |= (eight[i] == threshold ? 1u : 0u) << i;
        }
        if (keep_equal == 0) {
            level = 0;
        } else if (keep_equal < equal) {
            unsigned total;
            const unsigned rank =
                before + scan_block<unsigned, kThreads>((unsigned)__popc(level), shared.sums[step % 2], &total);
            before += total;
            level = first_bits(level, rank, keep_equal);
        }
        const uint64_t byte = row.byte + (uint64_t)step * kThreads + threadIdx.x;
        if (byte > last_byte) return;
        unsigned kept = above | level;
        if (byte == row.byte) kept |= carry;
        const bool open = byte == last_byte && row.end % 8 && !last;
        if (!open) bits[byte] = (uint8_t)kept;
        if (byte == last_byte) shared.carry = open ? kept : 0;
    });
    __syncthreads();
}

// One block a processor is enough: held to two, the compiler spills.
template <class Score, int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    rows_kernel(const Score *scores, bool aligned, size_t rows, size_t cols, unsigned prune, int32_t infinity,
                uint8_t *bits, uint32_t *error) {
    __shared__ Shared shared;
    const size_t together = cols % 8 ? 8 : 1;
    for (unsigned i = threadIdx.x; i < kDigits; i += kThreads) shared.digits[i] = 0;
    if (threadIdx.x == 0) shared.carry = 0;
    __syncthreads();
    bool nan = false;
    for (size_t begin = blockIdx.x * together; begin < rows; begin += gridDim.x * together) {
        for (size_t r = begin; r < min(rows, begin + together); ++r) {
            const size_t following = r + 1 < begin + together ? r + 1 : begin + gridDim.x * together;
            if (following < rows) {
                const char *next = (const char *)(scores + following * cols);
                for (size_t i = threadIdx.x * 128; i < cols * sizeof(Score); i += kThreads * 128)
                    prefetch(next + i);
            }
            Row<Score, kSteps> row;
            row.scores = scores;
            row.aligned = aligned;
            row.size = (uint64_t)rows * cols;
            row.begin = (uint64_t)r * cols;
            row.end = row.begin + cols;
            row.byte = row.begin / 8;
            row.steps = kSteps ? kSteps : (int)(((row.end + 7) / 8 - row.byte + kThreads - 1) / kThreads);
            row.infinity = infinity;
            row.nan = false;
            select_row(row, shared, prune, r + 1 == rows, bits);
            nan |= row.nan;
        }
    }
    if (nan) atomicMax(error, (unsigned)SPARC3_ERROR_NAN);
}

template <class Score, int kSteps>
int select(int dtype, const void *scores, size_t rows, size_t cols, size_t prune, uint8_t *bits, uint32_t *error,
           void *stream) {
    // As many bytes as a row may touch; the next smaller number of steps where they suffice.
    if constexpr (kSteps > 1)
        if ((cols + 14) / 8 <= (size_t)kSteps / 2 * kThreads)
            return select<Score, kSteps / 2>(dtype, scores, rows, cols, prune, bits, error, stream);
    auto *kernel = rows_kernel<Score, kSteps>;
    int resident = 0;
    const cudaError_t failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
    if (failed != cudaSuccess) return status_of(failed);
    const size_t together = cols % 8 ? 8 : 1, groups = (rows + together - 1) / together;
    const size_t most = (size_t)max(1, resident * device_attribute(cudaDevAttrMultiProcessorCount));
    return launch(kernel, (unsigned)min(groups, most), kThreads, 0, stream, (const Score *)scores,
                  (uintptr_t)scores % 16 == 0, rows, cols, (unsigned)prune, infinity_bits(dtype), bits, error);
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

int sparc3_cuda_select_rows(int dtype, const void *scores, size_t rows, size_t cols, size_t prune, uint8_t *bits,
                            uint32_t *error, void *stream) {
    // Ranks within a row, with the places outside of it, take 32 bits.
    if (!known(dtype) || !error || prune > cols || cols > UINT32_MAX / 2) return SPARC3_ERROR_ARGUMENT;
    if (rows && cols && (!scores || !bits)) return SPARC3_ERROR_ARGUMENT;
    const int status = status_of(cudaMemsetAsync(error, 0, sizeof *error, (cudaStream_t)stream));
    if (status != SPARC3_OK || !rows || !cols) return status;
    const bool held = (cols + 14) / 8 <= (size_t)kMaxSteps * kThreads;
    if (dtype == SPARC3_FP32)
        return held ? select<uint32_t, kMaxSteps>(dtype, scores, rows, cols, prune, bits, error, stream)
                    : select<uint32_t, 0>(dtype, scores, rows, cols, prune, bits, error, stream);
    return held ? select<uint16_t, kMaxSteps>(dtype, scores, rows, cols, prune, bits, error, stream)
                : select<uint16_t, 0>(dtype, scores, rows, cols, prune, bits, error, stream);
}
