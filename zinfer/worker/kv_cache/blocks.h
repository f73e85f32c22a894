// One block of tokens for one KV head: scores of its keys, and weights times its values.
//
// This code serves every processor and every size. blocks_avx512.h has faster code for some.
#pragma once

#include "vectors.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BITS8 = 3, BITS4 = 4 };

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
    int group = 0, dim = 0, value_dim = 0;
    const float* q = nullptr;          // [group][dim]
    const int16_t* q16 = nullptr;      // [group][dim], for codes
    const float* q16_scale = nullptr;  // [group][dim / k_group]: q = q16 * q16_scale
    const float* q_sum = nullptr;      // [group][dim / k_group]: sum of q over the group
    const int8_t* q8 = nullptr;        // [group][2][dim]: high bytes, low bytes of q
    const int8_t* q_spread = nullptr;  // of one head, in the order of its products
    const float* q8_scale = nullptr;   // [group]
    const float* q_least = nullptr;    // [group][8][2]: what scales and minima are multiplied with
    const uint16_t* qb = nullptr;      // [group][dim] in bfloat16
    float* scores = nullptr;           // [group][BLOCK]; anything behind a block's tokens
    float* most = nullptr;             // [group] running maximum
    float* total = nullptr;            // [group] running sum of exponentials
    float* acc = nullptr;              // [group][value_dim]
    float* minima = nullptr;           // [group][value groups]: what minima of values add
};

struct Next {  // bytes to prefetch while this block is worked on, a share with every row
    const char* at;
    const char* end;
    inline void rows(int64_t bytes) {
        for (const char* stop = std::min(end, at + bytes); at < stop; at += 64) prefetch(at);
    }
};

inline void fetch(const uint16_t* from, const uint16_t* to) {
    Next{(const char*)from, (const char*)to}.rows((const char*)to - (const char*)from);
}

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
            std::memcpy(s.scores + t, eight, sizeof eight);
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
                    std::memcpy(s.scores + (g + h + e) * BLOCK + t, eight + 4 * e, 16);
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
            std::memcpy(s.scores + t, to, sizeof to);
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
                std::memcpy(s.scores + (g + h) * BLOCK + t, to[h], sizeof to[h]);
        }
        if (g < s.group) {
            float to[1][4];
            score_tile<C, FOUR, 1, 4>(s, row, scale, size, g, to);
            std::memcpy(s.scores + g * BLOCK + t, to[0], sizeof to[0]);
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

}  // namespace
