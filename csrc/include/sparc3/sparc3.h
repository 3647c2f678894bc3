/* libsparc3: the CPU kernels of SparC3 behind a C ABI.
 *
 * Every function that can fail returns a sparc3_status; sparc3_strerror puts it into words. Nothing throws, nothing
 * keeps a pointer after it returns, and all memory is the caller's: `_size` functions say how much, any alignment
 * that malloc gives will do. Functions may be called from several threads at once on different memory.
 * `threads` is how many threads may work, 0 for all of the machine; small inputs run on the calling thread.
 *
 * Masks are packed: bit `bits[i >> 3] >> (i & 7) & 1` belongs to element i of the row-major tensor, 1 = kept,
 * the padding bits of the last byte are 0.
 */
#ifndef SPARC3_H
#define SPARC3_H

#include <stddef.h>
#include <stdint.h>

#define SPARC3_VERSION "0.1.0"

#if defined(__GNUC__)
#define SPARC3_API __attribute__((visibility("default")))
#else
#define SPARC3_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sparc3_status {
    SPARC3_OK = 0,
    SPARC3_ERROR_ARGUMENT = 1,  /* a null pointer, an unknown dtype, or a size out of range */
    SPARC3_ERROR_WORKSPACE = 2, /* the workspace is smaller than its _size function says */
    SPARC3_ERROR_NAN = 3,       /* a score is NaN */
    SPARC3_ERROR_STATE = 4,     /* a selection call out of order, or states of different selections */
    SPARC3_ERROR_CHANGED = 5,   /* the second pass did not see the scores of the first */
    SPARC3_ERROR_ISA = 6,       /* this machine lacks the instruction set asked for */
    SPARC3_ERROR_CUDA = 7,      /* the CUDA driver or runtime said no */
    SPARC3_ERROR_FORMAT = 8,    /* a packed weight contradicts itself */
    SPARC3_ERROR_PATTERN = 9,   /* a weight to be packed is not N:M */
    SPARC3_ERROR_OVERLAP = 10   /* an output overlaps an input, another output or the workspace */
} sparc3_status;

typedef enum sparc3_dtype { SPARC3_FP32 = 0, SPARC3_BF16 = 1, SPARC3_FP16 = 2 } sparc3_dtype;

/* ---- library ------------------------------------------------------------------------------------------------ */

SPARC3_API const char *sparc3_version(void);
SPARC3_API const char *sparc3_strerror(int status);

enum {
    SPARC3_CPU_AVX2 = 1u << 0,    /* AVX2, FMA, F16C, BMI2 (x86-64-v3) */
    SPARC3_CPU_AVX512 = 1u << 1,  /* AVX-512 F, BW, CD, DQ, VL (x86-64-v4) */
    SPARC3_CPU_AVX512_VBMI2 = 1u << 2, /* AVX-512 VBMI2 and VPOPCNTDQ */
    SPARC3_CPU_AVX512_BF16 = 1u << 3   /* AVX-512 BF16 */
};

/* What the machine offers (SPARC3_CPU_* flags). */
SPARC3_API uint32_t sparc3_cpu_features(void);
/* Name of the instruction set in use: "avx512bf16", "avx512vbmi2", "avx512", "avx2" or "portable". */
SPARC3_API const char *sparc3_isa(void);
/* Use this instruction set from now on, in every thread; NULL chooses the best one again. */
SPARC3_API int sparc3_force_isa(const char *name);

/* ---- exact selection ------------------------------------------------------------------------------------------
 *
 * The `prune` lowest scores are pruned, exactly so many; among equal scores the lower index is kept. -0 equals +0,
 * infinities are ordinary values, NaN is an error.
 *
 * Scores are ordered by a signed 32-bit key: the bits of a non-negative fp32 score, minus the magnitude bits of a
 * negative one; 16-bit scores are put into the upper half first. The threshold is found by counting keys by their
 * upper 16 bits, then (fp32) those in the boundary bin by their lower 16 bits.
 */

typedef struct sparc3_threshold {
    int32_t key;         /* scores above this key are kept, those below pruned */
    uint32_t reserved;   /* 0 */
    uint64_t keep_equal; /* how many scores equal to the key are kept, the first ones in linear order */
} sparc3_threshold;

/* Streaming: scores arrive in chunks, of any size and in any order, from any number of processes.
 *
 *     init(state); count(state, chunk)...; merge(state, other)...; refine(state, prune, &more);
 *     if (more) { count(state, chunk)... again; merge...; refine(state, prune, &more); }
 *     threshold(state, &t); mask(chunk, &t, bits)... in linear order
 *
 * A state is plain bytes without pointers: it may be copied, stored, and sent to another process of the same
 * architecture and library version. After a second-pass merge every process needs the refined state of the first
 * pass: refine once on the merged state and send it, counts cleared, to all.
 */
SPARC3_API size_t sparc3_select_state_size(void);
SPARC3_API int sparc3_select_init(void *state, int dtype);
/* Count the `n` scores of a chunk. The workspace is sparc3_select_workspace_size(threads) bytes.
 * After SPARC3_ERROR_NAN the state must be initialised again. */
SPARC3_API size_t sparc3_select_workspace_size(int threads);
SPARC3_API int sparc3_select_count(void *state, const void *scores, size_t n, int threads, void *workspace,
                                   size_t workspace_size);
/* Add what `other` counted to `state`; both must be in the same pass of the same selection. */
SPARC3_API int sparc3_select_merge(void *state, const void *other);
/* Close a pass: `*more` is 1 when all scores must be counted once more, 0 when the threshold is known. */
SPARC3_API int sparc3_select_refine(void *state, uint64_t prune, int *more);
SPARC3_API int sparc3_select_threshold(const void *state, sparc3_threshold *out);
/* Write the packed mask, ceil(n / 8) bytes, of the next chunk in linear order; `threshold->keep_equal` goes down by
 * the equal scores that were kept. */
SPARC3_API int sparc3_select_mask(int dtype, const void *scores, size_t n, sparc3_threshold *threshold, uint8_t *bits,
                                  int threads);

/* One resident tensor of `n` scores. `bits` may be NULL where only the threshold is wanted, and `out` where only the
 * bits are. The workspace is sparc3_select_flat_workspace_size(threads) bytes: 0.5 MB for one
 * thread, 0.75 MB for any number. */
SPARC3_API size_t sparc3_select_flat_workspace_size(int threads);
SPARC3_API int sparc3_select_flat(int dtype, const void *scores, size_t n, uint64_t prune, uint8_t *bits,
                                  sparc3_threshold *out, int threads, void *workspace, size_t workspace_size);

/* Prune the `prune` lowest of each row of scores [rows, cols]. */
SPARC3_API size_t sparc3_select_rows_workspace_size(size_t cols, int threads);
SPARC3_API int sparc3_select_rows(int dtype, const void *scores, size_t rows, size_t cols, size_t prune,
                                  uint8_t *bits, int threads, void *workspace, size_t workspace_size);

/* Keep the `keep` highest of every `group` consecutive scores; group <= 32 divides n, the number of scores. */
SPARC3_API int sparc3_select_nm(int dtype, const void *scores, size_t n, int keep, int group, uint8_t *bits,
                                int threads);

/* ---- weight relevance -----------------------------------------------------------------------------------------
 *
 * acc [n, k] += sum_s f(G_s^T X_s), f = |.| or (.)^2, or for SPARC3_TOKEN_SQUARE sum_s (G_s * G_s)^T (X_s * X_s), with
 * g [samples, tokens, n], x [samples, tokens, k], dense row-major, of `dtype`; products and sums in fp32. Each element
 * of acc is read and written once for every batch of samples that fits the cache. Bit-reproducible for any `threads`.
 */
typedef enum sparc3_reduction { SPARC3_ABS = 0, SPARC3_SQUARE = 1, SPARC3_TOKEN_SQUARE = 2 } sparc3_reduction;

SPARC3_API size_t sparc3_weight_relevance_workspace_size(size_t samples, size_t tokens, size_t n, size_t k,
                                                         int threads);
SPARC3_API int sparc3_weight_relevance(int dtype, int reduction, const void *g, const void *x, size_t samples,
                                       size_t tokens, size_t n, size_t k, float *acc, int threads, void *workspace,
                                       size_t workspace_size);

/* ---- dense linears on few tokens ---------------------------------------------------------------------------------
 *
 * y [tokens, n] = x W^T and dx [tokens, k] = g W, with x [tokens, k], g [tokens, n], w [n, k], dense row-major fp32. The
 * weight is read once; made for up to some 32 tokens, right for any number. Bit-reproducible for any `threads`.
 */
SPARC3_API size_t sparc3_dense_linear_workspace_size(size_t tokens, size_t k);
SPARC3_API int sparc3_dense_linear(const float *x, const float *w, size_t tokens, size_t n, size_t k, float *y,
                                   int threads, void *workspace, size_t workspace_size);
SPARC3_API size_t sparc3_dense_input_gradient_workspace_size(size_t tokens, size_t n, size_t k);
SPARC3_API int sparc3_dense_input_gradient(const float *g, const float *w, size_t tokens, size_t n, size_t k,
                                           float *dx, int threads, void *workspace, size_t workspace_size);

/* ---- packed weights -------------------------------------------------------------------------------------------
 *
 * A weight [rows, columns] with zeros in it, in one of three formats, all row-major and little-endian. A weight is
 * kept if it is not zero; what is kept is restored bit by bit, everything else as +0.
 *
 * `_unpack` and `_linear` never read or write outside of the sizes given, whatever the contents, and return
 * SPARC3_ERROR_FORMAT where they notice that a weight contradicts itself (the output is then undefined); `_check`
 * notices all of it. Offsets need not start at 0 for them, so that a range of rows is a weight of its own:
 * advance `bits` (or not: CSR) and `offsets`, and lower `rows`.
 *
 * Linear: y [batch, rows] = x [batch, columns] W^T + bias [rows] (NULL: none), all of the weight's dtype, products
 * summed up in fp32 (with AVX512_BF16, bf16 subnormals count as zero). Same input, same threads or not: same bits, on
 * one instruction set. The workspace is sparc3_linear_workspace_size bytes for every format. It is made for few vectors;
 * up to how many it is faster than a dense GEMM depends on format, shape and machine (docs/sparse.md).
 */
SPARC3_API size_t sparc3_linear_workspace_size(size_t rows, size_t columns, size_t batch, int threads);

/* Ask the system for 2 MB pages under this memory; call it before the memory is first written. Streaming weights
 * from them is up to a third faster. A hint: it cannot fail. */
SPARC3_API void sparc3_advise_huge_pages(void *memory, size_t size);

/* Bitmap. Bit c & 7 of byte c >> 3 of a row of `bits` says that column c is kept; a row has 4 * ceil(columns / 32)
 * bytes, padding bits are 0. The kept values of row r are values[offsets[r]] to values[offsets[r + 1] - 1]. */
typedef struct sparc3_bitmap {
    int dtype;
    size_t rows, columns;
    size_t count;           /* values in all */
    const uint8_t *bits;    /* [rows][4 * ceil(columns / 32)] */
    const void *values;     /* [count] */
    const int64_t *offsets; /* [rows + 1] */
} sparc3_bitmap;

/* Pass 1 writes offsets [rows + 1], the last of which is how many values there are; pass 2 writes `bits` and `values`
 * [count], count = offsets[rows]. Also the first pass of CSR. */
SPARC3_API int sparc3_count_kept(int dtype, const void *weight, size_t rows, size_t columns, int64_t *offsets,
                                 int threads);
SPARC3_API int sparc3_bitmap_pack(int dtype, const void *weight, size_t rows, size_t columns, const int64_t *offsets,
                                  uint8_t *bits, void *values, size_t count, int threads);
SPARC3_API int sparc3_bitmap_check(const sparc3_bitmap *weight, int threads);
SPARC3_API int sparc3_bitmap_unpack(const sparc3_bitmap *weight, void *out, int threads);
SPARC3_API int sparc3_bitmap_linear(const sparc3_bitmap *weight, const void *x, size_t batch, const void *bias,
                                    void *y, int threads, void *workspace, size_t workspace_size);

/* N:M, 1 <= n <= m <= 16, m divides columns. Every group of m columns has n values, in ascending order of their places
 * in the group; places take 2 bits (m <= 4) or 4, the first one lowest. A row has columns / m * n values and
 * ceil(columns / m * n * width / 8) bytes of indices. Groups with fewer than n nonzeros are filled up with +0 at their
 * first free places. */
typedef struct sparc3_nm {
    int dtype, n, m;
    size_t rows, columns;
    const void *values;
    const uint8_t *indices;
} sparc3_nm;

/* SPARC3_ERROR_PATTERN where a group has more than n nonzeros: `*wrong` (may be NULL) is the first such group, counted
 * over all rows. */
SPARC3_API int sparc3_nm_pack(int dtype, const void *weight, size_t rows, size_t columns, int n, int m, void *values,
                              uint8_t *indices, uint64_t *wrong, int threads);
SPARC3_API int sparc3_nm_check(const sparc3_nm *weight, int threads);
SPARC3_API int sparc3_nm_unpack(const sparc3_nm *weight, void *out, int threads);
SPARC3_API int sparc3_nm_linear(const sparc3_nm *weight, const void *x, size_t batch, const void *bias, void *y,
                                int threads, void *workspace, size_t workspace_size);

/* CSR. values and offsets as in the bitmap; indices [count] are the columns, ascending within a row: uint16_t where
 * columns <= 65536, else int32_t. */
typedef struct sparc3_csr {
    int dtype;
    size_t rows, columns;
    size_t count;
    const void *indices;
    const void *values;
    const int64_t *offsets;
} sparc3_csr;

SPARC3_API int sparc3_csr_pack(int dtype, const void *weight, size_t rows, size_t columns, const int64_t *offsets,
                               void *indices, void *values, size_t count, int threads);
SPARC3_API int sparc3_csr_check(const sparc3_csr *weight, int threads);
SPARC3_API int sparc3_csr_unpack(const sparc3_csr *weight, void *out, int threads);
SPARC3_API int sparc3_csr_linear(const sparc3_csr *weight, const void *x, size_t batch, const void *bias, void *y,
                                 int threads, void *workspace, size_t workspace_size);

/* From one format to another, row by row, without the dense weight. Bitmap and CSR have the same values and offsets, so
 * that only bits or indices are made, and a kept zero stays kept. N:M takes the nonzero values: what comes out is what
 * packing the unpacked weight gives. Between CSR and N:M go through a bitmap. SPARC3_ERROR_FORMAT where the weight
 * contradicts itself.
 *
 * To N:M: as sparc3_nm_pack. From N:M: sparc3_nm_count_kept writes offsets [rows + 1], then sparc3_nm_to_bitmap `bits`
 * and `values` [count], count = offsets[rows]. */
SPARC3_API int sparc3_bitmap_to_csr(const sparc3_bitmap *weight, void *indices, int threads);
SPARC3_API int sparc3_csr_to_bitmap(const sparc3_csr *weight, uint8_t *bits, int threads);
SPARC3_API int sparc3_bitmap_to_nm(const sparc3_bitmap *weight, int n, int m, void *values, uint8_t *indices,
                                   uint64_t *wrong, int threads);
SPARC3_API int sparc3_nm_count_kept(const sparc3_nm *weight, int64_t *offsets, int threads);
SPARC3_API int sparc3_nm_to_bitmap(const sparc3_nm *weight, const int64_t *offsets, uint8_t *bits, void *values,
                                   size_t count, int threads);

#ifdef __cplusplus
}
#endif

#endif
