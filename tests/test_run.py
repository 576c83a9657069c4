"""Whole runs: training, going on, rendering, and what is left on disk and on the console."""
import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, GOLDEN, ROOT, needs_data, needs_golden, run_python, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from options import config_parser
from run_nerf import create_nerf, main
from run_nerf_helpers import NeRF

TINY = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--netdepth', 2,
        '--netwidth', 32, '--netdepth_fine', 2, '--netwidth_fine', 32, '--N_rand', 128, '--N_samples', 16,
        '--N_importance', 16,
        '--testskip', 4, '--device', 'cpu']


def run(*args):
    assert main([str(arg) for arg in args]) == 0


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A short run of a real process on the demo scene; returns its logs folder and what it printed."""
    basedir = tmp_path_factory.mktemp('logs')
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 2, 3] = 4, 4.2, 4.4
    np.save(basedir / 'path.npy', poses)
    done = run_script(*TINY, '--basedir', basedir, '--N_iters', 250, '--i_print', 50, '--i_img', 100, '--i_weights', 100,
                      '--i_testset', 250, '--i_video', 250, '--render_poses', basedir / 'path.npy')
    assert done.returncode == 0, done.stderr
    return basedir / 'demo', done.stdout, done.stderr


def scalars(folder):
    """All TensorBoard scalars of a run: {name: {step: value}}."""
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0, 'images': 0}).Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()['scalars']}
    return found, events


def test_psnr_rises(trained):
    found, _ = scalars(trained[0])
    losses = found['train/loss']
    assert set(losses) == {50, 100, 150, 200, 250}
    assert losses[250] < 0.6 * losses[50]
    assert found['psnr/held-out fine'][200] > found['psnr/held-out fine'][100] > 10


def test_tensorboard_has_what_a_person_looks_at(trained):
    found, events = scalars(trained[0])
    assert set(found) == {
        'train/loss', 'train/learning rate', 'psnr/train coarse', 'psnr/train fine', 'psnr/held-out coarse',
        'psnr/held-out fine', 'speed/rays per second', 'speed/seconds per step', 'health/memory, GiB', 'health/restarts',
        'health/steps left out', 'test/psnr', 'test/ssim', 'test/seconds'}
    (panel,) = events.Tags()['images']
    assert [event.step for event in events.Images(panel)] == [100, 200]
    assert (events.Images(panel)[0].height, events.Images(panel)[0].width) == (22, 5 * 22)  # of every third pixel


def test_files_of_a_run_have_their_established_names(trained):
    folder = trained[0]
    names = {path.name for path in folder.iterdir() if not path.name.startswith('events')}
    assert names == {'args.txt', 'config.txt', 'run.json', 'log.txt', '000100.tar', '000200.tar', '000250.tar',
                     'testset_000250', 'demo_spiral_000250_rgb.mp4', 'demo_spiral_000250_disp.mp4'}
    assert sorted(path.name for path in (folder / 'testset_000250').iterdir()) == [
        '000.png', '001.png', 'depth', 'disp', 'frames.json', 'metrics.csv', 'metrics.json']
    assert 'N_rand = 128\n' in (folder / 'args.txt').read_text()
    assert (folder / 'config.txt').read_text() == (ROOT / 'configs/demo.txt').read_text()
    video = iio.imread(folder / 'demo_spiral_000250_rgb.mp4', plugin='FFMPEG')
    assert video.shape == (3, 64, 64, 3)


def test_the_console_of_a_pipe_has_plain_lines(trained):
    _, out, err = trained
    assert err == '' and '\r' not in out
    for part in ('80 train', '64×64', 'coarse', 'fine', 'parameters', 'device    cpu', 'step 50/250', 'rays/s',
                 'held-out PSNR', 'SSIM', '000250.tar', 'spiral', 'tensorboard --logdir'):
        assert part in out, part


def test_a_checkpoint_loads_into_a_plain_module(trained):
    state = torch.load(trained[0] / '000250.tar', weights_only=True)
    assert state['global_step'] == 250
    network = NeRF(D=2, W=32, input_ch=3 + 6 * 8, input_ch_views=3 + 6 * 2, use_viewdirs=True)
    network.load_state_dict(state['network_fn_state_dict'])
    network.load_state_dict(state['network_fine_state_dict'])
    assert all(entry['step'].item() == 250 for entry in state['optimizer_state_dict']['state'].values())


def copy_of(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / 'demo')
    return tmp_path


@pytest.mark.parametrize('options, folder, size, count', [
    (['--render_test'], 'renderonly_test_000250', 64, 2),
    (['--render_poses', 'path.npy'], 'renderonly_path_000250', 64, 3),
    (['--render_poses', 'path.npy', '--render_factor', 2], 'renderonly_path_000250', 32, 3)])
def test_render_only(trained, tmp_path, capsys, options, folder, size, count):
    basedir = copy_of(trained, tmp_path)
    before = {path.name for path in (basedir / 'demo').iterdir()}
    run(*TINY, '--basedir', basedir, '--render_only',
        *[trained[0].parent / option if option == 'path.npy' else option for option in options])
    assert {path.name for path in (basedir / 'demo').iterdir()} == before | {folder}
    names = {path.name for path in (basedir / 'demo' / folder).iterdir()}
    metrics = {'metrics.csv', 'metrics.json'} if '--render_test' in options else set()
    assert names == {f'{index:03d}.png' for index in range(count)} | metrics | {
        'video.mp4', 'video_disp.mp4', 'depth', 'disp', 'frames.json'}
    assert iio.imread(basedir / 'demo' / folder / '000.png').shape == (size, size, 3)
    assert iio.imread(basedir / 'demo' / folder / 'video.mp4', plugin='FFMPEG').shape == (count, size, size, 3)
    assert ('PSNR' in capsys.readouterr().out) == ('--render_test' in options)
    if '--render_test' in options:  # the same networks, the same views
        assert (basedir / f'demo/{folder}/001.png').read_bytes() == (trained[0] / 'testset_000250/001.png').read_bytes()


def test_going_on_counts_no_step_twice(trained, tmp_path, capsys):
    basedir = copy_of(trained, tmp_path)
    run(*TINY, '--basedir', basedir, '--N_iters', 252)
    assert 'goes on after step 250' in capsys.readouterr().out
    state = torch.load(basedir / 'demo/000252.tar', weights_only=True)
    assert {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()} == {252}
    run(*TINY, '--basedir', basedir, '--N_iters', 252)
    assert 'nothing to do' in capsys.readouterr().out
    run(*TINY, '--basedir', basedir, '--N_iters', 1, '--no_reload')
    assert (basedir / 'demo/000001.tar').is_file()


def test_a_stopped_and_resumed_run_is_the_same_run(tmp_path):
    run(*TINY, '--basedir', tmp_path / 'whole', '--N_iters', 12, '--precrop_iters', 6)
    run(*TINY, '--basedir', tmp_path / 'parts', '--N_iters', 5, '--precrop_iters', 6)
    run(*TINY, '--basedir', tmp_path / 'parts', '--N_iters', 12, '--precrop_iters', 6)
    whole, parts = (torch.load(tmp_path / name / 'demo/000012.tar', weights_only=True) for name in ('whole', 'parts'))
    for network in ('network_fn_state_dict', 'network_fine_state_dict'):
        assert all(torch.equal(whole[network][key], parts[network][key]) for key in whole[network])


def test_without_fine_network_and_directions(tmp_path):
    options = ['--N_importance', 0, '--no-use_viewdirs', '--i_embed', -1, '--lindisp', '--no_batching', '--i_img', 2]
    run(*TINY, '--basedir', tmp_path, '--N_iters', 2, *options)
    state = torch.load(tmp_path / 'demo/000002.tar', weights_only=True)
    assert 'network_fine_state_dict' not in state and state['network_fn_state_dict']['pts_linears.0.weight'].shape == (32, 3)
    run(*TINY, '--basedir', tmp_path, '--N_iters', 3, *options)


def test_a_checkpoint_remembers_pixel_centers(trained):
    args = config_parser().parse_args([str(option) for option in TINY] + [
        '--basedir', str(trained[0].parent), '--no-pixel_centers'])
    with pytest.warns(UserWarning, match='pixel centres'):
        assert create_nerf(args)[0]['pixel_centers'] is True


def test_pixel_centers_are_remembered_over_more_than_one_resume(tmp_path, capsys):
    run(*TINY, '--basedir', tmp_path, '--N_iters', 1)
    for steps in (2, 3):
        run(*TINY, '--basedir', tmp_path, '--N_iters', steps, '--no-pixel_centers')
        assert 'pixel centres' in capsys.readouterr().err
        assert torch.load(tmp_path / f'demo/{steps:06d}.tar', weights_only=True)['camera']['pixel_centers'] is True


def test_rendering_needs_no_optimizer(trained, tmp_path):
    state = torch.load(trained[0] / '000250.tar', weights_only=True)
    del state['optimizer_state_dict']
    torch.save(state, tmp_path / 'bare.tar')
    run(*TINY, '--basedir', tmp_path, '--render_only', '--render_test', '--ft_path', tmp_path / 'bare.tar')
    assert (tmp_path / 'demo/renderonly_test_000250/video.mp4').is_file()


def test_the_seed_decides(tmp_path):
    weights = []
    for basedir, seed in (('a', 1), ('b', 1), ('c', 2)):
        run(*TINY, '--basedir', tmp_path / basedir, '--N_iters', 2, '--seed', seed)
        state = torch.load(tmp_path / basedir / 'demo/000002.tar', weights_only=True)
        weights.append(state['network_fine_state_dict']['rgb_linear.weight'])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@needs_data
@pytest.mark.parametrize('config, scene', [('lego.txt', 'nerf_synthetic/lego'), ('fern.txt', 'nerf_llff_data/fern')])
def test_real_scenes_train_a_few_steps(tmp_path, config, scene):
    done = run_script('--config', ROOT / 'configs' / config, '--datadir', DATA / scene, '--basedir', tmp_path,
                      '--N_iters', 2, '--N_rand', 64, '--netchunk', 4096)
    assert done.returncode == 0, done.stderr
    assert 'step 2/2' in done.stdout and len(list(tmp_path.rglob('000002.tar'))) == 1


@needs_data
@needs_golden
def test_a_checkpoint_of_the_established_code_goes_on(tmp_path, capsys):
    run('--config', GOLDEN / 'checkpoint/config.txt', '--ft_path', GOLDEN / 'checkpoint/002000.tar', '--datadir',
        DATA / 'nerf_synthetic/lego', '--basedir', tmp_path, '--N_iters', 2002, '--testskip', 104, '--device', 'cpu')
    assert 'goes on after step 2000' in capsys.readouterr().out
    assert torch.load(tmp_path / 'lego_small/002002.tar', weights_only=True)['global_step'] == 2002


def test_importing_has_no_effects(tmp_path):
    check = ("import sys, numpy, torch; sys.path.insert(0, sys.argv[1]); before = torch.get_rng_state(); import run_nerf; "
             "assert torch.equal(before, torch.get_rng_state()); assert torch.get_default_dtype() is torch.float32; "
             "import os; assert os.listdir() == []")
    (tmp_path / 'check.py').write_text(check)
    (tmp_path / 'empty').mkdir()
    done = run_python(tmp_path / 'check.py', ROOT, cwd=tmp_path / 'empty')
    assert done.returncode == 0, done.stderr


def test_the_demo_scene_is_made_as_it_ships(monkeypatch):
    """One view of the scene that ships, made again; another mathematics library may round a few pixels the other way."""
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import make_demo_scene
    shipped = iio.imread(ROOT / 'data/demo/test/r_5.png')
    c2w = make_demo_scene.hemisphere(8, 0.71)[5]
    made = make_demo_scene.render_view(c2w, 128, 3)
    assert made.shape == shipped.shape == (128, 128, 4) and (made != shipped).mean() < 0.01
    frame = json.loads((ROOT / 'data/demo/transforms_test.json').read_text())['frames'][5]
    np.testing.assert_allclose(frame['transform_matrix'], c2w, atol=1e-8)


def test_a_demo_scene_of_another_size(tmp_path):
    done = run_python('tools/make_demo_scene.py', '--out', tmp_path, '--train', 2, '--val', 0, '--test', 1, '--size', 24,
                      '--samples', 1)
    assert done.returncode == 0, done.stderr
    assert iio.imread(tmp_path / 'train/r_1.png').shape == (24, 24, 4)
    assert len(json.loads((tmp_path / 'transforms_train.json').read_text())['frames']) == 2
