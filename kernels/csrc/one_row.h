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

// The channels of some groups of a row that are to be read, in order, and what their weights are multiplied with. A group's
// are `index[begin(g) .. end(g)]`.
struct Channels {
    static constexpr int64_t LATER = 2;  // places behind the last that can be read, too
    bool all;
    Span span;
    Buffer<int32_t> index;
    Buffer<float> value;
    Buffer<int64_t> start;

    // x can be read to the next multiple of W.
    Channels(const float* x, int64_t in, Span span, bool all)
        : all(all), span(span), index(room(span) + LATER), value(room(span)), start(span.last - span.first + 1) {
        int64_t n = 0;
        for (int64_t g = span.first; g < span.last; g++) {
            start.data[g - span.first] = n;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k += W)
                n += keep(load(x + k), k, smaller(W, in - k), all, index.data + n, value.data + n);
        }
        start.data[span.last - span.first] = n;
        for (int64_t i = 0; i < LATER; i++) index.data[n + i] = n ? index.data[n - 1] : 0;
    }
    int64_t begin(int64_t group) const { return start.data[smaller(larger(group, span.first), span.last) - span.first]; }

   private:
    static int64_t room(Span span) { return (span.last - span.first) * GROUP + W; }
};

// Spike counts of some groups of a row, four to a quad. Four products of codes with counts of up to MOST fit in 16 bits, so a
// larger count is several, of the same channel. A group's quads are `begin(g) .. begin(g + 1)`; its last counts may be zero.
struct Quads {
    static constexpr int64_t LATER = 2;  // quads behind the last that can be read, too
    static constexpr int MOST = 63;
    Span span;
    Buffer<int32_t> index;    // [quads, 4]
    Buffer<uint32_t> counts;  // [quads], four bytes
    Buffer<int64_t> start;

    // x can be read to the next multiple of W; total: at least the sum of all counts' sizes.
    Quads(const float* x, int64_t in, Span span, int64_t total)
        : span(span), index(room(span, total) * 4), counts(room(span, total)), start(span.last - span.first + 1) {
        int32_t place[GROUP + W];
        float count[GROUP + W] = {};
        for (int64_t g = span.first; g < span.last; g++) {
            vi large{};
            int64_t kept = 0;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k += W) {
                const vf counts = load(x + k);
                large |= (counts > splat(MOST)) | (counts < splat(-MOST));
                kept += keep(counts, k, smaller(W, in - k), false, place + kept, count + kept);
            }
            start.data[g - span.first] = end;
            append(place, count, kept, any(large));
        }
        start.data[span.last - span.first] = end;
        for (int i = 0; i < 4 * LATER; i++) index.data[4 * end + i] = end ? index.data[4 * end - 1] : 0;
    }
    int64_t begin(int64_t group) const { return start.data[group - span.first]; }

   private:
    int64_t end = 0;

    static int64_t room(Span span, int64_t total) {
        const int64_t groups = span.last - span.first;
        return (groups * GROUP + total / MOST) / 4 + groups + LATER + W / 4;
    }

    void append(const int32_t* place, const float* count, int64_t kept, bool large) {
        int8_t* bytes = (int8_t*)(counts.data + end);
        int32_t* to = index.data + 4 * end;
        int64_t n = kept;
        if (large) {
            n = in_parts(place, count, kept, to, bytes);
        } else {
            memcpy(to, place, kept * sizeof *to);
            for (int64_t i = 0; i < kept; i += W) store(bytes + i, __builtin_convertvector(load(count + i), vi));
        }
        for (; n % 4; n++) to[n] = to[n - 1], bytes[n] = 0;
        end += n / 4;
    }
    static int64_t in_parts(const int32_t* place, const float* count, int64_t kept, int32_t* to, int8_t* bytes) {
        int64_t n = 0;
        for (int64_t i = 0; i < kept; i++)
            for (int32_t rest = (int32_t)count[i]; rest; n++) {
                const int32_t part = rest > MOST ? MOST : rest < -MOST ? -MOST : rest;
                to[n] = place[i], bytes[n] = (int8_t)part;
                rest -= part;
            }
        return n;
    }
};

// Runs of weights to be added to sums, of N channels, one after another in memory, times their values. As much of what is
// read later is fetched.
template <class T, int N>
struct Run {
    const T *row[N], *next;
    vf value[N];
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

// Channels of a list whose runs of `width` begin at `base + channel * stride`.
template <class T>
struct Runs {
    const Channels& list;
    const T* base;
    int64_t stride, width;

    const T* row(int64_t i) const { return base + list.index.data[i] * stride; }
    // N channels from the i-th on.
    template <int N>
    Run<T, N> at(int64_t i) const {
        Run<T, N> run;
        run.next = list.all ? row(i) + AHEAD / sizeof(T) : row(i + 2);
        for (int c = 0; c < N; c++) run.row[c] = row(i + c), run.value[c] = splat(list.value.data[i + c]);
        return run;
    }
};

// sums[0] += channels begin[0] .. end[0], sums[1] += channels begin[1] .. end[1], N of each in turn.
template <int N, class T>
void stream(const Runs<T>& runs, const int64_t* begin, const int64_t* end, float (*sums)[MAX_PANEL]) {
    int64_t i = begin[0], j = begin[1];
    for (; i + N <= end[0] && j + N <= end[1]; i += N, j += N) {
        const auto one = runs.template at<N>(i), other = runs.template at<N>(j);
        for (int64_t n = 0; n < runs.width; n += UNIT) {
            add(sums[0], one, n);
            add(sums[1], other, n);
        }
    }
    for (; i + N <= end[0]; i += N) {
        const auto one = runs.template at<N>(i);
        for (int64_t n = 0; n < runs.width; n += UNIT) add(sums[0], one, n);
    }
    for (; j + N <= end[1]; j += N) {
        const auto other = runs.template at<N>(j);
        for (int64_t n = 0; n < runs.width; n += UNIT) add(sums[1], other, n);
    }
    const int64_t rest[] = {i, j};
    if constexpr (N > 1) stream<1>(runs, rest, end, sums);
}

// A row's sums over both halves of its inputs, or what of them is in the list, for weights without scales.
template <class T>
void one_row(const Runs<T>& runs, int64_t half, float (*total)[MAX_PANEL]) {
    const Channels& list = runs.list;
    const int64_t begin[] = {list.begin(0), list.begin(half)}, end[] = {list.begin(half), list.begin(list.span.last)};
    stream<1>(runs, begin, end, total);
}

// The same for int8: groups in order, two at a time.
void one_row(const Runs<int8_t>& runs, int64_t half, const float* scale, int64_t scales, float (*total)[MAX_PANEL]) {
    alignas(64) float sums[2][MAX_PANEL];
    const Channels& list = runs.list;
    const bool together = TOGETHER == 2 && list.all && runs.width == runs.stride;
    for (int64_t g = list.span.first; g < list.span.last; g += 2) {
        const int64_t begin[] = {list.begin(g), list.begin(g + 1)}, end[] = {list.begin(g + 1), list.begin(g + 2)};
        for (int part = 0; part < 2; part++) memset(sums[part], 0, runs.width * sizeof(float));
        if (together)
            stream<2>(runs, begin, end, sums);
        else
            stream<1>(runs, begin, end, sums);
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

    // Q quads from `quad` on; those after them are fetched. A function of its own, as in a larger one the compiler keeps some
    // of the rows' addresses in memory.
    template <int Q>
    __attribute__((noinline)) void add(int16_t* sums, int64_t quad) const {
        const int8_t *row[4 * Q], *next[4 * Q];
        vbytes counts[2 * Q];
        for (int c = 0; c < 4 * Q; c++) {
            row[c] = base + list.index.data[4 * quad + c] * stride;
            next[c] = base + list.index.data[4 * (quad + Q) + c] * stride;
        }
        for (int pair = 0; pair < 2 * Q; pair++) {
            const int16_t two = (int16_t)(list.counts.data[quad + pair / 2] >> pair % 2 * 16);
            counts[pair] = (vbytes)(vshorts{} + two);
        }
        for (int64_t n = 0; n < width; n += UNIT) {
            for (int c = 0; c < 4 * Q; c++) __builtin_prefetch(next[c] + n);
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
        if (w.kind == FP32) one_row(Runs<float>{list, weights_of<float>(w, c), c.stride, c.width}, half, total);
        if (w.kind == HALF) one_row(Runs<bf16>{list, weights_of<bf16>(w, c), c.stride, c.width}, half, total);
        if (w.kind == INT8)
            one_row(Runs<int8_t>{list, weights_of<int8_t>(w, c), c.stride, c.width}, half, scale, scales, total);
    }
    if (list.span.is_all(w.in)) return finish(call, row, c.first, c.width, total[0], total[1]);
    const int64_t own = list.span.first > 0;
    memcpy(halves.at(own, row) + c.first, total[own], c.width * sizeof(float));
}

// A thread's part of each row.
void rows_one_by_one(const Call& call, const Reading* readings, const Part& part, const Halves& halves) {
    for (int64_t row = 0; row < call.rows; row++) {
        const float* x = call.x + row * call.stride;
        const auto compute = [&](const auto& list) {
            share(call.w, part.piece, part.pieces, MAX_PANEL,
                  [&](const Columns& columns) { columns_of_row(call, row, list, columns, halves); });
        };
        if (readings[row].counts)
            compute(Quads(x, call.w.in, part.span, readings[row].total));
        else
            compute(Channels(x, call.w.in, part.span, readings[row].all));
    }
}

}  // namespace
