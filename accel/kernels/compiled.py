"""C functions, compiled for this machine at first use. Without a compiler the reference implementations in PyTorch replace
them. They run in torch's own pool of OpenMP threads where torch's runtime is named `libgomp.so.1`, as theirs is."""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

FLAGS = ['-O3', '-march=native', '-ffast-math', '-fno-finite-math-only', '-fopenmp', '-shared', '-fPIC', '-lm']


@functools.cache
def compiled(name):
    """The functions of `<name>.c` beside this file as a ctypes library; None where it cannot be compiled, or where
    the environment has NERF_PLAIN set."""
    if os.environ.get('NERF_PLAIN'):
        return None
    source = Path(__file__).with_name(f'{name}.c')
    try:
        return ctypes.CDLL(str(library(source)))
    except (OSError, subprocess.SubprocessError):
        return None


def call(name, function, *arguments):
    """Call `function` of `<name>.c`: tensors and None are passed as pointers, int as int64_t, float as float. Tensors must
    be contiguous and on the CPU, and the caller keeps them alive."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_float}

    def converted(argument):
        if argument is None:
            return ctypes.c_void_p()
        if not torch.is_tensor(argument):
            return kinds[type(argument)](argument)
        assert argument.is_contiguous() and argument.device.type == 'cpu'
        return ctypes.c_void_p(argument.data_ptr())
    getattr(compiled(name), function)(*[converted(argument) for argument in arguments])


def library(source):
    """Path of the shared library, cached between runs. Its name is a hash of source, flags and processor."""
    fingerprint = hashlib.sha256('\n'.join([source.read_text(), *FLAGS, processor()]).encode()).hexdigest()[:16]
    path = cache_folder() / f'{source.stem}-{fingerprint}.so'
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, 'part.so')
            subprocess.run([os.environ.get('CC', 'cc'), str(source), *FLAGS, '-o', str(part)], check=True,
                           capture_output=True, timeout=120)
            os.replace(part, path)  # atomic: other processes may compile it too
    return path


def cache_folder():
    """A writable folder of this user."""
    for folder in (Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'nerf'),
                   Path(tempfile.gettempdir(), f'nerf-{os.getuid() if hasattr(os, "getuid") else "user"}')):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
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
