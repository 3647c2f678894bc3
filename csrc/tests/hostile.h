/* What the tests of packed weights against hostile input share: random numbers, buffers of an exact size, weights. */
#ifndef HOSTILE_H
#define HOSTILE_H

#include <string.h>

#include "check.h"

static uint64_t state = 88172645463325252u;
static inline uint32_t next_random(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16) % below;
}

static inline void *exactly(size_t size) {
    void *memory = malloc(size);
    CHECK(memory || !size);
    return memory;
}

static inline size_t size_of(int dtype) { return dtype == SPARC3_FP32 ? 4 : 2; }

/* A weight of small numbers that are the same in every dtype's bits: only zero or not matters here. */
static inline void *make_weight(int dtype, size_t count, uint32_t kept_in_8) {
    uint8_t *weight = exactly(count * size_of(dtype));
    memset(weight, 0, count * size_of(dtype));
    for (size_t i = 0; i < count; ++i)
        if (next_random(8) < kept_in_8) weight[i * size_of(dtype) + size_of(dtype) - 1] = 0x3f;
    return weight;
}

static inline int allowed(int status) { return status == SPARC3_OK || status == SPARC3_ERROR_FORMAT; }

#endif
