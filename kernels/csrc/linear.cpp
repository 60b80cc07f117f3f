// out = scale_t * (x W^T) + b for weights in fp32, bf16 or int8 with a scale for 128 inputs.
//
// Weights lie input-major in panels of outputs, [out / panel][in][panel], so that one input channel of a panel is one
// contiguous run: a channel that did not fire is not read. Each output is the sum of two chains, one over each half of its
// inputs in their order: of fused multiply-adds or, for int8, of sums of 128 inputs (exact integers for counts), scaled. They
// are the same in the product of one row and of many. So a row's result depends neither on the rows beside it nor on
// threads, and leaving out zeros changes nothing.
#include "many_rows.h"
#include "one_row.h"

namespace {

constexpr int64_t MAX_SPARSE_ROWS = 8;
// Fewer silent channels of a row than this part are read too: one run of all weights takes less time than many with gaps, the
// more so the shorter a channel's run is. Measured; int8, whose counts are integers else, with AVX-512 at a fifth only.
double few_silent(const Packed& w) {
    if (W == 16 && w.kind == INT8) return 0.2;
    return w.panel < 1024 ? 0.4 : 0.3;
}

typedef int16_t vs __attribute__((vector_size(2 * W)));

// Followed by zeros up to the next multiple of W.
void widen_counts(const int16_t* x, int64_t in, float* wide) {
    for (int64_t k = 0; k < in; k++) wide[k] = (float)x[k];
    for (int64_t k = in; k < padded(in, W); k++) wide[k] = 0;
}

// What is known of a row of counts: whether all are whole numbers that fit in 16 bits, or in 8, how many are zero, and, of
// those that fit, the sum of their sizes and the largest such sum of a group.
struct Activity {
    bool whole, small;
    int64_t silent, total, most;
};

// x, followed by zeros, and counts, the same in 16 bits, both to the next multiple of W.
Activity activity_of(const float* x, int64_t in, int16_t* counts) {
    Activity found{true, true, in - padded(in, W), 0, 0};
    vi fits = splat_int(-1), zeros{}, large{};
    for (int64_t group = 0; group < in; group += GROUP) {
        vi sizes{};
        for (int64_t k = group; k < smaller(in, group + GROUP); k += W) {
            const vf value = load(x + k);
            const vi inside = (value >= splat(-32767.0f)) & (value <= splat(32767.0f));
            const vi number = __builtin_convertvector(inside ? value : vf{}, vi);
            const vs small = __builtin_convertvector(number, vs);
            memcpy(counts + k, &small, sizeof small);
            fits &= to_float(number) == value;
            zeros -= value == vf{};
            const vi size = number < 0 ? -number : number;
            sizes += size;
            large |= size;
        }
        const int64_t size = sum(sizes);
        found.total += size;
        found.most = larger(found.most, size);
    }
    found.silent += sum(zeros);
    found.whole = !any(~fits);
    found.small = !any(large & ~127);
    return found;
}

// Two inputs at a time, the first in the upper half.
void to_pairs(const bf16* x, int64_t in, int32_t* pairs) {
    for (int64_t k = 0; k < in; k += 2) pairs[k / 2] = (int32_t)((uint32_t)x[k].bits << 16 | x[k + 1].bits);
}

// Whether floats hold the sum of each group of a row of counts, times codes, exactly.
bool fits_in_floats(const Activity& activity) { return activity.most * 128 <= 1 << 24; }

int64_t nonzero(const float* x, int64_t in) {
    int64_t n = 0;
    for (int64_t k = 0; k < in; k++) n += x[k] != 0;
    return n;
}

}  // namespace

// x [rows, in] of x_type; token_scale [rows] or null; bias [out] or null; out [rows, out] of out_type (fp32 or bf16).
// counts: x are spike counts: zeros are skipped where that is faster, and int8 weights are multiplied in integers.
// break_even: the most rows' worth of weights (rows times the part of the channels that fired) to read row by row.
EXPORT(linear)(const Packed* w, const void* x, int64_t x_type, const float* token_scale, const float* bias, void* out,
               int64_t out_type, int64_t rows, int64_t counts, double break_even, int64_t threads) {
    if (rows == 0 || w->out == 0) return;
    const int64_t in = w->in, stride = padded(in, W);
    const bool integers = counts && w->kind == INT8;
    const bool halves = w->kind != FP32 && !integers && x_type == BF16 && rows > FEW_ROWS && in % 2 == 0 && has_pairs();
    const bool as_is = x_type == F32 && stride == in, bytes = HAS_QUADS && integers && rows > FEW_ROWS;
    Buffer<float> wide(as_is || halves ? 0 : rows * stride);
    const float* floats = as_is ? (const float*)x : wide.data;
    Buffer<Activity> activity(rows);
    Buffer<int16_t> small(integers ? rows * stride : 0);
    Buffer<int32_t> pairs(halves ? rows * stride / 2 : 0), quads(bytes ? rows * stride / 4 : 0);
#pragma omp parallel for num_threads(threads) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        float* own = wide.data + row * stride;
        if (halves)
            to_pairs((const bf16*)x + row * in, in, pairs.data + row * stride / 2);
        else if (x_type == I16)
            widen_counts((const int16_t*)x + row * in, in, own);
        else if (!as_is)
            widen_row(at(x, x_type, row * in), x_type, in, own);
        if (integers) activity.data[row] = activity_of(floats + row * stride, in, small.data + row * stride);
        if (bytes) to_quads(small.data + row * stride, stride, quads.data + row * stride / 4);
    }
    bool all_whole = integers, all_small = bytes;
    for (int64_t row = 0; integers && row < rows; row++) {
        all_whole &= activity.data[row].whole;
        all_small &= activity.data[row].small;
    }
    Call call{*w, floats, all_whole ? small.data : nullptr, all_small ? quads.data : nullptr,
              halves ? pairs.data : nullptr, token_scale, bias, out, out_type, rows, stride};
    // Rows whose counts do not fit go alone, so that they change nothing for the others.
    const bool apart = rows == 1 || (integers && !all_whole), sparse = counts && rows <= MAX_SPARSE_ROWS;
    Buffer<Reading> readings(rows);
    int64_t active = 0;
    for (int64_t row = 0; row < rows && (apart || sparse); row++) {
        const bool whole = integers && activity.data[row].whole;
        const int64_t fired = integers ? in - activity.data[row].silent : counts ? nonzero(floats + row * stride, in) : in;
        bool all = !counts || (double)(in - fired) < few_silent(*w) * (double)in;
        if (whole) all = all && rows == 1 && fits_in_floats(activity.data[row]);
        readings.data[row] = {whole && !all, all, whole ? activity.data[row].total : 0};
        active += fired;
    }
    const bool by_row = apart || (sparse && (double)active <= break_even * (double)in);
    const bool few = by_row || rows <= FEW_ROWS;
    const bool apart_halves = !part_of(*w, few, 0, threads).span.is_all(in);
    const Halves sums(call, apart_halves);
    Buffer<int64_t> taken(2 * rows);
    memset(taken.data, 0, 2 * rows * sizeof *taken.data);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        const Part part = part_of(*w, few, thread, threads);
        int64_t* own = taken.data + (part.span.first > 0) * rows;
        if (by_row) {
            rows_one_by_one(call, readings.data, part, own, sums);
        } else {
            const Shape block = block_of(rows, w->kind);
            Scratch scratch(smaller(rows, MAX_ROWS), block);
            Pieces(*w, block.width, part.threads).take(own, [&](const Columns& columns) {
                for (int64_t row = 0; row < rows; row += MAX_ROWS)
                    many_rows(call, row, smaller(MAX_ROWS, rows - row), columns, part.span, block.depth, scratch, sums);
            });
        }
    }
    if (apart_halves) sums.finish_all(threads);
}

REPLAYED(linear)
