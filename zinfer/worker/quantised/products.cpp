// Products of few rows of activations with a large matrix of weights on the host.
//
// y[m][n] = sum over k of x[m][k] * w[n][k] + bias[n]. Every weight is read once from memory, so
// its bytes are the limit for a few rows, and arithmetic for many.
//
// Packed weights, in groups of g along k: value = scale * code + minimum.
//   codes      8 bits: one unsigned code a byte; 4 bits: byte j of a group of g values holds value
//              j (low half) and value j + g/2 (high half)
//   scales     float16 [out][in / g][2]: scale and minimum of a group
// Sixteen groups are a segment. A row's activations become 16-bit integers with one scale for each
// segment; integer products are exact, and each group adds its sum times its scale in float32.
// Minima are multiplied by the sum of a group's integers. The error of an activation is at most
// half of (its segment's largest activation / 32767).
// A segment with NaN or infinity makes all outputs of its row NaN.
//
// Weights of 16 bits are multiplied as they are, in float32 (or by AVX512_BF16's pair products).
//
// The vectors are GCC/Clang vector extensions, so the same text becomes AVX-512, AVX2, NEON or
// scalar code. A block is what four vectors of 16-bit integers hold.

#include <algorithm>
#include <cmath>
#include <cstdint>
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
constexpr int BLOCK = 8 * W;  // codes that are unpacked at once
constexpr int SEGMENT = 16;   // groups
constexpr int MOST = 8;       // rows of activations that pass over the weights together
constexpr int TILE = 12;      // rows of weights that every pass works on
constexpr int CHUNK = 48;     // rows of weights that a thread takes at a time
// Threads up to which one alone prepares the activations: waiting for each other costs more, above
// all where other processes use the cores too.
constexpr int ALONE = 4;
constexpr int LARGEST_GROUP = 1024;
constexpr int AHEAD = 8192;   // bytes of weights that are prefetched

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
};

inline float sum(vf value) {
    float total = 0;
    for (int i = 0; i < W; i++) total += value[i];
    return total;
}
// The sums of eight vectors at once.
inline void sums8(const vf* value, float* to) {
#if defined(__AVX2__)
    __m256 a[8];
    for (int i = 0; i < 8; i++) {
#if defined(WIDE)
        const __m512 wide = (__m512)value[i];
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
        a[i] = _mm256_add_ps(_mm512_castps512_ps256(wide), high);
#else
        a[i] = (__m256)value[i];
#endif
    }
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
// Sums of R rows of weights and M of activations, into y[m][CHUNK].
template <int R, int M>
inline void write_sums(const vf (&value)[R][M], float* y) {
    constexpr int COUNT = R * M, ROOM = (COUNT + 7) / 8 * 8;
    alignas(64) float sums[ROOM];
    vf padded[ROOM] = {};
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) padded[i] = value[i / M][i % M];
#pragma GCC unroll 2
    for (int i = 0; i < ROOM; i += 8) sums8(padded + i, sums + i);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) y[m * CHUNK + r] = sums[r * M + m];
}

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

}  // namespace

extern "C" {
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Product {
    const void* x;           // [rows][in]
    const void* weights;     // codes, or 16-bit weights of x's kind
    const uint16_t* scales;  // null for 16-bit weights
    const void* bias;        // [out] or null, x's kind
    void* y;                 // [rows][out], x's kind
    int64_t rows, in, out, group;
    int64_t x_stride, weight_stride, scale_stride;  // elements (codes: bytes) from row to row
    int32_t bits, kind, threads;
};
}

namespace {

// Activations of up to MOST rows as integers.
struct Pass {
    int rows;               // as computed: zeros fill up to a size that there is a kernel for
    const int16_t* x;       // [blocks][rows][BLOCK]
    const float* x_scales;  // [segments][rows]
    const float* x_sums;    // [segments][rows][SEGMENT]: sums of the integers of each group
};
struct Shape {
    int64_t groups, segments, blocks, per_segment, per_group;  // blocks in a segment, in a group
    int64_t row_bytes, scale_stride;
};

int padded(int64_t rows) { return rows <= 2 ? (int)rows : (int)(rows + 1) / 2 * 2; }

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
                                     _mm512_load_ps(scale));
#else
    vf value;
    for (int i = 0; i < W; i++) value[i] = scale[first + i / (W / P)];
    return value;
#endif
}

// R rows of weights with M rows of activations.
template <int BITS, int P, int M, int R>
inline void multiply_rows(const Shape& shape, const Pass& pass, const uint8_t* const (&codes)[R],
                          const uint16_t* const (&scales)[R], float* y) {
    constexpr int BYTES = BLOCK * BITS / 8;
    vf total[R][M] = {};
    const int16_t* x = pass.x;
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
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    vi t = {};
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) t = dot(t, q[r][v], load<vi>(at + v * 2 * W));
                    acc[r][m] += __builtin_convertvector(t, vf) * by[r];
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

// TILE rows of weights, the last one again where there are fewer.
template <int BITS, int P, int M>
void multiply_tile(const Product& p, const Shape& shape, const Pass& pass, int64_t first,
                   float* y) {
    constexpr int R = M == 1 && BITS == 4 ? 1 : M <= 2 ? 4 : 2;  // measured: docs/quantised.md
    for (int from = 0; from < TILE; from += R) {
        const uint8_t* codes[R];
        const uint16_t* scales[R];
        for (int r = 0; r < R; r++) {
            const int64_t row = std::min(p.out - 1, first + from + r);
            codes[r] = (const uint8_t*)p.weights + row * p.weight_stride;
            scales[r] = p.scales + row * p.scale_stride;
        }
        multiply_rows<BITS, P, M, R>(shape, pass, codes, scales, y + from);
    }
}

using Tile = void (*)(const Product&, const Shape&, const Pass&, int64_t, float*);
template <int BITS, int P>
Tile tile_for(int rows) {
    switch (rows) {
        case 1:
            return multiply_tile<BITS, P, 1>;
        case 2:
            return multiply_tile<BITS, P, 2>;
        case 4:
            return multiply_tile<BITS, P, 4>;
        case 6:
            return multiply_tile<BITS, P, 6>;
        default:
            return multiply_tile<BITS, P, 8>;
    }
}
template <int BITS>
Tile tile_for(int64_t group, int rows) {
#if defined(WIDE)
    if (group == 32) return tile_for<BITS, 4>(rows);
    if (group == 64) return tile_for<BITS, 2>(rows);
#elif defined(__AVX2__)
    if (group == 32) return tile_for<BITS, 2>(rows);
#endif
    return tile_for<BITS, 1>(rows);
}

// One segment of one row as integers: in their order in `whole`, the sums of groups in `sums`.
// `count` is a multiple of W, because groups are.
template <class E>
float to_integers(const typename E::T* x, int64_t count, int64_t group, int16_t* whole,
                  float* sums) {
    vf largest = {}, nothing = {};  // `nothing` becomes NaN where x is NaN or infinite
    for (int64_t i = 0; i < count; i += W) {
        const vf value = E::get(x + i), size = (vf)((vi)value & 0x7fffffff);
        largest = size > largest ? size : largest;
        nothing += value * 0.f;
    }
    float most = 0;
    for (int i = 0; i < W; i++) most = std::max(most, largest[i]);
    std::fill_n(sums, SEGMENT, 0.f);
    const bool finite = sum(nothing) == 0.f;
    if (!finite || most < 1e-30f) {
        std::fill_n(whole, SEGMENT * group, (int16_t)0);
        return finite ? 0.f : NAN;
    }
    const vf by = all(32767.f / most), magic = all(12582912.f);  // adding 1.5 * 2^23 rounds
    for (int64_t i = 0; i < count; i += W) {
        const vi rounded = (vi)(E::get(x + i) * by + magic) - (vi)magic;
        store(whole + i, __builtin_convertvector(rounded, vs));
    }
    std::fill(whole + count, whole + SEGMENT * group, (int16_t)0);
    for (int64_t g = 0; g * group < count; g++) {
        int32_t total = 0;
        for (int64_t i = g * group; i < (g + 1) * group; i++) total += whole[i];
        sums[g] = (float)total;
    }
    return most / 32767.f;
}

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

// Results of the weights' rows [start, stop), with the bias. sums: [rows][CHUNK].
template <class E>
void write_chunk(const Product& p, const float* sums, int64_t start, int64_t stop) {
    using T = typename E::T;
    float bias[CHUNK] = {};
    if (p.bias)
        for (int64_t n = start; n < stop; n++) bias[n - start] = E::one(((const T*)p.bias)[n]);
    for (int64_t row = 0; row < p.rows; row++) {
        T* to = (T*)p.y + row * p.out + start;
        for (int64_t n = 0; n < stop - start; n++) to[n] = E::of(sums[row * CHUNK + n] + bias[n]);
    }
}

template <class E>
void packed_product(const Product& p) {
    using T = typename E::T;
    const int64_t group = p.group, groups = (p.in + group - 1) / group;
    Shape shape;
    shape.groups = groups;
    shape.segments = (groups + SEGMENT - 1) / SEGMENT;
    shape.blocks = (groups * group + BLOCK - 1) / BLOCK;
    shape.per_segment = SEGMENT * group / BLOCK;
    shape.per_group = std::max<int64_t>(1, group / BLOCK);
    shape.row_bytes = groups * group * p.bits / 8;
    shape.scale_stride = p.scale_stride;
    const int64_t passes = (p.rows + MOST - 1) / MOST, length = SEGMENT * group;
    const int64_t padded_rows = passes * MOST, room = shape.segments * length;
    Memory<int16_t> x = memory<int16_t>(padded_rows * room);
    Memory<float> scales = memory<float>(padded_rows * shape.segments);
    Memory<float> sums = memory<float>(padded_rows * shape.segments * SEGMENT);
    Memory<int32_t> order = memory<int32_t>(shape.per_group * BLOCK);
    for (int64_t part = 0; part < shape.per_group; part++)
        order_of(p.bits, group, part, order.get() + part * BLOCK);
    auto pass_of = [&](int64_t pass) {
        Pass one;
        one.rows = padded(std::min<int64_t>(MOST, p.rows - pass * MOST));
        one.x = x.get() + pass * MOST * room;
        one.x_scales = scales.get() + pass * MOST * shape.segments;
        one.x_sums = sums.get() + pass * MOST * shape.segments * SEGMENT;
        return one;
    };

    auto prepare = [&](int64_t unit, int16_t* whole) {
        const int64_t row = unit / shape.segments, segment = unit % shape.segments;
        const Pass pass = pass_of(row / MOST);
        const int64_t m = row % MOST, at = segment * pass.rows + m;
        if (m >= pass.rows) return;
        const int64_t from = segment * length;
        const int64_t count = row < p.rows ? std::min(length, p.in - from) : 0;
        const T* source = (const T*)p.x + std::min(row, p.rows - 1) * p.x_stride + from;
        const_cast<float*>(pass.x_scales)[at] =
            to_integers<E>(source, count, group, whole,
                           const_cast<float*>(pass.x_sums) + at * SEGMENT);
        for (int64_t block = 0; block < shape.per_segment; block++) {
            const int64_t part = block % shape.per_group;
            const int16_t* base = whole + (block - part) * BLOCK;
            const int32_t* which = order.get() + part * BLOCK;
            int16_t* to = const_cast<int16_t*>(pass.x) +
                          ((segment * shape.per_segment + block) * pass.rows + m) * BLOCK;
            for (int i = 0; i < BLOCK; i++) to[i] = base[which[i]];
        }
    };
    const int64_t units = padded_rows * shape.segments;
    if (p.threads <= ALONE) {
        Memory<int16_t> whole = memory<int16_t>(length);
        for (int64_t unit = 0; unit < units; unit++) prepare(unit, whole.get());
    }

#pragma omp parallel num_threads(p.threads)
    {
        if (p.threads > ALONE) {
            Memory<int16_t> whole = memory<int16_t>(length);
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < units; unit++) prepare(unit, whole.get());
        }
        Memory<float> sums_of_chunk = memory<float>(padded_rows * CHUNK);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < (p.out + CHUNK - 1) / CHUNK; chunk++) {
            const int64_t start = chunk * CHUNK, stop = std::min(p.out, start + CHUNK);
            for (int64_t first = start; first < stop; first += TILE)
                for (int64_t number = 0; number < passes; number++) {
                    const Pass pass = pass_of(number);
                    const Tile tile =
                        p.bits == 8 ? tile_for<8>(group, pass.rows) : tile_for<4>(group, pass.rows);
                    tile(p, shape, pass, first,
                         sums_of_chunk.get() + number * MOST * CHUNK + first - start);
                }
            write_chunk<E>(p, sums_of_chunk.get(), start, stop);
        }
    }
}

// Weights of 16 bits as they are. Activations: W floats, or pairs of bfloat16.
#if defined(WIDE) && defined(__AVX512BF16__)
struct Pairs {
    using X = uint16_t;
    static constexpr int STEP = 32;
    static void add(vf& acc, __m512i weights, const X* x) {
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights,
                                   (__m512bh)_mm512_loadu_si512(x));
    }
    static __m512i get(const uint16_t* from) { return _mm512_loadu_si512(from); }
};
#endif
template <class E>
struct Floats {
    using X = float;
    static constexpr int STEP = W;
    static void add(vf& acc, vf weights, const X* x) { acc += weights * load<vf>(x); }
    static vf get(const uint16_t* from) { return E::get(from); }
};

// x: [steps][M][STEP]
template <class F, int M, int R>
inline void skinny_rows(const uint16_t* const (&weights)[R], const typename F::X* x, int64_t in,
                        float* y) {
    vf acc[R][M] = {};
    auto step = [&](const uint16_t* const(&from)[R]) {
        decltype(F::get(nullptr)) w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) w[r] = F::get(from[r]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) F::add(acc[r][m], w[r], x + m * F::STEP);
        x += M * F::STEP;
    };
    int64_t at = 0;
    for (; at + F::STEP <= in; at += F::STEP) {
        const uint16_t* from[R];
        for (int r = 0; r < R; r++) {
            from[r] = weights[r] + at;
            prefetch((const char*)from[r] + AHEAD);
        }
        step(from);
    }
    if (at < in) {
        alignas(64) uint16_t copy[R][F::STEP] = {};
        const uint16_t* from[R];
        for (int r = 0; r < R; r++) {
            std::memcpy(copy[r], weights[r] + at, (in - at) * 2);
            from[r] = copy[r];
        }
        step(from);
    }
    write_sums<R, M>(acc, y);
}

template <class F, int M>
void skinny_tile(const Product& p, const typename F::X* x, int64_t first, float* y) {
    constexpr int R = W == 16 && M > 4 ? 3 : M <= 4 && W > 4 ? 4 : 2;
    for (int from = 0; from < TILE; from += R) {
        const uint16_t* weights[R];
        for (int r = 0; r < R; r++)
            weights[r] = (const uint16_t*)p.weights +
                         std::min(p.out - 1, first + from + r) * p.weight_stride;
        skinny_rows<F, M, R>(weights, x, p.in, y + from);
    }
}

template <class F>
using SkinnyTile = void (*)(const Product&, const typename F::X*, int64_t, float*);
template <class F>
SkinnyTile<F> skinny_tile_for(int rows) {
    switch (rows) {
        case 1:
            return skinny_tile<F, 1>;
        case 2:
            return skinny_tile<F, 2>;
        case 4:
            return skinny_tile<F, 4>;
        case 6:
            return skinny_tile<F, 6>;
        default:
            return skinny_tile<F, 8>;
    }
}

// E: the type of activations, weights and results; F: how a vector of weights is multiplied.
template <class E, class F>
void skinny_product(const Product& p) {
    using X = typename F::X;
    const int64_t steps = (p.in + F::STEP - 1) / F::STEP, room = steps * F::STEP;
    const int64_t padded_rows = (p.rows + MOST - 1) / MOST * MOST;
    Memory<X> x = memory<X>(padded_rows * room);
    auto rows_of = [&](int64_t row) { return padded(std::min<int64_t>(MOST, p.rows - row)); };
    auto prepare = [&](int64_t row) {
        const int64_t pass = row / MOST * MOST, m = row % MOST, rows = rows_of(pass);
        if (m >= rows) return;
        const uint16_t* from = (const uint16_t*)p.x + std::min(row, p.rows - 1) * p.x_stride;
        X* to = x.get() + pass * room + m * F::STEP;
        for (int64_t at = 0; at < room; at += F::STEP, to += rows * F::STEP)
            for (int64_t i = 0; i < F::STEP; i++) {
                if (at + i >= p.in)
                    to[i] = 0;
                else
                    to[i] = sizeof(X) == 2 ? X(from[at + i]) : X(E::one(from[at + i]));
            }
    };
    if (p.threads <= ALONE)
        for (int64_t row = 0; row < padded_rows; row++) prepare(row);
#pragma omp parallel num_threads(p.threads)
    {
        if (p.threads > ALONE) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < padded_rows; row++) prepare(row);
        }
        Memory<float> sums = memory<float>(padded_rows * CHUNK);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < (p.out + CHUNK - 1) / CHUNK; chunk++) {
            const int64_t start = chunk * CHUNK, stop = std::min(p.out, start + CHUNK);
            for (int64_t first = start; first < stop; first += TILE)
                for (int64_t row = 0; row < p.rows; row += MOST)
                    skinny_tile_for<F>(rows_of(row))(p, x.get() + row * room, first,
                                                     sums.get() + row * CHUNK + first - start);
            write_chunk<E>(p, sums.get(), start, stop);
        }
    }
}

// Unpacked weights [out][in] of x's kind into p.y.
template <class E>
void unpacked(const Product& p) {
    using T = typename E::T;
    const int64_t group = p.group, groups = p.in / group;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t n = 0; n < p.out; n++) {
        const uint8_t* codes = (const uint8_t*)p.weights + n * p.weight_stride;
        const uint16_t* scales = p.scales + n * p.scale_stride;
        T* to = (T*)p.y + n * p.in;
        for (int64_t g = 0; g < groups; g++, to += group) {
            const float scale = half_to_float(scales[2 * g]),
                        least = half_to_float(scales[2 * g + 1]);
            const int64_t bytes = group * p.bits / 8;
            for (int64_t j = 0; j < bytes; j++) {
                const uint8_t code = codes[g * bytes + j];
                to[j] = E::of(scale * (float)(p.bits == 8 ? code : code & 15) + least);
            }
            if (p.bits == 4)
                for (int64_t j = 0; j < bytes; j++)
                    to[bytes + j] = E::of(scale * (float)(codes[g * bytes + j] >> 4) + least);
        }
    }
}

bool bad_groups(const Product& p) {
    return (p.bits != 4 && p.bits != 8) || p.group < 32 || p.group > LARGEST_GROUP ||
           (p.group & (p.group - 1));
}

}  // namespace

extern "C" int32_t zinfer_vector_bits() { return W == 4 ? 0 : W * 32; }

// Each returns 0, or 1 where a size is not supported.
extern "C" int32_t zinfer_packed_product(const Product* problem) {
    const Product& p = *problem;
    if (bad_groups(p)) return 1;
    switch (p.kind) {
        case FLOAT32:
            packed_product<Float32>(p);
            return 0;
        case BFLOAT16:
            packed_product<BFloat16>(p);
            return 0;
        default:
            packed_product<Float16>(p);
            return 0;
    }
}

extern "C" int32_t zinfer_unpack(const Product* problem) {
    const Product& p = *problem;
    if (bad_groups(p) || p.in % p.group) return 1;
    (p.kind == FLOAT32    ? unpacked<Float32>
     : p.kind == BFLOAT16 ? unpacked<BFloat16>
                          : unpacked<Float16>)(p);
    return 0;
}

extern "C" int32_t zinfer_skinny_product(const Product* problem) {
    const Product& p = *problem;
    if (p.kind == BFLOAT16) {
#if defined(WIDE) && defined(__AVX512BF16__)
        skinny_product<BFloat16, Pairs>(p);
#else
        skinny_product<BFloat16, Floats<BFloat16>>(p);
#endif
        return 0;
    }
    if (p.kind != FLOAT16) return 1;
    skinny_product<Float16, Floats<Float16>>(p);
    return 0;
}
