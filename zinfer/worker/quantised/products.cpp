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
// segment, or 8-bit integers with one scale for each group (integers.h). Integer products are
// exact, and each group adds its sum times its scale in float32. Minima are multiplied by the sum
// of a group's integers. The error of an activation is at most half of (the largest activation of
// its segment / 32639), or of (the largest of its group / 127).
// NaN or infinity makes all outputs of its row NaN.
//
// lanes.h multiplies where the processor has AVX-512 VNNI, words.h elsewhere.
// Weights of 16 bits are multiplied as they are (skinny.h).

#include "lanes.h"
#include "skinny.h"
#include "words.h"

namespace {

// Memory for the activations of all passes as integers.
struct Integers {
    int64_t passes, rows, segments, length;  // rows: with those that fill a pass up
    Memory<int16_t> values;  // words, or bytes
    Memory<float> x_scales, x_sums, group_scales;

    Integers(const Product& p, int64_t groups) {
        passes = (p.rows + MOST - 1) / MOST;
        rows = (passes - 1) * MOST + padded(p.rows - (passes - 1) * MOST);
        segments = (groups + SEGMENT - 1) / SEGMENT;
        length = SEGMENT * p.group;
        values = memory<int16_t>(rows * segments * length);
        x_scales = memory<float>(rows * segments);
        x_sums = memory<float>(rows * segments * SEGMENT);
        if (p.activation_bits == 8) group_scales = memory<float>(rows * segments * SEGMENT);
    }
    Pass pass(const Product& p, int64_t number) const {
        const int64_t before = number * MOST * segments;
        Pass one;
        one.rows = padded(std::min<int64_t>(MOST, p.rows - number * MOST));
        one.words = values.get() + before * length;
        one.bytes = (int8_t*)one.words;
        one.x_scales = x_scales.get() + before;
        one.x_sums = x_sums.get() + before * SEGMENT;
        one.group_scales = group_scales ? group_scales.get() + before * SEGMENT : nullptr;
        return one;
    }
};

#if defined(USES_LANES)
using Tiles = Lanes;
#else
using Tiles = Words;
#endif

template <class E>
void packed_product(const Product& p) {
    using T = typename E::T;
    const int64_t group = p.group, groups = (p.in + group - 1) / group;
    const Integers integers(p, groups);
    const int64_t segments = integers.segments, length = integers.length;
    const Tiles tiles(p, groups);
    auto prepare = [&](int64_t unit, int16_t* whole) {
        const int64_t row = unit / segments, segment = unit % segments, m = row % MOST;
        const Pass pass = integers.pass(p, row / MOST);
        const int64_t at = segment * pass.rows + m, from = segment * length;
        const int64_t count = row < p.rows ? std::min(length, p.in - from) : 0;
        const T* source = (const T*)p.x + std::min(row, p.rows - 1) * p.x_stride + from;
        float* own = pass.group_scales ? pass.group_scales + at * SEGMENT : nullptr;
        pass.x_scales[at] = to_integers<E>(source, count, group, p.activation_bits, whole,
                                           pass.x_sums + at * SEGMENT, own);
        tiles.arrange(pass, segment, (int)m, whole);
    };
    const int64_t count = integers.rows * segments;
    if (p.threads <= ALONE) {
        Memory<int16_t> whole = memory<int16_t>(length);
        for (int64_t unit = 0; unit < count; unit++) prepare(unit, whole.get());
    }

#pragma omp parallel num_threads(p.threads)
    {
        if (p.threads > ALONE) {
            Memory<int16_t> whole = memory<int16_t>(length);
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < count; unit++) prepare(unit, whole.get());
        }
        Memory<float> sums = memory<float>(integers.passes * MOST * CHUNK);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < (p.out + CHUNK - 1) / CHUNK; chunk++) {
            const int64_t start = chunk * CHUNK, stop = std::min(p.out, start + CHUNK);
            // the chunk that this thread probably takes next
            const int64_t after = start + p.threads * CHUNK;
            for (int64_t first = start; first < stop; first += PACKED_TILE)
                for (int64_t number = 0; number < integers.passes; number++) {
                    const int64_t next = number                       ? first
                                         : first + PACKED_TILE < stop ? first + PACKED_TILE
                                                                      : after;
                    tiles.multiply(integers.pass(p, number), first, next,
                                   sums.get() + number * MOST * CHUNK + first - start);
                }
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
           (p.group & (p.group - 1)) || (p.activation_bits != 16 && p.activation_bits != 8);
}

}  // namespace

extern "C" int32_t zinfer_vector_bits() { return W == 4 ? 0 : W * 32; }

// Rows up to which these products are faster than unpacking the weights and PyTorch's product, as
// measured (docs/quantised.md).
extern "C" int64_t zinfer_packed_rows(int32_t activation_bits) {
#if defined(USES_LANES)
    return activation_bits == 8 ? INT64_MAX : 192;
#else
    return activation_bits == 8 || activation_bits == 16 ? 64 : 0;
#endif
}

// Each returns 0, or 1 where a size is not supported.
extern "C" int32_t zinfer_packed_product(const Product* problem) {
    if (bad_groups(*problem)) return 1;
    // The integers of so many rows stay in the caches, and take little memory.
    constexpr int64_t AT_ONCE = 256;
    for (int64_t row = 0; row < problem->rows; row += AT_ONCE) {
        Product p = *problem;
        const int64_t size = p.kind == FLOAT32 ? 4 : 2;
        p.x = (const char*)p.x + row * p.x_stride * size;
        p.y = (char*)p.y + row * p.out * size;
        p.rows = std::min(AT_ONCE, p.rows - row);
        (p.kind == FLOAT32    ? packed_product<Float32>
         : p.kind == BFLOAT16 ? packed_product<BFloat16>
                              : packed_product<Float16>)(p);
    }
    return 0;
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
