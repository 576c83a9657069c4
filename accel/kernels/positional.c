/* Positional encoding; the reference implementation is `Embedder` in `run_nerf_helpers.py`.
 *
 * Point n is at points + n * stride. Written to out[N][columns]: the point, sin and cos of each of L frequencies times
 * it, and zeros. */
KERNEL positional(const float *points, int64_t stride, const float *frequencies, int64_t L, float *out, int64_t N,
                  int64_t columns)
{
    PARALLEL_FOR(i, N * columns)
    {
        const int64_t n = i / columns;
        const int column = (int)(i - n * columns), wave = column / 3 - 1; /* sin and cos in turn */
        float value = 0;
        if (wave < 2 * L) {
            value = points[n * stride + column % 3];
            if (wave >= 0) {
                value *= frequencies[wave / 2];
                value = wave % 2 ? cosf(value) : sinf(value);
            }
        }
        out[i] = value;
    }
}
