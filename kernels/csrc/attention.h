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

// A row of n elements as floats, followed by zeros up to the next multiple of W, or, of bf16, as they are.
void copy_row(const void* x, int64_t type, int64_t n, float* row) { widen_row(x, type, n, row); }
void copy_row(const void* x, int64_t, int64_t n, bf16* row) { memcpy(row, x, n * sizeof *row); }

// Begin to bring rows that lie `stride` elements apart into the second cache: they are too far apart for the processor to
// see them coming. Inlined, as a compiler may leave out calls of a function that only prefetches.
__attribute__((always_inline)) inline void fetch_rows(const void* rows, int64_t count, int64_t type, int64_t stride,
                                                      int64_t width) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i += type == F32 ? 16 : 32)
            __builtin_prefetch(at((const char*)rows, type, row * stride + i), 0, 2);
}

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
    // The key (part 0) or value (part 1) of a position.
    template <class T>
    void read(int64_t position, int64_t part, int64_t group, T* row) const {
        const Tensor& x = part ? a.v : a.k;
        if (position >= first)
            copy_row(at(x.data, x.type, token(position) * x.stride + group * a.width), x.type, a.width, row);
        else if (slot >= 0)
            copy_row(ring(position, part, group), a.pool_type, a.width, row);
        else  // padding remembers zeros
            memset(row, 0, a.width * sizeof *row);
    }
    // Elements of the ring from one position to the next.
    int64_t stride() const { return 2 * a.groups * a.width; }
    // Whether a block's places lie one after another in the ring, in rows of whole tiles.
    bool in_a_row(int64_t block) const {
        return slot >= 0 && block + BLOCK <= first && block % a.capacity + BLOCK <= a.capacity &&
               a.width % (2 * W) == 0;
    }
    // Begin to bring the key or value of a position in the ring into the second cache.
    __attribute__((always_inline)) void fetch(int64_t position, int64_t part, int64_t group) const {
        if (slot >= 0 && position < first) fetch_rows(ring(position, part, group), 1, a.pool_type, 0, a.width);
    }
};

// The places of a block that a query sees: `from .. to`.
struct Span {
    int64_t from, to;
};

}  // namespace
