// A block's keys and values as tiles, in floats or in pairs of bf16, and their products with queries and weights.
//
// T is what queries, tiles and weights consist of: float or, where the processor multiplies pairs of it, bf16. Tiles of
// keys are [width][2W places] or [width / 2][2W places][2], those of values [64 places][2W] or [32][2W][2].
#pragma once
#include "attention.h"
#include "pairs.h"

namespace {

// Keys of W rows, `stride` apart, as columns of a tile; they can be read to the next multiple of four.
void put_keys(const float* rows, int64_t stride, int64_t width, float* tile) {
    for (int64_t i = 0; i < width; i += 4) {
        vf columns[4];
        four_columns(rows + i, stride, columns);
        for (int64_t j = 0; j < smaller(4, width - i); j++) store(tile + (i + j) * 2 * W, columns[j]);
    }
}

// Calls with(i, pairs) for each pair of columns i and i + 1 of W rows of whole groups of eight, an even number apart.
template <class With>
void column_pairs(const bf16* rows, int64_t stride, int64_t width, With with) {
    for (int64_t i = 0; i < width; i += 8) {
        vf columns[4];
        four_columns((const float*)(rows + i), stride / 2, columns);
        for (int64_t j = 0; j < 4; j++) with(i + 2 * j, (vi)columns[j]);
    }
}

void put_keys(const bf16* rows, int64_t stride, int64_t width, float* tile) {
    column_pairs(rows, stride, width, [&](int64_t i, vi pairs) {
        store(tile + i * 2 * W, (vf)(pairs << 16));
        store(tile + (i + 1) * 2 * W, (vf)(pairs & (int32_t)0xffff0000));
    });
}

// Two rows of values, `next` apart, as rows of their tiles.
void put_values(const float* rows, int64_t next, int64_t wide, float* tiles) {
    for (int64_t i = 0; i < wide; i += W)
        for (int64_t row = 0; row < 2; row++)
            store(tiles + i / (2 * W) * BLOCK * 2 * W + row * 2 * W + i % (2 * W), load(rows + row * next + i));
}

void put_scores(int64_t rows, const float* queries, const float* keys, int64_t width, float* scores) {
    tiles_float(rows, keys, queries, width, width, scores, BLOCK);
}

// Rows of weights as they are multiplied, in their place.
void put_weights(int64_t, float*, float*) {}

// Values that begin at `base + j * next` for place j; element i of a whole tile lies `i * column` further on.
template <class T>
struct Values {
    static constexpr int64_t UNIT = 1;  // places of several rows that are multiplied at once
    const T* base;
    int64_t next, column;

    // sums += weights * values for `rows` rows, each BLOCK floats, and the places that all of them see.
    void add(int64_t rows, const float* weights, const Span& seen, int64_t wide, float* sums) const {
        for (int64_t i = 0; i < wide && seen.from < seen.to; i += 2 * W)
            tiles_of(rows, base + i * column + seen.from * next, next, weights + seen.from, BLOCK, 1, seen.to - seen.from,
                     sums + i, wide);
    }
};

Values<float> values_of(const float* tiles) { return {tiles, 2 * W, BLOCK}; }

template <class T>
Values<T> values_in_ring(const T* rows, int64_t stride, int64_t, float*) {
    return {rows, stride, 1};
}

#if defined(BF16_PAIRS)
void put_keys(const bf16* rows, int64_t stride, int64_t width, bf16* tile) {
    column_pairs(rows, stride, width, [&](int64_t i, vi pairs) { store_int((int32_t*)(tile + i * 2 * W), pairs); });
}

void put_values(const bf16* rows, int64_t next, int64_t wide, bf16* tiles) {
    for (int64_t i = 0; i < wide; i += 2 * W) put_pairs(rows + i, rows + next + i, (int32_t*)(tiles + i * BLOCK));
}

void put_scores(int64_t rows, const bf16* queries, const bf16* keys, int64_t width, float* scores) {
    tiles_pairs(rows, (const int32_t*)keys, (const int32_t*)queries, width / 2, width / 2, scores, BLOCK);
}

WITH_PAIRS void put_weights(int64_t rows, float* weights, bf16*) {
    for (float* row = weights; row < weights + rows * BLOCK; row += BLOCK)
        for (int64_t j = 0; j < BLOCK; j += 2 * W) {
            const vf low = load(row + j), high = load(row + j + W);
            _mm512_storeu_si512((bf16*)row + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
}

// Tiles of pairs of places. What a row adds up, and in which order, depends only on the places that it sees.
struct PairValues {
    static constexpr int64_t UNIT = 2;
    const bf16* tiles;

    const int32_t* at(int64_t i, int64_t place) const {
        return (const int32_t*)(tiles + i * BLOCK + place / 2 * 4 * W);
    }
    // Of several rows, only whole pairs.
    void add(int64_t rows, const bf16* weights, Span seen, int64_t wide, float* sums) const {
        if (seen.from < seen.to && seen.from % 2) add_half(weights, seen.from++, wide, sums);
        const int64_t count = (seen.to - seen.from) / 2;
        for (int64_t i = 0; i < wide && count > 0; i += 2 * W)
            tiles_pairs(rows, at(i, seen.from), (const int32_t*)(weights + seen.from), BLOCK, count, sums + i, wide);
        if (seen.from < seen.to && seen.to % 2) add_half(weights, seen.to - 1, wide, sums);
    }
    // One row's place whose neighbour it does not see: zero, as zero times infinity is not.
    void add_half(const bf16* weights, int64_t place, int64_t wide, float* sums) const {
        const int32_t half = place % 2 ? (int32_t)0xffff0000 : 0xffff;
        alignas(64) int32_t tile[2 * W];
        for (int64_t i = 0; i < wide; i += 2 * W) {
            for (int64_t n = 0; n < 2 * W; n += W) store_int(tile + n, load_int(at(i, place) + n) & half);
            tile_pairs<1>(tile, (const int32_t*)(weights + place / 2 * 2), BLOCK, 1, sums + i, wide);
        }
    }
};

PairValues values_of(const bf16* tiles) { return {tiles}; }

PairValues values_in_ring(const bf16* rows, int64_t stride, int64_t wide, bf16* tiles) {
    for (int64_t j = 0; j < BLOCK; j += 2) put_values(rows + j * stride, stride, wide, tiles + j * 2 * W);
    return {tiles};
}
#endif

}  // namespace
