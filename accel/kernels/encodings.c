/* Multiresolution hash encoding of points, and spherical harmonics of directions. The reference implementations are in
 * `accel/hash_grid.py` and `run_nerf_helpers.py`.
 *
 * Point n is at points + n * stride, in the box aabb[2][3] or, if `contracted`, anywhere. Level l has cells of
 * 1 / resolutions[l] of the box; its entries, F numbers each, begin at entry level_offsets[l] of the table. A level of
 * (resolution + 1)^3 entries is dense, one with fewer is hashed.
 */
#define MAX_F 8

/* A point in the units of the box, or of the contraction of all space (`contract` in `accel/hash_grid.py`), clamped to
 * [0, 1]; NaN becomes 0. */
DEVICE void to_unit(const float *point, const float *aabb, int64_t contracted, float *x)
{
    float norm = 1, scale = 1, shift = 0;
    for (int i = 0; i < 3; i++) {
        x[i] = (point[i] - aabb[i]) / (aabb[3 + i] - aabb[i]);
        x[i] = x[i] == x[i] ? x[i] : 0;
        float distance = fabsf(2 * x[i] - 1);
        norm = distance > norm ? distance : norm;
    }
    if (contracted) {
        scale = 0.5f * (2 - 1 / norm) / norm;
        shift = 0.5f - 0.5f * scale;
    }
    for (int i = 0; i < 3; i++) {
        float unit = scale * x[i] + shift;
        x[i] = unit > 0 ? (unit < 1 ? unit : 1) : 0;
    }
}

/* The gradient by a point from g[3], that by its `to_unit`; 0 for coordinates that are clamped or NaN. */
DEVICE void to_unit_gradient(const float *point, const float *aabb, int64_t contracted, const float *g, float *grad)
{
    float y[3], norm = 1, scale = 1, slope = 0, along = 0, longest = 0; /* y is in [-1, 1] in the box */
    for (int i = 0; i < 3; i++) {
        y[i] = 2 * (point[i] - aabb[i]) / (aabb[3 + i] - aabb[i]) - 1;
        y[i] = y[i] == y[i] ? y[i] : -1;
        norm = fabsf(y[i]) > norm ? fabsf(y[i]) : norm;
        along += g[i] * y[i];
    }
    for (int i = 0; i < 3; i++)
        longest += fabsf(y[i]) == norm;
    if (contracted) {
        scale = 0.5f * (2 - 1 / norm) / norm;
        slope = (1 / norm - 1) / (norm * norm) / (longest > 0 ? longest : 1); /* of scale, by the longest axes */
    }
    for (int i = 0; i < 3; i++) {
        bool moves = point[i] == point[i] && (contracted || fabsf(y[i]) <= 1);
        float by_norm = contracted && fabsf(y[i]) == norm ? (y[i] < 0 ? -slope : slope) * along : 0;
        grad[i] = moves ? (scale * g[i] + by_norm) / (aabb[3 + i] - aabb[i]) : 0;
    }
}

/* The cell of a level that holds a point x, and the position in it. */
DEVICE void find_cell(const float *x, int64_t resolution, int64_t *cell, float *fraction)
{
    for (int i = 0; i < 3; i++) {
        float scaled = x[i] * (float)resolution;
        float base = floorf(scaled);
        if (base > (float)(resolution - 1))
            base = (float)(resolution - 1);
        cell[i] = (int64_t)base;
        fraction[i] = scaled - base;
    }
}

/* The eight entries around a point x, counted from the level's first one, and their weights. */
DEVICE void corner_entries(const float *x, int64_t resolution, int64_t size, int64_t *entry, float *weight)
{
    const int dense = (resolution + 1) * (resolution + 1) * (resolution + 1) <= size;
    int64_t cell[3];
    float fraction[3];
    find_cell(x, resolution, cell, fraction);
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

/* Adds to grad[3] the gradient by x of a level's encoding. */
DEVICE void add_point_gradient(const float *x, const float *entries, const float *grad_out, float *grad, const int F,
                               int64_t resolution, int64_t size)
{
    int64_t entry[8], cell[3];
    float weight[8], fraction[3];
    corner_entries(x, resolution, size, entry, weight);
    find_cell(x, resolution, cell, fraction);
    for (int c = 0; c < 8; c++) {
        float value = 0;
        for (int f = 0; f < F; f++)
            value += grad_out[f] * entries[entry[c] * F + f];
        for (int i = 0; i < 3; i++) { /* the weight without its factor of axis i, whose derivative is 1 or -1 */
            int j = (i + 1) % 3, k = (i + 2) % 3;
            float others = (c >> j & 1 ? fraction[j] : 1 - fraction[j]) * (c >> k & 1 ? fraction[k] : 1 - fraction[k]);
            grad[i] += (c >> i & 1 ? value : -value) * others * (float)resolution;
        }
    }
}

/* Calls `call` with F as a constant, so that the compiler unrolls the loops over it. */
#define WITH_CONSTANT_F(call)                                                                                          \
    switch (F) {                                                                                                       \
    case 1: call(1); break;                                                                                            \
    case 2: call(2); break;                                                                                            \
    case 4: call(4); break;                                                                                            \
    case 8: call(8); break;                                                                                            \
    }

#ifdef __CUDACC__
DEVICE void encode_point(const float *x, const float *entries, float *out, const int F, int64_t resolution,
                         int64_t size)
{
    int64_t entry[8];
    float weight[8], sum[MAX_F] = {0};
    corner_entries(x, resolution, size, entry, weight);
    for (int c = 0; c < 8; c++)
        for (int f = 0; f < F; f++)
            sum[f] += weight[c] * entries[entry[c] * F + f];
    for (int f = 0; f < F; f++)
        out[f] = sum[f];
}

/* Several threads may add to an entry, and most points have no gradient. */
DEVICE void add_gradient(const float *x, const float *grad_out, float *grad, const int F, int64_t resolution,
                         int64_t size)
{
    int64_t entry[8];
    float weight[8];
    corner_entries(x, resolution, size, entry, weight);
    for (int c = 0; c < 8; c++) {
        float *to = grad + entry[c] * F, w = weight[c];
#if __CUDA_ARCH__ >= 900
        if (F % 4 == 0) {
            for (int f = 0; f < F; f += 4)
                atomicAdd((float4 *)(to + f), make_float4(w * grad_out[f], w * grad_out[f + 1], w * grad_out[f + 2],
                                                          w * grad_out[f + 3]));
            continue;
        }
        if (F == 2) {
            atomicAdd((float2 *)to, make_float2(w * grad_out[0], w * grad_out[1]));
            continue;
        }
#endif
        for (int f = 0; f < F; f++)
            atomicAdd(to + f, w * grad_out[f]);
    }
}
#else
#define SIMD _Pragma("omp simd")
#define TILE 32 /* points that a CPU computes together, [channel][point] */
#define BLOCK 512 /* points that a thread takes at once: enough for a level's entries to stay in the cache */

typedef float Vector4 __attribute__((vector_size(16)));

typedef struct {
    const float *aabb, *table;
    int64_t contracted, levels, F;
    const int64_t *resolutions, *level_offsets;
} Grid;

/* `to_unit` of up to BLOCK points as x[3][BLOCK], zeros behind the last one. */
DEVICE void units_of(const Grid *grid, const float *points, int64_t stride, int64_t count, float *x)
{
    memset(x, 0, 3 * BLOCK * sizeof(float));
    for (int64_t m = 0; m < count; m++) {
        float unit[3];
        to_unit(points + m * stride, grid->aabb, grid->contracted, unit);
        for (int i = 0; i < 3; i++)
            x[i * BLOCK + m] = unit[i];
    }
}

/* `corner_entries` of a tile of points at level l, whose x, y and z are `stride` apart. The loops are over points, because
 * the compiler makes no vectors of those over corners. */
DEVICE void level_corners(const Grid *grid, int64_t l, const float *x, int64_t stride, uint32_t entry[8][TILE],
                          float weight[8][TILE])
{
    const int64_t corners = grid->resolutions[l] + 1;
    const int32_t side = (int32_t)corners;
    const uint32_t size = (uint32_t)(grid->level_offsets[l + 1] - grid->level_offsets[l]);
    const bool dense = corners * corners * corners <= size;
    const uint32_t factor[3] = {1, dense ? side : 2654435761u, dense ? side * side : 805459861u};
    uint32_t corner[3][2][TILE];
    float share[3][2][TILE];
    for (int i = 0; i < 3; i++)
        SIMD for (int m = 0; m < TILE; m++) {
            float scaled = x[i * stride + m] * (float)(side - 1);
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
}

/* `encode_point` of a tile of points at level l, whose x, y and z are `stride` apart: feature f of point m goes to
 * out[f * row + m]. */
DEVICE void encode_level(const Grid *grid, int64_t l, const float *x, int64_t stride, float *out, int64_t row)
{
    const int64_t F = grid->F;
    const float *entries = grid->table + grid->level_offsets[l] * F;
    uint32_t entry[8][TILE];
    float weight[8][TILE];
    level_corners(grid, l, x, stride, entry, weight);
    if (F == 4)
        for (int m = 0; m < TILE; m++) {
            Vector4 sum = {0};
            for (int c = 0; c < 8; c++)
                sum += weight[c][m] * *(const Vector4 *)(entries + 4 * (int64_t)entry[c][m]);
            for (int f = 0; f < 4; f++)
                out[f * row + m] = sum[f];
        }
    else
        for (int64_t f = 0; f < F; f++)
            for (int m = 0; m < TILE; m++) {
                float sum = 0;
                for (int c = 0; c < 8; c++)
                    sum += weight[c][m] * entries[F * entry[c][m] + f];
                out[f * row + m] = sum;
            }
}

/* `add_gradient` of the first `count` points of a tile at level l, whose x, y and z are `stride` apart; the gradient by
 * the encoding of point m is at grad_out + m * row. */
DEVICE void add_level_gradient(const Grid *grid, int64_t l, const float *x, int64_t stride, int64_t count,
                               const float *grad_out, int64_t row, float *grad)
{
    const int64_t F = grid->F;
    uint32_t entry[8][TILE];
    float weight[8][TILE];
    level_corners(grid, l, x, stride, entry, weight);
    for (int64_t m = 0; m < count; m++)
        for (int c = 0; c < 8; c++) {
            float *to = grad + F * (int64_t)entry[c][m];
            if (F == 4)
                *(Vector4 *)to += weight[c][m] * *(const Vector4 *)(grad_out + m * row);
            else
                for (int64_t f = 0; f < F; f++)
                    to[f] += weight[c][m] * grad_out[m * row + f];
        }
}
#endif

/* out[N][levels * F] */
KERNEL encode(const float *points, int64_t stride, const float *aabb, int64_t contracted, const float *table, float *out,
              int64_t N, int64_t levels, int64_t F, const int64_t *resolutions, const int64_t *level_offsets)
{
#ifdef __CUDACC__ /* neighbouring threads look up the same level */
    PARALLEL_FOR(i, N * levels)
    {
        int64_t l = i / N, n = i - l * N, size = level_offsets[l + 1] - level_offsets[l];
        float x[3];
        to_unit(points + n * stride, aabb, contracted, x);
#define ENCODE(F)                                                                                                      \
    encode_point(x, table + level_offsets[l] * F, out + (n * levels + l) * F, F, resolutions[l], size)
        WITH_CONSTANT_F(ENCODE)
    }
#else
    const Grid grid = {aabb, table, contracted, levels, F, resolutions, level_offsets};
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < N; start += BLOCK) {
        const int64_t count = N - start < BLOCK ? N - start : BLOCK;
        float x[3 * BLOCK], encoded[MAX_F * TILE];
        units_of(&grid, points + start * stride, stride, count, x);
        for (int64_t l = 0; l < levels; l++)
            for (int64_t first = 0; first < count; first += TILE) {
                encode_level(&grid, l, x + first, BLOCK, encoded, TILE);
                float *to = out + ((start + first) * levels + l) * F;
                for (int64_t m = 0; m < TILE && first + m < count; m++)
                    for (int64_t f = 0; f < F; f++)
                        to[m * levels * F + f] = encoded[f * TILE + m];
            }
    }
#endif
}

/* Adds to grad, which has the table's layout and is zero on entry to a GPU; a CPU overwrites it. There one thread does
 * a whole level, so that the order of summation does not depend on the number of threads. */
KERNEL encode_gradient(const float *points, int64_t stride, const float *aabb, int64_t contracted,
                       const float *grad_out, float *grad, int64_t N, int64_t levels, int64_t F,
                       const int64_t *resolutions, const int64_t *level_offsets)
{
#ifdef __CUDACC__
    PARALLEL_FOR(i, N * levels)
    {
        int64_t l = i / N, n = i - l * N, size = level_offsets[l + 1] - level_offsets[l];
        const float *g = grad_out + (n * levels + l) * F;
        float x[3];
        bool zero = true;
        for (int f = 0; f < F; f++)
            zero = zero && g[f] == 0;
        if (zero)
            continue;
        to_unit(points + n * stride, aabb, contracted, x);
#define GRADIENT(F) add_gradient(x, g, grad + level_offsets[l] * F, F, resolutions[l], size)
        WITH_CONSTANT_F(GRADIENT)
    }
#else
    const Grid grid = {aabb, NULL, contracted, levels, F, resolutions, level_offsets};
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t l = levels - 1; l >= 0; l--) {
        float x[3 * BLOCK], *to = grad + level_offsets[l] * F;
        memset(to, 0, (level_offsets[l + 1] - level_offsets[l]) * F * sizeof(float)); /* then it is in the cache */
        for (int64_t start = 0; start < N; start += BLOCK) {
            const int64_t count = N - start < BLOCK ? N - start : BLOCK;
            units_of(&grid, points + start * stride, stride, count, x);
            for (int64_t first = 0; first < count; first += TILE)
                add_level_gradient(&grid, l, x + first, BLOCK, count - first < TILE ? count - first : TILE,
                                   grad_out + ((start + first) * levels + l) * F, levels * F, to);
        }
    }
#endif
}

/* grad[N][3] */
KERNEL encode_point_gradient(const float *points, int64_t stride, const float *aabb, int64_t contracted,
                             const float *table, const float *grad_out, float *grad, int64_t N, int64_t levels,
                             int64_t F, const int64_t *resolutions, const int64_t *level_offsets)
{
    PARALLEL_FOR(n, N)
    {
        const float *point = points + n * stride;
        float x[3], by_unit[3] = {0};
        to_unit(point, aabb, contracted, x);
        for (int64_t l = 0; l < levels; l++) {
            int64_t begin = level_offsets[l], size = level_offsets[l + 1] - begin;
            const float *g = grad_out + (n * levels + l) * F;
#define POINT_GRADIENT(F) add_point_gradient(x, table + begin * F, g, by_unit, F, resolutions[l], size)
            WITH_CONSTANT_F(POINT_GRADIENT)
        }
        to_unit_gradient(point, aabb, contracted, by_unit, grad + 3 * n);
    }
}

/* The 16 spherical harmonics of degree 0 to 3 of a unit direction. */
DEVICE void harmonics_of(const float *direction, float *to)
{
    const float x = direction[0], y = direction[1], z = direction[2];
    float xx = x * x, yy = y * y, zz = z * z;
    to[0] = 0.28209479177387814f;
    to[1] = -0.48860251190291987f * y;
    to[2] = 0.48860251190291987f * z;
    to[3] = -0.48860251190291987f * x;
    to[4] = 1.0925484305920792f * x * y;
    to[5] = -1.0925484305920792f * y * z;
    to[6] = 0.31539156525252005f * (3 * zz - 1);
    to[7] = -1.0925484305920792f * x * z;
    to[8] = 0.5462742152960396f * (xx - yy);
    to[9] = -0.5900435899266435f * y * (3 * xx - yy);
    to[10] = 2.890611442640554f * x * y * z;
    to[11] = -0.4570457994644658f * y * (5 * zz - 1);
    to[12] = 0.3731763325901154f * z * (5 * zz - 3);
    to[13] = -0.4570457994644658f * x * (5 * zz - 1);
    to[14] = 1.445305721320277f * z * (xx - yy);
    to[15] = -0.5900435899266435f * x * (xx - 3 * yy);
}

/* Direction n is at directions + n * stride; out[N][16]. */
KERNEL spherical_harmonics(const float *directions, int64_t stride, float *out, int64_t N)
{
    PARALLEL_FOR(n, N)
        harmonics_of(directions + n * stride, out + 16 * n);
}
