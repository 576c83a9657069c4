"""Runs survive kills, signals, full disks, collapsed networks and numbers that are not finite."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny_runs import (
    NO_OUTPUTS,
    ROOT,
    TINY,
    assert_killed_and_resumed_is_undisturbed,
    assert_same_parameters,
    finish,
    read_state,
    run,
    start,
    wait_for,
)

import run_nerf
from training.checkpoints import load_newest, read_checkpoint

slow = pytest.mark.slow


def endless_path(folder):
    """A file with more camera poses than any test renders."""
    poses = np.tile(np.eye(4), (100000, 1, 1))
    poses[:, 2, 3] = 4
    np.save(folder / 'path.npy', poses)
    return folder / 'path.npy'


# --- kills --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [
    ['--precrop_iters', 30], pytest.param(['--no_batching'], marks=slow),
    pytest.param(['--no-no_batching'], marks=slow)])
def test_killed_and_resumed_is_bit_equal_to_undisturbed(tmp_path, options):
    assert_killed_and_resumed_is_undisturbed(tmp_path, *TINY, *options)


@slow
def test_kills_at_random_moments(tmp_path):
    """Every start resumes from the newest checkpoint, every file with a final name can be read, and in the
    end the parameters are those of a run that was never disturbed."""
    folder, moments, last = tmp_path / 'killed/demo', random.Random(0), 0
    args = [*TINY, '--i_weights', 3, '--i_img', 4, '--i_testset', 10, '--i_video', 50]
    for _ in range(15):
        process = start(*args, '--basedir', tmp_path / 'killed', '--N_iters', 100000)
        wait_for(folder / f'{last + 3:06d}.tar', process)
        time.sleep(moments.random())
        process.kill()
        output = process.communicate()[0]
        assert (f'resumes after step {last}' if last else 'a new run') in output
        path, state = load_newest(folder)
        assert path.stem == f'{state["global_step"]:06d}' and state['global_step'] >= last + 3
        last = state['global_step']
        assert {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()} == {last}
    assert not list(folder.glob('*.damaged'))
    for path in folder.rglob('[0-9a-z]*'):
        if path.suffix == '.png':
            iio.imread(path)
        elif path.suffix == '.json':
            json.loads(path.read_text(encoding='utf-8'))
        elif path.suffix == '.tar':
            read_checkpoint(path)
        elif path.suffix == '.mp4':
            assert len(iio.imread(path, plugin='FFMPEG')) == 40
    code, output = finish(start(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / 'whole', '--N_iters', last))
    assert code == 0, output
    assert_same_parameters(tmp_path / f'whole/demo/{last:06d}.tar', folder / f'{last:06d}.tar')


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    folder = tmp_path / 'demo'
    (folder / 'testset_000010').mkdir(parents=True)
    for name in ('.000003.part.tar', 'testset_000010/.001.part.png'):
        (folder / name).write_text('half')
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 1) == 0
    assert not list(folder.rglob('*.part*'))


# --- resuming -----------------------------------------------------------------------------------------------

def test_a_run_resumes_from_the_newest_intact_checkpoint(two_steps, tmp_path, capsys):
    (tmp_path / 'demo').mkdir()
    shutil.copy(two_steps / '000001.tar', tmp_path / 'demo')
    (tmp_path / 'demo/000002.tar').write_bytes(b'')
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 3) == 0
    printed = capsys.readouterr()
    assert '000002.tar.damaged' in printed.err and 'resumes after step 1' in printed.out


def test_options_that_differ_are_named(two_steps, capsys, tmp_path):
    assert run(*TINY, *NO_OUTPUTS, '--ft_path', two_steps / '000002.tar', '--basedir', tmp_path,
               '--N_iters', 3, '--N_rand', 32) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'differ' in line]
    assert 'N_rand 32 (was 64)' in line and 'N_iters' not in line


def test_missing_outputs_of_the_last_step_are_made(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / 'demo')
    np.save(tmp_path / 'path.npy', np.load(endless_path(tmp_path))[:2])
    assert run(*TINY, '--basedir', tmp_path, '--N_iters', 2, '--i_testset', 2, '--i_video', 1, '--i_img', 10,
               '--render_poses', tmp_path / 'path.npy') == 0
    assert (tmp_path / 'demo/testset_000002/metrics.json').is_file()
    assert (tmp_path / 'demo/demo_spiral_000002_disp.mp4').is_file()


def test_lpips_does_not_change_the_random_numbers_of_training(tmp_path, monkeypatch):
    """Its network is initialised at random in the middle of a run; a stand-in for the package does that
    too."""
    (tmp_path / 'lpips.py').write_text('import torch\n\n\nclass LPIPS(torch.nn.Conv2d):\n'
                                       '    def __init__(self, net, verbose):\n'
                                       '        super().__init__(3, 1, 3)\n\n'
                                       '    def forward(self, x, y):\n'
                                       '        return super().forward(x - y).mean()\n')
    for name, path in (('without', None), ('with', tmp_path)):
        if path:
            monkeypatch.syspath_prepend(path)
        assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / name, '--N_iters', 8, '--i_testset', 4) == 0
    assert_same_parameters(tmp_path / 'without/demo/000008.tar', tmp_path / 'with/demo/000008.tar')
    metrics = json.loads((tmp_path / 'with/demo/testset_000008/metrics.json').read_text(encoding='utf-8'))
    assert metrics['mean']['lpips'] is not None


# --- signals ------------------------------------------------------------------------------------------------

both_signals = pytest.mark.parametrize('number, code', [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=slow)])


@both_signals
def test_the_first_signal_saves_and_ends_the_run(tmp_path, number, code):
    process = start(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 10 ** 6, '--i_weights', 5)
    wait_for(tmp_path / 'demo/000005.tar', process)
    process.send_signal(number)
    exit_code, output = finish(process)
    assert exit_code == code and 'Traceback' not in output
    path, _ = load_newest(tmp_path / 'demo')
    assert str(path) in output and number.name in output
    assert not list(tmp_path.rglob('*.part*'))


@both_signals
def test_a_signal_ends_rendering_without_a_traceback(two_steps, tmp_path, number, code):
    process = start('--render_only', '--ft_path', two_steps / '000002.tar', '--basedir', tmp_path,
                    '--render_poses', endless_path(tmp_path), '--device', 'cpu')
    wait_for(tmp_path / 'demo/renderonly_path_000002/003.png', process)
    process.send_signal(number)
    exit_code, output = finish(process)
    assert exit_code == code and 'Traceback' not in output
    assert not list(tmp_path.rglob('*.part*'))


@slow
def test_a_signal_abandons_a_video(tmp_path):
    process = start(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 100, '--i_weights', 100,
                    '--i_video', 2, '--render_poses', endless_path(tmp_path))
    wait_for(tmp_path / f'demo/.demo_spiral_000002_rgb.part{process.pid}.mp4', process)
    process.send_signal(signal.SIGINT)
    exit_code, output = finish(process)
    assert exit_code == 130 and (tmp_path / 'demo/000002.tar').is_file(), output
    assert not list(tmp_path.rglob('*.mp4'))


# --- disks and consoles -------------------------------------------------------------------------------------

@slow
def test_training_ends_normally_where_no_file_may_grow(tmp_path):
    """A size limit stands for the full disk: neither checkpoint nor video fits."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    process = start(*TINY, '--basedir', tmp_path, '--N_iters', 12, '--i_weights', 4, '--i_img', 4,
                    '--i_testset', 6, '--i_video', 12, preexec_fn=limit)
    code, output = finish(process)
    assert code == 0 and 'Traceback' not in output, output
    assert '000004.tar: not written' in output and 'training continues' in output
    assert '12 steps done' in output and 'NOT SAVED' in output
    assert not list(tmp_path.rglob('*.tar')) and not list(tmp_path.rglob('*.part*'))
    assert all(len(iio.imread(path, plugin='FFMPEG')) == 40 for path in tmp_path.rglob('*.mp4'))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no right to mount a disk')
    yield disk
    subprocess.run(['umount', disk], check=True)


@slow
def test_training_on_a_disk_that_fills(small_disk):
    code, output = finish(start(*TINY, '--basedir', small_disk, '--N_iters', 60, '--i_weights', 4,
                                '--i_img', 5, '--i_testset', 20, '--i_video', 60))
    assert code == 0 and 'Traceback' not in output, output
    assert 'not written' in output and 'No space left' in output and '60 steps done' in output
    assert not list(small_disk.rglob('*.part*'))
    checkpoints = sorted(small_disk.rglob('*.tar'))
    assert checkpoints and all(read_checkpoint(path) for path in checkpoints)
    for path in small_disk.rglob('*.png'):
        iio.imread(path)


def test_an_output_that_fails_does_not_end_training(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('training.outputs.write_image', fail)
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 4, '--i_testset', 2) == 0
    out = capsys.readouterr().out
    assert out.count('testset_00000') == 2 and '4 steps done' in out


@pytest.mark.parametrize('stdout', [pytest.param('/dev/full', marks=slow), 'closed pipe'])
def test_training_survives_the_loss_of_its_console(tmp_path, stdout):
    if stdout == '/dev/full' and not os.path.exists(stdout):
        pytest.skip('no such device')
    command = [sys.executable, str(ROOT / 'run_nerf.py'), *map(str, TINY), *map(str, NO_OUTPUTS),
               '--basedir', str(tmp_path), '--N_iters', '30', '--i_print', '1']
    if stdout == '/dev/full':
        with open(stdout, 'wb') as full:
            code = subprocess.run(command, stdout=full, timeout=120).returncode
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(120)
    assert code == 0 and (tmp_path / 'demo/000030.tar').is_file()
    assert 'step 30/30' in (tmp_path / 'demo/log.txt').read_text(encoding='utf-8')


# --- collapsed networks -------------------------------------------------------------------------------------

# Runs in which collapsed networks are restarted, and others learn quickly.
RESTARTING = [*[option for option in TINY if option != '--no_restart'], '--raw_noise_std', 0, '--lrate', 3e-3,
              '--N_rand', 128, '--white_bkgd', *NO_OUTPUTS]


@pytest.fixture(scope='module')
def first_step(tmp_path_factory):
    """A checkpoint after one step."""
    basedir = tmp_path_factory.mktemp('first_step')
    assert run(*RESTARTING, '--basedir', basedir, '--N_iters', 1) == 0
    return basedir / 'demo/000001.tar'


def kill_density(source, target, network):
    """Copy a checkpoint, with a network's density far below zero everywhere."""
    state = read_state(source)
    state[network]['alpha_linear.bias'].fill_(-1000.0)
    torch.save(state, target)


def psnr_after_1500_steps(basedir, path):
    assert run(*RESTARTING, '--basedir', basedir, '--N_iters', 1500, '--i_print', 800, '--ft_path', path,
               '--i_testset', 1500) == 0
    return json.loads((basedir / 'demo/testset_001500/metrics.json').read_bytes())['mean']['psnr']


@pytest.fixture(scope='module')
def healthy_psnr(first_step, tmp_path_factory):
    """What training reaches without a collapse."""
    return psnr_after_1500_steps(tmp_path_factory.mktemp('healthy'), first_step)


@slow
@pytest.mark.parametrize('network, name', [('network_fn_state_dict', 'coarse'),
                                           ('network_fine_state_dict', 'fine')])
def test_a_collapsed_network_is_restarted_and_learns(first_step, healthy_psnr, tmp_path, capsys, network,
                                                     name):
    kill_density(first_step, tmp_path / 'dead.tar', network)
    psnr = psnr_after_1500_steps(tmp_path, tmp_path / 'dead.tar')
    out = capsys.readouterr().out
    assert f'the {name} network shows nothing but the background; it starts again with seed' in out
    assert int(out.split(': the ')[0].split('step ')[-1]) <= 1000
    assert psnr > healthy_psnr - 1.0 and psnr > 15
    assert read_state(tmp_path / 'demo/001500.tar')['safeguards_state_dict']['restarts'] >= 1
    assert 'starts again' in (tmp_path / 'demo/log.txt').read_text(encoding='utf-8')


@slow
def test_slow_learners_are_left_alone(tmp_path, capsys):
    """A small learning rate on a black background: no better than the background for long, but improving."""
    options = ['--no-white_bkgd', '--lrate', 1e-4, '--raw_noise_std', 1]
    assert run(*RESTARTING, *options, '--basedir', tmp_path, '--N_iters', 1600) == 0
    assert 'starts again' not in capsys.readouterr().out


@slow
def test_a_small_object_in_a_large_image_is_left_alone(tmp_path, capsys):
    """An object of a few pixels on white is not the same as nothing."""
    scene = tmp_path / 'scene'
    shutil.copytree(ROOT / 'data/demo', scene)
    for path in scene.rglob('*.png'):
        image = iio.imread(path)
        image[:60], image[68:], image[:, :60], image[:, 68:] = 0, 0, 0, 0
        iio.imwrite(path, image)
    assert run(*RESTARTING, '--datadir', scene, '--lrate', 5e-4, '--basedir', tmp_path,
               '--N_iters', 1200) == 0
    assert 'starts again' not in capsys.readouterr().out


@pytest.mark.parametrize('options, restarts', [([], 2 * 3), (['--no_restart'], 0)])
def test_networks_are_restarted_unless_the_options_say_otherwise(tmp_path, monkeypatch, capsys, options,
                                                                 restarts):
    monkeypatch.setattr('training.safeguards.CollapseWatch.update', lambda *_: True)
    assert run(*RESTARTING, '--basedir', tmp_path, '--N_iters', 10, *options) == 0
    assert capsys.readouterr().out.count('starts again') == restarts


@slow
def test_no_restart_leaves_a_collapsed_network_alone(first_step, tmp_path, capsys):
    kill_density(first_step, tmp_path / 'dead.tar', 'network_fine_state_dict')
    assert run(*RESTARTING, '--basedir', tmp_path, '--N_iters', 260, '--ft_path', tmp_path / 'dead.tar',
               '--no_restart') == 0
    assert 'starts again' not in capsys.readouterr().out


# --- steps that are not finite ------------------------------------------------------------------------------

def make_bad(monkeypatch, steps):
    """Let the loss of these steps, counted from the start of a run, be NaN."""
    calls, original = iter(range(1, 10 ** 6)), run_nerf.nerf_losses

    def nerf_losses(*args):
        losses = original(*args)
        if next(calls) in steps:
            losses['fine'] = losses['fine'] * float('nan')
        return losses
    monkeypatch.setattr(run_nerf, 'nerf_losses', nerf_losses)


def optimizer_steps(state):
    return {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()}


def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch, capsys):
    make_bad(monkeypatch, {3, 5, 6})
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 8) == 0
    state = read_state(tmp_path / 'demo/000008.tar')
    assert state['safeguards_state_dict']['bad_steps'] == 3
    assert capsys.readouterr().out.count('not finite') == 3
    assert optimizer_steps(state) == {5}
    for network in ('network_fn_state_dict', 'network_fine_state_dict'):
        assert all(torch.isfinite(value).all() for value in state[network].values())


@pytest.mark.parametrize('i_weights, back_to, updates', [(4, '000004.tar', 4 + 5), (100, 'new networks', 5)])
def test_after_ten_bad_steps_training_rolls_back_once(tmp_path, monkeypatch, capsys, i_weights, back_to,
                                                      updates):
    """Back to the newest checkpoint, at a tenth of the learning rate. The step number is not rolled back."""
    make_bad(monkeypatch, set(range(6, 16)))
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 20, '--i_weights', i_weights,
               '--i_print', 1) == 0
    out = capsys.readouterr().out
    place = tmp_path / 'demo' / back_to if i_weights == 4 else back_to
    assert f'back to {place}, with a tenth of the learning rate' in out and '20 steps done' in out
    steps = [int(line.split('/')[0].removeprefix('step ')) for line in out.splitlines()
             if line.startswith('step ')]
    assert steps == list(range(1, 21))
    state = read_state(tmp_path / 'demo/000020.tar')
    assert state['safeguards_state_dict']['rollbacks'] == 1 and optimizer_steps(state) == {updates}
    assert state['optimizer_state_dict']['param_groups'][0]['lr'] < 1.2e-3  # a tenth of 1.2e-2


def test_training_that_cannot_continue_says_so(tmp_path, monkeypatch, capsys):
    make_bad(monkeypatch, set(range(6, 1000)))
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 100, '--i_weights', 4) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--lrate' in err


def test_training_rolls_back_only_to_checkpoints_of_this_run(two_steps, tmp_path, monkeypatch, capsys):
    """Not to one that an earlier run left in the folder; but to the one that this run started from."""
    (tmp_path / 'demo').mkdir()
    shutil.copy(two_steps / '000002.tar', tmp_path / 'demo/000050.tar')
    make_bad(monkeypatch, set(range(3, 13)))
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 12, '--no_reload') == 0
    assert 'back to new networks' in capsys.readouterr().out
    make_bad(monkeypatch, set(range(3, 13)))
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / 'other', '--N_iters', 15,
               '--ft_path', two_steps / '000002.tar') == 0
    assert f'back to {two_steps / "000002.tar"}' in capsys.readouterr().out
