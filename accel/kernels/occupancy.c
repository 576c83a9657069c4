/* Ray marching through an occupancy grid and volume rendering of packed samples on a CPU, compiled on first use. The
 * reference implementations are in `accel/occupancy.py` and `accel/packed.py`.
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#define BLOCK 8 /* cells along a side of a block; an empty block is skipped in one step */

typedef struct {
    const uint8_t *cells, *blocks;
    int64_t resolution; /* cells along each axis; there are ceil(resolution / BLOCK) blocks along it */
    float low[3], scale[3];
} Grid;

/* Candidate k of a ray is at t_k = start + (k + jitter) * dt, k < num_candidates. */
typedef struct {
    float o[3], d[3], start, dt, jitter;
    int64_t num_candidates;
} Ray;

/* Whether candidate k lies in an occupied cell. `t` becomes its position, and `next` the next candidate to test: the
 * first one behind this block if the block is empty. */
static bool test_candidate(const Grid *grid, const Ray *ray, int64_t k, float *t, int64_t *next)
{
    *t = ray->start + ((float)k + ray->jitter) * ray->dt;
    int64_t cell[3];
    float u[3];
    for (int i = 0; i < 3; i++) {
        u[i] = (ray->o[i] + *t * ray->d[i] - grid->low[i]) * grid->scale[i]; /* in cells */
        float base = floorf(u[i]);
        cell[i] = base > 0 ? (base < (float)(grid->resolution - 1) ? (int64_t)base : grid->resolution - 1) : 0;
    }
    *next = k + 1;
    int64_t num_blocks = (grid->resolution + BLOCK - 1) / BLOCK;
    if (grid->blocks[((cell[0] / BLOCK) * num_blocks + cell[1] / BLOCK) * num_blocks + cell[2] / BLOCK])
        return grid->cells[(cell[0] * grid->resolution + cell[1]) * grid->resolution + cell[2]];
    float t_exit = INFINITY; /* distance in t to where the ray leaves this block */
    for (int i = 0; i < 3; i++) {
        float speed = ray->d[i] * grid->scale[i];
        float border = (float)((cell[i] / BLOCK + (speed > 0)) * BLOCK);
        if (speed != 0) {
            float t_border = (border - u[i]) / speed;
            t_exit = t_border < t_exit ? t_border : t_exit;
        }
    }
    float steps = t_exit / ray->dt - 0.01f; /* rounding errors must not skip a candidate in the next block */
    if (steps > 1 && steps < 1e6f)
        *next = k + (int64_t)steps + 1;
    return false;
}

/* rays[n][6]: origin and direction; spacing[n][3]: start, dt, jitter; num_candidates[n]; begin[n]: the first
 * candidate to test. With `t` NULL, counts[n] becomes the number of samples, at most max_samples, and next_begin[n] the
 * first candidate that has not been tested; otherwise the samples are written from offsets[n] on. */
void march(const float *rays, const float *spacing, const int64_t *num_candidates, const int64_t *begin, int64_t N,
           int64_t max_samples, const uint8_t *cells, const uint8_t *blocks, int64_t resolution, const float *low,
           const float *scale, int64_t *counts, int64_t *next_begin, const int64_t *offsets, float *t,
           int64_t *ray_indices)
{
    Grid grid = {cells, blocks, resolution, {low[0], low[1], low[2]}, {scale[0], scale[1], scale[2]}};
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        Ray ray;
        for (int i = 0; i < 3; i++) {
            ray.o[i] = rays[6 * n + i];
            ray.d[i] = rays[6 * n + 3 + i];
        }
        ray.start = spacing[3 * n], ray.dt = spacing[3 * n + 1], ray.jitter = spacing[3 * n + 2];
        ray.num_candidates = num_candidates[n];
        int64_t count = 0, k = begin[n];
        while (k < ray.num_candidates && count < max_samples) {
            float t_k;
            int64_t next;
            if (test_candidate(&grid, &ray, k, &t_k, &next)) {
                if (t) {
                    t[offsets[n] + count] = t_k;
                    ray_indices[offsets[n] + count] = n;
                }
                count++;
            }
            k = next;
        }
        if (!t) {
            counts[n] = count;
            next_begin[n] = k < ray.num_candidates ? k : ray.num_candidates;
        }
    }
}

static inline float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

/* The optical depth of a sample. NaN is kept, so that training notices it. */
static inline float optical_depth_of(const float *sample, float step_size)
{
    return (sample[3] < 0 ? 0 : sample[3]) * step_size;
}

/* Samples offsets[n] … offsets[n + 1] - 1 belong to ray n: raw[M][4], t[M], and step_sizes[n] for each of them.
 * optical_depth[n] is that in front of the first sample on entry, and behind the last one on return. Added to out[n][5]:
 * colour, opacity, depth. Written to weights[M], unless that is NULL: the samples' weights; samples behind
 * max_optical_depth are left as they are. */
void composite(const float *raw, const float *t, const float *step_sizes, const int64_t *offsets, int64_t N,
               float max_optical_depth, float *optical_depth, float *out, float *weights)
{
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        float tau = optical_depth[n], sum[5] = {0}; /* tau: the optical depth in front of the sample */
        for (int64_t m = offsets[n]; m < offsets[n + 1] && !(tau > max_optical_depth); m++) {
            const float *sample = raw + 4 * m;
            float delta_tau = optical_depth_of(sample, step_sizes[n]);
            float weight = expf(-tau) * (1 - expf(-delta_tau));
            for (int i = 0; i < 3; i++)
                sum[i] += weight * sigmoid(sample[i]);
            if (weights)
                weights[m] = weight;
            sum[3] += weight;
            sum[4] += weight * t[m];
            tau += delta_tau;
        }
        for (int i = 0; i < 5; i++)
            out[5 * n + i] += sum[i];
        optical_depth[n] = tau;
    }
}

/* Gradient of `composite` with no optical depth in front of the first sample: grad_raw[M][4], zero on entry, from
 * grad_out[n][5] and grad_weights[M], which may be NULL. A sample attenuates those behind it:
 * dL/d(delta_tau_i) = T_{i+1} v_i - sum_{j > i} w_j v_j with v_i = grad_out · (colour_i, 1, t_i) + grad_weights_i. */
void composite_gradient(const float *raw, const float *t, const float *step_sizes, const int64_t *offsets, int64_t N,
                        float max_optical_depth, const float *grad_out, const float *grad_weights, float *grad_raw)
{
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        const float *g = grad_out + 5 * n;
        double tau = 0, behind = 0; /* double: going back, tau is found by subtraction */
        int64_t m;
        for (m = offsets[n]; m < offsets[n + 1] && !(tau > max_optical_depth); m++) {
            float delta_tau = optical_depth_of(raw + 4 * m, step_sizes[n]);
            float weight = expf(-(float)tau) * (1 - expf(-delta_tau)), value = g[3] + g[4] * t[m];
            if (grad_weights)
                value += grad_weights[m];
            for (int i = 0; i < 3; i++) {
                float c = sigmoid(raw[4 * m + i]);
                value += g[i] * c;
                grad_raw[4 * m + i] = weight * g[i] * c * (1 - c);
            }
            grad_raw[4 * m + 3] = value; /* v_i, until the second loop */
            tau += delta_tau;
        }
        for (m--; m >= offsets[n]; m--) {
            float value = grad_raw[4 * m + 3], delta_tau = optical_depth_of(raw + 4 * m, step_sizes[n]);
            float transmittance_after = expf(-(float)tau);
            tau -= delta_tau;
            grad_raw[4 * m + 3] =
                raw[4 * m + 3] > 0 ? step_sizes[n] * (transmittance_after * value - (float)behind) : 0;
            behind += expf(-(float)tau) * (1 - expf(-delta_tau)) * value;
        }
    }
}
