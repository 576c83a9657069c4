"""The compiled kernels: C and CUDA from one text, checked before they are used. What they compute is tested
beside their reference implementations."""
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_devices import on_cpu_only
from tiny_grids import ALL_KERNELS, CPU, each_kernel, implementation
from tiny_runs import ROOT

from accel.kernels import compiled, cuda
from accel.kernels.compiled import Kernels, read_source

# The stand-in for a GPU replaces the parts of kernels that these tests replace too.
pytestmark = on_cpu_only('compiles and checks kernels for CPU tensors')
NAMES = [kernels.name for kernels in ALL_KERNELS]
# Compute capabilities of Turing, Ampere (two), Hopper and Blackwell.
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)]
# Threads with more registers than this leave a GPU half empty.
MAX_REGISTERS = 64


def has_nvrtc():
    try:
        return bool(cuda.load_nvrtc())
    except OSError:
        return False


# --- compiling ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not has_nvrtc(), reason='no NVRTC; `pip install nvidia-cuda-nvrtc`')
@pytest.mark.parametrize('capability', CAPABILITIES)
@pytest.mark.parametrize('name', NAMES)
def test_nvrtc_compiles_the_kernels(name, capability):
    """Into few registers, without spilling, and without a stack but for sine and cosine of huge numbers."""
    source = read_source(name)
    try:
        cubin, log = cuda.compile_cuda(source, capability)
    except cuda.CudaError as error:
        if capability != (12, 0) or 'invalid value for --gpu-architecture' not in str(error):
            raise
        pytest.skip('this NVRTC is older than Blackwell')
    assert cubin[:4] == b'\x7fELF'
    functions = re.findall(r"entry function '(\w+)'", log)
    assert sorted(functions) == sorted(re.findall(r'^KERNEL (\w+)\(', source, re.M))
    assert all(int(number) <= MAX_REGISTERS for number in re.findall(r'Used (\d+) registers', log))
    spills = '0 bytes spill stores, 0 bytes spill loads'
    assert log.count(spills if name == 'positional' else f'0 bytes stack frame, {spills}') == len(functions)


@pytest.mark.skipif(not has_nvrtc(), reason='no NVRTC; `pip install nvidia-cuda-nvrtc`')
def test_an_error_of_nvrtc_is_shown():
    message = r'NVRTC error \d+: kernels.cu\(\d+\): error: identifier "count" is undefined'
    with pytest.raises(cuda.CudaError, match=message):
        cuda.compile_cuda(read_source('march').replace('int64_t count = 0', 'count = 0'), (9, 0))


def python(script, **environment):
    return subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True,
                          timeout=100, env={'PATH': os.environ['PATH'], **environment})


USES_KERNELS = ('import torch; from accel.hash_grid import KERNELS, HashGrid; '
                'print(KERNELS.usable(torch.device("cpu")), HashGrid(4, 64, 10, 2)(torch.rand(3, 3)).shape)')


def test_without_a_compiler_the_reference_implementation_is_used():
    done = python(USES_KERNELS, PATH='', XDG_CACHE_HOME='/nonexistent', TMPDIR='/nonexistent', CC='nothing')
    assert done.returncode == 0 and done.stdout.startswith('False torch.Size([3, 8])'), done.stderr
    assert 'the compiled encodings kernels cannot be used on cpu' in done.stderr


def test_an_error_of_the_compiler_is_shown(tmp_path):
    compiler = tmp_path / 'cc'
    compiler.write_text('#!/bin/sh\necho "cc: warning: old" >&2; echo "cc: error: no -fopenmp" >&2; exit 1\n')
    compiler.chmod(0o755)
    done = python(USES_KERNELS, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith('False torch.Size([3, 8])'), done.stderr
    assert f'({compiler}: cc: error: no -fopenmp)' in done.stderr


def test_nerf_plain_turns_all_kernels_off(monkeypatch):
    done = python(USES_KERNELS, NERF_PLAIN='1', PATH='', CC='nothing')
    assert done.returncode == 0 and done.stdout.startswith('False torch.Size([3, 8])') and not done.stderr
    monkeypatch.setenv('NERF_PLAIN', '1')
    assert not any(kernels.usable(torch.device(name)) for kernels in ALL_KERNELS for name in ('cpu', 'cuda'))


# --- checking -----------------------------------------------------------------------------------------------

@each_kernel
@pytest.mark.parametrize('kernels_of', ALL_KERNELS, ids=NAMES)
def test_kernels_pass_their_own_check(kernels, kernels_of):
    with implementation(kernels):
        assert kernels_of.usable(CPU)
        kernels_of.check(CPU)


@pytest.mark.parametrize('kernels, right, wrong', [
    (ALL_KERNELS[0], 'sum[f] += weight[c]', 'sum[f] += 1.001f * weight[c]'),
    (ALL_KERNELS[0], 'sum += weight[c][m] * entries', 'sum += 1.001f * weight[c][m] * entries'),
    (ALL_KERNELS[0], '805459861u', '805459863u'),
    (ALL_KERNELS[0], 'atomicAdd(to + f, ', 'atomicAdd(to, '),
    (ALL_KERNELS[0], 'weight[c][m] * grad_out[m * row + f]', 'weight[c][m] * grad_out[m * row]'),
    (ALL_KERNELS[0], 'value : -value', 'value : value'),
    (ALL_KERNELS[0], '-slope : slope', 'slope : slope'),
    (ALL_KERNELS[0], '|| fabsf(y[i]) <= 1', '|| true'),
    (ALL_KERNELS[0], '0.5462742152960396f', '0.5472742152960396f'),
    (ALL_KERNELS[1], 'while (k < ray.num_candidates && count', 'while (k < ray.num_candidates - 3 && count'),
    (ALL_KERNELS[1], 'dt = step_size /', 'dt = 2 * step_size /'),
    (ALL_KERNELS[1], 't[offsets[a] + count] = t_k', 't[offsets[a] + count] = 0'),
    (ALL_KERNELS[1], 'ray_indices[offsets[a] + count] = n', 'ray_indices[offsets[a] + count] = a'),
    (ALL_KERNELS[1], '? k : ray.num_candidates', '? 0 : ray.num_candidates'),
    (ALL_KERNELS[2], 'sum[4] += weight * t[m]', 'sum[4] += weight'),
    (ALL_KERNELS[2], 'optical_depth[n] = tau', 'optical_depth[n] = 0'),
    (ALL_KERNELS[2], 'n = alive ? alive[a] : a', 'n = a'),
    (ALL_KERNELS[2], 't[m + 1] - t[m] : last_interval', 't[m + 1] - t[m] : 0'),
    (ALL_KERNELS[2], 'behind += ', 'behind += 1.01f * '),
    (ALL_KERNELS[3], 'wave % 2 ? cosf', 'wave % 3 ? cosf'),
    (ALL_KERNELS[3], 'wave < 2 * L', 'wave < 2 * L - 1'),
])
def test_kernels_that_compute_something_else_are_not_used(kernels, right, wrong, monkeypatch):
    """One warning, and the reference from then on; the same for C and CUDA."""
    original = compiled.read_source
    assert right in original(kernels.name)

    def read_wrong_source(name):
        source = original(name).replace(right, wrong)
        return source.replace('__CUDA_ARCH__ >= 900', 'false') if 'atomicAdd' in right else source
    only_cuda, only_c = 'atomicAdd' in right or 'sum[f]' in right, 'weight[c][m]' in right
    for mode in ['cuda'] if only_cuda else ['c'] if only_c else ['c', 'cuda']:
        with implementation(mode):
            monkeypatch.setattr(compiled, 'read_source', read_wrong_source)
            broken = Kernels(kernels.name, kernels.check)
            monkeypatch.setattr(sys.modules[kernels.check.__module__], 'KERNELS', broken)
            if mode == 'cuda':
                monkeypatch.setattr(Kernels, 'build', lambda self, device: cuda.CudaLibrary(
                    compiled.read_source(self.name), device))
            with pytest.warns(UserWarning, match=f'{kernels.name} kernels cannot be used on cpu'):
                assert not broken.usable(CPU)
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                assert not broken.usable(CPU)
            monkeypatch.undo()


@pytest.mark.parametrize('part', ['load_driver', 'compile_cuda'])
def test_an_error_of_the_driver_or_nvrtc_is_a_warning(part, monkeypatch):
    def fail(*args):
        raise OSError('libcuda.so.1: not found')
    with implementation('cuda'):
        monkeypatch.setattr(cuda, part, fail)
        monkeypatch.setattr(Kernels, 'build', lambda self, device: cuda.CudaLibrary('', device))
        with pytest.warns(UserWarning, match=r'cannot be used on cpu \(libcuda.so.1: not found\)'):
            assert not Kernels('march', lambda device: None).usable(CPU)


def test_an_empty_input_launches_nothing():
    with implementation('cuda'):
        library = ALL_KERNELS[0].libraries[CPU]
        library.function = None  # would be called
        ALL_KERNELS[0].call('encode', 0, torch.zeros(0, 3))
        del library.function


def test_the_checks_do_not_touch_the_random_state():
    state = torch.get_rng_state()
    for kernels in ALL_KERNELS:
        assert kernels.usable(CPU)  # `check` calls these
        assert Kernels(kernels.name, kernels.check).usable(CPU)
    assert torch.get_rng_state().equal(state)
