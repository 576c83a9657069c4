"""Compiles kernels for an NVIDIA GPU with NVRTC, which every CUDA build of torch includes, and launches
them through the CUDA driver. No compiler and no headers are needed."""
import ctypes
from pathlib import Path

import torch

# A block has this many threads.
BLOCK_THREADS = 128
# CUDA's limit for the number of blocks along the first axis.
MAX_BLOCKS = 2 ** 31 - 1


class CudaError(Exception):
    """NVRTC or the driver has refused something."""


class CudaLibrary:
    """The kernels of the CUDA text `source`, compiled for `device` and loaded there.

    Raises:
      CudaError, OSError: the text does not compile, or a library is missing.
    """

    def __init__(self, source, device):
        self.device, self.driver, self.functions = device, load_driver(), {}
        cubin, _ = compile_cuda(source, torch.cuda.get_device_capability(device))
        self.context, self.module = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # torch makes the device's context
            self.check(self.driver.cuCtxGetCurrent(ctypes.byref(self.context)), 'cuCtxGetCurrent')
            self.check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin), 'cuModuleLoadData')

    def check(self, status, what):
        if status != 0:
            raise CudaError(f'{what}: CUDA error {status}')

    def function(self, name):
        if name not in self.functions:
            function = ctypes.c_void_p()
            status = self.driver.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode())
            self.check(status, name)
            self.functions[name] = function
        return self.functions[name]

    def call(self, name, size, arguments):
        """Launch a kernel of `size` threads, or as many as fit, on torch's current stream."""
        if size == 0:
            return
        blocks = min(-(-size // BLOCK_THREADS), MAX_BLOCKS)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with torch.cuda.device(self.device):
            # a thread that has not used the device yet has no context
            self.check(self.driver.cuCtxSetCurrent(self.context), 'cuCtxSetCurrent')
            stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
            self.check(self.driver.cuLaunchKernel(self.function(name), blocks, 1, 1, BLOCK_THREADS, 1, 1, 0,
                                                  stream, pointers, None), name)


def compile_cuda(source, capability):
    """Compile the CUDA text `source` for a compute capability (major, minor), or for the nearest lower one of
    the same generation that NVRTC knows. Returns machine code and the compiler's messages, bytes and text.

    Raises:
      CudaError: it does not compile; OSError: there is no NVRTC.
    """
    nvrtc, program = load_nvrtc(), ctypes.c_void_p()

    def output(what):
        size = ctypes.c_size_t()
        nvrtc[f'nvrtcGet{what}Size'](program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        nvrtc[f'nvrtcGet{what}'](program, content)
        return content.raw

    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b'kernels.cu', 0, None, None)
    flags = [f'--gpu-architecture=sm_{architecture(nvrtc, *capability)}'.encode(), b'--ptxas-options=-v']
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = output('ProgramLog').rstrip(b'\0').decode()
        if status != 0:
            raise CudaError(f'NVRTC error {status}: {log.strip() or "no message"}')
        return output('CUBIN'), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def architecture(nvrtc, major, minor):
    """The highest architecture that NVRTC knows, such as 90, whose code runs on a GPU of compute capability
    `major`.`minor`; that of the GPU if there is none."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    return max((number for number in known if 10 * major <= number <= 10 * major + minor),
               default=10 * major + minor)


def load_driver():
    """The CUDA driver as a ctypes library."""
    return ctypes.CDLL('libcuda.so.1')


def load_nvrtc():
    """NVRTC as a ctypes library: the one of NVIDIA's package, which torch depends on, in torch itself, or of
    the system."""
    major = (torch.version.cuda or '*').split('.')[0]
    packages, name = Path(torch.__file__).parent.parent, f'libnvrtc.so.{major}'
    folders = [*packages.glob('nvidia/*/lib'), packages / 'torch/lib']
    found = [str(file) for folder in folders for file in sorted(folder.glob(name))]
    return ctypes.CDLL(found[0] if found else name)
