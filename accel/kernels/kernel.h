/* Prepended to each kernel file, so that one source compiles both as C, with loops of OpenMP, and as CUDA, by NVRTC.
 * A kernel is a function `KERNEL name(…)` whose outermost loop is PARALLEL_FOR. */
#ifdef __CUDACC__
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define PARALLEL_FOR(n, N)                                                                                             \
    for (int64_t n = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; n < N; n += gridDim.x * (int64_t)blockDim.x)
#else
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define DEVICE static inline __attribute__((always_inline))
#define KERNEL void
#define PARALLEL_FOR(n, N) _Pragma("omp parallel for schedule(dynamic, 256)") for (int64_t n = 0; n < N; n++)
#endif
