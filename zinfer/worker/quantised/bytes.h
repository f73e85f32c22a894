// Products for processors with AVX-512 VNNI, which multiply 64 unsigned codes with 64 signed bytes
// in one instruction. A 16-bit activation is two of these bytes: 256 * high + low.
//
// Four groups share a vector of sums: each has a quarter of it, four lanes. A unit is 16 * V codes
// of each of four groups, as V vectors; so a group of more than 64 codes has several units.
#pragma once

#include "integers.h"

namespace {

// True where these products are faster than those of words.h: 8-bit activations need half of the
// multiplications, and with one or two rows of 16 bits codes need no widening.
#if defined(WIDE) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
bool in_bytes(int activation_bits, int rows) { return activation_bits == 8 || rows <= 2; }
#else
bool in_bytes(int, int) { return false; }
#endif

}  // namespace

#if defined(WIDE) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define USES_BYTES 1

namespace {

constexpr int QUAD = 4;  // groups of a unit
constexpr int QUADS = SEGMENT / QUAD;
constexpr int64_t AHEAD_OF_BYTES = 8192;  // bytes of codes that are prefetched

// How a row of codes is divided.
struct Units {
    int64_t groups, segments, parts;  // units of a group
    int64_t group_bytes, part_bytes;  // codes of a group, of its part
    int64_t x_bytes;                  // activations of a unit, one row
};

Units units_of(int64_t groups, int64_t group, int bits, int activation_bits) {
    Units units;
    const int64_t inside = std::min<int64_t>(group, 64);
    units.groups = groups;
    units.segments = (groups + SEGMENT - 1) / SEGMENT;
    units.parts = group / inside;
    units.group_bytes = group * bits / 8;
    units.part_bytes = inside * bits / 8;
    units.x_bytes = QUAD * inside * activation_bits / 8;
    return units;
}

// Put a segment's integers where the kernel reads them.
void arrange_bytes(const Units& units, const Pass& pass, int64_t segment, int m, int64_t group,
                   int bits, const int16_t* whole) {
    const int64_t inside = std::min<int64_t>(group, 64), vectors = inside / 16;
    const bool halves = units.x_bytes == QUAD * inside * 2;
    for (int64_t quad = 0; quad < QUADS; quad++)
        for (int64_t part = 0; part < units.parts; part++) {
            const int64_t unit = (segment * QUADS + quad) * units.parts + part;
            int8_t* to = pass.bytes + (unit * pass.rows + m) * units.x_bytes;
            for (int64_t k = 0; k < vectors; k++) {
                // 4 bits: the second half of the vectors are the high halves of bytes
                const int64_t half = vectors / 2;
                const int64_t at = bits == 8  ? part * inside + 16 * k
                                   : k < half ? part * 16 * half + 16 * k
                                              : group / 2 + part * 16 * half + 16 * (k - half);
                for (int64_t l = 0; l < QUAD; l++, to += 16) {
                    const __m256i words = _mm256_loadu_si256(
                        (const __m256i*)(whole + (quad * QUAD + l) * group + at));
                    if (halves) {
                        const __m256i high =
                            _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(128)), 8);
                        _mm_storeu_si128((__m128i*)to, _mm256_cvtepi16_epi8(high));
                        _mm_storeu_si128((__m128i*)(to + vectors * 64),
                                         _mm256_cvtepi16_epi8(words));
                    } else {
                        _mm_storeu_si128((__m128i*)to, _mm256_cvtepi16_epi8(words));
                    }
                }
            }
        }
}

// The codes of a unit as V vectors, in which each group has a quarter. `stride`: bytes from one
// group to the next.
template <int BITS, int V>
inline void codes_of(const uint8_t* from, int64_t stride, __m512i (&q)[V]) {
    const __m512i low = _mm512_set1_epi8(15);
    if constexpr (BITS == 8 && V == 4) {
        const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + stride),
                      c = _mm512_loadu_si512(from + 2 * stride),
                      d = _mm512_loadu_si512(from + 3 * stride);
        const __m512i ab0 = _mm512_shuffle_i64x2(a, b, 0x44),
                      ab1 = _mm512_shuffle_i64x2(a, b, 0xee),
                      cd0 = _mm512_shuffle_i64x2(c, d, 0x44),
                      cd1 = _mm512_shuffle_i64x2(c, d, 0xee);
        q[0] = _mm512_shuffle_i64x2(ab0, cd0, 0x88);
        q[1] = _mm512_shuffle_i64x2(ab0, cd0, 0xdd);
        q[2] = _mm512_shuffle_i64x2(ab1, cd1, 0x88);
        q[3] = _mm512_shuffle_i64x2(ab1, cd1, 0xdd);
    } else if constexpr (BITS == 8) {
        const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
        q[0] = _mm512_shuffle_i64x2(a, b, 0x88);
        q[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    } else if constexpr (V == 4) {
        auto pair = [&](const uint8_t* at) {
            return _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at)),
                _mm256_loadu_si256((const __m256i*)(at + stride)), 1);
        };
        const bool together = stride == 32;
        const __m512i a = together ? _mm512_loadu_si512(from) : pair(from);
        const __m512i b = together ? _mm512_loadu_si512(from + 64) : pair(from + 2 * stride);
        const __m512i first = _mm512_shuffle_i64x2(a, b, 0x88),
                      second = _mm512_shuffle_i64x2(a, b, 0xdd);
        q[0] = _mm512_and_si512(first, low);
        q[1] = _mm512_and_si512(second, low);
        q[2] = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
        q[3] = _mm512_and_si512(_mm512_srli_epi16(second, 4), low);
    } else {
        const __m512i a = _mm512_loadu_si512(from);
        q[0] = _mm512_and_si512(a, low);
        q[1] = _mm512_and_si512(_mm512_srli_epi16(a, 4), low);
    }
}

// Sixteen sums of sixteen vectors, in their order.
inline __m512 sums16(const __m512* v) {
    __m512 pair[8], four[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// R rows of weights with M rows of activations of X bits, into total[m][PACKED_TILE].
template <int BITS, int V, int X, int M, int R>
inline void multiply_bytes(const Units& units, const Pass& pass, const uint8_t* const (&codes)[R],
                           const uint16_t* const (&scales)[R], vf* total) {
    constexpr int UNIT = QUAD * 16 * V * BITS / 8, BYTES_X = V * 64 * X / 8;
    const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int64_t ahead_scales = AHEAD_OF_BYTES / units.group_bytes * 2;
    const int8_t* x = pass.bytes;
    vf sums[R][M] = {};
    for (int64_t segment = 0; segment < units.segments; segment++) {
        const int64_t left = units.groups - segment * SEGMENT;
        const __mmask16 there = left >= SEGMENT ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
        const int quads = left >= SEGMENT ? QUADS : (int)(left + QUAD - 1) / QUAD;
        alignas(64) float scale[R][SEGMENT];
        vf acc[R][M];
        const float* x_sums = pass.x_sums + segment * M * SEGMENT;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            prefetch(scales[r] + segment * SEGMENT * 2 + ahead_scales);
            const __m512i pairs =
                _mm512_maskz_loadu_epi32(there, scales[r] + segment * SEGMENT * 2);
            _mm512_store_ps(scale[r], _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)));
            const vf least =
                (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[r][m] = least * load<vf>(x_sums + m * SEGMENT);
        }
        for (int quad = 0; quad < quads; quad++) {
            vf by[R];
            const __m512i lane = _mm512_add_epi32(quarter, _mm512_set1_epi32(quad * QUAD));
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                by[r] = (vf)_mm512_permutexvar_ps(lane, _mm512_load_ps(scale[r]));
            for (int64_t part = 0; part < units.parts; part++, x += M * BYTES_X) {
                const int64_t group = segment * SEGMENT + quad * QUAD;
                const int64_t from = group * units.group_bytes + part * units.part_bytes;
                const int64_t next = group * units.group_bytes + part * UNIT + AHEAD_OF_BYTES;
                __m512i q[R][V];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                    for (int line = 0; line < UNIT; line += 64)
                        prefetch(codes[r] + next + line);
                    codes_of<BITS, V>(codes[r] + from, units.group_bytes, q[r]);
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const int8_t* high = x + m * BYTES_X;
                    vf by_x = {};
                    if (X == 8) {
                        const float* own = pass.group_scales + (segment * M + m) * SEGMENT;
                        by_x = (vf)_mm512_permutexvar_ps(lane, _mm512_loadu_ps(own));
                    }
                    __m512i t[R], low[R];
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) t[r] = low[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
                    for (int k = 0; k < V; k++) {
                        const int8_t* at = high + k * 64;
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++)
                            t[r] = _mm512_dpbusd_epi32(t[r], q[r][k], _mm512_loadu_si512(at));
                        if (X == 8) continue;
                        at += V * 64;
#pragma GCC unroll 4
                        for (int r = 0; r < R; r++)
                            low[r] = _mm512_dpbusd_epi32(low[r], q[r][k], _mm512_loadu_si512(at));
                    }
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) {
                        if (X == 16) t[r] = _mm512_add_epi32(_mm512_slli_epi32(t[r], 8), low[r]);
                        vf value = (vf)_mm512_cvtepi32_ps(t[r]);
                        if (X == 8) value *= by_x;
                        acc[r][m] += value * by[r];
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                if (X == 16) acc[r][m] *= all(pass.x_scales[segment * M + m]);
                sums[r][m] += acc[r][m];
            }
    }
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[m * PACKED_TILE + r] = sums[r][m];
}

// Where rows of codes lie. The last rows are copies with zeros behind them, because a unit may
// reach beyond a row.
struct Codes {
    const uint8_t* rows;
    int64_t stride, copied_from;
    const uint8_t* copies;
    int64_t copy_stride;
    const uint8_t* row(int64_t n) const {
        return n < copied_from ? rows + n * stride : copies + (n - copied_from) * copy_stride;
    }
};

// Copies of the rows at the end of the weights, from which a unit may reach beyond them.
struct Copies {
    Memory<uint8_t> memory_of;
    Codes codes;
    Copies(const Product& p, const Units& units) {
        codes.rows = codes.copies = (const uint8_t*)p.weights;
        codes.stride = p.weight_stride;
        codes.copied_from = p.out;
        const int64_t missing = -units.groups % QUAD + (units.groups % QUAD ? QUAD : 0);
        if (!missing) return;
        const int64_t bytes = units.groups * units.group_bytes,
                      beyond = missing * units.group_bytes + bytes;
        const int64_t count = std::min(p.out, (beyond + p.weight_stride - 1) / p.weight_stride);
        codes.copied_from = p.out - count;
        codes.copy_stride = beyond;
        memory_of = memory<uint8_t>(count * beyond);
        std::memset(memory_of.get(), 0, count * beyond);
        for (int64_t n = 0; n < count; n++)
            std::memcpy(memory_of.get() + n * beyond,
                        codes.rows + (codes.copied_from + n) * codes.stride, bytes);
        codes.copies = memory_of.get();
    }
};

// PACKED_TILE rows of weights, the last one again where there are fewer.
template <int BITS, int V, int X, int M>
void byte_tile(const Product& p, const Units& units, const Codes& codes, const Pass& pass,
               int64_t first, float* y) {
    constexpr int R = M == 1 ? 1 : 2;  // measured
    vf total[PACKED_TILE * M];
    for (int from = 0; from < PACKED_TILE; from += R) {
        const uint8_t* rows[R];
        const uint16_t* scales[R];
        for (int r = 0; r < R; r++) {
            const int64_t row = std::min(p.out - 1, first + from + r);
            rows[r] = codes.row(row);
            scales[r] = p.scales + row * p.scale_stride;
        }
        multiply_bytes<BITS, V, X, M, R>(units, pass, rows, scales, total + from);
    }
    for (int m = 0; m < M; m++)
        _mm512_storeu_ps(y + m * CHUNK, sums16((const __m512*)total + m * PACKED_TILE));
}

using ByteTile = void (*)(const Product&, const Units&, const Codes&, const Pass&, int64_t,
                          float*);
template <int BITS, int V>
ByteTile byte_tile_for(int activation_bits, int rows) {
    if (activation_bits == 16)
        return rows == 1 ? byte_tile<BITS, V, 16, 1> : byte_tile<BITS, V, 16, 2>;
    switch (rows) {
        case 1:
            return byte_tile<BITS, V, 8, 1>;
        case 2:
            return byte_tile<BITS, V, 8, 2>;
        case 4:
            return byte_tile<BITS, V, 8, 4>;
        case 6:
            return byte_tile<BITS, V, 8, 6>;
        default:
            return byte_tile<BITS, V, 8, 8>;
    }
}
ByteTile byte_tile_for(const Product& p, int rows) {
    if (p.bits == 8)
        return p.group == 32 ? byte_tile_for<8, 2>(p.activation_bits, rows)
                             : byte_tile_for<8, 4>(p.activation_bits, rows);
    return p.group == 32 ? byte_tile_for<4, 2>(p.activation_bits, rows)
                         : byte_tile_for<4, 4>(p.activation_bits, rows);
}

}  // namespace
#endif
