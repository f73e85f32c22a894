// Decode attention on the host: one query token per row against a KV cache in host memory.
//
// Softmax(scale * Q K^T + bias) V, read K and V once per KV head, accumulate in float32.
// Memory bandwidth is the limit for one query head per KV head, arithmetic for eight.
//
// Layouts (row-major, all on the host):
//   q, out     float32 [batch, kv_heads, group, head_dim]; `group` query heads share one KV head;
//              q is already multiplied by the softmax scale
//   k, v       [batch, kv_heads, capacity, head_dim] float32, bfloat16 or float16;
//              8 bits: one unsigned code a value; 4 bits: two codes a byte, where byte j of a group
//              of g values holds value j (low half) and value j + g/2 (high half)
//   scales     float16 [batch, kv_heads, capacity, head_dim / g, 2]: scale and minimum of a group;
//              value = scale * code + minimum
//   bias       float32 [batch or 1, heads or 1, tokens], added to the scores; strides in values
//   sinks      float32 [heads]: a score per head that takes part in the sum and has no value
//
// The vectors are GCC/Clang vector extensions, so the same text becomes AVX-512, AVX2, NEON or
// scalar code, whatever the compiler is told to use. Integer products have an x86 version.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr int HEADS = 4, VALUE_HEADS = 8;
#else
constexpr int W = 8;
constexpr int HEADS = 2, VALUE_HEADS = 4;
#endif
constexpr int BLOCK = 64;  // tokens between two updates of the running maximum
constexpr int MAX_DIM = 512, MAX_GROUPS = MAX_DIM / 16, ROWS = 8;
constexpr float MASKED = -1e30f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, vf value) { std::memcpy(to, &value, sizeof value); }
inline vf all(float value) { return value - vf{}; }
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 3); }

inline float half_to_float(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent == 0) {
        float value = std::ldexp((float)fraction, -24);
        return sign ? -value : value;
    }
    uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
#endif
}

// Element types of 16 and 32 bits: W of them as floats.
struct Float32 {
    using T = float;
    static vf get(const T* from) { return load<vf>(from); }
};
struct BFloat16 {
    using T = uint16_t;
    static vf get(const T* from) {
        vu wide = __builtin_convertvector(load<vh>(from), vu) << 16;
        return (vf)wide;
    }
};
struct Float16 {
    using T = uint16_t;
    static vf get(const T* from) {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
        vf value;
        for (int i = 0; i < W; i++) value[i] = half_to_float(from[i]);
        return value;
#endif
    }
};
// W codes of 8 bits as floats; of 4 bits, from the low or the high halves of W bytes.
#if defined(__AVX512F__)
inline vf widen(__m128i codes) { return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }
inline __m128i code_bytes(const void* from) { return _mm_loadu_si128((const __m128i*)from); }
#elif defined(__AVX2__)
inline vf widen(__m128i codes) { return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)); }
inline __m128i code_bytes(const void* from) { return _mm_loadl_epi64((const __m128i*)from); }
#endif
#if defined(__AVX2__)
inline vf codes_of_8(const void* from) { return widen(code_bytes(from)); }
inline vf codes_of_4(const void* from, bool high) {
    __m128i bytes = code_bytes(from);
    return widen(_mm_and_si128(high ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15)));
}
#else
inline vf widen(vb codes) {
    return __builtin_convertvector(__builtin_convertvector(codes, vi), vf);
}
inline vf codes_of_8(const void* from) { return widen(load<vb>(from)); }
inline vf codes_of_4(const void* from, bool high) {
    vb bytes = load<vb>(from);
    return widen(high ? bytes >> (uint8_t)4 : bytes & (uint8_t)15);
}
#endif

inline float sum(vf value) {
    float total = 0;
    for (int i = 0; i < W; i++) total += value[i];
    return total;
}
inline float largest(vf value) {
    float most = value[0];
    for (int i = 1; i < W; i++) most = std::max(most, value[i]);
    return most;
}
// Eight sums of vectors at once.
inline void sums8(const vf* value, float* to) {
#if defined(__AVX2__)
    __m256 a[8];
    for (int i = 0; i < 8; i++) {
#if defined(__AVX512F__)
        __m512 wide = (__m512)value[i];
        __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
        a[i] = _mm256_add_ps(_mm512_castps512_ps256(wide), high);
#else
        a[i] = (__m256)value[i];
#endif
    }
    __m256 b0 = _mm256_hadd_ps(a[0], a[1]), b1 = _mm256_hadd_ps(a[2], a[3]);
    __m256 b2 = _mm256_hadd_ps(a[4], a[5]), b3 = _mm256_hadd_ps(a[6], a[7]);
    b0 = _mm256_hadd_ps(b0, b1);
    b2 = _mm256_hadd_ps(b2, b3);
    __m256 low = _mm256_permute2f128_ps(b0, b2, 0x20), high = _mm256_permute2f128_ps(b0, b2, 0x31);
    _mm256_storeu_ps(to, _mm256_add_ps(low, high));
#else
    for (int i = 0; i < 8; i++) to[i] = sum(value[i]);
#endif
}

// exp(x) for x <= 0, relative error 2e-7. Coefficients: Cephes, expf.c.
inline vf exp_of(vf x) {
    const vf magic = all(12582912.f);
    x = x > -87.f ? x : all(-87.f);
    vf n = x * 1.44269504f + magic;
    n = n - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    vi exponent = __builtin_convertvector(n, vi) << 23;
    return (vf)((vi)p + exponent);
}

}  // namespace

extern "C" {
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BITS8 = 3, BITS4 = 4 };

struct Problem {
    const float* q;
    const void* k;
    const void* v;
    const uint16_t* k_scales;
    const uint16_t* v_scales;
    const float* bias;
    const float* sinks;
    float* out;
    int64_t batch, kv_heads, group, head_dim, value_dim, tokens, capacity;
    int64_t k_group, v_group;  // values that share a scale
    int64_t bias_batch_stride, bias_head_stride;
    int32_t k_kind, v_kind, threads;
    float softcap;  // 0: none
};
}

namespace {

int64_t row_bytes(int32_t kind, int64_t dim) {
    switch (kind) {
        case FLOAT32:
            return dim * 4;
        case BITS8:
            return dim;
        case BITS4:
            return dim / 2;
        default:
            return dim * 2;
    }
}

// Where the running softmax of one KV head's query heads stands.
struct State {
    int group, dim, value_dim;
    const float* q;          // [group][dim]
    const int16_t* q16;      // [group][dim], for codes
    const float* q16_scale;  // [group][dim / k_group]: q = q16 * q16_scale
    const float* q_sum;      // [group][dim / k_group]: sum of q over the group
    float* scores;           // [group][BLOCK]
    float* most;             // [group] running maximum
    float* total;            // [group] running sum of exponentials
    float* acc;              // [group][value_dim]
    float* minima;           // [group][value groups]: what the minima of quantised values add
};

struct Next {  // bytes to prefetch while this block is worked on, a share with every row
    const char* at;
    const char* end;
    inline void rows(int64_t bytes) {
        for (const char* stop = std::min(end, at + bytes); at < stop; at += 64) prefetch(at);
    }
};

// Scores of `n` tokens whose keys are floats.
template <class E, int DIM>
void score_floats(State& s, const char* keys, const uint16_t*, int, int n, Next next) {
    using T = typename E::T;
    const int dim = DIM ? DIM : s.dim;
    const T* k = (const T*)keys;
    const int64_t share = int64_t(dim) * sizeof(T);
    if (s.group == 1) {
        for (int t = 0; t < n; t += ROWS) {
            const T* row[ROWS];
            for (int i = 0; i < ROWS; i++) row[i] = k + (int64_t)std::min(t + i, n - 1) * dim;
            vf a[ROWS] = {};
            for (int d = 0; d < dim; d += W) {
                next.rows(share * ROWS * W / dim);
                vf q = load<vf>(s.q + d);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) a[i] += q * E::get(row[i] + d);
            }
            float eight[8];
            sums8(a, eight);
            std::memcpy(s.scores + t, eight, sizeof(float) * std::min(ROWS, n - t));
        }
        return;
    }
    alignas(64) float wide[4 * MAX_DIM];
    for (int t = 0; t < n; t += 4) {
        for (int i = 0; i < 4; i++) {
            const T* row = k + (int64_t)std::min(t + i, n - 1) * dim;
            for (int d = 0; d < dim; d += W) store(wide + i * dim + d, E::get(row + d));
        }
        next.rows(share * 4);
        int g = 0;
        for (; g + HEADS <= s.group; g += HEADS) {
            vf a[HEADS][4] = {};
            for (int d = 0; d < dim; d += W) {
                vf key[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) key[i] = load<vf>(wide + i * dim + d);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; h++) {
                    vf q = load<vf>(s.q + (int64_t)(g + h) * dim + d);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) a[h][i] += q * key[i];
                }
            }
            for (int h = 0; h < HEADS; h += 2) {
                float eight[8];
                sums8(&a[h][0], eight);
                for (int e = 0; e < 2; e++)
                    std::memcpy(s.scores + (g + h + e) * BLOCK + t, eight + 4 * e,
                                sizeof(float) * std::min(4, n - t));
            }
        }
        for (; g < s.group; g++) {
            vf a[4] = {};
            for (int d = 0; d < dim; d += W) {
                vf q = load<vf>(s.q + (int64_t)g * dim + d);
                for (int i = 0; i < 4; i++) a[i] += q * load<vf>(wide + i * dim + d);
            }
            for (int i = 0; i < std::min(4, n - t); i++) s.scores[g * BLOCK + t + i] = sum(a[i]);
        }
    }
}

// Sixteen codes as 16-bit numbers, times sixteen 16-bit queries, added to eight sums.
#if defined(__AVX2__)
typedef __m256i Products;
inline Products none() { return _mm256_setzero_si256(); }
inline Products multiply(Products sum, __m256i codes, const int16_t* q) {
    __m256i query = _mm256_loadu_si256((const __m256i*)q);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sum, codes, query);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, query));
#endif
}
inline vf as_floats(Products sum) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_zextsi256_si512(sum));
#else
    return (vf)_mm256_cvtepi32_ps(sum);
#endif
}
struct Codes8 {
    static constexpr int BYTES = 16;  // of sixteen codes
    template <int H>
    static void add(Products (&sum)[H], const uint8_t* codes, const int16_t* const (&q)[H], int at,
                    int) {
        __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
        for (int h = 0; h < H; h++) sum[h] = multiply(sum[h], wide, q[h] + at);
    }
};
struct Codes4 {  // sixteen bytes hold 32 codes: the low halves, then those `half` values further
    template <int H>
    static void add(Products (&sum)[H], const uint8_t* codes, const int16_t* const (&q)[H], int at,
                    int half) {
        __m128i bytes = _mm_loadu_si128((const __m128i*)codes);
        __m128i mask = _mm_set1_epi8(15);
        __m256i low = _mm256_cvtepu8_epi16(_mm_and_si128(bytes, mask));
        __m256i high = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
        for (int h = 0; h < H; h++) {
            sum[h] = multiply(sum[h], low, q[h] + at);
            sum[h] = multiply(sum[h], high, q[h] + at + half);
        }
    }
};
#else
typedef int32_t v8i __attribute__((vector_size(32)));
typedef v8i Products;
inline Products none() { return Products{}; }
inline vf as_floats(Products sum) { return __builtin_convertvector(sum, vf); }
inline void add_pair(Products& sum, int code, int16_t query, int i) { sum[i & 7] += code * query; }
struct Codes8 {
    template <int H>
    static void add(Products (&sum)[H], const uint8_t* codes, const int16_t* const (&q)[H], int at,
                    int) {
        for (int h = 0; h < H; h++)
            for (int i = 0; i < 16; i++) add_pair(sum[h], codes[i], q[h][at + i], i);
    }
};
struct Codes4 {
    template <int H>
    static void add(Products (&sum)[H], const uint8_t* codes, const int16_t* const (&q)[H], int at,
                    int half) {
        for (int h = 0; h < H; h++)
            for (int i = 0; i < 16; i++) {
                add_pair(sum[h], codes[i] & 15, q[h][at + i], i);
                add_pair(sum[h], codes[i] >> 4, q[h][at + half + i], i);
            }
    }
};
#endif

// Scores of H heads and R tokens whose keys are codes.
template <class C, bool FOUR, int H, int R>
inline void score_tile(State& s, const uint8_t* const (&row)[R], const uint16_t* const (&scale)[R],
                       int size, int g, float (&to)[H][R]) {
    const int groups = s.dim / size, width = FOUR ? size / 2 : size;
    vf a[H * R < 8 ? 8 : H * R] = {};
    float minima[H][R] = {};
    const int16_t* q[H];
    for (int h = 0; h < H; h++) q[h] = s.q16 + (int64_t)(g + h) * s.dim;
    for (int part = 0; part < groups; part++) {
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            Products sum[H];
            for (int h = 0; h < H; h++) sum[h] = none();
            for (int at = 0; at < width; at += 16)
                C::add(sum, row[i] + part * width + at, q, part * size + at, size / 2);
            const float by = half_to_float(scale[i][2 * part]),
                        least = half_to_float(scale[i][2 * part + 1]);
            for (int h = 0; h < H; h++) {
                a[h * R + i] += as_floats(sum[h]) * all(by * s.q16_scale[(g + h) * groups + part]);
                minima[h][i] += least * s.q_sum[(g + h) * groups + part];
            }
        }
    }
    float eight[(H * R < 8 ? 8 : H * R)];
    for (int from = 0; from < H * R; from += 8) sums8(a + from, eight + from);
    for (int h = 0; h < H; h++)
        for (int i = 0; i < R; i++) to[h][i] = eight[h * R + i] + minima[h][i];
}

template <class C, bool FOUR>
void score_codes(State& s, const char* keys, const uint16_t* scales, int size, int n, Next next) {
    const uint8_t* k = (const uint8_t*)keys;
    const int64_t bytes = FOUR ? s.dim / 2 : s.dim, pairs = 2 * (s.dim / size);
    if (s.group == 1) {
        for (int t = 0; t < n; t += ROWS) {
            const uint8_t* row[ROWS];
            const uint16_t* scale[ROWS];
            for (int i = 0; i < ROWS; i++) {
                int token = std::min(t + i, n - 1);
                row[i] = k + token * bytes;
                scale[i] = scales + token * pairs;
            }
            next.rows(bytes * ROWS);
            float to[1][ROWS];
            score_tile<C, FOUR, 1, ROWS>(s, row, scale, size, 0, to);
            std::memcpy(s.scores + t, to, sizeof(float) * std::min(ROWS, n - t));
        }
        return;
    }
    for (int t = 0; t < n; t += 4) {
        const uint8_t* row[4];
        const uint16_t* scale[4];
        for (int i = 0; i < 4; i++) {
            int token = std::min(t + i, n - 1);
            row[i] = k + token * bytes;
            scale[i] = scales + token * pairs;
        }
        next.rows(bytes * 4);
        int g = 0;
        for (; g + 2 <= s.group; g += 2) {
            float to[2][4];
            score_tile<C, FOUR, 2, 4>(s, row, scale, size, g, to);
            for (int h = 0; h < 2; h++)
                std::memcpy(s.scores + (g + h) * BLOCK + t, to[h],
                            sizeof(float) * std::min(4, n - t));
        }
        if (g < s.group) {
            float to[1][4];
            score_tile<C, FOUR, 1, 4>(s, row, scale, size, g, to);
            std::memcpy(s.scores + g * BLOCK + t, to[0], sizeof(float) * std::min(4, n - t));
        }
    }
}

// Values: rows of floats, or codes of W values at `d` with the scale of their group.
template <class E>
struct FloatValues {
    using T = typename E::T;
    static vf get(const char* row, int, int d, int, int) { return E::get((const T*)row + d); }
};
struct Values8 {
    static vf get(const char* row, int, int d, int, int) { return codes_of_8(row + d); }
};
struct Values4 {
    static vf get(const char* row, int part, int d, int size, int) {
        const int at = d - part * size, half = size / 2;
        const char* bytes = row + part * half;
        return at < half ? codes_of_4(bytes + at, false) : codes_of_4(bytes + at - half, true);
    }
};

// acc[g .. g + H) += p V over n tokens, for the columns of `size` values that share weights p.
template <class V, int H>
inline void add_values(State& s, const char* values, int64_t bytes, int n, int g, int part,
                       int size, const float* p, int stride, Next& next, int64_t share) {
    const int first = part * size, last = std::min(s.value_dim, first + size);
    int d = first;
    for (; d + 2 * W <= last; d += 2 * W) {
        vf a[H][2];
        for (int h = 0; h < H; h++)
            for (int e = 0; e < 2; e++)
                a[h][e] = load<vf>(s.acc + (int64_t)(g + h) * s.value_dim + d + e * W);
        for (int t = 0; t < n; t += 4) {
            next.rows(share);
            const int stop = std::min(n, t + 4);
            for (int u = t; u < stop; u++) {
                const char* row = values + u * bytes;
                vf x = V::get(row, part, d, size, 0), y = V::get(row, part, d + W, size, 0);
#pragma GCC unroll 8
                for (int h = 0; h < H; h++) {
                    vf w = all(p[h * stride + u]);
                    a[h][0] += w * x;
                    a[h][1] += w * y;
                }
            }
        }
        for (int h = 0; h < H; h++)
            for (int e = 0; e < 2; e++)
                store(s.acc + (int64_t)(g + h) * s.value_dim + d + e * W, a[h][e]);
    }
    for (; d < last; d += W)
        for (int h = 0; h < H; h++) {
            vf a = load<vf>(s.acc + (int64_t)(g + h) * s.value_dim + d);
            for (int u = 0; u < n; u++)
                a += all(p[h * stride + u]) * V::get(values + u * bytes, part, d, size, 0);
            store(s.acc + (int64_t)(g + h) * s.value_dim + d, a);
        }
}

// One query head: eight rows at a time go through all columns, in the order in which they lie.
template <class V>
inline void add_rows(State& s, const char* values, int64_t bytes, int n, int part, int size,
                     const float* p, Next& next, int64_t share) {
    const int first = part * size, last = std::min(s.value_dim, first + size);
    for (int t = 0; t < n; t += ROWS) {
        const char* row[ROWS];
        vf w[ROWS];
        for (int i = 0; i < ROWS; i++) {
            row[i] = values + (int64_t)std::min(t + i, n - 1) * bytes;
            w[i] = all(t + i < n ? p[t + i] : 0.f);
        }
        for (int d = first; d < last; d += W) {
            next.rows(share * W);
            vf a = load<vf>(s.acc + d), b = {};
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i += 2) {
                a += w[i] * V::get(row[i], part, d, size, 0);
                b += w[i + 1] * V::get(row[i + 1], part, d, size, 0);
            }
            store(s.acc + d, a + b);
        }
    }
}

template <class V>
void values_of(State& s, const char* values, const uint16_t* scales, int size, int64_t bytes, int n,
               Next next) {
    const bool codes = scales != nullptr;
    const int parts = codes ? s.value_dim / size : 1;
    const int width = codes ? size : s.value_dim;
    const int64_t left = next.end - next.at;
    alignas(64) float weighted[VALUE_HEADS * BLOCK];
    for (int g = 0; g < s.group;) {
        const int heads = s.group - g >= VALUE_HEADS ? VALUE_HEADS
                          : s.group - g >= 4         ? 4
                          : s.group - g >= 2         ? 2
                                                     : 1;
        for (int part = 0; part < parts; part++) {
            const float* p = s.scores + g * BLOCK;
            if (codes) {
                float by[BLOCK], least[BLOCK];
                for (int t = 0; t < n; t++) {
                    by[t] = half_to_float(scales[(t * parts + part) * 2]);
                    least[t] = half_to_float(scales[(t * parts + part) * 2 + 1]);
                }
                for (int h = 0; h < heads; h++) {
                    float sum = 0;
                    for (int t = 0; t < n; t++) {
                        weighted[h * BLOCK + t] = p[h * BLOCK + t] * by[t];
                        sum += p[h * BLOCK + t] * least[t];
                    }
                    s.minima[(g + h) * parts + part] += sum;
                }
                p = weighted;
            }
            if (s.group == 1) {
                add_rows<V>(s, values, bytes, n, part, width, p, next,
                            left / std::max(1, n * s.value_dim / ROWS) + 1);
                continue;
            }
            const int64_t share =
                left * 8 * W / std::max<int64_t>(1, (int64_t)n * s.value_dim * s.group / heads) + 1;
            switch (heads) {
#if defined(__AVX512F__)
                case 8:
                    add_values<V, 8>(s, values, bytes, n, g, part, width, p, BLOCK, next, share);
                    break;
#endif
                case 4:
                    add_values<V, 4>(s, values, bytes, n, g, part, width, p, BLOCK, next, share);
                    break;
                case 2:
                    add_values<V, 2>(s, values, bytes, n, g, part, width, p, BLOCK, next, share);
                    break;
                default:
                    add_values<V, 1>(s, values, bytes, n, g, part, width, p, BLOCK, next, share);
            }
        }
        g += heads;
    }
}

using ScoreBlock = void (*)(State&, const char*, const uint16_t*, int, int, Next);
using ValueBlock = void (*)(State&, const char*, const uint16_t*, int, int64_t, int, Next);

template <int DIM>
ScoreBlock score_of(int32_t kind) {
    switch (kind) {
        case FLOAT32:
            return score_floats<Float32, DIM>;
        case BFLOAT16:
            return score_floats<BFloat16, DIM>;
        case FLOAT16:
            return score_floats<Float16, DIM>;
        case BITS8:
            return score_codes<Codes8, false>;
        default:
            return score_codes<Codes4, true>;
    }
}
ScoreBlock score_of(int32_t kind, int64_t dim) {
    return dim == 128 ? score_of<128>(kind) : dim == 64 ? score_of<64>(kind) : score_of<0>(kind);
}
ValueBlock value_of(int32_t kind) {
    switch (kind) {
        case FLOAT32:
            return values_of<FloatValues<Float32>>;
        case BFLOAT16:
            return values_of<FloatValues<BFloat16>>;
        case FLOAT16:
            return values_of<FloatValues<Float16>>;
        case BITS8:
            return values_of<Values8>;
        default:
            return values_of<Values4>;
    }
}

// Bias, softcap and the running softmax of one block: scores become weights.
void soften(State& s, const Problem& p, int64_t row, int64_t head, int64_t from, int n) {
    const int padded = (n + W - 1) / W * W;
    for (int g = 0; g < s.group; g++) {
        float* score = s.scores + g * BLOCK;
        if (p.softcap > 0)
            for (int t = 0; t < n; t++) score[t] = p.softcap * std::tanh(score[t] / p.softcap);
        if (p.bias) {
            const float* bias =
                p.bias + row * p.bias_batch_stride + (head + g) * p.bias_head_stride + from;
            for (int t = 0; t < n; t++) score[t] = std::max(score[t] + bias[t], MASKED);
        }
        for (int t = n; t < padded; t++) score[t] = -INFINITY;
        vf most = all(s.most[g]);
        for (int t = 0; t < padded; t += W) {
            vf x = load<vf>(score + t);
            most = x > most ? x : most;
        }
        const float now = largest(most), kept = s.most[g] == now ? 1.f : std::exp(s.most[g] - now);
        vf total = {};
        for (int t = 0; t < padded; t += W) {
            vf x = load<vf>(score + t);
            vf weight = x > -INFINITY ? exp_of(x - now) : vf{};
            total += weight;
            store(score + t, weight);
        }
        s.total[g] = s.total[g] * kept + sum(total);
        s.most[g] = now;
        if (kept == 1.f) continue;
        for (int d = 0; d < s.value_dim; d += W) {
            float* acc = s.acc + (int64_t)g * s.value_dim + d;
            store(acc, load<vf>(acc) * kept);
        }
        const int parts = p.v_scales ? s.value_dim / p.v_group : 0;
        for (int part = 0; part < parts; part++) s.minima[g * parts + part] *= kept;
    }
}

// Attention of one KV head of one row over the tokens [from, to). State is left in acc, most,
// total.
void attend(const Problem& p, int64_t item, int64_t from, int64_t to, State& s) {
    const int64_t row = item / p.kv_heads, head = item % p.kv_heads * p.group;
    const int64_t k_bytes = row_bytes(p.k_kind, p.head_dim),
                  v_bytes = row_bytes(p.v_kind, p.value_dim);
    const char* k = (const char*)p.k + item * p.capacity * k_bytes;
    const char* v = (const char*)p.v + item * p.capacity * v_bytes;
    const int64_t k_pairs = p.k_scales ? 2 * p.head_dim / p.k_group : 0,
                  v_pairs = p.v_scales ? 2 * p.value_dim / p.v_group : 0;
    const uint16_t* ks = p.k_scales ? p.k_scales + item * p.capacity * k_pairs : nullptr;
    const uint16_t* vs = p.v_scales ? p.v_scales + item * p.capacity * v_pairs : nullptr;
    const ScoreBlock score = score_of(p.k_kind, p.head_dim);
    const ValueBlock add = value_of(p.v_kind);
    for (int64_t t = from; t < to; t += BLOCK) {
        const int n = (int)std::min<int64_t>(BLOCK, to - t);
        const int64_t after = std::min(to, t + n + BLOCK);
        const char* values = v + t * v_bytes;
        score(s, k + t * k_bytes, ks ? ks + t * k_pairs : nullptr, (int)p.k_group, n,
              Next{values, values + n * v_bytes});
        soften(s, p, row, head, t, n);
        add(s, values, vs ? vs + t * v_pairs : nullptr, (int)p.v_group, v_bytes, n,
            Next{k + (t + n) * k_bytes, k + after * k_bytes});
    }
}

// Memory of one thread's work.
struct Workspace {
    std::vector<float> floats;
    std::vector<int16_t> codes;
    State state;

    explicit Workspace(const Problem& p) {
        const int64_t g = p.group, k_groups = p.k_scales ? p.head_dim / p.k_group : 0,
                      v_groups = p.v_scales ? p.value_dim / p.v_group : 0;
        floats.resize(g * (p.head_dim + BLOCK + W + 2 + p.value_dim + 2 * k_groups + v_groups) +
                      2 * W);
        codes.resize(k_groups ? g * p.head_dim + 32 : 0);
        float* at = floats.data();
        auto take = [&](int64_t count) {
            float* here = at;
            at += count;
            return here;
        };
        state =
            State{(int)p.group, (int)p.head_dim, (int)p.value_dim, nullptr, codes.data(), nullptr,
                  nullptr,      nullptr,         nullptr,          nullptr, nullptr,      nullptr};
        state.scores = take(g * BLOCK);
        state.acc = take(g * p.value_dim);
        state.most = take(g);
        state.total = take(g);
        state.minima = take(g * v_groups);
        q16_scale = take(g * k_groups);
        q_sum = take(g * k_groups);
        state.q16_scale = q16_scale;
        state.q_sum = q_sum;
    }
    float *q16_scale, *q_sum;

    // Begin one KV head: its queries, as 16-bit numbers too where keys are codes.
    void begin(const Problem& p, int64_t item) {
        const float* q = p.q + item * p.group * p.head_dim;
        state.q = q;
        for (int64_t g = 0; g < p.group; g++) {
            state.most[g] = -INFINITY;
            state.total[g] = 0;
        }
        std::fill_n(state.acc, p.group * p.value_dim, 0.f);
        if (p.v_scales) std::fill_n(state.minima, p.group * (p.value_dim / p.v_group), 0.f);
        if (!p.k_scales) return;
        const int64_t groups = p.head_dim / p.k_group;
        for (int64_t part = 0; part < p.group * groups; part++) {
            const float* from = q + part * p.k_group;
            float most = 1e-30f, sum = 0;
            for (int64_t i = 0; i < p.k_group; i++) {
                most = std::max(most, std::fabs(from[i]));
                sum += from[i];
            }
            q16_scale[part] = most / 32767.f;
            q_sum[part] = sum;
            for (int64_t i = 0; i < p.k_group; i++)
                codes[part * p.k_group + i] = (int16_t)std::lrintf(from[i] * (32767.f / most));
        }
    }

    // Fold the minima of quantised values into acc.
    void finish(const Problem& p) {
        if (!p.v_scales) return;
        const int64_t groups = p.value_dim / p.v_group;
        for (int64_t g = 0; g < p.group; g++)
            for (int64_t d = 0; d < p.value_dim; d++)
                state.acc[g * p.value_dim + d] += state.minima[g * groups + d / p.v_group];
    }
};

// Either half of attention alone, for one query head per item.
// Rows are [items][stride rows][dim]. Scores: out [items][tokens] = rows times q [items][dim].
template <bool SCORES>
void half_of(int32_t kind, const float* in, const char* rows, float* out, int64_t items,
             int64_t dim, int64_t tokens, int64_t stride, int32_t threads) {
    const int64_t bytes = row_bytes(kind, dim);
    const ScoreBlock score = score_of(kind, dim);
    const ValueBlock add = value_of(kind);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
        alignas(64) float block[BLOCK];
        State s{};
        s.group = 1;
        s.dim = s.value_dim = (int)dim;
        s.scores = block;
        s.q = in + item * dim;
        s.acc = out + item * dim;
        if (!SCORES) std::fill_n(s.acc, dim, 0.f);
        const char* from = rows + item * stride * bytes;
        for (int64_t t = 0; t < tokens; t += BLOCK) {
            const int n = (int)std::min<int64_t>(BLOCK, tokens - t);
            const char* after = from + (t + n) * bytes;
            const Next next{after, after + std::min<int64_t>(BLOCK, tokens - t - n) * bytes};
            if (SCORES) {
                score(s, from + t * bytes, nullptr, 0, n, next);
                std::memcpy(out + item * tokens + t, block, sizeof(float) * n);
            } else {
                std::memcpy(block, in + item * tokens + t, sizeof(float) * n);
                add(s, from + t * bytes, nullptr, 0, bytes, n, next);
            }
        }
    }
}

}  // namespace

// Scores (1) of one query per item against rows of floats, or the sum (0) of rows by weights.
extern "C" int32_t zinfer_attention_half(int32_t scores, int32_t kind, const float* in,
                                         const void* rows, float* out, int64_t items, int64_t dim,
                                         int64_t tokens, int64_t stride, int32_t threads) {
    if (dim % 16 || dim > MAX_DIM || kind > FLOAT16) return 1;
    (scores ? half_of<true> : half_of<false>)(kind, in, (const char*)rows, out, items, dim, tokens,
                                              stride, threads);
    return 0;
}

extern "C" int32_t zinfer_vector_bits() {
#if defined(__AVX512F__)
    return 512;
#elif defined(__AVX2__)
    return 256;
#elif defined(__ARM_NEON)
    return 128;
#else
    return 0;
#endif
}

// Returns 0, or 1 where a size is not supported.
extern "C" int32_t zinfer_decode_attention(const Problem* problem) {
    const Problem& p = *problem;
    if (p.head_dim % 16 || p.value_dim % 16 || p.head_dim > MAX_DIM || p.value_dim > MAX_DIM ||
        p.tokens < 1)
        return 1;
    for (int keys = 0; keys < 2; keys++) {
        const int32_t kind = keys ? p.k_kind : p.v_kind;
        const int64_t size = keys ? p.k_group : p.v_group, dim = keys ? p.head_dim : p.value_dim;
        if (kind == BITS8 && (size % 16 || dim % size)) return 1;
        if (kind == BITS4 && (size % 32 || dim % size)) return 1;
    }
    const int64_t items = p.batch * p.kv_heads;
    const int64_t wanted = (4 * p.threads + items - 1) / items, longest = (p.tokens + 255) / 256;
    const int64_t splits =
        items >= 4 * p.threads ? 1 : std::max<int64_t>(1, std::min(wanted, longest));
    const int64_t each = (p.tokens + splits - 1) / splits, heads = p.kv_heads * p.group;
    std::vector<float> partial(splits > 1 ? items * splits * p.group * (p.value_dim + 2) : 0);

    // `most` and `total` with the sink's score, and the values divided by the sum.
    auto write = [&](int64_t item, int64_t g, const float* acc, float most, float total) {
        float* out = p.out + (item * p.group + g) * p.value_dim;
        float scale = 1.f;
        if (p.sinks) {
            const float sink = p.sinks[(item * p.group + g) % heads], now = std::max(most, sink);
            scale = std::exp(most - now);
            total = total * scale + std::exp(sink - now);
        }
        for (int64_t d = 0; d < p.value_dim; d++) out[d] = acc[d] * scale / total;
    };

#pragma omp parallel num_threads(p.threads)
    {
        Workspace work(p);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < items * splits; unit++) {
            const int64_t item = unit / splits, from = unit % splits * each,
                          to = std::min(p.tokens, from + each);
            work.begin(p, item);
            if (from < to) attend(p, item, from, to, work.state);
            work.finish(p);
            for (int64_t g = 0; g < p.group; g++) {
                const float* acc = work.state.acc + g * p.value_dim;
                if (splits == 1) {
                    write(item, g, acc, work.state.most[g], work.state.total[g]);
                    continue;
                }
                float* to_here = partial.data() + (unit * p.group + g) * (p.value_dim + 2);
                to_here[0] = work.state.most[g];
                to_here[1] = work.state.total[g];
                std::memcpy(to_here + 2, acc, sizeof(float) * p.value_dim);
            }
        }
    }
    if (splits == 1) return 0;
    std::vector<float> acc(p.value_dim);
    for (int64_t item = 0; item < items; item++)
        for (int64_t g = 0; g < p.group; g++) {
            auto part = [&](int64_t split) {
                return partial.data() + ((item * splits + split) * p.group + g) * (p.value_dim + 2);
            };
            float most = -INFINITY, total = 0;
            for (int64_t split = 0; split < splits; split++) most = std::max(most, part(split)[0]);
            std::fill(acc.begin(), acc.end(), 0.f);
            for (int64_t split = 0; split < splits; split++) {
                const float scale = std::exp(part(split)[0] - most);
                total += part(split)[1] * scale;
                for (int64_t d = 0; d < p.value_dim; d++) acc[d] += part(split)[2 + d] * scale;
            }
            write(item, g, acc.data(), most, total);
        }
    return 0;
}
