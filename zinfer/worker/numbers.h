// Read vectors from memory, float16 numbers and sums of vectors: what zinfer's kernels share.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

template <class V>
inline V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

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

// Add up the numbers of a vector, or find the largest, half with half.
template <class V>
inline float sum(V value) {
#if defined(__AVX512F__)
    if constexpr (sizeof value == 64) return _mm512_reduce_add_ps((__m512)value);
#endif
    float part[sizeof value / 4];
    std::memcpy(part, &value, sizeof value);
    for (size_t half = sizeof value / 8; half; half /= 2)
        for (size_t i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}
template <class V>
inline float largest(V value) {
#if defined(__AVX512F__)
    if constexpr (sizeof value == 64) return _mm512_reduce_max_ps((__m512)value);
#endif
    float part[sizeof value / 4];
    std::memcpy(part, &value, sizeof value);
    for (size_t half = sizeof value / 8; half; half /= 2)
        for (size_t i = 0; i < half; i++)
            part[i] = part[i] < part[i + half] ? part[i + half] : part[i];
    return part[0];
}
#if defined(__AVX2__)
inline __m256 eight_of(__m256 value) { return value; }
#if defined(__AVX512F__)
inline __m256 eight_of(__m512 value) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(value), high);
}
#endif
#endif
// The sums of eight vectors at once.
template <class V>
inline void sums8(const V* value, float* to) {
#if defined(__AVX2__)
    __m256 a[8];
    for (int i = 0; i < 8; i++) a[i] = eight_of(value[i]);
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

}  // namespace
