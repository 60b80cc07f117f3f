// Recurrences that treat each channel alone: RWKV-4's weighted mean, leaky integrate-and-fire, short convolutions.
//
// One pass over the tokens whatever their number, so prefill in any chunks and decoding give the same bits. A task is
// one document and a slice of its channels, whose state stays in the first cache.
#include <math.h>

#include "simd.h"

namespace {

constexpr int64_t SLICE = 128;      // channels of a task
constexpr int64_t ALONE = 1 << 14;  // channels times tokens for which it is not worth waking other threads

struct Channels {
    Tensor x;
    const int64_t *tokens, *starts, *slots;  // tokens: null for 0, 1, 2, ...; slots: null for the document's number
    void* pool;                              // [slots, states, channels]
    int64_t pool_type;
    void* out;  // [tokens, channels], in x's type
    int64_t channels;
};

struct Slice {
    const Channels& c;
    int64_t first, width, begin, end, slot;

    int64_t token(int64_t n) const { return c.tokens ? c.tokens[n] : n; }
    // Row `n` of an input, followed by zeros.
    void read(const Tensor& x, int64_t n, float* row) const {
        widen_row(at(x.data, x.type, token(n) * x.stride + first), x.type, width, row);
    }
    void write(int64_t n, int64_t i, vf value) const {
        store_part(at(c.out, c.x.type, token(n) * c.channels + first + i), c.x.type, value, width - i);
    }
    void* home(int64_t states, int64_t state) const {
        return at(c.pool, c.pool_type, (slot * states + state) * c.channels + first);
    }
    // Rows of SLICE floats, zero without a slot.
    void load_states(int64_t states, float* rows) const {
        memset(rows, 0, states * SLICE * sizeof(float));
        for (int64_t i = 0; i < states && slot >= 0; i++)
            widen_row(home(states, i), c.pool_type, width, rows + i * SLICE);
    }
    void store_state(int64_t states, int64_t state, const float* row) const {
        if (slot >= 0) narrow_row(row, width, home(states, state), c.pool_type);
    }
};

// Calls work(slice) for every document and slice of channels.
template <class Work>
void each_slice(const Channels& c, int64_t documents, int64_t threads, Work work) {
    const int64_t slices = (c.channels + SLICE - 1) / SLICE;
#pragma omp parallel for num_threads(threads) schedule(static) if (c.starts[documents] * c.channels > ALONE)
    for (int64_t task = 0; task < documents * slices; task++) {
        const int64_t document = task / slices, first = task % slices * SLICE;
        const int64_t width = c.channels - first < SLICE ? c.channels - first : SLICE;
        work(Slice{c, first, width, c.starts[document], c.starts[document + 1], c.slots ? c.slots[document] : document});
    }
}

vf maximum(vf a, vf b) {
    vf larger = a > b ? a : b;
    return a == a ? larger : a;
}

// e^x for x <= 0; 0 where it is too small to be a normal number.
vf weight(vf x) { return x < splat(-87.3f) ? vf{} : exponential(x); }

// One token of W channels: `state` holds numerator, denominator and the largest exponent.
vf weighted_mean(vf* state, vf k, vf v, vf decay, vf first) {
    const vf top = state[1] == vf{} ? splat(-INFINITY) : state[2], present = first + k, past = top + decay;
    vf largest = maximum(top, present);
    vf old = weight(top - largest), now = weight(present - largest);
    const vf mean = (old * state[0] + now * v) / (old * state[1] + now);
    largest = maximum(past, k);
    old = weight(past - largest);
    now = weight(k - largest);
    state[0] = old * state[0] + now * v;
    state[1] = old * state[1] + now;
    state[2] = largest;
    return mean;
}

}  // namespace

// RWKV-4's weighted mean of v (arXiv 2305.13048); decay = -e^time_decay and first [channels]; states [3, channels].
EXPORT(wkv)(const Channels* c, const Tensor* values, const float* decay, const float* first, int64_t documents,
            int64_t threads) {
    each_slice(*c, documents, threads, [&](const Slice& s) {
        alignas(64) float state[3 * SLICE], k[SLICE], v[SLICE], w[SLICE] = {}, u[SLICE] = {};
        s.load_states(3, state);
        memcpy(w, decay + s.first, s.width * sizeof(float));
        memcpy(u, first + s.first, s.width * sizeof(float));
        for (int64_t n = s.begin; n < s.end; n++) {
            s.read(c->x, n, k);
            s.read(*values, n, v);
            for (int64_t i = 0; i < s.width; i += W) {
                vf here[3];
                for (int64_t part = 0; part < 3; part++) here[part] = load(state + part * SLICE + i);
                s.write(n, i, weighted_mean(here, load(k + i), load(v + i), load(w + i), load(u + i)));
                for (int64_t part = 0; part < 3; part++) store(state + part * SLICE + i, here[part]);
            }
        }
        for (int64_t part = 0; part < 3 && s.begin < s.end; part++) s.store_state(3, part, state + part * SLICE);
    });
}

// Leaky integrate-and-fire: x charges a membrane, which fires at v_th and is reset to v_reset or, softly, by v_th.
EXPORT(lif_scan)(const Channels* c, float tau, float v_th, float v_reset, int64_t soft, int64_t decay_input,
                 int64_t documents, int64_t threads) {
    const vf rest = splat(soft ? 0.0f : v_reset), threshold = splat(v_th), one = splat(1.0f);
    each_slice(*c, documents, threads, [&](const Slice& s) {
        alignas(64) float membrane[SLICE], x[SLICE];
        s.load_states(1, membrane);
        for (int64_t n = s.begin; n < s.end; n++) {
            s.read(c->x, n, x);
            for (int64_t i = 0; i < s.width; i += W) {
                const vf m = load(membrane + i), in = load(x + i);
                const vf charged = decay_input ? m + (in - (m - rest)) / splat(tau) : m - (m - rest) / splat(tau) + in;
                vf spike = charged >= threshold ? one : vf{};
                spike = charged == charged ? spike : charged;
                store(membrane + i, soft ? charged - spike * threshold : (one - spike) * charged + spike * rest);
                s.write(n, i, spike);
            }
        }
        if (s.begin < s.end) s.store_state(1, 0, membrane);
    });
}

// y_t = sum of weight[:, taps - 1 - i] x_{t-i}; weight [channels, taps]; states [taps - 1, channels]: the last inputs.
EXPORT(short_conv)(const Channels* c, const float* weight, int64_t taps, int64_t documents, int64_t threads) {
    const int64_t kept = taps - 1;
    each_slice(*c, documents, threads, [&](const Slice& s) {
        // Row n % taps holds input n of the document, counted so that the state's first row is row 0.
        Buffer<float> tap(taps * SLICE), inputs(taps * SLICE);
        memset(tap.data, 0, taps * SLICE * sizeof(float));
        for (int64_t i = 0; i < taps * s.width; i++)
            tap.data[i % taps * SLICE + i / taps] = weight[s.first * taps + i];
        s.load_states(kept, inputs.data);
        int64_t oldest = 0;
        for (int64_t n = s.begin; n < s.end; n++, oldest++) {
            s.read(c->x, n, inputs.data + (oldest + kept) % taps * SLICE);
            for (int64_t i = 0; i < s.width; i += W) {
                vf y = {};
                for (int64_t j = 0; j < taps; j++)
                    y = fma(load(tap.data + j * SLICE + i), load(inputs.data + (oldest + j) % taps * SLICE + i), y);
                s.write(n, i, y);
            }
        }
        for (int64_t i = 0; i < kept && s.begin < s.end; i++)
            s.store_state(kept, i, inputs.data + (oldest + i) % taps * SLICE);
    });
}

REPLAYED(wkv)
REPLAYED(lif_scan)
REPLAYED(short_conv)
