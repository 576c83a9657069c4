#include "encodings.c"

/* Rays through a `HashNeRF` at intervals that proposal grids choose, without gradients. The reference implementation
 * is `ProposalRenderer` in `accel/proposals.py`. Each ray is done from end to end, so that all its numbers stay in the
 * processor's caches.
 *
 * Ray n is at rays + n * stride: origin, direction, near, far and, where colours depend on it, the unit direction. The
 * edges of its intervals are at s from 0 to 1, and its samples in the middle of intervals.
 *
 * These kernels are for CPUs only: on a GPU a thread would have too few registers for a ray.
 */
#ifndef __CUDACC__
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#define LANES 16 /* of a vector */
#define TILE 32 /* samples that are computed together */
#define MAX_SAMPLES 128
#define MAX_CHANNELS 64
#define N_HARMONICS 16
#define SIMD _Pragma("omp simd")

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Vector4 __attribute__((vector_size(16)));
typedef float Tile[MAX_CHANNELS][TILE] __attribute__((aligned(64)));

/* Edges are even in distance (kind 0), in disparity (1), or in distance up to `unit` and in disparity beyond (2), where
 * the last edge is at last_disparity, a value of `to_disparity`. */
typedef struct {
    int64_t kind;
    float unit, last_disparity;
} Spacing;

typedef struct {
    const float *aabb, *table;
    int64_t contracted, levels, F;
    const int64_t *resolutions, *level_offsets;
} Grid;

DEVICE float to_disparity(float x)
{
    return x < 1 ? 0.5f * x : 1 - 0.5f / x;
}

DEVICE float from_disparity(float y)
{
    return y < 0.5f ? 2 * y : 0.5f / (1 - y);
}

DEVICE float position_of(Spacing spacing, float s, float near, float far)
{
    if (spacing.kind == 0)
        return near * (1 - s) + far * s;
    if (spacing.kind == 1)
        return 1 / (1 / near * (1 - s) + 1 / far * s);
    float first = to_disparity(near / spacing.unit);
    return spacing.unit * from_disparity(first + s * (spacing.last_disparity - first));
}

/* Middles and lengths of `count` intervals, the latter in units of the scene, and the points x[3][] in the middle, in
 * units of the grid; zeros behind the last one, up to a whole tile. */
DEVICE void middles_of(const float *ray, Spacing spacing, const float *s, int64_t count, const Grid *grid, float *middle,
                       float *length, float (*x)[MAX_SAMPLES])
{
    float norm = sqrtf(ray[3] * ray[3] + ray[4] * ray[4] + ray[5] * ray[5]), t[MAX_SAMPLES + 1];
    SIMD for (int64_t m = 0; m <= count; m++)
        t[m] = position_of(spacing, s[m], ray[6], ray[7]);
    SIMD for (int64_t m = 0; m < count; m++) {
        middle[m] = 0.5f * (t[m] + t[m + 1]);
        length[m] = norm * (t[m + 1] - t[m]);
    }
    /* `to_unit`, but in loops that the compiler makes vectors of */
    for (int i = 0; i < 3; i++) {
        const float low = grid->aabb[i], side = grid->aabb[3 + i] - low;
        SIMD for (int64_t m = 0; m < count; m++) {
            float unit = (ray[i] + ray[3 + i] * middle[m] - low) / side;
            x[i][m] = unit == unit ? unit : 0;
        }
    }
    const int64_t to_contract = grid->contracted ? count : 0;
    SIMD for (int64_t m = 0; m < to_contract; m++) {
        float a = fabsf(2 * x[0][m] - 1), b = fabsf(2 * x[1][m] - 1), c = fabsf(2 * x[2][m] - 1);
        float larger = a > b ? a : b, norm = larger > c ? larger : c, inverse = norm > 1 ? 1 / norm : 1;
        float scale = 0.5f * (2 - inverse) * inverse;
        for (int i = 0; i < 3; i++)
            x[i][m] = 0.5f + scale * (x[i][m] - 0.5f);
    }
    for (int i = 0; i < 3; i++)
        SIMD for (int64_t m = 0; m < count; m++)
            x[i][m] = x[i][m] > 0 ? (x[i][m] < 1 ? x[i][m] : 1) : 0;
    for (int64_t m = count; m % TILE; m++)
        x[0][m] = x[1][m] = x[2][m] = 0;
}

/* `encode_point` for the samples from `start` on: out[levels * F]. All entries and weights come first, because the
 * compiler makes vectors of loops over samples, but not of those over corners. */
DEVICE void encode_tile(const Grid *grid, float (*x)[MAX_SAMPLES], int64_t start, Tile out)
{
    for (int64_t l = 0; l < grid->levels; l++) {
        const int64_t corners = grid->resolutions[l] + 1, begin = grid->level_offsets[l], F = grid->F;
        const int32_t side = (int32_t)corners;
        const uint32_t size = (uint32_t)(grid->level_offsets[l + 1] - begin);
        const bool dense = corners * corners * corners <= size;
        const uint32_t factor[3] = {1, dense ? side : 2654435761u, dense ? side * side : 805459861u};
        const float *entries = grid->table + begin * F;
        uint32_t corner[3][2][TILE], entry[8][TILE];
        float share[3][2][TILE], weight[8][TILE];
        for (int i = 0; i < 3; i++)
            SIMD for (int m = 0; m < TILE; m++) {
                float scaled = x[i][start + m] * (float)(side - 1);
                int32_t cell = (int32_t)scaled < side - 2 ? (int32_t)scaled : side - 2;
                share[i][1][m] = scaled - (float)cell, share[i][0][m] = 1 - share[i][1][m];
                corner[i][0][m] = (uint32_t)cell * factor[i], corner[i][1][m] = corner[i][0][m] + factor[i];
            }
        for (int c = 0; c < 8; c++) {
            const uint32_t *a = corner[0][c & 1], *b = corner[1][c >> 1 & 1], *d = corner[2][c >> 2];
            const float *u = share[0][c & 1], *v = share[1][c >> 1 & 1], *w = share[2][c >> 2];
            SIMD for (int m = 0; m < TILE; m++) {
                entry[c][m] = dense ? a[m] + b[m] + d[m] : (a[m] ^ b[m] ^ d[m]) & (size - 1);
                weight[c][m] = u[m] * v[m] * w[m];
            }
        }
        if (F == 4)
            for (int m = 0; m < TILE; m++) {
                Vector4 sum = {0};
                for (int c = 0; c < 8; c++)
                    sum += weight[c][m] * *(const Vector4 *)(entries + 4 * (int64_t)entry[c][m]);
                for (int f = 0; f < 4; f++)
                    out[4 * l + f][m] = sum[f];
            }
        else
            for (int64_t f = 0; f < F; f++)
                for (int m = 0; m < TILE; m++) {
                    float sum = 0;
                    for (int c = 0; c < 8; c++)
                        sum += weight[c][m] * entries[F * entry[c][m] + f];
                    out[F * l + f][m] = sum;
                }
    }
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

/* Log densities to the weights T_m (1 - exp(-sigma_m * length_m)) of their intervals, in place. */
DEVICE void to_weights(float *log_density, const float *length, int64_t count, float max_log_density)
{
    float passing[MAX_SAMPLES + 1], optical_depth = 0;
    for (int64_t m = 0; m < count; m++)
        log_density[m] = log_density[m] > max_log_density ? max_log_density : log_density[m];
    exponentials(log_density, count);
    for (int64_t m = 0; m < count; m++)
        passing[m + 1] = -(optical_depth += log_density[m] * length[m]);
    exponentials(passing + 1, count);
    passing[0] = 1;
    for (int64_t m = 0; m < count; m++)
        log_density[m] = passing[m] - passing[m + 1];
}

/* out[N][count + 1]: edges of `count` intervals that hold equal shares of the weights that a proposal grid gives to the
 * M intervals with edges s_vals[N][M + 1]; even_share of them is spread evenly. */
KERNEL resample(const float *rays, int64_t stride, int64_t N, int64_t kind, float unit, float last_disparity,
                const float *s_vals, int64_t M, const float *aabb, int64_t contracted, const float *table,
                int64_t levels, int64_t F, const int64_t *resolutions, const int64_t *level_offsets,
                float initial_log_density, float max_log_density, float even_share, int64_t count, float *out)
{
    const Spacing spacing = {kind, unit, last_disparity};
    const Grid grid = {aabb, table, contracted, levels, F, resolutions, level_offsets};
    PARALLEL_FOR(n, N)
    {
        const float *s = s_vals + n * (M + 1);
        float middle[MAX_SAMPLES], length[MAX_SAMPLES], x[3][MAX_SAMPLES], weight[MAX_SAMPLES];
        float *to = out + n * (count + 1), total = 0, sum = 0, all = 0;
        Tile encoded;
        middles_of(rays + n * stride, spacing, s, M, &grid, middle, length, x);
        for (int64_t start = 0; start < M; start += TILE) {
            encode_tile(&grid, x, start, encoded);
            for (int m = 0; m < TILE; m++) {
                weight[start + m] = initial_log_density;
                for (int64_t l = 0; l < levels * F; l++)
                    weight[start + m] += encoded[l][m];
            }
        }
        to_weights(weight, length, M, max_log_density);

        for (int64_t m = 0; m < M; m++)
            total += weight[m];
        float scale = (1 - even_share) / (total > 1e-7f ? total : 1e-7f);
        for (int64_t m = 0; m < M; m++)
            all += weight[m] = scale * weight[m] + even_share * (s[m + 1] - s[m]);
        for (int64_t k = 0, m = 0; k <= count; k++) {
            float quantile = all * (float)k / (float)count;
            while (m < M - 1 && sum + weight[m] <= quantile)
                sum += weight[m++];
            float share = (quantile - sum) / weight[m];
            to[k] = s[m] + (share < 1 ? share : 1) * (s[m + 1] - s[m]);
        }
        to[count] = s[M];
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

/* out[N][5]: colour, opacity, and the sum of weights times depths or, with spacing of kind 2, disparities, of samples
 * in intervals with edges s_vals[N][M + 1]. Layers 0 and 1 give `n_features` channels, the first of which is the log
 * density less initial_log_density; 2, 3 and 4 the colour, of which the last has 8 rows. Added in layer 2 is D[width][16]
 * times the spherical harmonics of the direction, unless D is NULL. With `bf16`, where the processor has it, products
 * are bfloat16. */
KERNEL shade(const float *rays, int64_t stride, int64_t N, int64_t kind, float unit, float last_disparity,
             const float *s_vals, int64_t M, const float *aabb, int64_t contracted, const float *table, int64_t levels,
             int64_t F, const int64_t *resolutions, const int64_t *level_offsets, const float *W0, const float *b0,
             const float *W1, const float *b1, const float *W2, const float *D, const float *b2, const float *W3,
             const float *b3, const float *W4, const float *b4, int64_t width, int64_t n_features,
             float initial_log_density, float max_log_density, int64_t bf16, float *out)
{
    const Spacing spacing = {kind, unit, last_disparity};
    const Grid grid = {aabb, table, contracted, levels, F, resolutions, level_offsets};
    Layer layers[5] = {{W0, b0, NULL, levels * F, width}, {W1, b1, NULL, width, n_features},
                       {W2, b2, NULL, n_features, width}, {W3, b3, NULL, width, width}, {W4, b4, NULL, width, 8}};
#ifdef __AVX512BF16__
    uint32_t pairs[5][MAX_CHANNELS * MAX_CHANNELS / 2];
    for (int l = 0; l < 5 && bf16; l++) {
        for (int64_t i = 0; i < layers[l].n_in * layers[l].n_out / 2; i++)
            pairs[l][i] = to_pair(layers[l].W[2 * i], layers[l].W[2 * i + 1]);
        layers[l].pairs = pairs[l];
    }
#endif
    PARALLEL_FOR(n, N)
    {
        const float *ray = rays + n * stride;
        float middle[MAX_SAMPLES], length[MAX_SAMPLES], x[3][MAX_SAMPLES], weight[MAX_SAMPLES];
        float rgb[3][MAX_SAMPLES], bias[MAX_CHANNELS], harmonics[N_HARMONICS], sum[5] = {0};
        Tile a, b;
        middles_of(ray, spacing, s_vals + n * (M + 1), M, &grid, middle, length, x);

        Layer first = layers[2];
        if (D) {
            harmonics_of(ray + 8, harmonics);
            for (int64_t o = 0; o < width; o++) {
                bias[o] = b2[o];
                for (int i = 0; i < N_HARMONICS; i++)
                    bias[o] += D[o * N_HARMONICS + i] * harmonics[i];
            }
            first.b = bias;
        }
        for (int64_t start = 0; start < M; start += TILE) {
            encode_tile(&grid, x, start, a);
            linear(layers, false, a, b);
            linear(layers + 1, true, b, a);
            for (int m = 0; m < TILE; m++)
                weight[start + m] = a[0][m] + initial_log_density;
            linear(&first, false, a, b);
            linear(layers + 3, true, b, a);
            linear(layers + 4, true, a, b);
            for (int i = 0; i < 3; i++)
                for (int m = 0; m < TILE; m++)
                    rgb[i][start + m] = -b[i][m];
        }
        to_weights(weight, length, M, max_log_density);
        for (int i = 0; i < 3; i++) {
            exponentials(rgb[i], M);
            for (int64_t m = 0; m < M; m++)
                sum[i] += weight[m] / (1 + rgb[i][m]);
        }
        for (int64_t m = 0; m < M; m++) {
            sum[3] += weight[m];
            sum[4] += weight[m] * (kind == 2 ? to_disparity(middle[m] / unit) : middle[m]);
        }
        memcpy(out + 5 * n, sum, sizeof sum);
    }
}
#endif
