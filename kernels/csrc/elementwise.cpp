// What lies between the products, one pass over a row each: RMS norm, spike encoders, SwiGLU, the log of a decay, rotary
// positions.
#include <math.h>

#include "simd.h"

namespace {

// out = f(n values of each x).
template <class T, class F, class... Xs>
void each(int64_t n, T* out, F f, const Xs*... x) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(out + i, f(load(x + i)...));
    if (i < n) store_part(out + i, f(load_part(x + i, n - i)...), n - i);
}

// Sum of f over a row of n values that is followed by zeros up to whole vectors.
template <class F>
float total(const float* x, int64_t n, F f) {
    vf sums = {};
    for (int64_t i = 0; i < n; i += W) sums += f(load(x + i));
    return sum(sums);
}

vf absolute(vf x) { return (vf)((vi)x & splat_int(0x7fffffff)); }

vf nearest_even(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf rounded = (x + magic) - magic;
    return absolute(x) < splat(4194304.0f) ? rounded : x;
}

// 1 + e^-x. Past what `exponential` can give, infinite, so that -inf gives NaN as it does elsewhere.
vf one_and_power(vf x) { return splat(1.0f) + (x < splat(-88.0f) ? splat(INFINITY) : exponential(-x)); }

}  // namespace

// out [n] = x + y. This and `relu` are torch's, in steps that are made again.
EXPORT(add)(const void* x, const void* y, int64_t type, int64_t n, void* out) {
    const auto sum = [](vf a, vf b) { return a + b; };
    if (type == F32)
        each(n, (float*)out, sum, (const float*)x, (const float*)y);
    else
        each(n, (bf16*)out, sum, (const bf16*)x, (const bf16*)y);
}

// out [n] = the larger of x and 0; NaN stays NaN.
EXPORT(relu)(const void* x, int64_t type, int64_t n, void* out) {
    const auto positive = [](vf a) { return a < vf{} ? vf{} : a; };
    if (type == F32)
        each(n, (float*)out, positive, (const float*)x);
    else
        each(n, (bf16*)out, positive, (const bf16*)x);
}

// x, out [rows, n]; out = x / rms(x) * weight, rms over the n values, in fp32.
EXPORT(rms_norm)(const void* x, int64_t type, const float* weight, float epsilon, int64_t rows, int64_t n, void* out,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> wide(n + W);
        widen_row(at(x, type, row * n), type, n, wide.data);
        const float square = total(wide.data, n, [](vf v) { return v * v; });
        const float inverse = 1.0f / __builtin_sqrtf(square / (float)n + epsilon);
        for (int64_t i = 0; i < n; i++) wide.data[i] = wide.data[i] * inverse * weight[i];
        narrow_row(wide.data, n, at(out, type, row * n), type);
    }
}

// threshold = clamp(mean|x| / k, low, high); counts [rows, n] = round(x / threshold) in x's type; scale [rows].
EXPORT(encode_adaptive)(const void* x, int64_t type, float k, float low, float high, int64_t rows, int64_t n,
                        void* counts, float* scale, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> wide(n + W);
        widen_row(at(x, type, row * n), type, n, wide.data);
        float threshold = total(wide.data, n, absolute) / (float)n / k;
        threshold = threshold < low ? low : threshold > high ? high : threshold;
        scale[row] = threshold;
        for (int64_t i = 0; i < n; i += W)
            store(wide.data + i, nearest_even(load(wide.data + i) / splat(threshold)));
        narrow_row(wide.data, n, at(counts, type, row * n), type);
    }
}

// mean = clamp(mean|x|, low, high), scale [rows] = mean / max(k, least_k); counts [rows, n] = round(x / scale) where
// |x| / mean >= theta [n], else zero. theta and k [1] are of parameter_type.
EXPORT(encode_dead_zone)(const void* x, int64_t type, const void* theta, const void* k, int64_t parameter_type, float least_k,
                         float low, float high, int64_t rows, int64_t n, void* counts, float* scale, int64_t threads) {
    Buffer<float> thresholds(n + W), finest(W);
    widen_row(theta, parameter_type, n, thresholds.data);
    widen_row(k, parameter_type, 1, finest.data);
    const float divisor = finest.data[0] < least_k ? least_k : finest.data[0];
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> wide(n + W);
        widen_row(at(x, type, row * n), type, n, wide.data);
        float mean = total(wide.data, n, absolute) / (float)n;
        mean = mean < low ? low : mean > high ? high : mean;
        scale[row] = mean / divisor;
        for (int64_t i = 0; i < n; i += W) {
            const vf value = load(wide.data + i), count = nearest_even(value / splat(scale[row]));
            const vi fires = absolute(value) / splat(mean) >= load(thresholds.data + i);
            store(wide.data + i, count * (fires ? splat(1.0f) : vf{}));
        }
        narrow_row(wide.data, n, at(counts, type, row * n), type);
    }
}

// out [rows, n] = silu(gate) * up; gate and up [rows, stride].
EXPORT(swiglu)(const void* gate, const void* up, int64_t type, int64_t rows, int64_t n, int64_t stride, void* out,
               int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> a(n + W), b(n + W);
        widen_row(at(gate, type, row * stride), type, n, a.data);
        widen_row(at(up, type, row * stride), type, n, b.data);
        for (int64_t i = 0; i < n; i += W) {
            const vf x = load(a.data + i);
            store(a.data + i, x / one_and_power(x) * load(b.data + i));
        }
        narrow_row(a.data, n, at(out, type, row * n), type);
    }
}

// Gradients [rows, n] of gate and up from `change`, that of silu(gate) * up.
EXPORT(swiglu_backward)(const void* gate, const void* up, int64_t type, int64_t rows, int64_t n, int64_t stride,
                        const void* change, void* to_gate, void* to_up, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> a(n + W), b(n + W), c(n + W);
        widen_row(at(gate, type, row * stride), type, n, a.data);
        widen_row(at(up, type, row * stride), type, n, b.data);
        widen_row(at(change, type, row * n), type, n, c.data);
        for (int64_t i = 0; i < n; i += W) {
            const vf x = load(a.data + i), y = load(b.data + i), d = load(c.data + i);
            const vf sigmoid = splat(1.0f) / one_and_power(x);
            store(a.data + i, d * y * sigmoid * (splat(1.0f) + x * (splat(1.0f) - sigmoid)));
            store(b.data + i, d * x * sigmoid);
        }
        narrow_row(a.data, n, at(to_gate, type, row * n), type);
        narrow_row(b.data, n, at(to_up, type, row * n), type);
    }
}

// out [rows, n] in fp32 = log(sigmoid(x)) / divisor; x [rows, stride].
EXPORT(log_sigmoid)(const void* x, int64_t type, float divisor, int64_t rows, int64_t n, int64_t stride, float* out,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> wide(n + W);
        widen_row(at(x, type, row * stride), type, n, wide.data);
        for (int64_t i = 0; i < n; i++) {
            const float v = wide.data[i];
            out[row * n + i] = ((v < 0 ? v : 0) - log1pf(expf(v < 0 ? v : -v))) / divisor;
        }
    }
}

// x [rows, stride] holds heads of `width`; each pair (i, i + width / 2) of out [rows, heads, width] is turned by
// position * frequency[i] and multiplied by `factor` (rotary positions, arXiv 2104.09864).
EXPORT(rotary)(const void* x, int64_t type, const int64_t* positions, const float* frequencies, float factor,
               int64_t rows, int64_t heads, int64_t width, int64_t stride, void* out, int64_t threads) {
    const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        Buffer<float> wide(width + W), turned(width), cosine(half), sine(half);
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)positions[row] * frequencies[i];
            cosine.data[i] = cosf(angle) * factor;
            sine.data[i] = sinf(angle) * factor;
        }
        for (int64_t head = 0; head < heads; head++) {
            widen_row(at(x, type, row * stride + head * width), type, width, wide.data);
            const float *a = wide.data, *b = wide.data + half;
            for (int64_t i = 0; i < half; i++) {
                turned.data[i] = a[i] * cosine.data[i] - b[i] * sine.data[i];
                turned.data[half + i] = b[i] * cosine.data[i] + a[i] * sine.data[i];
            }
            narrow_row(turned.data, width, at(out, type, (row * heads + head) * width), type);
        }
    }
}

REPLAYED(add)
REPLAYED(relu)
REPLAYED(rms_norm)
REPLAYED(encode_adaptive)
REPLAYED(encode_dead_zone)
REPLAYED(swiglu)
REPLAYED(log_sigmoid)
REPLAYED(rotary)
REPLAYED(swiglu_backward)
