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
#define MAX_COUNT 128 /* of numbers for `to_densities` */
#define N_LAYERS 5 /* two to the features, of which the first is the log density, and three to the colour */

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));
typedef float Tile[MAX_CHANNELS][TILE] __attribute__((aligned(64)));
typedef uint32_t Pairs[MAX_CHANNELS * MAX_CHANNELS / 2];

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

/* Replaces log densities, clamped to at most max_log_density, by densities. */
DEVICE void to_densities(float *x, int64_t count, float max_log_density)
{
    float clamped[MAX_COUNT];
    SIMD for (int64_t i = 0; i < count; i++)
        clamped[i] = x[i] > max_log_density ? max_log_density : x[i];
    exponentials(clamped, count);
    SIMD for (int64_t i = 0; i < count; i++)
        x[i] = x[i] < -87 ? 0 : clamped[i]; /* as exp does, nearly: then there is no gradient */
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

/* NaN stays. */
DEVICE Vector positive_part(Vector x)
{
    return (Vector)((IntVector)x & ~(IntVector)(x < 0));
}

/* out = W in + b, or the positive part of that. Eight rows at once take the registers of AVX-512; they have names because
 * GCC keeps arrays in memory. */
DEVICE void linear(const Layer *layer, bool relu, Tile in, Tile out)
{
#define ROWS(each) each(0) each(1) each(2) each(3) each(4) each(5) each(6) each(7)
#define START(r) Vector left##r = (Vector){0} + layer->b[o + r], right##r = left##r;
#define ADD(r) left##r += W[r * n_in + i] * left, right##r += W[r * n_in + i] * right;
#define ADD_PAIRS(r)                                                                                                   \
    left##r = add_pairs(left##r, pairs[r * n_in / 2 + i], paired[i]);                                                  \
    right##r = add_pairs(right##r, pairs[r * n_in / 2 + i], paired[i] + LANES);
#define STORE(r)                                                                                                       \
    *(Vector *)out[o + r] = relu ? positive_part(left##r) : left##r;                                                   \
    *(Vector *)(out[o + r] + LANES) = relu ? positive_part(right##r) : right##r;
    const int64_t n_in = layer->n_in;
    uint32_t paired[MAX_CHANNELS / 2][TILE] __attribute__((aligned(64)));
    for (int64_t i = 0; i < n_in / 2 && layer->pairs; i++)
        SIMD for (int m = 0; m < TILE; m++)
            paired[i][m] = to_pair(in[2 * i][m], in[2 * i + 1][m]);
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

/* A `HashNeRF`. Kernels take it as NETWORK_PARAMETERS, which `arguments_of` in `accel/fused_network.py` returns:
 * `parameters` has the weights and biases of the five layers, one layer after the other; the last one has 8 rows. */
typedef struct {
    Grid grid;
    Layer layers[N_LAYERS];
    int64_t offsets[N_LAYERS + 1]; /* of the layers in `parameters` */
    float initial_log_density, max_log_density;
    bool views, bf16;
} Network;

#define NETWORK_PARAMETERS                                                                                             \
    const float *aabb, int64_t contracted, const float *table, int64_t levels, int64_t F, const int64_t *resolutions,  \
        const int64_t *level_offsets, const float *parameters, int64_t width, int64_t n_features, int64_t views,       \
        float initial_log_density, float max_log_density, int64_t bf16
#define NETWORK_ARGUMENTS                                                                                              \
    aabb, contracted, table, levels, F, resolutions, level_offsets, parameters, width, n_features, views,              \
        initial_log_density, max_log_density, bf16

/* Lets the hidden layers, all but those of density and colour, multiply in bfloat16 where the processor can. Returns
 * whether it can. */
DEVICE bool convert_weights(Layer *layers, Pairs *pairs)
{
#ifdef __AVX512BF16__
    for (int l = 0; l < N_LAYERS; l++)
        if (l != 1 && l != N_LAYERS - 1) {
            for (int64_t i = 0; i < layers[l].n_in * layers[l].n_out / 2; i++)
                pairs[l][i] = to_pair(layers[l].W[2 * i], layers[l].W[2 * i + 1]);
            layers[l].pairs = pairs[l];
        }
    return true;
#else
    return false;
#endif
}

/* `pairs` is memory for weights in bfloat16. */
DEVICE Network network_of(NETWORK_PARAMETERS, Pairs *pairs)
{
    const int64_t n_in[] = {levels * F, width, n_features + (views ? N_HARMONICS : 0), width, width};
    const int64_t n_out[] = {width, n_features, width, width, 8};
    Network network = {{aabb, table, contracted, levels, F, resolutions, level_offsets},
                       .initial_log_density = initial_log_density, .max_log_density = max_log_density,
                       .views = views};
    for (int l = 0; l < N_LAYERS; l++) {
        const float *W = parameters + network.offsets[l];
        network.layers[l] = (Layer){W, W + n_in[l] * n_out[l], NULL, n_in[l], n_out[l]};
        network.offsets[l + 1] = network.offsets[l] + (n_in[l] + 1) * n_out[l];
    }
    network.bf16 = bf16 && convert_weights(network.layers, pairs);
    return network;
}

/* The encodings of a block of points, [channel][BLOCK], zeros behind the last one. */
DEVICE void encode_block(const Grid *grid, const float *points, int64_t stride, int64_t count, float *encoded)
{
    float x[3 * BLOCK];
    units_of(grid, points, stride, count, x);
    for (int64_t l = 0; l < grid->levels; l++)
        for (int64_t first = 0; first < count; first += TILE)
            encode_level(grid, l, x + first, BLOCK, encoded + l * grid->F * BLOCK + first, BLOCK);
}

/* From the encodings of a tile in a block to the inputs of the first two layers, in[0] and in[1], the features, in[2],
 * and densities. */
DEVICE void densities_of(const Network *network, const float *encoded, Tile *in, float *density)
{
    for (int64_t i = 0; i < network->layers[0].n_in; i++)
        memcpy(in[0][i], encoded + i * BLOCK, sizeof(in[0][i]));
    linear(network->layers, true, in[0], in[1]);
    linear(network->layers + 1, false, in[1], in[2]);
    SIMD for (int m = 0; m < TILE; m++)
        density[m] = in[2][0][m] + network->initial_log_density;
    to_densities(density, TILE, network->max_log_density);
}

/* From features and, behind them, harmonics of a tile, in[2], to the logits of its colours, in[5]. */
DEVICE void colors_of(const Network *network, Tile *in)
{
    for (int l = 2; l < N_LAYERS; l++)
        linear(network->layers + l, l < N_LAYERS - 1, in[l], in[l + 1]);
}
#endif
