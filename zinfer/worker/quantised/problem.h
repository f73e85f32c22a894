// What a product is given, how its work is divided, and how its results are written.
#pragma once

#include "vectors.h"

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
    int32_t bits, kind, threads, activation_bits;
};
}

namespace {

constexpr int MOST = 8;       // rows of activations that pass over the weights together
constexpr int CHUNK = 48;     // rows of weights that a thread takes at a time
// Threads up to which one alone prepares the activations: waiting for each other costs more, above
// all where other processes use the cores too.
constexpr int ALONE = 4;

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

// Results of the weights' rows [start, stop), with the bias. sums: [rows][CHUNK].
template <class E>
void write_chunk(const Product& p, const float* sums, int64_t start, int64_t stop) {
    using T = typename E::T;
    float bias[CHUNK] = {};
    if (p.bias)
        for (int64_t n = start; n < stop; n++) bias[n - start] = E::one(((const T*)p.bias)[n]);
    for (int64_t row = 0; row < p.rows; row++) {
        T* to = (T*)p.y + row * p.out + start;
        const float* from = sums + row * CHUNK;
        int64_t n = 0;
        for (; n + W <= stop - start; n += W)
            E::put(to + n, load<vf>(from + n) + load<vf>(bias + n));
        for (; n < stop - start; n++) to[n] = E::of(from[n] + bias[n]);
    }
}

}  // namespace
