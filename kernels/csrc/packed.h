// Packed weights, a product that is asked for, and what each thread of it computes.
#pragma once
#include "tile.h"

namespace {

constexpr int64_t UNIT = 64;         // outputs are padded to whole units; a unit is what a thread gets
constexpr int64_t GROUP = 128;       // inputs that share a scale
constexpr int64_t MAX_PANEL = 2560;  // outputs

enum Kind { FP32 = 0, HALF = 1, INT8 = 2 };

struct Packed {
    const void* weight;
    const float* scale;  // [in / 128, padded out], int8 only
    int64_t in, out, panel, kind;
};

struct Call {
    const Packed& w;
    const float* x;         // [rows, stride], unless `pairs` are read
    const int16_t* counts;  // [rows, stride], or null: no integer path
    const int32_t* quads;   // [rows, stride / 4], four counts in bytes, see `quads_of`; or null
    const int32_t* pairs;   // [rows, stride / 2], two inputs in bf16, the first in the upper half; or null
    const float* token_scale;
    const float* bias;
    void* out;
    int64_t out_type, rows, stride;
};

// Outputs `first .. first + width`, and the panel that they are part of.
struct Columns {
    int64_t first, width, panel_start, stride;
};

int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t padded(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
int64_t groups_of(int64_t in) { return ceil_div(in, GROUP); }

// Groups of inputs `first .. last`.
struct Span {
    int64_t first, last;

    bool is_all(int64_t in) const { return last - first == groups_of(in); }
};

// Where the second half of the inputs begins: an output is the sum of two chains, one over each half.
int64_t first_half(int64_t in) { return (groups_of(in) + 1) / 2; }

// Weights of some columns: those of input k lie `k * columns.stride` further on.
template <class T>
const T* weights_of(const Packed& w, const Columns& c) {
    return (const T*)w.weight + c.panel_start * w.in + (c.first - c.panel_start);
}

// total += scale * acc; integers are in the order of `interleave`.
void add_scaled(float* total, const float* acc, const float* scale, int64_t width) {
    for (int64_t n = 0; n < width; n += W) store(total + n, load(total + n) + load(scale + n) * load(acc + n));
}

void add_scaled(float* total, const int32_t* acc, const float* scale, int64_t width) {
    for (int64_t n = 0; n < width; n += 2 * W) {
        vi first, second;
        in_order(load_int(acc + n), load_int(acc + n + W), &first, &second);
        store(total + n, load(total + n) + load(scale + n) * to_float(first));
        store(total + n + W, load(total + n + W) + load(scale + n + W) * to_float(second));
    }
}

// Outputs `column .. column + width` of a row from the sums over both halves of its inputs.
void finish(const Call& call, int64_t row, int64_t column, int64_t width, const float* one, const float* other) {
    const vf scale = splat(call.token_scale ? call.token_scale[row] : 1.0f);
    void* out = at(call.out, call.out_type, row * call.w.out + column);
    width = smaller(width, call.w.out - column);
    for (int64_t n = 0; n < width; n += W) {
        const vf bias = call.bias ? load_part(call.bias + column + n, width - n) : vf{};
        store_part(at(out, call.out_type, n), call.out_type, (load(one + n) + load(other + n)) * scale + bias, width - n);
    }
}

// The outputs of a product in pieces that its threads take one after another, as processors of a shared machine are not
// equally fast. A piece is a whole panel, one run of memory, or the part of it that is computed at once; where these are few
// and not as many for each thread, there is one piece a thread.
struct Pieces {
    const Packed& w;
    int64_t widest, units, parts, count;
    bool by_panel;

    Pieces(const Packed& w, int64_t widest, int64_t threads)
        : w(w), widest(smaller(widest, w.panel)), units(padded(w.out, UNIT) / UNIT), parts(ceil_div(w.panel, this->widest)) {
        count = ceil_div(w.out, w.panel) * parts;
        by_panel = count % threads == 0 || count >= 4 * threads;
        if (!by_panel) count = threads;
    }
    // Calls work(columns) for the columns of pieces that no thread has taken yet, `taken` being how many are.
    template <class Work>
    void take(int64_t* taken, Work work) const {
        for (int64_t i; (i = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED)) < count;) {
            const int64_t panel = i / parts * w.panel, within = i % parts * widest;
            if (by_panel)
                each(panel + within, smaller(panel + smaller(within + widest, w.panel), units * UNIT), work);
            else
                each(units * i / count * UNIT, units * (i + 1) / count * UNIT, work);
        }
    }

   private:
    // Columns `column .. end`, cut at the ends of panels.
    template <class Work>
    void each(int64_t column, int64_t end, Work work) const {
        while (column < end) {
            const int64_t start = column / w.panel * w.panel, stride = smaller(w.panel, units * UNIT - start);
            const int64_t width = smaller(smaller(end, start + stride) - column, widest);
            work(Columns{column, width, start, stride});
            column += width;
        }
    }
};

// What of a product a thread computes: some of its outputs or, of few rows of int8 in one panel, only one half of the inputs
// for some of them, so that channels are read as runs that are twice as long. Of few groups the halves are too uneven.
constexpr int64_t LEAST_GROUPS = 16;

// The inputs that a thread reads, and how many threads read the same.
struct Part {
    Span span;
    int64_t threads;
};

Part part_of(const Packed& w, bool few, int64_t thread, int64_t threads) {
    const int64_t groups = groups_of(w.in), half = first_half(w.in);
    const bool one_panel = w.kind == INT8 && w.panel >= padded(w.out, UNIT);
    if (!few || !one_panel || threads % 2 || groups < LEAST_GROUPS) return {{0, groups}, threads};
    return {thread % 2 ? Span{half, groups} : Span{0, half}, threads / 2};
}

// Sums `[2, rows, padded out]` of a product of which each thread had one half of the inputs.
struct Halves {
    const Call& call;
    int64_t width;
    Buffer<float> sums;

    Halves(const Call& call, bool needed)
        : call(call), width(padded(call.w.out, UNIT)), sums(needed ? 2 * call.rows * width : 0) {}
    float* at(int64_t half, int64_t row) const { return sums.data + (half * call.rows + row) * width; }
    void finish_all(int64_t threads) const {
#pragma omp parallel for num_threads(threads) if (call.rows > 2)
        for (int64_t row = 0; row < call.rows; row++) finish(call, row, 0, width, at(0, row), at(1, row));
    }
};

}  // namespace
