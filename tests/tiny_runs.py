"""Short runs of the program, in this process and in others."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from run_nerf import main

ROOT = Path(__file__).resolve().parent.parent
# Processes started by a test, which are ended after it.
STARTED = []
# The demo at half its size, with networks that train quickly.
DEMO = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--netdepth', 2,
        '--netwidth', 32, '--netdepth_fine', 2, '--netwidth_fine', 32, '--N_rand', 128, '--N_samples', 16,
        '--N_importance', 16, '--testskip', 4, '--device', 'cpu']
# The same with networks that only show how a run behaves, not how well it trains.
TINY = [*DEMO, '--netwidth', 16, '--netwidth_fine', 16, '--N_rand', 64, '--N_samples', 8, '--N_importance', 8,
        '--testskip', 8, '--raw_noise_std', 0.5, '--no_restart']
# The fast demo, likewise smaller.
FAST_DEMO = ['--config', ROOT / 'configs/demo_fast.txt', '--datadir', ROOT / 'data/demo', '--half_res',
             '--testskip', 4, '--device', 'cpu', '--log2_hashmap_size', 11, '--n_levels', 4,
             '--finest_res', 64, '--N_samples', 64, '--N_rand', 2048, '--N_rand_samples', 2048]
# The same scene with the sampler for places.
PROPOSAL_DEMO = [*FAST_DEMO, '--no-occupancy_grid', '--sampler', 'proposal', '--N_samples', 16,
                 '--N_rand', 256, '--lambda_distortion', 0.01]
# Options that turn off the outputs made during training.
NO_OUTPUTS = ['--i_img', 10 ** 6, '--i_testset', 10 ** 6, '--i_video', 10 ** 6]


def run(*args):
    """Run the program in this process; returns its exit code."""
    return main([str(arg) for arg in args])


def run_script(*args, **options):
    """Run `run_nerf.py` as users do; returns the completed process, its output as text."""
    return run_python('run_nerf.py', *args, **options)


def run_python(script, *args, cwd=ROOT, timeout=300, **environment):
    """Run a script, whose path is relative to the repository, with more environment variables."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    environment = {**os.environ, 'PYTHONIOENCODING': 'utf-8', **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding='utf-8', timeout=timeout,
                          env=environment)


def start(*args, script=ROOT / 'run_nerf.py', launcher=(), **options):
    """Start the program in a process of its own, which writes to a pipe. It ends with the test at the
    latest."""
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8'}
    STARTED.append(subprocess.Popen(command, encoding='utf-8', stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, env=environment, **options))
    return STARTED[-1]


def finish(process, timeout=120):
    """Wait for a process; returns its exit code and output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for(path, process, timeout=60):
    """Wait until a file exists."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f'{path} was not written'
        time.sleep(0.01)


def torchrun(*args, processes=2, script=ROOT / 'run_nerf.py'):
    """Start the program, or another script, as a run of several processes."""
    launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone']
    return start(*args, script=script, launcher=launcher)


def read_state(path):
    """The content of a checkpoint, as it is in the file."""
    return torch.load(path, weights_only=True)


def assert_same_parameters(path, other):
    """The networks and renderers of two checkpoints are equal bit for bit."""
    one, other = read_state(path), read_state(other)
    for name in ('network_fn_state_dict', 'network_fine_state_dict', 'renderer_state_dict'):
        assert (name in one) == (name in other)
        if name in one:
            assert one[name].keys() == other[name].keys()
            assert all(torch.equal(value, other[name][key]) for key, value in one[name].items()), name


def assert_killed_and_resumed_is_undisturbed(basedir, *args):
    """A run that is killed after its first checkpoint, 20 steps of 60, and resumed, ends with the parameters
    of a run that is never disturbed."""
    args = [*args, *NO_OUTPUTS, '--N_iters', 60, '--i_weights', 20]
    undisturbed = start(*args, '--basedir', basedir / 'whole')
    code, output = finish(undisturbed)
    assert code == 0, output
    (whole,) = (basedir / 'whole').rglob('000060.tar')
    folder = basedir / 'parts' / whole.parent.name
    process = start(*args, '--basedir', basedir / 'parts')
    wait_for(folder / '000020.tar', process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for path in folder.glob('0000[46]0.tar'):  # the process may have been quick
        path.unlink()
    code, output = finish(start(*args, '--basedir', basedir / 'parts'))
    assert code == 0 and 'resumes after step 20' in output, output
    assert_same_parameters(whole, folder / '000060.tar')
