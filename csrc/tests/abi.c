/* Plain C against the shared library: the header is C, the symbols are there, every instruction set gives the right
 * answer on cases small enough to work out by hand. tests/kernels holds the thorough tests. */
#include <math.h>
#include <string.h>

#include "check.h"

static void *workspace;
static size_t workspace_size;

static void *grown(size_t size) {
    if (size > workspace_size) {
        workspace = realloc(workspace, size);
        workspace_size = size;
        CHECK(workspace);
    }
    return workspace;
}

static void test_flat(void) {
    const float scores[9] = {3, -1, 0, -0.0f, 0, 7, -INFINITY, 2, INFINITY};
    uint8_t bits[2];
    sparc3_threshold threshold;
    const size_t size = sparc3_select_flat_workspace_size(1);
    /* -inf and -1 go, then the last of the three zeros: elements 1, 4, 6. */
    CHECK(sparc3_select_flat(SPARC3_FP32, scores, 9, 3, bits, &threshold, 1, grown(size), size) == SPARC3_OK);
    CHECK(bits[0] == 0xad && bits[1] == 1);
    CHECK(threshold.key == 0 && threshold.keep_equal == 2);
    CHECK(sparc3_select_flat(SPARC3_FP32, scores, 9, 10, bits, NULL, 1, grown(size), size) == SPARC3_ERROR_ARGUMENT);
    CHECK(sparc3_select_flat(SPARC3_FP32, scores, 9, 3, bits, NULL, 1, workspace, size - 1) == SPARC3_ERROR_WORKSPACE);
    CHECK(sparc3_select_flat(3, scores, 9, 3, bits, NULL, 1, workspace, size) == SPARC3_ERROR_ARGUMENT);
}

static void test_nan(void) {
    const float scores[4] = {1, -NAN, 2, 3};
    const uint16_t half[2] = {0x7c01, 0};
    uint8_t bits[1];
    const size_t size = sparc3_select_flat_workspace_size(1);
    CHECK(sparc3_select_flat(SPARC3_FP32, scores, 4, 1, bits, NULL, 1, grown(size), size) == SPARC3_ERROR_NAN);
    CHECK(sparc3_select_flat(SPARC3_FP16, half, 2, 1, bits, NULL, 1, grown(size), size) == SPARC3_ERROR_NAN);
    CHECK(sparc3_select_flat(SPARC3_BF16, half, 2, 1, bits, NULL, 1, grown(size), size) == SPARC3_OK);
    CHECK(sparc3_select_nm(SPARC3_FP32, scores, 4, 2, 4, bits, 1) == SPARC3_ERROR_NAN);
}

static void test_stream(void) {
    const float one[3] = {5, 1, 4}, two[2] = {2, 3};
    const size_t size = sparc3_select_state_size();
    void *a = malloc(size), *b = malloc(size);
    sparc3_threshold threshold;
    uint8_t bits;
    int more;
    CHECK(a && b && size < 1 << 20);
    memset(a, 0, size);
    CHECK(sparc3_select_count(a, one, 3, 1, NULL, 0) == SPARC3_ERROR_STATE);
    CHECK(sparc3_select_init(a, SPARC3_FP32) == SPARC3_OK && sparc3_select_init(b, SPARC3_FP32) == SPARC3_OK);
    CHECK(sparc3_select_count(a, one, 3, 1, NULL, 0) == SPARC3_OK);
    CHECK(sparc3_select_count(b, two, 2, 1, NULL, 0) == SPARC3_OK);
    CHECK(sparc3_select_merge(a, b) == SPARC3_OK);
    CHECK(sparc3_select_threshold(a, &threshold) == SPARC3_ERROR_STATE);
    CHECK(sparc3_select_refine(a, 2, &more) == SPARC3_OK && more);
    CHECK(sparc3_select_merge(a, b) == SPARC3_ERROR_STATE);
    CHECK(sparc3_select_refine(a, 2, &more) == SPARC3_ERROR_CHANGED);
    CHECK(sparc3_select_count(a, one, 3, 1, NULL, 0) == SPARC3_OK);
    CHECK(sparc3_select_count(a, two, 2, 1, NULL, 0) == SPARC3_OK);
    CHECK(sparc3_select_refine(a, 2, &more) == SPARC3_OK && !more);
    CHECK(sparc3_select_threshold(a, &threshold) == SPARC3_OK);
    CHECK(sparc3_select_mask(SPARC3_FP32, one, 3, &threshold, &bits, 1) == SPARC3_OK && bits == 5);
    CHECK(sparc3_select_mask(SPARC3_FP32, two, 2, &threshold, &bits, 1) == SPARC3_OK && bits == 2);
    free(a);
    free(b);
}

static void test_rows_and_groups(void) {
    const float scores[6] = {1, 2, 3, 6, 5, 5}, groups[8] = {1, 1, 1, 1, 4, 3, 2, 1};
    uint8_t bits;
    const size_t size = sparc3_select_rows_workspace_size(3, 1);
    CHECK(sparc3_select_rows(SPARC3_FP32, scores, 2, 3, 1, &bits, 1, grown(size), size) == SPARC3_OK);
    CHECK(bits == 0x1e);
    CHECK(sparc3_select_nm(SPARC3_FP32, groups, 8, 2, 4, &bits, 1) == SPARC3_OK && bits == 0x33);
    CHECK(sparc3_select_nm(SPARC3_FP32, groups, 8, 2, 3, &bits, 1) == SPARC3_ERROR_ARGUMENT);
}

static void test_weight_relevance(void) {
    /* Two samples of one token, n = 2, k = 1: g x = {2, -6} and {-4, 8}. */
    const float g[4] = {1, -3, -2, 4}, x[2] = {2, 2};
    float acc[2] = {100, 200};
    const size_t size = sparc3_weight_relevance_workspace_size(2, 1, 2, 1, 1);
    CHECK(sparc3_weight_relevance(SPARC3_FP32, SPARC3_ABS, g, x, 2, 1, 2, 1, acc, 1, grown(size), size) == SPARC3_OK);
    CHECK(acc[0] == 106 && acc[1] == 214);
    CHECK(sparc3_weight_relevance(SPARC3_FP32, SPARC3_SQUARE, g, x, 2, 1, 2, 1, acc, 1, workspace, size) == SPARC3_OK);
    CHECK(acc[0] == 126 && acc[1] == 314);
    CHECK(sparc3_weight_relevance(SPARC3_FP32, SPARC3_TOKEN_SQUARE, g, x, 2, 1, 2, 1, acc, 1, workspace, size) == SPARC3_OK);
    CHECK(acc[0] == 146 && acc[1] == 414);
    CHECK(sparc3_weight_relevance(SPARC3_FP32, 3, g, x, 2, 1, 2, 1, acc, 1, workspace, size) == SPARC3_ERROR_ARGUMENT);
}

static void test(void) {
    test_flat();
    test_nan();
    test_stream();
    test_rows_and_groups();
    test_weight_relevance();
}

int main(void) {
    CHECK(strcmp(sparc3_version(), SPARC3_VERSION) == 0);
    CHECK(strcmp(sparc3_strerror(SPARC3_OK), "success") == 0);
    CHECK(sparc3_force_isa("no such set") == SPARC3_ERROR_ISA);
    with_every_instruction_set(test);
    CHECK(sparc3_force_isa(NULL) == SPARC3_OK);
    free(workspace);
    return 0;
}
