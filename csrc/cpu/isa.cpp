#include "isa.h"

#include <string.h>

#include <atomic>

#include "sparc3/sparc3.h"

namespace sparc3 {
namespace {

const Kernels *best() {
#ifdef SPARC3_X86
    const uint32_t features = sparc3_cpu_features();
    if (features & SPARC3_CPU_AVX512) return &kernels_avx512;
    if (features & SPARC3_CPU_AVX2) return &kernels_avx2;
#endif
    return &kernels_portable;
}

std::atomic<const Kernels *> in_use{nullptr};

}  // namespace

const Kernels &kernels() {
    const Kernels *chosen = in_use.load(std::memory_order_relaxed);
    if (!chosen) in_use.store(chosen = best(), std::memory_order_relaxed);
    return *chosen;
}

}  // namespace sparc3

using namespace sparc3;

uint32_t sparc3_cpu_features(void) {
    uint32_t features = 0;
#ifdef SPARC3_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt")) {
        features |= SPARC3_CPU_AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            features |= SPARC3_CPU_AVX512;
    }
#endif
    return features;
}

const char *sparc3_isa(void) { return kernels().name; }

int sparc3_force_isa(const char *name) {
    const Kernels *wanted = nullptr;
    if (!name) {
        wanted = best();
    } else if (!strcmp(name, kernels_portable.name)) {
        wanted = &kernels_portable;
    }
#ifdef SPARC3_X86
    else if (!strcmp(name, kernels_avx2.name) && sparc3_cpu_features() & SPARC3_CPU_AVX2) {
        wanted = &kernels_avx2;
    } else if (!strcmp(name, kernels_avx512.name) && sparc3_cpu_features() & SPARC3_CPU_AVX512) {
        wanted = &kernels_avx512;
    }
#endif
    if (!wanted) return SPARC3_ERROR_ISA;
    in_use.store(wanted, std::memory_order_relaxed);
    return SPARC3_OK;
}
