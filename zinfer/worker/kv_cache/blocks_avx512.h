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

// The same vector in a register: else the compiler reads it from memory for each of its products.
inline __m512 held(__m512 value) {
    asm("" : "+v"(value));
    return value;
}

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
inline void store_scores(State& s, __m512 sums, int g, int t) {
    float* to = s.scores + g * BLOCK + t;
    _mm_storeu_ps(to, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(to + BLOCK, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(to + 2 * BLOCK, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(to + 3 * BLOCK, _mm512_extractf32x4_ps(sums, 3));
}

// Bytes to prefetch at each of `steps` equal steps.
inline int64_t share_of(const Next& next, int64_t steps) {
    return (next.end - next.at + steps - 1) / std::max<int64_t>(1, steps);
}

// The first `count` of a vector's bytes.
inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// The high ones of two signed bytes for each of sixteen 16-bit numbers.
inline __m128i high_bytes(__m512i whole) {
    return _mm512_cvtepi32_epi8(
        _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
}

constexpr int MOST_PARTS = 8;  // groups of one key or value
constexpr int TILE = 16;       // tokens that lie in the lanes of one vector

// Read scale and minimum of each group of the first `left` of sixteen tokens: pairs[part] has a
// token in each lane, the scale in its low half. Lanes beyond `left` are zero.
inline void read_pairs(const uint16_t* scales, int parts, int left, __m512i* pairs) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if (parts & (parts - 1)) {
        const __mmask16 there = (__mmask16)((1u << std::min(TILE, left)) - 1);
        const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(parts));
        for (int part = 0; part < parts; part++)
            pairs[part] = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, at,
                                                      scales + 2 * part, 4);
        return;
    }
    for (int i = 0; i < parts; i++) {
        const int count = std::max(0, std::min(16, left * parts - 16 * i));
        pairs[i] = _mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), scales + 32 * i);
    }
    // Each round brings the pairs at even places before those at odd places.
    const __m512i even = _mm512_slli_epi32(lanes, 1),
                  odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    if (parts == 2) {
        const __m512i first = pairs[0];
        pairs[0] = _mm512_permutex2var_epi32(first, even, pairs[1]);
        pairs[1] = _mm512_permutex2var_epi32(first, odd, pairs[1]);
        return;
    }
    for (int round = 1; round < parts; round *= 2) {
        __m512i mixed[MOST_PARTS];
        for (int i = 0; i < parts; i++) mixed[i] = pairs[i];
        for (int i = 0; i < parts / 2; i++) {
            pairs[i] = _mm512_permutex2var_epi32(mixed[2 * i], even, mixed[2 * i + 1]);
            pairs[parts / 2 + i] = _mm512_permutex2var_epi32(mixed[2 * i], odd, mixed[2 * i + 1]);
        }
    }
}
inline __m512 scales_of(__m512i pairs) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)); }
inline __m512 minima_of(__m512i pairs) { return scales_of(_mm512_srli_epi32(pairs, 16)); }

// Keep one code of bytes of two: the low one, or sixteen times the high one.
inline void keep_codes(const __m512i* bytes, int8_t mask, __m512i* codes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) codes[i] = _mm512_and_si512(bytes[i], _mm512_set1_epi8(mask));
}

// Turn sixteen keys: codes[quad] has four neighbouring bytes of a token in each lane. Where a byte
// is two codes, codes[2 * quad] has the low ones and codes[2 * quad + 1] the high ones.
template <bool FOUR>
inline void turn_keys(const uint8_t* keys, int64_t bytes, int left, __m512i* codes) {
    const __m512i half = _mm512_set1_epi8(15);
    for (int64_t from = 0; from < bytes; from += 64) {
        const __mmask64 mask = first_bytes(bytes - from);
        __m512i turned[4][4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            __m512i r[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int64_t token = std::min(4 * a + i, left - 1);
                r[i] = _mm512_maskz_loadu_epi8(mask, keys + token * bytes + from);
            }
            const __m512i x = _mm512_unpacklo_epi32(r[0], r[1]),
                          y = _mm512_unpackhi_epi32(r[0], r[1]);
            const __m512i z = _mm512_unpacklo_epi32(r[2], r[3]),
                          w = _mm512_unpackhi_epi32(r[2], r[3]);
            turned[a][0] = _mm512_unpacklo_epi64(x, z);
            turned[a][1] = _mm512_unpackhi_epi64(x, z);
            turned[a][2] = _mm512_unpacklo_epi64(y, w);
            turned[a][3] = _mm512_unpackhi_epi64(y, w);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i x = _mm512_shuffle_i32x4(turned[0][i], turned[1][i], 0x88),
                          y = _mm512_shuffle_i32x4(turned[0][i], turned[1][i], 0xDD);
            const __m512i z = _mm512_shuffle_i32x4(turned[2][i], turned[3][i], 0x88),
                          w = _mm512_shuffle_i32x4(turned[2][i], turned[3][i], 0xDD);
            const __m512i quad[4] = {
                _mm512_shuffle_i32x4(x, z, 0x88), _mm512_shuffle_i32x4(y, w, 0x88),
                _mm512_shuffle_i32x4(x, z, 0xDD), _mm512_shuffle_i32x4(y, w, 0xDD)};
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) {
                const int64_t at = from / 4 + 4 * l + i;
                if (FOUR) {
                    codes[2 * at] = _mm512_and_si512(quad[l], half);
                    codes[2 * at + 1] = _mm512_and_si512(_mm512_srli_epi16(quad[l], 4), half);
                } else {
                    codes[at] = quad[l];
                }
            }
        }
    }
}

inline __m512i four_bytes(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

// Write scores of H heads and `left` of the sixteen tokens from `t` on, whose keys were turned.
template <bool FOUR, int H>
inline void score_tile_codes(State& s, const __m512i* codes, const __m512i* pairs, int size, int g,
                             int t, int left) {
    // Sums that are independent of each other, so that the multiplier does not wait.
    constexpr int WAYS = H == 1 ? 4 : H == 2 ? 2 : 1, EACH = FOUR ? 2 : 1;
    const int parts = s.dim / size, span = size / EACH;
    const int8_t* q = s.q8 + (int64_t)g * 2 * s.dim;
    __m512 f[H];
#pragma GCC unroll 8
    for (int h = 0; h < H; h++) f[h] = _mm512_setzero_ps();
    for (int part = 0; part < parts; part++, q += size) {
        __m512i high[H][WAYS], low[H][WAYS];
#pragma GCC unroll 8
        for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int w = 0; w < WAYS; w++) high[h][w] = low[h][w] = _mm512_setzero_si512();
        for (int at = 0; at < span; at += 4 * WAYS)
#pragma GCC unroll 4
            for (int w = 0; w < WAYS; w++)
#pragma GCC unroll 2
                for (int e = 0; e < EACH; e++) {
                    const __m512i code = *codes++;
                    const int8_t* place = q + at + 4 * w + e * span;
#pragma GCC unroll 8
                    for (int h = 0; h < H; h++, place += 2 * s.dim) {
                        high[h][w] = _mm512_dpbusd_epi32(high[h][w], code, four_bytes(place));
                        low[h][w] =
                            _mm512_dpbusd_epi32(low[h][w], code, four_bytes(place + s.dim));
                    }
                }
        const __m512 by = scales_of(pairs[part]), least = minima_of(pairs[part]);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
#pragma GCC unroll 4
            for (int w = 1; w < WAYS; w++) {
                high[h][0] = _mm512_add_epi32(high[h][0], high[h][w]);
                low[h][0] = _mm512_add_epi32(low[h][0], low[h][w]);
            }
            const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[h][0], 8), low[h][0]);
            const float* besides = s.q_least + (g + h) * 2 * MOST_PARTS + 2 * part;
            const __m512 sum = _mm512_add_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(besides[0]));
            f[h] = _mm512_fmadd_ps(sum, by, f[h]);
            f[h] = _mm512_fmadd_ps(least, _mm512_set1_ps(besides[1]), f[h]);
        }
    }
    const __mmask16 there = (__mmask16)((1u << std::min(TILE, left)) - 1);
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
        _mm512_mask_storeu_ps(s.scores + (g + h) * BLOCK + t, there,
                              _mm512_mul_ps(f[h], _mm512_set1_ps(s.q8_scale[g + h])));
}

// Scores of `n` tokens whose keys are codes.
template <bool FOUR>
void score_vnni(State& s, const char* keys, const uint16_t* scales, int size, int n, Next next) {
    const int64_t bytes = FOUR ? s.dim / 2 : s.dim;
    const int parts = s.dim / size;
    const int64_t share = share_of(next, (n + TILE - 1) / TILE);
    __m512i codes[MAX_DIM / 4 + 16 * 2], pairs[MOST_PARTS];
    for (int t = 0; t < n; t += TILE) {
        const int left = n - t;
        next.rows(share);
        read_pairs(scales + (int64_t)t * 2 * parts, parts, left, pairs);
        turn_keys<FOUR>((const uint8_t*)keys + t * bytes, bytes, left, codes);
        int g = 0;
        for (; g + 8 <= s.group; g += 8)
            score_tile_codes<FOUR, 8>(s, codes, pairs, size, g, t, left);
        if (s.group & 4) score_tile_codes<FOUR, 4>(s, codes, pairs, size, g, t, left), g += 4;
        if (s.group & 2) score_tile_codes<FOUR, 2>(s, codes, pairs, size, g, t, left), g += 2;
        if (s.group & 1) score_tile_codes<FOUR, 1>(s, codes, pairs, size, g, t, left);
    }
}

// Groups of the first 32 of a strip's 64 bytes, and of the others.
struct Halves {
    int first, second;
};
inline Halves halves_of(int64_t strip, int64_t span, int parts) {
    const int64_t last = parts - 1, second = (64 * strip + 32) / span;
    return Halves{(int)(64 * strip / span), (int)std::min(last, second)};
}

// Put a query of `code_query` into the order in which `score_alone` multiplies it: of each 64 bytes
// of a key, of each code of a byte, four vectors of high bytes and four of low ones, in turn. Each
// has in its lanes what four tokens' four neighbouring bytes are multiplied with.
inline void spread_query(const int8_t* q8, int64_t dim, int64_t size, bool four, int8_t* to) {
    const int64_t codes = four ? 2 : 1, bytes = dim / codes, span = size / codes;
    for (int64_t from = 0; from < bytes; from += 64)
        for (int64_t c = 0; c < codes; c++, to += 512)
            for (int64_t low = 0; low < 2; low++) {
                alignas(64) int8_t in_order[64] = {};
                for (int64_t byte = from; byte < std::min(bytes, from + 64); byte += 16)
                    std::memcpy(in_order + byte - from,
                                q8 + low * dim + byte / span * size + byte % span + c * span, 16);
                const __m512i x = _mm512_load_si512(in_order);
                _mm512_store_si512(to + 64 * low, _mm512_shuffle_epi32(x, _MM_PERM_AAAA));
                _mm512_store_si512(to + 128 + 64 * low, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
                _mm512_store_si512(to + 256 + 64 * low, _mm512_shuffle_epi32(x, _MM_PERM_CCCC));
                _mm512_store_si512(to + 384 + 64 * low, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
            }
}

// Turn 64 bytes of each of four keys: e[i] has in its lanes 4 * l to 4 * l + 3 the four tokens'
// bytes from 16 * l + 4 * i on. Rows end at `left`.
inline void turn_four_keys(const uint8_t* from, int64_t bytes, int left, __mmask64 mask,
                           __m512i* e) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        r[i] = _mm512_maskz_loadu_epi8(mask, from + std::min(i, left - 1) * bytes);
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    e[0] = _mm512_unpacklo_epi64(a, c);
    e[1] = _mm512_unpackhi_epi64(a, c);
    e[2] = _mm512_unpacklo_epi64(b, d);
    e[3] = _mm512_unpackhi_epi64(b, d);
}

// Products of turned codes with one query: 256 * high + low of each lane.
inline __m512i products_of(const __m512i* codes, const int8_t* q) {
    __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        high = _mm512_dpbusd_epi32(high, codes[i], _mm512_load_si512(q + 128 * i));
        low = _mm512_dpbusd_epi32(low, codes[i], _mm512_load_si512(q + 128 * i + 64));
    }
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// Products of a query with `left` of four keys, of 64 bytes of each: a token in each lane of four.
template <bool FOUR>
inline __m512i strip_products(const uint8_t* from, int64_t bytes, int left, __mmask64 mask,
                              const int8_t* q) {
    __m512i e[4], codes[4];
    turn_four_keys(from, bytes, left, mask, e);
    if (!FOUR) return products_of(e, q);
    keep_codes(e, (int8_t)0xF0, codes);
    const __m512i high = _mm512_srai_epi32(products_of(codes, q + 512), 4);
    keep_codes(e, 15, codes);
    return _mm512_add_epi32(high, products_of(codes, q));
}

// Scores of `n` tokens whose keys are codes, for one query head. PARTS groups of 64 values, which
// the compiler then knows, or of any sizes where it is 0.
template <bool FOUR, int PARTS>
void score_alone(State& s, const char* keys, const uint16_t* scales, int any, int n, Next next) {
    constexpr int CODES = FOUR ? 2 : 1;
    const int size = PARTS ? 64 : any, parts = PARTS ? PARTS : s.dim / size;
    const int64_t bytes = parts * size / CODES, span = size / CODES, strips = (bytes + 63) / 64;
    const int64_t share = share_of(next, (n + TILE - 1) / TILE * 4);
    const __m512 unit = _mm512_set1_ps(*s.q8_scale);
    Halves of[MAX_DIM / 64];
    for (int64_t strip = 0; strip < strips; strip++) of[strip] = halves_of(strip, span, parts);
    for (int t = 0; t < n; t += TILE) {
        const int left = std::min(TILE, n - t);
        __m512i pairs[MOST_PARTS];
        __m512 by[MOST_PARTS], f = _mm512_setzero_ps();
        read_pairs(scales + (int64_t)t * 2 * parts, parts, left, pairs);
        for (int part = 0; part < parts; part++) {
            by[part] = scales_of(pairs[part]);
            f = _mm512_fmadd_ps(by[part], _mm512_set1_ps(s.q_least[2 * part]), f);
            f = _mm512_fmadd_ps(minima_of(pairs[part]), _mm512_set1_ps(s.q_least[2 * part + 1]), f);
        }
        // Keys are read in the order in which they lie: so the processor fetches them ahead too.
        const uint8_t* row = (const uint8_t*)keys + t * bytes;
        __m512i sums[MAX_DIM / 64][4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            next.rows(share);
            const int first = std::min(4 * a, left - 1), rest = left - first;
            const uint8_t* from = row + first * bytes;
            const int8_t* q = s.q_spread;
            int64_t strip = 0;
            if (rest >= 4)
                for (; 64 * strip + 64 <= bytes; strip++, from += 64, q += 512 * CODES)
                    sums[strip][a] = strip_products<FOUR>(from, bytes, 4, ~0ull, q);
            for (; strip < strips; strip++, from += 64, q += 512 * CODES)
                sums[strip][a] = strip_products<FOUR>(from, bytes, rest,
                                                      first_bytes(bytes - 64 * strip), q);
        }
        for (int64_t strip = 0; strip < strips; strip++) {
            auto sum_lanes = [](__m512i x, __m512i y) {
                return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88),
                                        _mm512_shuffle_i32x4(x, y, 0xDD));
            };
            const __m512i a = sum_lanes(sums[strip][0], sums[strip][1]),
                          b = sum_lanes(sums[strip][2], sums[strip][3]);
            // Sums over the first 32 bytes, and over the others.
            const __m512i x = _mm512_shuffle_i32x4(a, b, 0x88),
                          y = _mm512_shuffle_i32x4(a, b, 0xDD);
            const Halves at = of[strip];
            if (at.first == at.second) {
                f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(x, y)), by[at.first], f);
            } else {
                f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), by[at.first], f);
                f = _mm512_fmadd_ps(_mm512_cvtepi32_ps(y), by[at.second], f);
            }
        }
        _mm512_mask_storeu_ps(s.scores + t, (__mmask16)((1u << left) - 1), _mm512_mul_ps(f, unit));
    }
}

// The code of `score_alone` for a size of keys.
template <bool FOUR>
ScoreBlock alone_for(int64_t dim, int64_t size) {
    if (size == 64 && dim == 128) return score_alone<FOUR, 2>;
    if (size == 64 && dim == 64) return score_alone<FOUR, 1>;
    return score_alone<FOUR, 0>;
}
ScoreBlock alone_of(bool four, int64_t dim, int64_t size) {
    return four ? alone_for<true>(dim, size) : alone_for<false>(dim, size);
}

// Sums of H heads and 16 / H tokens, still spread over sixteen lanes: f[head * tokens + token].
template <int H, int DIM>
inline void score_tile_f32(const State& s, const float* const* row, int g, __m512* f, Next& next,
                           int64_t share) {
    constexpr int T = 16 / H < 4 ? 16 / H : 4;
    for (int i = 0; i < T * H; i++) f[i] = _mm512_setzero_ps();
    const int dim = DIM ? DIM : s.dim;
    const float* queries = s.q + (int64_t)g * dim;
    for (int d = 0; d < dim; d += 16, queries += 16) {
        next.rows(share);
        __m512 key[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) {
            key[i] = _mm512_loadu_ps(row[i] + d);
            __builtin_prefetch(row[i] + d + 8 * dim, 0, 3);  // two tiles on, into the first cache
        }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            const __m512 q = held(_mm512_loadu_ps(queries + h * dim));
#pragma GCC unroll 4
            for (int i = 0; i < T; i++) f[T * h + i] = _mm512_fmadd_ps(q, key[i], f[T * h + i]);
        }
    }
}

// Scores of `n` tokens whose keys are float32, for several query heads.
template <int DIM>
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
                score_tile_f32<8, DIM>(s, row + two, g, f, next, share);
                alignas(64) float sums[16];
                _mm512_store_ps(sums, sums16(f));
                for (int h = 0; h < 8; h++)
                    std::memcpy(s.scores + (g + h) * BLOCK + t + two, sums + 2 * h, 8);
            }
        for (; g + 4 <= s.group; g += 4) {
            score_tile_f32<4, DIM>(s, row, g, f, next, share);
            store_scores(s, sums16(f), g, t);
        }
        for (; g < s.group; g++) {
            score_tile_f32<1, DIM>(s, row, g, f, next, share);
            for (int i = 0; i < std::min(4, n - t); i++)
                s.scores[g * BLOCK + t + i] = _mm512_reduce_add_ps(f[i]);
        }
    }
}

// A query as two signed bytes a value: all high ones, then all low ones. Its scale. And two numbers
// of each group: for codes of MIDDLE on average what rounding took from the query's sum, which a
// key's scale is multiplied with besides; and that sum, which its minimum is multiplied with.
inline void code_query(const float* q, int64_t dim, int64_t size, float middle, int8_t* q8,
                       float* scale, float* besides) {
    __m512 most = _mm512_set1_ps(1e-30f);
    for (int64_t i = 0; i < dim; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(q + i)));
    const float largest = _mm512_reduce_max_ps(most);
    *scale = largest / MOST16;
    const __m512 into = _mm512_set1_ps(MOST16 / largest);
    for (int64_t from = 0; from < dim; from += size, besides += 2) {
        __m512 sum = _mm512_setzero_ps(), lost = _mm512_setzero_ps();
        for (int64_t i = from; i < from + size; i += 16) {
            const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(q + i), into);
            const __m512i near = _mm512_cvtps_epi32(exact);
            _mm_storeu_si128((__m128i*)(q8 + i), high_bytes(near));
            _mm_storeu_si128((__m128i*)(q8 + dim + i), _mm512_cvtepi32_epi8(near));
            sum = _mm512_add_ps(sum, exact);
            lost = _mm512_add_ps(lost, _mm512_sub_ps(exact, _mm512_cvtepi32_ps(near)));
        }
        besides[0] = middle * _mm512_reduce_add_ps(lost);
        besides[1] = _mm512_reduce_add_ps(sum);
    }
}

inline bool code_keys_fit(int64_t dim, int64_t size) {
    return dim / size <= MOST_PARTS && size % 16 == 0;
}
inline bool alone_fits(int64_t size, bool four) { return size % (four ? 64 : 32) == 0; }
inline bool code_values_fit(int64_t dim, int64_t size, bool four) {
    return dim / size <= MOST_PARTS && size % (four ? 64 : 32) == 0;
}
// The place in a value of number `at` of an accumulator that values_vnni filled.
inline int64_t code_place(int64_t at, int64_t dim, int64_t size, bool four) {
    const int64_t codes = four ? 2 : 1, strip = at / (64 * codes), within = at % (64 * codes);
    const int64_t wide = std::min<int64_t>(64, dim / codes - 64 * strip), which = within / wide;
    const int64_t i = within % wide / (wide / 4), lane = within % (wide / 4);
    const int64_t byte = 64 * strip + 16 * (lane / 4) + 4 * i + lane % 4, span = size / codes;
    return byte / span * size + byte % span + which * span;
}

// Turn 64 bytes of each of four tokens: e[i] has the four tokens' bytes of one column in each lane,
// of column 16 * (lane / 4) + 4 * i + lane % 4. Rows end at `left`.
inline void turn_values(const uint8_t* from, int64_t bytes, int left, __mmask64 mask, __m512i* e) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        r[i] = _mm512_maskz_loadu_epi8(mask, from + std::min(i, left - 1) * bytes);
    const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    e[0] = _mm512_unpacklo_epi16(a, c);
    e[1] = _mm512_unpackhi_epi16(a, c);
    e[2] = _mm512_unpacklo_epi16(b, d);
    e[3] = _mm512_unpackhi_epi16(b, d);
}

// Weights of four tokens in every lane.
template <bool SPLIT>
inline __m512i weights_at(const int8_t* first, const int8_t* second) {
    const __m512i weights = four_bytes(first);
    if (!SPLIT) return weights;
    int32_t word;
    std::memcpy(&word, second, 4);
    return _mm512_mask_set1_epi32(weights, 0xFF00, word);
}

// acc += sums of a strip, 256 * high + low, times the unit of each half's group.
inline void add_sums(float* acc, const __m512i* high, const __m512i* low, const float* unit,
                     Halves of, int64_t wide, float by) {
    const __m512 units = _mm512_mask_mov_ps(_mm512_set1_ps(unit[of.first] * by), 0xFF00,
                                            _mm512_set1_ps(unit[of.second] * by));
    const __mmask16 mask = (__mmask16)((1u << (wide / 4)) - 1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]);
        float* to = acc + wide / 4 * i;
        _mm512_mask_storeu_ps(
            to, mask,
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), units, _mm512_maskz_loadu_ps(mask, to)));
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
        _mm_store_si128((__m128i*)(high + t), high_bytes(q));
        _mm_store_si128((__m128i*)(low + t), _mm512_cvtepi32_epi8(q));
    }
    const float unit = bound / MOST16;
    *minima += _mm512_reduce_add_ps(_mm512_fmadd_ps(lost, _mm512_set1_ps(unit * middle), sum));
    return unit;
}

constexpr int HEADS_AT_ONCE = 8;
// Weights of several heads as two signed bytes each, by group: all high ones, then all low ones.
struct Weights {
    alignas(64) int8_t bytes[HEADS_AT_ONCE][MOST_PARTS][2][BLOCK];
    float unit[HEADS_AT_ONCE][MOST_PARTS];
};

// What the weights of one head add to S strips of columns, which are read and turned on the way.
template <bool FOUR, bool SPLIT, int S>
inline void add_columns(float* acc, const uint8_t* from, int64_t bytes, int64_t wide, int n,
                        const Weights& weights, const Halves* of, Next& next, int64_t share) {
    constexpr int CODES = FOUR ? 2 : 1;
    const __mmask64 mask = first_bytes(wide);
    __m512i high[S][CODES][4], low[S][CODES][4];
#pragma GCC unroll 2
    for (int v = 0; v < S; v++)
#pragma GCC unroll 2
        for (int c = 0; c < CODES; c++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) high[v][c][i] = low[v][c][i] = _mm512_setzero_si512();
    auto step = [&](int t, int left) {
        next.rows(share);
#pragma GCC unroll 2
        for (int v = 0; v < S; v++) {
            __m512i e[4], codes[CODES][4];
            turn_values(from + t * bytes + 64 * v, bytes, left, mask, e);
            const int8_t* first = weights.bytes[0][of[v].first][0] + t;
            const int8_t* second = weights.bytes[0][of[v].second][0] + t;
            const __m512i up = weights_at<SPLIT>(first, second);
            const __m512i down = weights_at<SPLIT>(first + BLOCK, second + BLOCK);
#pragma GCC unroll 2
            for (int c = 0; c < CODES; c++) {
                keep_codes(e, FOUR ? (c ? (int8_t)0xF0 : 15) : -1, codes[c]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    high[v][c][i] = _mm512_dpbusd_epi32(high[v][c][i], codes[c][i], up);
                    low[v][c][i] = _mm512_dpbusd_epi32(low[v][c][i], codes[c][i], down);
                }
            }
        }
    };
    int t = 0;
    for (; t + 4 <= n; t += 4) step(t, 4);
    if (t < n) step(t, n - t);
#pragma GCC unroll 2
    for (int v = 0; v < S; v++)
#pragma GCC unroll 2
        for (int c = 0; c < CODES; c++)
            add_sums(acc + (64 * v * CODES) + c * wide, high[v][c], low[v][c], weights.unit[0],
                     of[v], wide, c ? 1.f / 16 : 1.f);
}

// What the weights of the heads [h, h + H) add to a strip of columns that was turned.
template <int H, bool SPLIT>
inline void add_turned(float* acc, int64_t stride, const __m512i* turned, int step, int64_t wide,
                       int n, const Weights& weights, int h, Halves of, float by, Next& next,
                       int64_t share) {
    __m512i high[H][4], low[H][4];
#pragma GCC unroll 2
    for (int e = 0; e < H; e++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) high[e][i] = low[e][i] = _mm512_setzero_si512();
    const int8_t *first = weights.bytes[h][of.first][0], *second = weights.bytes[h][of.second][0];
    for (int t = 0; t < n; t += 4, turned += step) {
        next.rows(share);
#pragma GCC unroll 2
        for (int e = 0; e < H; e++) {
            const int8_t* a = first + e * sizeof(weights.bytes[0]) + t;
            const int8_t* b = second + e * sizeof(weights.bytes[0]) + t;
            const __m512i up = weights_at<SPLIT>(a, b);
            const __m512i down = weights_at<SPLIT>(a + BLOCK, b + BLOCK);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                high[e][i] = _mm512_dpbusd_epi32(high[e][i], turned[i], up);
                low[e][i] = _mm512_dpbusd_epi32(low[e][i], turned[i], down);
            }
        }
    }
#pragma GCC unroll 2
    for (int e = 0; e < H; e++)
        add_sums(acc + e * stride, high[e], low[e], weights.unit[h + e], of, wide, by);
}

// acc += weights times values that are codes, of one strip of 64 bytes.
template <bool FOUR, bool SPLIT>
inline void add_strip(State& s, const uint8_t* from, int64_t bytes, int64_t strip, int n,
                      const Weights& weights, int g, int heads, Halves of, Next& next,
                      int64_t share) {
    constexpr int CODES = FOUR ? 2 : 1;
    const int64_t wide = std::min<int64_t>(64, bytes - 64 * strip);
    float* acc = s.acc + (int64_t)g * s.value_dim + 64 * CODES * strip;
    from += 64 * strip;
    if (heads == 1) {
        add_columns<FOUR, SPLIT, 1>(acc, from, bytes, wide, n, weights, &of, next, share);
        return;
    }
    const __mmask64 mask = first_bytes(wide);
    __m512i turned[BLOCK * CODES];
    for (int t = 0; t < n; t += 4) {
        __m512i* to = turned + t * CODES;
        turn_values(from + t * bytes, bytes, n - t, mask, to);
        if (!FOUR) continue;
        keep_codes(to, (int8_t)0xF0, to + 4);
        keep_codes(to, 15, to);
    }
    for (int c = 0; c < CODES; c++) {
        const float by = c ? 1.f / 16 : 1.f;
        int h = 0;
        for (; h + 2 <= heads; h += 2)
            add_turned<2, SPLIT>(acc + h * s.value_dim + c * wide, s.value_dim, turned + 4 * c,
                                 4 * CODES, wide, n, weights, h, of, by, next, share);
        if (h < heads)
            add_turned<1, SPLIT>(acc + h * s.value_dim + c * wide, s.value_dim, turned + 4 * c,
                                 4 * CODES, wide, n, weights, h, of, by, next, share);
    }
}

// acc += weights times values that are codes; acc lies in the order of `code_place`. PARTS groups
// of 64 values, which the compiler then knows, or of any sizes where it is 0.
template <bool FOUR, int PARTS>
void values_vnni(State& s, const char* values, const uint16_t* scales, int any, int64_t, int n,
                 Next next) {
    const int size = PARTS ? 64 : any, parts = PARTS ? PARTS : s.value_dim / size;
    const int64_t bytes = parts * size / (FOUR ? 2 : 1);
    const int padded = (n + TILE - 1) / TILE * TILE;
    alignas(64) float by[MOST_PARTS][BLOCK], least[MOST_PARTS][BLOCK];
    __m512 most[MOST_PARTS] = {};
    for (int t = 0; t < n; t += TILE) {
        __m512i pairs[MOST_PARTS];
        read_pairs(scales + (int64_t)t * 2 * parts, parts, n - t, pairs);
        for (int part = 0; part < parts; part++) {
            const __m512 scale = scales_of(pairs[part]);
            most[part] = _mm512_max_ps(most[part], scale);
            _mm512_store_ps(by[part] + t, scale);
            _mm512_store_ps(least[part] + t, minima_of(pairs[part]));
        }
    }
    float top[MOST_PARTS];
    for (int part = 0; part < parts; part++) top[part] = _mm512_reduce_max_ps(most[part]);
    const int64_t strips = (bytes + 63) / 64, span = FOUR ? size / 2 : size;
    int64_t passes = 0;  // over the tokens of a strip
    for (int left = s.group; left > 0; left -= HEADS_AT_ONCE)
        passes += left == 1 ? 1 : (std::min(left, HEADS_AT_ONCE) + 1) / 2 * (FOUR ? 2 : 1);
    const int64_t share = share_of(next, (n + 3) / 4 * strips * passes);
    Weights weights;
    for (int first = 0; first < s.group; first += HEADS_AT_ONCE) {
        const int heads = std::min(HEADS_AT_ONCE, s.group - first);
        for (int h = 0; h < heads; h++) {
            const float* p = s.scores + (first + h) * BLOCK;
            __m512 heaviest = _mm512_setzero_ps();
            for (int t = 0; t < padded; t += 16)
                heaviest = _mm512_max_ps(heaviest, _mm512_loadu_ps(p + t));
            const float bound = _mm512_reduce_max_ps(heaviest);
            for (int part = 0; part < parts; part++)
                weights.unit[h][part] = code_weights(
                    p, by[part], least[part], padded, bound * top[part], FOUR ? 7.5f : 127.5f,
                    weights.bytes[h][part][0], weights.bytes[h][part][1],
                    s.minima + (first + h) * parts + part);
        }
        const uint8_t* rows = (const uint8_t*)values;
        for (int64_t strip = 0; strip < strips; strip++) {
            const Halves of[2] = {halves_of(strip, span, parts), halves_of(strip + 1, span, parts)};
            const bool split = of[0].first != of[0].second;
            if (!FOUR && heads == 1 && !split && bytes - 64 * strip >= 128) {
                // Two neighbouring strips, so that values are read in the order in which they lie.
                add_columns<FOUR, false, 2>(s.acc + (int64_t)first * s.value_dim + 64 * strip,
                                            rows + 64 * strip, bytes, 64, n, weights, of, next,
                                            2 * share);
                strip++;
                continue;
            }
            auto add = split ? add_strip<FOUR, true> : add_strip<FOUR, false>;
            add(s, rows, bytes, strip, n, weights, first, heads, of[0], next, share);
        }
    }
}

// The code of `values_vnni` for a size of values.
template <bool FOUR>
ValueBlock code_values_for(int64_t dim, int64_t size) {
    if (size == 64 && dim == 128) return values_vnni<FOUR, 2>;
    if (size == 64 && dim == 64) return values_vnni<FOUR, 1>;
    return values_vnni<FOUR, 0>;
}
ValueBlock code_values_of(bool four, int64_t dim, int64_t size) {
    return four ? code_values_for<true>(dim, size) : code_values_for<false>(dim, size);
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

template <int H, int DIM>
inline void score_tile_bf16(const State& s, const uint16_t* const* row, int g, __m512* f,
                            Next& next, int64_t share) {
    for (int i = 0; i < 4 * H; i++) f[i] = _mm512_setzero_ps();
    const int dim = DIM ? DIM : s.dim;
    const uint16_t* queries = s.qb + (int64_t)g * dim;
    for (int d = 0; d < dim; d += 32, queries += 32) {
        next.rows(share);
        __m512bh key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) key[i] = bf16_load(row[i] + d);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
            const __m512bh q = (__m512bh)held((__m512)bf16_load(queries + h * dim));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) f[4 * h + i] = _mm512_dpbf16_ps(f[4 * h + i], q, key[i]);
        }
    }
}

// Scores of `n` tokens whose keys are bfloat16, for several query heads.
template <int DIM>
void score_bf16(State& s, const char* keys, const uint16_t*, int, int n, Next next) {
    const int64_t share = share_of(next, (n + 3) / 4 * (s.dim / 32) * (s.group / 4 + s.group % 4));
    for (int t = 0; t < n; t += 4) {
        const uint16_t* row[4];
        __m512 f[16];
        for (int i = 0; i < 4; i++)
            row[i] = (const uint16_t*)keys + (int64_t)std::min(t + i, n - 1) * s.dim;
        int g = 0;
        for (; g + 4 <= s.group; g += 4) {
            score_tile_bf16<4, DIM>(s, row, g, f, next, share);
            store_scores(s, sums16(f), g, t);
        }
        for (; g < s.group; g++) {
            score_tile_bf16<1, DIM>(s, row, g, f, next, share);
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
