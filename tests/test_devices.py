"""Devices: which one, its precision, and how many rays at once."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from run_nerf import create_nerf
from scenes.errors import UserError
from training.devices import SAMPLES_AT_ONCE, has_fast_bf16, pick_device, pick_precision, rays_at_once
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
    assert pick_device('auto') == torch.device('cuda')
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert pick_device('auto') == pick_device('cuda') == torch.device('cuda', 1) and chosen == [1, 1]
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='found 2 GPUs, expected one for each process'):
        pick_device('auto')


# --- precision --------------------------------------------------------------------------------------------------

def test_precision_of_a_device(monkeypatch):
    assert pick_precision('fp32', CPU, 256) == 'fp32' and pick_precision('bf16', CPU, 8) == 'bf16'
    with pytest.raises(UserError, match='--precision tf32: found cpu, expected an NVIDIA GPU'):
        pick_precision('tf32', CPU, 256)
    for fast, expected in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr('training.devices.has_fast_bf16', lambda device, fast=fast: fast)
        assert pick_precision('auto', CPU, 256) == expected
        assert pick_precision('auto', CPU, 32) == 'fp32', 'conversions cost more in narrow layers'


def test_bf16_is_fast_on_some_devices_only():
    assert has_fast_bf16(CPU) in (True, False) and not has_fast_bf16(torch.device('meta'))


@pytest.mark.parametrize('name, training, rendering', [
    ('auto', 'bf16', 'fp32'), ('bf16', 'bf16', 'bf16'), ('fp32', 'fp32', 'fp32')])
def test_rendering_is_exact_unless_the_options_name_a_precision(tmp_path, monkeypatch, name, training, rendering):
    monkeypatch.setattr('training.devices.has_fast_bf16', lambda device: True)
    args = config_parser().parse_args(['--expname', 'x', '--basedir', str(tmp_path), '--device', 'cpu',
                                       '--netwidth', '128', '--precision', name])
    train, test, *_ = create_nerf(args)
    assert train['network_query_fn'].precision == training
    assert test['network_query_fn'].precision == rendering


# --- memory -----------------------------------------------------------------------------------------------------

@given(chunk=st.integers(1, 10 ** 7), samples=st.integers(0, 2000), kind=st.sampled_from(['cpu', 'cuda', 'xpu']))
def test_rays_at_once_are_bounded_by_chunk_and_samples(chunk, samples, kind):
    rays = rays_at_once(chunk, samples, torch.device(kind))
    most = SAMPLES_AT_ONCE.get(kind, SAMPLES_AT_ONCE['cuda'])
    assert 1 <= rays <= chunk and (rays * samples <= most or rays == 1)
