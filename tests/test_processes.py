"""Runs of several real processes: equal gradients and parameters, signals, and a checkpoint if a process
dies."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_devices import on_cpu_only
from tiny_runs import (
    DEMO,
    FAST_DEMO,
    NO_OUTPUTS,
    PROPOSAL_DEMO,
    ROOT,
    assert_same_parameters,
    finish,
    read_state,
    start,
    torchrun,
)

from run_nerf import create_nerf, loss_and_gradient
from scenes.errors import UserError
from scenes.rays import Batch
from training.options import config_parser
from training.processes import Processes, derive_seed
from training.safeguards import Measures
from training.signals import Stopped, StopRequest

# A number of rays that two processes cannot share equally.
SMALL = [*DEMO, '--N_rand', 129, '--precision', 'fp32']
not_on_a_stand_in = on_cpu_only('other processes compute on a CPU')
needs_proc = pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds processes in /proc')


# --- what processes do together -----------------------------------------------------------------------------

def gradients_of(rows):
    """Gradients and measures of some rows of a fixed problem, in two parts. One parameter has no gradient."""
    torch.manual_seed(0)
    network, unused = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(2))
    inputs, target = torch.randn(65, 3)[rows], torch.rand(65, 2)[rows]
    measures = Measures()
    for x, y in zip(inputs.split(20), target.split(20)):
        share = len(x) / len(inputs)
        losses = {'coarse': ((network(x) - y) ** 2).mean(), 'fine': network(x).abs().mean()}
        (share * sum(losses.values())).backward()
        measures.add(share, losses, {'coarse': y.mean()}, {'coarse': x.mean()}, y.mean(),
                     (x > 0).float().mean())
    return [*network.parameters(), unused], measures


def nerf_gradients_of(rows):
    """Gradients and measures of some rays of a fixed batch, by the networks of the demo."""
    args = config_parser().parse_args([str(option) for option in (*SMALL, '--no_reload', '--perturb', 0)])
    torch.manual_seed(0)
    position = torch.tensor([0, 0, 4.0])
    rays = torch.stack([position.expand(65, 3), torch.randn(65, 3) * 0.1 - position / 4])
    batch = Batch(rays[:, rows], torch.rand(65, 3)[rows])
    render_kwargs, _, _, parameters, _ = create_nerf(args)
    render_kwargs.update(raw_noise_std=0.0, near=2.0, far=6.0)
    return parameters, loss_and_gradient([16, 16], None, 1000, batch, render_kwargs)


TWO_RANKS = '''
import os, sys, time, torch
import torch._dynamo  # optimizers import it, and then it keeps a reference to the default group
from pathlib import Path
sys.path.insert(0, {tests!r})
from scenes.errors import UserError
from training.processes import Processes
from training.signals import Stopped
from test_processes import gradients_of, nerf_gradients_of
torch.set_num_threads(1)
found = {{}}

def fails():
    raise UserError('only in rank 0' if processes.is_main else 'in another rank')

def render(pose):
    if pose == 'bad':
        raise RuntimeError(f'bad pose in rank {{processes.rank}}')
    if pose == 'stop':
        raise Stopped(143)
    return f'{{pose}} by {{processes.rank}}'

with Processes() as processes:
    rows = slice(0, 33) if processes.is_main else slice(33, 65)   # unequal shares
    for problem in (gradients_of, nerf_gradients_of):
        parameters, measures = problem(rows)
        processes.average(parameters, measures.tensors, (rows.stop - rows.start) / 65)
        found[problem.__name__] = [p.grad for p in parameters], measures.tensors()
    found['share'] = processes.own_rays(129)

    found['any'] = [processes.any(processes.rank in ranks) for ranks in ([], [0], [1], [0, 1])]
    found['from_rank0'] = processes.from_rank0(lambda: f'made by {{processes.rank}}')

    def make_file():
        if processes.is_main:
            time.sleep(0.5)
            open({folder!r} + '/made', 'w').close()
        return processes.rank, os.path.exists({folder!r} + '/made')
    found['run_rank0_first'] = processes.run_rank0_first(make_file)
    for name in ('from_rank0', 'run_rank0_first'):
        try:
            getattr(processes, name)(fails)
        except UserError as error:
            found[f'{{name}} fails'] = str(error)

    torch.manual_seed(7)
    processes.seed_per_rank(7, 10)
    found['draws'] = torch.rand(3)

    if processes.is_main:
        found['frames'] = processes.render_all(render, ['a', 'b']) + processes.render_all(render, ['c'])
        for pose in ('bad', 'stop'):
            try:
                processes.render_all(render, ['a', pose])
            except (RuntimeError, Stopped) as error:
                found[pose] = str(error)
        processes.release()
    else:
        processes.serve(render)
found['threads'] = [comm.read_text().strip() for comm in Path('/proc/self/task').glob('*/comm')]
torch.save(found, f'{folder}/{{processes.rank}}.pt')
'''


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp('two_ranks')
    (folder / 'script.py').write_text(TWO_RANKS.format(tests=str(ROOT / 'tests'), folder=str(folder)))
    code, output = finish(torchrun(script=folder / 'script.py'))
    assert code == 0, output
    return [torch.load(folder / f'{index}.pt') for index in range(2)]


@not_on_a_stand_in
@pytest.mark.parametrize('problem', [gradients_of, nerf_gradients_of])
def test_gradients_of_two_are_those_of_one(two_ranks, problem):
    parameters, measures = problem(slice(0, 65))
    (gradients, means), (other_gradients, other_means) = (found[problem.__name__] for found in two_ranks)
    for parameter, gradient, other in zip(parameters, gradients, other_gradients, strict=True):
        assert torch.equal(gradient, other)
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (gradient - expected).abs().max() <= 1e-6
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-12
    for expected, mean, other in zip(measures.tensors(), means, other_means, strict=True):
        assert torch.equal(mean, other) and torch.allclose(mean, expected, rtol=1e-5)


def test_rays_are_shared_out(two_ranks):
    assert [found['share'] for found in two_ranks] == [65, 64]


def test_what_one_process_knows_all_know(two_ranks):
    for index, found in enumerate(two_ranks):
        assert found['any'] == [False, True, True, True]
        assert found['from_rank0'] == 'made by 0'
        assert found['run_rank0_first'] == (index, True)
        assert found['from_rank0 fails'] == found['run_rank0_first fails'] == 'only in rank 0'


@not_on_a_stand_in
def test_each_rank_draws_its_own_numbers(two_ranks):
    torch.manual_seed(7)
    assert torch.equal(two_ranks[0]['draws'], torch.rand(3)), 'rank 0 draws those of a single process'
    torch.manual_seed(derive_seed(7, 10, 1))
    assert torch.equal(two_ranks[1]['draws'], torch.rand(3))


def test_frames_are_shared_out(two_ranks):
    assert two_ranks[0]['frames'] == ['a by 0', 'b by 1', 'c by 0']
    assert two_ranks[0]['bad'] == 'bad pose in rank 1' and two_ranks[0]['stop'] == '143'


@needs_proc
def test_no_thread_of_a_process_group_is_left(two_ranks):
    for found in two_ranks:
        assert found['threads'] and not any('gloo' in name for name in found['threads'])


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, step, index) for seed in range(3) for step in range(50) for index in range(8)}
    assert len(seeds) == 3 * 50 * 8 and all(0 <= seed < 2 ** 63 for seed in seeds)


def test_a_single_process_needs_no_others():
    with Processes(1) as processes:
        assert processes.is_main and processes.own_rays(7) == 7 and processes.from_rank0(lambda: 5) == 5
        before = torch.get_rng_state()
        processes.seed_per_rank(0, 0)
        processes.average([], list, 1.0)
        processes.release()
        assert torch.equal(torch.get_rng_state(), before) and processes.any(True) and not processes.any(False)
        assert processes.render_all(lambda pose: pose * 2, [3]) == [6]
        assert processes.run_rank0_first(lambda: 4) == 4


def test_fewer_rays_than_processes():
    processes = Processes(3)
    with pytest.raises(UserError, match='at least one ray for each of the 3 processes'):
        processes.own_rays(2)


# --- signals ------------------------------------------------------------------------------------------------

def raise_signal(number=signal.SIGTERM):
    signal.raise_signal(number)


def test_the_first_signal_is_remembered():
    lines = []
    with StopRequest(lines.append) as stop:
        assert not stop.requested and stop.exit_code == 0
        stop.check()
        raise_signal()
        assert stop.requested and stop.exit_code == 143 and 'SIGTERM' in lines[0]
        with pytest.raises(Stopped):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_signal_interrupts_what_is_interruptible():
    with StopRequest(str) as stop:
        with pytest.raises(Stopped) as stopped, stop.interruptible():
            raise_signal(signal.SIGINT)
            raise AssertionError('not interrupted')
        assert stopped.value.args == (130,)
        with pytest.raises(Stopped), stop.interruptible():
            raise AssertionError('begun after a signal')


def test_other_work_is_completed():
    with StopRequest(str) as stop:
        with stop.interruptible():
            pass
        raise_signal()
        assert stop.requested


def test_second_signal_ends_at_once():
    script = ('import os, signal, sys, time; sys.path.insert(0, sys.argv[1])\n'
              'from training.signals import StopRequest\n'
              'with StopRequest(print) as stop:\n'
              '    os.kill(os.getpid(), signal.SIGTERM); print(stop.signal, flush=True)\n'
              '    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n')
    done = subprocess.run([sys.executable, '-c', script, str(ROOT)], capture_output=True, text=True,
                          timeout=30)
    assert done.returncode == 130 and '15' in done.stdout


# --- whole runs ---------------------------------------------------------------------------------------------

ALL_SAVE = '''
import sys
from pathlib import Path
import run_nerf
from training.checkpoints import Checkpoints
finish = Checkpoints.finish
def write_and_finish(checkpoints, step, processes):
    checkpoints.write({folder!r} / Path(f'rank{{processes.rank}}.tar'), step)
    return finish(checkpoints, step, processes)
Checkpoints.finish = write_and_finish
sys.exit(run_nerf.main())
'''


@pytest.mark.slow
def test_parameters_stay_equal_and_any_number_resumes(tmp_path):
    """After 50 steps the parameters of the ranks are equal bit for bit, and any number of processes can
    resume."""
    script = tmp_path / 'all_save.py'
    script.write_text(ALL_SAVE.format(folder=str(tmp_path)))
    code, output = finish(torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 50, script=script))
    assert code == 0, output
    first, second = (read_state(tmp_path / f'rank{index}.tar') for index in range(2))
    assert first['global_step'] == second['global_step'] == 50
    for name in ('network_fn_state_dict', 'network_fine_state_dict'):
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key])
    assert not torch.equal(first['random_state']['cpu'],
                           second['random_state']['cpu']), 'ranks draw other rays'
    assert first.keys() == read_state(tmp_path / 'demo/000050.tar').keys()
    assert sorted(path.name for path in (tmp_path / 'demo').glob('*.tar')) == ['000050.tar']
    assert output.count('50 steps done') == 1 and output.count('a new run') == 1

    for steps, processes in ((60, 1), (70, 3)):
        process = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', steps, processes=processes)
        code, output = finish(process)
        assert code == 0, output
        assert f'resumes after step {steps - 10}' in output
        assert (tmp_path / f'demo/{steps:06d}.tar').is_file()


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_of_one(tmp_path):
    """An agent of torchrun for each node; both are on this machine."""
    options = [*SMALL, '--N_iters', 10]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = ['--master_addr', '127.0.0.1', '--master_port', str(free.getsockname()[1])]
    launcher = ['-m', 'torch.distributed.run', '--nnodes', '2', *address, '--node_rank']
    agents = [start(*options, '--basedir', tmp_path / 'nodes', launcher=[*launcher, str(rank)])
              for rank in range(2)]
    for agent in agents:
        code, output = finish(agent)
        assert code == 0, output
    code, output = finish(torchrun(*options, '--basedir', tmp_path / 'one'))
    assert code == 0, output
    assert_same_parameters(tmp_path / 'nodes/demo/000010.tar', tmp_path / 'one/demo/000010.tar')


@pytest.mark.slow
def test_frames_of_two_are_those_of_one(demo_run, tmp_path):
    poses = np.eye(4) + np.eye(4, k=1) * np.arange(5)[:, None, None] / 9
    np.save(tmp_path / 'path.npy', poses)
    options = [*SMALL, '--render_only', '--ft_path', demo_run[0] / '000250.tar', '--basedir', tmp_path,
               '--render_poses', tmp_path / 'path.npy']
    frames = []
    for run in (start, torchrun):
        code, output = finish(run(*options))
        assert code == 0, output
        folder = tmp_path / 'demo/renderonly_path_000250'
        frames.append([path.read_bytes() for path in sorted(folder.glob('0*.png'))])
        assert (folder / 'video.mp4').is_file()
        folder.rename(tmp_path / f'{len(frames)} processes')
    assert len(frames[0]) == 5 and frames[0] == frames[1]


@pytest.mark.slow
@pytest.mark.parametrize('preset', [FAST_DEMO, [*PROPOSAL_DEMO, '--contract', '--refine_poses']],
                         ids=['objects', 'places'])
def test_a_fast_run_of_two_processes(tmp_path, preset):
    """Its checkpoint resumes and renders in one process."""
    options = [*preset, *NO_OUTPUTS, '--basedir', tmp_path]
    code, output = finish(torchrun(*options, '--N_iters', 40, '--i_testset', 40))
    assert code == 0, output
    code, output = finish(start(*options, '--N_iters', 50))
    assert code == 0 and 'resumes after step 40' in output, output
    code, output = finish(start(*options, '--render_only', '--render_test'))
    assert code == 0, output


def ranks_of(launcher):
    """The process ids of the ranks, in order."""
    command = ['ps', '--ppid', str(launcher.pid), '-o', 'pid=']
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    environments = {int(pid): Path(f'/proc/{pid}/environ').read_text(encoding='utf-8') for pid in found}
    return sorted(environments, key=lambda pid: int(re.search(r'\bRANK=(\d+)', environments[pid])[1]))


def lines_until(process, beginning):
    """The lines that a process prints, up to the one with this beginning."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            break
    return ''.join(lines)


def start_endless(basedir, *options):
    return torchrun(*SMALL, '--basedir', basedir, '--N_iters', 10 ** 6, *options)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_run_with_a_checkpoint(tmp_path, victim):
    launcher = start_endless(tmp_path, '--i_print', 10)
    text = lines_until(launcher, 'step 30/')
    os.kill(ranks_of(launcher)[victim], signal.SIGKILL)
    killed = time.monotonic()
    code, rest = finish(launcher, timeout=90)
    text += rest
    assert code != 0 and time.monotonic() - killed < 60
    if victim == 1:
        assert 'another process of this run has ended' in text and 'run_nerf.py", line' not in text
    found = sorted((tmp_path / 'demo').glob('*.tar'))
    assert len(found) == 1 and int(found[0].stem) >= 30, text
    step = int(found[0].stem)
    code, output = finish(start(*SMALL, '--basedir', tmp_path, '--N_iters', step + 2))
    assert code == 0 and f'resumes after step {step}' in output, output


def assert_stopped_together(launcher, basedir):
    """All ranks have ended after the same step, and saved it."""
    _, text = finish(launcher, timeout=90)
    (saved,) = (basedir / 'demo').glob('*.tar')
    assert f'{int(saved.stem)} steps done' in text and 'another process' not in text
    assert not list(basedir.rglob('*.part*'))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize('ranks', [[0], [1], [0, 1]])
def test_a_signal_to_any_stops_all_after_the_same_step(tmp_path, ranks):
    launcher = start_endless(tmp_path, '--i_print', 10)
    lines_until(launcher, 'step 30/')
    for pid in [ranks_of(launcher)[index] for index in ranks]:
        os.kill(pid, signal.SIGTERM)
    assert_stopped_together(launcher, tmp_path)


@needs_proc
@pytest.mark.slow
def test_a_signal_during_evaluation_stops_all_together(tmp_path):
    """Rank 0 abandons its video between two frames, and no rank is left waiting for another."""
    launcher = start_endless(tmp_path, '--i_print', 5, '--i_video', 5)
    lines_until(launcher, 'step 5/')
    time.sleep(1.0)  # in the video now, or soon
    os.kill(ranks_of(launcher)[0], signal.SIGTERM)
    assert_stopped_together(launcher, tmp_path)


@pytest.mark.slow
def test_errors_are_printed_once(tmp_path):
    for options, printed in [(['--N_rand', 'many'], '--N_rand'),
                             (['--datadir', tmp_path / 'nowhere'], 'run_nerf.py: error'),
                             (['--N_rand', 1], 'at least one ray for each of the 2 processes')]:
        code, output = finish(torchrun(*SMALL, '--basedir', tmp_path, *options))
        assert code != 0 and output.count(printed) == 1, output
