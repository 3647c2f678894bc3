/* What the tests in plain C share: a check that ends the program, and a run for every instruction set. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "sparc3/sparc3.h"

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: %s [%s]\n", __FILE__, __LINE__, #condition, sparc3_isa()); \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

static inline void with_every_instruction_set(void (*test)(void)) {
    const char *sets[] = {"portable", "avx2", "avx512", "avx512vbmi2", "avx512bf16"};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; ++i) {
        if (sparc3_force_isa(sets[i]) != SPARC3_OK) {
            printf("%s: not on this machine\n", sets[i]);
            continue;
        }
        test();
        printf("%s: passed\n", sparc3_isa());
    }
}

#endif
