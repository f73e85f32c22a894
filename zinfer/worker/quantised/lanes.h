// Products for processors with AVX-512 VNNI, which multiply 64 unsigned codes with 64 signed bytes
// in one instruction. A 16-bit activation is two of these bytes: 256 * high + low.
//
// Sixteen rows of weights are multiplied at a time, one in each lane of a vector. So a group's
// integers need no adding up across lanes, and its sixteen sums meet sixteen scales in one
// multiplication. Four codes of each row share a vector; four activations are broadcast to all of
// its lanes. A block is 64 bytes of codes of each row: 64 codes of 8 bits, or 128 of 4.
#pragma once

#include "integers.h"

#if defined(WIDE) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define USES_LANES 1

namespace {

constexpr int LANES = 16;
constexpr int STEPS = 8;  // in which rows become columns
static_assert(PACKED_TILE == LANES, "a tile is what the lanes hold");

// The steps and columns of these functions have to be constants.
#define INLINE __attribute__((always_inline)) inline

// Sixteen vectors of 32-bit numbers.
struct Columns {
    __m512i of[LANES];
};

// Sixteen rows of sixteen 32-bit numbers become columns in STEPS, which are done between
// multiplications: a processor that only shuffles does not multiply. `between` keeps what the
// first four steps leave for the others. Numbers that are not `there` become zero.
template <class T>
INLINE void turn(int step, const T* rows, int64_t stride, __mmask16 there, Columns& between,
                 Columns& columns) {
    __m512i* half = between.of;
    if (step < 4) {
        __m512i v[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            v[r] = _mm512_maskz_loadu_epi32(there, rows + (4 * step + r) * stride);
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]),
                      c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        half[4 * step] = _mm512_unpacklo_epi64(a, c);
        half[4 * step + 1] = _mm512_unpackhi_epi64(a, c);
        half[4 * step + 2] = _mm512_unpacklo_epi64(b, d);
        half[4 * step + 3] = _mm512_unpackhi_epi64(b, d);
        return;
    }
    const int k = step - 4;
    const __m512i a = half[k], b = half[k + 4], c = half[k + 8], d = half[k + 12];
    const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x88), ab1 = _mm512_shuffle_i32x4(a, b, 0xdd),
                  cd0 = _mm512_shuffle_i32x4(c, d, 0x88), cd1 = _mm512_shuffle_i32x4(c, d, 0xdd);
    _mm512_store_si512(columns.of + k, _mm512_shuffle_i32x4(ab0, cd0, 0x88));
    _mm512_store_si512(columns.of + k + 4, _mm512_shuffle_i32x4(ab1, cd1, 0x88));
    _mm512_store_si512(columns.of + k + 8, _mm512_shuffle_i32x4(ab0, cd0, 0xdd));
    _mm512_store_si512(columns.of + k + 12, _mm512_shuffle_i32x4(ab1, cd1, 0xdd));
}

// Add to each lane the products of its four codes with the same four activations. GCC does not
// read activations within the instruction by itself.
inline __m512i add_products(__m512i sums, __m512i codes, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const int32_t*)x));
    return sums;
}

// One block of codes with M rows of activations of X bits, added to acc. `S` groups share it.
// scale: [S][LANES]; x_scale: [M][SEGMENT], for 8 bits. `beside` is called after each column.
template <int BITS, int X, int M, int S, class F>
INLINE void multiply_block(const Columns& codes, const int8_t* x, const float* scale,
                           const float* x_scale, __m512 (&acc)[M], const F& beside) {
    constexpr int HALVES = 8 / BITS, PLANE = 64 * HALVES, EACH = LANES / S;
    constexpr bool TWO_CHAINS = X == 8 && M <= 2;  // else each sum waits for the one before
    const __m512i low_half = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
        __m512i high[M], low[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) high[m] = low[m] = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int i = s * EACH; i < (s + 1) * EACH; i++) {
            const __m512i column = _mm512_load_si512(codes.of + i);
            __m512i q[HALVES];
            q[0] = BITS == 8 ? column : _mm512_and_si512(column, low_half);
            if (BITS == 4)
                q[HALVES - 1] = _mm512_and_si512(_mm512_srli_epi16(column, 4), low_half);
#pragma GCC unroll 2
            for (int half = 0; half < HALVES; half++)
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const int8_t* at = x + m * PLANE * X / 8 + (i * HALVES + half) * 4;
                    if (TWO_CHAINS && (i * HALVES + half) % 2)
                        low[m] = add_products(low[m], q[half], at);
                    else
                        high[m] = add_products(high[m], q[half], at);
                    if (X == 16) low[m] = add_products(low[m], q[half], at + PLANE);
                }
            beside(i);
        }
        const __m512 by = _mm512_load_ps(scale + s * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            if (X == 16) high[m] = _mm512_slli_epi32(high[m], 8);
            if (X == 16 || TWO_CHAINS) high[m] = _mm512_add_epi32(high[m], low[m]);
            __m512 value = _mm512_cvtepi32_ps(high[m]);
            if (X == 8) value = _mm512_mul_ps(value, _mm512_set1_ps(x_scale[m * SEGMENT + s]));
            acc[m] = _mm512_fmadd_ps(value, by, acc[m]);
        }
    }
}

// The scales of LANES rows as floats, of up to sixteen groups. Adds to acc their minima times the
// sums of the groups' activations. pairs: scale and minimum of a group, `stride` apart.
template <int M>
INLINE void read_scales(const uint32_t* pairs, int64_t stride, int64_t count, const float* x_sums,
                        float* scale, __m512 (&acc)[M]) {
    const __mmask16 there = (__mmask16)((1u << count) - 1);
    Columns between, columns;
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++) turn(step, pairs, stride, there, between, columns);
    for (int g = 0; g < SEGMENT; g++) {
        const __m512i pair = _mm512_load_si512(columns.of + g);
        const __m512i minima = _mm512_srli_epi32(pair, 16);
        const __m512 least = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(minima));
        _mm512_store_ps(scale + g * LANES, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair)));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
            acc[m] = _mm512_fmadd_ps(least, _mm512_set1_ps(x_sums[m * SEGMENT + g]), acc[m]);
    }
}

// How a row of codes is divided, and a copy of the last rows where they do not fill the lanes.
struct Blocks {
    int64_t groups, segments, group_bytes, row_bytes;
    int64_t per_segment;  // blocks
    int64_t x_bytes;      // activations of a block, one row
    Memory<uint8_t> last_codes;
    Memory<uint16_t> last_scales;

    Blocks(const Product& p, int64_t groups) : groups(groups) {
        segments = (groups + SEGMENT - 1) / SEGMENT;
        group_bytes = p.group * p.bits / 8;
        row_bytes = groups * group_bytes;
        per_segment = SEGMENT * group_bytes / 64;
        x_bytes = 64 * 8 / p.bits * p.activation_bits / 8;
        const int64_t last = p.out % LANES, first = p.out - last;
        if (!last) return;
        last_codes = memory<uint8_t>(LANES * row_bytes);
        last_scales = memory<uint16_t>(LANES * groups * 2);
        std::memset(last_codes.get(), 0, LANES * row_bytes);
        std::memset(last_scales.get(), 0, LANES * groups * 4);
        for (int64_t r = 0; r < last; r++) {
            std::memcpy(last_codes.get() + r * row_bytes,
                        (const uint8_t*)p.weights + (first + r) * p.weight_stride, row_bytes);
            std::memcpy(last_scales.get() + r * groups * 2,
                        p.scales + (first + r) * p.scale_stride, groups * 4);
        }
    }
};

// Where LANES rows of weights lie.
struct Rows {
    const uint8_t* codes;
    const uint16_t* scales;
    int64_t stride, scale_stride;

    Rows(const Product& p, const Blocks& blocks, int64_t first) {
        const bool whole = first + LANES <= p.out;
        codes = whole ? (const uint8_t*)p.weights + first * p.weight_stride
                      : blocks.last_codes.get();
        scales = whole ? p.scales + first * p.scale_stride : blocks.last_scales.get();
        stride = whole ? p.weight_stride : blocks.row_bytes;
        scale_stride = whole ? p.scale_stride : blocks.groups * 2;
    }
};

// LANES rows of weights with M rows of activations of X bits, into y[m][CHUNK]. `S`: groups of a
// block. `next`: the row with which the tile after this one begins; it is prefetched.
template <int BITS, int X, int M, int S>
void lanes_tile(const Product& p, const Blocks& blocks, const Pass& pass, int64_t first,
                int64_t next, float* y) {
    // Measured: what is multiplied soon comes into the second cache, else into the first.
    constexpr int NEAR = BITS == 4 && M * X > 40 ? 3 : 2;
    const Rows rows(p, blocks, first);
    const char* next_codes = (const char*)p.weights + next * p.weight_stride;
    const char* next_scales = (const char*)(p.scales + next * p.scale_stride);
    const auto there = [&](int64_t at) {
        const int64_t left = std::min<int64_t>(64, blocks.row_bytes - at) / 4;
        return left > 0 ? (__mmask16)((1u << left) - 1) : (__mmask16)0;
    };
    Columns between, turned[2];  // of this block, and of the next one
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++)
        turn(step, rows.codes, rows.stride, there(0), between, turned[0]);
    const int8_t* x = pass.bytes;
    __m512 sums[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
    int64_t block = 0;
    for (int64_t segment = 0; segment < blocks.segments; segment++) {
        const int64_t groups = std::min<int64_t>(SEGMENT, blocks.groups - segment * SEGMENT);
        const int64_t until = (segment * SEGMENT + groups) * blocks.group_bytes;
        alignas(64) float scale[SEGMENT * LANES];
        __m512 acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) acc[m] = _mm512_setzero_ps();
        read_scales(((const uint32_t*)rows.scales) + segment * SEGMENT, rows.scale_stride / 2,
                    groups, pass.x_sums + segment * M * SEGMENT, scale, acc);
        int64_t group = 0, inside = 0;
        for (; block * 64 < until; block++, x += M * blocks.x_bytes) {
            const int64_t at = block * 64 + 64;
            const __mmask16 coming = there(at);
            const uint8_t* from = rows.codes + (coming ? at : 0);
            const float* x_scale =
                X == 8 ? pass.group_scales + segment * M * SEGMENT + group : nullptr;
            __builtin_prefetch(next_scales + block * 64, 0, NEAR);
            multiply_block<BITS, X, M, S>(
                turned[block % 2], x, scale + group * LANES, x_scale, acc, [&](int i) {
                    __builtin_prefetch(next_codes + (block * LANES + i) * 64, 0, NEAR);
                    if (i % 2)
                        turn(i / 2, from, rows.stride, coming, between, turned[(block + 1) % 2]);
                });
            inside += 64;
            if (inside >= blocks.group_bytes) group += S, inside = 0;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float by = X == 16 ? pass.x_scales[segment * M + m] : 1.f;
            sums[m] = _mm512_fmadd_ps(acc[m], _mm512_set1_ps(by), sums[m]);
        }
    }
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y + m * CHUNK, sums[m]);
}

using LanesTile = void (*)(const Product&, const Blocks&, const Pass&, int64_t, int64_t, float*);
template <int BITS, int X, int S>
LanesTile lanes_tile_for(int rows) {
    switch (rows) {
        case 1:
            return lanes_tile<BITS, X, 1, S>;
        case 2:
            return lanes_tile<BITS, X, 2, S>;
        case 4:
            return lanes_tile<BITS, X, 4, S>;
        case 6:
            return lanes_tile<BITS, X, 6, S>;
        default:
            return lanes_tile<BITS, X, 8, S>;
    }
}
template <int BITS, int X>
LanesTile lanes_tile_for(int64_t group_bytes, int rows) {
    if (group_bytes == 16) return lanes_tile_for<BITS, X, 4>(rows);
    if (group_bytes == 32) return lanes_tile_for<BITS, X, 2>(rows);
    return lanes_tile_for<BITS, X, 1>(rows);
}

// How products.cpp uses these products.
struct Lanes {
    const Product& p;
    const Blocks blocks;

    Lanes(const Product& p, int64_t groups) : p(p), blocks(p, groups) {}

    // Put a segment's integers where the kernel reads them: four by four. Of 4-bit codes those of
    // the low halves of four bytes come before those of the high halves. High bytes come first.
    void arrange(const Pass& pass, int64_t segment, int m, const int16_t* whole) const {
        for (int64_t block = 0; block < blocks.per_segment; block++) {
            const int64_t number = segment * blocks.per_segment + block;
            int8_t* to = pass.bytes + (number * pass.rows + m) * blocks.x_bytes;
            if (p.activation_bits == 16) {
                arrange_block(block, whole, to, [](__m256i words) {
                    return _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(128)), 8);
                });
                to += blocks.x_bytes / 2;
            }
            arrange_block(block, whole, to, [](__m256i words) { return words; });
        }
    }

    // Multiply the tile of weights that begins with row `first`.
    void multiply(const Pass& pass, int64_t first, int64_t next, float* y) const {
        LanesTile tile;
        if (p.bits == 8)
            tile = p.activation_bits == 8 ? lanes_tile_for<8, 8>(blocks.group_bytes, pass.rows)
                                          : lanes_tile_for<8, 16>(blocks.group_bytes, pass.rows);
        else
            tile = p.activation_bits == 8 ? lanes_tile_for<4, 8>(blocks.group_bytes, pass.rows)
                                          : lanes_tile_for<4, 16>(blocks.group_bytes, pass.rows);
        tile(p, blocks, pass, first, next, y);
    }

    template <class F>
    void arrange_block(int64_t block, const int16_t* whole, int8_t* to, const F& byte_of) const {
        const auto bytes = [&](const int16_t* from) {
            return _mm256_cvtepi16_epi8(byte_of(_mm256_loadu_si256((const __m256i*)from)));
        };
        int64_t group = block * 64 / blocks.group_bytes, inside = block * 64 % blocks.group_bytes;
        for (int64_t byte = 0; byte < 64; byte += 16, inside += 16) {
            if (inside == blocks.group_bytes) group++, inside = 0;
            const int16_t* from = whole + group * p.group + inside;
            const __m128i first = bytes(from);
            if (p.bits == 8) {
                _mm_storeu_si128((__m128i*)to, first);
                to += 16;
                continue;
            }
            const __m128i second = bytes(from + p.group / 2);
            _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(first, second));
            _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi32(first, second));
            to += 32;
        }
    }
};

}  // namespace
#endif
