// Blocks of decode attention for processors with AVX-512: integer products (VNNI) for codes, and
// products of bfloat16 (BF16) where several query heads share a KV head.
//
// What each needs of the sizes is said by `code_keys_fit`, `code_values_fit` and `bf16_fits`. Other
// sizes take the general code of blocks.h.
//
// A 16-bit number is two signed bytes: 256 * high + low. So one instruction multiplies 64 unsigned
// codes with 64 signed bytes, two give the product of codes with 16-bit numbers exactly.

#pragma once

#include "blocks.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ZINFER_VNNI 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ZINFER_BF16 1
#endif

namespace {

constexpr float MOST16 = 32512.f;  // 127 * 256: the high byte stays within -127..127

#if defined(ZINFER_VNNI)

inline float sum_of_lanes(vf value) { return _mm512_reduce_add_ps((__m512)value); }

// Sixteen sums of sixteen vectors, in their order.
inline __m512 sums16(const __m512* v) {
    __m512 pair[8], four[4];
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    };
    return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// Write four heads' scores of four tokens.
inline void store_scores(State& s, __m512 sums, int g, int t, int n) {
    alignas(64) float all16[16];
    _mm512_store_ps(all16, sums);
    for (int h = 0; h < 4; h++)
        std::memcpy(s.scores + (g + h) * BLOCK + t, all16 + 4 * h,
                    sizeof(float) * std::min(4, n - t));
}

// Bytes to prefetch at each of `steps` equal steps.
inline int64_t share_of(const Next& next, int64_t steps) {
    return (next.end - next.at + steps - 1) / std::max<int64_t>(1, steps);
}

constexpr int MAX_UNITS = 8, MOST_PARTS = 8;

// How the codes of one key lie in vectors of 64. A unit is one or two such vectors whose lanes
// (four codes each) belong to the same groups.
struct CodeShape {
    int units = 0;
    bool four = false, merged = false;
    __mmask64 mask[MAX_UNITS];
    __m512i lane[MAX_UNITS];  // of each lane, the place of its scale among (scale, minimum) pairs
    __mmask16 pairs = 0;
    int16_t places[MAX_UNITS * 128];  // in a key, of each code of each unit's two vectors; or -1

    CodeShape(int64_t dim, int64_t size, bool four_bits) : four(four_bits) {
        merged = !four && size % 64 == 0 && dim % 128 == 0;
        const int64_t bytes = four ? dim / 2 : dim, each = merged ? 128 : 64;
        const int64_t span = four ? size / 2 : size;
        units = (int)((bytes + each - 1) / each);
        pairs = (__mmask16)((1u << (2 * dim / size)) - 1);
        for (int u = 0; u < units; u++) {
            const int64_t left = std::min<int64_t>(64, bytes - each * u);
            mask[u] = left == 64 ? ~0ull : (1ull << left) - 1;
            alignas(64) int32_t at[16];
            for (int l = 0; l < 16; l++) {
                const int64_t byte = merged ? each * u + (l < 8 ? 0 : 64) : each * u + 4 * l;
                at[l] = (int32_t)(2 * std::min(byte / span, dim / size - 1));
            }
            lane[u] = _mm512_load_si512(at);
            for (int which = 0; which < 2; which++)
                for (int byte = 0; byte < 64; byte++)
                    places[u * 128 + which * 64 + byte] = (int16_t)place(dim, size, u, which, byte);
        }
    }
    // The place in a key of code `byte` of vector `which` of unit `u`; -1 beyond its end.
    int64_t place(int64_t dim, int64_t size, int u, int which, int byte) const {
        int64_t at;
        if (four) {
            const int64_t all = 64 * u + byte, half = size / 2;
            if (all >= dim / 2) return -1;
            return all / half * size + all % half + which * half;
        }
        if (merged)
            at = 128 * u + (byte < 32 ? byte : byte + 32) + 32 * which;
        else
            at = which ? dim : 64 * u + byte;
        return at < dim ? at : -1;
    }
};

template <bool FOUR, bool MERGED>
inline void get_codes(const uint8_t* row, int u, __mmask64 mask, __m512i& x, __m512i& y) {
    if (FOUR) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512i bytes = _mm512_maskz_loadu_epi8(mask, row + 64 * u);
        x = _mm512_and_si512(bytes, low);
        y = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    } else if (MERGED) {
        __m512i a = _mm512_loadu_si512(row + 128 * u), b = _mm512_loadu_si512(row + 128 * u + 64);
        x = _mm512_shuffle_i64x2(a, b, 0x44);
        y = _mm512_shuffle_i64x2(a, b, 0xEE);
    } else {
        x = _mm512_maskz_loadu_epi8(mask, row + 64 * u);
    }
}

// Sums of H heads and two tokens, still spread over sixteen lanes: to[2 * head + token].
template <bool FOUR, bool MERGED, int H>
inline void score_pair(const State& s, const uint8_t* const* row, const uint16_t* const* scale,
                       int g, __m512* to) {
    constexpr bool TWO = FOUR || MERGED;
    const CodeShape& shape = *s.shape;
    __m512 pairs[2], f[2 * H];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        pairs[i] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(shape.pairs, scale[i]));
#pragma GCC unroll 8
    for (int h = 0; h < H; h++) {
        const __m512 least = _mm512_load_ps(s.q_least + (g + h) * 16);
        f[2 * h] = _mm512_mul_ps(least, pairs[0]);
        f[2 * h + 1] = _mm512_mul_ps(least, pairs[1]);
    }
    for (int u = 0; u < shape.units; u++) {
        __m512i x[2], y[2];
        __m512 by[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            get_codes<FOUR, MERGED>(row[i], u, shape.mask[u], x[i], y[i]);
            by[i] = _mm512_permutexvar_ps(shape.lane[u], pairs[i]);
        }
        const int8_t* q = s.q8 + ((int64_t)g * shape.units + u) * 256;
        const int64_t next_head = (int64_t)shape.units * 256;
#pragma GCC unroll 8
        for (int h = 0; h < H; h++, q += next_head) {
            const __m512i hx = _mm512_load_si512(q), hy = _mm512_load_si512(q + 64);
            const __m512i lx = _mm512_load_si512(q + 128), ly = _mm512_load_si512(q + 192);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), x[i], hx);
                if (TWO) a = _mm512_dpbusd_epi32(a, y[i], hy);
                a = _mm512_slli_epi32(a, 8);
                a = _mm512_dpbusd_epi32(a, x[i], lx);
                if (TWO) a = _mm512_dpbusd_epi32(a, y[i], ly);
                f[2 * h + i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), by[i], f[2 * h + i]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * H; i++) to[i] = f[i];
}

// Scores of `n` tokens whose keys are codes, for the H heads from `g` on.
template <bool FOUR, bool MERGED, int H>
inline void score_heads(State& s, const char* keys, const uint16_t* scales, int size, int n, int g,
                        Next& next, int64_t share) {
    const int64_t bytes = FOUR ? s.dim / 2 : s.dim, pairs_of = 2 * (s.dim / size);
    constexpr int PAIRS = 8 / H;  // so many pairs of tokens give sixteen sums
    alignas(64) float sums[16], by[16];
    __m512 f[16];
    for (int i = 0; i < 16; i++) by[i] = s.q8_scale[g + i / 2 % H];
    const __m512 scale_of_sums = _mm512_load_ps(by);
    for (int t = 0; t < n; t += 2 * PAIRS) {
        for (int pair = 0; pair < PAIRS; pair++) {
            const uint8_t* row[2];
            const uint16_t* scale[2];
            for (int i = 0; i < 2; i++) {
                const int64_t token = std::min(t + 2 * pair + i, n - 1);
                row[i] = (const uint8_t*)keys + token * bytes;
                scale[i] = scales + token * pairs_of;
            }
            next.rows(share);
            score_pair<FOUR, MERGED, H>(s, row, scale, g, f + 2 * H * pair);
        }
        const __m512 all16 = _mm512_mul_ps(sums16(f), scale_of_sums);
        if (H == 1) {
            const int count = std::min(16, n - t);
            _mm512_mask_storeu_ps(s.scores + g * BLOCK + t, (__mmask16)((1u << count) - 1), all16);
            continue;
        }
        _mm512_store_ps(sums, all16);
        for (int pair = 0; pair < PAIRS; pair++)
            for (int h = 0; h < H; h++)  // a last odd token's partner lands where soften clears
                std::memcpy(s.scores + (g + h) * BLOCK + t + 2 * pair, sums + 2 * (H * pair + h),
                            8);
    }
}

// Scores of `n` tokens whose keys are codes.
template <bool FOUR, bool MERGED>
void score_vnni(State& s, const char* keys, const uint16_t* scales, int size, int n, Next next) {
    const int passes = s.group / 8 + (s.group & 4) / 4 + (s.group & 2) / 2 + (s.group & 1);
    const int64_t share = share_of(next, (int64_t)passes * ((n + 1) / 2));
    int g = 0;
    for (; g + 8 <= s.group; g += 8)
        score_heads<FOUR, MERGED, 8>(s, keys, scales, size, n, g, next, share);
    if (s.group & 4) score_heads<FOUR, MERGED, 4>(s, keys, scales, size, n, g, next, share), g += 4;
    if (s.group & 2) score_heads<FOUR, MERGED, 2>(s, keys, scales, size, n, g, next, share), g += 2;
    if (s.group & 1) score_heads<FOUR, MERGED, 1>(s, keys, scales, size, n, g, next, share);
}

// Sums of H heads and 16 / H tokens, still spread over sixteen lanes: f[head * tokens + token].
template <int H>
inline void score_tile_f32(const State& s, const float* const* row, int g, __m512* f, Next& next,
                           int64_t share) {
    constexpr int T = 16 / H < 4 ? 16 / H : 4;
    for (int i = 0; i < T * H; i++) f[i] = _mm512_setzero_ps();
    for (int d = 0; d < s.dim; d += 16) {
        next.rows(share);
        __m512 key[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) {
            key[i] = _mm512_loadu_ps(row[i] + d);
            __builtin_prefetch(row[i] + d + 8 * s.dim, 0, 3);  // two tiles on, into the first cache
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const __m512 q = _mm512_loadu_ps(s.q + (int64_t)(g + h) * s.dim + d);
#pragma GCC unroll 4
            for (int i = 0; i < T; i++) f[T * h + i] = _mm512_fmadd_ps(q, key[i], f[T * h + i]);
        }
    }
}

// Scores of `n` tokens whose keys are float32, for several query heads.
void score_f32(State& s, const char* keys, const uint16_t*, int, int n, Next next) {
    const int eights = s.group / 8, fours = s.group % 8 / 4, ones = s.group % 4;
    const int64_t share = share_of(next, (n + 3) / 4 * (s.dim / 16) * (2 * eights + fours + ones));
    for (int t = 0; t < n; t += 4) {
        const float* row[4];
        __m512 f[16];
        for (int i = 0; i < 4; i++)
            row[i] = (const float*)keys + (int64_t)std::min(t + i, n - 1) * s.dim;
        int g = 0;
        for (; g + 8 <= s.group; g += 8)
            for (int two = 0; two < 4; two += 2) {
                score_tile_f32<8>(s, row + two, g, f, next, share);
                alignas(64) float sums[16];
                _mm512_store_ps(sums, sums16(f));
                for (int h = 0; h < 8; h++)
                    std::memcpy(s.scores + (g + h) * BLOCK + t + two, sums + 2 * h, 8);
            }
        for (; g + 4 <= s.group; g += 4) {
            score_tile_f32<4>(s, row, g, f, next, share);
            store_scores(s, sums16(f), g, t, n);
        }
        for (; g < s.group; g++) {
            score_tile_f32<1>(s, row, g, f, next, share);
            for (int i = 0; i < std::min(4, n - t); i++)
                s.scores[g * BLOCK + t + i] = _mm512_reduce_add_ps(f[i]);
        }
    }
}

// A query as two signed bytes a value, in the order of a CodeShape; its scale; and what scale and
// minimum of each group are multiplied with besides: the query's sum, and for codes of MIDDLE on
// average what rounding took from that sum.
inline void code_query(const CodeShape& shape, const float* q, int64_t dim, int64_t size,
                       int8_t* q8, float* scale, float* least) {
    float most = 1e-30f;
    for (int64_t i = 0; i < dim; i++) most = std::max(most, std::fabs(q[i]));
    *scale = most / MOST16;
    const float into = MOST16 / most, middle = shape.four ? 7.5f : 127.5f;
    int16_t whole[MAX_DIM + 1];
    std::fill_n(least, 16, 0.f);
    for (int64_t from = 0; from < dim; from += size) {
        vf sum = {}, lost = {};
        for (int64_t i = from; i < from + size; i += W) {
            const vf exact = load<vf>(q + i) * into;
            const __m512i near = _mm512_cvtps_epi32((__m512)exact);
            _mm256_storeu_si256((__m256i*)(whole + i), _mm512_cvtepi32_epi16(near));
            sum += exact;
            lost += exact - (vf)_mm512_cvtepi32_ps(near);
        }
        least[2 * (from / size)] = middle * sum_of_lanes(lost);
        least[2 * (from / size) + 1] = sum_of_lanes(sum);
    }
    whole[dim] = 0;
    for (int u = 0; u < shape.units; u++)
        for (int at = 0; at < 128; at++) {
            const int place = shape.places[u * 128 + at];
            const int value = whole[place < 0 ? dim : place], high = (value + 128) >> 8;
            q8[u * 256 + at] = (int8_t)high;
            q8[u * 256 + 128 + at] = (int8_t)(value - 256 * high);
        }
}

inline bool code_keys_fit(int64_t dim, int64_t size) {
    return dim / size <= MOST_PARTS && dim <= 64 * MAX_UNITS && size % 16 == 0;
}
inline bool code_values_fit(int64_t dim, int64_t size, bool four) {
    return dim / size <= MOST_PARTS && size % (four ? 64 : 32) == 0;
}
// The place in a value of number `at` of an accumulator that value_vnni filled.
inline int64_t code_place(int64_t at, int64_t size, bool four) {
    const int64_t strip = at / (four ? 64 : 32), which = four ? at / 32 % 2 : 0;
    const int64_t i = at % 32 / 8, k = at % 8 / 4, j = at % 4,
                  byte = 32 * strip + 16 * k + 4 * i + j;
    return four ? byte / (size / 2) * size + byte % (size / 2) + which * (size / 2) : byte;
}

// Rows t..t+3 in the low halves, t+4..t+7 in the high ones: 32 bytes of each. Rows end at `n`.
inline void read_strip(const uint8_t* from, int64_t bytes, int t, int n, __m512i* r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int64_t a = std::min(t + i, n - 1), b = std::min(t + 4 + i, n - 1);
        r[i] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(from + a * bytes))),
            _mm256_loadu_si256((const __m256i*)(from + b * bytes)), 1);
    }
}

// Turn rows of bytes into quads of one column: sixteen lanes each, two sets of four tokens.
inline void transpose(const __m512i* r, __m512i* e) {
    __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    e[0] = _mm512_unpacklo_epi16(a, c);
    e[1] = _mm512_unpackhi_epi16(a, c);
    e[2] = _mm512_unpacklo_epi16(b, d);
    e[3] = _mm512_unpackhi_epi16(b, d);
}

// Split bytes of two codes.
inline void split_codes(__m512i* r, __m512i* high) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        high[i] = _mm512_and_si512(_mm512_srli_epi16(r[i], 4), low);
        r[i] = _mm512_and_si512(r[i], low);
    }
}

// Eight weights' bytes for the lanes of quads: the first four tokens' low, the others' high.
inline __m512i weights_of(const int8_t* eight) {
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    int64_t bytes;
    std::memcpy(&bytes, eight, 8);
    return _mm512_permutexvar_epi32(halves, _mm512_set1_epi64(bytes));
}

// acc[0..32) += the sums of a strip: 256 * high + low, both sets of tokens, times `unit`.
inline void add_sums(float* acc, const __m512i* high, const __m512i* low, float unit) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
        const __m256i both =
            _mm256_add_epi32(_mm512_castsi512_si256(whole), _mm512_extracti64x4_epi64(whole, 1));
        _mm256_storeu_ps(acc + 8 * i,
                         _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), _mm256_set1_ps(unit),
                                         _mm256_loadu_ps(acc + 8 * i)));
    }
}

// Weights times scales of one head and group as two signed bytes each; returns their unit.
// `minima` gets what the minima add, and what rounding takes from codes of `middle` on average.
inline float code_weights(const float* p, const float* by, const float* least, int padded,
                          float bound, float middle, int8_t* high, int8_t* low, float* minima) {
    const __m512 into = _mm512_set1_ps(bound > 0 ? MOST16 / bound : 0.f);
    __m512 sum = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
    for (int t = 0; t < padded; t += 16) {
        const __m512 weight = _mm512_loadu_ps(p + t);
        sum = _mm512_fmadd_ps(weight, _mm512_loadu_ps(least + t), sum);
        const __m512 exact = _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_loadu_ps(by + t)), into);
        const __m512i q = _mm512_cvtps_epi32(exact);
        lost = _mm512_add_ps(lost, _mm512_sub_ps(exact, _mm512_cvtepi32_ps(q)));
        const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        _mm_store_si128((__m128i*)(high + t), _mm512_cvtepi32_epi8(up));
        _mm_store_si128((__m128i*)(low + t), _mm512_cvtepi32_epi8(q));
    }
    const float unit = bound / MOST16;
    *minima += _mm512_reduce_add_ps(_mm512_fmadd_ps(lost, _mm512_set1_ps(unit * middle), sum));
    return unit;
}

// What the weights of one head, or of two, add to 32 columns.
template <int H>
inline void add_strip(State& s, const __m512i* quads, int step, const int8_t* weights,
                      int head_step, const float* unit, int unit_step, int padded, int g,
                      int64_t at, Next& next, int64_t share) {
    __m512i high[H][4], low[H][4];
    for (int h = 0; h < H; h++)
        for (int i = 0; i < 4; i++) high[h][i] = low[h][i] = _mm512_setzero_si512();
    for (int t = 0; t < padded; t += 8, quads += step) {
        next.rows(share);
#pragma GCC unroll 2
        for (int h = 0; h < H; h++) {
            const __m512i up = weights_of(weights + h * head_step + t);
            const __m512i down = weights_of(weights + h * head_step + BLOCK + t);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                high[h][i] = _mm512_dpbusd_epi32(high[h][i], quads[i], up);
                low[h][i] = _mm512_dpbusd_epi32(low[h][i], quads[i], down);
            }
        }
    }
    for (int h = 0; h < H; h++)
        add_sums(s.acc + (int64_t)(g + h) * s.value_dim + at, high[h], low[h], unit[h * unit_step]);
}

// What one head's weights add to 64 columns: two strips of 8-bit codes, or one of 4-bit codes.
// `weights` and `unit` are of the group of each half.
template <bool FOUR>
inline void add_columns(float* acc, const uint8_t* from, int64_t bytes, int n, int padded,
                        const int8_t* const* weights, const float* unit, Next& next,
                        int64_t share) {
    __m512i high[2][4], low[2][4];
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < 4; i++) high[v][i] = low[v][i] = _mm512_setzero_si512();
    for (int t = 0; t < padded; t += 8) {
        next.rows(share);
        __m512i r[2][4], e[4];
        read_strip(from, bytes, t, n, r[0]);
        if (FOUR)
            split_codes(r[0], r[1]);
        else
            read_strip(from + 32, bytes, t, n, r[1]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const __m512i up = weights_of(weights[v] + t),
                          down = weights_of(weights[v] + BLOCK + t);
            transpose(r[v], e);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                high[v][i] = _mm512_dpbusd_epi32(high[v][i], e[i], up);
                low[v][i] = _mm512_dpbusd_epi32(low[v][i], e[i], down);
            }
        }
    }
    for (int v = 0; v < 2; v++) add_sums(acc + 32 * v, high[v], low[v], unit[v]);
}

// acc += weights times values that are codes; acc lies in the order of `code_place`.
template <bool FOUR>
void values_vnni(State& s, const char* values, const uint16_t* scales, int size, int64_t bytes,
                 int n, Next next) {
    constexpr int VECTORS = FOUR ? 2 : 1, HEADS_AT_ONCE = 8;
    const int parts = s.value_dim / size, padded = (n + 15) / 16 * 16;
    alignas(64) float by[MOST_PARTS][BLOCK], least[MOST_PARTS][BLOCK];
    float top[MOST_PARTS] = {};
    for (int t = 0; t < n; t++) {
        alignas(64) float flat[16];
        _mm512_store_ps(flat, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                                  (__mmask16)((1u << (2 * parts)) - 1), scales + t * 2 * parts)));
        for (int part = 0; part < parts; part++) {
            by[part][t] = flat[2 * part];
            least[part][t] = flat[2 * part + 1];
        }
    }
    for (int part = 0; part < parts; part++) {
        for (int t = n; t < padded; t++) by[part][t] = least[part][t] = 0.f;
        __m512 most = _mm512_setzero_ps();
        for (int t = 0; t < padded; t += 16)
            most = _mm512_max_ps(most, _mm512_load_ps(by[part] + t));
        top[part] = _mm512_reduce_max_ps(most);
    }
    const int64_t strips = bytes / 32, span = FOUR ? size / 2 : size;
    const bool alone = s.group == 1 && (FOUR || bytes % 64 == 0);
    const int64_t share = share_of(
        next,
        (padded / 8) * (alone ? bytes / (FOUR ? 32 : 64) : strips * VECTORS * ((s.group + 1) / 2)));
    __m512i quads[BLOCK / 8 * VECTORS * 4];
    alignas(64) int8_t weights[HEADS_AT_ONCE][MOST_PARTS][2][BLOCK];
    float unit[HEADS_AT_ONCE][MOST_PARTS];
    for (int first = 0; first < s.group; first += HEADS_AT_ONCE) {
        const int heads = std::min(HEADS_AT_ONCE, s.group - first);
        for (int h = 0; h < heads; h++) {
            const float* p = s.scores + (first + h) * BLOCK;
            __m512 most = _mm512_setzero_ps();
            for (int t = 0; t < padded; t += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(p + t));
            const float largest_weight = _mm512_reduce_max_ps(most);
            for (int part = 0; part < parts; part++)
                unit[h][part] =
                    code_weights(p, by[part], least[part], padded, largest_weight * top[part],
                                 FOUR ? 7.5f : 127.5f, weights[h][part][0], weights[h][part][1],
                                 s.minima + (first + h) * parts + part);
        }
        const uint8_t* rows = (const uint8_t*)values;
        for (int64_t byte = 0; alone && byte < bytes; byte += FOUR ? 32 : 64) {
            const int64_t part = byte / span, other = FOUR ? part : (byte + 32) / span;
            const int8_t* const both[2] = {weights[0][part][0], weights[0][other][0]};
            const float units[2] = {unit[0][part], unit[0][other]};
            add_columns<FOUR>(s.acc + byte * VECTORS, rows + byte, bytes, n, padded, both, units,
                              next, share);
        }
        for (int64_t strip = 0; !alone && strip < strips; strip++) {
            const int part = (int)(32 * strip / span);
            for (int t = 0; t < padded; t += 8) {
                __m512i r[4], second[4];
                read_strip(rows + 32 * strip, bytes, t, n, r);
                if (FOUR) {
                    split_codes(r, second);
                    transpose(second, quads + t / 8 * 8 + 4);
                }
                transpose(r, quads + t / 8 * VECTORS * 4);
            }
            for (int v = 0; v < VECTORS; v++) {
                const int64_t at = (strip * VECTORS + v) * 32;
                int h = 0;
                for (; h + 2 <= heads; h += 2)
                    add_strip<2>(s, quads + 4 * v, VECTORS * 4, weights[h][part][0],
                                 sizeof(weights[0]), &unit[h][part], MOST_PARTS, padded, first + h,
                                 at, next, share);
                if (h < heads)
                    add_strip<1>(s, quads + 4 * v, VECTORS * 4, weights[h][part][0],
                                 sizeof(weights[0]), &unit[h][part], MOST_PARTS, padded, first + h,
                                 at, next, share);
            }
        }
    }
}
#endif

#if defined(ZINFER_BF16) && defined(ZINFER_VNNI)
inline bool bf16_fits(int64_t dim) { return dim % 32 == 0; }
inline __m512bh bf16_load(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Write a query in bfloat16; false where that rounds it.
inline bool bf16_query(const float* q, int64_t dim, uint16_t* to) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < dim; i++) {
        uint32_t bits;
        std::memcpy(&bits, q + i, 4);
        lost |= bits & 0xffff;
        to[i] = (uint16_t)(bits >> 16);
    }
    return lost == 0;
}

template <int H>
inline void score_tile_bf16(const State& s, const uint16_t* const* row, int g, __m512* f,
                            Next& next, int64_t share) {
    for (int i = 0; i < 4 * H; i++) f[i] = _mm512_setzero_ps();
    for (int d = 0; d < s.dim; d += 32) {
        next.rows(share);
        __m512bh key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) key[i] = bf16_load(row[i] + d);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
            const __m512bh q = bf16_load(s.qb + (int64_t)(g + h) * s.dim + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) f[4 * h + i] = _mm512_dpbf16_ps(f[4 * h + i], q, key[i]);
        }
    }
}

// Scores of `n` tokens whose keys are bfloat16, for several query heads.
void score_bf16(State& s, const char* keys, const uint16_t*, int, int n, Next next) {
    const int64_t share = share_of(next, (n + 3) / 4 * (s.dim / 32) * (s.group / 4 + s.group % 4));
    for (int t = 0; t < n; t += 4) {
        const uint16_t* row[4];
        __m512 f[16];
        for (int i = 0; i < 4; i++)
            row[i] = (const uint16_t*)keys + (int64_t)std::min(t + i, n - 1) * s.dim;
        int g = 0;
        for (; g + 4 <= s.group; g += 4) {
            score_tile_bf16<4>(s, row, g, f, next, share);
            store_scores(s, sums16(f), g, t, n);
        }
        for (; g < s.group; g++) {
            score_tile_bf16<1>(s, row, g, f, next, share);
            for (int i = 0; i < std::min(4, n - t); i++)
                s.scores[g * BLOCK + t + i] = _mm512_reduce_add_ps(f[i]);
        }
    }
}

// acc += weights times bfloat16 values, two tokens at a time; acc lies in the order of
// `bf16_place`. `weights`: of each head BLOCK numbers rounded to bfloat16, then what rounding took.
template <int H>
inline void add_strip_bf16(State& s, const uint16_t* values, int n, const uint16_t* weights, int g,
                           int d, Next& next, int64_t share) {
    __m512 a[H][2];
    for (int h = 0; h < H; h++)
        for (int e = 0; e < 2; e++)
            a[h][e] = _mm512_loadu_ps(s.acc + (int64_t)(g + h) * s.value_dim + d + 16 * e);
    const int64_t stride = s.value_dim;
    for (int t = 0; t < n; t += 2) {
        next.rows(share);
        const uint16_t* row = values + t * stride + d;
        const __m512i x = _mm512_loadu_si512(row);
        const __m512i y = _mm512_loadu_si512(t + 1 < n ? row + stride : row);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            int32_t pair, rest;
            std::memcpy(&pair, weights + 2 * h * BLOCK + t, 4);
            std::memcpy(&rest, weights + (2 * h + 1) * BLOCK + t, 4);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
            const __m512bh r = (__m512bh)_mm512_set1_epi32(rest);
            a[h][0] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(a[h][0], low, w), low, r);
            a[h][1] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(a[h][1], high, w), high, r);
        }
    }
    for (int h = 0; h < H; h++)
        for (int e = 0; e < 2; e++)
            _mm512_storeu_ps(s.acc + (int64_t)(g + h) * s.value_dim + d + 16 * e, a[h][e]);
}

void values_bf16(State& s, const char* values, const uint16_t*, int, int64_t, int n, Next next) {
    const uint16_t* v = (const uint16_t*)values;
    alignas(64) uint16_t weights[2 * 8 * BLOCK];
    const int64_t steps = (int64_t)(s.value_dim / 32) * ((n + 1) / 2) * ((s.group + 7) / 8);
    const int64_t share = (next.end - next.at) / std::max<int64_t>(1, steps) + 1;
    for (int g = 0; g < s.group;) {
        const int left = s.group - g, heads = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int h = 0; h < heads; h++) {
            const float* p = s.scores + (g + h) * BLOCK;
            for (int t = 0; t < (n + 15) / 16 * 16; t += 16) {
                const __m512 weight = _mm512_loadu_ps(p + t);
                const __m256i near = (__m256i)_mm512_cvtneps_pbh(weight);
                const __m512 rest = _mm512_sub_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(
                                                              _mm512_cvtepu16_epi32(near), 16)));
                _mm256_store_si256((__m256i*)(weights + 2 * h * BLOCK + t), near);
                _mm256_store_si256((__m256i*)(weights + (2 * h + 1) * BLOCK + t),
                                   (__m256i)_mm512_cvtneps_pbh(rest));
            }
        }
        for (int d = 0; d < s.value_dim; d += 32) {
            if (heads == 8)
                add_strip_bf16<8>(s, v, n, weights, g, d, next, share);
            else if (heads == 4)
                add_strip_bf16<4>(s, v, n, weights, g, d, next, share);
            else if (heads == 2)
                add_strip_bf16<2>(s, v, n, weights, g, d, next, share);
            else
                add_strip_bf16<1>(s, v, n, weights, g, d, next, share);
        }
        g += heads;
    }
}
// The place in a value of number `at` of an accumulator that values_bf16 filled.
inline int64_t bf16_place(int64_t at) {
    const int64_t e = at % 32 / 16, k = at % 16 / 4, j = at % 4;
    return at / 32 * 32 + 8 * k + 4 * e + j;
}
#endif

}  // namespace
