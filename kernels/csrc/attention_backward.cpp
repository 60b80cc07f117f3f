// Gradients of softmax attention over a window: the weights are computed again block by block from the sums that the
// forward pass kept (FlashAttention, arXiv 2205.14135), so that memory and work are linear in the tokens.
//
// A task is one document and the heads of one group, whose keys no other task writes gradients of; blocks come in
// order, so that the bits do not depend on threads.
#include <initializer_list>

#include "attention.h"

namespace {

constexpr int64_t QUERIES = 64;  // queries times heads of a group in a tile

struct Gradients {
    const float* out;    // of the outputs, [tokens, heads, width]
    const float* delta;  // [tokens, heads]: the sums of products of outputs and their gradients
    float *q, *k, *v;    // of every token of a document; q is zero before
    float* sinks;        // [documents, num_sinks, 2, groups, width], or null
};

// Which queries see which places of a block: as positions, the first place being `block`. Sinks are a block so long ago
// that it is before every query, in a window so wide that it is in it.
struct Band {
    int64_t block, window, low, high;  // places `low .. high` hold keys

    Span places(int64_t position) const {
        return {larger(low, position - window + 1 - block), smaller(high, position + 1 - block)};
    }
    // Of the positions `from .. to` those that see any of the places `first .. last`.
    Span queries(int64_t first, int64_t last, int64_t from, int64_t to) const {
        return {larger(from, block + first), smaller(to, block + last - 1 + window)};
    }
};

struct Backward {
    const Attention& a;
    const Gradients& g;
    const Document d;
    const int64_t group, per_group, wide;
    // Of a block: keys row by row, keys and values column by column, and their gradients.
    Buffer<float> keys, key_columns, value_columns, to_keys, to_values, row;
    // Of a tile: scaled queries, gradients of outputs, weights, gradients of scores and of queries.
    Buffer<float> queries, outs, weights, scores, to_queries;

    Backward(const Attention& attention, const Gradients& gradients, int64_t document, int64_t group)
        : a(attention), g(gradients), d(attention, document), group(group), per_group(a.heads / a.groups),
          wide(padded(a.width)), keys(BLOCK * wide), key_columns(BLOCK * a.width), value_columns(BLOCK * a.width),
          to_keys(BLOCK * wide), to_values(BLOCK * wide), row(wide), queries(tile() * wide), outs(tile() * wide),
          weights(tile() * BLOCK), scores(tile() * BLOCK), to_queries(tile() * wide) {
        memset(queries.data, 0, tile() * wide * sizeof(float));
        memset(outs.data, 0, tile() * wide * sizeof(float));
    }

    int64_t tile() const { return larger(1, QUERIES / per_group) * per_group; }
    // Of a row of the tile that begins at position `from`.
    int64_t head(int64_t from, int64_t n) const {
        return d.token(from + n / per_group) * a.heads + group * per_group + n % per_group;
    }

    template <class Read>
    void begin_block(const Band& band, Read read) {
        for (float* rows : {keys.data, to_keys.data, to_values.data}) memset(rows, 0, BLOCK * wide * sizeof(float));
        for (float* columns : {key_columns.data, value_columns.data})
            memset(columns, 0, BLOCK * a.width * sizeof(float));
        for (int64_t j = band.low; j < band.high; j++) {
            read(j, 0, keys.data + j * wide);
            as_column(keys.data + j * wide, key_columns.data, j);
            read(j, 1, row.data);
            as_column(row.data, value_columns.data, j);
        }
    }

    void as_column(const float* from, float* columns, int64_t j) const {
        float* column = columns + j / (2 * W) * a.width * 2 * W + j % (2 * W);
        for (int64_t i = 0; i < a.width; i++) column[i * 2 * W] = from[i];
    }

    void begin_tile(int64_t from, int64_t rows) {
        for (int64_t n = 0; n < rows; n++) {
            const int64_t head_in_row = group * per_group + n % per_group;
            const int64_t element = d.token(from + n / per_group) * a.q.stride + head_in_row * a.width;
            float* query = queries.data + n * wide;
            widen_row(at(a.q.data, a.q.type, element), a.q.type, a.width, query);
            for (int64_t i = 0; i < a.width; i++) query[i] *= a.scale;
            memcpy(outs.data + n * wide, g.out + head(from, n) * a.width, a.width * sizeof(float));
        }
        memset(weights.data, 0, rows * BLOCK * sizeof(float));
        memset(scores.data, 0, rows * BLOCK * sizeof(float));
        memset(to_queries.data, 0, rows * wide * sizeof(float));
    }

    // Scores and the gradients of weights of the tile at `from .. to`.
    void multiply(const Band& band, int64_t from, int64_t to) {
        for (int64_t j = 0; j < BLOCK; j += 2 * W) {
            const Span seen = band.queries(j, j + 2 * W, from, to);
            const int64_t first = (seen.from - from) * per_group, rows = (seen.to - seen.from) * per_group;
            if (rows <= 0) continue;
            tiles_float(rows, key_columns.data + j * a.width, queries.data + first * wide, wide, a.width,
                        weights.data + first * BLOCK + j, BLOCK);
            tiles_float(rows, value_columns.data + j * a.width, outs.data + first * wide, wide, a.width,
                        scores.data + first * BLOCK + j, BLOCK);
        }
    }

    // Scores become weights, and gradients of weights those of scores; zeros where a query does not see.
    void soften(const Span& seen, float total, float delta, float* weight, float* score) const {
        const vi lane = load_int((const int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
        for (int64_t j = 0; j < BLOCK; j += W) {
            const vi place = lane + (int32_t)j;
            const vi visible = (place >= splat_int((int32_t)seen.from)) & (place < splat_int((int32_t)seen.to));
            const vf x = exponential(load(weight + j) - splat(total));
            store(weight + j, visible ? x : vf{});
            store(score + j, visible ? x * (load(score + j) - splat(delta)) : vf{});
        }
    }

    void add_to_keys(const Band& band, int64_t from, int64_t to) {
        for (int64_t j = 0; j < BLOCK; j += R) {
            const int64_t count = smaller(R, BLOCK - j);
            const Span seen = band.queries(j, j + count, from, to);
            const int64_t first = (seen.from - from) * per_group, rows = (seen.to - seen.from) * per_group;
            for (int64_t i = 0; i < wide && rows > 0; i += 2 * W) {
                tiles_of(count, outs.data + first * wide + i, wide, weights.data + first * BLOCK + j, 1, BLOCK, rows,
                         to_values.data + j * wide + i, wide);
                tiles_of(count, queries.data + first * wide + i, wide, scores.data + first * BLOCK + j, 1, BLOCK, rows,
                         to_keys.data + j * wide + i, wide);
            }
        }
    }

    void add_to_queries(const Band& band, int64_t from, int64_t rows) {
        for (int64_t n = 0; n < rows; n += R) {
            const int64_t count = smaller(R, rows - n);
            const int64_t first = band.places(from + n / per_group).from;
            const int64_t last = band.places(from + (n + count - 1) / per_group).to;
            for (int64_t i = 0; i < wide && first < last; i += 2 * W)
                tiles_of(count, keys.data + first * wide + i, wide, scores.data + n * BLOCK + first, BLOCK, 1,
                         last - first, to_queries.data + n * wide + i, wide);
        }
        for (int64_t n = 0; n < rows; n++) {
            float* total = g.q + head(from, n) * a.width;
            for (int64_t i = 0; i < a.width; i++) total[i] += a.scale * to_queries.data[n * wide + i];
        }
    }

    // The block in hand and every query that sees any of it; `write(place, key, value)` takes the gradients.
    template <class Write>
    void run(const Band& band, Write write) {
        const Span all = band.queries(band.low, band.high, d.first, d.first + d.length);
        for (int64_t from = all.from; from < all.to; from += tile() / per_group) {
            const int64_t to = smaller(from + tile() / per_group, all.to), rows = (to - from) * per_group;
            begin_tile(from, rows);
            multiply(band, from, to);
            for (int64_t n = 0; n < rows; n++)
                soften(band.places(from + n / per_group), a.kept[head(from, n)], g.delta[head(from, n)],
                       weights.data + n * BLOCK, scores.data + n * BLOCK);
            add_to_keys(band, from, to);
            add_to_queries(band, from, rows);
        }
        for (int64_t j = band.low; j < band.high; j++) write(j, to_keys.data + j * wide, to_values.data + j * wide);
    }

    void sinks(int64_t first) {
        constexpr int64_t ago = int64_t(1) << 40;
        const Band band{-ago, 2 * ago, 0, smaller(BLOCK, a.num_sinks - first)};
        const auto place = [&](int64_t j, int64_t part) {
            return (((first + j) * 2 + part) * a.groups + group) * a.width;
        };
        begin_block(band, [&](int64_t j, int64_t part, float* to) {
            memcpy(to, a.sinks + place(j, part), a.width * sizeof(float));
        });
        float* mine = g.sinks + d.number * a.num_sinks * 2 * a.groups * a.width;
        run(band, [&](int64_t j, const float* key, const float* value) {
            memcpy(mine + place(j, 0), key, a.width * sizeof(float));
            memcpy(mine + place(j, 1), value, a.width * sizeof(float));
        });
    }

    void block(int64_t block) {
        const Band band{block, a.window, larger(0, d.first - block), smaller(BLOCK, d.first + d.length - block)};
        begin_block(band, [&](int64_t j, int64_t part, float* to) { d.read(block + j, part, group, to); });
        run(band, [&](int64_t j, const float* key, const float* value) {
            const int64_t place = (d.token(block + j) * a.groups + group) * a.width;
            memcpy(g.k + place, key, a.width * sizeof(float));
            memcpy(g.v + place, value, a.width * sizeof(float));
        });
    }

    void run() {
        for (int64_t first = 0; first < a.num_sinks; first += BLOCK) sinks(first);
        for (int64_t first = d.first / BLOCK * BLOCK; first < d.first + d.length; first += BLOCK) block(first);
    }
};

}  // namespace

// Gradients of a call without rings whose `kept` sums are at hand; writes those of every token of a document.
EXPORT(window_attention_backward)(const Attention* a, const Gradients* g, int64_t documents, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < documents * a->groups; task++)
        Backward(*a, *g, task / a->groups, task % a->groups).run();
}

REPLAYED(window_attention_backward)
