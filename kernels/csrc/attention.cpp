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

// Scores of one row become weights relative to the new maximum; gives what the old sums must be multiplied by.
float soften(float* scores, const Span& seen, float* maximum, float* total) {
    const vi lane = load_int((const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
    const auto visible = [&](int64_t j) {
        const vi place = lane + (int32_t)j;
        return (place >= splat_int((int32_t)seen.from)) & (place < splat_int((int32_t)seen.to));
    };
    const int64_t first = larger(seen.from, 0) / W * W;
    vf tops = splat(*maximum);
    for (int64_t j = first; j < seen.to; j += W) {
        const vf score = load(scores + j);
        tops = visible(j) & ((score > tops) | (score != score)) ? score : tops;
    }
    const float top = largest(tops);
    vf sums = {};
    for (int64_t j = first; j < seen.to; j += W) {
        vf weight = exponential(load(scores + j) - splat(top));
        weight = visible(j) ? weight : vf{};
        store(scores + j, weight);
        sums += weight;
    }
    const float keep = top == *maximum ? 1.0f : exponential(splat(*maximum - top))[0];
    *total = *total * keep + sum(sums);
    *maximum = top;
    return keep;
}

struct Scratch {
    Buffer<float> queries, scores, sums, keys, values, rows, maximum, total;
    explicit Scratch(const Attention& a, int64_t rows)
        : queries(rows * a.width + W), scores(rows * BLOCK), sums(rows * padded(a.width)), keys(a.width * BLOCK),
          values(padded(a.width) * BLOCK), rows(W * padded(a.width)), maximum(rows), total(rows) {}
};

void begin_queries(const Document& d, int64_t group, int64_t from, int64_t to, Scratch& s) {
    const Attention& a = d.a;
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t element = d.token(from + row / per_group) * a.q.stride +
                                (group * per_group + row % per_group) * a.width;
        widen_row(at(a.q.data, a.q.type, element), a.q.type, a.width, s.rows.data);
        for (int64_t i = 0; i < a.width; i++) s.queries.data[row * a.width + i] = s.rows.data[i] * a.scale;
        s.maximum.data[row] = NOTHING;
        s.total.data[row] = 0;
    }
    memset(s.sums.data, 0, rows * padded(a.width) * sizeof(float));
}

void end_queries(const Document& d, int64_t group, int64_t from, int64_t to, const Scratch& s) {
    const Attention& a = d.a;
    const int64_t per_group = a.heads / a.groups;
    for (int64_t row = 0; row < (to - from) * per_group; row++) {
        const int64_t head = group * per_group + row % per_group;
        void* out = at(a.out, a.q.type, (d.token(from + row / per_group) * a.heads + head) * a.width);
        const float* sums = s.sums.data + row * padded(a.width);
        if (a.kept)
            a.kept[d.token(from + row / per_group) * a.heads + head] = s.maximum.data[row] + logf(s.total.data[row]);
        for (int64_t i = 0; i < a.width; i++) {
            const float x = sums[i] / s.total.data[row];
            if (a.q.type == F32)
                ((float*)out)[i] = x;
            else
                ((bf16*)out)[i] = narrow(x);
        }
    }
}

// sums += weights * values for `rows` rows and the places of a block that all of them see.
template <class T>
void add_values(const Attention& a, int64_t row, int64_t rows, const Span& seen, const Values<T>& values, Scratch& s) {
    const int64_t wide = padded(a.width);
    for (int64_t i = 0; i < wide && seen.from < seen.to; i += 2 * W)
        tiles_of(rows, values.base + i * values.column + seen.from * values.next, values.next,
                 s.scores.data + row * BLOCK + seen.from, BLOCK, 1, seen.to - seen.from, s.sums.data + row * wide + i,
                 wide);
}

// The same for all rows of the queries at `from .. to`, several at once. What a query does not see is not multiplied,
// as zero times infinity is not zero: the first and last places that some of them see are taken one query at a time.
template <class T, class Seen>
void add_values(const Attention& a, int64_t from, int64_t to, const Values<T>& values, Scratch& s, Seen seen) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0, count; row < rows; row += count) {
        count = rows_of_tile(rows - row);
        const auto span = [&](int64_t n) { return seen(from + (row + n) / per_group); };
        // Spans only move forward from one query to the next.
        const int64_t low = span(count - 1).from, high = larger(low, span(0).to);
        for (int64_t n = 0; n < count; n++)
            add_values(a, row + n, 1, Span{span(n).from, smaller(low, span(n).to)}, values, s);
        add_values(a, row, count, Span{low, high}, values, s);
        for (int64_t n = 0; n < count; n++)
            add_values(a, row + n, 1, Span{larger(high, span(n).from), span(n).to}, values, s);
    }
}

// Let the queries at `from .. to` attend to a block whose keys are in `s`, of which the one at `position` sees
// `seen(position)`. `fetch(j)` is called on the way, for every tile of places.
template <class T, class Seen, class Fetch>
void attend(const Attention& a, int64_t from, int64_t to, const Values<T>& values, Scratch& s, Seen seen, Fetch fetch) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group, wide = padded(a.width);
    memset(s.scores.data, 0, rows * BLOCK * sizeof(float));
    for (int64_t j = 0; j < BLOCK; j += 2 * W) {
        fetch(j);
        tiles_float(rows, s.keys.data + j * a.width, s.queries.data, a.width, a.width, s.scores.data + j, BLOCK);
    }
    for (int64_t row = 0; row < rows; row++) {
        const float keep = soften(s.scores.data + row * BLOCK, seen(from + row / per_group), s.maximum.data + row,
                                  s.total.data + row);
        for (int64_t i = 0; i < wide && keep != 1.0f; i += W)
            store(s.sums.data + row * wide + i, load(s.sums.data + row * wide + i) * splat(keep));
    }
    add_values(a, from, to, values, s, seen);
}

// Let few queries attend to a block where it lies, whole, in the ring. The next one is fetched on the way, piece by piece,
// as the processor stops where too much is under way.
template <class T, class Seen>
void attend_in_ring(const Document& d, int64_t group, int64_t from, int64_t to, int64_t block, Scratch& s, Seen seen) {
    const Attention& a = d.a;
    const int64_t next = block + BLOCK;
    for (int64_t j = 0; j < BLOCK; j += W) {
        d.fetch(next + j, next + j + W, 0, group);
        put_keys((const T*)d.ring(block + j, 0, group), d.stride(), a.width,
                 s.keys.data + j / (2 * W) * a.width * 2 * W + j % (2 * W));
    }
    attend(a, from, to, Values<T>{(const T*)d.ring(block, 1, group), d.stride(), 1}, s, seen,
           [&](int64_t j) __attribute__((always_inline)) { d.fetch(next + j, next + j + 2 * W, 1, group); });
}

// The queries at positions `from .. to` for the heads of one group.
void some_queries(const Document& d, int64_t group, int64_t from, int64_t to, Scratch& s) {
    const Attention& a = d.a;
    begin_queries(d, group, from, to, s);
    const Values<float> copied{s.values.data, 2 * W, BLOCK};
    const auto nothing = [](int64_t) {};
    for (int64_t first = 0; first < a.num_sinks; first += BLOCK) {
        const int64_t count = smaller(BLOCK, a.num_sinks - first);
        read_block(a, 0, count, s.keys.data, s.values.data, s.rows.data, [&](int64_t j, int64_t part, float* row) {
            memcpy(row, a.sinks + (((first + j) * 2 + part) * a.groups + group) * a.width, a.width * sizeof(float));
        });
        attend(a, from, to, copied, s, [&](int64_t) { return Span{0, count}; }, nothing);
    }
    const int64_t low = larger(oldest(a, from), d.start());
    const bool few = (to - from) * (a.heads / a.groups) <= 2 * R;
    for (int64_t block = low / BLOCK * BLOCK; block < to; block += BLOCK) {
        const auto seen = [&](int64_t position) {
            return Span{larger(larger(oldest(a, position), d.start()) - block, 0), smaller(position + 1 - block, BLOCK)};
        };
        if (few && low <= block && d.in_a_row(block)) {
            if (a.pool_type == F32)
                attend_in_ring<float>(d, group, from, to, block, s, seen);
            else
                attend_in_ring<bf16>(d, group, from, to, block, s, seen);
            continue;
        }
        read_block(a, larger(0, low - block), smaller(BLOCK, to - block), s.keys.data, s.values.data, s.rows.data,
                   [&](int64_t j, int64_t part, float* row) {
                       d.fetch(block + j + BLOCK, block + j + BLOCK + 1, part, group);
                       d.read(block + j, part, group, row);
                   });
        attend(a, from, to, copied, s, seen, nothing);
    }
    end_queries(d, group, from, to, s);
}

// Store a document's last `capacity` keys and values.
void remember(const Document& d) {
    const Attention& a = d.a;
    Buffer<float> row(a.width + W);
    for (int64_t p = larger(d.first, d.first + d.length - a.capacity); p < d.first + d.length; p++)
        for (int64_t part = 0; part < 2; part++)
            for (int64_t group = 0; group < a.groups; group++) {
                d.read(p, part, group, row.data);
                void* place = d.ring(p, part, group);
                for (int64_t i = 0; i < a.width; i++)
                    if (a.pool_type == F32)
                        ((float*)place)[i] = row.data[i];
                    else
                        ((bf16*)place)[i] = narrow(row.data[i]);
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
    int64_t keys = 0;  // read by all queries together, at most
    for (int64_t i = 0; i < documents; i++) {
        const int64_t length = a->starts[i + 1] - a->starts[i];
        keys += length * smaller(a->window, a->first[i] + length);
    }
#pragma omp parallel num_threads(threads) if (keys * a->groups * a->width > ALONE)
    {
        Scratch scratch(*a, step * per_group);
        int64_t document = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t task = 0; task < before.data[documents] * a->groups; task++) {
            const int64_t tile = task / a->groups;
            // Tasks come to a thread in rising order.
            while (before.data[document + 1] <= tile) document++;
            const Document d(*a, document);
            const int64_t from = d.first + (tile - before.data[document]) * step;
            some_queries(d, task % a->groups, from, smaller(from + step, d.first + d.length), scratch);
        }
        if (a->pool) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < documents; i++)
                if (!a->slots || a->slots[i] >= 0) remember(Document(*a, i));
        }
    }
}
