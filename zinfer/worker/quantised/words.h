// Products for every processor: codes and activations are widened to 16-bit integers, whose pair
// products are added to 32-bit sums. A block is what four vectors of 16-bit integers hold.
#pragma once

#include "integers.h"

namespace {

constexpr int BLOCK = 8 * W;  // codes that are unpacked at once
constexpr int AHEAD = 8192;   // bytes of weights that are prefetched

// Pairs of 16-bit products, added to 32-bit sums.
inline vi dot(vi sums, vi codes, vi x) {
#if defined(WIDE) && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
#elif defined(WIDE)
    return sums + (vi)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
    return sums + (vi)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#else
    return sums + ((codes << 16) >> 16) * ((x << 16) >> 16) + (codes >> 16) * (x >> 16);
#endif
}

// One block of codes as four vectors of 16-bit integers. With P groups in a block each group has
// W / P sums of its own. Where they come from is written once more in `order_of`.
template <int BITS, int P>
inline void unpack(const uint8_t* from, vi (&to)[4]) {
    if (BITS == 4) {
        const vw words = load<vw>(from);
        const vw low = vw{} + (uint16_t)15;
        to[0] = (vi)(words & low);
        to[1] = (vi)((words >> 4) & low);
        to[2] = (vi)((words >> 8) & low);
        to[3] = (vi)(words >> 12);
        return;
    }
    vw a = load<vw>(from), b = load<vw>(from + 4 * W);
#if defined(WIDE)
    if (P == 2) {
        const __m512i first = (__m512i)a, second = (__m512i)b;
        a = (vw)_mm512_shuffle_i64x2(first, second, 0x44);
        b = (vw)_mm512_shuffle_i64x2(first, second, 0xee);
    } else if (P == 4) {
        const __m512i first = (__m512i)a, second = (__m512i)b;
        a = (vw)_mm512_shuffle_i64x2(first, second, 0x88);
        b = (vw)_mm512_shuffle_i64x2(first, second, 0xdd);
    }
#elif defined(__AVX2__)
    if (P == 2) {
        const __m256i first = (__m256i)a, second = (__m256i)b;
        a = (vw)_mm256_permute2x128_si256(first, second, 0x20);
        b = (vw)_mm256_permute2x128_si256(first, second, 0x31);
    }
#endif
    const vw low = vw{} + (uint16_t)255;
    to[0] = (vi)(a & low);
    to[1] = (vi)(a >> 8);
    to[2] = (vi)(b & low);
    to[3] = (vi)(b >> 8);
}

// Which input each of a block's 16-bit integers belongs to, counted from the first of its block
// (its group, where a group has several blocks; `part` says which).
void order_of(int bits, int64_t group, int64_t part, int32_t* order) {
    const int64_t inside = std::min<int64_t>(group, BLOCK), half = inside / 2;
    for (int v = 0; v < 4; v++)
        for (int word = 0; word < 2 * W; word++) {
            if (bits == 4) {
                const int64_t byte = 2 * word + v / 2, at = byte / half;
                const int64_t value = at * group + part * half + byte % half;
                order[v * 2 * W + word] = (int32_t)(value + (v % 2) * group / 2);
            } else {
                const int64_t byte = 2 * word + v % 2;
                const int64_t value = byte / half * inside + v / 2 * half + byte % half;
                order[v * 2 * W + word] = (int32_t)(part * BLOCK + value);
            }
        }
}

struct Shape {
    int64_t groups, segments, blocks, per_segment, per_group;  // blocks in a segment, in a group
    int64_t row_bytes, scale_stride;
};

Shape shape_of(const Product& p, int64_t groups) {
    Shape shape;
    shape.groups = groups;
    shape.segments = (groups + SEGMENT - 1) / SEGMENT;
    shape.blocks = (groups * p.group + BLOCK - 1) / BLOCK;
    shape.per_segment = SEGMENT * p.group / BLOCK;
    shape.per_group = std::max<int64_t>(1, p.group / BLOCK);
    shape.row_bytes = groups * p.group * p.bits / 8;
    shape.scale_stride = p.scale_stride;
    return shape;
}

// Scales of up to sixteen groups as floats; returns their minima in `least`.
inline void read_scales(const uint16_t* from, int64_t count, float* scale, vf (&least)[16 / W]) {
    alignas(64) uint16_t copy[2 * SEGMENT];
    if (count < SEGMENT) {
        std::memset(copy, 0, sizeof copy);
        std::memcpy(copy, from, count * 4);
        from = copy;
    }
#if defined(WIDE)
    const __m512i pairs = _mm512_loadu_si512(from);
    store(scale, (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)));
    least[0] = (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
#else
    for (int i = 0; i < SEGMENT; i++) {
        scale[i] = half_to_float(from[2 * i]);
        least[i / W][i % W] = half_to_float(from[2 * i + 1]);
    }
#endif
}

// The scale of each sum of a block that begins with group `first` of its segment.
template <int P>
inline vf lanes(const float* scale, int64_t first) {
    if (P == 1) return all(scale[first]);
#if defined(WIDE)
    const __m512i at = _mm512_srli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), P == 2 ? 3 : 2);
    return (vf)_mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32((int)first)),
                                     _mm512_loadu_ps(scale));
#else
    vf value;
    for (int i = 0; i < W; i++) value[i] = scale[first + i / (W / P)];
    return value;
#endif
}

// R rows of weights with M rows of activations of X bits.
template <int BITS, int P, int X, int M, int R>
inline void multiply_rows(const Shape& shape, const Pass& pass, const uint8_t* const (&codes)[R],
                          const uint16_t* const (&scales)[R], float* y) {
    constexpr int BYTES = BLOCK * BITS / 8;
    vf total[R][M] = {};
    const int16_t* x = pass.words;
    for (int64_t segment = 0; segment < shape.segments; segment++) {
        alignas(64) float scale[R][SEGMENT];
        vf acc[R][M];
        const float* x_sums = pass.x_sums + segment * M * SEGMENT;
        for (int r = 0; r < R; r++) {
            vf least[16 / W];
            prefetch(scales[r] + segment * SEGMENT * 2 + R * shape.scale_stride);
            read_scales(scales[r] + segment * SEGMENT * 2,
                        std::min<int64_t>(SEGMENT, shape.groups - segment * SEGMENT), scale[r],
                        least);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                acc[r][m] = least[0] * load<vf>(x_sums + m * SEGMENT);
                for (int i = 1; i < 16 / W; i++)
                    acc[r][m] += least[i] * load<vf>(x_sums + m * SEGMENT + i * W);
            }
        }
        const int64_t first = segment * shape.per_segment,
                      last = std::min(shape.blocks, first + shape.per_segment);
        for (int64_t block = first; block < last; block++, x += M * BLOCK) {
            vi q[R][4];
            vf by[R];
            const int64_t inside = block - first,
                          group = P > 1 ? inside * P : inside / shape.per_group;
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t* from = codes[r] + block * BYTES;
                alignas(64) uint8_t copy[BYTES];
                if (__builtin_expect((block + 1) * BYTES > shape.row_bytes, 0)) {
                    std::memset(copy, 0, sizeof copy);
                    std::memcpy(copy, from, shape.row_bytes - block * BYTES);
                    from = copy;
                } else {
                    for (int at = 0; at < BYTES; at += 64) prefetch(from + AHEAD + at);
                }
                unpack<BITS, P>(from, q[r]);
                by[r] = lanes<P>(scale[r], group);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const int16_t* at = x + m * BLOCK;
                vf by_x = {};
                if (X == 8)
                    by_x = lanes<P>(pass.group_scales + (segment * M + m) * SEGMENT, group);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    vi t = {};
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) t = dot(t, q[r][v], load<vi>(at + v * 2 * W));
                    vf value = __builtin_convertvector(t, vf);
                    if (X == 8) value *= by_x;
                    acc[r][m] += value * by[r];
                }
            }
        }
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                total[r][m] += acc[r][m] * all(pass.x_scales[segment * M + m]);
    }
    write_sums<R, M>(total, y);
}

// PACKED_TILE rows of weights, the last one again where there are fewer.
template <int BITS, int P, int X, int M>
void multiply_tile(const Product& p, const Shape& shape, const Pass& pass, int64_t first,
                   float* y) {
    constexpr int R = M == 1 && BITS == 4 ? 1 : M <= 2 ? 4 : 2;  // measured: docs/quantised.md
    for (int from = 0; from < PACKED_TILE; from += R) {
        const uint8_t* codes[R];
        const uint16_t* scales[R];
        for (int r = 0; r < R; r++) {
            const int64_t row = std::min(p.out - 1, first + from + r);
            codes[r] = (const uint8_t*)p.weights + row * p.weight_stride;
            scales[r] = p.scales + row * p.scale_stride;
        }
        multiply_rows<BITS, P, X, M, R>(shape, pass, codes, scales, y + from);
    }
}

using Tile = void (*)(const Product&, const Shape&, const Pass&, int64_t, float*);
template <int BITS, int P, int X>
Tile tile_for(int rows) {
    switch (rows) {
        case 1:
            return multiply_tile<BITS, P, X, 1>;
        case 2:
            return multiply_tile<BITS, P, X, 2>;
        case 4:
            return multiply_tile<BITS, P, X, 4>;
        case 6:
            return multiply_tile<BITS, P, X, 6>;
        default:
            return multiply_tile<BITS, P, X, 8>;
    }
}
template <int BITS, int X>
Tile tile_for([[maybe_unused]] int64_t group, int rows) {
#if defined(WIDE)
    if (group == 32) return tile_for<BITS, 4, X>(rows);
    if (group == 64) return tile_for<BITS, 2, X>(rows);
#elif defined(__AVX2__)
    if (group == 32) return tile_for<BITS, 2, X>(rows);
#endif
    return tile_for<BITS, 1, X>(rows);
}

// How products.cpp uses these products.
struct Words {
    const Product& p;
    const Shape shape;
    Memory<int32_t> order;  // of every block of a group

    Words(const Product& p, int64_t groups) : p(p), shape(shape_of(p, groups)) {
        order = memory<int32_t>(shape.per_group * BLOCK);
        for (int64_t part = 0; part < shape.per_group; part++)
            order_of(p.bits, p.group, part, order.get() + part * BLOCK);
    }

    // Put a segment's integers where the kernel reads them.
    void arrange(const Pass& pass, int64_t segment, int m, const int16_t* whole) const {
        for (int64_t block = 0; block < shape.per_segment; block++) {
            const int64_t part = block % shape.per_group;
            const int16_t* base = whole + (block - part) * BLOCK;
            const int32_t* which = order.get() + part * BLOCK;
            int16_t* to =
                pass.words + ((segment * shape.per_segment + block) * pass.rows + m) * BLOCK;
            for (int i = 0; i < BLOCK; i++) to[i] = base[which[i]];
        }
    }

    // Multiply the tile of weights that begins with row `first`.
    void multiply(const Pass& pass, int64_t first, int64_t, float* y) const {
        Tile tile;
        if (p.activation_bits == 8)
            tile = p.bits == 8 ? tile_for<8, 8>(p.group, pass.rows)
                               : tile_for<4, 8>(p.group, pass.rows);
        else
            tile = p.bits == 8 ? tile_for<8, 16>(p.group, pass.rows)
                               : tile_for<4, 16>(p.group, pass.rows);
        tile(p, shape, pass, first, y);
    }
};

}  // namespace
