// One row at a time: what bounds it is reading its weights, and channels that did not fire are not read.
//
// A thread has two streams of weights under way at once, as one is not enough for the bandwidth there is: both halves of
// the inputs, or, of int8, two groups of 128 inputs.
#pragma once
#include "packed.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes fetched ahead where no channel is left out

// Appends those of W channels, `k` on, that are to be read to a list with room for W; gives how many.
int64_t keep(vf x, int64_t k, int64_t channels, bool all, int32_t* index, float* value) {
#if defined(__AVX512F__)
    const __mmask16 present = (__mmask16)((1 << channels) - 1);
    const __mmask16 fired = all ? present : _mm512_mask_cmp_ps_mask(present, (__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int)k), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                        11, 12, 13, 14, 15));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(fired, place));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(fired, (__m512)x));
    return __builtin_popcount(fired);
#else
    int64_t n = 0;
    for (int64_t i = 0; i < channels; i++) {
        index[n] = (int32_t)(k + i);
        value[n] = x[i];
        n += all || x[i] != 0;
    }
    return n;
#endif
}

// The channels of one row to be read, in order. A group's channels are `index[start[g] .. start[g + 1]]`.
struct Channels {
    int64_t in;
    Buffer<int32_t> index;
    Buffer<float> value;
    Buffer<int64_t> start;
    int64_t groups, end;

    // x can be read to the next multiple of W.
    Channels(const float* x, int64_t in, bool all)
        : in(in), index(in + W), value(in + W), start(groups_of(in) + 1), groups(groups_of(in)) {
        int64_t n = 0;
        for (int64_t g = 0; g < groups; g++) {
            start.data[g] = n;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k += W)
                n += keep(load(x + k), k, smaller(W, in - k), all, index.data + n, value.data + n);
        }
        start.data[groups] = end = n;
    }
    int64_t middle() const { return start.data[(groups + 1) / 2]; }
};

// A run of weights to be added to sums: times one channel's value, or, of two channels, times a pair of counts.
template <class T>
struct Run {
    const T *row, *next;
    vf value;
};

struct Pair {
    const int8_t *row[2], *next[2];
    vi counts;
};

// UNIT outputs from `n` on; fetches as many of what is read next.
template <class T>
void add(float* sums, const Run<T>& run, int64_t n) {
    for (size_t b = 0; b < UNIT * sizeof(T); b += 64) __builtin_prefetch((const char*)(run.next + n) + b);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += W) store(sums + n + i, fma(load(run.row + n + i), run.value, load(sums + n + i)));
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

// Channels of a list whose runs begin at `base + channel * stride`.
template <class T>
struct Runs {
    const Channels& list;
    const T* base;
    int64_t stride;

    const T* row(int64_t i) const { return base + (int64_t)list.index.data[smaller(i, list.end - 1)] * stride; }
    // The i-th, and, of counts, the one after it; those from `end` on count zero times.
    auto at(int64_t i, int64_t end, const float*) const {
        const T* next = list.end == list.in ? row(i) + AHEAD / sizeof(T) : row(i + 2);
        return Run<T>{row(i), next, splat(list.value.data[i])};
    }
    auto at(int64_t i, int64_t end, const int32_t*) const {
        const float second = i + 1 < end ? list.value.data[i + 1] : 0.0f;
        const uint32_t low = (uint16_t)(int16_t)list.value.data[i], high = (uint16_t)(int16_t)second;
        return Pair{{row(i), row(i + 1)}, {row(i + 4), row(i + 5)}, splat_int((int32_t)(low | high << 16))};
    }
};

// sums[0] += channels begin[0] .. end[0], sums[1] += channels begin[1] .. end[1], one of each in turn.
template <class T, class Acc>
void stream(const Runs<T>& runs, const int64_t* begin, const int64_t* end, Acc (*sums)[MAX_PANEL], int64_t width) {
    constexpr int64_t step = (Acc)0.5f == 0 ? 2 : 1;
    int64_t i = begin[0], j = begin[1];
    for (; i < end[0] && j < end[1]; i += step, j += step) {
        const auto one = runs.at(i, end[0], sums[0]), other = runs.at(j, end[1], sums[1]);
        for (int64_t n = 0; n < width; n += UNIT) {
            add(sums[0], one, n);
            add(sums[1], other, n);
        }
    }
    for (; i < end[0]; i += step) {
        const auto one = runs.at(i, end[0], sums[0]);
        for (int64_t n = 0; n < width; n += UNIT) add(sums[0], one, n);
    }
    for (; j < end[1]; j += step) {
        const auto other = runs.at(j, end[1], sums[1]);
        for (int64_t n = 0; n < width; n += UNIT) add(sums[1], other, n);
    }
}

// One row's sums over both halves of its inputs, for weights without scales.
template <class T>
void one_row(const Runs<T>& runs, int64_t width, float (*total)[MAX_PANEL]) {
    const int64_t begin[] = {0, runs.list.middle()}, end[] = {runs.list.middle(), runs.list.end};
    stream(runs, begin, end, total, width);
}

// The same for int8, all in the first sums: groups in order, two at a time. Acc: int32 for counts, else float.
template <class Acc>
void one_row(const Runs<int8_t>& runs, const float* scale, int64_t scales, int64_t width, float (*total)[MAX_PANEL]) {
    alignas(64) Acc sums[2][MAX_PANEL];
    const int64_t *start = runs.list.start.data, groups = runs.list.groups;
    for (int64_t g = 0; g < groups; g += 2) {
        const int64_t last = smaller(g + 2, groups);
        const int64_t begin[] = {start[g], start[g + 1]}, end[] = {start[g + 1], start[last]};
        for (int part = 0; part < 2; part++) memset(sums[part], 0, width * sizeof(Acc));
        stream(runs, begin, end, sums, width);
        for (int part = 0; part < 2; part++)
            if (begin[part] < end[part]) add_scaled(total[0], sums[part], scale + (g + part) * scales, width);
    }
}

struct Lists {
    Buffer<Channels*> row;
    int64_t rows = 0, active = 0;

    explicit Lists(int64_t most) : row(most) {}
    ~Lists() {
        for (int64_t i = 0; i < rows; i++) delete row.data[i];
    }
    void add(const float* x, int64_t in, bool all) {
        row.data[rows] = new Channels(x, in, all);
        active += row.data[rows++]->end;
    }
};

void rows_one_by_one(const Call& call, const Lists& lists, const bool* whole, const Columns& c) {
    const Packed& w = call.w;
    const float* scale = w.scale + c.first;
    for (int64_t row = 0; row < call.rows; row++) {
        alignas(64) float total[2][MAX_PANEL];
        for (int part = 0; part < 2; part++) memset(total[part], 0, c.width * sizeof(float));
        const Channels& list = *lists.row.data[row];
        if (w.kind == FP32) one_row(Runs<float>{list, weights_of<float>(w, c), c.stride}, c.width, total);
        if (w.kind == HALF) one_row(Runs<bf16>{list, weights_of<bf16>(w, c), c.stride}, c.width, total);
        const Runs<int8_t> codes{list, weights_of<int8_t>(w, c), c.stride};
        if (w.kind == INT8 && whole[row]) one_row<int32_t>(codes, scale, padded(w.out, UNIT), c.width, total);
        if (w.kind == INT8 && !whole[row]) one_row<float>(codes, scale, padded(w.out, UNIT), c.width, total);
        finish(call, row, c.first, c.width, total[0], total[1]);
    }
}

}  // namespace
