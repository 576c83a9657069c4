#include "encodings.c"

/* What kernels that evaluate a `HashNeRF` have in common. Points are done in tiles, whose numbers stay in the
 * processor's caches: [channel][point].
 *
 * Tiles are for CPUs only: on a GPU a thread would have too few registers for one.
 */
#ifndef __CUDACC__
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#define LANES 16 /* of a vector */
#define MAX_CHANNELS 64
#define N_HARMONICS 16

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Tile[MAX_CHANNELS][TILE] __attribute__((aligned(64)));

/* All levels of a tile. */
DEVICE void encode_tile(const Grid *grid, const float *x, int64_t stride, Tile out)
{
    for (int64_t l = 0; l < grid->levels; l++)
        encode_level(grid, l, x, stride, out[grid->F * l], TILE);
}

/* Replaces numbers by their exponentials, to 1e-5 of these; those beyond ±87 count as ±87, NaN stays. */
DEVICE void exponentials(float *x, int64_t count)
{
    SIMD for (int64_t i = 0; i < count; i++) {
        float scaled = 1.44269504f * (x[i] < -87 ? -87 : x[i] > 87 ? 87 : x[i]), whole = rintf(scaled);
        float rest = 0.693147181f * (scaled - whole);
        union { uint32_t bits; float value; } power = {((uint32_t)(int32_t)whole + 127) << 23};
        x[i] = power.value * (1 + rest * (1 + rest * (1 / 2.0f + rest * (1 / 6.0f + rest * (1 / 24.0f + rest / 120)))));
    }
}

/* W[n_out][n_in], b[n_out], and the weights in bfloat16, two in a number, or NULL. n_out is a multiple of 8. */
typedef struct {
    const float *W, *b;
    const uint32_t *pairs;
    int64_t n_in, n_out;
} Layer;

/* Two numbers as bfloat16, the first one in the lower half. */
DEVICE uint32_t to_pair(float first, float second)
{
    union { float value; uint32_t bits; } a = {first}, b = {second};
    return (a.bits + 0x8000) >> 16 | ((b.bits + 0x8000) & 0xffff0000);
}

/* sum + W in, for two channels. */
DEVICE Vector add_pairs(Vector sum, uint32_t W, const uint32_t *in)
{
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)W), *(const __m512bh *)in);
#else
    return sum;
#endif
}

/* out = W in + b; with `relu` of the positive part of `in`, which may be overwritten. Eight rows at once take the
 * registers of AVX-512; they have names because GCC keeps arrays in memory. */
DEVICE void linear(const Layer *layer, bool relu, Tile in, Tile out)
{
#define ROWS(each) each(0) each(1) each(2) each(3) each(4) each(5) each(6) each(7)
#define START(r) Vector left##r = (Vector){0} + layer->b[o + r], right##r = left##r;
#define ADD(r) left##r += W[r * n_in + i] * left, right##r += W[r * n_in + i] * right;
#define ADD_PAIRS(r)                                                                                                   \
    left##r = add_pairs(left##r, pairs[r * n_in / 2 + i], paired[i]);                                                  \
    right##r = add_pairs(right##r, pairs[r * n_in / 2 + i], paired[i] + LANES);
#define STORE(r) *(Vector *)out[o + r] = left##r, *(Vector *)(out[o + r] + LANES) = right##r;
    const int64_t n_in = layer->n_in;
    uint32_t paired[MAX_CHANNELS / 2][TILE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < n_in && relu && !layer->pairs; i++)
        SIMD for (int m = 0; m < TILE; m++)
            in[i][m] = in[i][m] < 0 ? 0 : in[i][m];
    const float least = relu ? 0 : -INFINITY;
    for (int64_t i = 0; i < n_in / 2 && layer->pairs; i++)
        SIMD for (int m = 0; m < TILE; m++) {
            float a = in[2 * i][m], b = in[2 * i + 1][m];
            paired[i][m] = to_pair(a < least ? least : a, b < least ? least : b);
        }
    for (int64_t o = 0; o < layer->n_out; o += 8) {
        const float *W = layer->W + o * n_in;
        const uint32_t *pairs = layer->pairs ? layer->pairs + o * n_in / 2 : NULL;
        ROWS(START)
        for (int64_t i = 0; i < n_in / 2 && layer->pairs; i++) {
            ROWS(ADD_PAIRS)
        }
        for (int64_t i = 0; i < n_in && !layer->pairs; i++) {
            Vector left = *(const Vector *)in[i], right = *(const Vector *)(in[i] + LANES);
            ROWS(ADD)
        }
        ROWS(STORE)
    }
}
#endif
