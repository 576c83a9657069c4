"""Devices: which one, its precision, and how many rays fit in its memory."""
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import DEMO, FAST_DEMO, NO_OUTPUTS, PROPOSAL_DEMO, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import run_nerf
from accel.grid_renderer import GridRenderer
from accel.proposals import ProposalRenderer
from accel.renderer import MAX_SAMPLES
from run_nerf import EXACT, create_nerf
from scenes.errors import UserError
from training.devices import MIN_RAYS, MemoryLimit, has_fast_bf16, pick_device, pick_precision
from training.options import config_parser

CPU = torch.device('cpu')


def test_a_named_device_is_used():
    assert pick_device('cpu') == CPU
    assert pick_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('name', ['meta', 'gpu', 'cuda:99'])
def test_a_device_that_is_not_available_is_an_error(name):
    with pytest.raises(UserError, match=f'--device {name}: not available'):
        pick_device(name)


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr('training.devices.problem_of', lambda device: None)
    assert pick_device('auto') == torch.device('cuda')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert pick_device('auto') == pick_device('cuda') == torch.device('cuda', 1) and chosen == [1, 1]
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='found 2 GPUs, expected one for each process'):
        pick_device('auto')


def test_a_gpu_that_does_not_work_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('training.devices.problem_of', lambda device: 'no kernel image is available')
    with pytest.warns(UserWarning, match=r'cannot use the GPU \(no kernel image is available\); the CPU is'):
        assert pick_device('auto') == CPU
    with pytest.raises(UserError, match=r'--device cuda: not available \(no kernel image is available\)'):
        pick_device('cuda')


# --- precision ----------------------------------------------------------------------------------------------

def test_precision_of_a_device(monkeypatch):
    assert pick_precision('fp32', CPU, 256) == 'fp32' and pick_precision('bf16', CPU, 8) == 'bf16'
    with pytest.raises(UserError, match='--precision tf32: found cpu, expected an NVIDIA GPU'):
        pick_precision('tf32', CPU, 256)
    for fast, expected in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr('training.devices.has_fast_bf16', lambda device, fast=fast: fast)
        assert pick_precision('auto', CPU, 256) == expected
        assert pick_precision('auto', CPU, 32) == 'fp32', 'conversions cost more in narrow layers'


def test_bf16_is_fast_where_the_processor_has_it(monkeypatch):
    for found in (True, False):
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
            monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
        assert has_fast_bf16(CPU) == found and not has_fast_bf16(torch.device('meta'))


@pytest.mark.parametrize('options, expected', [
    (['--netwidth', '32', '--N_importance', '4'], 'bf16'), (['--netwidth', '32'], 'fp32'),
    (['--netwidth', '32', '--i_embed', '1', '--log2_hashmap_size', '4'], 'bf16')])
def test_only_networks_that_exist_decide_on_the_precision(tmp_path, monkeypatch, options, expected):
    monkeypatch.setattr('training.devices.has_fast_bf16', lambda device: True)
    args = config_parser().parse_args(['--expname', 'x', '--basedir', str(tmp_path), '--device', 'cpu',
                                       *options])
    assert create_nerf(args)[0]['network_query_fn'].precision == expected


@pytest.mark.parametrize('name, training, rendering', [
    ('auto', 'bf16', 'fp32'), ('bf16', 'bf16', 'bf16'), ('fp32', 'fp32', 'fp32')])
def test_rendering_is_exact_unless_the_options_name_a_precision(tmp_path, monkeypatch, name, training,
                                                                rendering):
    monkeypatch.setattr('training.devices.has_fast_bf16', lambda device: True)
    args = config_parser().parse_args(['--expname', 'x', '--basedir', str(tmp_path), '--device', 'cpu',
                                       '--netwidth', '128', '--precision', name])
    train, test, *_ = create_nerf(args)
    assert train['network_query_fn'].precision == training
    assert test['network_query_fn'].precision == rendering


# --- memory -------------------------------------------------------------------------------------------------

@given(N_samples=st.integers(1, 10 ** 7), N_importance=st.integers(0, 2000),
       kind=st.sampled_from(['cpu', 'cuda', 'xpu']))
def test_the_samples_of_rays_fit_in_memory(N_samples, N_importance, kind):
    rays = EXACT.max_rays(torch.device(kind), N_samples, N_importance)
    samples, most = N_samples + N_importance, MAX_SAMPLES.get(kind, MAX_SAMPLES['cuda'])
    assert rays == 1 or (rays * samples <= most < (rays + 1) * samples)


# --- memory that runs out -----------------------------------------------------------------------------------

@pytest.mark.parametrize('max_rays, fitting, expected', [
    (None, 1300, [4000, 2000, 1000]), (2500, 1300, [2500, 1250]), (None, 9000, [4000])])
def test_half_the_rays_are_tried_when_memory_runs_out(max_rays, fitting, expected, monkeypatch):
    tried, retries = [], []

    def work(chunk):
        tried.append(chunk)
        if chunk > fitting:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return chunk
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    limit = MemoryLimit(max_rays, 'tests', lambda: retries.append(None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert limit.fit(work, 4000) == expected[-1] and tried == expected
        assert limit.fit(work, 4000) == expected[-1] and len(tried) == len(expected) + 1, 'it is remembered'
    assert len(retries) == len(caught) == len(expected) - 1
    assert all('out of GPU memory in tests: continuing with --chunk' in str(one.message) for one in caught)


def test_too_little_memory_is_an_error(monkeypatch):
    def work(chunk):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        MemoryLimit(None, 'tests').fit(work, MIN_RAYS)


# --- devices without float64, such as Apple's GPUs ----------------------------------------------------------

class NoFloat64(TorchDispatchMode):
    """Stands for a device that has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(out) if torch.is_tensor(part)]
        assert all(tensor.dtype != torch.float64 for tensor in tensors), f'{function} returned float64'
        return out


@pytest.mark.parametrize('options', [DEMO, FAST_DEMO, PROPOSAL_DEMO])
def test_steps_and_frames_need_no_float64(options, tmp_path, monkeypatch):
    def without_float64(module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            with NoFloat64():
                return function(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapped)

    monkeypatch.setenv('NERF_PLAIN', '1')
    for module, name in ((run_nerf, 'loss_and_gradient'), (run_nerf, 'render'), (GridRenderer, 'update'),
                         (ProposalRenderer, 'update'), (torch.optim.Adam, 'step')):
        without_float64(module, name)
    assert run(*options, *NO_OUTPUTS, '--N_iters', 16, '--i_testset', 16, '--exact_render',
               '--basedir', tmp_path) == 0
