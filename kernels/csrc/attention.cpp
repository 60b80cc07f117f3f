// Softmax attention over a window, keys and values in a ring: the token at position p lies in place p mod capacity.
//
// Keys are taken in blocks of 64 positions counted from position 0, in order, with a running maximum and sum (online
// softmax, arXiv 1805.02867; tiles as in FlashAttention, arXiv 2205.14135). The blocks of a query do not depend on where
// its chunk began, nor on threads, so prefill in any chunks and decoding give the same bits.
#include <math.h>

#include "attention.h"

namespace {

constexpr int64_t TILE_ROWS = 96;   // queries times heads of a group
constexpr int64_t ALONE = 1 << 14;  // elements of keys for which it is not worth waking other threads
constexpr float NOTHING = -1e30f;   // the running maximum before the first key

// The oldest position a query at `position` sees.
int64_t oldest(const Attention& a, int64_t position) {
    return position >= a.window ? position - a.window + 1 : 0;
}

// W rows, `stride` apart, as columns of a tile of keys; they can be read to the next multiple of four.
void put_keys(const float* rows, int64_t stride, int64_t width, float* tile) {
    for (int64_t i = 0; i < width; i += 4) {
        vf columns[4];
        four_columns(rows + i, stride, columns);
        for (int64_t j = 0; j < smaller(4, width - i); j++) store(tile + (i + j) * 2 * W, columns[j]);
    }
}

// The same for an even number of elements apart and whole groups of eight; a column of 32 bits is two of them.
void put_keys(const bf16* rows, int64_t stride, int64_t width, float* tile) {
    for (int64_t i = 0; i < width; i += 8) {
        vf columns[4];
        four_columns((const float*)(rows + i), stride / 2, columns);
        for (int64_t j = 0; j < 4; j++) {
            store(tile + (i + 2 * j) * 2 * W, (vf)((vi)columns[j] << 16));
            store(tile + (i + 2 * j + 1) * 2 * W, (vf)((vi)columns[j] & (int32_t)0xffff0000));
        }
    }
}

// Where the values of place j begin: `base + j * next`; the element i of a whole tile lies `i * column` further on.
template <class T>
struct Values {
    const T* base;
    int64_t next, column;
};

// Keys `[width][64]` and values `[64][width]` of a block's places `low..high` as tiles, read by `read(place, part, row)`;
// other places are zeros. `rows [W, padded width]` is room to read to.
template <class Read>
void read_block(const Attention& a, int64_t low, int64_t high, float* keys, float* values, float* rows, Read read) {
    const int64_t width = a.width, wide = padded(width);
    memset(rows, 0, W * wide * sizeof(float));
    for (int64_t first = 0; first < BLOCK; first += W) {
        for (int64_t j = 0; j < W; j++)
            if (low <= first + j && first + j < high)
                read(first + j, 0, rows + j * wide);
            else
                memset(rows + j * wide, 0, wide * sizeof(float));
        put_keys(rows, wide, width, keys + first / (2 * W) * width * 2 * W + first % (2 * W));
    }
    memset(rows, 0, wide * sizeof(float));
    for (int64_t j = 0; j < BLOCK; j++) {
        if (low <= j && j < high)
            read(j, 1, rows);
        else
            memset(rows, 0, wide * sizeof(float));
        for (int64_t i = 0; i < wide; i += W)
            store(values + (i / (2 * W) * BLOCK + j) * 2 * W + i % (2 * W), load(rows + i));
    }
}

// Which of W places from `j` on are in `seen`.
vi visible(const Span& seen, int64_t j) {
    const vi place = load_int((const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) + (int32_t)j;
    return (place >= splat_int((int32_t)seen.from)) & (place < splat_int((int32_t)seen.to));
}

// Calls with(j, what is seen of W places from `j` on) for all places of a block of which some are seen.
template <class With>
void each_seen(const Span& seen, With with) {
    if (seen.from <= 0 && seen.to >= BLOCK)
        for (int64_t j = 0; j < BLOCK; j += W) with(j, splat_int(-1));
    else
        for (int64_t j = larger(seen.from, 0) / W * W; j < seen.to; j += W) with(j, visible(seen, j));
}

// The largest of `maximum` and one row's scores; a NaN where there is any.
float highest(const float* scores, const Span& seen, float maximum) {
    vf tops = splat(maximum);
    each_seen(seen, [&](int64_t j, vi shown) {
        const vf score = load(scores + j);
        tops = shown & ((score > tops) | (score != score)) ? score : tops;
    });
    return largest(tops);
}

// Scores of one row become weights relative to the new maximum; gives what the old sums must be multiplied by.
float soften(float* scores, const Span& seen, float top, float* maximum, float* total) {
    vf sums = {};
    each_seen(seen, [&](int64_t j, vi shown) {
        vf weight = exponential(load(scores + j) - splat(top));
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
struct Group {
    int64_t number;
    float *queries, *sums, *maximum, *total;
};

// Room for the queries of several groups, and for one block of one of them.
struct Scratch {
    int64_t width, rows_of_group;
    Buffer<float> queries, scores, sums, keys, values, rows, maximum, total, tops;
    Scratch(const Attention& a, int64_t groups, int64_t rows_of_group)
        : width(a.width), rows_of_group(rows_of_group), queries(groups * rows_of_group * a.width + W),
          scores(rows_of_group * BLOCK), sums(groups * rows_of_group * padded(a.width)), keys(a.width * BLOCK),
          values(padded(a.width) * BLOCK), rows(W * padded(a.width)), maximum(groups * rows_of_group),
          total(groups * rows_of_group), tops(rows_of_group) {}
    Group group(int64_t number, int64_t place) const {
        const int64_t row = place * rows_of_group;
        return {number, queries.data + row * width, sums.data + row * padded(width), maximum.data + row,
                total.data + row};
    }
};

void begin_queries(const Document& d, const Group& group, int64_t from, int64_t to, float* wide) {
    const Attention& a = d.a;
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t element = d.token(from + row / per_group) * a.q.stride +
                                (group.number * per_group + row % per_group) * a.width;
        widen_row(at(a.q.data, a.q.type, element), a.q.type, a.width, wide);
        for (int64_t i = 0; i < a.width; i++) group.queries[row * a.width + i] = wide[i] * a.scale;
        group.maximum[row] = NOTHING;
        group.total[row] = 0;
    }
    memset(group.sums, 0, rows * padded(a.width) * sizeof(float));
}

void end_queries(const Document& d, const Group& group, int64_t from, int64_t to) {
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

// sums += weights * values for `rows` rows and the places of a block that all of them see.
template <class T>
void add_values(const Attention& a, int64_t row, int64_t rows, const Span& seen, const Values<T>& values,
                const float* scores, float* sums) {
    const int64_t wide = padded(a.width);
    for (int64_t i = 0; i < wide && seen.from < seen.to; i += 2 * W)
        tiles_of(rows, values.base + i * values.column + seen.from * values.next, values.next,
                 scores + row * BLOCK + seen.from, BLOCK, 1, seen.to - seen.from, sums + row * wide + i, wide);
}

// The same for all rows of the queries at `from .. to`, several at once. What a query does not see is not multiplied,
// as zero times infinity is not zero: the first and last places that some of them see are taken one query at a time.
template <class T, class Seen>
void add_values(const Attention& a, int64_t from, int64_t to, const Values<T>& values, const float* scores, float* sums,
                Seen seen) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0, count; row < rows; row += count) {
        count = rows_of_tile(rows - row);
        const auto span = [&](int64_t n) { return seen(from + (row + n) / per_group); };
        // Spans only move forward from one query to the next.
        const int64_t low = span(count - 1).from, high = larger(low, span(0).to);
        for (int64_t n = 0; n < count; n++)
            add_values(a, row + n, 1, Span{span(n).from, smaller(low, span(n).to)}, values, scores, sums);
        add_values(a, row, count, Span{low, high}, values, scores, sums);
        for (int64_t n = 0; n < count; n++)
            add_values(a, row + n, 1, Span{larger(high, span(n).from), span(n).to}, values, scores, sums);
    }
}

// Let the queries at `from .. to` attend to a block whose keys are in `s`, of which the one at `position` sees
// `seen(position)`. `fetch(from, to)` is called on the way, for some places at a time.
template <class T, class Seen, class Fetch>
void attend(const Attention& a, const Group& group, int64_t from, int64_t to, const Values<T>& values, Scratch& s,
            Seen seen, Fetch fetch) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group, wide = padded(a.width);
    memset(s.scores.data, 0, rows * BLOCK * sizeof(float));
    for (int64_t j = 0; j < BLOCK; j += 2 * W) {
        fetch(j / 2, j / 2 + W);
        tiles_float(rows, s.keys.data + j * a.width, group.queries, a.width, a.width, s.scores.data + j, BLOCK);
    }
    // First for all rows, as each has to wait for itself.
    for (int64_t row = 0; row < rows; row++)
        s.tops.data[row] = highest(s.scores.data + row * BLOCK, seen(from + row / per_group), group.maximum[row]);
    for (int64_t row = 0; row < rows; row++) {
        float* sums = group.sums + row * wide;
        fetch(BLOCK / 2 * (rows + row) / rows, BLOCK / 2 * (rows + row + 1) / rows);
        const float keep = soften(s.scores.data + row * BLOCK, seen(from + row / per_group), s.tops.data[row],
                                  group.maximum + row, group.total + row);
        for (int64_t i = 0; i < wide && keep != 1.0f; i += W) store(sums + i, load(sums + i) * splat(keep));
    }
    add_values(a, from, to, values, s.scores.data, group.sums, seen);
}

// Let few queries attend to a block where it lies, whole, in the ring. Its values, and the keys of what is read next, are
// fetched on the way, piece by piece, as the processor stops where too much is under way.
template <class T, class Seen>
void attend_in_ring(const Document& d, const Group& group, int64_t from, int64_t to, int64_t block, Scratch& s, Seen seen,
                    int64_t next_block, int64_t next_group) {
    const Attention& a = d.a;
    for (int64_t j = 0; j < BLOCK; j += W) {
        d.fetch(block + j, block + j + W, 1, group.number);
        put_keys((const T*)d.ring(block + j, 0, group.number), d.stride(), a.width,
                 s.keys.data + j / (2 * W) * a.width * 2 * W + j % (2 * W));
    }
    attend(a, group, from, to, Values<T>{(const T*)d.ring(block, 1, group.number), d.stride(), 1}, s, seen,
           [&](int64_t from, int64_t to) __attribute__((always_inline)) {
               d.fetch(next_block + from, next_block + to, 0, next_group);
           });
}

// The queries at positions `from .. to` for the heads of the groups `first .. last`.
void some_queries(const Document& d, int64_t first, int64_t last, int64_t from, int64_t to, Scratch& s) {
    const Attention& a = d.a;
    const auto each_group = [&](auto work) {
        for (int64_t g = first; g < last; g++) work(s.group(g, g - first));
    };
    each_group([&](const Group& group) { begin_queries(d, group, from, to, s.rows.data); });
    const Values<float> copied{s.values.data, 2 * W, BLOCK};
    const auto nothing = [](int64_t, int64_t) {};
    for (int64_t sink = 0; sink < a.num_sinks; sink += BLOCK) {
        const int64_t count = smaller(BLOCK, a.num_sinks - sink);
        each_group([&](const Group& group) {
            read_block(a, 0, count, s.keys.data, s.values.data, s.rows.data, [&](int64_t j, int64_t part, float* row) {
                const int64_t place = (sink + j) * 2 + part;
                memcpy(row, a.sinks + (place * a.groups + group.number) * a.width, a.width * sizeof(float));
            });
            attend(a, group, from, to, copied, s, [&](int64_t) { return Span{0, count}; }, nothing);
        });
    }
    const int64_t low = larger(oldest(a, from), d.start());
    const bool few = (to - from) * (a.heads / a.groups) <= 2 * R;
    for (int64_t block = low / BLOCK * BLOCK; block < to; block += BLOCK) {
        const auto seen = [&](int64_t position) {
            return Span{larger(larger(oldest(a, position), d.start()) - block, 0), smaller(position + 1 - block, BLOCK)};
        };
        each_group([&](const Group& group) {
            if (few && low <= block && d.in_a_row(block)) {
                const bool is_last = group.number + 1 == last;
                const int64_t next_block = is_last ? block + BLOCK : block, next = is_last ? first : group.number + 1;
                if (a.pool_type == F32)
                    attend_in_ring<float>(d, group, from, to, block, s, seen, next_block, next);
                else
                    attend_in_ring<bf16>(d, group, from, to, block, s, seen, next_block, next);
                return;
            }
            read_block(a, larger(0, low - block), smaller(BLOCK, to - block), s.keys.data, s.values.data, s.rows.data,
                       [&](int64_t j, int64_t part, float* row) {
                           d.fetch(block + j + BLOCK, block + j + BLOCK + 1, part, group.number);
                           d.read(block + j, part, group.number, row);
                       });
            attend(a, group, from, to, copied, s, seen, nothing);
        });
    }
    each_group([&](const Group& group) { end_queries(d, group, from, to); });
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

}  // namespace

// Writes `out [tokens, heads, width]`, in q's type, for every token of a document, then the rings.
EXPORT(window_attention)(const Attention* a, int64_t documents, int64_t threads) {
    const int64_t per_group = a->heads / a->groups;
    const int64_t step = larger(1, TILE_ROWS / per_group);
    Buffer<int64_t> before(documents + 1);
    before.data[0] = 0;
    for (int64_t i = 0; i < documents; i++)
        before.data[i + 1] = before.data[i] + (a->starts[i + 1] - a->starts[i] + step - 1) / step;
    int64_t keys = 0, longest = 0;  // read by all queries together, at most
    for (int64_t i = 0; i < documents; i++) {
        const int64_t length = a->starts[i + 1] - a->starts[i];
        keys += length * smaller(a->window, a->first[i] + length);
        longest = larger(longest, length);
    }
    // Few queries of many documents: a thread reads all groups of a block, which lie side by side.
    const bool together = longest * per_group <= 2 * R && documents >= 4 * threads;
    const int64_t groups = together ? a->groups : 1, parts = a->groups / groups;
#pragma omp parallel num_threads(threads) if (keys * a->groups * a->width > ALONE)
    {
        Scratch scratch(*a, groups, (together ? longest : step) * per_group);
        int64_t document = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t task = 0; task < before.data[documents] * parts; task++) {
            const int64_t tile = task / parts, first = task % parts * groups;
            // Tasks come to a thread in rising order.
            while (before.data[document + 1] <= tile) document++;
            const Document d(*a, document);
            const int64_t from = d.first + (tile - before.data[document]) * step;
            some_queries(d, first, first + groups, from, smaller(from + step, d.first + d.length), scratch);
        }
        if (a->pool) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < documents; i++)
                if (!a->slots || a->slots[i] >= 0) remember(Document(*a, i));
        }
    }
}

REPLAYED(window_attention)
