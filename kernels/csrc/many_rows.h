// Many rows at once, in register tiles of at most R rows and 2W outputs.
//
// Of few rows, which wait for weights, a block is a few channels of a whole panel, one run of memory, and weights are
// widened as they are read. Else it is what stays in the second cache, and the weights of a tile are widened once for all
// its rows.
#pragma once
#include "packed.h"
#include "pairs.h"

namespace {

constexpr int64_t FEW_ROWS = 4 * R;
constexpr int64_t MAX_ROWS = 256;   // rows multiplied with one block
constexpr int64_t MAX_DEPTH = 256;  // its inputs; a scale is one group's

// Inputs and outputs of a block of weights: of few rows some 40 KB.
struct Shape {
    int64_t depth, width;
};

Shape block_of(int64_t rows, int64_t kind) {
    if (rows <= FEW_ROWS) return {kind == INT8 ? 64 : 16, MAX_PANEL};
    return {kind == INT8 ? GROUP : MAX_DEPTH, 256};
}

// Inputs `k .. k + depth` of rows `row .. row + rows`, to be multiplied with weights of 2W outputs; total [rows, 2W], of
// integers if counts are multiplied.
struct Piece {
    const Call& call;
    int64_t row, rows, k, depth;
    float* total;
};

// Input k's outputs lie `k * next` further on.
template <class T>
struct Weights {
    typedef float Acc;
    const T* base;
    int64_t next;

    Weights at(int64_t n) const { return {base + n, next}; }
    void multiply(const Piece& p) const {
        const Call& call = p.call;
        const float* x = call.x + p.row * call.stride + p.k;
        if (p.rows <= FEW_ROWS) return tiles_of(p.rows, base, next, x, call.stride, 1, p.depth, p.total, 2 * W);
        alignas(64) float tile[MAX_DEPTH * 2 * W];
        for (int64_t k = 0; k < p.depth; k++)
            for (int i = 0; i < 2 * W; i += W) store(tile + k * 2 * W + i, load(base + k * next + i));
        tiles_of(p.rows, tile, 2 * W, x, call.stride, 1, p.depth, p.total, 2 * W);
    }
};

#if defined(BF16_PAIRS)
// Weights as bf16, in which codes are exact, times inputs in bf16. Sums below 2^-126 become zero here, and only here.
template <class T>
struct BrainFloats {
    typedef float Acc;
    const T* base;
    int64_t next;

    BrainFloats at(int64_t n) const { return {base + n, next}; }
    void multiply(const Piece& p) const {
        alignas(64) int32_t tile[MAX_DEPTH * W];
        for (int64_t k = 0; k < p.depth; k += 2) put_pairs(base + (k + 1) * next, base + k * next, tile + k * W);
        const int64_t row = p.call.stride / 2;
        tiles_pairs(p.rows, tile, p.call.pairs + p.row * row + p.k / 2, row, p.depth / 2, p.total, 2 * W);
    }
};
#endif

template <int M, class Source>
__attribute__((noinline)) void tile_counts(const Source weights, const int16_t* counts, int64_t stride, int64_t depth,
                                           int32_t* total) {
    vi a[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) a[m][i] = load_int(total + (2 * m + i) * W);
    for (int64_t k = 0; k < depth; k += 2) {
        vi b0, b1;
        weights.pair(k, depth, &b0, &b1);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, counts + m * stride + k, 4);
            vi c = splat_int(pair);
            a[m][0] = dot_pairs(a[m][0], b0, c);
            a[m][1] = dot_pairs(a[m][1], b1, c);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) store_int(total + (2 * m + i) * W, a[m][i]);
}

template <class Source>
void multiply_counts(const Piece& p, const Source weights) {
    const int64_t stride = p.call.stride;
    const int16_t* counts = p.call.counts + p.row * stride + p.k;
    int32_t* total = (int32_t*)p.total;
    each_tile(p.rows, [&](auto m, int64_t n) {
        tile_counts<m.count>(weights, counts + n * stride, stride, p.depth, total + n * 2 * W);
    });
}

#if defined(__AVX512F__)
#define BYTE_QUADS 1
constexpr bool HAS_QUADS = true;
constexpr int32_t OFFSET = (int32_t)0x80808080;  // added to the four bytes of counts, which are multiplied unsigned

// Four inputs in bytes, of two pairs of 16 bits that hold no more: the first, third, second and fourth.
vi quads_of(vi first, vi second) { return (first & 0xff00ff) | ((second & 0xff00ff) << 8); }

vi dot_quads(vi acc, vi counts, vi codes) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)counts, (__m512i)codes); }

// Counts from -128 to 127 of a row of `stride` inputs as quads, with their offset.
void to_quads(const int16_t* counts, int64_t stride, int32_t* quads) {
    for (int64_t k = 0; k < stride; k += 16) {
        const __m256i pairs = _mm256_loadu_si256((const __m256i*)(counts + k));
        const __m256i first = _mm256_and_si256(pairs, _mm256_set1_epi64x(0xff00ff));
        const __m256i second = _mm256_and_si256(_mm256_srli_epi64(pairs, 24), _mm256_set1_epi64x(0xff00ff00));
        const __m128i bytes = _mm256_cvtepi64_epi32(_mm256_or_si256(first, second));
        _mm_storeu_si128((__m128i*)(quads + k / 4), _mm_xor_si128(bytes, _mm_set1_epi32(OFFSET)));
    }
}

// A tile of M rows and 2W outputs over `depth` quads; `excess`: what the offset of the counts adds to each output.
template <int M>
__attribute__((noinline)) void tile_quads(const int32_t* tile, const vi* excess, const int32_t* x, int64_t row, int64_t depth,
                                          int32_t* total) {
    vi a[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) a[m][i] = load_int(total + (2 * m + i) * W) - excess[i];
    for (int64_t k = 0; k < depth; k++) {
        const vi b0 = load_int(tile + k * 2 * W), b1 = load_int(tile + k * 2 * W + W);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            const vi c = splat_int(x[m * row + k]);
            a[m][0] = dot_quads(a[m][0], c, b0);
            a[m][1] = dot_quads(a[m][1], c, b1);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 2; i++) store_int(total + (2 * m + i) * W, a[m][i]);
}
#else
constexpr bool HAS_QUADS = false;
void to_quads(const int16_t*, int64_t, int32_t*) {}
#endif

// Pairs of codes, [depth / 2][2W pairs].
struct Pairs {
    const int32_t* base;

    void pair(int64_t k, int64_t, vi* low, vi* high) const {
        *low = load_int(base + k * W);
        *high = load_int(base + k * W + W);
    }
};

// Codes to be multiplied with counts, two inputs at a time in the order of `interleave`.
struct Codes {
    typedef int32_t Acc;
    const int8_t* base;
    int64_t next;

    Codes at(int64_t n) const { return {base + n, next}; }
    // Past an odd end the second input is the first one again; its count is zero.
    void pair(int64_t k, int64_t depth, vi* low, vi* high) const {
        const int8_t* one = base + k * next;
        interleave(one, k + 1 < depth ? one + next : one, low, high);
    }
    void multiply(const Piece& p) const {
        if (p.rows <= FEW_ROWS) return multiply_counts(p, *this);
#if defined(BYTE_QUADS)
        if (p.call.quads) return multiply_quads(p);
#endif
        alignas(64) int32_t pairs[GROUP * W];
        for (int64_t k = 0; k < p.depth; k += 2) {
            vi low, high;
            pair(k, p.depth, &low, &high);
            store_int(pairs + k * W, low);
            store_int(pairs + k * W + W, high);
        }
        multiply_counts(p, Pairs{pairs});
    }
#if defined(BYTE_QUADS)
    void multiply_quads(const Piece& p) const {
        alignas(64) int32_t tile[GROUP / 4 * 2 * W];
        vi excess[2] = {};
        for (int64_t k = 0; k < p.depth; k += 4) {
            vi first[2], second[2] = {};
            pair(k, p.depth, &first[0], &first[1]);
            if (k + 2 < p.depth) pair(k + 2, p.depth, &second[0], &second[1]);
            for (int i = 0; i < 2; i++) {
                const vi codes = quads_of(first[i], second[i]);
                store_int(tile + (k / 2 + i) * W, codes);
                excess[i] = dot_quads(excess[i], splat_int(OFFSET), codes);
            }
        }
        const int64_t stride = p.call.stride / 4, depth = (p.depth + 3) / 4;
        const int32_t* x = p.call.quads + p.row * stride + p.k / 4;
        int32_t* total = (int32_t*)p.total;
        each_tile(p.rows, [&](auto m, int64_t n) {
            tile_quads<m.count>(tile, excess, x + n * stride, stride, depth, total + n * 2 * W);
        });
    }
#endif
};

// int8 weights, of floats or of counts, with a scale for each output: what is added up over a group is scaled at its end.
template <class Source>
struct Scaled {
    Source weights;
    const float* scale;
    float* sums;  // [width / 2W, rows, 2W] of Source::Acc
    int64_t rows;

    Scaled at(int64_t n) const { return {weights.at(n), scale + n, sums + n * rows, rows}; }
    void multiply(const Piece& p) const {
        Piece group = p;
        group.total = sums;
        if (p.k % GROUP == 0) memset(sums, 0, rows * 2 * W * sizeof(float));
        weights.multiply(group);
        if ((p.k + p.depth) % GROUP && p.k + p.depth < p.call.w.in) return;
        const auto* acc = (const typename Source::Acc*)sums;
        for (int64_t row = 0; row < rows; row++) add_scaled(p.total + row * 2 * W, acc + row * 2 * W, scale, 2 * W);
    }
};

// What `many_rows` computes in.
struct Scratch {
    Buffer<float> total, sums;  // [2, width / 2W, rows, 2W] and [width / 2W, rows, 2W]

    Scratch(int64_t rows, Shape block) : total(2 * rows * block.width), sums(rows * block.width) {}
};

// Fetch channels `from .. to` of a block of weights.
template <class T>
void fetch(const T* base, int64_t from, int64_t to, int64_t next, int64_t width) {
    for (int64_t k = from; k < to; k++)
        for (int64_t n = 0; n < width; n += 64 / (int64_t)sizeof(T)) __builtin_prefetch(base + k * next + n);
}

// A block of weights and what is fetched while it is multiplied: `following` channels after it.
template <class T>
struct Block {
    const Columns& c;
    const T* base;
    int64_t depth, following;

    template <class Source>
    void multiply(Piece p, const Source& weights) const {
        const T* next_block = base + depth * c.stride;
        for (int64_t n = 0; n < c.width; n += 2 * W, p.total += 2 * W * p.rows) {
            fetch(next_block, n * following / c.width, (n + 2 * W) * following / c.width, c.stride, c.width);
            weights.at(n).multiply(p);
        }
    }
};

template <class T>
Block<T> block_at(const Piece& p, const Columns& c, int64_t most) {
    const Packed& w = p.call.w;
    return {c, weights_of<T>(w, c) + p.k * c.stride, p.depth, smaller(most, w.in - p.k - p.depth)};
}

template <class T>
void multiply_floats(const Piece& p, const Columns& c, int64_t most) {
    const Block<T> block = block_at<T>(p, c, most);
    block.multiply(p, Weights<T>{block.base, c.stride});
}

void multiply_halves(const Piece& p, const Columns& c, int64_t most) {
#if defined(BF16_PAIRS)
    if (p.call.pairs) {
        const Block<bf16> block = block_at<bf16>(p, c, most);
        return block.multiply(p, BrainFloats<bf16>{block.base, c.stride});
    }
#endif
    multiply_floats<bf16>(p, c, most);
}

void multiply_int8(const Piece& p, const Columns& c, int64_t most, Scratch& scratch) {
    const Packed& w = p.call.w;
    const Block<int8_t> block = block_at<int8_t>(p, c, most);
    const float* scale = w.scale + p.k / GROUP * padded(w.out, UNIT) + c.first;
    float* sums = scratch.sums.data;
#if defined(BF16_PAIRS)
    if (p.call.pairs)
        return block.multiply(p, Scaled<BrainFloats<int8_t>>{{block.base, c.stride}, scale, sums, p.rows});
#endif
    if (p.call.counts)
        block.multiply(p, Scaled<Codes>{{block.base, c.stride}, scale, sums, p.rows});
    else
        block.multiply(p, Scaled<Weights<int8_t>>{{block.base, c.stride}, scale, sums, p.rows});
}

// Some outputs of rows `first .. first + rows`, over blocks of `most` inputs of the groups in `span`.
void many_rows(const Call& call, int64_t first, int64_t rows, const Columns& c, Span span, int64_t most, Scratch& scratch,
               const Halves& halves) {
    const Packed& w = call.w;
    const int64_t half = smaller(w.in, first_half(w.in) * GROUP), end = smaller(w.in, span.last * GROUP);
    float *one = scratch.total.data, *other = one + rows * c.width;
    memset(one, 0, 2 * rows * c.width * sizeof(float));
    for (int64_t k = span.first * GROUP, depth; k < end; k += depth) {
        depth = smaller(most, (k < half ? smaller(half, end) : end) - k);
        const Piece p{call, first, rows, k, depth, k < half ? one : other};
        if (w.kind == FP32) multiply_floats<float>(p, c, most);
        if (w.kind == HALF) multiply_halves(p, c, most);
        if (w.kind == INT8) multiply_int8(p, c, most, scratch);
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t n = 0; n < c.width; n += 2 * W) {
            const int64_t offset = n * rows + row * 2 * W;
            if (span.is_all(w.in))
                finish(call, first + row, c.first + n, 2 * W, one + offset, other + offset);
            else if (span.first > 0)
                memcpy(halves.at(1, first + row) + c.first + n, other + offset, 2 * W * sizeof(float));
            else
                memcpy(halves.at(0, first + row) + c.first + n, one + offset, 2 * W * sizeof(float));
        }
}

}  // namespace
