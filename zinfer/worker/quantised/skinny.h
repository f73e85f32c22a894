// Products of a few rows with weights of 16 bits, in float32 or by AVX512_BF16's pair products.
#pragma once

#include "problem.h"

namespace {

constexpr int TILE = 24;  // rows of weights whose sums wait in the cache for the next block
// Activations that many rows of weights are multiplied with before the next: they stay in the
// first cache with the sums and the weights that come by. Longer ones are split into halves of it.
constexpr int64_t BLOCK_BYTES = 16384;

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

template <class F, int M, int R>
inline void skinny_step(const uint16_t* const (&from)[R], const typename F::X* x,
                        vf (&acc)[R][M]) {
    decltype(F::get(nullptr)) w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) w[r] = F::get(from[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) F::add(acc[r][m], w[r], x + m * F::STEP);
}

// Adds `count` products of R rows to sums[m][TILE]. x: [steps][M][STEP]. The bytes at `ahead`, as
// many as are multiplied, go into the second cache: in the first they would push x out.
template <class F, int M, int R>
__attribute__((noinline)) void skinny_block(const uint16_t* const (&weights)[R], const char* ahead,
                                            const typename F::X* x, int64_t count, vf* sums) {
    vf acc[R][M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][m] = sums[m * TILE + r];
    int64_t at = 0;
    for (; at + F::STEP <= count; at += F::STEP, x += M * F::STEP) {
        const uint16_t* from[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) from[r] = weights[r] + at;
#pragma GCC unroll 4
        for (int line = 0; line < R * F::STEP * 2; line += 64)
            __builtin_prefetch(ahead + line, 0, 2);
        ahead += R * F::STEP * 2;
        skinny_step<F, M, R>(from, x, acc);
    }
    if (at < count) {
        alignas(64) uint16_t copy[R][F::STEP] = {};
        const uint16_t* from[R];
        for (int r = 0; r < R; r++) {
            std::memcpy(copy[r], weights[r] + at, (count - at) * 2);
            from[r] = copy[r];
        }
        skinny_step<F, M, R>(from, x, acc);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[m * TILE + r] = acc[r][m];
}

// Sums of the TILE rows from `first` on, into y[m][CHUNK]. Memory is read in its own order, a tile
// ahead, however blocks are multiplied: `next` is the tile that comes after this one.
template <class F, int M>
void skinny_tile(const Product& p, const typename F::X* x, int64_t first, int64_t next, float* y) {
    constexpr int R = W == 16 && M > 6 ? 3 : W > 4 && (M <= 4 || W == 16) ? 4 : 2;
    constexpr int COUNT = TILE * M;
    static_assert(TILE % R == 0 && COUNT % 8 == 0 && CHUNK % TILE == 0, "whole steps");
    constexpr int64_t most = BLOCK_BYTES / (int64_t)sizeof(*x) / M / F::STEP * F::STEP;
    const int64_t block = p.in <= most ? most : most / 2 / F::STEP * F::STEP;
    auto row = [&](int64_t n) {
        return (const uint16_t*)p.weights + std::min(p.out - 1, n) * p.weight_stride;
    };
    vf sums[COUNT] = {};
    const char* ahead = (const char*)row(next);
    for (int64_t start = 0; start < p.in; start += block) {
        const int64_t count = std::min(block, p.in - start);
        for (int from = 0; from < TILE; from += R) {
            const uint16_t* weights[R];
            for (int r = 0; r < R; r++) weights[r] = row(first + from + r) + start;
            skinny_block<F, M, R>(weights, ahead, x + start * M, count, sums + from);
            ahead += count * R * 2;
        }
    }
    alignas(64) float flat[COUNT];
    for (int i = 0; i < COUNT; i += 8) sums8(sums + i, flat + i);
    for (int m = 0; m < M; m++) std::memcpy(y + m * CHUNK, flat + m * TILE, TILE * 4);
}

template <class F>
using SkinnyTile = void (*)(const Product&, const typename F::X*, int64_t, int64_t, float*);
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
        int64_t at = 0;
        for (; at + F::STEP <= p.in; at += F::STEP, to += rows * F::STEP)
            store(to, F::get(from + at));
        if (at < p.in) {
            uint16_t copy[F::STEP] = {};
            std::memcpy(copy, from + at, (p.in - at) * 2);
            store(to, F::get(copy));
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
            for (int64_t first = start; first < stop; first += TILE) {
                // After this chunk the threads have most likely taken one each.
                const int64_t next = first + TILE < stop ? first + TILE : start + p.threads * CHUNK;
                for (int64_t row = 0; row < p.rows; row += MOST)
                    skinny_tile_for<F>(rows_of(row))(p, x.get() + row * room, first, next,
                                                     sums.get() + row * CHUNK + first - start);
            }
            write_chunk<E>(p, sums.get(), start, stop);
        }
    }
}

}  // namespace
