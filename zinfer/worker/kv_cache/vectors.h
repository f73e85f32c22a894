// Vectors of floats for any processor, and the element types that are read into them.
//
// The vectors are GCC/Clang vector extensions, so the same text becomes AVX-512, AVX2, NEON or
// scalar code, whatever the compiler is told to use. All of it has internal linkage.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../numbers.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
constexpr int HEADS = 4, VALUE_HEADS = 8;
#else
constexpr int W = 8;
constexpr int HEADS = 2, VALUE_HEADS = 4;
#endif
constexpr int BLOCK = 128;  // most tokens between two updates of the running maximum
constexpr int MAX_DIM = 512, MAX_GROUPS = MAX_DIM / 16, ROWS = 8;
constexpr float MASKED = -1e30f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

inline void store(float* to, vf value) { std::memcpy(to, &value, sizeof value); }
inline vf all(float value) { return value - vf{}; }
inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }  // into L2

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
