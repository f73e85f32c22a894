// Products of a few rows with weights of 16 bits, in float32 or by AVX512_BF16's pair products.
#pragma once

#include "problem.h"

namespace {

constexpr int TILE = 12;  // rows of weights that every pass works on
constexpr int64_t AHEAD_OF_SKINNY = 8192;  // bytes of weights that are prefetched

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
            prefetch((const char*)from[r] + AHEAD_OF_SKINNY);
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

}  // namespace
