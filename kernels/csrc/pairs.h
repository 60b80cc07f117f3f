// Products in pairs of bf16, where the processor has them.
#pragma once
#include "tile.h"

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define BF16_PAIRS 1
#define WITH_PAIRS __attribute__((noinline, target("avx512bf16")))

struct Places {
    alignas(64) uint16_t low[2 * W], high[2 * W];

    constexpr Places() : low(), high() {
        for (int i = 0; i < 2 * W; i++) low[i] = (uint16_t)(i / 2 + i % 2 * 2 * W), high[i] = (uint16_t)(low[i] + W);
    }
};

// Two rows of 2W bf16, or of codes as such, as 2W pairs.
static inline void put_pairs(const bf16* lower, const bf16* upper, int32_t* pairs) {
    static constexpr Places PLACES;
    const __m512i a = _mm512_loadu_si512(lower), b = _mm512_loadu_si512(upper);
    _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, _mm512_load_si512(PLACES.low), b));
    _mm512_storeu_si512(pairs + W, _mm512_permutex2var_epi16(a, _mm512_load_si512(PLACES.high), b));
}

static inline void put_pairs(const int8_t* lower, const int8_t* upper, int32_t* pairs) {
    for (int i = 0; i < 2 * W; i += W)
        store_int(pairs + i, (vi)load(upper + i) | (((vi)load(lower + i) >> 16) & 0xffff));
}

// A tile of M rows and 2W outputs: total += x W over `depth` pairs of inputs, those of a row `row` pairs after the last
// one's: acc + the product of what is in the upper halves, and then + that of the lower ones, each rounded once.
template <int M>
WITH_PAIRS static void tile_pairs(const int32_t* tile, const int32_t* x, int64_t row, int64_t depth, float* total,
                                  int64_t stride) {
    __m512 a[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) a[m][i] = _mm512_loadu_ps(total + m * stride + i * W);
    for (int64_t k = 0; k < depth; k++) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(tile + k * 2 * W);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(tile + k * 2 * W + W);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, x + m * row + k, 4);
            const __m512bh c = (__m512bh)_mm512_set1_epi32(pair);
            a[m][0] = _mm512_dpbf16_ps(a[m][0], b0, c);
            a[m][1] = _mm512_dpbf16_ps(a[m][1], b1, c);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) _mm512_storeu_ps(total + m * stride + i * W, a[m][i]);
}

// `tile_pairs` for any number of rows.
static inline void tiles_pairs(int64_t rows, const int32_t* tile, const int32_t* x, int64_t row, int64_t depth, float* total,
                               int64_t stride) {
    each_tile(rows, [&](auto m, int64_t n) {
        tile_pairs<m.count>(tile, x + n * row, row, depth, total + n * stride, stride);
    });
}

// Whether this processor multiplies pairs of bf16 with the bits of two fused multiply-adds, the first pair first. Tried,
// not only asked for, as it is said by a manual and not by a flag.
WITH_PAIRS static bool try_pairs() {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    uint32_t seed = 1;
    const auto next = [&] {
        seed = seed * 1664525 + 1013904223;
        return (bf16){(uint16_t)(0x3c00 | (seed >> 16 & 0x83ff))};  // of both signs, within some powers of two
    };
    for (int i = 0; i < 1000; i++) {
        const bf16 first[] = {next(), next()}, second[] = {next(), next()};
        const auto pair = [](bf16 high, bf16 low) { return _mm512_set1_epi32((int)((uint32_t)high.bits << 16 | low.bits)); };
        const float start = widen(next()) * 1.00001f;
        const __m512 sum = _mm512_dpbf16_ps(_mm512_set1_ps(start), (__m512bh)pair(first[0], second[0]),
                                            (__m512bh)pair(first[1], second[1]));
        const vf once = fma(splat(widen(first[0])), splat(widen(first[1])), splat(start));
        const vf twice = fma(splat(widen(second[0])), splat(widen(second[1])), once);
        if (_mm512_cvtss_f32(sum) != twice[0]) return false;
    }
    return true;
}

static inline bool has_pairs() {
    static const bool has = try_pairs();
    return has;
}
#else
static inline bool has_pairs() { return false; }
#endif
