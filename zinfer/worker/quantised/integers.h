// Activations as integers: of 16 bits with a scale for each segment, or of 8 bits with a scale for
// each group. Every processor gets the same integers.
#pragma once

#include "problem.h"

namespace {

constexpr int SEGMENT = 16;       // groups
constexpr int PACKED_TILE = 16;   // rows of weights that every pass works on
constexpr int LARGEST_GROUP = 1024;
constexpr float MOST16 = 32639.f;  // 127 * 256 + 127: two signed bytes hold it
constexpr float MOST8 = 127.f;

// Activations of up to MOST rows as integers. `words` or `bytes` is used, as the kernel wants them.
struct Pass {
    int rows;                  // as computed: zeros fill up to a size that there is a kernel for
    int16_t* words;            // [blocks][rows][BLOCK]
    int8_t* bytes;             // [blocks][rows][2 or 1][codes of a block]: high bytes, low bytes
    float* x_scales;           // [segments][rows]; 1 for 8 bits
    float* x_sums;             // [segments][rows][SEGMENT]: sums of each group's integers;
                               // for 8 bits times its scale
    float* group_scales;       // [segments][rows][SEGMENT], for 8 bits
};

int padded(int64_t rows) { return rows <= 2 ? (int)rows : (int)(rows + 1) / 2 * 2; }

// Keeps a product from being fused with an addition: the same integers with and without FMA.
#if defined(__x86_64__)
#define KEEP(value) asm("" : "+x"(value))
#elif defined(__aarch64__)
#define KEEP(value) asm("" : "+w"(value))
#else
#define KEEP(value)
#endif

// W numbers at a time as integers: x * by, rounded to nearest.
template <class E>
inline void round_all(const typename E::T* x, int64_t count, float by, int16_t* whole) {
    const vf magic = all(12582912.f);  // adding 1.5 * 2^23 rounds
    for (int64_t i = 0; i < count; i += W) {
        vf scaled = E::get(x + i) * all(by);
        KEEP(scaled);
        const vi rounded = (vi)(scaled + magic) - (vi)magic;
        store(whole + i, __builtin_convertvector(rounded, vs));
    }
}

inline int32_t largest_of(vi value) {
#if defined(WIDE)
    return _mm512_reduce_max_epi32((__m512i)value);
#else
    int32_t most = 0;
    for (int i = 0; i < W; i++) most = std::max(most, value[i]);
    return most;
#endif
}

// The largest magnitude; NaN where a number is NaN or infinite. Magnitudes have the order of their
// bits as integers, and above all of them are infinity and NaN.
template <class E>
inline float largest_of(const typename E::T* x, int64_t count) {
    vi largest = {};
    for (int64_t i = 0; i < count; i += W) {
        const vi size = (vi)E::get(x + i) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    const int32_t most = largest_of(largest);
    float value;
    std::memcpy(&value, &most, 4);
    return most < 0x7f800000 ? value : NAN;
}

inline float sum_of(const int16_t* whole, int64_t count) {
    int32_t total = 0;
    for (int64_t i = 0; i < count; i++) total += whole[i];
    return (float)total;
}

// One segment of one row: integers in their order in `whole`, the rest as Pass has it. Returns the
// scale. `count` is a multiple of `group`, which is one of W.
template <class E>
float to_integers(const typename E::T* x, int64_t count, int64_t group, int bits, int16_t* whole,
                  float* sums, float* group_scales) {
    std::fill_n(whole, SEGMENT * group, (int16_t)0);
    std::fill_n(sums, SEGMENT, 0.f);
    if (bits == 8) {
        std::fill_n(group_scales, SEGMENT, 0.f);
        for (int64_t g = 0, at = 0; at < count; g++, at += group) {
            const float most = largest_of<E>(x + at, group);
            if (most < 1e-30f) continue;
            if (most == most) round_all<E>(x + at, group, MOST8 / most, whole + at);
            group_scales[g] = most / MOST8;
            sums[g] = sum_of(whole + at, group) * group_scales[g];
        }
        return 1.f;
    }
    const float most = largest_of<E>(x, count);
    if (most != most) return NAN;
    if (most < 1e-30f) return 0.f;
    round_all<E>(x, count, MOST16 / most, whole);
    for (int64_t g = 0, at = 0; at < count; g++, at += group) sums[g] = sum_of(whole + at, group);
    return most / MOST16;
}

}  // namespace
