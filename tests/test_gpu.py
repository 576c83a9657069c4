"""The program on a strict stand-in for a GPU, `../shared/tools/fake_cuda.py`: its values are real, and its
rules about devices are CUDA's."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import DATA, SHARED
from tiny_runs import FAST_DEMO, NO_OUTPUTS, ROOT, TINY, read_state

STAND_IN = SHARED / 'tools/fake_cuda.py'
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not STAND_IN.is_file(), reason=f'no stand-in for a GPU at {STAND_IN}')]
# Their tests run with a GPU as torch's default device too.
UNIT_TESTS = ('helpers', 'render', 'packed', 'occupancy', 'grid_renderer', 'hash_grid', 'hash_nerf',
              'network_query', 'proposals', 'sparse_backward', 'devices')
# Runs a script where the driver is too old for torch: a GPU is counted, but cannot be initialised.
OLD_DRIVER = '''
import runpy, sys, torch
def refuse():
    raise RuntimeError('The NVIDIA driver on your system is too old')
for module in (torch.cuda, torch.cuda.random):
    module.device_count, module._lazy_init = (lambda: 1), refuse
torch.cuda.is_available = lambda: False
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name='__main__')
'''


# Runs a script after `nerf_losses` has been patched: steps in BAD have a loss that is not a number.
BAD_LOSSES = '''
import itertools, sys
import run_nerf
original, steps = run_nerf.nerf_losses, itertools.count(1)
def nerf_losses(*args):
    losses = original(*args)
    if next(steps) in {bad}:
        losses['fine'] = losses['fine'] * float('nan')
    return losses
run_nerf.nerf_losses = nerf_losses
sys.exit(run_nerf.main())
'''


def run_on_gpu(*args, device='cuda', **environment):
    """Run `run_nerf.py` with the stand-in; returns the completed process, its output as text."""
    command = [STAND_IN, ROOT / 'run_nerf.py', *TINY, *NO_OUTPUTS, '--device', device, *args]
    return run_command(*command, env=environment_of_gpu(**environment))


def environment_of_gpu(**environment):
    path = os.pathsep.join([str(STAND_IN.parent), str(ROOT)])
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **environment}


def run_command(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **options)


def test_training_on_a_gpu_and_resuming(tmp_path):
    for steps in (3, 6):
        done = run_on_gpu('--basedir', tmp_path, '--N_iters', steps, device='auto')
        assert done.returncode == 0, done.stderr
        assert 'device    cuda' in done.stdout
    assert 'resumes after step 3' in done.stdout
    state = read_state(tmp_path / 'demo/000006.tar')
    assert len(state['random_state']['cuda']) == 1


def test_a_run_moves_from_cpu_to_gpu_and_back(tmp_path):
    """The optimizer's state too, whose implementation depends on the device."""
    for steps, device in ((2, 'cpu'), (4, 'cuda'), (6, 'cpu')):
        done = run_on_gpu('--basedir', tmp_path, '--N_iters', steps, device=device)
        assert done.returncode == 0, done.stderr
        optimizer = read_state(tmp_path / f'demo/{steps:06d}.tar')['optimizer_state_dict']
        assert {entry['step'].item() for entry in optimizer['state'].values()} == {steps}
        assert optimizer['param_groups'][0]['fused'] == (device == 'cuda')


def test_two_gpus(tmp_path):
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, STAND_IN,
               ROOT / 'run_nerf.py', *FAST_DEMO, *NO_OUTPUTS, '--device', 'cuda', '--basedir', tmp_path,
               '--N_iters', 20]
    done = run_command(*command, env=environment_of_gpu(FAKE_CUDA_COUNT='2'))
    assert done.returncode == 0 and '2 processes, cuda each' in done.stdout, done.stderr
    assert (tmp_path / 'demo_fast/000020.tar').is_file()


def test_unit_tests_with_a_gpu_as_the_default_device():
    environment = environment_of_gpu(FAKE_CUDA='1', FAKE_CUDA_DEFAULT='1',
                                     PYTHONPATH=str(STAND_IN.parent / 'site'))
    done = run_command('-m', 'pytest', '-q', *[f'tests/test_{name}.py' for name in UNIT_TESTS], '-k',
                       'not plain_autograd', env=environment)
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout


# --- launches and waits -------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, launches, waits', [
    (['--config', 'configs/lego_fast.txt', '--datadir', DATA / 'nerf_synthetic/lego', '--frames', 0], 120, 2),
    (['--config', 'configs/lego.txt', '--datadir', 'data/demo', '--frames', 0, '--steps', 1], 400, 1),
    ([*FAST_DEMO, '--steps', 0], 300, 12)])
def test_launches_and_waits(options, launches, waits, fast_demo_run, tmp_path):
    """Of a step of a hash preset, of the exact method's, and of a frame."""
    if '--frames' not in options:
        options = [*options, '--ft_path', fast_demo_run / '000250.tar']
    done = run_command('benchmarks/launches.py', *options, '--json', tmp_path / 'counts.json',
                       env=environment_of_gpu())
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'counts.json').read_text())
    assert 20 < row['launches'] <= launches and row['waits'] <= waits, done.stdout


# --- memory -------------------------------------------------------------------------------------------------

def test_training_goes_on_when_memory_runs_out(tmp_path):
    """With half the rays at once; the gradient is that of all of them."""
    def gradients(folder, **environment):
        done = run_on_gpu('--basedir', folder, '--N_iters', 1, '--N_rand', 2048, '--perturb', 0,
                          '--raw_noise_std', 0, **environment)
        assert done.returncode == 0, done.stderr
        adam = read_state(folder / 'demo/000001.tar')['optimizer_state_dict']['state'].values()
        return torch.cat([entry['exp_avg'].flatten() for entry in adam]), done.stderr
    found, warnings = gradients(tmp_path / 'small', FAKE_CUDA_MEMORY='0.004')
    assert 'warning: out of GPU memory in training: continuing with --chunk' in warnings
    expected, _ = gradients(tmp_path / 'large')
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize('config, datadir', [
    ('lego', 'nerf_synthetic/lego'), ('lego_fast', 'nerf_synthetic/lego'),
    ('fern_fast', 'nerf_llff_data/fern')])
def test_presets_fit_8_gib(config, datadir, tmp_path):
    environment = environment_of_gpu(FAKE_CUDA_MEMORY='8', FAKE_CUDA_REPORT=str(tmp_path / 'report.json'))
    done = run_command(STAND_IN, ROOT / 'run_nerf.py', '--config', f'configs/{config}.txt',
                       '--datadir', DATA / datadir, *NO_OUTPUTS, '--device', 'cuda', '--basedir', tmp_path,
                       '--N_iters', 2, env=environment)
    assert done.returncode == 0 and 'out of GPU memory' not in done.stderr, done.stderr
    assert json.loads((tmp_path / 'report.json').read_text())['peak GiB'] < 4


# --- steps that are not finite ------------------------------------------------------------------------------

def test_bad_steps_are_skipped_on_the_gpu(tmp_path):
    """Before the host knows of them; it counts them later, and in checkpoints."""
    script = tmp_path / 'bad.py'
    script.write_text(BAD_LOSSES.format(bad={3, 4, 21}))
    done = run_command(STAND_IN, script, *TINY, *NO_OUTPUTS, '--device', 'cuda', '--basedir', tmp_path,
                       '--N_iters', 40, '--i_weights', 4, env=environment_of_gpu())
    assert done.returncode == 0, done.stderr
    assert '2 steps were skipped (2 so far)' in done.stdout
    assert 'a step was skipped (3 so far)' in done.stdout
    assert not (tmp_path / 'demo/000004.tar').exists(), 'step 4 was bad'
    for step, bad in ((8, 2), (20, 2), (24, 3), (40, 3)):
        state = read_state(tmp_path / f'demo/{step:06d}.tar')
        assert state['safeguards_state_dict']['bad_steps'] == bad
        steps = {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()}
        assert steps == {step - bad}
        assert all(torch.isfinite(value).all() for value in state['network_fine_state_dict'].values())


def test_many_bad_steps_on_the_gpu_roll_training_back(tmp_path):
    script = tmp_path / 'bad.py'
    script.write_text(BAD_LOSSES.format(bad=set(range(20, 33))))
    done = run_command(STAND_IN, script, *TINY, *NO_OUTPUTS, '--device', 'cuda', '--basedir', tmp_path,
                       '--N_iters', 48, '--i_weights', 16, env=environment_of_gpu())
    assert done.returncode == 0, done.stderr
    assert 'back to' in done.stdout and '000016.tar' in done.stdout
    assert read_state(tmp_path / 'demo/000048.tar')['safeguards_state_dict']['rollbacks'] == 1


# --- GPUs that cannot be used -------------------------------------------------------------------------------


def test_a_gpu_that_this_build_of_torch_has_no_code_for(tmp_path):
    """`auto` takes the CPU, with a warning; an explicit GPU is an error."""
    done = run_on_gpu('--basedir', tmp_path, '--N_iters', 2, device='auto', FAKE_CUDA_NO_KERNELS='1')
    assert done.returncode == 0 and 'device    cpu' in done.stdout, done.stderr
    assert 'warning: this build of torch cannot use the GPU (' in done.stderr
    assert (tmp_path / 'demo/000002.tar').is_file()
    done = run_on_gpu('--basedir', tmp_path / 'new', '--N_iters', 2, FAKE_CUDA_NO_KERNELS='1')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        'run_nerf.py: error: --device cuda: not available (')
    assert not (tmp_path / 'new').exists()


def test_a_driver_that_is_too_old(tmp_path):
    """Training on the CPU saves and resumes, also from the checkpoint of a GPU."""
    done = run_on_gpu('--basedir', tmp_path, '--N_iters', 2)
    assert done.returncode == 0, done.stderr
    script = tmp_path / 'old_driver.py'
    script.write_text(OLD_DRIVER.format(root=str(ROOT)))
    done = run_command(script, ROOT / 'run_nerf.py', *TINY, *NO_OUTPUTS, '--device', 'auto',
                       '--basedir', tmp_path, '--N_iters', 4)
    assert done.returncode == 0 and 'resumes after step 2' in done.stdout, done.stderr
    assert (tmp_path / 'demo/000004.tar').is_file()
