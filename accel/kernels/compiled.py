"""C kernels, compiled for this machine on first use. Without a compiler, their reference implementations in
PyTorch are used.

The kernels run in torch's own pool of OpenMP threads if torch's OpenMP runtime is called
`libgomp.so.1`, as theirs is.
"""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

# This is -ffast-math but for two parts: infinity and NaN keep their meaning, and the library does not switch
# the whole process to flushing denormal numbers to zero.
FAST_MATH = ['-fno-math-errno', '-fno-trapping-math', '-fno-signed-zeros', '-fassociative-math',
             '-freciprocal-math']
FLAGS = ['-O3', '-march=native', *FAST_MATH, '-fopenmp', '-shared', '-fPIC', '-lm']


@functools.cache
def load_kernels(name):
    """The functions of `<name>.c` beside this file as a ctypes library. None, with a warning, if they cannot
    be compiled; also None if the environment has NERF_NO_KERNELS set."""
    if os.environ.get('NERF_NO_KERNELS'):
        return None
    try:
        return ctypes.CDLL(str(build_library(Path(__file__).with_name(f'{name}.c'))))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f'{name}.c is not compiled ({error}); its slower reference implementation is used',
                      stacklevel=2)
        return None


def call_kernel(name, function, *arguments):
    """Call `function` of `<name>.c`: tensors and None are passed as pointers, int as int64_t, float as float.
    Tensors must be contiguous, on the CPU, and float32, int64 or bool as the function expects; the caller
    keeps them alive."""
    types = {int: ctypes.c_int64, float: ctypes.c_float}

    def converted(argument):
        if argument is None:
            return ctypes.c_void_p()
        if not torch.is_tensor(argument):
            return types[type(argument)](argument)
        assert argument.is_contiguous() and argument.device.type == 'cpu'
        assert argument.dtype in (torch.float32, torch.int64, torch.bool)
        return ctypes.c_void_p(argument.data_ptr())
    getattr(load_kernels(name), function)(*[converted(argument) for argument in arguments])


def build_library(source):
    """Path of the shared library of `source`, compiled unless a run before has done so. Its name is a hash of
    source, flags and processor."""
    fingerprint = hashlib.sha256('\n'.join([source.read_text(), *FLAGS, processor()]).encode()).hexdigest()
    path = cache_folder() / f'{source.stem}-{fingerprint[:16]}.so'
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, 'part.so')
            subprocess.run([os.environ.get('CC', 'cc'), str(source), *FLAGS, '-o', str(part)], check=True,
                           capture_output=True, timeout=120)
            os.replace(part, path)  # atomic: other processes may compile it too
    return path


def cache_folder():
    """A folder that this user can write to. A shared temporary folder may hold one that others have made."""
    user = os.getuid() if os.name == 'posix' else 'user'
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    for folder in (Path(cache, 'nerf'), Path(tempfile.gettempdir(), f'nerf-{user}')):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and (os.name != 'posix' or folder.stat().st_uid == user):
                return folder
        except OSError:
            continue
    raise OSError('found no writable folder for compiled code')


def processor():
    """What `-march=native` depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    return ' '.join(sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features'))}))
