"""--minutes: how many steps end in time, at which learning rates, and with which outputs."""
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import FAST_DEMO, run

from training.checkpoints import read_checkpoint
from training.optimizer import set_learning_rate
from training.processes import Processes
from training.time_plan import NEVER, TimePlan

# The frames of the simulated runs take this many seconds, and the first one after a change so many more.
FRAME, BAKING = 0.4, 1.5


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, in a list; only the test lets them pass."""
    now = [0.0]
    monkeypatch.setattr('training.time_plan.time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr('training.time_plan.IMPORT_SECONDS', 0.0)
    return now


class Frames:
    """Stands for a `FrameRenderer` whose frames take FRAME seconds."""

    def __init__(self, clock):
        self.clock, self.is_baked = clock, False

    def drop_cache(self):
        self.is_baked = False

    def render(self, pose, stride=1, camera=None):
        self.clock[0] += FRAME / stride ** 2 + (0 if self.is_baked else BAKING)
        self.is_baked = True


def simulate(clock, minutes, seconds_of_step, state=None, start=0, num_frames=40, say=print):
    """Train as `train` does, with steps that take seconds_of_step(step); returns the options at the end and
    the learning rates. The clock is at the end of the run."""
    args = Namespace(minutes=minutes, N_iters=3000, lrate_decay=2, i_testset=1000, i_video=1000)
    camera = SimpleNamespace(H=400, W=400)
    scene = SimpleNamespace(hwf=[400, 400, 500.0], cameras=[camera] * 30, poses=np.zeros((30, 3, 4)),
                            i_train=np.arange(20), i_test=np.arange(20, 30),
                            render_poses=np.zeros((num_frames, 3, 4)), path_cameras=None)
    console = SimpleNamespace(say=say, started_at=clock[0])
    plan = TimePlan(args, scene, state, start, Frames(clock), Processes(1), console)
    optimizer, lrates, step = torch.optim.Adam([torch.zeros(1, requires_grad=True)]), [], start
    while step < args.N_iters:
        step += 1
        lrates.append(set_learning_rate(optimizer, 0.01, args.lrate_decay, step))
        clock[0] += seconds_of_step(step)
        plan.after_step(step)
    outputs = num_frames * (step % args.i_video == 0) + 10 * (step % args.i_testset == 0)
    clock[0] += (BAKING if outputs else 0) + FRAME * outputs
    return args, lrates


@pytest.mark.parametrize('minutes, seconds_of_step', [
    (3, lambda step: 0.05), (10, lambda step: 0.05),
    (3, lambda step: 4 if step == 1 else 0.02),           # kernels are compiled
    (3, lambda step: 0.15 if step < 100 else 0.05),       # the occupancy grid is full
    (3, lambda step: 0.05 if step < 1500 else 0.15),      # another program begins
    (3, lambda step: 20.0)])
def test_a_run_ends_in_time(clock, minutes, seconds_of_step):
    args, lrates = simulate(clock, minutes, seconds_of_step)
    assert clock[0] == pytest.approx(60 * minutes, rel=0.05 if seconds_of_step(10) < 1 else 0.15)
    assert args.i_video == args.i_testset == args.N_iters == len(lrates)
    # as far as with the options' 3000 steps
    share = (len(lrates) - 1) / len(lrates)
    assert lrates[-1] / lrates[0] == pytest.approx(0.1 ** (1.5 * share), rel=0.05)


def test_without_minutes_nothing_changes(clock):
    args, lrates = simulate(clock, None, lambda step: 0.1)
    assert len(lrates) == 3000 and (args.lrate_decay, args.i_testset, args.i_video) == (2, 1000, 1000)


def test_outputs_that_would_take_too_long_are_left_out(clock):
    said = []
    args, _ = simulate(clock, 1, lambda step: 0.05, num_frames=1000, say=said.append)
    assert args.i_video == NEVER and args.i_testset == args.N_iters
    assert 'then test views in 6 s; no video: 4' in said[0] and clock[0] == pytest.approx(60, rel=0.05)


def test_more_minutes_continue_a_run(clock):
    args, lrates = simulate(clock, 3, lambda step: 0.05, state={'seconds': 60.0}, start=800)
    assert clock[0] == pytest.approx(120, rel=0.05)
    assert args.N_iters == 800 + len(lrates) > 1500
    # the first rate is that of a third of the way
    assert lrates[0] == pytest.approx(0.01 * 0.1 ** (1.5 / 3), rel=0.05)
    args, lrates = simulate(clock, 3, lambda step: 0.05, state={'seconds': 181.0}, start=3000)
    assert args.N_iters == args.i_video == args.i_testset == 3000 and not lrates


def test_runs_with_minutes(tmp_path, capsys, monkeypatch):
    words = [*FAST_DEMO, '--basedir', tmp_path, '--testskip', 8]
    done = []
    monkeypatch.setattr('training.time_plan.IMPORT_SECONDS', 0.0)
    for minutes in (0.08, 0.16):
        assert run(*words, '--minutes', minutes) == 0
        state = read_checkpoint(max((tmp_path / 'demo_fast').glob('*.tar')))
        done.append(state['steps_done'])
        assert state['args']['N_iters'] == done[-1]
        assert (tmp_path / f'demo_fast/demo_fast_spiral_{done[-1]:06d}_rgb.mp4').exists()
    assert done[0] < done[1]
    output = capsys.readouterr()
    assert 'nothing to do' not in output.out and 'options differ' not in output.err
