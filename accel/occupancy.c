/* Marching through an occupancy grid and compositing what was found, on a CPU, compiled at first use; `occupancy.py` and
 * `packed.py` hold the plain twins and say what they do.
 */
#include <math.h>
#include <stdint.h>

#define BLOCK 8 /* cells along a side of a block, which is stepped over as a whole where it is empty */

typedef struct {
    const uint8_t *cells, *blocks;
    int64_t cells_along; /* of an axis; the blocks' count is that divided by BLOCK, rounded up */
    float low[3], scale[3];
} Grid;

/* The lattice of a ray: t_k = start + (k + offset) * dt, k < count. */
typedef struct {
    float o[3], d[3], start, dt, offset;
    int64_t count;
} Lattice;

static int occupied(const Grid *grid, const Lattice *ray, int64_t k, float *t, int64_t *next)
{
    *t = ray->start + ((float)k + ray->offset) * ray->dt;
    int64_t cell[3];
    float u[3];
    for (int i = 0; i < 3; i++) {
        u[i] = (ray->o[i] + *t * ray->d[i] - grid->low[i]) * grid->scale[i]; /* in cells */
        float base = floorf(u[i]);
        cell[i] = base > 0 ? (base < (float)(grid->cells_along - 1) ? (int64_t)base : grid->cells_along - 1) : 0;
    }
    *next = k + 1;
    int64_t blocks_along = (grid->cells_along + BLOCK - 1) / BLOCK;
    if (grid->blocks[((cell[0] / BLOCK) * blocks_along + cell[1] / BLOCK) * blocks_along + cell[2] / BLOCK])
        return grid->cells[(cell[0] * grid->cells_along + cell[1]) * grid->cells_along + cell[2]];
    float leave = INFINITY; /* how much further the ray is in this block */
    for (int i = 0; i < 3; i++) {
        float speed = ray->d[i] * grid->scale[i];
        float border = (float)((cell[i] / BLOCK + (speed > 0)) * BLOCK);
        if (speed != 0) {
            float until = (border - u[i]) / speed;
            leave = until < leave ? until : leave;
        }
    }
    float steps = leave / ray->dt - 0.01f; /* rather one step too few than one too many */
    if (steps > 1 && steps < 1e6f)
        *next = k + (int64_t)steps + 1;
    return 0;
}

/* rays[n][6]: origin and direction; lattice[n][3]: start, dt, offset; count[n] points of it; begin[n]: the first one to look
 * at. With `t` null, found[n] becomes the number of samples, at most `most`, and resume[n] the point after the last; else
 * they are written from first[n] on. */
void march(const float *rays, const float *lattice, const int64_t *count, const int64_t *begin, int64_t N, int64_t most,
           const uint8_t *cells, const uint8_t *blocks, int64_t cells_along, const float *low, const float *scale,
           int64_t *found, int64_t *resume, const int64_t *first, float *t, int64_t *ray_index)
{
    Grid grid = {cells, blocks, cells_along, {low[0], low[1], low[2]}, {scale[0], scale[1], scale[2]}};
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        Lattice ray;
        for (int i = 0; i < 3; i++) {
            ray.o[i] = rays[6 * n + i];
            ray.d[i] = rays[6 * n + 3 + i];
        }
        ray.start = lattice[3 * n], ray.dt = lattice[3 * n + 1], ray.offset = lattice[3 * n + 2];
        ray.count = count[n];
        int64_t samples = 0, k = begin[n];
        while (k < ray.count && samples < most) {
            float here;
            int64_t next;
            if (occupied(&grid, &ray, k, &here, &next)) {
                if (t) {
                    t[first[n] + samples] = here;
                    ray_index[first[n] + samples] = n;
                }
                samples++;
            }
            k = next;
        }
        if (!t) {
            found[n] = samples;
            resume[n] = k < ray.count ? k : ray.count;
        }
    }
}

static inline float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

static inline float optical_depth(const float *sample, float length)
{
    return (sample[3] < 0 ? 0 : sample[3]) * length; /* NaN stays */
}

/* Samples first[n] … first[n + 1] - 1 belong to ray n. raw[.][4], t[.], length[n] of each of its samples; passed[n] is the
 * optical depth before the first one. out[n][5]: colour, opacity, depth, which are added to; passed[n] goes on. */
void composite(const float *raw, const float *t, const float *length, const int64_t *first, int64_t N, float most_passed,
               float *passed, float *out)
{
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        float depth = passed[n], sum[5] = {0};
        for (int64_t m = first[n]; m < first[n + 1] && !(depth > most_passed); m++) {
            const float *sample = raw + 4 * m;
            float optical = optical_depth(sample, length[n]);
            float weight = expf(-depth) * (1 - expf(-optical));
            for (int i = 0; i < 3; i++)
                sum[i] += weight * sigmoid(sample[i]);
            sum[3] += weight;
            sum[4] += weight * t[m];
            depth += optical;
        }
        for (int i = 0; i < 5; i++)
            out[5 * n + i] += sum[i];
        passed[n] = depth;
    }
}

/* What `composite` with nothing passed hands back: grad_raw[.][4], which is zero at first, from grad_out[n][5]. A sample's
 * optical depth takes light from those behind it: dL/d(optical_i) = T_{i+1} v_i - sum_{j > i} w_j v_j with
 * v = grad_out · (colour, 1, t). */
void composite_gradient(const float *raw, const float *t, const float *length, const int64_t *first, int64_t N,
                        float most_passed, const float *grad_out, float *grad_raw)
{
#pragma omp parallel for schedule(dynamic, 256)
    for (int64_t n = 0; n < N; n++) {
        const float *g = grad_out + 5 * n;
        float depth = 0, behind = 0;
        int64_t m;
        for (m = first[n]; m < first[n + 1] && !(depth > most_passed); m++) {
            float optical = optical_depth(raw + 4 * m, length[n]);
            float weight = expf(-depth) * (1 - expf(-optical)), value = g[3] + g[4] * t[m];
            for (int i = 0; i < 3; i++) {
                float c = sigmoid(raw[4 * m + i]);
                value += g[i] * c;
                grad_raw[4 * m + i] = weight * g[i] * c * (1 - c);
            }
            grad_raw[4 * m + 3] = value;
            depth += optical;
        }
        for (m--; m >= first[n]; m--) {
            float value = grad_raw[4 * m + 3], optical = optical_depth(raw + 4 * m, length[n]);
            float after = expf(-depth);
            depth -= optical;
            grad_raw[4 * m + 3] = raw[4 * m + 3] > 0 ? length[n] * (after * value - behind) : 0;
            behind += expf(-depth) * (1 - expf(-optical)) * value;
        }
    }
}
