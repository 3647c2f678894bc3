/* libsparc3_cuda: the CUDA part of SparC3 behind a C ABI; loads without a GPU or driver. Status codes: sparc3.h. */
#ifndef SPARC3_CUDA_H
#define SPARC3_CUDA_H

#include "sparc3/sparc3.h"

#ifdef __cplusplus
extern "C" {
#endif

SPARC3_API const char *sparc3_cuda_version(void);
/* Number of devices. On SPARC3_ERROR_CUDA `*count` is 0 and `*reason` a static string, e.g. that there is no driver.
 * `reason` may be NULL. */
SPARC3_API int sparc3_cuda_device_count(int *count, const char **reason);

/* ---- exact selection ------------------------------------------------------------------------------------------
 *
 * The same selection as in sparc3.h, on the current device: all pointers are to its memory, `stream` is a cudaStream_t
 * (NULL: the default one), and the functions return when the work is queued. Scores may be aligned to their own size;
 * 16 bytes are faster for masks.
 *
 * Streaming: init(state); count(state, chunk)...; refine(state, prune); with fp32 scores count and refine once more;
 * mask(state, chunk, bits)... in linear order. A state has the bytes of sparc3_select_init's: copied to the host,
 * sparc3_select_merge adds up those of several devices, and sparc3_select_threshold gives the threshold. What goes
 * wrong on the device (NaN, CHANGED, prune above the number of scores: ARGUMENT) stays in the state:
 * sparc3_cuda_select_threshold returns it, and so do sparc3_select_refine, _merge and _threshold of a copy.
 */
SPARC3_API size_t sparc3_cuda_select_state_size(void);
SPARC3_API int sparc3_cuda_select_init(void *state, int dtype, void *stream);
/* dtype is that of sparc3_cuda_select_init. Where the threshold is known already this does nothing. */
SPARC3_API int sparc3_cuda_select_count(void *state, int dtype, const void *scores, size_t n, void *stream);
SPARC3_API int sparc3_cuda_select_refine(void *state, uint64_t prune, void *stream);
/* Wait for the stream and read the threshold; SPARC3_ERROR_STATE before it is known. `out` is on the host. */
SPARC3_API int sparc3_cuda_select_threshold(const void *state, sparc3_threshold *out, void *stream);
/* The packed mask, ceil(n / 8) bytes, of the next chunk; how many equal scores are still to be kept is in the state. */
SPARC3_API size_t sparc3_cuda_select_mask_workspace_size(size_t n);
SPARC3_API int sparc3_cuda_select_mask(void *state, int dtype, const void *scores, size_t n, uint8_t *bits,
                                       void *workspace, size_t workspace_size, void *stream);

/* Prune the `prune` lowest of each row of scores [rows, cols]. `*error` becomes SPARC3_OK, or SPARC3_ERROR_NAN and
 * the bits are undefined. */
SPARC3_API int sparc3_cuda_select_rows(int dtype, const void *scores, size_t rows, size_t cols, size_t prune,
                                       uint8_t *bits, uint32_t *error, void *stream);

/* ---- packed weights -------------------------------------------------------------------------------------------
 *
 * All pointers are to memory of the current device, `stream` is a cudaStream_t (NULL: the default one); the functions
 * return when the work is queued, and what goes wrong while it runs shows at the next CUDA call. dtype is SPARC3_BF16
 * or SPARC3_FP16, rows and columns are below 2^30. Weights must be sound (sparc3_bitmap_check): nothing can be checked
 * without waiting for the device.
 *
 * Linear: y [batch, rows] = x [batch, columns] W^T + bias [rows] (NULL: none), products summed up in fp32. Up to 64
 * vectors share one reading of the weight. Same input, same kind of device: same bits. Fastest where x is aligned to
 * 16 bytes and columns divide by 8.
 */

/* A bitmap in the order in which tensor cores take it: strips of 16 rows, cut into chunks of 256 columns.
 * sparc3_cuda_bitmap_chunks says how many there are. */
typedef struct sparc3_cuda_bitmap {
    int dtype;
    size_t rows, columns;
    const uint32_t *masks;  /* [chunks][32][4], aligned to 16 bytes */
    const uint32_t *starts; /* [chunks + 1]: where the values of a chunk begin, in 16 bytes */
    const void *values;     /* [16 * starts[chunks]] bytes, aligned to 16 */
    size_t deepest;         /* at most 64 */
} sparc3_cuda_bitmap;

SPARC3_API size_t sparc3_cuda_bitmap_chunks(size_t rows, size_t columns);
/* First step, from the bits of a sparc3_bitmap: writes masks, starts and *deepest (on the device). The caller reads
 * starts[chunks] and *deepest, and allocates the values. */
SPARC3_API int sparc3_cuda_bitmap_arrange_masks(const uint8_t *bits, size_t rows, size_t columns, uint32_t *masks,
                                                uint32_t *starts, uint32_t *deepest, void *stream);
/* Second step, from the offsets and values of the same sparc3_bitmap: writes arranged [16 * starts[chunks]] bytes. */
SPARC3_API int sparc3_cuda_bitmap_arrange_values(int dtype, const int64_t *offsets, const void *values, size_t rows,
                                                 size_t columns, const uint32_t *masks, const uint32_t *starts,
                                                 void *arranged, void *stream);
SPARC3_API int sparc3_cuda_bitmap_unpack(const sparc3_cuda_bitmap *weight, void *out, void *stream);
/* For the current device; 0 where there is none. */
SPARC3_API size_t sparc3_cuda_bitmap_linear_workspace_size(size_t rows, size_t columns, size_t batch);
SPARC3_API int sparc3_cuda_bitmap_linear(const sparc3_cuda_bitmap *weight, const void *x, size_t batch,
                                         const void *bias, void *y, void *workspace, size_t workspace_size,
                                         void *stream);

/* 2:4 in the order in which sparse tensor cores take it: steps of 16 rows and 64 columns, columns divide by 4.
 * sparc3_cuda_two_of_four_steps says how many there are. Pruned weights do not multiply: infinite inputs there do not
 * give NaN. */
typedef struct sparc3_cuda_two_of_four {
    int dtype;
    size_t rows, columns;
    const void *values;     /* [steps][2][32] times 16 bytes, aligned to 16 */
    const uint32_t *places; /* [steps][32] */
} sparc3_cuda_two_of_four;

SPARC3_API size_t sparc3_cuda_two_of_four_steps(size_t rows, size_t columns);
/* From a sparc3_nm with n = 2, m = 4, its pointers to the device. */
SPARC3_API int sparc3_cuda_two_of_four_arrange(const sparc3_nm *weight, void *values, uint32_t *places, void *stream);
SPARC3_API int sparc3_cuda_two_of_four_unpack(const sparc3_cuda_two_of_four *weight, void *out, void *stream);
/* x is aligned to 4 bytes. */
SPARC3_API size_t sparc3_cuda_two_of_four_linear_workspace_size(size_t rows, size_t columns, size_t batch);
SPARC3_API int sparc3_cuda_two_of_four_linear(const sparc3_cuda_two_of_four *weight, const void *x, size_t batch,
                                              const void *bias, void *y, void *workspace, size_t workspace_size,
                                              void *stream);

/* ---- conversion -----------------------------------------------------------------------------------------------
 *
 * As in sparc3.h, with pointers to the device, bits aligned to 4 bytes. `*wrong`, on the device, becomes the first group
 * that is not N:M, or UINT64_MAX.
 */
SPARC3_API int sparc3_cuda_bitmap_to_csr(const sparc3_bitmap *weight, void *indices, void *stream);
SPARC3_API int sparc3_cuda_csr_to_bitmap(const sparc3_csr *weight, uint8_t *bits, void *stream);
SPARC3_API int sparc3_cuda_bitmap_to_nm(const sparc3_bitmap *weight, int n, int m, void *values, uint8_t *indices,
                                        uint64_t *wrong, void *stream);
SPARC3_API int sparc3_cuda_nm_count_kept(const sparc3_nm *weight, int64_t *offsets, void *stream);
SPARC3_API int sparc3_cuda_nm_to_bitmap(const sparc3_nm *weight, const int64_t *offsets, uint8_t *bits, void *values,
                                        size_t count, void *stream);

#ifdef __cplusplus
}
#endif

#endif
