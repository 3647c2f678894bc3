/* Pack a weight as a bitmap and multiply with it, in plain C:
 *
 *     cc bitmap.c $(PKG_CONFIG_PATH=<lib>/pkgconfig pkg-config --cflags --libs sparc3) -Wl,-rpath,<lib> -o bitmap
 *
 * where `python -c "import sparc3_kernels as k; print(k.get_library_dir())"` prints <lib>. */
#include <stdio.h>
#include <stdlib.h>

#include <sparc3/sparc3.h>

#define ROWS 3
#define COLUMNS 40

static void check(int status) {
    if (status == SPARC3_OK) return;
    fprintf(stderr, "%s\n", sparc3_strerror(status));
    exit(1);
}

int main(void) {
    float weight[ROWS][COLUMNS] = {{0}}, x[COLUMNS], y[ROWS];
    int64_t offsets[ROWS + 1];
    uint8_t bits[ROWS][8]; /* 4 * ceil(40 / 32) bytes a row */
    for (int c = 0; c < COLUMNS; ++c) x[c] = (float)c;
    weight[0][1] = 2;
    weight[1][39] = 3;
    weight[2][0] = weight[2][10] = 1;

    /* Two passes: how many values there are, then the values. */
    check(sparc3_count_kept(SPARC3_FP32, weight, ROWS, COLUMNS, offsets, 1));
    const size_t count = (size_t)offsets[ROWS];
    float *values = malloc(count * sizeof *values);
    check(sparc3_bitmap_pack(SPARC3_FP32, weight, ROWS, COLUMNS, offsets, &bits[0][0], values, count, 1));

    const sparc3_bitmap packed = {SPARC3_FP32, ROWS, COLUMNS, count, &bits[0][0], values, offsets};
    const size_t size = sparc3_linear_workspace_size(ROWS, COLUMNS, 1, 1);
    void *workspace = malloc(size);
    check(sparc3_bitmap_linear(&packed, x, 1, NULL, y, 1, workspace, size));
    printf("%zu values: %g %g %g\n", count, y[0], y[1], y[2]);
    free(workspace);
    free(values);
    return 0;
}
