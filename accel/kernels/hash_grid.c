/* Multiresolution hash encoding on a CPU, compiled on first use; the reference implementation is in
 * `accel/hash_grid.py`.
 *
 * Points are x[N][3] in [0, 1]. Level l has cells of 1 / resolutions[l]; its entries, F numbers each, begin at entry
 * level_offsets[l] of the table. A level of (resolution + 1)^3 entries is dense, one with fewer is hashed.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define POINTS_PER_TASK 2048 /* few enough for a level's entries to stay in the cache */
#define MAX_F 8

/* The eight entries around a point, and their weights. */
static inline void corner_entries(const float *x, int64_t resolution, int64_t size, int64_t *entry, float *weight)
{
    const int dense = (resolution + 1) * (resolution + 1) * (resolution + 1) <= size;
    int64_t cell[3];
    float fraction[3];
    for (int i = 0; i < 3; i++) {
        float clipped = x[i] > 0 ? (x[i] < 1 ? x[i] : 1) : 0; /* NaN becomes 0 */
        float scaled = clipped * (float)resolution;
        float base = floorf(scaled);
        if (base > (float)(resolution - 1))
            base = (float)(resolution - 1);
        cell[i] = (int64_t)base;
        fraction[i] = scaled - base;
    }
    for (int c = 0; c < 8; c++) {
        int64_t p[3];
        float w = 1;
        for (int i = 0; i < 3; i++) {
            int up = c >> i & 1;
            p[i] = cell[i] + up;
            w *= up ? fraction[i] : 1 - fraction[i];
        }
        weight[c] = w;
        if (dense)
            entry[c] = (p[2] * (resolution + 1) + p[1]) * (resolution + 1) + p[0];
        else
            entry[c] = (int64_t)(((uint32_t)p[0] ^ (uint32_t)p[1] * 2654435761u ^ (uint32_t)p[2] * 805459861u)
                                 & (uint32_t)(size - 1));
    }
}

static inline __attribute__((always_inline)) void encode_level(const float *x, const float *table, float *out,
                                                               int64_t count, int64_t stride, const int F,
                                                               int64_t resolution, int64_t size)
{
    int64_t entry[8];
    float weight[8];
    for (int64_t n = 0; n < count; n++) {
        float sum[MAX_F] = {0};
        corner_entries(x + 3 * n, resolution, size, entry, weight);
        for (int c = 0; c < 8; c++)
            for (int f = 0; f < F; f++)
                sum[f] += weight[c] * table[entry[c] * F + f];
        memcpy(out + n * stride, sum, F * sizeof(float));
    }
}

/* out[N][levels * F] */
void encode(const float *x, const float *table, float *out, int64_t N, int64_t levels, int64_t F,
            const int64_t *resolutions, const int64_t *level_offsets)
{
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < N; start += POINTS_PER_TASK) {
        int64_t count = N - start < POINTS_PER_TASK ? N - start : POINTS_PER_TASK;
        const float *points = x + 3 * start;
        for (int64_t l = 0; l < levels; l++) {
            const float *entries = table + level_offsets[l] * F;
            float *to = out + start * levels * F + l * F;
            int64_t size = level_offsets[l + 1] - level_offsets[l];
            switch (F) { /* with F constant the compiler vectorises the inner loops */
            case 1: encode_level(points, entries, to, count, levels * F, 1, resolutions[l], size); break;
            case 2: encode_level(points, entries, to, count, levels * F, 2, resolutions[l], size); break;
            case 4: encode_level(points, entries, to, count, levels * F, 4, resolutions[l], size); break;
            case 8: encode_level(points, entries, to, count, levels * F, 8, resolutions[l], size); break;
            }
        }
    }
}

static inline __attribute__((always_inline)) void gradient_level(const float *x, const float *grad_out, float *grad,
                                                                 int64_t N, int64_t stride, const int F,
                                                                 int64_t resolution, int64_t size)
{
    int64_t entry[8];
    float weight[8];
    for (int64_t n = 0; n < N; n++) {
        corner_entries(x + 3 * n, resolution, size, entry, weight);
        for (int c = 0; c < 8; c++)
            for (int f = 0; f < F; f++)
                grad[entry[c] * F + f] += weight[c] * grad_out[n * stride + f];
    }
}

/* Overwrites grad, which has the table's layout. One thread does a whole level: no entry is written by two threads, and
 * the order of summation does not depend on the number of threads. */
void gradient(const float *x, const float *grad_out, float *grad, int64_t N, int64_t levels, int64_t F,
              const int64_t *resolutions, const int64_t *level_offsets)
{
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t l = levels - 1; l >= 0; l--) {
        float *to = grad + level_offsets[l] * F;
        const float *from = grad_out + l * F;
        int64_t size = level_offsets[l + 1] - level_offsets[l];
        memset(to, 0, size * F * sizeof(float));
        switch (F) {
        case 1: gradient_level(x, from, to, N, levels * F, 1, resolutions[l], size); break;
        case 2: gradient_level(x, from, to, N, levels * F, 2, resolutions[l], size); break;
        case 4: gradient_level(x, from, to, N, levels * F, 4, resolutions[l], size); break;
        case 8: gradient_level(x, from, to, N, levels * F, 8, resolutions[l], size); break;
        }
    }
}
