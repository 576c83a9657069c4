"""Where the tests find recorded values and real scenes, and the trained runs that they share."""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import DEMO, FAST_DEMO, NO_OUTPUTS, ROOT, STARTED, TINY, run, run_script
from tiny_scenes import edit_json

if 'PYTEST_XDIST_WORKER' in os.environ:  # one worker per core
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)
if 'fake_cuda' in sys.modules:  # a stand-in for a GPU, which cannot load the kernels
    from benchmarks import cuda_on_cpu
    cuda_on_cpu.install()

SHARED = Path(os.environ.get('NERF_SHARED', ROOT.parent / 'shared'))
GOLDEN, DATA = SHARED / 'golden', SHARED / 'data'

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f'no recorded values at {GOLDEN}')
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f'no real scenes at {DATA}')


def golden(name):
    """A file of recorded values as a dict of arrays."""
    with np.load(GOLDEN / name) as arrays:
        return {key: arrays[key] for key in arrays}


# --- runs that several tests look at; a test that writes to their folder copies it first --------------------

@pytest.fixture(scope='session')
def demo_run(tmp_path_factory):
    """A run of the demo in a process of its own, 250 steps: its folder and what it printed to stdout and
    stderr. `path.npy` beside the folder is its camera path."""
    basedir = tmp_path_factory.mktemp('demo_run')
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 2, 3] = 4, 4.2, 4.4
    np.save(basedir / 'path.npy', poses)
    done = run_script(*DEMO, '--basedir', basedir, '--N_iters', 250, '--i_print', 50, '--i_img', 100,
                      '--i_weights', 100, '--i_testset', 250, '--i_video', 250,
                      '--render_poses', basedir / 'path.npy')
    assert done.returncode == 0, done.stderr
    return basedir / 'demo', done.stdout, done.stderr


@pytest.fixture(scope='session')
def fast_demo_run(tmp_path_factory):
    """The folder of a run of the fast demo, 250 steps."""
    basedir = tmp_path_factory.mktemp('fast_demo_run')
    assert run(*FAST_DEMO, '--basedir', basedir, '--N_iters', 250, '--i_testset', 250,
               '--i_video', 10 ** 6) == 0
    return basedir / 'demo_fast'


@pytest.fixture(scope='session')
def two_steps(tmp_path_factory):
    """The folder of a tiny run with the checkpoints of steps 1 and 2."""
    basedir = tmp_path_factory.mktemp('two_steps')
    assert run(*TINY, *NO_OUTPUTS, '--basedir', basedir, '--N_iters', 2, '--i_weights', 1) == 0
    return basedir / 'demo'


@pytest.fixture(scope='session')
def few_views(tmp_path_factory):
    """The folder of the demo scene with 8 of its 80 training views: its bounds are found ten times faster."""
    folder = tmp_path_factory.mktemp('few_views') / 'demo'
    shutil.copytree(ROOT / 'data/demo', folder)
    edit_json(folder / 'transforms_train.json', lambda meta: meta.update(frames=meta['frames'][::10]))
    return folder


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A test that fails leaves no process behind."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
