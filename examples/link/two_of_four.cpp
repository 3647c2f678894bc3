// Choose 2:4, pack and multiply from C++; CMakeLists.txt beside it says how to build it.
#include <sparc3/sparc3.h>

#include <cstdio>
#include <stdexcept>
#include <vector>

static void check(int status) {
    if (status != SPARC3_OK) throw std::runtime_error(sparc3_strerror(status));
}

int main() {
    constexpr size_t rows = 2, columns = 8;
    std::vector<float> weight = {1, -5, 2, 4, 0, 3, -2, 1, 7, 1, 1, 6, 2, 2, 2, 2}, x(columns, 1), y(rows);
    std::vector<uint8_t> mask(rows * columns / 8), indices(rows * 2);
    std::vector<float> scores = weight, values(rows * columns / 2);
    for (float &score : scores) score *= score;
    check(sparc3_select_nm(SPARC3_FP32, scores.data(), scores.size(), 2, 4, mask.data(), 1));
    for (size_t i = 0; i < weight.size(); ++i)
        if (!(mask[i >> 3] >> (i & 7) & 1)) weight[i] = 0;
    check(sparc3_nm_pack(SPARC3_FP32, weight.data(), rows, columns, 2, 4, values.data(), indices.data(), nullptr, 1));

    const sparc3_nm packed = {SPARC3_FP32, 2, 4, rows, columns, values.data(), indices.data()};
    std::vector<char> workspace(sparc3_linear_workspace_size(rows, columns, 1, 1));
    check(sparc3_nm_linear(&packed, x.data(), 1, nullptr, y.data(), 1, workspace.data(), workspace.size()));
    std::printf("%g %g\n", y[0], y[1]);
}
