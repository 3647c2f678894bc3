#include <stdint.h>

#include "sparc3/sparc3.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

void sparc3_advise_huge_pages(void *memory, size_t size) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + size) / kPage * kPage;
    if (memory && begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)size;
#endif
}
