"""The program on a strict stand-in for a GPU, `../shared/tools/fake_cuda.py`: its values are real, and its
rules about devices are CUDA's."""
import os
import subprocess
import sys

import pytest
from conftest import SHARED
from tiny_runs import NO_OUTPUTS, ROOT, TINY, read_state

STAND_IN = SHARED / 'tools/fake_cuda.py'
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not STAND_IN.is_file(), reason=f'no stand-in for a GPU at {STAND_IN}')]
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


def run_on_gpu(*args, device='cuda', **environment):
    """Run `run_nerf.py` with the stand-in; returns the completed process, its output as text."""
    command = [STAND_IN, ROOT / 'run_nerf.py', *TINY, *NO_OUTPUTS, '--device', device, *args]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
    return run_command(*command, env=environment)


def run_command(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **options)


def test_training_on_a_gpu_and_resuming(tmp_path):
    for steps in (3, 6):
        done = run_on_gpu('--basedir', tmp_path, '--N_iters', steps, device='auto')
        assert done.returncode == 0, done.stderr
        assert 'device    cuda' in done.stdout
    assert 'resumes after step 3' in done.stdout
    assert len(read_state(tmp_path / 'demo/000006.tar')['random_state']['cuda']) == 1


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
