// Calls every kernel of one level on exactly sized heap memory, odd sizes and odd addresses, for `make sanitize`.
#include <math.h>
#include <stdio.h>

#include <vector>

#include "../pairs.h"

// The kernels themselves, so that their structs need no second definition.
namespace linear_file {
#include "../linear.cpp"
}
namespace recurrent_file {
#include "../recurrent.cpp"
}
namespace channels_file {
#include "../channels.cpp"
}
namespace attention_file {
#include "../attention.cpp"
#include "../attention_backward.cpp"
}
namespace elementwise_file {
#include "../elementwise.cpp"
}

typedef std::vector<float> Floats;

static Floats random_floats(int64_t n) {
    Floats x(n);
    for (float& v : x) v = (float)rand() / RAND_MAX - 0.5f;
    return x;
}

static int failures = 0;

static void expect(bool good, const char* what) {
    if (!good) {
        failures++;
        printf("wrong: %s\n", what);
    }
}

static void check_linear(int64_t kind, int64_t rows, int64_t in, int64_t out, bool counts) {
    const int64_t wide = (out + 63) / 64 * 64, size[] = {4, 2, 1};
    std::vector<char> weight(wide * in * size[kind], 0);
    if (kind == 0)
        for (int64_t i = 0; i < wide * in; i++) ((float*)weight.data())[i] = 1.0f;
    if (kind == 1)
        for (int64_t i = 0; i < wide * in; i++) ((uint16_t*)weight.data())[i] = 0x3f80;
    if (kind == 2)
        for (char& c : weight) c = 1;
    Floats scale((in + 127) / 128 * wide, 1.0f), token(rows, 2.0f), bias(out, 1.0f), x(rows * in), y(rows * out);
    for (float& v : x) v = (float)(rand() % 5 - 2);
    linear_file::Packed packed{weight.data(), scale.data(), in, out, 512, kind};
    std::vector<bf16> narrowed(rows * in);
    for (int64_t i = 0; i < rows * in; i++) narrowed[i] = narrow(x[i]);
    const void* inputs[] = {x.data(), narrowed.data()};
    for (int64_t type : {F32, BF16}) {
        linear_file::SYMBOL(LEVEL, linear)(&packed, inputs[type], type, token.data(), bias.data(), y.data(), F32, rows,
                                           counts, 1.5, 3);
        for (int64_t row = 0; row < rows; row++) {
            float total = 0;
            for (int64_t k = 0; k < in; k++) total += x[row * in + k];
            for (int64_t n = 0; n < out; n++) expect(y[row * out + n] == total * 2 + 1, "linear");
        }
    }
}

// The states kept on the way forward serve the way back; every gradient is written.
static void check_recurrent_backward(recurrent_file::Recurrence r, int64_t tokens) {
    const int64_t state = r.groups * r.key * r.value;
    Floats pool = random_floats(2 * state), kept((tokens / 16 + 2) * state, NAN), first(2 * state, NAN);
    Floats out = random_floats(tokens * r.heads * r.value), last = random_floats(2 * state);
    Floats q(tokens * r.heads * r.key, NAN), k(tokens * r.groups * r.key, NAN), v(tokens * r.groups * r.value, NAN);
    Floats decay(tokens * r.groups * r.decay_width, NAN);
    r.slots = nullptr;
    r.pool = pool.data();
    r.kept = kept.data();
    recurrent_file::SYMBOL(LEVEL, gated_linear)(&r, 2, 3);
    const recurrent_file::Gradients gradients{out.data(), last.data(), q.data(),    k.data(),
                                              v.data(),   decay.data(), first.data()};
    recurrent_file::SYMBOL(LEVEL, gated_linear_backward)(&r, &gradients, 2, 3);
    for (const Floats* found : {&q, &k, &v, &decay, &first})
        for (float x : *found) expect(x == x, "gated_linear_backward");
}

static void check_recurrent(int64_t tokens, int64_t heads, int64_t groups, int64_t key, int64_t value) {
    Floats q = random_floats(tokens * heads * key), k = random_floats(tokens * groups * key);
    Floats v = random_floats(tokens * groups * value), decay = random_floats(tokens * groups);
    Floats pool = random_floats(2 * groups * key * value), out(tokens * heads * value, NAN);
    const int64_t starts[] = {0, tokens / 2, tokens}, slots[] = {1, -1};
    recurrent_file::Recurrence r{{q.data(), F32, heads * key},    {k.data(), F32, groups * key},
                                 {v.data(), F32, groups * value}, {decay.data(), F32, groups},
                                 nullptr,                         starts,
                                 slots,                           pool.data(),
                                 out.data(),                      1.0f,
                                 heads,                           groups,
                                 key,                             value,
                                 1,
                                 nullptr};
    recurrent_file::SYMBOL(LEVEL, gated_linear)(&r, 2, 3);
    for (float x : out) expect(x == x, "gated_linear");
    check_recurrent_backward(r, tokens);
    Floats beta = random_floats(tokens * groups), written(out.size(), NAN);
    r.beta = {beta.data(), F32, groups};
    r.out = written.data();
    recurrent_file::SYMBOL(LEVEL, gated_linear)(&r, 2, 3);
    for (float x : written) expect(x == x, "gated_delta");
}

static void check_channels(int64_t tokens, int64_t channels, int64_t taps) {
    Floats k = random_floats(tokens * channels), v = random_floats(tokens * channels), out(tokens * channels, NAN);
    Floats pool = random_floats(2 * 3 * channels), inputs = random_floats(2 * (taps - 1) * channels);
    Floats decay(channels, -1.0f), first(channels, 0.5f), weight = random_floats(channels * taps);
    const int64_t starts[] = {0, tokens / 2, tokens}, slots[] = {1, -1};
    channels_file::Channels c{{k.data(), F32, channels}, nullptr, starts, slots, pool.data(), F32, out.data(), channels};
    const Tensor values{v.data(), F32, channels};
    channels_file::SYMBOL(LEVEL, wkv)(&c, &values, decay.data(), first.data(), 2, 3);
    for (float x : out) expect(x == x, "wkv");
    channels_file::SYMBOL(LEVEL, lif_scan)(&c, 2.0f, 1.0f, 0.0f, tokens % 2, 1, 2, 3);
    for (float x : out) expect(x == 0 || x == 1, "lif_scan");
    c.pool = inputs.data();
    channels_file::SYMBOL(LEVEL, short_conv)(&c, weight.data(), taps, 2, 3);
    for (float x : out) expect(x == x, "short_conv");
}

// Without rings: the sums kept on the way forward serve the way back; every gradient is written.
static void check_attention_backward(attention_file::Attention a, int64_t tokens) {
    Floats kept(tokens * a.heads, NAN), out = random_floats(tokens * a.heads * a.width), delta(tokens * a.heads, 0.5f);
    Floats q(tokens * a.heads * a.width, 0.0f), k(tokens * a.groups * a.width, NAN), v(k);
    Floats sinks(2 * a.num_sinks * 2 * a.groups * a.width, NAN);
    a.slots = nullptr;
    a.pool = nullptr;
    a.kept = kept.data();
    attention_file::SYMBOL(LEVEL, window_attention)(&a, 2, 3);
    const attention_file::Gradients gradients{out.data(), delta.data(), q.data(), k.data(), v.data(), sinks.data()};
    attention_file::SYMBOL(LEVEL, window_attention_backward)(&a, &gradients, 2, 3);
    for (const Floats* found : {&kept, &q, &k, &v, &sinks})
        for (float x : *found) expect(x == x, "window_attention_backward");
}

// Exactly as many bytes as `x` takes in a type.
static std::vector<char> in_type(const Floats& x, int64_t type) {
    std::vector<char> bytes(x.size() * (type == F32 ? 4 : 2));
    narrow_row(x.data(), (int64_t)x.size(), bytes.data(), type);
    return bytes;
}

static void check_attention(int64_t tokens, int64_t heads, int64_t groups, int64_t width, int64_t window, int64_t type) {
    const int64_t capacity = window + 3, num_sinks = type == F32 ? 70 : 0;
    const auto random = [&](int64_t n) { return in_type(random_floats(n), type); };
    const auto q = random(tokens * heads * width), k = random(tokens * groups * width), v = random(tokens * groups * width);
    auto pool = random(2 * capacity * 2 * groups * width), out = in_type(Floats(tokens * heads * width, NAN), type);
    Floats sinks = random_floats(70 * 2 * groups * width);
    const int64_t starts[] = {0, tokens / 3, tokens}, slots[] = {1, -1}, first[] = {capacity + 2, 5};
    attention_file::Attention a{{q.data(), type, heads * width},
                                {k.data(), type, groups * width},
                                {v.data(), type, groups * width},
                                nullptr,
                                starts,
                                first,
                                slots,
                                pool.data(),
                                type,
                                capacity,
                                out.data(),
                                0.1f,
                                sinks.data(),
                                num_sinks,
                                heads,
                                groups,
                                width,
                                window,
                                nullptr};
    attention_file::SYMBOL(LEVEL, window_attention)(&a, 2, 3);
    Floats found(tokens * heads * width + W);
    widen_row(out.data(), type, tokens * heads * width, found.data());
    for (float x : found) expect(x == x, "window_attention");
    if (type == F32) check_attention_backward(a, tokens);
}

static void check_elementwise(int64_t rows, int64_t n) {
    using namespace elementwise_file;
    Floats x = random_floats(rows * n), y(rows * n), weight(n, 1.0f), scale(rows);
    SYMBOL(LEVEL, rms_norm)(x.data(), F32, weight.data(), 1e-6f, rows, n, y.data(), 2);
    SYMBOL(LEVEL, encode_adaptive)(x.data(), F32, 3.0f, 1e-5f, 1e4f, rows, n, y.data(), scale.data(), 2);
    SYMBOL(LEVEL, encode_dead_zone)
    (x.data(), F32, weight.data(), weight.data(), F32, 0.5f, 1e-5f, 1e4f, rows, n, y.data(), scale.data(), 2);
    SYMBOL(LEVEL, swiglu)(x.data(), x.data(), F32, rows, n, n, y.data(), 2);
    Floats to_gate(rows * n, NAN), to_up(rows * n, NAN);
    SYMBOL(LEVEL, swiglu_backward)
    (x.data(), x.data(), F32, rows, n, n, x.data(), to_gate.data(), to_up.data(), 2);
    for (float v : to_gate) expect(v == v, "swiglu_backward");
    for (float v : to_up) expect(v == v, "swiglu_backward");
    SYMBOL(LEVEL, log_sigmoid)(x.data(), F32, 16.0f, rows, n, n, y.data(), 2);
    std::vector<int64_t> positions(rows, 70000);
    Floats turned(rows * (n / 2 * 2));
    if (n > 1) SYMBOL(LEVEL, rotary)(x.data(), F32, positions.data(), weight.data(), 1.0f, rows, 1, n / 2 * 2, n, turned.data(), 2);
    for (float v : y) expect(v == v, "elementwise");
}

int main() {
    for (int64_t kind = 0; kind < 3; kind++)
        for (int64_t rows : {0, 1, 2, 7, 260})
            for (int64_t in : {1, 127, 300})
                for (bool counts : {false, true}) check_linear(kind, rows, in, in == 300 ? 600 : 33, counts);
    for (int64_t tokens : {0, 1, 9, 70}) {
        check_recurrent(tokens, 14, 2, 64, 64);
        check_recurrent(tokens, 9, 1, 3, 5);
        check_recurrent(tokens, 2, 1, 70, 90);
    }
    for (int64_t tokens : {0, 1, 3, 150})
        for (int64_t type : {F32, BF16}) {
            check_attention(tokens, 14, 2, 64, 70, type);
            check_attention(tokens, 3, 1, 5, 1, type);
            check_attention(tokens, 2, 1, 200, 100, type);
            check_attention(tokens, 3, 3, 32, 150, type);
        }
    for (int64_t tokens : {0, 1, 9})
        for (int64_t channels : {1, 64, 300}) check_channels(tokens, channels, 1 + tokens / 3);
    for (int64_t n : {1, 7, 64, 91}) check_elementwise(20, n);
    printf("%s: %d failures\n", __FILE__, failures);
    return failures != 0;
}
