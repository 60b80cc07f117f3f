// One row at a time: what bounds it is reading its weights, and channels that did not fire are not read.
//
// A thread has two streams of weights under way at once where one is not enough for the bandwidth there is: both halves of
// the inputs or, of int8, two groups of 128 inputs. Every channel is one stream where the processor's own prefetching follows
// it, and of int8, two channels of which are read at once.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "lists.h"

namespace {

// Channels of dense int8 that are added in one pass over the sums. One at a time a core computes no faster than it reads.
constexpr int TOGETHER = 2;
// Bytes fetched ahead of N channels where none is left out: of several the next ones, as wide as a panel can be.
template <int N>
constexpr int64_t AHEAD = N > 1 ? N * MAX_PANEL : 2048;

// Whether one stream is read faster than two. Measured: Zen 3 reads it at 0.8 of the rate at which it reads two, Zen 4 and 5
// the other way round. By family and model, as GCC 12 takes a Zen 4 without AVX-512 for a Zen 3.
bool one_stream() {
#if defined(__x86_64__)
    static const bool one = [] {
        unsigned id, b, c, d;
        if (!__get_cpuid(1, &id, &b, &c, &d)) return true;
        const unsigned family = (id >> 8 & 0xf) + (id >> 20 & 0xff), model = (id >> 12 & 0xf0) | (id >> 4 & 0xf);
        return family != 0x19 || model / 16 == 1 || model >= 0x60;
    }();
    return one;
#else
    return true;
#endif
}

// Runs of weights to be added to sums, of N channels, one after another in memory, times their values. As much of what is
// read later is fetched, if FETCH.
template <class T, int N, bool FETCH>
struct Run {
    const T *row[N], *next;
    vf value[N];
};

// UNIT outputs from `n` on.
template <class T, int N, bool FETCH>
void add(float* sums, const Run<T, N, FETCH>& run, int64_t n) {
    for (size_t b = 0; FETCH && b < N * UNIT * sizeof(T); b += 64) __builtin_prefetch((const char*)(run.next + N * n) + b);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += W) {
        vf sum = load(sums + n + i);
        for (int c = 0; c < N; c++) sum = fma(load(run.row[c] + n + i), run.value[c], sum);
        store(sums + n + i, sum);
    }
}

// Channels of a list whose runs of `width` begin at `base + channel * stride`.
template <class T, class List>
struct Runs {
    const List& list;
    const T* base;
    int64_t stride, width;

    const T* row(int64_t i) const { return base + list.channel(i) * stride; }
    // N channels from the i-th on.
    template <int N, bool FETCH = true>
    auto at(int64_t i) const {
        Run<T, N, FETCH> run;
        if constexpr (std::is_same_v<List, Every>)
            run.next = row(i) + AHEAD<N> / sizeof(T);
        else
            run.next = row(i + 2);
        for (int c = 0; c < N; c++) run.row[c] = row(i + c), run.value[c] = splat(list.value(i + c));
        return run;
    }
};

// sums += channels begin .. end, N in a pass. A function of its own, as in a larger one addresses are kept in memory.
template <int N, bool FETCH = true, class T, class List>
__attribute__((noinline)) void stream(const Runs<T, List>& runs, int64_t begin, int64_t end, float* sums) {
    const int64_t width = runs.width;  // `sums` could be a part of `runs`, for all the compiler knows
    int64_t i = begin;
    for (; i + N <= end; i += N) {
        const auto run = runs.template at<N, FETCH>(i);
        for (int64_t n = 0; n < width; n += UNIT) add(sums, run, n);
    }
    if constexpr (N > 1) stream<1>(runs, i, end, sums);
}

// sums[0] += channels begin[0] .. end[0], sums[1] += channels begin[1] .. end[1], in turn.
template <class T, class List>
void two_streams(const Runs<T, List>& runs, const int64_t* begin, const int64_t* end, float (*sums)[MAX_PANEL]) {
    int64_t i = begin[0], j = begin[1];
    for (; i < end[0] && j < end[1]; i++, j++) {
        const auto one = runs.template at<1>(i), other = runs.template at<1>(j);
        for (int64_t n = 0; n < runs.width; n += UNIT) {
            add(sums[0], one, n);
            add(sums[1], other, n);
        }
    }
    stream<1>(runs, i, end[0], sums[0]);
    stream<1>(runs, j, end[1], sums[1]);
}

// The same in the way in which such weights are read fastest.
template <class T, class List>
void both(const Runs<T, List>& runs, const int64_t* begin, const int64_t* end, float (*sums)[MAX_PANEL]) {
    constexpr bool every = std::is_same_v<List, Every>;
    constexpr int together = every && std::is_same_v<T, int8_t> ? TOGETHER : 1;
    if (together > 1 && runs.width == runs.stride) {
        for (int part = 0; part < 2; part++) stream<together>(runs, begin[part], end[part], sums[part]);
    } else if (every && one_stream()) {
        for (int part = 0; part < 2; part++) stream<1, false>(runs, begin[part], end[part], sums[part]);
    } else {
        two_streams(runs, begin, end, sums);
    }
}

// A row's sums over both halves of its inputs, or what of them is in the list, for weights without scales.
template <class T, class List>
void one_row(const Runs<T, List>& runs, int64_t half, float (*total)[MAX_PANEL]) {
    const List& list = runs.list;
    const int64_t begin[] = {list.begin(0), list.begin(half)}, end[] = {list.begin(half), list.begin(list.span.last)};
    both(runs, begin, end, total);
}

// The same for int8: groups in order, two at a time.
template <class List>
void one_row(const Runs<int8_t, List>& runs, int64_t half, const float* scale, int64_t scales, float (*total)[MAX_PANEL]) {
    alignas(64) float sums[2][MAX_PANEL];
    const List& list = runs.list;
    for (int64_t g = list.span.first; g < list.span.last; g += 2) {
        const int64_t begin[] = {list.begin(g), list.begin(g + 1)}, end[] = {list.begin(g + 1), list.begin(g + 2)};
        for (int part = 0; part < 2; part++) memset(sums[part], 0, runs.width * sizeof(float));
        both(runs, begin, end, sums);
        for (int part = 0; part < 2; part++)
            if (begin[part] < end[part])
                add_scaled(total[g + part >= half], sums[part], scale + (g + part) * scales, runs.width);
    }
}

// Sums of products with counts: in 16 bits, in the order of `interleave`, and what became too large for them.
struct Sums {
    alignas(64) int16_t small[MAX_PANEL];
    alignas(64) int32_t large[MAX_PANEL];
    bool any_large = false;

    explicit Sums(int64_t width) { memset(small, 0, width * sizeof *small); }
    // Calls with(n, W sums from the n-th on), and those in 16 bits are zero.
    template <class With>
    void take(int64_t width, With with) {
        for (int64_t n = 0; n < width; n += 4 * W) {
            int16_t part[4 * W];
            vi low, high, ordered[2];
            memcpy(&low, small + n, sizeof low);
            memcpy(&high, small + n + 2 * W, sizeof high);
            in_order(low, high, &ordered[0], &ordered[1]);
            memcpy(part, ordered, sizeof part);
            memset(small + n, 0, sizeof part);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4 * W; i += W) with(n + i, load_int(part + i));
        }
    }
    void make_room(int64_t width) {
        if (!any_large) memset(large, 0, width * sizeof *large);
        any_large = true;
        take(width, [&](int64_t n, vi sum) { store_int(large + n, load_int(large + n) + sum); });
    }
    void add_to(float* total, const float* scale, int64_t width) {
        const auto add = [&](int64_t n, vi sum) { store(total + n, load(total + n) + load(scale + n) * to_float(sum)); };
        if (any_large)
            take(width, [&](int64_t n, vi sum) { add(n, load_int(large + n) + sum); });
        else
            take(width, add);
        any_large = false;
    }
};

// One row of counts. Line by line its channels are read eight at a time, as eight short runs with gaps are read faster than
// one after another.
struct Counted {
    const Quads& list;
    const int8_t* base;
    int64_t stride, width;

    // Q quads from `quad` on; those after them are fetched to the second cache, as more can be under way there. A function of
    // its own, as in a larger one the compiler keeps some of the rows' addresses in memory.
    template <int Q>
    __attribute__((noinline)) void add(int16_t* sums, int64_t quad) const {
        const int8_t *row[4 * Q], *next[4 * Q];
        vbytes counts[2 * Q];
        for (int c = 0; c < 4 * Q; c++) {
            row[c] = base + list.index.data[4 * quad + c] * stride;
            next[c] = base + list.index.data[4 * (quad + 2) + c] * stride;
        }
        for (int pair = 0; pair < 2 * Q; pair++) {
            const int16_t two = (int16_t)(list.counts.data[quad + pair / 2] >> pair % 2 * 16);
            counts[pair] = (vbytes)(vshorts{} + two);
        }
        for (int64_t n = 0; n < width; n += UNIT) {
            for (int c = 0; c < 4 * Q; c++) __builtin_prefetch(next[c] + n, 0, 2);
#pragma GCC unroll 4
            for (int64_t i = n; i < n + UNIT; i += 4 * W) {
                vshorts sum[2];
                memcpy(sum, sums + i, sizeof sum);
#pragma GCC unroll 4
                for (int pair = 0; pair < 2 * Q; pair++) {
                    vbytes low, high;
                    interleave(row[2 * pair] + i, row[2 * pair + 1] + i, &low, &high);
                    sum[0] += dot_bytes(low, counts[pair]);
                    sum[1] += dot_bytes(high, counts[pair]);
                }
                memcpy(sums + i, sum, sizeof sum);
            }
        }
    }
    // Of four counts. No sum of products with codes of -128 to 127 is larger than 128 times as much, so ROOM fits in 16 bits.
    static constexpr int ROOM = 255;
    static int size(uint32_t counts) {
        int total = 0;
        for (int c = 0; c < 32; c += 8) total += abs((int8_t)(counts >> c));
        return total;
    }
    void row(int64_t half, const float* scale, int64_t scales, float (*total)[MAX_PANEL]) const {
        Sums sums(width);
        for (int64_t g = list.span.first; g < list.span.last; g++) {
            int used = 0;
            for (int64_t n = 0; n < width; n += 16) __builtin_prefetch(scale + g * scales + n);
            for (int64_t quad = list.begin(g), end = list.begin(g + 1), count; quad < end; quad += count) {
                int more = size(list.counts.data[quad]);
                const int second = quad + 1 < end ? size(list.counts.data[quad + 1]) : ROOM;
                count = more + second <= ROOM ? 2 : 1;
                more += count == 2 ? second : 0;
                if (used + more > ROOM) sums.make_room(width), used = 0;
                if (count == 2)
                    add<2>(sums.small, quad);
                else
                    add<1>(sums.small, quad);
                used += more;
            }
            if (used) sums.add_to(total[g >= half], scale + g * scales, width);
        }
    }
};

// How a row is to be read: as counts or as floats, every channel or those that fired.
struct Reading {
    bool counts, all;
    int64_t total;  // of counts: the sum of their sizes
};

// Columns `c` of a row, of which `list` says what to read.
template <class List>
void columns_of_row(const Call& call, int64_t row, const List& list, const Columns& c, const Halves& halves) {
    const Packed& w = call.w;
    const float* scale = w.scale + c.first;
    const int64_t scales = padded(w.out, UNIT), half = first_half(w.in);
    alignas(64) float total[2][MAX_PANEL];
    for (int part = 0; part < 2; part++) memset(total[part], 0, c.width * sizeof(float));
    if constexpr (std::is_same_v<List, Quads>) {
        Counted{list, weights_of<int8_t>(w, c), c.stride, c.width}.row(half, scale, scales, total);
    } else {
        if (w.kind == FP32) one_row(Runs<float, List>{list, weights_of<float>(w, c), c.stride, c.width}, half, total);
        if (w.kind == HALF) one_row(Runs<bf16, List>{list, weights_of<bf16>(w, c), c.stride, c.width}, half, total);
        if (w.kind == INT8)
            one_row(Runs<int8_t, List>{list, weights_of<int8_t>(w, c), c.stride, c.width}, half, scale, scales, total);
    }
    if (list.span.is_all(w.in)) return finish(call, row, c.first, c.width, total[0], total[1]);
    const int64_t own = list.span.first > 0;
    memcpy(halves.at(own, row) + c.first, total[own], c.width * sizeof(float));
}

// A thread's part of each row; taken [rows]: pieces of each that those who read the same inputs have taken.
void rows_one_by_one(const Call& call, const Reading* readings, const Part& part, int64_t* taken, const Halves& halves) {
    const Pieces pieces(call.w, MAX_PANEL, part.threads);
    for (int64_t row = 0; row < call.rows; row++) {
        const float* x = call.x + row * call.stride;
        const auto compute = [&](const auto& list) {
            pieces.take(taken + row,
                        [&](const Columns& columns) { columns_of_row(call, row, list, columns, halves); });
        };
        if (readings[row].counts)
            compute(Quads(x, call.w.in, part.span, readings[row].total));
        else if (readings[row].all)
            compute(Every{x, call.w.in, part.span});
        else
            compute(Channels(x, call.w.in, part.span));
    }
}

}  // namespace
