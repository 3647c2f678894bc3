// A dense linear on few tokens in one instruction set: included by kernels_*.cpp after weight_relevance_kernels.inl,
// whose vectors it uses.

namespace {

using sparc3::kTokenGroup;

// Rows of the weight that meet a group of tokens at a time: with kTokenVectors sums each, enough independent chains
// to hide the latency of a multiply-add, and few enough to stay in registers.
constexpr int kTokenVectors = (int)kTokenGroup / kWidth;
constexpr int kLinearRows = kTokenVectors == 1 ? 8 : kTokenVectors == 2 ? 4 : 2;
// Tokens whose sums of one vector of columns stay in registers.
constexpr int kGradientTokens = kWidth == 16 ? 16 : 8;
constexpr size_t kGradientRows = 32;

// sums[row][token of the group] of `rows` rows at w; packed x is [k][kTokenGroup].
template <int rows>
void linear_rows(const float *x, const float *w, size_t k, bool prefetch, float *sums) {
    Vector sum[rows][kTokenVectors] = {};
    for (size_t i = 0; i < k; ++i, x += kTokenGroup) {
        if (prefetch && i % 16 == 0)
            for (int r = 0; r < rows; ++r) __builtin_prefetch(w + (size_t)(rows + r) * k + i);
        Vector token[kTokenVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kTokenVectors; ++v) token[v] = *(const Unaligned *)(x + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kTokenVectors; ++v) sum[r][v] += token[v] * w[(size_t)r * k + i];
    }
    memcpy(sums, sum, sizeof sum);
}

// y[:, begin..end] = x W^T; packed x is [group][k][kTokenGroup], w [n, k], y [tokens, n].
void linear(const float *x, const float *w, size_t tokens, size_t n, size_t k, size_t begin, size_t end, float *y) {
    for (size_t row = begin; row < end; row += kLinearRows) {
        const size_t rows = end - row < (size_t)kLinearRows ? end - row : (size_t)kLinearRows;
        const bool next = row + 2 * kLinearRows <= n;
        for (size_t t0 = 0; t0 < tokens; t0 += kTokenGroup) {
            float sums[kLinearRows][kTokenGroup];
            const float *group = x + t0 * k;
            if (rows == (size_t)kLinearRows)
                linear_rows<kLinearRows>(group, w + row * k, k, next && !t0, sums[0]);
            else
                for (size_t r = 0; r < rows; ++r) linear_rows<1>(group, w + (row + r) * k, k, false, sums[r]);
            const size_t live = tokens - t0 < kTokenGroup ? tokens - t0 : kTokenGroup;
            for (size_t t = 0; t < live; ++t)
                for (size_t r = 0; r < rows; ++r) y[(t0 + t) * n + row + r] = sums[r][t];
        }
    }
}

// sums[token][column] += g[row][token] w[row][column] over `rows` rows, for one vector of columns and some tokens.
void gradient_columns(const float *g, const float *w, size_t rows, size_t k, size_t columns, bool prefetch,
                      float *sums) {
    Vector sum[kGradientTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kGradientTokens; ++t) sum[t] = *(const Unaligned *)(sums + t * kTokenGroup);
    for (size_t r = 0; r < rows; ++r, g += kTokenGroup, w += k) {
        if (prefetch) __builtin_prefetch(w + kGradientRows * k);
        Vector row = {};
        if (columns == (size_t)kWidth)
            row = *(const Unaligned *)w;
        else
            memcpy(&row, w, columns * sizeof(float));
#pragma GCC unroll 16
        for (int t = 0; t < kGradientTokens; ++t) sum[t] += row * g[t];
    }
#pragma GCC unroll 16
    for (int t = 0; t < kGradientTokens; ++t) *(Unaligned *)(sums + t * kTokenGroup) = sum[t];
}

// sums[column / kTokenGroup][token][column % kTokenGroup] = g W over rows begin..end of w [n, k], for a group of tokens;
// packed g is [n][kTokenGroup].
void input_gradient(const float *g, const float *w, size_t n, size_t k, size_t begin, size_t end, float *sums) {
    const size_t columns_padded = (k + kTokenGroup - 1) / kTokenGroup * kTokenGroup;
    memset(sums, 0, columns_padded * kTokenGroup * sizeof(float));
    for (size_t n0 = begin; n0 < end; n0 += kGradientRows) {
        const size_t rows = end - n0 < kGradientRows ? end - n0 : kGradientRows;
        const bool next = n0 + 2 * kGradientRows <= n;
        for (size_t column = 0; column < k; column += kWidth)
            for (int t = 0; t < (int)kTokenGroup; t += kGradientTokens)
                gradient_columns(g + n0 * kTokenGroup + t, w + n0 * k + column, rows, k,
                                 k - column < (size_t)kWidth ? k - column : kWidth, next && !t,
                                 sums + (column / kTokenGroup * kTokenGroup + (size_t)t) * kTokenGroup +
                                     column % kTokenGroup);
    }
}

}  // namespace
