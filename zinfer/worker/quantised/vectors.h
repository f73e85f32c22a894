// Vectors of the widest kind that the processor has, element types, and sums over vectors.
//
// The vectors are GCC/Clang vector extensions, so the same text becomes AVX-512, AVX2, NEON or
// scalar code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../numbers.h"

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 1
constexpr int W = 16;  // 32-bit numbers in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vw __attribute__((vector_size(W * 4)));  // the 16-bit numbers of a vector
typedef int16_t vs __attribute__((vector_size(W * 2)));

template <class V>
inline void store(void* to, V value) {
    std::memcpy(to, &value, sizeof value);
}
inline vf all(float value) { return value - vf{}; }
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 3); }

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, 0);
#else
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint16_t sign = (word >> 16) & 0x8000u;
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00u;
    if (size >= 65520.f) return sign | 0x7c00u;
    if (size < 6.103515625e-05f) return sign | (uint16_t)std::nearbyint(std::ldexp(size, 24));
    word &= 0x7fffffffu;
    word += 0xfffu + ((word >> 13) & 1);
    return sign | (uint16_t)((word - (112u << 23)) >> 13);
#endif
}

// Element types: W of them as floats, and one float as an element.
struct Float32 {
    using T = float;
    static vf get(const T* from) { return load<vf>(from); }
    static float one(T value) { return value; }
    static T of(float value) { return value; }
    static void put(T* to, vf value) { store(to, value); }
};
struct BFloat16 {
    using T = uint16_t;
    static vf get(const T* from) {
        return (vf)(__builtin_convertvector(load<vh>(from), vu) << 16);
    }
    static float one(T value) {
        uint32_t word = (uint32_t)value << 16;
        float wide;
        std::memcpy(&wide, &word, 4);
        return wide;
    }
    static T of(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        if (std::isnan(value)) return (uint16_t)(word >> 16) | 0x40u;
        return (uint16_t)((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
    }
    static void put(T* to, vf value) {
        const vu word = (vu)value;
        const vu rounded = (word + 0x7fffu + ((word >> 16) & 1)) >> 16;
        const vu kept = value == value ? rounded : (word >> 16 | 0x40u);
        store(to, __builtin_convertvector(kept, vh));
    }
};
struct Float16 {
    using T = uint16_t;
    static vf get(const T* from) {
#if defined(WIDE)
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__) && defined(__AVX2__)
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
        vf value;
        for (int i = 0; i < W; i++) value[i] = half_to_float(from[i]);
        return value;
#endif
    }
    static float one(T value) { return half_to_float(value); }
    static T of(float value) { return float_to_half(value); }
    static void put(T* to, vf value) {
#if defined(WIDE)
        store(to, _mm512_cvtps_ph((__m512)value, 0));
#else
        for (int i = 0; i < W; i++) to[i] = of(value[i]);
#endif
    }
};

struct Freed {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Memory = std::unique_ptr<T[], Freed>;
template <class T>
Memory<T> memory(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    return Memory<T>((T*)std::aligned_alloc(64, bytes));
}

}  // namespace
