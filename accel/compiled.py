"""C functions, compiled for this machine when they are first needed. Without a compiler there are none, and their plain
twins do the work."""
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

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
    """Call `function` of `<name>.c`: tensors and None as pointers, whole numbers as int64_t, others as float. Tensors are
    contiguous, on the CPU, and kept by the caller."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_float}

    def converted(argument):
        if argument is None:
            return ctypes.c_void_p()
        if not hasattr(argument, 'data_ptr'):
            return kinds[type(argument)](argument)
        assert argument.is_contiguous() and argument.device.type == 'cpu'
        return ctypes.c_void_p(argument.data_ptr())
    getattr(compiled(name), function)(*[converted(argument) for argument in arguments])


def library(source):
    """The compiled file, kept from one run to the next. Its name tells source, flags and processor."""
    mark = hashlib.sha256('\n'.join([source.read_text(), *FLAGS, processor()]).encode()).hexdigest()[:16]
    path = cache_folder() / f'{source.stem}-{mark}.so'
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, 'part.so')
            subprocess.run([os.environ.get('CC', 'cc'), str(source), *FLAGS, '-o', str(part)], check=True,
                           capture_output=True, timeout=120)
            os.replace(part, path)  # whole or not at all, whoever else compiles it
    return path


def cache_folder():
    """A folder of this user that can be written."""
    for folder in (Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'nerf'),
                   Path(tempfile.gettempdir(), f'nerf-{os.getuid() if hasattr(os, "getuid") else "user"}')):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise OSError('no folder for compiled code')


def processor():
    """What `-march=native` depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    return ' '.join(sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features'))}))
