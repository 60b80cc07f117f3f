// Vectors of W floats, and the few operations that differ between instruction sets.
//
// Every kernel file is compiled once a level (-DLEVEL=baseline|avx2|avx512) with that level's flags. All functions here
// are of one file: a copy compiled for a wider instruction set must never be the one the linker keeps for a narrower one.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif

#define JOIN3(a, b, c) a##_##b##_##c
#define SYMBOL(level, name) JOIN3(sb, level, name)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void SYMBOL(LEVEL, name)

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

enum Type { F32 = 0, BF16 = 1, I16 = 2 };

struct bf16 {
    uint16_t bits;
};

// Minus zero changes no value, so that no instruction is left of it; adding zero would turn -0 to 0.
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return vi{} + x; }

static inline vf load(const float* p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline vi load_int(const int32_t* p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline vi load_int(const int16_t* p) {
    int16_t part __attribute__((vector_size(2 * W)));
    memcpy(&part, p, sizeof part);
    return __builtin_convertvector(part, vi);
}

static inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
static inline void store_int(int32_t* p, vi x) { memcpy(p, &x, sizeof x); }

// Whole numbers that fit in a byte.
static inline void store(int8_t* p, vi x) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
    const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    const __m128i shorts = _mm_packs_epi32(low, high);
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(shorts, shorts));
#else
    for (int i = 0; i < W; i++) p[i] = (int8_t)x[i];
#endif
}

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// Round to nearest even; a NaN stays one.
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {(uint16_t)((bits >> 16) | 0x40)};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return (vf)_mm512_slli_epi32(x, 16);
#elif defined(__AVX2__)
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return (vf)_mm256_slli_epi32(x, 16);
#else
    vf x;
    for (int i = 0; i < W; i++) x[i] = widen(p[i]);
    return x;
#endif
}

static inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf x;
    for (int i = 0; i < W; i++) x[i] = (float)p[i];
    return x;
#endif
}

static inline void store(bf16* p, vf x) {
    typedef uint32_t vu __attribute__((vector_size(4 * W)));
    typedef uint16_t vh __attribute__((vector_size(2 * W)));
    const vu all = (vu)x, rounded = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
    const vh half = __builtin_convertvector(x == x ? rounded : (all >> 16) | 0x40, vh);
    memcpy(p, &half, sizeof half);
}

// The first n elements, and zeros.
template <class T>
static inline vf load_part(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T part[W] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T>
static inline void store_part(T* p, vf x, int64_t n) {
    if (n >= W) return store(p, x);
    T part[W];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

// n elements as fp32, followed by zeros up to the next multiple of W.
template <class T>
static inline void widen_row(const T* x, int64_t n, float* wide) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(wide + i, load(x + i));
    if (i < n) store(wide + i, load_part(x + i, n - i));
}

static inline void widen_row(const void* x, int64_t type, int64_t n, float* wide) {
    if (type == F32)
        widen_row((const float*)x, n, wide);
    else
        widen_row((const bf16*)x, n, wide);
}

template <class T>
static inline T* at(T* base, int64_t type, int64_t element) {
    return (T*)((char*)base + element * (type == F32 ? 4 : 2));
}

static inline void store_part(void* out, int64_t type, vf x, int64_t n) {
    if (type == F32)
        store_part((float*)out, x, n);
    else
        store_part((bf16*)out, x, n);
}

static inline void narrow_row(const float* x, int64_t n, void* out, int64_t type) {
    for (int64_t i = 0; i < n; i += W) store_part(at(out, type, i), type, load_part(x + i, n - i), n - i);
}

// An input with a row for each token.
struct Tensor {
    const void* data;
    int64_t type, stride;  // elements from token to token
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether any lane of a comparison is true.
static inline bool any(vi x) {
    int either = 0;
    for (int i = 0; i < W; i++) either |= x[i];
    return either;
}

static inline int64_t sum(vi x) {
    int64_t total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// acc += products of int16 pairs, summed in pairs.
static inline vi dot_pairs(vi acc, vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const int16_t *x = (const int16_t*)&a, *y = (const int16_t*)&b;
    for (int i = 0; i < W; i++) acc[i] += (int32_t)x[2 * i] * y[2 * i] + (int32_t)x[2 * i + 1] * y[2 * i + 1];
    return acc;
#endif
}

typedef int8_t vbytes __attribute__((vector_size(4 * W)));
typedef int16_t vshorts __attribute__((vector_size(4 * W)));

// Products of pairs of bytes, summed in pairs, which have to fit in 16 bits.
static inline vshorts dot_bytes(vbytes a, vbytes b) {
#if defined(__AVX512F__)
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)a);
    const __m512i turned = _mm512_mask_sub_epi8((__m512i)b, negative, _mm512_setzero_si512(), (__m512i)b);
    return (vshorts)_mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)a), turned);
#elif defined(__AVX2__)
    return (vshorts)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a), _mm256_sign_epi8((__m256i)b, (__m256i)a));
#else
    const vshorts x = (vshorts)a, y = (vshorts)b;
    return ((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
#endif
}

// Two rows of 2W int8 as 2W pairs of int16, in an order of lanes that `in_order` undoes.
static inline void interleave(const int8_t* a, const int8_t* b, vi* low, vi* high) {
#if defined(__AVX512F__)
    __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)a));
    __m512i y = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)b));
    *low = (vi)_mm512_unpacklo_epi16(x, y);
    *high = (vi)_mm512_unpackhi_epi16(x, y);
#elif defined(__AVX2__)
    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)a));
    __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)b));
    *low = (vi)_mm256_unpacklo_epi16(x, y);
    *high = (vi)_mm256_unpackhi_epi16(x, y);
#else
    int16_t pairs[4 * W];
    for (int i = 0; i < 2 * W; i++) {
        pairs[2 * i] = a[i];
        pairs[2 * i + 1] = b[i];
    }
    memcpy(low, pairs, sizeof *low);
    memcpy(high, pairs + 2 * W, sizeof *high);
#endif
}

static inline void in_order(vi low, vi high, vi* first, vi* second) {
#if defined(__AVX512F__)
    const __m512i one = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i two = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    *first = (vi)_mm512_permutex2var_epi32((__m512i)low, one, (__m512i)high);
    *second = (vi)_mm512_permutex2var_epi32((__m512i)low, two, (__m512i)high);
#elif defined(__AVX2__)
    *first = (vi)_mm256_permute2x128_si256((__m256i)low, (__m256i)high, 0x20);
    *second = (vi)_mm256_permute2x128_si256((__m256i)low, (__m256i)high, 0x31);
#else
    *first = low;
    *second = high;
#endif
}

#if defined(__AVX512F__)
#define VECTOR(name) _mm512_##name
typedef __m512i bits;
typedef __m512 floats;
#elif defined(__AVX2__)
#define VECTOR(name) _mm256_##name
typedef __m256i bits;
typedef __m256 floats;
#elif defined(__SSE2__)
#define VECTOR(name) _mm_##name
typedef __m128i bits;
typedef __m128 floats;
#endif

// Two rows of 4W bytes as pairs, in an order of lanes that `in_order` undoes for their sums.
static inline void interleave(const int8_t* a, const int8_t* b, vbytes* low, vbytes* high) {
    vbytes x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
#if defined(__SSE2__)
    *low = (vbytes)VECTOR(unpacklo_epi8)((bits)x, (bits)y);
    *high = (vbytes)VECTOR(unpackhi_epi8)((bits)x, (bits)y);
#else
    for (int i = 0; i < 2 * W; i++) {
        (*low)[2 * i] = x[i], (*low)[2 * i + 1] = y[i];
        (*high)[2 * i] = x[2 * W + i], (*high)[2 * i + 1] = y[2 * W + i];
    }
#endif
}

#if defined(__SSE2__)
// Four elements of every fourth of W rows, a lane of 128 bits each.
static inline auto every_fourth(const float* rows, int64_t stride) {
#if defined(__AVX512F__)
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(rows));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows + 4 * stride), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(rows + 8 * stride), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(rows + 12 * stride), 3);
#elif defined(__AVX2__)
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(rows));
    return _mm256_insertf128_ps(x, _mm_loadu_ps(rows + 4 * stride), 1);
#else
    return _mm_loadu_ps(rows);
#endif
}
#endif

// The first four columns of W rows that lie `stride` apart. The bits of an element do not matter.
static inline void four_columns(const float* rows, int64_t stride, vf* columns) {
#if defined(__SSE2__)
    const auto a = every_fourth(rows, stride), b = every_fourth(rows + stride, stride);
    const auto c = every_fourth(rows + 2 * stride, stride), d = every_fourth(rows + 3 * stride, stride);
    const auto ab = VECTOR(castps_pd)(VECTOR(unpacklo_ps)(a, b)), AB = VECTOR(castps_pd)(VECTOR(unpackhi_ps)(a, b));
    const auto cd = VECTOR(castps_pd)(VECTOR(unpacklo_ps)(c, d)), CD = VECTOR(castps_pd)(VECTOR(unpackhi_ps)(c, d));
    columns[0] = (vf)VECTOR(unpacklo_pd)(ab, cd);
    columns[1] = (vf)VECTOR(unpackhi_pd)(ab, cd);
    columns[2] = (vf)VECTOR(unpacklo_pd)(AB, CD);
    columns[3] = (vf)VECTOR(unpackhi_pd)(AB, CD);
#else
    for (int64_t i = 0; i < 4; i++)
        for (int64_t j = 0; j < W; j++) columns[i][j] = rows[j * stride + i];
#endif
}

// Lane i is lane i + half, as far as there is one.
static inline vf shifted(vf x, int half) {
#if defined(__AVX512F__)
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(half)), (__m512)x);
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm256_permutevar8x32_ps((__m256)x, _mm256_add_epi32(lane, _mm256_set1_epi32(half)));
#else
    vf y = x;
    for (int i = 0; i + half < W; i++) y[i] = x[i + half];
    return y;
#endif
}

static inline float sum(vf x) {
    for (int half = W / 2; half; half /= 2) x += shifted(x, half);
    return x[0];
}

// The largest element; a NaN where there is any.
static inline float largest(vf x) {
    for (int half = W / 2; half; half /= 2) {
        const vf y = shifted(x, half);
        x = (y > x) | (y != y) ? y : x;
    }
    return x[0];
}

// The larger, or smaller, of a number and x; a NaN stays one.
static inline vf at_least(float least, vf x) {
#if defined(__SSE2__)
    return (vf)VECTOR(max_ps)((floats)splat(least), (floats)x);
#else
    return x < splat(least) ? splat(least) : x;
#endif
}

static inline vf at_most(float most, vf x) {
#if defined(__SSE2__)
    return (vf)VECTOR(min_ps)((floats)splat(most), (floats)x);
#else
    return x > splat(most) ? splat(most) : x;
#endif
}

// e^x within 2 ulp between -87 and 88 and clamped outside, so that it is never 0 or infinite; NaN stays NaN.
static inline vf exponential(vf x) {
    x = at_most(88.3f, at_least(-87.3f, x));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which is in the last bits
    const vf shifted = fma(x, splat(1.44269504f), magic), n = shifted - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return p * (vf)(((vi)shifted + 127) << 23);
}

namespace {

// What a thread's buffers lie in, one on another, as they end in the opposite order of their beginning.
struct Arena {
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t SIZE = 0;  // each buffer alone, so that its bounds are seen
#else
    static constexpr size_t SIZE = 256 << 10;
#endif
    char* memory = nullptr;
    size_t used = 0;

    ~Arena() { free(memory); }
    static void* allocate(size_t bytes) {
        void* memory = aligned_alloc(64, bytes);
        if (!memory) abort();
        return memory;
    }
    void* take(size_t bytes) {
        if (!memory) memory = (char*)allocate(SIZE);
        used += bytes;
        return memory + used - bytes;
    }
};
thread_local Arena arena;

// Memory aligned to a cache line that is freed at the end of the block.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count)
        : bytes(((size_t)(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64), own(bytes > Arena::SIZE - arena.used) {
        data = (T*)(own ? Arena::allocate(bytes) : arena.take(bytes));
    }
    ~Buffer() {
        if (own)
            free(data);
        else
            arena.used -= bytes;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

   private:
    const size_t bytes;
    const bool own;
};

// An argument of a call that is made again; see `sb_replay`.
union Word {
    int64_t whole;
    double real;

    template <class T>
    T to() const {
        if constexpr (std::is_floating_point_v<T>)
            return (T)real;
        else
            return (T)whole;
    }
};

template <class... Args, size_t... Place>
void call_with(void (*function)(Args...), const Word* words, std::index_sequence<Place...>) {
    function(words[Place].to<Args>()...);
}

template <class... Args>
void call_with(void (*function)(Args...), const Word* words) {
    call_with(function, words, std::index_sequence_for<Args...>());
}

}  // namespace

// A function beside an exported one that takes its arguments as words.
#define REPLAYED(name) \
    EXPORT(name##_replayed)(const Word* words) { call_with(SYMBOL(LEVEL, name), words); }
