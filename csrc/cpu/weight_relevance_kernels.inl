// Weight relevance in one instruction set: included by kernels_*.cpp. GCC vectors, so that one text serves every width.

namespace {

// A register tile of kTileN x kTileK sums, with a row of x and one broadcast of g, fills the vector registers.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileN = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kTileN = 6, kVectors = 2;
#else
constexpr int kWidth = 4, kTileN = 4, kVectors = 2;
#endif
constexpr int kTileK = kWidth * kVectors;

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * kWidth)));

// packed[panel][token][tile] = source[token][panel * tile + ...] or its square, zeros beyond `width`.
template <bool squared, class Source>
void pack_panels(const Source *source, size_t tokens, size_t stride, size_t width, size_t tile, float *packed) {
    for (size_t begin = 0; begin < width; begin += tile) {
        const size_t columns = width - begin < tile ? width - begin : tile;
        for (size_t t = 0; t < tokens; ++t, packed += tile) {
            const Source *from = source + t * stride + begin;
            for (size_t i = 0; i < columns; ++i) {
                const float value = to_float(from[i]);
                packed[i] = squared ? value * value : value;
            }
            for (size_t i = columns; i < tile; ++i) packed[i] = 0;
        }
    }
}

template <class Source>
void pack_as(bool squared, const Source *source, size_t tokens, size_t stride, size_t width, size_t tile, float *packed) {
    if (squared)
        pack_panels<true>(source, tokens, stride, width, tile, packed);
    else
        pack_panels<false>(source, tokens, stride, width, tile, packed);
}

void pack(int dtype, bool squared, const void *source, size_t tokens, size_t stride, size_t width, int tile,
          float *packed) {
    if (dtype == SPARC3_FP32)
        pack_as(squared, (const float *)source, tokens, stride, width, (size_t)tile, packed);
    else if (dtype == SPARC3_BF16)
        pack_as(squared, (const BFloat16 *)source, tokens, stride, width, (size_t)tile, packed);
    else
        pack_as(squared, (const Float16 *)source, tokens, stride, width, (size_t)tile, packed);
}

template <int reduction>
void full_tile(const float *g, const float *x, size_t samples, size_t tokens, float *acc, size_t stride) {
    // A few tokens are done before acc comes from memory. The next tile is its neighbour.
    for (int r = 0; r < kTileN; ++r)
        for (int v = 0; v < kTileK; v += 16) __builtin_prefetch(acc + (size_t)r * stride + kTileK + v, 1);
    for (size_t s = 0; s < samples; ++s) {
        Vector sum[kTileN][kVectors] = {};
        for (size_t t = 0; t < tokens; ++t, g += kTileN, x += kTileK) {
            Vector row[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) row[v] = *(const Unaligned *)(x + v * kWidth);
#pragma GCC unroll 8
            for (int r = 0; r < kTileN; ++r)
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) sum[r][v] += row[v] * g[r];
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileN; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                Unaligned *to = (Unaligned *)(acc + (size_t)r * stride + v * kWidth);
                if (reduction == SPARC3_SQUARE)
                    *to += sum[r][v] * sum[r][v];
                else if (reduction == SPARC3_ABS)
                    *to += (Vector)((Bits)sum[r][v] & 0x7fffffff);
                else
                    *to += sum[r][v];
            }
    }
}

// acc [rows, cols] += sum_s f(G_s^T X_s) for one tile of packed g and x.
void tile(int reduction, const float *g, const float *x, size_t samples, size_t tokens, float *acc, size_t stride,
          int rows, int cols) {
    float edge[kTileN * kTileK];
    const bool whole = rows == kTileN && cols == kTileK;
    if (!whole)
        for (int r = 0; r < rows; ++r) memcpy(edge + r * kTileK, acc + (size_t)r * stride, (size_t)cols * sizeof(float));
    float *to = whole ? acc : edge;
    const size_t to_stride = whole ? stride : kTileK;
    if (reduction == SPARC3_SQUARE)
        full_tile<SPARC3_SQUARE>(g, x, samples, tokens, to, to_stride);
    else if (reduction == SPARC3_ABS)
        full_tile<SPARC3_ABS>(g, x, samples, tokens, to, to_stride);
    else
        full_tile<SPARC3_TOKEN_SQUARE>(g, x, samples, tokens, to, to_stride);
    if (!whole)
        for (int r = 0; r < rows; ++r) memcpy(acc + (size_t)r * stride, edge + r * kTileK, (size_t)cols * sizeof(float));
}

}  // namespace
