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

// W rows of `width` floats, one after another, as columns of a tile of keys.
void put_keys(const float* rows, int64_t width, float* tile) {
    const int64_t wide = padded(width);
    for (int64_t i = 0; i < width; i += W) {
        vf block[W];
        for (int64_t j = 0; j < W; j++) block[j] = load(rows + j * wide + i);
        transpose(block);
        for (int64_t j = 0; j < smaller(W, width - i); j++) store(tile + (i + j) * 2 * W, block[j]);
    }
}

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
        put_keys(rows, width, keys + first / (2 * W) * width * 2 * W + first % (2 * W));
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
    float top = tops[0];
    for (int i = 1; i < W; i++) top = tops[i] > top || tops[i] != tops[i] ? tops[i] : top;
    vf sums = {};
    for (int64_t j = first; j < seen.to; j += W) {
        vf weight = exponential(load(scores + j) - splat(top));
        weight = visible(j) ? weight : vf{};
        store(scores + j, weight);
        sums += weight;
    }
    const float keep = exponential(splat(*maximum - top))[0];
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
void add_values(const Attention& a, int64_t row, int64_t rows, const Span& seen, Scratch& s) {
    const int64_t wide = padded(a.width);
    for (int64_t i = 0; i < wide && seen.from < seen.to; i += 2 * W)
        tiles_float(rows, s.values.data + i * BLOCK + seen.from * 2 * W, s.scores.data + row * BLOCK + seen.from, BLOCK,
                    seen.to - seen.from, s.sums.data + row * wide + i, wide);
}

// The same for all rows of the queries at `from .. to`, several at once. What a query does not see is not multiplied,
// as zero times infinity is not zero: the first and last places that some of them see are taken one query at a time.
template <class Seen>
void add_values(const Attention& a, int64_t from, int64_t to, Scratch& s, Seen seen) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group;
    for (int64_t row = 0; row < rows; row += R) {
        const int64_t count = smaller(R, rows - row);
        const auto span = [&](int64_t n) { return seen(from + (row + n) / per_group); };
        // Spans only move forward from one query to the next.
        const int64_t low = span(count - 1).from, high = larger(low, span(0).to);
        for (int64_t n = 0; n < count; n++) add_values(a, row + n, 1, {span(n).from, smaller(low, span(n).to)}, s);
        add_values(a, row, count, {low, high}, s);
        for (int64_t n = 0; n < count; n++) add_values(a, row + n, 1, {larger(high, span(n).from), span(n).to}, s);
    }
}

// Let the queries at `from .. to` attend to the block in `s`, of which the one at `position` sees `seen(position)`.
template <class Seen>
void attend(const Attention& a, int64_t from, int64_t to, Scratch& s, Seen seen) {
    const int64_t per_group = a.heads / a.groups, rows = (to - from) * per_group, wide = padded(a.width);
    memset(s.scores.data, 0, rows * BLOCK * sizeof(float));
    for (int64_t j = 0; j < BLOCK; j += 2 * W)
        tiles_float(rows, s.keys.data + j * a.width, s.queries.data, a.width, a.width, s.scores.data + j, BLOCK);
    for (int64_t row = 0; row < rows; row++) {
        const float keep = soften(s.scores.data + row * BLOCK, seen(from + row / per_group), s.maximum.data + row,
                                  s.total.data + row);
        for (int64_t i = 0; i < wide; i += W)
            store(s.sums.data + row * wide + i, load(s.sums.data + row * wide + i) * splat(keep));
    }
    add_values(a, from, to, s, seen);
}

// The queries at positions `from .. to` for the heads of one group.
void some_queries(const Document& d, int64_t group, int64_t from, int64_t to, Scratch& s) {
    const Attention& a = d.a;
    begin_queries(d, group, from, to, s);
    for (int64_t first = 0; first < a.num_sinks; first += BLOCK) {
        const int64_t count = smaller(BLOCK, a.num_sinks - first);
        read_block(a, 0, count, s.keys.data, s.values.data, s.rows.data, [&](int64_t j, int64_t part, float* row) {
            memcpy(row, a.sinks + (((first + j) * 2 + part) * a.groups + group) * a.width, a.width * sizeof(float));
        });
        attend(a, from, to, s, [&](int64_t) { return Span{0, count}; });
    }
    const int64_t low = larger(oldest(a, from), d.start());
    for (int64_t block = low / BLOCK * BLOCK; block < to; block += BLOCK) {
        read_block(a, larger(0, low - block), smaller(BLOCK, to - block), s.keys.data, s.values.data, s.rows.data,
                   [&](int64_t j, int64_t part, float* row) {
                       d.fetch(block + j + BLOCK, part, group);
                       d.read(block + j, part, group, row);
                   });
        attend(a, from, to, s, [&](int64_t position) {
            return Span{larger(larger(oldest(a, position), d.start()) - block, 0), smaller(position + 1 - block, BLOCK)};
        });
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
