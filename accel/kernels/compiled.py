"""Compiled kernels: each `.c` file beside this one becomes a library for the CPU, by the C compiler, or for
an NVIDIA GPU, by NVRTC (`cuda.py`), when it is first used.

A library is used only if its results for a small input are those of the reference implementation in PyTorch.
Otherwise, without a compiler, and with NERF_PLAIN=1 in the environment, the reference is used.

On a CPU the kernels run in torch's own pool of OpenMP threads if torch's OpenMP runtime is called
`libgomp.so.1`, as theirs is with GCC. On macOS they are linked with the runtime in torch's package.
"""
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from accel.kernels.cuda import CudaLibrary

# This is -ffast-math but for two parts: infinity and NaN keep their meaning, and the library does not switch
# the whole process to flushing denormal numbers to zero.
FAST_MATH = ['-fno-math-errno', '-fno-trapping-math', '-fno-signed-zeros', '-fassociative-math',
             '-freciprocal-math']
# Apple's Clang knows OpenMP only behind -Xclang, and brings no runtime.
TORCH_LIBRARIES = Path(torch.__file__).parent / 'lib'
OPENMP = ['-fopenmp'] if sys.platform != 'darwin' else [
    '-Xclang', '-fopenmp', f'-L{TORCH_LIBRARIES}', f'-Wl,-rpath,{TORCH_LIBRARIES}', '-lomp']
NATIVE = '-mcpu=native' if platform.machine() in ('arm64', 'aarch64') else '-march=native'
FLAGS = ['-x', 'c', '-', '-O3', NATIVE, *FAST_MATH, *OPENMP, '-shared', '-fPIC', '-lm']
FOLDER = Path(__file__).parent
# Kernels take tensors of these types.
DTYPES = (torch.float32, torch.int64, torch.bool)


class Kernels:
    """The functions of `<name>.c`.

    Args:
      name: of the file.
      check: function of a device that compares the kernels with their references on a small input there; it
        raises AssertionError if they differ.
    """

    def __init__(self, name, check):
        self.name, self.check = name, check
        self.libraries = {}  # by device; None where the kernels cannot be used

    def usable(self, device):
        """Whether there are kernels for `device`; compiles and checks them when first asked."""
        if os.environ.get('NERF_PLAIN') or device.type not in ('cpu', 'cuda'):
            return False
        if device.type == 'cuda' and device.index is None:  # tensors name the index
            device = torch.device('cuda', torch.cuda.current_device())
        if device not in self.libraries:
            try:
                self.libraries[device] = self.build(device)
                with (torch.autocast(device.type, enabled=False), torch.enable_grad(),
                      torch.random.fork_rng(devices=[])):
                    self.check(device)
            except torch.OutOfMemoryError:  # says nothing about the kernels
                del self.libraries[device]
                raise
            except Exception as error:  # whatever goes wrong here, the reference works
                self.libraries[device] = None
                reason = str(error).strip().partition('\n')[0] or type(error).__name__
                warnings.warn(f'the compiled {self.name} kernels cannot be used on {device} ({reason}); '
                              'their slower reference implementation is used', stacklevel=2)
        return self.libraries[device] is not None

    def build(self, device):
        source = read_source(self.name)
        return CudaLibrary(source, device) if device.type == 'cuda' else CpuLibrary(source, self.name)

    def call(self, function, size, tensor, *arguments):
        """Call a kernel, whose loop has `size` iterations, on the device of its argument `tensor`, where it
        is `usable`. Tensors and None are passed as pointers, int as int64_t, float as float. Tensors must
        be float32, int64 or bool, as the kernel expects, and contiguous; rows of `tensor` may be apart."""
        assert tensor.dtype == torch.float32 and tensor.stride()[1:] in ((), (1,))
        for argument in arguments:
            assert not torch.is_tensor(argument) or (
                argument.device == tensor.device and argument.is_contiguous() and argument.dtype in DTYPES)
        # reassigning `arguments` would free temporary tensors before the kernel has run
        pointers = [as_ctypes(argument) for argument in (tensor, *arguments)]
        self.libraries[tensor.device].call(function, size, pointers)


def read_source(name):
    """The text of `kernel.h` and `<name>.c`, which may begin with an #include of another kernel file."""
    def text_of(file):
        text = (FOLDER / file).read_text(encoding='utf-8')
        return re.sub(r'^#include "(\w+\.c)"$', lambda found: text_of(found[1]), text, flags=re.M)
    return text_of('kernel.h') + text_of(f'{name}.c')


def as_ctypes(argument):
    """An argument of `Kernels.call` as a ctypes object."""
    if argument is None:
        return ctypes.c_void_p()
    if torch.is_tensor(argument):
        return ctypes.c_void_p(argument.data_ptr())
    return {int: ctypes.c_int64, float: ctypes.c_float}[type(argument)](argument)


class CpuLibrary:
    """Kernels compiled for this CPU, from the text `source`."""

    def __init__(self, source, name):
        self.library = ctypes.CDLL(str(build_library(source, name)))

    def call(self, function, size, arguments):
        self.library[function](*arguments)


def build_library(source, name):
    """Path of the shared library of the text `source`, compiled unless a run before has done so. Its file
    name is `name` and a hash of source, flags and processor."""
    fingerprint = hashlib.sha256('\n'.join([source, *FLAGS, processor()]).encode()).hexdigest()
    path = cache_folder() / f'{name}-{fingerprint[:16]}.so'
    if not path.exists():
        compiler = os.environ.get('CC', 'cc')
        if shutil.which(compiler) is None:
            raise OSError(f'found no C compiler {compiler!r}; install GCC or Clang, or set $CC')
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, 'part.so')
            done = subprocess.run([compiler, *FLAGS, '-o', str(part)], input=source.encode(),
                                  capture_output=True, timeout=120)
            if done.returncode:
                errors = re.search('.*error: .*', done.stderr.decode(errors='replace'))
                raise OSError(f'{compiler}: {errors[0] if errors else f"exit code {done.returncode}"}')
            os.replace(part, path)  # atomic: other processes may compile it too
    return path


def cache_folder():
    """A folder that this user can write to. A shared temporary folder may hold one that others have made."""
    user = 0 if os.name == 'nt' else os.getuid()  # on Windows 0 is the owner of all files
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    for folder in (Path(cache, 'nerf'), Path(tempfile.gettempdir(), f'nerf-{user}')):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == user:
                return folder
        except OSError:
            continue
    raise OSError('found no writable folder for compiled code')


def processor():
    """What `-march=native` depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    return ' '.join(sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features'))}))
