// Gated linear attention as a recurrence over tokens: S = diag(exp g) S + k^T v, o = scale * q S.
//
// One pass over the state a token whatever its length, so prefill in any chunks and decoding give the same bits. Query
// heads that share k, v and decay share the state. A task is one document, one state and a slice of its columns.
#include "simd.h"

namespace {

constexpr int64_t SLICE = 32;  // columns of the state a task holds in the first cache
constexpr int HEADS = 8;       // query heads at once
constexpr int64_t ALONE = 1 << 16;  // elements of state for which it is not worth waking other threads

struct Tensor {
    const void* data;
    int64_t type, stride;  // elements from token to token
};

struct Recurrence {
    Tensor q, k, v, decay;
    const int64_t *tokens, *starts, *slots;  // tokens: null for 0, 1, 2, ...; slots: null for the document's number
    float* pool;
    void* out;
    float scale;
    int64_t heads, groups, key, value, decay_width;
};

const void* place(const Tensor& x, int64_t token, int64_t element) {
    return at(x.data, x.type, token * x.stride + element);
}

// S += k v for one vector of columns; then H heads read it.
template <int H>
void columns(float* state, const float* decay, const float* k, vf v, const float* q, int64_t q_stride, int64_t key,
             bool update, vf* out) {
    vf o[H] = {};
    for (int64_t i = 0; i < key; i++) {
        vf s = load(state + i * SLICE);
        if (update) {
            s = fma(splat(k[i]), v, splat(decay[i]) * s);
            store(state + i * SLICE, s);
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) o[h] = fma(splat(q[h * q_stride + i]), s, o[h]);
    }
    for (int h = 0; h < H; h++) out[h] = o[h];
}

void columns(int64_t heads, float* state, const float* decay, const float* k, vf v, const float* q, int64_t q_stride,
             int64_t key, bool update, vf* out) {
    switch (heads) {
        case 1: return columns<1>(state, decay, k, v, q, q_stride, key, update, out);
        case 2: return columns<2>(state, decay, k, v, q, q_stride, key, update, out);
        case 3: return columns<3>(state, decay, k, v, q, q_stride, key, update, out);
        case 4: return columns<4>(state, decay, k, v, q, q_stride, key, update, out);
        case 5: return columns<5>(state, decay, k, v, q, q_stride, key, update, out);
        case 6: return columns<6>(state, decay, k, v, q, q_stride, key, update, out);
        case 7: return columns<7>(state, decay, k, v, q, q_stride, key, update, out);
        default: return columns<HEADS>(state, decay, k, v, q, q_stride, key, update, out);
    }
}

void put(const Recurrence& r, int64_t token, int64_t head, int64_t column, int64_t width, vf x) {
    const int64_t place = (token * r.heads + head) * r.value + column;
    if (r.q.type == F32)
        store_part((float*)r.out + place, x, width);
    else
        store_part((bf16*)r.out + place, x, width);
}

void one_token(const Recurrence& r, int64_t token, int64_t group, int64_t first, int64_t width, float* state,
               float* row, int64_t stride) {
    const int64_t per_group = r.heads / r.groups;
    float *decay = row, *k = row + stride, *v = row + 2 * stride, *q = row + 3 * stride;
    widen_row(place(r.decay, token, group * r.decay_width), r.decay.type, r.decay_width, decay);
    for (int64_t i = 0; i < r.decay_width; i += W) store(decay + i, exponential(load(decay + i)));
    for (int64_t i = r.decay_width; i < r.key; i++) decay[i] = decay[0];
    widen_row(place(r.k, token, group * r.key), r.k.type, r.key, k);
    widen_row(place(r.v, token, group * r.value + first), r.v.type, width, v);
    for (int64_t h = 0; h < per_group; h++)
        widen_row(place(r.q, token, (group * per_group + h) * r.key), r.q.type, r.key, q + h * stride);
    for (int64_t c = 0; c < width; c += W)
        for (int64_t h = 0; h < per_group; h += HEADS) {
            const int64_t some = per_group - h < HEADS ? per_group - h : HEADS;
            vf out[HEADS];
            columns(some, state + c, decay, k, load(v + c), q + h * stride, stride, r.key, h == 0, out);
            for (int64_t i = 0; i < some; i++)
                put(r, token, group * per_group + h + i, first + c, width - c < W ? width - c : W,
                    out[i] * splat(r.scale));
        }
}

void one_slice(const Recurrence& r, int64_t document, int64_t group, int64_t first, int64_t width) {
    const int64_t stride = (r.key > SLICE ? r.key : SLICE) + W;
    Buffer<float> state(r.key * SLICE), row((3 + r.heads / r.groups) * stride);
    memset(state.data, 0, r.key * SLICE * sizeof(float));
    const int64_t slot = r.slots ? r.slots[document] : document;
    float* home = r.pool + (slot * r.groups + group) * r.key * r.value + first;
    for (int64_t i = 0; i < r.key && slot >= 0; i++)
        memcpy(state.data + i * SLICE, home + i * r.value, width * sizeof(float));
    for (int64_t n = r.starts[document]; n < r.starts[document + 1]; n++)
        one_token(r, r.tokens ? r.tokens[n] : n, group, first, width, state.data, row.data, stride);
    for (int64_t i = 0; i < r.key && slot >= 0; i++)
        memcpy(home + i * r.value, state.data + i * SLICE, width * sizeof(float));
}

}  // namespace

// Updates the states in `pool` and writes `out [tokens, heads, value]`, in q's type, for every token of a document.
EXPORT(gated_linear)(const Recurrence* r, int64_t documents, int64_t threads) {
    const int64_t slices = (r->value + SLICE - 1) / SLICE;
    const int64_t steps = r->starts[documents] * r->groups * r->key * r->value;
#pragma omp parallel for num_threads(threads) schedule(static) if (steps > ALONE)
    for (int64_t task = 0; task < documents * r->groups * slices; task++) {
        const int64_t first = task % slices * SLICE;
        const int64_t width = r->value - first < SLICE ? r->value - first : SLICE;
        one_slice(*r, task / slices / r->groups, task / slices % r->groups, first, width);
    }
}
