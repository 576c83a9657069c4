#include "tiles.c"

/* Rays through a `HashNeRF` at intervals that proposal grids choose, without gradients. The reference implementation
 * is `ProposalRenderer` in `accel/proposals.py`. Each ray is done from end to end, so that all its numbers stay in the
 * processor's caches.
 *
 * Ray n is at rays + n * stride: origin, direction, near, far and, where colours depend on it, the unit direction. The
 * edges of its intervals are at s from 0 to 1, and its samples in the middle of intervals.
 */
#ifndef __CUDACC__
#define MAX_SAMPLES MAX_COUNT

/* Edges are even in distance (kind 0), in disparity (1), or in distance up to `unit` and in disparity beyond (2), where
 * the last edge is at last_disparity, a value of `to_disparity`. */
typedef struct {
    int64_t kind;
    float unit, last_disparity;
} Spacing;

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

/* Densities to the weights T_m (1 - exp(-sigma_m * length_m)) of their intervals, in place. */
DEVICE void to_weights(float *density, const float *length, int64_t count)
{
    float passing[MAX_SAMPLES + 1], optical_depth = 0;
    for (int64_t m = 0; m < count; m++)
        passing[m + 1] = -(optical_depth += density[m] * length[m]);
    exponentials(passing + 1, count);
    passing[0] = 1;
    for (int64_t m = 0; m < count; m++)
        density[m] = passing[m] - passing[m + 1];
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
            encode_tile(&grid, x[0] + start, MAX_SAMPLES, encoded);
            for (int m = 0; m < TILE; m++) {
                weight[start + m] = initial_log_density;
                for (int64_t l = 0; l < levels * F; l++)
                    weight[start + m] += encoded[l][m];
            }
        }
        to_densities(weight, M, max_log_density);
        to_weights(weight, length, M);

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

/* out[N][5]: colour, opacity, and the sum of weights times depths or, with spacing of kind 2, disparities, of samples
 * in intervals with edges s_vals[N][M + 1]. Layers 0 and 1 give `n_features` channels, the first of which is the log
 * density less initial_log_density; 2, 3 and 4 the colour, of which the last has 8 rows. Added in layer 2 is D[width][16]
 * times the spherical harmonics of the direction, unless D is NULL. With `bf16`, hidden layers multiply in
 * bfloat16 where the processor can. */
KERNEL shade(const float *rays, int64_t stride, int64_t N, int64_t kind, float unit, float last_disparity,
             const float *s_vals, int64_t M, const float *aabb, int64_t contracted, const float *table, int64_t levels,
             int64_t F, const int64_t *resolutions, const int64_t *level_offsets, const float *W0, const float *b0,
             const float *W1, const float *b1, const float *W2, const float *D, const float *b2, const float *W3,
             const float *b3, const float *W4, const float *b4, int64_t width, int64_t n_features,
             float initial_log_density, float max_log_density, int64_t bf16, float *out)
{
    const Spacing spacing = {kind, unit, last_disparity};
    const Grid grid = {aabb, table, contracted, levels, F, resolutions, level_offsets};
    Layer layers[N_LAYERS] = {{W0, b0, NULL, levels * F, width},
                              {W1, b1, NULL, width, n_features},
                              {W2, b2, NULL, n_features, width},
                              {W3, b3, NULL, width, width},
                              {W4, b4, NULL, width, 8}};
    Pairs pairs[N_LAYERS];
    if (bf16)
        convert_weights(layers, pairs);
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
            encode_tile(&grid, x[0] + start, MAX_SAMPLES, a);
            linear(layers, true, a, b);
            linear(layers + 1, false, b, a);
            for (int m = 0; m < TILE; m++)
                weight[start + m] = a[0][m] + initial_log_density;
            linear(&first, true, a, b);
            linear(layers + 3, true, b, a);
            linear(layers + 4, false, a, b);
            for (int i = 0; i < 3; i++)
                for (int m = 0; m < TILE; m++)
                    rgb[i][start + m] = -b[i][m];
        }
        to_densities(weight, M, max_log_density);
        to_weights(weight, length, M);
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
