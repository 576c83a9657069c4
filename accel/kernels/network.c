#include "tiles.c"

/* A `HashNeRF` at points, and its gradient. The reference implementation is the network's `forward`.
 *
 * Point n is at inputs + n * stride, followed by its unit direction if the colour depends on it.
 */
#ifndef __CUDACC__
#define RAYS 512  /* rays that a thread takes at once */
#define ADVANCE 8 /* at least so many samples of a ray are evaluated before it is tested whether it is opaque */

typedef float Matrix[MAX_CHANNELS * MAX_CHANNELS];

/* From the encodings of a tile of `count` points to the inputs of the layers, in[0] to in[4], the outputs of the last
 * one, in[5], and densities; without colours only the first two layers are evaluated. */
DEVICE void evaluate_tile(const Network *network, const float *encoded, const float *inputs, int64_t stride,
                          int64_t count, bool colors, Tile *in, float *density)
{
    densities_of(network, encoded, in, density);
    for (int m = 0; m < TILE && network->views && colors; m++) {
        float harmonics[N_HARMONICS];
        harmonics_of(inputs + (m < count ? m : 0) * stride + 3, harmonics);
        for (int i = 0; i < N_HARMONICS; i++)
            in[2][network->layers[1].n_out + i][m] = harmonics[i];
    }
    if (colors)
        colors_of(network, in);
}

/* For a block of points out[count][4]: three colour logits and a density; without `colors` out[count], densities. */
DEVICE void evaluate_block(const Network *network, const float *inputs, int64_t stride, int64_t count, bool colors,
                           float *out)
{
    float encoded[MAX_CHANNELS * BLOCK] __attribute__((aligned(64)));
    encode_block(&network->grid, inputs, stride, count, encoded);
    for (int64_t first = 0; first < count; first += TILE) {
        const int64_t left = count - first < TILE ? count - first : TILE;
        Tile in[N_LAYERS + 1];
        float density[TILE];
        evaluate_tile(network, encoded + first, inputs + first * stride, stride, left, colors, in, density);
        for (int64_t m = 0, n = first; m < left; m++, n++) {
            for (int i = 0; i < 3 && colors; i++)
                out[4 * n + i] = in[N_LAYERS][i][m];
            out[colors ? 4 * n + 3 : n] = density[m];
        }
    }
}

/* `evaluate_block` of N points. */
KERNEL evaluate(const float *inputs, int64_t stride, NETWORK_PARAMETERS, int64_t N, int64_t colors, float *out)
{
    Pairs pairs[N_LAYERS];
    const Network network = network_of(NETWORK_ARGUMENTS, pairs);
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < N; start += BLOCK)
        evaluate_block(&network, inputs + start * stride, stride, N - start < BLOCK ? N - start : BLOCK, colors,
                       out + (colors ? 4 : 1) * start);
}

/* For samples of R rays, those of ray r being offsets[r] to offsets[r + 1] - 1, with intervals of step_sizes[r]:
 * out[N][4] as of `evaluate`, but samples behind an optical depth of max_optical_depth may be left out. */
KERNEL evaluate_rays(const float *inputs, int64_t stride, NETWORK_PARAMETERS, int64_t R, const int64_t *offsets,
                     const float *step_sizes, float max_optical_depth, float *out)
{
    Pairs pairs[N_LAYERS];
    const Network network = network_of(NETWORK_ARGUMENTS, pairs);
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < R; start += RAYS) {
        const int64_t end = R - start < RAYS ? R : start + RAYS;
        int64_t ray[BLOCK / ADVANCE], next[BLOCK / ADVANCE], n_rays = 0, waiting = start;
        float depth[BLOCK / ADVANCE], points[6 * BLOCK], raw[4 * BLOCK];
        for (;;) {
            for (; n_rays < BLOCK / ADVANCE && waiting < end; waiting++)
                if (offsets[waiting] < offsets[waiting + 1])
                    ray[n_rays] = waiting, next[n_rays] = offsets[waiting], depth[n_rays++] = 0;
            if (n_rays == 0)
                break;
            int64_t count = 0, unfinished = 0, advance = BLOCK / n_rays < TILE ? BLOCK / n_rays : TILE;
            for (int64_t r = 0; r < n_rays; r++)
                for (int64_t n = next[r]; n < next[r] + advance && n < offsets[ray[r] + 1]; n++)
                    memcpy(points + 6 * count++, inputs + n * stride, (views ? 6 : 3) * sizeof(float));
            evaluate_block(&network, points, 6, count, true, raw);
            const float *from = raw;
            for (int64_t r = 0; r < n_rays; r++) {
                const int64_t last = offsets[ray[r] + 1], until = last - next[r] < advance ? last : next[r] + advance;
                for (int64_t n = next[r]; n < until; n++, from += 4) {
                    memcpy(out + 4 * n, from, 4 * sizeof(float));
                    depth[r] += from[3] * step_sizes[ray[r]];
                }
                if (until < last && !(depth[r] > max_optical_depth))
                    ray[unfinished] = ray[r], next[unfinished] = until, depth[unfinished++] = depth[r];
            }
            n_rays = unfinished;
        }
    }
}

/* --- the gradient --- */

/* Numbers of a block [channel][point], as float or as bfloat16, two in each number. */
typedef struct {
    uint32_t *numbers;
    int64_t row; /* distance of channels */
} Rows;

/* Sets the points of a tile, from `first` on. */
DEVICE void set_rows(Rows rows, Tile x, int64_t channels, int64_t first, bool bf16)
{
    for (int64_t i = 0; i < channels; i++)
        if (bf16)
            SIMD for (int m = 0; m < TILE / 2; m++)
                rows.numbers[i * rows.row + first / 2 + m] = to_pair(x[i][2 * m], x[i][2 * m + 1]);
        else
            memcpy(rows.numbers + i * rows.row + first, x[i], sizeof(x[i]));
}

/* sum + a b, or the sum of the products of two bfloat16 in each of these. */
DEVICE Vector add_products(Vector sum, Vector a, Vector b, bool bf16)
{
#ifdef __AVX512BF16__
    if (bf16)
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

DEVICE float sum_of(Vector v)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* The gradient by a layer's weights and biases, from its inputs and the gradient by its outputs, in `count` numbers of
 * each row: dW[n_out][n_in] = grad in^T and db[n_out] = grad 1. Sixteen sums at once take half the registers of AVX-512;
 * they have names because GCC keeps arrays in memory. */
DEVICE void layer_gradient(const Layer *layer, Rows grad, Rows in, int64_t count, bool bf16, float *dW, float *db)
{
#define COLUMNS(each, r) each(r, 0) each(r, 1) each(r, 2) each(r, 3)
#define FOUR_BY_FOUR(each) COLUMNS(each, 0) COLUMNS(each, 1) COLUMNS(each, 2) COLUMNS(each, 3)
#define ZERO(r, c) Vector sum##r##c = {0};
#define MULTIPLY(r, c) sum##r##c = add_products(sum##r##c, g##r, h##c, bf16);
#define STORE_SUM(r, c) dW[(o + r) * layer->n_in + i + c] = sum_of(sum##r##c);
#define LOAD(r)                                                                                                        \
    const Vector g##r = *(const Vector *)(g + r * grad.row + v), h##r = *(const Vector *)(h + r * in.row + v);
    const Vector ones = bf16 ? (Vector)((IntVector){0} + 0x3f803f80) : (Vector){0} + 1; /* 1, or two in bfloat16 */
    for (int64_t o = 0; o < layer->n_out; o += 4) {
        const uint32_t *g = grad.numbers + o * grad.row;
        for (int64_t i = 0; i < layer->n_in; i += 4) {
            const uint32_t *h = in.numbers + i * in.row;
            FOUR_BY_FOUR(ZERO)
            for (int64_t v = 0; v < count; v += LANES) {
                LOAD(0) LOAD(1) LOAD(2) LOAD(3)
                FOUR_BY_FOUR(MULTIPLY)
            }
            FOUR_BY_FOUR(STORE_SUM)
        }
        for (int r = 0; r < 4; r++) {
            Vector sum = {0};
            for (int64_t v = 0; v < count; v += LANES)
                sum = add_products(sum, *(const Vector *)(g + r * grad.row + v), ones, bf16);
            db[o + r] = sum_of(sum);
        }
    }
}

/* The layers from the gradient by outputs to that by inputs; directions have none. */
DEVICE void transpose_layers(const Network *network, Layer *backward, Matrix *transposed, const float *zeros)
{
    for (int l = 0; l < N_LAYERS; l++) {
        const Layer *layer = network->layers + l;
        const int64_t n_in = l == 2 ? network->layers[1].n_out : layer->n_in, n_out = layer->n_out;
        for (int64_t i = 0; i < n_in; i++)
            for (int64_t o = 0; o < n_out; o++)
                transposed[l][i * n_out + o] = layer->W[o * layer->n_in + i];
        backward[l] = (Layer){transposed[l], zeros, NULL, n_out, n_in};
    }
}

/* From the gradient by colours and density of a tile, [count][4], to that by its encodings, [count][channels]. Sets the
 * tile's points in the rows of the layers, from `first` on: inputs, and gradients by outputs. */
DEVICE void differentiate_tile(const Network *network, const Layer *backward, Tile *in, const float *density,
                               const float *grad_out, int64_t count, int64_t first, Rows *in_rows, Rows *grad_rows,
                               float *grad_encoded)
{
    const int64_t channels = network->layers[0].n_in;
    const float least = expf(-network->max_log_density);
    Tile grad[2];
    float by_log_density[TILE], (*of_out)[TILE] = grad[0], (*of_in)[TILE] = grad[1];
    for (int64_t m = 0; m < TILE; m++) {
        for (int i = 0; i < 8; i++)
            of_out[i][m] = i < 3 && m < count ? grad_out[4 * m + i] : 0;
        by_log_density[m] = m < count ? grad_out[4 * m + 3] * (density[m] < least ? least : density[m]) : 0;
    }
    for (int l = N_LAYERS - 1; l >= 0; l--) {
        set_rows(in_rows[l], in[l], network->layers[l].n_in, first, network->bf16);
        set_rows(grad_rows[l], of_out, network->layers[l].n_out, first, network->bf16);
        linear(backward + l, false, of_out, of_in);
        for (int64_t i = 0; i < backward[l].n_out && l != 2 && l != 0; i++) /* of the ReLU */
            SIMD for (int m = 0; m < TILE; m++)
                of_in[i][m] = in[l][i][m] > 0 ? of_in[i][m] : 0;
        if (l == 2)
            SIMD for (int m = 0; m < TILE; m++)
                of_in[0][m] += by_log_density[m];
        float (*next)[TILE] = of_out;
        of_out = of_in, of_in = next;
    }
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < channels; i++)
            grad_encoded[m * channels + i] = of_out[i][m];
}

/* For grad_out[N][4], the gradient by what `evaluate` returns, that by the parameters, in their layout, and that by the
 * encodings, grad_encoded[N][levels * F]. partial[blocks][parameters] is for the sums of blocks, which are added in
 * their order, so that the result does not depend on the number of threads. */
KERNEL evaluate_gradient(const float *inputs, int64_t stride, NETWORK_PARAMETERS, int64_t N,
                         const float *grad_out, float *grad_encoded, float *partial, float *grad_parameters)
{
    Pairs pairs[N_LAYERS], backward_pairs[N_LAYERS];
    const Network network = network_of(NETWORK_ARGUMENTS, pairs);
    const int64_t n_parameters = network.offsets[N_LAYERS], row = network.bf16 ? BLOCK / 2 : BLOCK;
    const int64_t size = MAX_CHANNELS * row;
    const float zeros[MAX_CHANNELS] = {0};
    Layer backward[N_LAYERS];
    Matrix transposed[N_LAYERS];
    transpose_layers(&network, backward, transposed, zeros);
    if (network.bf16)
        convert_weights(backward, backward_pairs);
#pragma omp parallel for schedule(dynamic)
    for (int64_t start = 0; start < N; start += BLOCK) {
        const int64_t count = N - start < BLOCK ? N - start : BLOCK;
        float encoded[MAX_CHANNELS * BLOCK] __attribute__((aligned(64)));
        uint32_t *numbers = aligned_alloc(64, 2 * N_LAYERS * size * sizeof(uint32_t)); /* much for a thread's stack */
        Rows in_rows[N_LAYERS], grad_rows[N_LAYERS];
        for (int l = 0; l < N_LAYERS; l++) {
            in_rows[l] = (Rows){numbers + 2 * l * size, row};
            grad_rows[l] = (Rows){numbers + (2 * l + 1) * size, row};
        }
        encode_block(&network.grid, inputs + start * stride, stride, count, encoded);
        for (int64_t first = 0; first < count; first += TILE) {
            const int64_t left = count - first < TILE ? count - first : TILE, n = start + first;
            Tile in[N_LAYERS + 1];
            float density[TILE];
            evaluate_tile(&network, encoded + first, inputs + n * stride, stride, left, true, in, density);
            differentiate_tile(&network, backward, in, density, grad_out + 4 * n, left, first, in_rows, grad_rows,
                               grad_encoded + n * levels * F);
        }
        const int64_t points = (count + TILE - 1) / TILE * TILE;
        for (int l = 0; l < N_LAYERS; l++) {
            const Layer *layer = network.layers + l;
            float *dW = partial + start / BLOCK * n_parameters + network.offsets[l];
            float *db = dW + layer->n_in * layer->n_out;
            if (network.bf16)
                layer_gradient(layer, grad_rows[l], in_rows[l], points / 2, true, dW, db);
            else
                layer_gradient(layer, grad_rows[l], in_rows[l], points, false, dW, db);
        }
        free(numbers);
    }
    memset(grad_parameters, 0, n_parameters * sizeof(float));
    for (int64_t block = 0; block * BLOCK < N; block++)
        SIMD for (int64_t p = 0; p < n_parameters; p++)
            grad_parameters[p] += partial[block * n_parameters + p];
}
#endif
