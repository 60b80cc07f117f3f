// Gated linear attention as a recurrence over tokens: S = diag(exp g) S + k^T v, o = scale * q S; and the gated delta
// rule, where beta (v - k diag(exp g) S) takes the place of v.
//
// One pass over the state a token whatever its length, so prefill in any chunks and decoding give the same bits. Query
// heads that share k, v and decay share the state. A task is one document, one state and a slice of its columns; it is
// updated where it lies for one token and in a copy for more.
#include "simd.h"

namespace {

constexpr int64_t SLICE = 32;  // columns of the state a task holds in the first cache
constexpr int PAIR = 2;        // vectors of columns at once, so that k, decay and q are loaded for both
constexpr int HEADS = W == 16 ? 8 : 4;  // query heads at once: their sums take half of the registers
constexpr int64_t CHUNK = 16;  // tokens from one kept state to the next
constexpr int64_t ALONE = 1 << 16;  // elements of state for which it is not worth waking other threads

struct Recurrence {
    Tensor q, k, v, decay;
    const int64_t *tokens, *starts, *slots;  // tokens: null for 0, 1, 2, ...; slots: null for the document's number
    float* pool;
    void* out;
    float scale;
    int64_t heads, groups, key, value, decay_width;
    float* kept;  // [starts[documents] / CHUNK + documents, groups, key, value]: the state before each chunk, or null
    Tensor beta;  // one number a group: the delta rule; no data: not
};

const void* place(const Tensor& x, int64_t token, int64_t element) {
    return at(x.data, x.type, token * x.stride + element);
}

constexpr int64_t LINE = 16;  // floats that a cache fetches at once

// Rows of a state, `stride` floats apart.
struct Rows {
    float* first;
    int64_t stride;

    float* at(int64_t i) const { return first + i * stride; }
    Rows from(int64_t column) const { return {first + column, stride}; }
};

// S += k v for a pair of vectors of columns (UPDATE); then H heads read them. As many floats from `ahead` on come into
// the second cache meanwhile.
template <int H, bool UPDATE>
void columns(Rows state, const float* decay, const float* k, const float* v, const float* q, int64_t q_stride,
             int64_t key, const float* ahead, vf (*out)[PAIR]) {
    const vf v0 = load(v), v1 = load(v + W);
    vf o[H][PAIR] = {};
    for (int64_t i = 0; i < key; i++) {
        vf s0 = load(state.at(i)), s1 = load(state.at(i) + W);
        if (UPDATE) {
            for (int64_t j = 0; j < PAIR * W; j += LINE) __builtin_prefetch(ahead + i * PAIR * W + j, 0, 2);
            const vf x = splat(k[i]), a = splat(decay[i]);
            s0 = fma(x, v0, a * s0), s1 = fma(x, v1, a * s1);
            store(state.at(i), s0), store(state.at(i) + W, s1);
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const vf x = splat(q[h * q_stride + i]);
            o[h][0] = fma(x, s0, o[h][0]), o[h][1] = fma(x, s1, o[h][1]);
        }
    }
    memcpy(out, o, sizeof o);
}

template <bool UPDATE>
void columns(int64_t heads, Rows state, const float* decay, const float* k, const float* v, const float* q,
             int64_t q_stride, int64_t key, const float* ahead, vf (*out)[PAIR]) {
    switch (heads) {
        case 1: return columns<1, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
        case 2: return columns<2, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
        case 3: return columns<3, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
#if W == 16
        case 4: return columns<4, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
        case 5: return columns<5, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
        case 6: return columns<6, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
        case 7: return columns<7, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
#endif
        default: return columns<HEADS, UPDATE>(state, decay, k, v, q, q_stride, key, ahead, out);
    }
}

void put(const Recurrence& r, int64_t token, int64_t head, int64_t column, int64_t width, vf x) {
    const int64_t place = (token * r.heads + head) * r.value + column;
    store_part(at(r.out, r.q.type, place), r.q.type, x, width);
}

// Where the state before the chunk of a document's token `n` is kept.
float* kept_state(const Recurrence& r, int64_t document, int64_t group, int64_t n) {
    const int64_t chunk = r.starts[document] / CHUNK + document + (n - r.starts[document]) / CHUNK;
    return r.kept + (chunk * r.groups + group) * r.key * r.value;
}

void read_decay(const Recurrence& r, int64_t token, int64_t group, float* decay) {
    widen_row(place(r.decay, token, group * r.decay_width), r.decay.type, r.decay_width, decay);
    for (int64_t i = 0; i < r.decay_width; i += W) store(decay + i, exponential(load(decay + i)));
    for (int64_t i = r.decay_width; i < r.key; i++) decay[i] = decay[0];
}

// `rows` rows of `width` floats, from rows `from` apart to rows `to` apart.
void copy_rows(const float* x, int64_t from, int64_t rows, int64_t width, float* out, int64_t to) {
    for (int64_t i = 0; i < rows; i++) memcpy(out + i * to, x + i * from, width * sizeof(float));
}

// v becomes what the delta rule adds to the state: beta (v - k diag(decay) S).
void error_of(Rows state, const float* decay, const float* k, float beta, int64_t key, float* v) {
    vf seen[SLICE / W] = {};
    for (int64_t i = 0; i < key; i++)
#pragma GCC unroll 8
        for (int c = 0; c < SLICE / W; c++)
            seen[c] = fma(splat(k[i]), splat(decay[i]) * load(state.at(i) + c * W), seen[c]);
    for (int c = 0; c < SLICE / W; c++) store(v + c * W, splat(beta) * (load(v + c * W) - seen[c]));
}

void one_token(const Recurrence& r, int64_t token, int64_t group, int64_t first, int64_t width, Rows state, float* row,
               int64_t stride, const float* ahead) {
    const int64_t per_group = r.heads / r.groups;
    float *decay = row, *k = row + stride, *v = row + 2 * stride, *q = row + 3 * stride;
    read_decay(r, token, group, decay);
    widen_row(place(r.k, token, group * r.key), r.k.type, r.key, k);
    widen_row(place(r.v, token, group * r.value + first), r.v.type, width, v);
    if (r.beta.data) {
        alignas(64) float beta[W];
        widen_row(place(r.beta, token, group), r.beta.type, 1, beta);
        error_of(state, decay, k, beta[0], r.key, v);
    }
    for (int64_t h = 0; h < per_group; h++)
        widen_row(place(r.q, token, (group * per_group + h) * r.key), r.q.type, r.key, q + h * stride);
    for (int64_t c = 0; c < width; c += PAIR * W)
        for (int64_t h = 0; h < per_group; h += HEADS) {
            const int64_t some = per_group - h < HEADS ? per_group - h : HEADS;
            const auto pass = h ? columns<false> : columns<true>;
            vf out[HEADS][PAIR];
            pass(some, state.from(c), decay, k, v + c, q + h * stride, stride, r.key, ahead + c * r.key, out);
            for (int64_t i = 0; i < some; i++)
                for (int64_t part = c; part < width && part < c + PAIR * W; part += W)
                    put(r, token, group * per_group + h + i, first + part, width - part,
                        out[i][(part - c) / W] * splat(r.scale));
        }
}

int64_t slices_of(const Recurrence& r) { return (r.value + SLICE - 1) / SLICE; }

// Columns `first .. first + width` of a document's state for one group of heads.
struct Slice {
    int64_t document, group, first, width;

    Slice(const Recurrence& r, int64_t number) {
        const int64_t slices = slices_of(r);
        document = number / slices / r.groups, group = number / slices % r.groups, first = number % slices * SLICE;
        width = r.value - first < SLICE ? r.value - first : SLICE;
    }
    // The state that it is of; null for padding, which remembers zeros.
    float* state(const Recurrence& r) const {
        const int64_t slot = r.slots ? r.slots[document] : document;
        return slot < 0 ? nullptr : r.pool + (slot * r.groups + group) * r.key * r.value;
    }
};

// All tokens of a document, over a copy of the slice.
void over_copy(const Recurrence& r, const Slice& slice, float* home, float* row, int64_t stride, const float* next) {
    const auto& [document, group, first, width] = slice;
    const int64_t end = r.starts[document + 1];
    Buffer<float> copy(r.key * SLICE);
    memset(copy.data, 0, r.key * SLICE * sizeof(float));
    if (home) copy_rows(home, r.value, r.key, width, copy.data, SLICE);
    for (int64_t n = r.starts[document]; n < end; n++) {
        if (r.kept && (n - r.starts[document]) % CHUNK == 0)
            copy_rows(copy.data, SLICE, r.key, width, kept_state(r, document, group, n) + first, r.value);
        one_token(r, r.tokens ? r.tokens[n] : n, group, first, width, {copy.data, SLICE}, row, stride,
                  next && n == end - 1 ? next : copy.data);
    }
    if (home) copy_rows(copy.data, SLICE, r.key, width, home, r.value);
}

// `next`: the state after this one, or null. Each slice fetches its share of it, whole rows: memory gives them fastest.
void one_slice(const Recurrence& r, const Slice& slice, const float* next) {
    const int64_t stride = (r.key > SLICE ? r.key : SLICE) + W, n = r.starts[slice.document];
    Buffer<float> row((3 + r.heads / r.groups) * stride);
    memset(row.data, 0, 3 * stride * sizeof(float));
    float* home = slice.state(r) ? slice.state(r) + slice.first : nullptr;
    if (next) next += slice.first * r.key;
    const bool one = r.starts[slice.document + 1] - n == 1 && !r.kept;
    if (!one || !home || slice.width % (PAIR * W)) return over_copy(r, slice, home, row.data, stride, next);
    one_token(r, r.tokens ? r.tokens[n] : n, slice.group, slice.first, slice.width, {home, r.value}, row.data, stride,
              next ? next : home);
}

// Gradients of the loss, in fp32: `out` and `state` of the results, the others of what went in.
struct Gradients {
    const float *out, *state;          // [tokens, heads, value]; [documents, groups, key, value]
    float *q, *k, *v, *decay, *first;  // as the inputs, tokens without gaps; first [documents, groups, key, value]
};

// One document and one group: its chunks from the last to the first, the states of a chunk computed once more.
struct Backward {
    const Recurrence& r;
    const Gradients& g;
    const int64_t document, group, per_group, keys, values;  // keys, values: padded widths
    Buffer<float> states, rows, change, sums;

    Backward(const Recurrence& recurrence, const Gradients& gradients, int64_t document, int64_t group)
        : r(recurrence), g(gradients), document(document), group(group), per_group(r.heads / r.groups),
          keys((r.key + W - 1) / W * W), values((r.value + W - 1) / W * W), states((CHUNK + 1) * r.key * values),
          rows(CHUNK * row()), change(r.key * values), sums(values) {
        memset(states.data, 0, (CHUNK + 1) * r.key * values * sizeof(float));
        memset(change.data, 0, r.key * values * sizeof(float));
        copy_rows(g.state + home(), r.value, r.key, r.value, change.data, values);
    }

    int64_t home() const { return (document * r.groups + group) * r.key * r.value; }
    int64_t token(int64_t n) const { return r.tokens ? r.tokens[n] : n; }
    int64_t head(int64_t n, int64_t h) const { return token(n) * r.heads + group * per_group + h; }

    // A token's decay, k, v, q and the gradients of its outputs, times the scale; one after the other.
    int64_t row() const { return 2 * keys + values + per_group * (keys + values); }
    float* decay(int64_t t) const { return rows.data + t * row(); }
    float* k(int64_t t) const { return decay(t) + keys; }
    float* v(int64_t t) const { return k(t) + keys; }
    float* q(int64_t t, int64_t h) const { return v(t) + values + h * keys; }
    float* out(int64_t t, int64_t h) const { return q(t, per_group) + h * values; }
    float* state(int64_t t, int64_t i) const { return states.data + (t * r.key + i) * values; }

    void read(int64_t t, int64_t n) {
        read_decay(r, token(n), group, decay(t));
        widen_row(place(r.k, token(n), group * r.key), r.k.type, r.key, k(t));
        widen_row(place(r.v, token(n), group * r.value), r.v.type, r.value, v(t));
        for (int64_t h = 0; h < per_group; h++) {
            widen_row(place(r.q, token(n), (group * per_group + h) * r.key), r.q.type, r.key, q(t, h));
            widen_row(g.out + head(n, h) * r.value, r.value, out(t, h));
            for (int64_t c = 0; c < values; c++) out(t, h)[c] *= r.scale;
        }
    }

    // The state after a token from the one before it, and the gradient of q.
    void forward(int64_t t, int64_t n) {
        for (int64_t i = 0; i < r.key; i++) {
            const vf a = splat(decay(t)[i]), x = splat(k(t)[i]);
            float *before = state(t, i), *after = state(t + 1, i);
            for (int64_t c = 0; c < values; c += W) store(after + c, fma(x, load(v(t) + c), a * load(before + c)));
            for (int64_t h = 0; h < per_group; h++) {
                vf total = {};
                for (int64_t c = 0; c < values; c += W) total = fma(load(after + c), load(out(t, h) + c), total);
                g.q[head(n, h) * r.key + i] = sum(total);
            }
        }
    }

    // `change`, the gradient of the state after a token, becomes that of the state before it.
    void backward(int64_t t, int64_t n) {
        const int64_t place = token(n) * r.groups + group;
        float* decays = g.decay + place * r.decay_width;
        memset(sums.data, 0, values * sizeof(float));
        memset(decays, 0, r.decay_width * sizeof(float));
        for (int64_t i = 0; i < r.key; i++) {
            const vf a = splat(decay(t)[i]), x = splat(k(t)[i]);
            float *here = change.data + i * values, *before = state(t, i);
            vf to_k = {}, to_decay = {};
            for (int64_t c = 0; c < values; c += W) {
                vf d = load(here + c);
                for (int64_t h = 0; h < per_group; h++) d = fma(splat(q(t, h)[i]), load(out(t, h) + c), d);
                to_k = fma(d, load(v(t) + c), to_k);
                to_decay = fma(d, load(before + c), to_decay);
                store(sums.data + c, fma(x, d, load(sums.data + c)));
                store(here + c, a * d);
            }
            g.k[place * r.key + i] = sum(to_k);
            decays[r.decay_width == 1 ? 0 : i] += decay(t)[i] * sum(to_decay);
        }
        memcpy(g.v + place * r.value, sums.data, r.value * sizeof(float));
    }

    void run() {
        const int64_t begin = r.starts[document], end = r.starts[document + 1];
        for (int64_t first = begin + (end - begin - 1) / CHUNK * CHUNK; first >= begin && begin < end; first -= CHUNK) {
            const int64_t count = end - first < CHUNK ? end - first : CHUNK;
            copy_rows(kept_state(r, document, group, first), r.value, r.key, r.value, state(0, 0), values);
            for (int64_t t = 0; t < count; t++) {
                read(t, first + t);
                forward(t, first + t);
            }
            for (int64_t t = count - 1; t >= 0; t--) backward(t, first + t);
        }
        copy_rows(change.data, values, r.key, r.value, g.first + home(), r.value);
    }
};

}  // namespace

// Updates the states in `pool` and writes `out [tokens, heads, value]`, in q's type, for every token of a document.
EXPORT(gated_linear)(const Recurrence* r, int64_t documents, int64_t threads) {
    const int64_t tasks = documents * r->groups * slices_of(*r);
    const int64_t steps = r->starts[documents] * r->groups * r->key * r->value;
#pragma omp parallel for num_threads(threads) schedule(guided) if (steps > ALONE)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t next = task + slices_of(*r);
        one_slice(*r, Slice(*r, task), next < tasks ? Slice(*r, next).state(*r) : nullptr);
    }
}

// Gradients of a call whose `kept` states are at hand; writes those of every token of a document, and of the states.
EXPORT(gated_linear_backward)(const Recurrence* r, const Gradients* g, int64_t documents, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < documents * r->groups; task++)
        Backward(*r, *g, task / r->groups, task % r->groups).run();
}

REPLAYED(gated_linear)
REPLAYED(gated_linear_backward)
