#include "march.c"
#include "tiles.c"

/* Rays through the occupied cells of a grid and a `HashNeRF`, without gradients. The reference implementation is
 * `GridRenderer` in `accel/grid_renderer.py`.
 *
 * Ray n is at rays + n * stride: origin, direction, near, far and, where colours depend on it, the unit direction.
 */
#ifndef __CUDACC__
#define RAYS 1024 /* rays that a thread takes at once */
#define ADVANCE 3 /* at least so many samples of a ray are evaluated before it is tested whether it is opaque */
#define MAX_ACTIVE (BLOCK / ADVANCE)

/* Ray n on its way: its next sample is candidate k, at t, unless it is done. */
typedef struct {
    Ray ray;
    int64_t n, k;
    bool done;
    float t, transmittance, harmonics[N_HARMONICS], sum[5];
} Active;

/* Moves on to the first sample from candidate k on, if there is one. */
DEVICE void move_on(const Cells *cells, Active *active, int64_t k)
{
    active->done = true;
    for (int64_t next; k < active->ray.num_candidates && active->done; k = next)
        if (test_candidate(cells, &active->ray, k, &active->t, &next))
            active->k = k, active->done = false;
}

/* A sample that is seen: its number in the block, its weight, the harmonics of its direction, and its ray's colour. */
typedef struct {
    int64_t number;
    float weight;
    const float *harmonics;
    float *rgb;
} Seen;

/* Adds the colours of samples, times their weights, to those of their rays. features[channel][BLOCK] */
DEVICE void add_colors(const Network *network, const float *features, const Seen *seen, int64_t count)
{
    const int64_t n_features = network->layers[1].n_out;
    Tile in[N_LAYERS + 1];
    for (; count > 0; seen += TILE, count -= TILE) {
        const int64_t left = count < TILE ? count : TILE;
        for (int64_t m = 0; m < TILE; m++) {
            const Seen *sample = seen + (m < left ? m : 0);
            for (int64_t i = 0; i < n_features; i++)
                in[2][i][m] = features[i * BLOCK + sample->number];
            for (int i = 0; i < N_HARMONICS && network->views; i++)
                in[2][n_features + i][m] = sample->harmonics[i];
        }
        colors_of(network, in);
        for (int i = 0; i < 3; i++) {
            float *x = in[N_LAYERS][i];
            SIMD for (int m = 0; m < TILE; m++)
                x[m] = -x[m];
            exponentials(x, TILE);
            for (int64_t m = 0; m < left; m++)
                seen[m].rgb[i] += seen[m].weight / (1 + x[m]);
        }
    }
}

/* out[N][5]: colour, opacity and depth of rays with steps of step_size; spacing and num_candidates are those of
 * `candidates`. Rays end where their transmittance falls below min_weight; samples of less weight add no colour. */
KERNEL render(const float *rays, int64_t stride, int64_t N, const float *spacing, const int64_t *num_candidates,
              const uint8_t *occupied, const uint8_t *blocks, int64_t resolution, const float *box, float step_size,
              float min_weight, NETWORK_PARAMETERS, float *out)
{
    const Cells cells = cells_of(occupied, blocks, resolution, box);
    Pairs pairs[N_LAYERS];
    const Network network = network_of(NETWORK_ARGUMENTS, pairs);
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < N; start += RAYS) {
        const int64_t end = N - start < RAYS ? N : start + RAYS;
        int64_t n_active = 0, waiting = start;
        Active active[MAX_ACTIVE];
        memset(out + 5 * start, 0, 5 * (end - start) * sizeof(float));
        for (;;) {
            for (; n_active < MAX_ACTIVE && waiting < end; waiting++) {
                Active *ray = active + n_active;
                *ray = (Active){ray_of(rays + waiting * stride, spacing + 3 * waiting, num_candidates[waiting]),
                                waiting, .transmittance = 1};
                move_on(&cells, ray, 0);
                if (ray->done)
                    continue;
                if (views)
                    harmonics_of(rays + waiting * stride + 8, ray->harmonics);
                n_active++;
            }
            if (n_active == 0)
                break;

            const int64_t advance = n_active * ADVANCE < TILE ? TILE / n_active : ADVANCE;
            int64_t count = 0, ends[MAX_ACTIVE], n_seen = 0, unfinished = 0;
            float points[3 * BLOCK], t[BLOCK], passing[BLOCK]; /* the share of light that passes a sample */
            float encoded[MAX_CHANNELS * BLOCK], features[MAX_CHANNELS * BLOCK];
            Seen seen[BLOCK];
            for (int64_t a = 0; a < n_active; a++) { /* the next samples */
                Active *ray = active + a;
                for (int64_t s = 0; s < advance && !ray->done; s++) {
                    for (int i = 0; i < 3; i++)
                        points[3 * count + i] = ray->ray.o[i] + ray->t * ray->ray.d[i];
                    t[count++] = ray->t;
                    move_on(&cells, ray, ray->k + 1);
                }
                ends[a] = count;
            }
            encode_block(&network.grid, points, 3, count, encoded);
            for (int64_t first = 0; first < count; first += TILE) {
                Tile in[3];
                densities_of(&network, encoded + first, in, passing + first);
                for (int64_t i = 0; i < n_features; i++)
                    memcpy(features + i * BLOCK + first, in[2][i], sizeof(in[2][i]));
            }
            for (int64_t m = 0; m < count; m++)
                passing[m] *= -step_size;
            exponentials(passing, count);
            for (int64_t a = 0, m = 0; a < n_active; m = ends[a++]) { /* their weights */
                Active *ray = active + a;
                for (; m < ends[a] && !(ray->transmittance < min_weight); m++) { /* NaN is seen */
                    const float weight = ray->transmittance * (1 - passing[m]);
                    if (!(weight < min_weight))
                        seen[n_seen++] = (Seen){m, weight, ray->harmonics, ray->sum};
                    ray->sum[3] += weight;
                    ray->sum[4] += weight * t[m];
                    ray->transmittance *= passing[m];
                }
            }
            add_colors(&network, features, seen, n_seen);
            for (int64_t a = 0; a < n_active; a++)
                if (active[a].done || active[a].transmittance < min_weight)
                    memcpy(out + 5 * active[a].n, active[a].sum, sizeof(active[a].sum));
                else
                    active[unfinished++] = active[a];
            n_active = unfinished;
        }
    }
}
#endif
