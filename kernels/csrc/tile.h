// The register tile that all products in floats are made of.
#pragma once
#include "simd.h"

#define R 6  // rows of a tile; its width is 2W outputs. 12 gain nothing where there are 32 registers

// A tile of M rows and 2W outputs: total += x W over `depth` inputs. Input k of row m lies at x[m * row + k * step], its
// weights at w + k * next. A function of its own, as in a larger one the compiler keeps some of the sums in memory, and
// then it takes twice as long.
template <int M, class T>
static __attribute__((noinline)) void tile_of(const T* w, int64_t next, const float* x, int64_t row, int64_t step,
                                              int64_t depth, float* total, int64_t stride) {
    vf a[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) a[m][i] = load(total + m * stride + i * W);
    for (int64_t k = 0; k < depth; k++) {
        vf b0 = load(w + k * next), b1 = load(w + k * next + W);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            vf c = splat(x[m * row + k * step]);
            a[m][0] = fma(b0, c, a[m][0]);
            a[m][1] = fma(b1, c, a[m][1]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) store(total + m * stride + i * W, a[m][i]);
}

// Rows of the next tile: none is left over alone, if it can be helped, as its few sums would wait for each other.
static inline int64_t rows_of_tile(int64_t rows) { return rows <= R ? rows : rows < 2 * R ? (rows + 1) / 2 : R; }

template <int M>
struct Rows {
    static constexpr int count = M;
};

// Calls tile(Rows<rows>()), so that the compiler knows their number; 1 <= rows <= M.
template <int M = R, class Tile>
static inline void with_rows(int64_t rows, const Tile& tile) {
    if constexpr (M > 1)
        if (rows < M) return with_rows<M - 1>(rows, tile);
    tile(Rows<M>());
}

// Calls tile(Rows<count>(), row) for all rows, several at once, from `row` on.
template <class Tile>
static inline void each_tile(int64_t rows, const Tile& tile) {
    for (int64_t row = 0, count; row < rows; row += count) {
        count = rows_of_tile(rows - row);
        with_rows(count, [&](auto m) { tile(m, row); });
    }
}

// `tile_of` for any number of rows.
template <class T>
static inline void tiles_of(int64_t rows, const T* w, int64_t next, const float* x, int64_t row, int64_t step,
                            int64_t depth, float* total, int64_t stride) {
    each_tile(rows, [&](auto m, int64_t n) {
        tile_of<m.count>(w, next, x + n * row, row, step, depth, total + n * stride, stride);
    });
}

// The same for inputs and weights without gaps.
static inline void tiles_float(int64_t rows, const float* tile, const float* x, int64_t in, int64_t depth, float* total,
                               int64_t stride) {
    tiles_of(rows, tile, 2 * W, x, in, 1, depth, total, stride);
}
