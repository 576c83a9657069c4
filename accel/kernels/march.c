/* Ray marching through an occupancy grid; the reference implementations are in `accel/occupancy.py`.
 *
 * Ray n is at rays + n * stride: origin, direction, near, far. `alive` lists the A rays to process; NULL stands for all.
 */
#define SIDE 8 /* cells along a side of a block; an empty block is skipped in one step */

typedef struct {
    const uint8_t *occupied, *blocks;
    int64_t resolution; /* cells along each axis; there are ceil(resolution / SIDE) blocks along it */
    float low[3], scale[3];
} Cells;

/* Candidate k of a ray is at t_k = start + (k + jitter) * dt, k < num_candidates. */
typedef struct {
    float o[3], d[3], start, dt, jitter;
    int64_t num_candidates;
} Ray;

/* spacing[N][3]: start, dt, jitter; num_candidates[N]: how many candidates lie in the box aabb[2][3], between near and
 * far. */
KERNEL candidates(const float *rays, int64_t stride, int64_t N, const float *aabb, float step_size, const float *jitter,
                  int64_t max_candidates, float *spacing, int64_t *num_candidates)
{
    PARALLEL_FOR(n, N)
    {
        const float *o = rays + n * stride, *d = o + 3;
        float start = o[6], end = o[7], square = 0;
        bool misses = false;
        for (int i = 0; i < 3; i++) {
            float low = (aabb[i] - o[i]) / d[i], high = (aabb[3 + i] - o[i]) / d[i];
            if (d[i] == 0) { /* parallel planes bound nothing */
                misses = misses || o[i] < aabb[i] || o[i] > aabb[3 + i];
                continue;
            }
            misses = misses || low != low || high != high; /* NaN */
            float enter = low < high ? low : high, leave = low < high ? high : low;
            start = enter > start ? enter : start;
            end = leave < end ? leave : end;
            square += d[i] * d[i];
        }
        float dt = step_size / sqrtf(square), count = ceilf((end - start) / dt - jitter[n]);
        count = count > 0 ? (count < (float)max_candidates ? count : (float)max_candidates) : 0; /* NaN becomes 0 */
        spacing[3 * n] = start, spacing[3 * n + 1] = dt, spacing[3 * n + 2] = jitter[n];
        num_candidates[n] = misses ? 0 : (int64_t)count;
    }
}

DEVICE Cells cells_of(const uint8_t *occupied, const uint8_t *blocks, int64_t resolution, const float *aabb)
{
    Cells cells = {occupied, blocks, resolution, {0}, {0}};
    for (int i = 0; i < 3; i++)
        cells.low[i] = aabb[i], cells.scale[i] = (float)resolution / (aabb[3 + i] - aabb[i]);
    return cells;
}

/* The ray at `ray`, and what `candidates` returns for it. */
DEVICE Ray ray_of(const float *ray, const float *spacing, int64_t num_candidates)
{
    const Ray result = {{ray[0], ray[1], ray[2]}, {ray[3], ray[4], ray[5]}, spacing[0], spacing[1], spacing[2],
                        num_candidates};
    return result;
}

/* Whether candidate k lies in an occupied cell. `t` becomes its position, and `next` the next candidate to test: the
 * first one behind this block if the block is empty. */
DEVICE bool test_candidate(const Cells *cells, const Ray *ray, int64_t k, float *t, int64_t *next)
{
    *t = ray->start + ((float)k + ray->jitter) * ray->dt;
    int64_t cell[3];
    float u[3];
    for (int i = 0; i < 3; i++) {
        u[i] = (ray->o[i] + *t * ray->d[i] - cells->low[i]) * cells->scale[i]; /* in cells */
        float base = floorf(u[i]);
        cell[i] = base > 0 ? (base < (float)(cells->resolution - 1) ? (int64_t)base : cells->resolution - 1) : 0;
    }
    *next = k + 1;
    int64_t num_blocks = (cells->resolution + SIDE - 1) / SIDE;
    if (cells->blocks[((cell[0] / SIDE) * num_blocks + cell[1] / SIDE) * num_blocks + cell[2] / SIDE])
        return cells->occupied[(cell[0] * cells->resolution + cell[1]) * cells->resolution + cell[2]];
    float t_exit = INFINITY; /* distance in t to where the ray leaves this block */
    for (int i = 0; i < 3; i++) {
        float speed = ray->d[i] * cells->scale[i];
        float border = (float)((cell[i] / SIDE + (speed > 0)) * SIDE);
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

/* begin[N]: the first candidate to test of each ray; NULL for 0. If `counts` is not NULL, counts[A] becomes the number
 * of samples, at most max_samples. Otherwise the samples are written from offsets[a] on, and begin becomes the first
 * candidate that has not been tested. */
KERNEL march(const float *rays, int64_t stride, const int64_t *alive, int64_t A, const float *spacing,
             const int64_t *num_candidates, int64_t max_samples, const uint8_t *occupied, const uint8_t *blocks,
             int64_t resolution, const float *aabb, int64_t *begin, int64_t *counts, const int64_t *offsets, float *t,
             int64_t *ray_indices)
{
    PARALLEL_FOR(a, A)
    {
        const int64_t n = alive ? alive[a] : a;
        const Cells cells = cells_of(occupied, blocks, resolution, aabb);
        const Ray ray = ray_of(rays + n * stride, spacing + 3 * n, num_candidates[n]);
        int64_t count = 0, k = begin ? begin[n] : 0;
        while (k < ray.num_candidates && count < max_samples) {
            float t_k;
            int64_t next;
            if (test_candidate(&cells, &ray, k, &t_k, &next)) {
                if (!counts) {
                    t[offsets[a] + count] = t_k;
                    ray_indices[offsets[a] + count] = n;
                }
                count++;
            }
            k = next;
        }
        if (!counts && begin)
            begin[n] = k < ray.num_candidates ? k : ray.num_candidates;
        if (counts)
            counts[a] = count;
    }
}
