#include "isa.h"

#include <string.h>

#include <atomic>

#include "sparc3/sparc3.h"

namespace sparc3 {
namespace {

struct Isa {
    const char *name;
    uint32_t features;  // that it needs
    const Kernels *kernels;
    const PackedKernels *packed;
};

// Best first.
constexpr Isa kIsas[] = {
#ifdef SPARC3_X86
    {"avx512bf16", SPARC3_CPU_AVX512 | SPARC3_CPU_AVX512_VBMI2 | SPARC3_CPU_AVX512_BF16, &kernels_avx512,
     &packed_avx512bf16},
    {"avx512vbmi2", SPARC3_CPU_AVX512 | SPARC3_CPU_AVX512_VBMI2, &kernels_avx512, &packed_avx512vbmi2},
    {"avx512", SPARC3_CPU_AVX512, &kernels_avx512, &packed_avx512},
    {"avx2", SPARC3_CPU_AVX2, &kernels_avx2, &packed_avx2},
#endif
    {"portable", 0, &kernels_portable, &packed_portable},
};

// The first one that the machine has, of this name where one is given; null where there is none.
const Isa *find(const char *name) {
    const uint32_t features = sparc3_cpu_features();
    for (const Isa &isa : kIsas)
        if ((isa.features & ~features) == 0 && (!name || !strcmp(name, isa.name))) return &isa;
    return nullptr;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa &in_use() {
    const Isa *isa = chosen.load(std::memory_order_relaxed);
    if (!isa) chosen.store(isa = find(nullptr), std::memory_order_relaxed);
    return *isa;
}

}  // namespace

const Kernels &kernels() { return *in_use().kernels; }
const PackedKernels &packed_kernels() { return *in_use().packed; }

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
            __builtin_cpu_supports("avx512vl")) {
            features |= SPARC3_CPU_AVX512;
            if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq"))
                features |= SPARC3_CPU_AVX512_VBMI2;
            if (__builtin_cpu_supports("avx512bf16")) features |= SPARC3_CPU_AVX512_BF16;
        }
    }
#endif
    return features;
}

const char *sparc3_isa(void) { return in_use().name; }

int sparc3_force_isa(const char *name) {
    const Isa *isa = find(name);
    if (!isa) return SPARC3_ERROR_ISA;
    chosen.store(isa, std::memory_order_relaxed);
    return SPARC3_OK;
}
