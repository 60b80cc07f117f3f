// What the forward and the backward pass of attention over a window share: the call, and documents in it.
#pragma once
#include "tile.h"

namespace {

constexpr int64_t BLOCK = 64;  // keys

struct Attention {
    Tensor q, k, v;
    const int64_t *tokens, *starts, *first, *slots;  // first: position of each document's first new token
    void* pool;                                      // [slots, capacity, 2, groups, width], or null: no ring
    int64_t pool_type, capacity;
    void* out;
    float scale;
    const float* sinks;  // [num_sinks, 2, groups, width]: keys and values that every query sees first, or null
    int64_t num_sinks, heads, groups, width, window;
    float* kept;  // [tokens, heads]: logarithms of the sums of e^score, for the backward pass, or null
};

int64_t padded(int64_t n) { return (n + 2 * W - 1) / (2 * W) * 2 * W; }

struct Document {
    const Attention& a;
    int64_t number, slot, begin, length, first;

    Document(const Attention& attention, int64_t index)
        : a(attention), number(index), slot(a.slots ? a.slots[index] : index), begin(a.starts[index]),
          length(a.starts[index + 1] - begin), first(a.first[index]) {}

    int64_t token(int64_t position) const {
        const int64_t n = begin + position - first;
        return a.tokens ? a.tokens[n] : n;
    }
    // The oldest position that can be read.
    int64_t start() const { return a.pool ? larger(0, first - a.capacity) : first; }
    void* ring(int64_t position, int64_t part, int64_t group) const {
        const int64_t place = slot * a.capacity + position % a.capacity;
        return at(a.pool, a.pool_type, ((place * 2 + part) * a.groups + group) * a.width);
    }
    // The key (part 0) or value (part 1) of a position in fp32.
    void read(int64_t position, int64_t part, int64_t group, float* row) const {
        const Tensor& x = part ? a.v : a.k;
        if (position >= first)
            widen_row(at(x.data, x.type, token(position) * x.stride + group * a.width), x.type, a.width, row);
        else if (slot >= 0)
            widen_row(ring(position, part, group), a.pool_type, a.width, row);
        else  // padding remembers zeros
            memset(row, 0, a.width * sizeof(float));
    }
    // Elements of the ring from one position to the next.
    int64_t stride() const { return 2 * a.groups * a.width; }
    // Whether a block's places lie one after another in the ring, in rows of whole tiles.
    bool in_a_row(int64_t block) const {
        return slot >= 0 && block + BLOCK <= first && block % a.capacity + BLOCK <= a.capacity &&
               a.width % (2 * W) == 0;
    }
    // Begin to bring some positions of the ring into the second cache: its rows are too far apart for the processor to
    // see them coming. Inlined, as a compiler may leave out calls of a function that only prefetches.
    __attribute__((always_inline)) void fetch(int64_t from, int64_t to, int64_t part, int64_t group) const {
        to = smaller(to, first);
        if (slot < 0 || from >= to) return;
        const int64_t size = a.pool_type == F32 ? 4 : 2, last = from - from % a.capacity + a.capacity;
        const char* row = (const char*)ring(from, part, group);
        for (int64_t position = from; position < to; position++, row += stride() * size) {
            if (position == last) row = (const char*)ring(position, part, group);
            for (int64_t b = 0; b < a.width * size; b += 64) __builtin_prefetch(row + b, 0, 2);
        }
    }
};

// The places of a block that a query sees: `from .. to`.
struct Span {
    int64_t from, to;
};

}  // namespace
