"""Runs the CUDA text of the kernels on a CPU, for tests and counts without a GPU: `g++` compiles it, and each
thread of a launch is one call of the kernel, the last one first."""
import atexit
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

# The repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from accel.kernels import cuda

# What NVRTC provides.
PRELUDE = r'''
#include <cmath>
#include <cstring>
#include <utility>
#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __forceinline__ inline
#define int64_t cuda_int64
#define uint32_t cuda_uint32
#define uint8_t cuda_uint8
static struct { unsigned x; } blockIdx, threadIdx, blockDim, gridDim;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __int_as_float(int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static void atomicAdd(float *to, float value) { *to += value; }
static void atomicAdd(float2 *to, float2 value) { to->x += value.x; to->y += value.y; }
static void atomicAdd(float4 *to, float4 value) {
    to->x += value.x; to->y += value.y; to->z += value.z; to->w += value.w;
}
template <class... A, std::size_t... I>
void launch(void (*kernel)(A...), void **p, unsigned blocks, unsigned threads, std::index_sequence<I...>)
{
    gridDim.x = blocks, blockDim.x = threads;
    for (unsigned i = blocks * threads; i-- > 0;) {
        blockIdx.x = i / threads, threadIdx.x = i % threads;
        kernel(*(A *)p[I]...);
    }
}
template <class... A> void launch(void (*kernel)(A...), void **p, unsigned blocks, unsigned threads)
{
    launch(kernel, p, blocks, threads, std::index_sequence_for<A...>());
}
'''
LAUNCHER = '''
extern "C" void launch_{0}(void **p, unsigned blocks, unsigned threads) {{ launch({0}, p, blocks, threads); }}
'''


class Driver:
    """Stands for the CUDA driver. `launched` is called with the name of each kernel."""

    def __init__(self, launched=lambda name: None):
        self.launched, self.modules, self.names = launched, [], ['']

    def cuModuleLoadData(self, module, cubin):
        self.modules.append(ctypes.CDLL(cubin.decode()))
        module._obj.value = len(self.modules)
        return 0

    def cuCtxGetCurrent(self, context):
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.names.append((self.modules[module.value - 1], name.decode()))
        function._obj.value = len(self.names) - 1
        return 0

    def cuLaunchKernel(self, function, blocks, y, z, threads, v, w, shared, stream, pointers, extra):
        module, name = self.names[function.value]
        self.launched(name)
        module[f'launch_{name}'](pointers, ctypes.c_uint(blocks), ctypes.c_uint(threads))
        return 0


def compile_for_cpu(source, capability):
    """In place of `compile_cuda`: returns the path of a shared library as bytes, and no messages."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder, 'kernels.so')
    launchers = ''.join(LAUNCHER.format(name) for name in re.findall(r'^KERNEL (\w+)\(', source, re.M))
    subprocess.run(['g++', '-std=c++17', '-O2', '-w', '-fPIC', '-shared', '-x', 'c++', '-', '-o',
                    str(library)], input=(PRELUDE + source + launchers).encode(), check=True)
    return str(library).encode(), ''


def install(patch=setattr, launched=lambda name: None):
    """Have `CudaLibrary` run kernels on the CPU from now on.

    Args:
      patch: function of an object, a name and a value that sets the attribute.
      launched: called with the name of each kernel that is launched.
    """
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    patch(cuda, 'load_driver', lambda: Driver(launched))
    patch(cuda, 'compile_cuda', compile_for_cpu)
    patch(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    patch(torch.cuda, 'current_stream', lambda device=None: stream)
    patch(torch.cuda, 'device', lambda device: nullcontext())
