"""Runs by several processes, with real ones: same gradients, same parameters, and an end with a checkpoint when one dies."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from options import config_parser
from ranks import Ranks
from run_nerf import create_nerf, loss_and_gradient

SMALL = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--netdepth', 2,
         '--netwidth', 32, '--netdepth_fine', 2, '--netwidth_fine', 32, '--N_rand', 129,
         '--N_samples', 16, '--N_importance', 16, '--testskip', 4, '--device', 'cpu', '--precision', 'fp32']


def torchrun(*args, processes=2, start=False, script='run_nerf.py'):
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone',
               str(ROOT / script), *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    if start:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def problem(tmp_path):
    """A fixed batch, and the options of networks for it."""
    args = config_parser().parse_args([str(arg) for arg in SMALL] + ['--basedir', str(tmp_path), '--perturb', '0',
                                                                    '--raw_noise_std', '0'])
    torch.manual_seed(0)
    away = torch.tensor([0, 0, 4.0])
    rays = torch.stack([away.expand(65, 3), torch.randn(65, 3) * 0.1 - away / 4])
    target = torch.rand(65, 3)
    kwargs, _, _, parameters, _ = create_nerf(args)
    return rays, target, {**kwargs, 'near': 2.0, 'far': 6.0}, parameters


ONE_RANK = '''
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from ranks import Ranks
from run_nerf import loss_and_gradient
from test_ranks import problem
torch.set_num_threads(1)
with Ranks() as ranks:
    rays, target, kwargs, parameters = problem(Path({folder!r}))
    mine = slice(0, 33) if ranks.first else slice(33, 65)   # unequal shares
    measures = loss_and_gradient([16, 16], None, 1000, rays[:, mine], target[mine], kwargs)
    ranks.average(parameters, measures, len(target[mine]) / 65, None)
    torch.save([[p.grad for p in parameters], measures], f'{folder}/{{ranks.index}}.pt')
'''


def test_gradients_of_two_are_those_of_one(tmp_path):
    script = tmp_path / 'one_rank.py'
    script.write_text(ONE_RANK.format(tests=str(ROOT / 'tests'), folder=str(tmp_path)))
    done = torchrun(script=script)
    assert done.returncode == 0, done.stderr
    rays, target, kwargs, parameters = problem(tmp_path)
    for parameter in parameters:
        parameter.grad = None
    measures = loss_and_gradient([16, 16], None, 1000, rays, target, kwargs)
    (gradients, others), (gradients_1, others_1) = (torch.load(tmp_path / f'{index}.pt') for index in range(2))
    for mine, first, second in zip(parameters, gradients, gradients_1):
        assert torch.equal(first, second)
        if mine.grad is not None:
            assert (first - mine.grad).abs().max() <= 1e-6
            assert (first - mine.grad).norm() <= 1e-5 * mine.grad.norm() + 1e-12
    for mine, first, second in zip(measures, others, others_1):
        assert torch.equal(first, second) and torch.allclose(mine, first, rtol=1e-5)


ALL_SAVE = '''
import sys
from pathlib import Path
import run_nerf
end = run_nerf.end_run
def end_run(log, keeper, ranks, stop):
    keeper.write({folder!r} / Path(f'rank{{ranks.index}}.tar'), log.done)
    return end(log, keeper, ranks, stop)
run_nerf.end_run = end_run
sys.exit(run_nerf.main())
'''


def test_parameters_stay_equal_and_one_goes_on_from_two(tmp_path):
    """After 50 steps the ranks' parameters are the same bit for bit; the checkpoint is one that any number goes on from."""
    script = tmp_path / 'all_save.py'
    script.write_text(ALL_SAVE.format(folder=str(tmp_path)))
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 50, script=script)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f'rank{index}.tar', weights_only=True) for index in range(2))
    assert first['global_step'] == second['global_step'] == 50
    for name in ('network_fn_state_dict', 'network_fine_state_dict'):
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key])
    assert not torch.equal(first['random_state']['cpu'], second['random_state']['cpu']), 'ranks draw other rays'
    assert first.keys() == torch.load(tmp_path / 'demo/000050.tar', weights_only=True).keys()
    assert sorted(path.name for path in (tmp_path / 'demo').glob('*.tar')) == ['000050.tar']
    assert done.stdout.count('50 steps done') == 1 and done.stdout.count('a new run') == 1

    for steps, processes in ((60, 1), (70, 3)):
        done = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', steps, processes=processes)
        assert done.returncode == 0, done.stderr
        assert f'goes on after step {steps - 10}' in done.stdout
        assert (tmp_path / f'demo/{steps:06d}.tar').is_file()


def test_frames_of_two_are_those_of_one(tmp_path):
    options = [*SMALL, '--basedir', tmp_path]
    assert torchrun(*options, '--N_iters', 20, processes=1).returncode == 0
    np.save(tmp_path / 'path.npy', np.tile(np.eye(4), (5, 1, 1)) + np.eye(4, k=1) * np.arange(5)[:, None, None] / 9)
    frames = []
    for processes in (1, 2):
        done = torchrun(*options, '--render_only', '--render_poses', tmp_path / 'path.npy', processes=processes)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / 'demo/renderonly_path_000020'
        frames.append([path.read_bytes() for path in sorted(folder.glob('0*.png'))])
        assert (folder / 'video.mp4').is_file()
        folder.rename(tmp_path / f'by {processes}')
    assert len(frames[0]) == 5 and frames[0] == frames[1]


def children(process):
    """Process numbers of the ranks, in order."""
    found = subprocess.run(['ps', '--ppid', str(process.pid), '-o', 'pid='], capture_output=True, text=True).stdout.split()
    environments = {int(pid): Path(f'/proc/{pid}/environ').read_text() for pid in found}
    return [pid for pid, text in sorted(environments.items(), key=lambda item: re.search(r'\bRANK=(\d+)', item[1])[1])]


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='looks for processes in /proc')
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_run_with_a_checkpoint(tmp_path, victim):
    run = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 10 ** 6, '--i_print', 10, start=True)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith('step 30/'):
            os.kill(children(run)[victim], signal.SIGKILL)
            killed = time.monotonic()
            break
    rest, _ = run.communicate(timeout=90)
    assert run.returncode != 0 and time.monotonic() - killed < 60
    text = ''.join(lines) + rest
    if victim == 1:
        assert 'another process of this run has ended' in text and 'run_nerf.py", line' not in text
    found = sorted((tmp_path / 'demo').glob('*.tar'))
    assert len(found) == 1 and int(found[0].stem) >= 30, text
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', int(found[0].stem) + 2, processes=1)
    assert done.returncode == 0 and f'goes on after step {int(found[0].stem)}' in done.stdout, done.stderr


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='looks for processes in /proc')
@pytest.mark.parametrize('asked', [[0], [1], [0, 1]])
def test_a_signal_to_any_stops_all_after_the_same_step(tmp_path, asked):
    run = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 10 ** 6, '--i_print', 10, start=True)
    for line in run.stdout:
        if line.startswith('step 30/'):
            for pid in [children(run)[index] for index in asked]:
                os.kill(pid, signal.SIGTERM)
            break
    text, _ = run.communicate(timeout=90)
    (saved,) = (tmp_path / 'demo').glob('*.tar')
    assert f'{int(saved.stem)} steps done' in text and 'another process' not in text


def test_bad_options_are_named_once(tmp_path):
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_rand', 'many')
    assert done.returncode != 0 and done.stderr.count('--N_rand') == 1
    done = torchrun(*SMALL, '--basedir', tmp_path, '--datadir', tmp_path / 'nowhere')
    assert done.returncode != 0 and done.stderr.count('run_nerf.py: error') == 1
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_rand', 1)
    assert done.returncode != 0 and 'at least one ray for each of the 2 processes' in done.stderr


def test_alone_nothing_happens():
    ranks = Ranks(1)
    assert ranks.first and ranks.share(7) == 7 and ranks.from_first(lambda: 5) == 5
    before = torch.get_rng_state()
    ranks.part_ways(0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert ranks.each(lambda pose, factor: pose * factor, [3], 2) == [6]
