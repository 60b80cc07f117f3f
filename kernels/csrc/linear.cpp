// out = scale_t * (x W^T) + b for weights in fp32, bf16 or int8 with a scale for 128 inputs.
//
// Weights lie input-major in panels of outputs, [out / panel][in][panel], so that one input channel of a panel is one
// contiguous run: a channel that did not fire is not read. Each output is the sum of two chains of fused multiply-adds,
// one over each half of its inputs in their order (int8: exact integer sums of 128 inputs, scaled and added in order), in
// the product of one row and of many alike. So a row's result depends neither on the rows beside it nor on threads, and
// leaving out zeros changes nothing.
//
// What bounds one row is reading its weights. A thread has two streams of them under way at once, as one is not enough
// for the bandwidth there is: both halves, or, of int8, two groups of 128 inputs.
#include "tile.h"

namespace {

constexpr int64_t UNIT = 64;        // outputs are padded to whole units; a unit is what a thread gets
constexpr int64_t GROUP = 128;      // inputs that share a scale
constexpr int64_t MAX_PANEL = 2048;  // outputs
constexpr int64_t NC = 256;         // outputs unpacked at once for many rows
constexpr int64_t FETCHED = GROUP * 2 * W / NC;  // channels of the next block fetched while a tile is multiplied
constexpr int64_t MAX_ROWS = 256;   // rows multiplied with one unpacked block
constexpr int64_t MAX_SPARSE_ROWS = 8;
constexpr int64_t AHEAD = 2048;     // bytes fetched ahead where no channel is left out

enum Kind { FP32 = 0, HALF = 1, INT8 = 2 };

struct Packed {
    const void* weight;
    const float* scale;  // [in / 128, padded out], int8 only
    int64_t in, out, panel, kind;
};

struct Call {
    const Packed& w;
    const float* x;         // [rows, stride]
    const int16_t* counts;  // [rows, stride], or null: no integer path
    const float* token_scale;
    const float* bias;
    void* out;
    int64_t out_type, rows, stride;
};

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }

// The channels of one row to be read, in order. A group's channels are `index[start[g] .. start[g + 1]]`.
struct Channels {
    int64_t in;
    Buffer<int32_t> index;
    Buffer<float> value;
    Buffer<int64_t> start;
    int64_t groups, end;

    Channels(const float* x, int64_t in, bool all)
        : in(in), index(in), value(in), start(groups_of(in) + 1), groups(groups_of(in)) {
        int64_t n = 0;
        for (int64_t g = 0; g < groups; g++) {
            start.data[g] = n;
            for (int64_t k = g * GROUP; k < smaller(in, (g + 1) * GROUP); k++) {
                index.data[n] = (int32_t)k;
                value.data[n] = x[k];
                n += all || x[k] != 0;
            }
        }
        start.data[groups] = end = n;
    }
    int64_t middle() const { return start.data[(groups + 1) / 2]; }
};

// A run of weights to be added to sums: times one channel's value, or, of two channels, times a pair of counts.
template <class T>
struct Run {
    const T *row, *next;
    vf value;
};

struct Pair {
    const int8_t *row[2], *next[2];
    vi counts;
};

// UNIT outputs from `n` on; fetches as many of what is read next.
template <class T>
void add(float* sums, const Run<T>& run, int64_t n) {
    for (size_t b = 0; b < UNIT * sizeof(T); b += 64) __builtin_prefetch((const char*)(run.next + n) + b);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += W) store(sums + n + i, fma(load(run.row + n + i), run.value, load(sums + n + i)));
}

// The same for counts, in the order of `interleave`.
void add(int32_t* sums, const Pair& pair, int64_t n) {
    __builtin_prefetch(pair.next[0] + n);
    __builtin_prefetch(pair.next[1] + n);
#pragma GCC unroll 16
    for (int i = 0; i < UNIT; i += 2 * W) {
        vi low, high;
        interleave(pair.row[0] + n + i, pair.row[1] + n + i, &low, &high);
        store_int(sums + n + i, dot_pairs(load_int(sums + n + i), low, pair.counts));
        store_int(sums + n + i + W, dot_pairs(load_int(sums + n + i + W), high, pair.counts));
    }
}

// Channels of a list whose runs begin at `base + channel * stride`.
template <class T>
struct Runs {
    const Channels& list;
    const T* base;
    int64_t stride;

    const T* row(int64_t i) const { return base + (int64_t)list.index.data[smaller(i, list.end - 1)] * stride; }
    // The i-th, and, of counts, the one after it; those from `end` on count zero times.
    auto at(int64_t i, int64_t end, const float*) const {
        const T* next = list.end == list.in ? row(i) + AHEAD / sizeof(T) : row(i + 2);
        return Run<T>{row(i), next, splat(list.value.data[i])};
    }
    auto at(int64_t i, int64_t end, const int32_t*) const {
        const float second = i + 1 < end ? list.value.data[i + 1] : 0.0f;
        const uint32_t low = (uint16_t)(int16_t)list.value.data[i], high = (uint16_t)(int16_t)second;
        return Pair{{row(i), row(i + 1)}, {row(i + 4), row(i + 5)}, splat_int((int32_t)(low | high << 16))};
    }
};

// sums[0] += channels begin[0] .. end[0], sums[1] += channels begin[1] .. end[1], one of each in turn.
template <class T, class Acc>
void stream(const Runs<T>& runs, const int64_t* begin, const int64_t* end, Acc (*sums)[MAX_PANEL], int64_t width) {
    constexpr int64_t step = (Acc)0.5f == 0 ? 2 : 1;
    int64_t i = begin[0], j = begin[1];
    for (; i < end[0] && j < end[1]; i += step, j += step) {
        const auto one = runs.at(i, end[0], sums[0]), other = runs.at(j, end[1], sums[1]);
        for (int64_t n = 0; n < width; n += UNIT) {
            add(sums[0], one, n);
            add(sums[1], other, n);
        }
    }
    for (; i < end[0]; i += step) {
        const auto one = runs.at(i, end[0], sums[0]);
        for (int64_t n = 0; n < width; n += UNIT) add(sums[0], one, n);
    }
    for (; j < end[1]; j += step) {
        const auto other = runs.at(j, end[1], sums[1]);
        for (int64_t n = 0; n < width; n += UNIT) add(sums[1], other, n);
    }
}

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

// One row's sums over both halves of its inputs, for weights without scales.
template <class T>
void one_row(const Runs<T>& runs, int64_t width, float (*total)[MAX_PANEL]) {
    const int64_t begin[] = {0, runs.list.middle()}, end[] = {runs.list.middle(), runs.list.end};
    stream(runs, begin, end, total, width);
}

// The same for int8, all in the first sums: groups in order, two at a time. Acc: int32 for counts, else float.
template <class Acc>
void one_row(const Runs<int8_t>& runs, const float* scale, int64_t scales, int64_t width, float (*total)[MAX_PANEL]) {
    alignas(64) Acc sums[2][MAX_PANEL];
    const int64_t *start = runs.list.start.data, groups = runs.list.groups;
    for (int64_t g = 0; g < groups; g += 2) {
        const int64_t last = smaller(g + 2, groups);
        const int64_t begin[] = {start[g], start[g + 1]}, end[] = {start[g + 1], start[last]};
        for (int part = 0; part < 2; part++) memset(sums[part], 0, width * sizeof(Acc));
        stream(runs, begin, end, sums, width);
        for (int part = 0; part < 2; part++)
            if (begin[part] < end[part]) add_scaled(total[0], sums[part], scale + (g + part) * scales, width);
    }
}

// Outputs `column .. column + width` of a row from the sums over both halves of its inputs.
void finish(const Call& call, int64_t row, int64_t column, int64_t width, const float* one, const float* other) {
    const float scale = call.token_scale ? call.token_scale[row] : 1.0f;
    const float* bias = call.bias ? call.bias + column : nullptr;
    width = smaller(width, call.w.out - column);
    if (call.out_type == F32) {
        float* out = (float*)call.out + row * call.w.out + column;
        for (int64_t n = 0; n < width; n++) out[n] = (one[n] + other[n]) * scale + (bias ? bias[n] : 0.0f);
    } else {
        bf16* out = (bf16*)call.out + row * call.w.out + column;
        for (int64_t n = 0; n < width; n++) out[n] = narrow((one[n] + other[n]) * scale + (bias ? bias[n] : 0.0f));
    }
}

void rows_one_by_one(const Call& call, Channels* const* lists, const bool* whole, int64_t column, int64_t width,
                     int64_t panel_start, int64_t stride) {
    const Packed& w = call.w;
    const int64_t offset = panel_start * w.in + (column - panel_start);
    const float* scale = w.scale + column;
    for (int64_t row = 0; row < call.rows; row++) {
        alignas(64) float total[2][MAX_PANEL];
        for (int part = 0; part < 2; part++) memset(total[part], 0, width * sizeof(float));
        const Channels& list = *lists[row];
        if (w.kind == FP32) one_row(Runs<float>{list, (const float*)w.weight + offset, stride}, width, total);
        if (w.kind == HALF) one_row(Runs<bf16>{list, (const bf16*)w.weight + offset, stride}, width, total);
        const Runs<int8_t> codes{list, (const int8_t*)w.weight + offset, stride};
        if (w.kind == INT8 && whole[row]) one_row<int32_t>(codes, scale, padded(w.out, UNIT), width, total);
        if (w.kind == INT8 && !whole[row]) one_row<float>(codes, scale, padded(w.out, UNIT), width, total);
        finish(call, row, column, width, total[0], total[1]);
    }
}

// Weights as the register tiles read them: [width / 2W][depth][2W].
template <class T>
void unpack(const T* base, int64_t stride, int64_t depth, int64_t width, float* tiles) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t n = 0; n < width; n += W)
            store(tiles + (n / (2 * W) * depth + k) * 2 * W + n % (2 * W), load(base + k * stride + n));
}

// The same in pairs of inputs: [width / 2W][depth / 2][2W pairs], in the order of `interleave`.
void unpack_pairs(const int8_t* base, int64_t stride, int64_t depth, int64_t width, int32_t* tiles) {
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t p = 0; p < pairs; p++) {
        const int8_t* a = base + 2 * p * stride;
        // Past an odd end the second row is the first one again; its count is zero.
        const int8_t* b = 2 * p + 1 < depth ? a + stride : a;
        for (int64_t n = 0; n < width; n += 2 * W) {
            vi low, high;
            interleave(a + n, b + n, &low, &high);
            int32_t* tile = tiles + (n / (2 * W) * pairs + p) * 2 * W;
            store_int(tile, low);
            store_int(tile + W, high);
        }
    }
}

template <int M>
void tile_counts(const int32_t* tile, const int16_t* counts, int64_t in, int64_t depth, const float* scale,
                 float* total, int64_t stride) {
    vi a[M][2] = {};
    for (int64_t p = 0; p < (depth + 1) / 2; p++) {
        vi b0 = load_int(tile + p * 2 * W), b1 = load_int(tile + p * 2 * W + W);
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            memcpy(&pair, counts + m * in + 2 * p, 4);
            vi c = splat_int(pair);
            a[m][0] = dot_pairs(a[m][0], b0, c);
            a[m][1] = dot_pairs(a[m][1], b1, c);
        }
    }
    for (int m = 0; m < M; m++) {
        alignas(64) int32_t sums[2 * W];
        store_int(sums, a[m][0]);
        store_int(sums + W, a[m][1]);
        add_scaled(total + m * stride, sums, scale, 2 * W);
    }
}

template <int M>
void rows_of_tile(const Call& call, const void* tile, int64_t row, int64_t k, int64_t depth, const float* scale,
                  float* total) {
    if (call.counts)
        tile_counts<M>((const int32_t*)tile, call.counts + row * call.stride + k, call.stride, depth, scale, total, NC);
    else
        tile_float<M>((const float*)tile, call.x + row * call.stride + k, call.stride, depth, scale, total, NC);
}

void rows_of_tile(const Call& call, int64_t rows, const void* tile, int64_t row, int64_t k, int64_t depth,
                  const float* scale, float* total) {
    switch (rows) {
        case 1: return rows_of_tile<1>(call, tile, row, k, depth, scale, total);
        case 2: return rows_of_tile<2>(call, tile, row, k, depth, scale, total);
        case 3: return rows_of_tile<3>(call, tile, row, k, depth, scale, total);
        case 4: return rows_of_tile<4>(call, tile, row, k, depth, scale, total);
        case 5: return rows_of_tile<5>(call, tile, row, k, depth, scale, total);
        default: return rows_of_tile<R>(call, tile, row, k, depth, scale, total);
    }
}

// Fetch channels `k .. k + FETCHED` of a block of weights.
void fetch(const Packed& w, const char* block, int64_t k, int64_t depth, int64_t width, int64_t stride) {
    const int64_t size = w.kind == FP32 ? 4 : w.kind == HALF ? 2 : 1;
    for (int64_t i = k; i < smaller(k + FETCHED, depth); i++)
        for (int64_t b = 0; b < width * size; b += 64) __builtin_prefetch(block + i * stride * size + b);
}

// `width` outputs (at most NC) of rows `first .. first + rows`; total [2, rows, NC].
void many_rows(const Call& call, int64_t first, int64_t rows, int64_t column, int64_t width, int64_t panel_start,
               int64_t stride, float* tiles, float* total) {
    const Packed& w = call.w;
    const int64_t half = (w.kind == INT8 ? groups_of(w.in) : (groups_of(w.in) + 1) / 2) * GROUP;
    const int64_t size = w.kind == FP32 ? 4 : w.kind == HALF ? 2 : 1;
    memset(total, 0, 2 * rows * NC * sizeof(float));
    for (int64_t k = 0; k < w.in; k += GROUP) {
        const int64_t depth = smaller(GROUP, w.in - k), next = smaller(GROUP, w.in - k - depth);
        const char* block = (const char*)w.weight + (panel_start * w.in + k * stride + (column - panel_start)) * size;
        if (w.kind == FP32) unpack((const float*)block, stride, depth, width, tiles);
        if (w.kind == HALF) unpack((const bf16*)block, stride, depth, width, tiles);
        if (w.kind == INT8 && call.counts) unpack_pairs((const int8_t*)block, stride, depth, width, (int32_t*)tiles);
        if (w.kind == INT8 && !call.counts) unpack((const int8_t*)block, stride, depth, width, tiles);
        const int64_t tile_size = call.counts ? (depth + 1) / 2 * 2 * W : depth * 2 * W;
        float* sums = total + (k < half ? 0 : rows * NC);
        for (int64_t n = 0; n < width; n += 2 * W) {
            const float* scale = w.kind == INT8 ? w.scale + k / GROUP * padded(w.out, UNIT) + column + n : nullptr;
            fetch(w, block + depth * stride * size, n / (2 * W) * FETCHED, next, width, stride);
            for (int64_t row = 0; row < rows; row += R)
                rows_of_tile(call, smaller(R, rows - row), tiles + n / (2 * W) * tile_size, first + row, k, depth,
                             scale, sums + row * NC + n);
        }
    }
    for (int64_t row = 0; row < rows; row++)
        finish(call, first + row, column, width, total + row * NC, total + (rows + row) * NC);
}

// Calls work(column, width, panel start, panel width) for each panel's part of this thread's share of the outputs.
template <class Work>
void share(const Packed& w, int64_t thread, int64_t threads, int64_t widest, Work work) {
    const int64_t units = padded(w.out, UNIT) / UNIT;
    const int64_t end = units * (thread + 1) / threads * UNIT;
    for (int64_t column = units * thread / threads * UNIT; column < end;) {
        const int64_t start = column / w.panel * w.panel;
        const int64_t stride = smaller(w.panel, units * UNIT - start);
        const int64_t width = smaller(smaller(end, start + stride) - column, widest);
        work(column, width, start, stride);
        column += width;
    }
}

void widen_counts(const int16_t* x, int64_t in, float* wide) {
    for (int64_t k = 0; k < in; k++) wide[k] = (float)x[k];
}

// Whether every value is a whole number that fits in 16 bits; they as such numbers.
bool to_counts(const float* x, int64_t in, int16_t* counts) {
    int fits = 1;
    for (int64_t k = 0; k < in; k++) {
        float bounded = x[k] >= -32767.0f && x[k] <= 32767.0f ? x[k] : 0.0f;
        counts[k] = (int16_t)bounded;
        fits &= (float)counts[k] == x[k];
    }
    if (in % 2) counts[in] = 0;  // the last pair's second half
    return fits;
}

struct Lists {
    Buffer<Channels*> row;
    int64_t rows = 0, active = 0;

    explicit Lists(int64_t most) : row(most) {}
    ~Lists() {
        for (int64_t i = 0; i < rows; i++) delete row.data[i];
    }
    void add(const float* x, int64_t in, bool all) {
        row.data[rows] = new Channels(x, in, all);
        active += row.data[rows++]->end;
    }
};

}  // namespace

// x [rows, in] of x_type; token_scale [rows] or null; bias [out] or null; out [rows, out] of out_type (fp32 or bf16).
// counts: x are spike counts: zeros are skipped where that is faster, and int8 weights are multiplied in integers.
// break_even: the most rows' worth of weights (rows times the part of the channels that fired) to read row by row.
EXPORT(linear)(const Packed* w, const void* x, int64_t x_type, const float* token_scale, const float* bias, void* out,
               int64_t out_type, int64_t rows, int64_t counts, double break_even, int64_t threads) {
    if (rows == 0 || w->out == 0) return;
    const int64_t in = w->in, stride = padded(in, W);
    Buffer<float> wide(rows * stride);
    Buffer<bool> whole(rows);
    const bool integers = counts && w->kind == INT8;
    Buffer<int16_t> small(integers ? rows * stride : 0);
#pragma omp parallel for num_threads(threads) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        float* to = wide.data + row * stride;
        if (x_type == I16)
            widen_counts((const int16_t*)x + row * in, in, to);
        else
            widen_row(at(x, x_type, row * in), x_type, in, to);
        whole.data[row] = integers && to_counts(to, in, small.data + row * stride);
    }
    bool all_whole = integers;
    for (int64_t row = 0; row < rows; row++) all_whole &= whole.data[row];
    Call call{*w, wide.data, all_whole ? small.data : nullptr, token_scale, bias, out, out_type, rows, stride};
    // Rows whose counts do not fit go alone, so that they change nothing for the others.
    const bool apart = rows == 1 || (integers && !all_whole);
    Lists lists(rows);
    if (apart || (counts && rows <= MAX_SPARSE_ROWS))
        for (int64_t row = 0; row < rows; row++) lists.add(wide.data + row * stride, in, !counts);
    const bool by_row = apart || (lists.rows && (double)lists.active <= break_even * (double)in);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        if (by_row) {
            share(*w, thread, threads, MAX_PANEL, [&](int64_t column, int64_t width, int64_t start, int64_t stride) {
                rows_one_by_one(call, lists.row.data, whole.data, column, width, start, stride);
            });
        } else {
            Buffer<float> tiles(GROUP * NC), total(2 * smaller(rows, MAX_ROWS) * NC);
            share(*w, thread, threads, NC, [&](int64_t column, int64_t width, int64_t start, int64_t stride) {
                for (int64_t row = 0; row < rows; row += MAX_ROWS)
                    many_rows(call, row, smaller(MAX_ROWS, rows - row), column, width, start, stride, tiles.data,
                              total.data);
            });
        }
    }
}
