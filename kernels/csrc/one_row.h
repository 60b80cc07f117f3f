// One row at a time: what bounds it is reading its weights, and channels that did not fire are not read.
//
// A thread has two streams of weights under way at once, as one is not enough for the bandwidth there is: both halves of
// the inputs, or, of int8, two groups of 128 inputs.
#pragma once
#include "packed.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes fetched ahead where no channel is left out
// Channels of dense int8 that are added in one pass over the sums. With eight lanes a core computes no faster than it reads.
constexpr int TOGETHER = W < 16 ? 2 : 1;

#if defined(__AVX2__) && !defined(__AVX512F__)
// Which of eight lanes a mask keeps, in order; a byte each.
struct Places {
    uint8_t lane[256][8] = {};
    constexpr Places() {
        for (int mask = 0; mask < 256; mask++)
            for (int i = 0, n = 0; i < 8; i++)
                if (mask >> i & 1) lane[mask][n++] = (uint8_t)i;
    }
};
constexpr Places PLACES;
#endif

// Appends those of W channels, `k` on, that are to be read to a list with room for W; gives how many.
int64_t keep(vf x, int64_t k, int64_t channels, bool all, int32_t* index, float* value) {
    const int present = (1 << channels) - 1;
#if defined(__AVX512F__)
    const __mmask16 other = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __mmask16 fired = (__mmask16)(all ? present : present & other);
    const __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int)k), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                        11, 12, 13, 14, 15));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(fired, place));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(fired, (__m512)x));
    return __builtin_popcount(fired);
#elif defined(__AVX2__)
    const int other = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    const int fired = all ? present : present & other;
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES.lane[fired]));
    _mm256_storeu_si256((__m256i*)index, _mm256_add_epi32(lanes, _mm256_set1_epi32((int)k)));
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps((__m256)x, lanes));
    return __builtin_popcount(fired);
#else
    int64_t n = 0;
    for (int64_t i = 0; i < W; i++) {
        index[n] = (int32_t)(k + i);
        value[n] = x[i];
        n += (present >> i & 1) && (all || x[i] != 0);
    }
    return n;
#endif
}

// The channels of one row to be read, in order. A group's channels are `index[start[g] .. start[g + 1]]`; of counts they are
// an even number, of which the last may count zero times, and `pairs` are their counts, two in one.
struct Channels {
    static constexpr int64_t LATER = 8;  // places behind the last that can be read, too
    bool all;
    Buffer<int32_t> index, pairs;
    Buffer<float> value;
    Buffer<int64_t> start;
    int64_t groups, fired = 0, end = 0;

    // x can be read to the next multiple of W.
    Channels(const float* x, int64_t in, bool all, bool counts)
        : all(all), index(in + groups_of(in) + W + LATER), pairs(counts ? (in + groups_of(in)) / 2 + 1 : 0),
          value(in + groups_of(in) + W), start(groups_of(in) + 1), groups(groups_of(in)) {
        for (int64_t g = 0; g < groups; g++) {
            start.data[g] = end;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k += W) {
                const int64_t kept = keep(load(x + k), k, smaller(W, in - k), all, index.data + end, value.data + end);
                end += kept, fired += kept;
            }
            if (counts && end % 2) {
                index.data[end] = index.data[end - 1];
                value.data[end++] = 0;
            }
        }
        start.data[groups] = end;
        for (int64_t i = 0; i < LATER; i++) index.data[end + i] = end ? index.data[end - 1] : 0;
        for (int64_t i = 0; counts && i < end; i += 2)
            pairs.data[i / 2] = (int32_t)((uint16_t)(int16_t)value.data[i] | (uint32_t)(int32_t)value.data[i + 1] << 16);
    }
    int64_t middle() const { return start.data[(groups + 1) / 2]; }
};

// Runs of weights to be added to sums: of N channels, one after another in memory, times their values, or of two, wherever
// they lie, times a pair of counts. As much of what is read later is fetched.
template <class T, int N>
struct Run {
    const T *row[N], *next;
    vf value[N];
};

struct Pair {
    const int8_t *row[2], *next[2];
    vi counts;
};

// UNIT outputs from `n` on.
template <class T, int N>
void add(float* sums, const Run<T, N>& run, int64_t n) {
    for (size_t b = 0; b < N * UNIT * sizeof(T); b += 64) __builtin_prefetch((const char*)(run.next + N * n) + b);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += W) {
        vf sum = load(sums + n + i);
        for (int c = 0; c < N; c++) sum = fma(load(run.row[c] + n + i), run.value[c], sum);
        store(sums + n + i, sum);
    }
}

// The same for counts, in the order of `interleave`.
void add(int32_t* sums, const Pair& pair, int64_t n) {
    __builtin_prefetch(pair.next[0] + n);
    __builtin_prefetch(pair.next[1] + n);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += 2 * W) {
        vi low, high;
        interleave(pair.row[0] + n + i, pair.row[1] + n + i, &low, &high);
        store_int(sums + n + i, dot_pairs(load_int(sums + n + i), low, pair.counts));
        store_int(sums + n + i + W, dot_pairs(load_int(sums + n + i + W), high, pair.counts));
    }
}

// Channels of a list whose runs of `width` begin at `base + channel * stride`.
template <class T>
struct Runs {
    const Channels& list;
    const T* base;
    int64_t stride, width;

    const T* row(int64_t i) const { return base + list.index.data[i] * stride; }
    // N channels from the i-th on.
    template <int N>
    auto at(int64_t i, const float*) const {
        Run<T, N> run;
        run.next = list.all ? row(i) + AHEAD / sizeof(T) : row(i + 2);
        for (int c = 0; c < N; c++) run.row[c] = row(i + c), run.value[c] = splat(list.value.data[i + c]);
        return run;
    }
    template <int N>
    auto at(int64_t i, const int32_t*) const {
        return Pair{{row(i), row(i + 1)}, {row(i + 4), row(i + 5)}, splat_int(list.pairs.data[i / 2])};
    }
};

// sums[0] += channels begin[0] .. end[0], sums[1] += channels begin[1] .. end[1], N of each in turn.
template <int N, class T, class Acc>
void stream(const Runs<T>& runs, const int64_t* begin, const int64_t* end, Acc (*sums)[MAX_PANEL]) {
    int64_t i = begin[0], j = begin[1];
    for (; i + N <= end[0] && j + N <= end[1]; i += N, j += N) {
        const auto one = runs.template at<N>(i, sums[0]), other = runs.template at<N>(j, sums[1]);
        for (int64_t n = 0; n < runs.width; n += UNIT) {
            add(sums[0], one, n);
            add(sums[1], other, n);
        }
    }
    for (; i + N <= end[0]; i += N) {
        const auto one = runs.template at<N>(i, sums[0]);
        for (int64_t n = 0; n < runs.width; n += UNIT) add(sums[0], one, n);
    }
    for (; j + N <= end[1]; j += N) {
        const auto other = runs.template at<N>(j, sums[1]);
        for (int64_t n = 0; n < runs.width; n += UNIT) add(sums[1], other, n);
    }
    const int64_t rest[] = {i, j};
    if constexpr (N > 1 && (Acc)0.5f != 0) stream<1>(runs, rest, end, sums);
}

// One row's sums over both halves of its inputs, for weights without scales.
template <class T>
void one_row(const Runs<T>& runs, float (*total)[MAX_PANEL]) {
    const int64_t begin[] = {0, runs.list.middle()}, end[] = {runs.list.middle(), runs.list.end};
    stream<1>(runs, begin, end, total);
}

// The same for int8, all in the first sums: groups in order, two at a time. Acc: int32 for counts, else float.
template <class Acc>
void one_row(const Runs<int8_t>& runs, const float* scale, int64_t scales, float (*total)[MAX_PANEL]) {
    alignas(64) Acc sums[2][MAX_PANEL];
    const int64_t *start = runs.list.start.data, groups = runs.list.groups;
    const bool two = (Acc)0.5f == 0 || (TOGETHER == 2 && runs.list.all && runs.width == runs.stride);
    for (int64_t g = 0; g < groups; g += 2) {
        const int64_t last = smaller(g + 2, groups);
        const int64_t begin[] = {start[g], start[g + 1]}, end[] = {start[g + 1], start[last]};
        for (int part = 0; part < 2; part++) memset(sums[part], 0, runs.width * sizeof(Acc));
        if (two)
            stream<2>(runs, begin, end, sums);
        else
            stream<1>(runs, begin, end, sums);
        for (int part = 0; part < 2; part++)
            if (begin[part] < end[part]) add_scaled(total[0], sums[part], scale + (g + part) * scales, runs.width);
    }
}

struct Lists {
    Buffer<Channels*> row;
    int64_t rows = 0, active = 0;

    explicit Lists(int64_t most) : row(most) {}
    ~Lists() {
        for (int64_t i = 0; i < rows; i++) delete row.data[i];
    }
    void add(const float* x, int64_t in, bool all, bool counts) {
        row.data[rows] = new Channels(x, in, all, counts);
        active += row.data[rows++]->fired;
    }
};

void rows_one_by_one(const Call& call, const Lists& lists, const bool* whole, const Columns& c) {
    const Packed& w = call.w;
    const float* scale = w.scale + c.first;
    for (int64_t row = 0; row < call.rows; row++) {
        alignas(64) float total[2][MAX_PANEL];
        for (int part = 0; part < 2; part++) memset(total[part], 0, c.width * sizeof(float));
        const Channels& list = *lists.row.data[row];
        if (w.kind == FP32) one_row(Runs<float>{list, weights_of<float>(w, c), c.stride, c.width}, total);
        if (w.kind == HALF) one_row(Runs<bf16>{list, weights_of<bf16>(w, c), c.stride, c.width}, total);
        const Runs<int8_t> codes{list, weights_of<int8_t>(w, c), c.stride, c.width};
        if (w.kind == INT8 && whole[row]) one_row<int32_t>(codes, scale, padded(w.out, UNIT), total);
        if (w.kind == INT8 && !whole[row]) one_row<float>(codes, scale, padded(w.out, UNIT), total);
        finish(call, row, c.first, c.width, total[0], total[1]);
    }
}

}  // namespace
