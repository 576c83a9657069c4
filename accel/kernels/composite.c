/* Volume rendering of packed samples; the reference implementation is in `accel/packed.py`. */
DEVICE float sigmoid(float x)
{
    return 1 / (1 + expf(-x));
}

/* The optical depth of a sample. NaN is kept, so that training notices it. */
DEVICE float optical_depth_of(const float *sample, float step_size)
{
    return (sample[3] < 0 ? 0 : sample[3]) * step_size;
}

/* The length of the interval of sample m of a ray whose samples end at `end`: `length` of the ray if last_interval is
 * 0. Otherwise it reaches to the next sample, and that of the last one is last_interval, in units of `length`. */
DEVICE float length_of(float length, const float *t, int64_t m, int64_t end, float last_interval)
{
    if (last_interval == 0)
        return length;
    return length * (m + 1 < end ? t[m + 1] - t[m] : last_interval);
}

/* Samples offsets[a] … offsets[a + 1] - 1 belong to ray n = alive[a]: raw[M][4] and t[M]. `alive` lists the A rays to
 * process; NULL stands for all. See `length_of` for the intervals.
 * optical_depth[N] is that in front of the first sample on entry, and behind the last one on return. Added to
 * out[N][5]: colour, opacity, depth. With optical_depth NULL nothing is in front, and out is overwritten. Written to
 * weights[M], unless that is NULL: the samples' weights, 0 behind max_optical_depth. */
KERNEL composite(const float *raw, const float *t, const float *lengths, float last_interval, const int64_t *offsets,
                 const int64_t *alive, int64_t A, float max_optical_depth, float *optical_depth, float *out,
                 float *weights)
{
    PARALLEL_FOR(a, A)
    {
        int64_t n = alive ? alive[a] : a;
        float tau = optical_depth ? optical_depth[n] : 0, sum[5] = {0}; /* tau: that in front of the sample */
        int64_t m = offsets[a];
        for (; m < offsets[a + 1] && !(tau > max_optical_depth); m++) {
            const float *sample = raw + 4 * m;
            float delta_tau = optical_depth_of(sample, length_of(lengths[n], t, m, offsets[a + 1], last_interval));
            float weight = expf(-tau) * (1 - expf(-delta_tau));
            for (int i = 0; i < 3; i++)
                sum[i] += weight * sigmoid(sample[i]);
            if (weights)
                weights[m] = weight;
            sum[3] += weight;
            sum[4] += weight * t[m];
            tau += delta_tau;
        }
        for (; weights && m < offsets[a + 1]; m++)
            weights[m] = 0;
        for (int i = 0; i < 5; i++)
            out[5 * n + i] = optical_depth ? out[5 * n + i] + sum[i] : sum[i];
        if (optical_depth)
            optical_depth[n] = tau;
    }
}

/* Gradient of `composite` with no optical depth in front of the first sample, for all rays: grad_raw[M][4] from
 * grad_out[N][5] and grad_weights[M], which may be NULL. A sample attenuates those behind it:
 * dL/d(delta_tau_i) = T_{i+1} v_i - sum_{j > i} w_j v_j with v_i = grad_out · (colour_i, 1, t_i) + grad_weights_i. */
KERNEL composite_gradient(const float *raw, const float *t, const float *lengths, float last_interval,
                          const int64_t *offsets, int64_t N, float max_optical_depth, const float *grad_out,
                          const float *grad_weights, float *grad_raw)
{
    PARALLEL_FOR(n, N)
    {
        const float *g = grad_out + 5 * n;
        /* double: going back, tau is found by subtraction; not of the last interval, which may be very long */
        double tau = 0, in_front = 0, behind = 0;
        int64_t m = offsets[n];
        for (; m < offsets[n + 1] && !(tau > max_optical_depth); m++) {
            float delta_tau =
                optical_depth_of(raw + 4 * m, length_of(lengths[n], t, m, offsets[n + 1], last_interval));
            float weight = expf(-(float)tau) * (1 - expf(-delta_tau)), value = g[3] + g[4] * t[m];
            if (grad_weights)
                value += grad_weights[m];
            for (int i = 0; i < 3; i++) {
                float c = sigmoid(raw[4 * m + i]);
                value += g[i] * c;
                grad_raw[4 * m + i] = weight * g[i] * c * (1 - c);
            }
            grad_raw[4 * m + 3] = value; /* v_i, until the last loop */
            in_front = tau;
            tau += delta_tau;
        }
        for (int64_t hidden = m; hidden < offsets[n + 1]; hidden++)
            for (int i = 0; i < 4; i++)
                grad_raw[4 * hidden + i] = 0;
        for (m--; m >= offsets[n]; m--) {
            float value = grad_raw[4 * m + 3], length = length_of(lengths[n], t, m, offsets[n + 1], last_interval);
            float delta_tau = optical_depth_of(raw + 4 * m, length), transmittance_after = expf(-(float)tau);
            grad_raw[4 * m + 3] = raw[4 * m + 3] > 0 ? length * (transmittance_after * value - (float)behind) : 0;
            behind += expf(-(float)in_front) * (1 - expf(-delta_tau)) * value;
            tau = in_front;
            if (m > offsets[n])
                in_front -= optical_depth_of(raw + 4 * (m - 1),
                                             length_of(lengths[n], t, m - 1, offsets[n + 1], last_interval));
        }
    }
}
