/* CUDA kernels on the CPU, so that their arithmetic, barriers and warp operations are tested where there is no GPU.
 *
 * Compile a .cu file as C++ with -DSPARC3_CUDA_EMULATION; it includes cuda/launch.h, which includes this in place of
 * the CUDA runtime. Device pointers are then host pointers, and `launch` runs the kernel before it returns.
 *
 * Modelled: grids and blocks of any shape; static shared memory, dynamic shared memory under the one name
 * `extern __shared__ uint4 dynamic_shared[]` (filled with garbage before each block, refused above the chip's
 * limit); __syncthreads, __syncthreads_or and _count, also where threads have returned; shuffles, votes, match and
 * reductions of a warp under any mask, diverged lanes with masks of their own included; atomics; asynchronous copies,
 * which arrive no sooner than they are waited for. Each CUDA thread is a fibre that runs until it has to wait; blocks,
 * warps and lanes take turns in ascending or (emulation::backwards) descending order. A barrier or warp operation that
 * some thread never reaches, or whose mask contradicts itself, throws std::runtime_error from `launch`.
 *
 * Not modelled: blocks that wait for each other (they run one after another), races that neither of the two orders
 * shows, memory visibility without __syncwarp or fences, alignment, bounds, registers, time, streams (everything is
 * in order), tensor cores, 16-bit float types. Run every test in both orders and under -fsanitize=undefined; the
 * compile gate covers registers and shared memory.
 */
#ifndef SPARC3_CUDA_EMULATION_H
#define SPARC3_CUDA_EMULATION_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All fibres of a block are one thread of the system; this form allows `extern` before it.
#define __shared__ thread_local

struct uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;
constexpr size_t kEmulatedShared = 227 << 10;
inline thread_local uint4 dynamic_shared[kEmulatedShared / sizeof(uint4)];

using std::max;
using std::min;

namespace emulation {

inline bool backwards = false;                 // the order in which blocks, warps and lanes take turns
inline size_t shared_limit = kEmulatedShared;  // dynamic shared memory that a block may have; 99 << 10 on some chips
inline int processors = 2;                     // what the runtime says the chip has

struct Wait {  // for `*counter` to leave `value`
    const uint64_t *counter = nullptr;
    uint64_t value = 0;
};

struct Copy {
    void *to;
    const void *from;
    size_t size;
};

struct Fibre {
    static constexpr size_t kStack = 256 << 10;
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf resume;
    uint3 index;
    int lane, warp;
    bool started = false, done = true;
    Wait wait;
    std::vector<std::vector<Copy>> copies;  // committed batches, the last one still open
};

// One warp operation in progress; lanes that diverged have one for each mask.
struct Exchange {
    uint64_t generation = 0;
    unsigned arrived = 0, mask = 0;
    uint64_t values[32], result[32];
};

struct Block {
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<Exchange> exchanges;  // [warp][lowest lane of the mask]
    Fibre *current = nullptr;
    jmp_buf scheduler;
    std::function<void()> body;
    size_t live = 0, waiting = 0;
    uint64_t barriers = 0, sum = 0, last_sum = 0;
    const char *failure = nullptr;
};
inline thread_local Block block;

inline void yield() {
    if (!_setjmp(block.current->resume)) _longjmp(block.scheduler, 1);
}

// Ends the launch: an exception cannot leave a fibre.
[[noreturn]] inline void fail(const char *reason) {
    block.failure = reason;
    for (;;) yield();
}

inline void wait_for(const uint64_t &counter, uint64_t value) {
    block.current->wait = {&counter, value};
    yield();
    block.current->wait = {};
}

inline void open_barrier() {
    block.waiting = 0;
    block.last_sum = block.sum;
    block.sum = 0;
    ++block.barriers;
}

// Returns the sum of `value` over the block.
inline uint64_t barrier(uint64_t value) {
    block.sum += value;
    const uint64_t here = block.barriers;
    if (++block.waiting == block.live)
        open_barrier();
    else
        wait_for(block.barriers, here);
    return block.last_sum;
}

inline void live_for_ever() {
    for (;;) {
        block.body();
        block.current->done = true;
        if (--block.live && block.waiting == block.live) open_barrier();
        yield();
    }
}

inline void resume(Fibre &fibre) {
    block.current = &fibre;
    threadIdx = fibre.index;
    if (_setjmp(block.scheduler)) return;
    if (fibre.started) _longjmp(fibre.resume, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = Fibre::kStack;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, live_for_ever, 0);
    setcontext(&fibre.start);
}

inline int ordered(int i, int n) { return backwards ? n - 1 - i : i; }

// Resume the lanes of a warp until all have returned or wait for the block; whether any was resumed.
inline bool run_warp(int warp, int threads) {
    const int first = warp * warpSize, lanes = min(warpSize, threads - first);
    bool any = false;
    for (bool resumed = true; resumed; any |= resumed) {
        resumed = false;
        for (int i = 0; i < lanes; ++i) {
            Fibre &fibre = *block.fibres[(size_t)(first + ordered(i, lanes))];
            if (fibre.done || (fibre.wait.counter && *fibre.wait.counter == fibre.wait.value)) continue;
            resumed = true;
            resume(fibre);
            if (block.failure) return false;
        }
    }
    return any;
}

inline void run_block(int threads) {
    const int warps = (threads + warpSize - 1) / warpSize;
    while (block.fibres.size() < (size_t)threads) block.fibres.emplace_back(new Fibre);
    block.exchanges.assign((size_t)warps * warpSize, Exchange{});
    block.live = (size_t)threads;
    block.waiting = 0;
    block.sum = 0;
    memset(dynamic_shared, 0xa5, sizeof dynamic_shared);
    for (int t = 0; t < threads; ++t) {
        Fibre &fibre = *block.fibres[(size_t)t];
        const unsigned x = blockDim.x, u = (unsigned)t;
        fibre.index = {u % x, u / x % blockDim.y, u / (x * blockDim.y)};
        fibre.lane = t % warpSize;
        fibre.warp = t / warpSize;
        fibre.done = false;
        fibre.wait = {};
        fibre.copies.assign(1, {});
    }
    while (block.live) {
        bool any = false;
        for (int w = 0; w < warps && !block.failure; ++w) any |= run_warp(ordered(w, warps), threads);
        if (!any && !block.failure) block.failure = "a barrier or warp operation waits for threads that do not come";
        if (block.failure) {
            block.fibres.clear();
            throw std::runtime_error(std::exchange(block.failure, nullptr));
        }
    }
}

// All lanes of `mask` meet here; the values that each brought, by lane.
inline const uint64_t *exchange(unsigned mask, uint64_t value) {
    Fibre &self = *block.current;
    if (!(mask >> self.lane & 1)) fail("a lane calls a warp operation whose mask leaves it out");
    Exchange &shared = block.exchanges[(size_t)(self.warp * warpSize + __builtin_ctz(mask))];
    if (shared.arrived && shared.mask != mask) fail("lanes disagree about the mask");
    shared.mask = mask;
    shared.values[self.lane] = value;
    shared.arrived |= 1u << self.lane;
    if (shared.arrived == mask) {
        memcpy(shared.result, shared.values, sizeof shared.values);
        shared.arrived = 0;
        ++shared.generation;
    } else {
        wait_for(shared.generation, shared.generation);
    }
    return shared.result;
}

template <class T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8, "a lane gives at most 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T value_of(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The value of lane `source`, where that is in the same group of `width` lanes, else the lane's own.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
    const uint64_t *values = exchange(mask, bits_of(value));
    const int lane = block.current->lane, group = lane / width * width;
    return source < group || source >= group + width ? value : value_of<T>(values[source]);
}

}  // namespace emulation

// ---- barriers

inline void __syncthreads() { emulation::barrier(0); }
inline int __syncthreads_or(int value) { return emulation::barrier(value != 0) != 0; }
inline int __syncthreads_count(int value) { return (int)emulation::barrier(value != 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warps

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const int group = emulation::block.current->lane / width * width;
    return emulation::shuffle(mask, value, group + source % width, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane - (int)by, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane + (int)by, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane ^ by, width);
}

// The lanes of the mask whose value fulfils `wanted`.
template <class T, class Wanted>
unsigned emulated_vote(unsigned mask, T value, const Wanted &wanted) {
    const uint64_t *values = emulation::exchange(mask, emulation::bits_of(value));
    unsigned found = 0;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1 && wanted(emulation::value_of<T>(values[lane]))) found |= 1u << lane;
    return found;
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    return emulated_vote(mask, value, [](int v) { return v != 0; });
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return emulated_vote(mask, value, [&](T v) { return v == value; });
}

template <class T, class Join>
T emulated_reduction(unsigned mask, T value, const Join &join) {
    const uint64_t *values = emulation::exchange(mask, emulation::bits_of(value));
    T found = value;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1 && lane != emulation::block.current->lane)
            found = join(found, emulation::value_of<T>(values[lane]));
    return found;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return (T)(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return min(a, b); });
}

// ---- atomics: no other fibre runs in between

template <class T, class V>
T emulated_atomic(T *at, V value) {
    const T before = *at;
    *at = (T)value;
    return before;
}
template <class T, class V>
T atomicAdd(T *at, V value) {
    return emulated_atomic(at, *at + value);
}
template <class T, class V>
T atomicSub(T *at, V value) {
    return emulated_atomic(at, *at - value);
}
template <class T, class V>
T atomicOr(T *at, V value) {
    return emulated_atomic(at, *at | value);
}
template <class T, class V>
T atomicMax(T *at, V value) {
    return emulated_atomic(at, max(*at, (T)value));
}
template <class T, class V>
T atomicMin(T *at, V value) {
    return emulated_atomic(at, min(*at, (T)value));
}

// ---- arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
// Clamped at 32, where __funnelshift_r wraps.
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> std::min(by, 32u));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> 4 * i & 0xf, byte = (unsigned)(bytes >> 8 * (pick & 7)) & 0xff;
        found |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return found;
}
inline float __uint_as_float(unsigned x) { return emulation::value_of<float>(x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emulation::bits_of(x); }
template <class T>
T __ldg(const T *at) {
    return *at;
}
template <class T>
T __ldcs(const T *at) {
    return *at;
}

// ---- asynchronous copies (cuda_pipeline.h)

inline void __pipeline_memcpy_async(void *to, const void *from, size_t size) {
    emulation::block.current->copies.back().push_back({to, from, size});
}
inline void __pipeline_commit() { emulation::block.current->copies.emplace_back(); }
// Wait for all batches of the calling thread but the `prior` last ones.
inline void __pipeline_wait_prior(size_t prior) {
    auto &copies = emulation::block.current->copies;
    while (copies.size() > prior + 1) {
        for (const emulation::Copy &copy : copies.front()) memcpy(copy.to, copy.from, copy.size);
        copies.erase(copies.begin());
    }
}

// ---- runtime

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::processors : (int)emulation::shared_limit;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes) {
    return (size_t)bytes <= emulation::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t) {
    return memset(at, value, size), cudaSuccess;
}

namespace emulation {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, Arguments... arguments) {
    const unsigned size = threads.x * threads.y * threads.z;
    if (shared > shared_limit || !size || size > 1024 || !grid.x || !grid.y || !grid.z) return cudaErrorInvalidValue;
    blockDim = threads;
    gridDim = grid;
    block.body = [=] { kernel(arguments...); };
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        run_block((int)size);
    }
    return cudaSuccess;
}

}  // namespace emulation

#endif
