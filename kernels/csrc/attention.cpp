// Softmax attention over a window, keys and values in a ring: the token at position p lies in place p mod capacity.
//
// Keys are taken in blocks of 64 positions counted from position 0, in order, with a running maximum and sum (online
// softmax, arXiv 1805.02867; tiles as in FlashAttention, arXiv 2205.14135). The blocks of a query do not depend on where
// its chunk began, nor on threads, so prefill in any chunks and decoding give the same bits.
#include <math.h>

#include "attention_tiles.h"

namespace {

constexpr int64_t TILE_ROWS = 96;   // queries times heads of a group
constexpr int64_t ALONE = 1 << 14;  // elements of keys for which it is not worth waking other threads
constexpr float NOTHING = -1e30f;   // the running maximum before the first key

// The oldest position a query at `position` sees.
int64_t oldest(const Attention& a, int64_t position) {
    return position >= a.window ? position - a.window + 1 : 0;
}

// Which of W places from `j` on are in `seen`.
vi visible(const Span& seen, int64_t j) {
    const vi place = load_int((const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) + (int32_t)j;
    return (place >= splat_int((int32_t)seen.from)) & (place < splat_int((int32_t)seen.to));
}

// Calls with(j, what is seen of W places from `j` on) for all places of a block of which some are seen.
template <class With>
__attribute__((always_inline)) inline void each_seen(const Span& seen, With with) {
    if (seen.from <= 0 && seen.to >= BLOCK)
        for (int64_t j = 0; j < BLOCK; j += W) with(j, splat_int(-1));
    else
        for (int64_t j = larger(seen.from, 0) / W * W; j < seen.to; j += W) with(j, visible(seen, j));
}

// The largest of `maximum` and one row's scores; a NaN where there is any.
float highest(const float* scores, float scale, const Span& seen, float maximum) {
    vf tops = splat(maximum);
    each_seen(seen, [&](int64_t j, vi shown) __attribute__((always_inline)) {
        const vf score = load(scores + j) * splat(scale);
        tops = shown & ((score > tops) | (score != score)) ? score : tops;
    });
    return largest(tops);
}

// Scores of one row become weights relative to the new maximum; gives what the old sums must be multiplied by.
float soften(float* scores, float scale, const Span& seen, float top, float* maximum, float* total) {
    vf sums = {};
    each_seen(seen, [&](int64_t j, vi shown) __attribute__((always_inline)) {
        vf weight = exponential(load(scores + j) * splat(scale) - splat(top));
        weight = shown ? weight : vf{};
        store(scores + j, weight);
        sums += weight;
    });
    const float keep = top == *maximum ? 1.0f : exponential(splat(*maximum - top))[0];
    *total = *total * keep + sum(sums);
    *maximum = top;
    return keep;
}

// The queries of one group of heads, a row each, and what they have read so far.
template <class T>
struct Group {
    int64_t number;
    T* queries;
    float *sums, *maximum, *total;
};

// Room for the queries of several groups, and for one block of one of them.
template <class T>
struct Scratch {
    int64_t width, wide, rows_of_group;
    Buffer<T> queries, keys, values, rows;
    Buffer<float> scores, sums, maximum, total, tops;
    Scratch(const Attention& a, int64_t groups, int64_t rows_of_group)
        : width(a.width), wide(padded(a.width)), rows_of_group(rows_of_group), queries(groups * rows_of_group * width + W),
          keys(width * BLOCK), values(wide * BLOCK), rows(W * wide), scores(rows_of_group * BLOCK),
          sums(groups * rows_of_group * wide), maximum(groups * rows_of_group), total(groups * rows_of_group),
          tops(rows_of_group) {}
    Group<T> group(int64_t number, int64_t place) const {
        const int64_t row = place * rows_of_group;
        return {number, queries.data + row * width, sums.data + row * wide, maximum.data + row, total.data + row};
    }
    // Where the column of a place begins in its tile.
    T* keys_at(int64_t place) const {
        const int64_t column = place % (2 * W) * (int64_t)(sizeof(float) / sizeof(T));
        return keys.data + place / (2 * W) * width * 2 * W + column;
    }
};

template <class T>
void begin_queries(const Document& d, const Group<T>& group, int64_t from, int64_t to) {
    const Attention& a = d.a;
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t element = d.token(from + row / per_group) * a.q.stride +
                                (group.number * per_group + row % per_group) * a.width;
        copy_row(at(a.q.data, a.q.type, element), a.q.type, a.width, group.queries + row * a.width);
        group.maximum[row] = NOTHING;
        group.total[row] = 0;
    }
    memset(group.sums, 0, rows * padded(a.width) * sizeof(float));
}

template <class T>
void end_queries(const Document& d, const Group<T>& group, int64_t from, int64_t to) {
    const Attention& a = d.a;
    const int64_t per_group = a.heads / a.groups;
    for (int64_t row = 0; row < (to - from) * per_group; row++) {
        const int64_t head = group.number * per_group + row % per_group;
        void* out = at(a.out, a.q.type, (d.token(from + row / per_group) * a.heads + head) * a.width);
        const float* sums = group.sums + row * padded(a.width);
        if (a.kept)
            a.kept[d.token(from + row / per_group) * a.heads + head] = group.maximum[row] + logf(group.total[row]);
        for (int64_t i = 0; i < a.width; i += W)
            store_part(at(out, a.q.type, i), a.q.type, load(sums + i) / splat(group.total[row]), a.width - i);
    }
}

// The keys and values of a block's places `low .. high` as tiles, read by `read(place, part, row)`; other places are zeros.
template <class T, class Read>
void read_block(const Scratch<T>& s, int64_t low, int64_t high, Read read) {
    T* rows = s.rows.data;
    memset(rows, 0, W * s.wide * sizeof(T));
    const auto read_rows = [&](int64_t first, int64_t count, int64_t part) {
        for (int64_t j = 0; j < count; j++)
            if (low <= first + j && first + j < high)
                read(first + j, part, rows + j * s.wide);
            else
                memset(rows + j * s.wide, 0, s.wide * sizeof(T));
    };
    for (int64_t first = 0; first < BLOCK; first += W) {
        read_rows(first, W, 0);
        put_keys(rows, s.wide, s.width, s.keys_at(first));
    }
    for (int64_t first = 0; first < BLOCK; first += 2) {
        read_rows(first, 2, 1);
        put_values(rows, s.wide, s.wide, s.values.data + first * 2 * W);
    }
}

// sums += weights * values for all rows of the queries at `from .. to`, several at once. What a query does not see is not
// multiplied, as zero times infinity is not zero: the first and last places that some of them see are taken one query at a
// time.
template <class T, class Values, class Seen>
void add_values(const Scratch<T>& s, const Group<T>& group, int64_t per_group, int64_t from, int64_t to,
                const Values& values, Seen seen) {
    const auto add = [&](int64_t row, int64_t rows, const Span& span) {
        values.add(rows, (const T*)(s.scores.data + row * BLOCK), span, s.wide, group.sums + row * s.wide);
    };
    for (int64_t row = 0, count, rows = (to - from) * per_group; row < rows; row += count) {
        count = rows_of_tile(rows - row);
        const auto span = [&](int64_t n) { return seen(from + (row + n) / per_group); };
        // Spans only move forward from one query to the next.
        const int64_t low = (span(count - 1).from + Values::UNIT - 1) / Values::UNIT * Values::UNIT;
        const int64_t high = larger(low, span(0).to / Values::UNIT * Values::UNIT);
        for (int64_t n = 0; n < count; n++) add(row + n, 1, Span{span(n).from, smaller(low, span(n).to)});
        add(row, count, Span{low, high});
        for (int64_t n = 0; n < count; n++) add(row + n, 1, Span{larger(high, span(n).from), span(n).to});
    }
}

// Let the queries at `from .. to` attend to a block whose keys are in `s`, of which the one at `position` sees
// `seen(position)`. `values()` gives its values, when they are needed; `fetch(from, to)` is called on the way, for some
// places at a time.
template <class T, class GetValues, class Seen, class Fetch>
void attend(const Attention& a, const Group<T>& group, int64_t from, int64_t to, const Scratch<T>& s, GetValues values,
            Seen seen, Fetch fetch) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    memset(s.scores.data, 0, rows * BLOCK * sizeof(float));
    for (int64_t j = 0; j < BLOCK; j += 2 * W) {
        fetch(j / 2, j / 2 + W);
        put_scores(rows, group.queries, s.keys_at(j), a.width, s.scores.data + j);
    }
    // First for all rows, as each has to wait for itself.
    for (int64_t row = 0; row < rows; row++)
        s.tops.data[row] =
            highest(s.scores.data + row * BLOCK, a.scale, seen(from + row / per_group), group.maximum[row]);
    for (int64_t row = 0; row < rows; row++) {
        float* sums = group.sums + row * s.wide;
        fetch(BLOCK / 2 * (rows + row) / rows, BLOCK / 2 * (rows + row + 1) / rows);
        const float keep = soften(s.scores.data + row * BLOCK, a.scale, seen(from + row / per_group), s.tops.data[row],
                                  group.maximum + row, group.total + row);
        for (int64_t i = 0; i < s.wide && keep != 1.0f; i += W) store(sums + i, load(sums + i) * splat(keep));
    }
    put_weights(rows, s.scores.data, (T*)nullptr);
    add_values(s, group, per_group, from, to, values(), seen);
}

// Let few queries attend to a block of P that lies whole in the ring. Its values, and the keys of what is read next, are
// fetched on the way, piece by piece, as the processor stops where too much is under way.
template <class P, class T, class Seen>
void attend_in_ring(const Document& d, const Group<T>& group, int64_t from, int64_t to, int64_t block, const Scratch<T>& s,
                    Seen seen, int64_t next_block, int64_t next_group) {
    const int64_t stride = d.stride(), width = d.a.width;
    const P *keys = (const P*)d.ring(block, 0, group.number), *values = (const P*)d.ring(block, 1, group.number);
    const P* ahead = d.in_a_row(next_block) ? (const P*)d.ring(next_block, 0, next_group) : nullptr;
    const auto fetch = [&](const P* rows, int64_t from, int64_t to) __attribute__((always_inline)) {
        fetch_rows(rows + from * stride, to - from, sizeof(P) == sizeof(float) ? F32 : BF16, stride, width);
    };
    for (int64_t j = 0; j < BLOCK; j += W) {
        fetch(values, j, j + W);
        put_keys(keys + j * stride, stride, width, s.keys_at(j));
    }
    attend(d.a, group, from, to, s, [&] { return values_in_ring(values, stride, s.wide, s.values.data); }, seen,
           [&](int64_t from, int64_t to) __attribute__((always_inline)) {
               if (ahead) fetch(ahead, from, to);
           });
}

// The queries at positions `from .. to` for the heads of the groups `first .. last`.
template <class T>
void some_queries(const Document& d, int64_t first, int64_t last, int64_t from, int64_t to, const Scratch<T>& s) {
    const Attention& a = d.a;
    const auto each_group = [&](auto work) {
        for (int64_t g = first; g < last; g++) work(s.group(g, g - first));
    };
    each_group([&](const Group<T>& group) { begin_queries(d, group, from, to); });
    const auto copied = [&] { return values_of(s.values.data); };
    const auto nothing = [](int64_t, int64_t) {};
    for (int64_t sink = 0; sink < a.num_sinks; sink += BLOCK) {
        const int64_t count = smaller(BLOCK, a.num_sinks - sink);
        each_group([&](const Group<T>& group) {
            read_block(s, 0, count, [&](int64_t j, int64_t part, T* row) {
                const int64_t place = (sink + j) * 2 + part;
                copy_row(a.sinks + (place * a.groups + group.number) * a.width, F32, a.width, row);
            });
            attend(a, group, from, to, s, copied, [&](int64_t) { return Span{0, count}; }, nothing);
        });
    }
    const int64_t low = larger(oldest(a, from), d.start());
    const bool few = (to - from) * (a.heads / a.groups) <= 2 * R;
    for (int64_t block = low / BLOCK * BLOCK; block < to; block += BLOCK) {
        const auto seen = [&](int64_t position) {
            return Span{larger(larger(oldest(a, position), d.start()) - block, 0), smaller(position + 1 - block, BLOCK)};
        };
        each_group([&](const Group<T>& group) {
            if (few && low <= block && d.in_a_row(block)) {
                const bool is_last = group.number + 1 == last;
                const int64_t next_block = is_last ? block + BLOCK : block, next = is_last ? first : group.number + 1;
                if constexpr (std::is_same_v<T, float>)
                    if (a.pool_type == F32)
                        return attend_in_ring<float>(d, group, from, to, block, s, seen, next_block, next);
                return attend_in_ring<bf16>(d, group, from, to, block, s, seen, next_block, next);
            }
            read_block(s, larger(0, low - block), smaller(BLOCK, to - block), [&](int64_t j, int64_t part, T* row) {
                d.fetch(block + j + BLOCK, part, group.number);
                d.read(block + j, part, group.number, row);
            });
            attend(a, group, from, to, s, copied, seen, nothing);
        });
    }
    each_group([&](const Group<T>& group) { end_queries(d, group, from, to); });
}

// Store a document's last `capacity` keys and values.
void remember(const Document& d) {
    const Attention& a = d.a;
    Buffer<float> row(a.width + W);
    for (int64_t p = larger(d.first, d.first + d.length - a.capacity); p < d.first + d.length; p++)
        for (int64_t part = 0; part < 2; part++)
            for (int64_t group = 0; group < a.groups; group++) {
                d.read(p, part, group, row.data);
                narrow_row(row.data, a.width, d.ring(p, part, group), a.pool_type);
            }
}

template <class T>
void all_queries(const Attention& a, int64_t documents, int64_t threads) {
    const int64_t per_group = a.heads / a.groups;
    const int64_t step = larger(1, TILE_ROWS / per_group);
    Buffer<int64_t> before(documents + 1);
    before.data[0] = 0;
    for (int64_t i = 0; i < documents; i++)
        before.data[i + 1] = before.data[i] + (a.starts[i + 1] - a.starts[i] + step - 1) / step;
    int64_t keys = 0, longest = 0;  // read by all queries together, at most
    for (int64_t i = 0; i < documents; i++) {
        const int64_t length = a.starts[i + 1] - a.starts[i];
        keys += length * smaller(a.window, a.first[i] + length);
        longest = larger(longest, length);
    }
    // Few queries of many documents: a thread reads all groups of a block, which lie side by side.
    const bool together = longest * per_group <= 2 * R && documents >= 4 * threads;
    const int64_t groups = together ? a.groups : 1, parts = a.groups / groups;
#pragma omp parallel num_threads(threads) if (keys * a.groups * a.width > ALONE)
    {
        const Scratch<T> scratch(a, groups, (together ? longest : step) * per_group);
        int64_t document = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t task = 0; task < before.data[documents] * parts; task++) {
            const int64_t tile = task / parts, first = task % parts * groups;
            // Tasks come to a thread in rising order.
            while (before.data[document + 1] <= tile) document++;
            const Document d(a, document);
            const int64_t from = d.first + (tile - before.data[document]) * step;
            some_queries(d, first, first + groups, from, smaller(from + step, d.first + d.length), scratch);
        }
        if (a.pool) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < documents; i++)
                if (!a.slots || a.slots[i] >= 0) remember(Document(a, i));
        }
    }
}

#if defined(BF16_PAIRS)
// Whether to multiply pairs of bf16: if all is, in whole tiles, and no gradient is wanted, as weights are rounded then.
bool in_pairs(const Attention& a) {
    const bool halves = a.q.type == BF16 && a.k.type == BF16 && a.v.type == BF16 && (!a.pool || a.pool_type == BF16);
    return has_pairs() && halves && a.width % (2 * W) == 0 && !a.num_sinks && !a.kept;
}
#endif

}  // namespace

// Writes `out [tokens, heads, width]`, in q's type, for every token of a document, then the rings.
EXPORT(window_attention)(const Attention* a, int64_t documents, int64_t threads) {
#if defined(BF16_PAIRS)
    if (in_pairs(*a)) return all_queries<bf16>(*a, documents, threads);
#endif
    all_queries<float>(*a, documents, threads);
}

REPLAYED(window_attention)
