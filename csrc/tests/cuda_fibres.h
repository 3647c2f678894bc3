// The machinery of cuda_emulation.h: a fibre for each thread of a block, what they wait for, and whose turn it is.
#ifndef SPARC3_CUDA_FIBRES_H
#define SPARC3_CUDA_FIBRES_H

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

inline void run_block(int threads, size_t shared) {
    const int warps = (threads + warpSize - 1) / warpSize;
    while (block.fibres.size() < (size_t)threads) block.fibres.emplace_back(new Fibre);
    if (block.exchanges.size() < (size_t)(warps * warpSize)) block.exchanges.resize((size_t)(warps * warpSize));
    block.live = (size_t)threads;
    block.waiting = 0;
    block.sum = 0;
    memset(dynamic_shared, 0xa5, shared);
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
            block.exchanges.clear();
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

#endif
