// Pack floats into codes of 8 or 4 bits, as quantise_with_torch in codes.py does, bit for bit.
//
// One pass: the least and the most of a group, its scale, its codes. Values are read where a model
// left them, and codes are written to the place where they live: both may have any strides between
// tokens, or rows of a weight. The values of one token lie together.

#include "vectors.h"

extern "C" {

// Values [outer][middle][inner][dim]; strides are in elements of each buffer.
struct Packing {
    const void* values;
    uint8_t* codes;    // [outer][middle][inner][dim * bits / 8]
    uint16_t* scales;  // [outer][middle][inner][dim / group][2], scale and minimum in float16
    int64_t outer, middle, inner, dim, group;  // groups of a multiple of 16 values
    int64_t value_strides[3], code_strides[3], scale_strides[3];
    int32_t kind;  // of values: 0 float32, 1 bfloat16, 2 float16
    int32_t bits, symmetric, threads;
};
}

namespace {

constexpr float LARGEST_HALF = 65504.f, SMALLEST_SCALE = 5.9604644775390625e-08f;  // 2^-24
constexpr int64_t TILE = 64;        // tokens that one thread packs before it looks for more work
constexpr int64_t ALONE = 1 << 15;  // so few values are packed sooner by one thread than by two
constexpr int64_t MOST_GROUP = 1024;

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more
    if (bits < 0x38800000u) {  // below 2^-14 the unit is 2^-24: adding 0.5 rounds to it
        float small;
        std::memcpy(&small, &bits, 4);
        small += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &small, 4);
        return sign | (uint16_t)(rounded - 0x3f000000u);
    }
    const uint32_t odd = bits >> 13 & 1;
    return sign | (uint16_t)((bits - 0x38000000u + 0xfffu + odd) >> 13);
#endif
}

inline float limited(float value, float low, float high) {  // as torch.clamp: NaN stays
    return value < low ? low : value > high ? high : value;
}

struct Range {
    float least, most;  // both NaN where any value is
};

inline Range range_of(const float* x, int64_t size) {
    vf low = load<vf>(x), high = low, odd = low - low;
    for (int64_t i = W; i < size; i += W) {
        const vf value = load<vf>(x + i);
        low = value < low ? value : low;
        high = value > high ? value : high;
        odd += value - value;  // NaN for NaN and infinities
    }
    Range range{-largest(-low), largest(high)};
    const float strange = sum(odd);
    for (int64_t i = 0; strange != strange && i < size; i++)
        if (x[i] != x[i]) return Range{NAN, NAN};
    return range;
}

// Scale and minimum as they are stored, and as floats.
struct Steps {
    uint16_t stored_scale, stored_least;
    float scale, least;
};

inline Steps steps_of(Range range, int32_t bits, bool symmetric) {
    Steps steps;
    if (symmetric) {
        const float middle = (float)(1 << (bits - 1));
        const float down = -range.least / middle, up = range.most / (middle - 1);
        const float reach = down != down || down > up ? down : up;
        steps.stored_scale = float_to_half(limited(reach, SMALLEST_SCALE, LARGEST_HALF / middle));
        steps.scale = half_to_float(steps.stored_scale);
        steps.least = -steps.scale * middle;
        steps.stored_least = float_to_half(steps.least);
        return steps;
    }
    steps.stored_least = float_to_half(limited(range.least, -LARGEST_HALF, LARGEST_HALF));
    if (steps.stored_least == 0x8000u) steps.stored_least = 0;  // no negative zero
    steps.least = half_to_float(steps.stored_least);
    const float step = (range.most - steps.least) / (float)((1 << bits) - 1);
    steps.stored_scale = float_to_half(limited(step, SMALLEST_SCALE, LARGEST_HALF));
    steps.scale = half_to_float(steps.stored_scale);
    return steps;
}

// Codes of `size` values. Adding 2^23 rounds to a whole number, halves to even, as torch.round.
inline void codes_of(const float* x, int64_t size, const Steps& steps, float most, uint8_t* to) {
    const vf least = all(steps.least), scale = all(steps.scale), top = all(most), zero = {};
    for (int64_t i = 0; i < size; i += W) {
        vf step = (load<vf>(x + i) - least) / scale;
        step = step > zero ? step : zero;
        step = step < top ? step : top;
        const vu whole = (vu)(step + all(8388608.f)) & 255u;
        const vb bytes = __builtin_convertvector(whole, vb);
        std::memcpy(to + i, &bytes, W);
    }
}

template <class E, int GROUP, int BITS>
void pack_group(const typename E::T* from, const Packing& p, uint8_t* codes, uint16_t* scales) {
    const int64_t group = GROUP ? GROUP : p.group;
    const int32_t bits = BITS ? BITS : p.bits;
    alignas(64) float x[GROUP ? GROUP : MOST_GROUP];
    for (int64_t i = 0; i < group; i += W) store(x + i, E::get(from + i));
    const Steps steps = steps_of(range_of(x, group), bits, p.symmetric);
    scales[0] = steps.stored_scale;
    scales[1] = steps.stored_least;
    if (bits == 8) return codes_of(x, group, steps, 255.f, codes);
    alignas(64) uint8_t whole[GROUP ? GROUP : MOST_GROUP];
    codes_of(x, group, steps, 15.f, whole);
    const int64_t half = group / 2;
    for (int64_t i = 0; i < half; i++) codes[i] = whole[i] | (uint8_t)(whole[i + half] << 4);
}

template <class E, int GROUP, int BITS>
void pack_tile(const Packing& p, int64_t outer, int64_t from, int64_t to) {
    const int64_t group = GROUP ? GROUP : p.group, groups = p.dim / group;
    const int64_t code_bytes = group * (BITS ? BITS : p.bits) / 8;
    for (int64_t t = from; t < to; t++)  // the heads of a token lie together, as a model makes them
        for (int64_t m = 0; m < p.middle; m++) {
            auto at = [&](const int64_t* stride) {
                return outer * stride[0] + m * stride[1] + t * stride[2];
            };
            const auto* values = (const typename E::T*)p.values + at(p.value_strides);
            uint8_t* codes = p.codes + at(p.code_strides);
            uint16_t* scales = p.scales + at(p.scale_strides);
            for (int64_t g = 0; g < groups; g++)
                pack_group<E, GROUP, BITS>(values + g * group, p, codes + g * code_bytes,
                                           scales + 2 * g);
        }
}

// The code of `pack_tile`: the compiler knows the usual size of groups, and the bits with it.
template <class E>
auto tile_of(const Packing& p) {
    if (p.group != 64) return pack_tile<E, 0, 0>;
    return p.bits == 8 ? pack_tile<E, 64, 8> : pack_tile<E, 64, 4>;
}

}  // namespace

// Returns 0, or 1 where a size is not supported.
extern "C" int32_t zinfer_pack_codes(const Packing* packing) {
    const Packing& p = *packing;
    if (p.group < 16 || p.group % 16 || p.group > MOST_GROUP || p.dim % p.group ||
        (p.bits != 8 && p.bits != 4))
        return 1;
    const auto pack = p.kind == 0   ? tile_of<Float32>(p)
                      : p.kind == 1 ? tile_of<BFloat16>(p)
                                    : tile_of<Float16>(p);
    const int64_t tiles = (p.inner + TILE - 1) / TILE;
    const int64_t numel = p.outer * p.middle * p.inner * p.dim;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (numel > ALONE)
    for (int64_t unit = 0; unit < p.outer * tiles; unit++) {
        const int64_t from = unit % tiles * TILE;
        pack(p, unit / tiles, from, std::min(p.inner, from + TILE));
    }
    return 0;
}
