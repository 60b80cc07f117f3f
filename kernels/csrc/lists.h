// Lists of the channels of a row that are to be read: every one, those that are not zero, or spike counts in quads.
#pragma once
#include "packed.h"

namespace {

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
int64_t keep(vf x, int64_t k, int64_t channels, int32_t* index, float* value) {
    const int present = (1 << channels) - 1;
#if defined(__AVX512F__)
    const __mmask16 other = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __mmask16 fired = (__mmask16)(present & other);
    const __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int)k), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                        11, 12, 13, 14, 15));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(fired, place));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(fired, (__m512)x));
    return __builtin_popcount(fired);
#elif defined(__AVX2__)
    const int other = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    const int fired = present & other;
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES.lane[fired]));
    _mm256_storeu_si256((__m256i*)index, _mm256_add_epi32(lanes, _mm256_set1_epi32((int)k)));
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps((__m256)x, lanes));
    return __builtin_popcount(fired);
#else
    int64_t n = 0;
    for (int64_t i = 0; i < W; i++) {
        index[n] = (int32_t)(k + i);
        value[n] = x[i];
        n += (present >> i & 1) && x[i] != 0;
    }
    return n;
#endif
}

// A list of channels to be read, in order, and what their weights are multiplied with: all of some groups of a row. A group's
// are the `begin(g) .. begin(g + 1)`-th.
struct Every {
    const float* x;
    int64_t in;
    Span span;

    int64_t channel(int64_t i) const { return i; }
    float value(int64_t i) const { return x[i]; }
    int64_t begin(int64_t group) const { return smaller(smaller(larger(group, span.first), span.last) * GROUP, in); }
};

// Such a list of those that are not zero.
struct Channels {
    static constexpr int64_t LATER = 2;  // places behind the last that can be read, too
    Span span;
    Buffer<int32_t> index;
    Buffer<float> values;
    Buffer<int64_t> start;

    // x can be read to the next multiple of W.
    Channels(const float* x, int64_t in, Span span)
        : span(span), index(room(span) + LATER), values(room(span)), start(span.last - span.first + 1) {
        int64_t n = 0;
        for (int64_t g = span.first; g < span.last; g++) {
            start.data[g - span.first] = n;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k += W)
                n += keep(load(x + k), k, smaller(W, in - k), index.data + n, values.data + n);
        }
        start.data[span.last - span.first] = n;
        for (int64_t i = 0; i < LATER; i++) index.data[n + i] = n ? index.data[n - 1] : 0;
    }
    int64_t channel(int64_t i) const { return index.data[i]; }
    float value(int64_t i) const { return values.data[i]; }
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
                kept += keep(counts, k, smaller(W, in - k), place + kept, count + kept);
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

}  // namespace
