"""Runs survive: kills, damaged files, full disks, signals, collapse, numbers that are not finite."""
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
from conftest import ROOT
from test_render import HWF, K, chain

import run_nerf
from checkpoints import load_newest, read_checkpoint
from outputs import ENCODERS, SINGLE_FRAMES, FrameFolder, frames_mark, open_video, probe_encoder, video_path
from run_nerf import main, render_frames, render_path

TINY = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--netdepth', 2,
        '--netwidth', 16, '--netdepth_fine', 2, '--netwidth_fine', 16, '--N_rand', 64, '--N_samples', 8,
        '--N_importance', 8, '--testskip', 8, '--device', 'cpu', '--raw_noise_std', 0.5, '--no_restart']
NEVER = ['--i_img', 10 ** 6, '--i_testset', 10 ** 6, '--i_video', 10 ** 6]


def run(*args):
    return main([str(arg) for arg in args])


def start(*args, **options):
    """A real process of the script, its output to be read from a pipe."""
    return subprocess.Popen([sys.executable, str(ROOT / 'run_nerf.py'), *map(str, args)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **options)


def finish(process, timeout=120):
    """Exit code and output of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for(path, process, timeout=60):
    for _ in range(timeout * 100):
        if path.exists():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f'{path} did not come')


def parameters(path):
    state = torch.load(path, weights_only=True)
    return {f'{network}.{key}': value for network in ('network_fn_state_dict', 'network_fine_state_dict')
            for key, value in state[network].items()}


def assert_same_parameters(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- kills ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [['--no-no_batching'], ['--no_batching'], ['--precrop_iters', 30]])
def test_killed_and_resumed_is_bit_equal_to_undisturbed(tmp_path, options):
    args = [*TINY, *NEVER, '--N_iters', 60, '--i_weights', 20, *options]
    code, output = finish(start(*args, '--basedir', tmp_path / 'whole'))
    assert code == 0, output
    process = start(*args, '--basedir', tmp_path / 'parts')
    wait_for(tmp_path / 'parts/demo/000020.tar', process)
    process.kill()
    process.communicate()
    for path in (tmp_path / 'parts/demo').glob('0000[46]0.tar'):  # the process may have been quick
        path.unlink()
    code, output = finish(start(*args, '--basedir', tmp_path / 'parts'))
    assert code == 0 and 'goes on after step 20' in output, output
    assert_same_parameters(tmp_path / 'whole/demo/000060.tar', tmp_path / 'parts/demo/000060.tar')


def test_25_kills_at_random_moments(tmp_path):
    """Every start goes on from the newest checkpoint, every file with a final name can be read, and in the end the
    parameters are those of a run that was never disturbed."""
    folder, moments, last = tmp_path / 'killed/demo', random.Random(0), 0
    args = [*TINY, '--i_weights', 3, '--i_img', 4, '--i_testset', 10, '--i_video', 50]
    for _ in range(25):
        process = start(*args, '--basedir', tmp_path / 'killed', '--N_iters', 100000)
        wait_for(folder / f'{last + 3:06d}.tar', process)
        time.sleep(moments.random())
        process.kill()
        output = process.communicate()[0]
        assert (f'goes on after step {last}' if last else 'a new run') in output
        path, state = load_newest(folder)
        assert path.stem == f'{state["global_step"]:06d}' and state['global_step'] >= last + 3
        last = state['global_step']
        assert {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()} == {last}
    assert not list(folder.glob('*.damaged'))
    for path in folder.rglob('[0-9a-z]*'):
        if path.suffix == '.png':
            iio.imread(path)
        elif path.suffix == '.json':
            json.loads(path.read_text())
        elif path.suffix == '.tar':
            read_checkpoint(path)
        elif path.suffix == '.mp4':
            assert len(iio.imread(path, plugin='FFMPEG')) == 40
    code, output = finish(start(*args[:-6], *NEVER, '--basedir', tmp_path / 'whole', '--N_iters', last))
    assert code == 0, output
    assert_same_parameters(tmp_path / f'whole/demo/{last:06d}.tar', folder / f'{last:06d}.tar')


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    folder = tmp_path / 'demo'
    (folder / 'testset_000010').mkdir(parents=True)
    for name in ('.000003.part.tar', 'testset_000010/.001.part.png'):
        (folder / name).write_text('half')
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 1) == 0
    assert not list(folder.rglob('*.part*'))


# --- damaged checkpoints ----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    basedir = tmp_path_factory.mktemp('saved')
    assert run(*TINY, *NEVER, '--basedir', basedir, '--N_iters', 2, '--i_weights', 1) == 0
    return basedir / 'demo'


def damage(saved, tmp_path, content):
    for name in ('000001.tar', '000002.tar'):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / '000002.tar').write_bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('place', range(20))
def test_truncated_checkpoint(saved, tmp_path, place):
    content = (saved / '000002.tar').read_bytes()
    damage(saved, tmp_path, content[:place * len(content) // 20])
    path, state = load_newest(tmp_path)
    assert path.name == '000001.tar' and state['global_step'] == 1
    assert (tmp_path / '000002.tar.damaged').is_file() and not (tmp_path / '000002.tar').exists()


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('seed', range(20))
def test_flipped_byte(saved, tmp_path, seed):
    """Either it is noticed, or it stands where nothing is read from (padding, names of the zip)."""
    content = bytearray((saved / '000002.tar').read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 0x10
    damage(saved, tmp_path, bytes(content))
    path, _ = load_newest(tmp_path)
    if path.name == '000002.tar':
        assert_same_parameters(path, saved / '000002.tar')
    else:
        assert (tmp_path / '000002.tar.damaged').is_file()


def test_a_run_goes_on_from_the_one_before(saved, tmp_path, capsys):
    (tmp_path / 'demo').mkdir()
    damage(saved, tmp_path / 'demo', b'')
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 3) == 0
    printed = capsys.readouterr()
    assert '000002.tar.damaged' in printed.err and 'goes on after step 1' in printed.out


def test_options_that_differ_are_named(saved, capsys, tmp_path):
    assert run(*TINY, *NEVER, '--ft_path', saved / '000002.tar', '--basedir', tmp_path, '--N_iters', 3, '--N_rand', 32) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'differ' in line]
    assert 'N_rand 32 (was 64)' in line and 'N_iters' not in line


# --- signals ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_saves_and_leaves(tmp_path, number, code):
    process = start(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 10 ** 6, '--i_weights', 5)
    wait_for(tmp_path / 'demo/000005.tar', process)
    process.send_signal(number)
    exit_code, output = finish(process)
    assert exit_code == code and 'Traceback' not in output
    path, _ = load_newest(tmp_path / 'demo')
    assert str(path) in output and number.name in output
    assert not list(tmp_path.rglob('*.part*'))


def test_a_signal_gives_up_a_video(tmp_path):
    poses = np.tile(np.eye(4), (100000, 1, 1))
    poses[:, 2, 3] = 4
    np.save(tmp_path / 'path.npy', poses)
    process = start(*TINY, '--basedir', tmp_path, '--N_iters', 100, '--i_weights', 100, '--i_video', 2, '--i_img', 10 ** 6,
                    '--i_testset', 10 ** 6, '--render_poses', tmp_path / 'path.npy')
    wait_for(tmp_path / 'demo/.demo_spiral_000002_rgb.part.mp4', process)
    process.send_signal(signal.SIGINT)
    exit_code, output = finish(process)
    assert exit_code == 130 and (tmp_path / 'demo/000002.tar').is_file(), output
    assert not list(tmp_path.rglob('*.mp4'))


def test_second_signal_ends_at_once(tmp_path):
    """While an output is made that does not listen (the first signal is held back), the second one ends the process."""
    script = ("import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); from signals import StopRequest\n"
              "with StopRequest(print) as stop:\n"
              "    stop.interruptible = False\n"
              "    os.kill(os.getpid(), signal.SIGTERM); print(stop.signal, flush=True)\n"
              "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n")
    done = subprocess.run([sys.executable, '-c', script, str(ROOT)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 130 and '15' in done.stdout


# --- disks ------------------------------------------------------------------------------------------------------

def test_training_ends_normally_where_no_file_may_grow(tmp_path):
    """A size limit stands for the full disk: neither checkpoint nor video fits."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    process = start(*TINY, '--basedir', tmp_path, '--N_iters', 12, '--i_weights', 4, '--i_img', 4, '--i_testset', 6,
                    '--i_video', 12, preexec_fn=limit)
    code, output = finish(process)
    assert code == 0 and 'Traceback' not in output, output
    assert '000004.tar: not written' in output and 'training goes on' in output and '12 steps done' in output
    assert 'NOT SAVED' in output
    assert not list(tmp_path.rglob('*.tar')) and not list(tmp_path.rglob('*.part*'))
    assert all(len(iio.imread(path, plugin='FFMPEG')) == 40 for path in tmp_path.rglob('*.mp4'))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('no right to mount a disk')
    yield disk
    subprocess.run(['umount', disk], check=True)


def test_training_on_a_disk_that_fills(small_disk):
    code, output = finish(start(*TINY, '--basedir', small_disk, '--N_iters', 60, '--i_weights', 4, '--i_img', 5,
                                '--i_testset', 20, '--i_video', 60))
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
    monkeypatch.setattr('outputs.write_image', fail)
    assert run(*TINY, '--basedir', tmp_path, '--N_iters', 4, '--i_testset', 2, '--i_img', 10, '--i_video', 100) == 0
    out = capsys.readouterr().out
    assert out.count('testset_00000') == 2 and '4 steps done' in out


@pytest.mark.parametrize('refused, expected', [('libx264', 'MPEG-4'), ('', 'GIF')])
def test_without_h264_another_way_is_found(tmp_path, monkeypatch, refused, expected):
    """An ffmpeg that refuses a codec, and one that refuses everything."""
    import imageio_ffmpeg
    fake = tmp_path / 'ffmpeg'
    fake.write_text(f'#!/bin/sh\ncase "$*" in *"{refused}"*) exit 1;; esac\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(fake))
    encoder = probe_encoder()
    assert encoder.name == expected
    with open_video(tmp_path / 'video', encoder) as add:
        for shade in np.linspace(0, 1, 5):
            add(np.full((33, 47, 3), shade))
    assert video_path(tmp_path / 'video', encoder).stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ffmpeg', f'video{encoder.suffix}']


def test_single_frames_where_nothing_encodes(tmp_path, monkeypatch):
    monkeypatch.setattr('imageio.get_writer', None)
    assert probe_encoder() == SINGLE_FRAMES
    with open_video(tmp_path / 'video', SINGLE_FRAMES) as add:
        add(np.zeros((4, 4, 3)))
    assert [path.name for path in (tmp_path / 'video').iterdir()] == ['000.png']


@pytest.mark.parametrize('encoder', ENCODERS[:3], ids=lambda encoder: encoder.name)
def test_a_video_given_up_leaves_nothing(tmp_path, encoder):
    with pytest.raises(KeyError), open_video(tmp_path / 'video', encoder) as add:
        add(np.zeros((16, 16, 3)))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# --- health -----------------------------------------------------------------------------------------------------

HEALTHY = [*TINY[:-3], '--raw_noise_std', 0, '--lrate', 3e-3, '--N_rand', 128, '--white_bkgd', *NEVER]


def kill_density(source, target, network):
    """A copy of a checkpoint in which a network's density is far below zero everywhere."""
    state = torch.load(source, weights_only=True)
    state[network]['alpha_linear.bias'].fill_(-1000.0)
    torch.save(state, target)


@pytest.mark.parametrize('network, name', [('network_fn_state_dict', 'coarse'), ('network_fine_state_dict', 'fine')])
def test_a_dead_network_is_found_and_starts_again(tmp_path, capsys, network, name):
    assert run(*HEALTHY, '--basedir', tmp_path / 'first', '--N_iters', 1) == 0
    kill_density(tmp_path / 'first/demo/000001.tar', tmp_path / 'dead.tar', network)
    psnrs = {}
    for path in (tmp_path / 'first/demo/000001.tar', tmp_path / 'dead.tar'):
        capsys.readouterr()
        assert run(*HEALTHY, '--basedir', tmp_path / path.stem, '--N_iters', 1500, '--i_print', 800, '--ft_path', path,
                   '--i_testset', 1500) == 0
        out = capsys.readouterr().out
        metrics = json.loads((tmp_path / path.stem / 'demo/testset_001500/metrics.json').read_text())
        psnrs[path.stem] = metrics['mean']['psnr']
    assert f'the {name} network shows nothing but the background; it starts again with seed' in out
    assert int(out.split(': the ')[0].split('step ')[-1]) <= 1000
    assert psnrs['dead'] > psnrs['000001'] - 1.0 and psnrs['dead'] > 15
    state = torch.load(tmp_path / 'dead/demo/001500.tar', weights_only=True)
    assert state['health']['restarts'] >= 1
    assert 'starts again' in (tmp_path / 'dead/demo/log.txt').read_text()


def test_slow_learners_are_left_alone(tmp_path, capsys):
    """A small learning rate on a black background: for long no better than the background, but on its way."""
    options = ['--no-white_bkgd', '--lrate', 1e-4, '--raw_noise_std', 1]
    assert run(*HEALTHY, *options, '--basedir', tmp_path, '--N_iters', 1600) == 0
    assert 'starts again' not in capsys.readouterr().out


def test_a_small_thing_in_a_large_picture_is_left_alone(tmp_path, capsys):
    """An object of a few pixels on white: nearly nothing to see is not nothing."""
    scene = tmp_path / 'scene'
    shutil.copytree(ROOT / 'data/demo', scene)
    for path in scene.rglob('*.png'):
        image = iio.imread(path)
        image[:60], image[68:], image[:, :60], image[:, 68:] = 0, 0, 0, 0
        iio.imwrite(path, image)
    assert run(*HEALTHY, '--datadir', scene, '--lrate', 5e-4, '--basedir', tmp_path, '--N_iters', 1200) == 0
    assert capsys.readouterr().out.count('starts again') <= 1  # a network may really die


def test_restarts_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('health.CollapseWatch.collapsed', lambda *_: True)
    assert run(*HEALTHY, '--basedir', tmp_path, '--N_iters', 10) == 0
    assert capsys.readouterr().out.count('starts again') == 2 * 3


def test_outputs_of_the_last_step_that_are_missing_are_made(tmp_path):
    assert run(*TINY, '--basedir', tmp_path, '--N_iters', 4, *NEVER) == 0
    assert run(*TINY, '--basedir', tmp_path, '--N_iters', 4, '--i_testset', 4, '--i_video', 2, '--i_img', 10) == 0
    assert (tmp_path / 'demo/testset_000004/metrics.json').is_file()
    assert (tmp_path / 'demo/demo_spiral_000004_disp.mp4').is_file()


@pytest.mark.parametrize('stdout', ['/dev/full', 'closed pipe'])
def test_a_console_that_is_gone_does_not_end_training(tmp_path, stdout):
    if stdout == '/dev/full' and not os.path.exists(stdout):
        pytest.skip('no such device')
    command = [sys.executable, str(ROOT / 'run_nerf.py'), *map(str, TINY), *map(str, NEVER), '--basedir', str(tmp_path),
               '--N_iters', '30', '--i_print', '1']
    if stdout == '/dev/full':
        with open(stdout, 'w') as full:
            code = subprocess.run(command, stdout=full, timeout=120).returncode
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(120)
    assert code == 0 and (tmp_path / 'demo/000030.tar').is_file()
    assert 'step 30/30' in (tmp_path / 'demo/log.txt').read_text()


def test_lpips_does_not_disturb_what_training_draws(tmp_path, monkeypatch):
    """Its network is built in the middle of a run, from random numbers; a stand-in for the package does that too."""
    (tmp_path / 'lpips.py').write_text('import torch\n\n\nclass LPIPS(torch.nn.Conv2d):\n'
                                       '    def __init__(self, net, verbose):\n        super().__init__(3, 1, 3)\n\n'
                                       '    def forward(self, x, y):\n        return super().forward(x - y).mean()\n')
    for name, path in (('without', None), ('with', tmp_path)):
        if path:
            monkeypatch.syspath_prepend(path)
        assert run(*TINY, '--basedir', tmp_path / name, '--N_iters', 8, '--i_testset', 4, '--i_video', 100) == 0
    assert_same_parameters(tmp_path / 'without/demo/000008.tar', tmp_path / 'with/demo/000008.tar')
    metrics = json.loads((tmp_path / 'with/demo/testset_000008/metrics.json').read_text())
    assert metrics['mean']['lpips'] is not None


def test_going_back_stays_with_this_run(tmp_path, monkeypatch, capsys):
    """Not to a checkpoint that an earlier run left in the folder; to the one that this run started from."""
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 50) == 0
    assert run(*TINY, *NEVER, '--basedir', tmp_path / 'other', '--N_iters', 3) == 0
    not_finite_at(monkeypatch, set(range(3, 13)))
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 12, '--no_reload') == 0
    assert 'back to the start' in capsys.readouterr().out
    not_finite_at(monkeypatch, set(range(3, 13)))
    assert run(*TINY, *NEVER, '--basedir', tmp_path / 'third', '--N_iters', 16,
               '--ft_path', tmp_path / 'other/demo/000003.tar') == 0
    assert f'back to {tmp_path / "other/demo/000003.tar"}' in capsys.readouterr().out


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_rendering_without_a_traceback(saved, tmp_path, number, code):
    poses = np.tile(np.eye(4), (100000, 1, 1))
    poses[:, 2, 3] = 4
    np.save(tmp_path / 'path.npy', poses)
    process = start('--render_only', '--ft_path', saved / '000002.tar', '--basedir', tmp_path, '--render_poses',
                    tmp_path / 'path.npy', '--device', 'cpu')
    wait_for(tmp_path / 'demo/renderonly_path_000002/003.png', process)
    process.send_signal(number)
    exit_code, output = finish(process)
    assert exit_code == code and 'Traceback' not in output
    assert not list(tmp_path.rglob('*.part*'))


def test_no_restart_leaves_it_alone(tmp_path, capsys):
    assert run(*HEALTHY, '--basedir', tmp_path / 'first', '--N_iters', 1) == 0
    kill_density(tmp_path / 'first/demo/000001.tar', tmp_path / 'dead.tar', 'network_fine_state_dict')
    assert run(*HEALTHY, '--basedir', tmp_path, '--N_iters', 260, '--ft_path', tmp_path / 'dead.tar', '--no_restart') == 0
    assert 'starts again' not in capsys.readouterr().out


def not_finite_at(monkeypatch, steps):
    """Let the loss be NaN at these calls of the training step."""
    calls = iter(range(1, 10 ** 6))
    original = run_nerf.network_outputs

    def spoiled(*args):
        errors, opacities = original(*args)
        if next(calls) in steps:
            errors = errors * torch.tensor([1, float('nan')])
        return errors, opacities
    monkeypatch.setattr(run_nerf, 'network_outputs', spoiled)


def test_a_step_that_is_not_finite_is_left_out(tmp_path, monkeypatch, capsys):
    not_finite_at(monkeypatch, {3, 5, 6})
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 8) == 0
    state = torch.load(tmp_path / 'demo/000008.tar', weights_only=True)
    assert state['health']['bad_steps'] == 3 and capsys.readouterr().out.count('not finite') == 3
    assert {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()} == {5}
    assert all(torch.isfinite(value).all() for value in parameters(tmp_path / 'demo/000008.tar').values())


@pytest.mark.parametrize('i_weights, back_to', [(4, '000004.tar'), (100, 'the start')])
def test_ten_in_a_row_go_back_once_with_a_smaller_rate(tmp_path, monkeypatch, capsys, i_weights, back_to):
    not_finite_at(monkeypatch, set(range(6, 16)))
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 20, '--i_weights', i_weights) == 0
    out = capsys.readouterr().out
    assert f'back to {tmp_path / "demo" / back_to if i_weights == 4 else back_to}' in out and '20 steps done' in out
    state = torch.load(tmp_path / 'demo/000020.tar', weights_only=True)
    assert state['health']['returns'] == 1
    assert state['optimizer_state_dict']['param_groups'][0]['lr'] < 1.2e-3  # a tenth of 1.2e-2


def test_training_that_cannot_go_on_says_so(tmp_path, monkeypatch, capsys):
    not_finite_at(monkeypatch, set(range(6, 1000)))
    assert run(*TINY, *NEVER, '--basedir', tmp_path, '--N_iters', 100, '--i_weights', 4) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--lrate' in err


# --- rendering --------------------------------------------------------------------------------------------------

def test_out_of_memory_halves_the_chunk(monkeypatch):
    pose, original, chunks = np.eye(4)[None], run_nerf.render, []

    def small_gpu(*args, chunk, **kwargs):
        chunks.append(chunk)
        if chunk > 1000:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return original(*args, chunk=chunk, **kwargs)
    expected = next(render_frames(pose, HWF, K, 4000, chain()))
    monkeypatch.setattr(run_nerf, 'render', small_gpu)
    with pytest.warns(UserWarning, match='out of memory'):
        frame, _ = render_frames(pose.repeat(2, 0), HWF, K, 4000, chain())
    assert chunks == [4000, 2000, 1000, 1000]
    np.testing.assert_allclose(frame.rgb, expected.rgb, atol=1e-6)


def test_an_interrupted_path_goes_on_with_the_missing_frames(tmp_path, monkeypatch):
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 2, 3] = np.linspace(3, 4, 5)
    kwargs = chain()
    whole, disps = render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.png')}
    for name in ('001.png', '003.png'):
        (tmp_path / name).unlink()
    rendered, original = [], run_nerf.render_frame
    monkeypatch.setattr(run_nerf, 'render_frame', lambda pose, *args: rendered.append(pose) or original(pose, *args))
    again, disps_again = render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    assert np.array_equal(rendered, poses[[1, 3]])
    np.testing.assert_allclose(again, whole, atol=1 / 255)
    np.testing.assert_allclose(disps_again, disps, atol=1e-3)
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.png')} == before
    rendered.clear()
    render_path(poses, HWF, K, 64, chain(white_bkgd=True), savedir=tmp_path)  # another rendering: none of these frames
    assert len(rendered) == 5


def test_frames_of_another_path_are_removed(tmp_path):
    poses = np.tile(np.eye(4), (3, 1, 1))
    kwargs = chain()
    render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    render_path(poses[:2] + 0.1, HWF, K, 64, kwargs, savedir=tmp_path)
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['000.png', '001.png']
    assert frames_mark(poses, HWF, K, kwargs) != frames_mark(poses, HWF, K, kwargs, 2)


def test_depth_images_hold_the_depth(tmp_path):
    kwargs = chain()
    store = FrameFolder(tmp_path, 'mark', far=6.0)
    frame = next(render_frames(np.eye(4)[None], HWF, K, 64, kwargs, store=store))
    grey = iio.imread(tmp_path / 'depth/000.png')
    assert grey.dtype == np.uint16
    depth = np.where(frame.disp > 0, 1 / np.maximum(frame.disp, 1e-10), 0)
    np.testing.assert_allclose(grey * (6.0 / 65535), depth, atol=1e-4)
    assert f'{6.0 / 65535:.9g}' in json.loads((tmp_path / 'frames.json').read_text())['depth']


def test_rendering_from_a_checkpoint_alone(saved, tmp_path):
    """No config, no options, no data set, another working directory."""
    (tmp_path / 'elsewhere').mkdir()
    moved = tmp_path / 'moved.tar'
    state = torch.load(saved / '000002.tar', weights_only=True)
    state['args']['datadir'] = '/gone'
    state['camera']['render_poses'] = state['camera']['render_poses'][:3]
    torch.save(state, moved)
    code, output = finish(start('--render_only', '--ft_path', moved, cwd=tmp_path / 'elsewhere'))
    assert code == 0, output
    folder = tmp_path / 'elsewhere/logs/demo/renderonly_path_000002'
    assert iio.imread(folder / '002.png').shape == (64, 64, 3) and (folder / 'video.mp4').is_file()
