"""Whole runs: training, resuming, rendering, and what is left on disk and on the console."""
import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, GOLDEN, needs_data, needs_golden
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    DEMO,
    FAST_DEMO,
    NO_OUTPUTS,
    ROOT,
    TINY,
    assert_same_parameters,
    read_state,
    run,
    run_python,
    run_script,
)

import run_nerf
from run_nerf_helpers import NeRF
from training.options import config_parser


def scalars(folder):
    """All TensorBoard scalars of a run: {name: {step: value}}, and its events."""
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0, 'images': 0}).Reload()
    found = {tag: {event.step: event.value for event in events.Scalars(tag)}
             for tag in events.Tags()['scalars']}
    return found, events


def copy_of(folder, basedir):
    """Copy a run's folder, so that a test can change it; returns the copy's --basedir."""
    shutil.copytree(folder, basedir / folder.name)
    return basedir


# --- training -----------------------------------------------------------------------------------------------

def test_check_data_writes_a_report_and_does_not_train(tmp_path, capsys):
    assert run(*TINY, '--basedir', tmp_path, '--check_data') == 0
    assert 'good: No problem found in' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / 'demo').iterdir()) == ['report.html', 'report.json']


def test_psnr_rises(demo_run):
    found, _ = scalars(demo_run[0])
    losses = found['train/loss']
    assert set(losses) == {50, 100, 150, 200, 250}
    assert losses[250] < 0.6 * losses[50]
    assert found['psnr/held-out fine'][200] > found['psnr/held-out fine'][100] > 10


def test_what_tensorboard_shows(demo_run):
    found, events = scalars(demo_run[0])
    assert set(found) == {
        'train/loss', 'train/learning rate', 'loss/coarse', 'loss/fine', 'psnr/train coarse',
        'psnr/train fine', 'psnr/held-out coarse', 'psnr/held-out fine', 'speed/rays per second',
        'speed/seconds per step', 'health/memory, GiB', 'health/restarts', 'health/skipped steps',
        'test/psnr', 'test/ssim', 'test/seconds'}
    (panel,) = events.Tags()['images']
    assert [event.step for event in events.Images(panel)] == [100, 200]
    image = events.Images(panel)[0]
    assert (image.height, image.width) == (16, 5 * 16)  # every fourth pixel


def test_files_of_a_run_have_their_established_names(demo_run):
    folder = demo_run[0]
    names = {path.name for path in folder.iterdir() if not path.name.startswith('events')}
    assert names == {'args.txt', 'config.txt', 'run.json', 'log.txt', '000100.tar', '000200.tar',
                     '000250.tar', 'testset_000250', 'demo_spiral_000250_rgb.mp4',
                     'demo_spiral_000250_disp.mp4'}
    assert sorted(path.name for path in (folder / 'testset_000250').iterdir()) == [
        '000.png', '001.png', 'depth', 'disp', 'frames.json', 'metrics.csv', 'metrics.json']
    assert 'N_rand = 128\n' in (folder / 'args.txt').read_text(encoding='utf-8')
    assert (folder / 'config.txt').read_bytes() == (ROOT / 'configs/demo.txt').read_bytes()
    video = iio.imread(folder / 'demo_spiral_000250_rgb.mp4', plugin='FFMPEG')
    assert video.shape == (3, 64, 64, 3)


def test_console_output_to_a_pipe_is_plain_lines(demo_run):
    _, out, err = demo_run
    assert err == '' and '\r' not in out
    for part in ('80 train', '64×64', 'coarse', 'fine', 'parameters', 'device    cpu', 'step 50/250',
                 'rays/s', 'held-out PSNR', 'SSIM', '000250.tar', 'spiral', 'tensorboard --logdir'):
        assert part in out, part


def test_a_locale_without_utf8_works(tmp_path):
    done = run_script(*FAST_DEMO, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 2, LC_ALL='C',
                      PYTHONCOERCECLOCALE='0', PYTHONUTF8='0', PYTHONIOENCODING='ascii')
    assert done.returncode == 0 and done.stderr == ''
    assert r'64\xd764' in done.stdout


def test_a_checkpoint_loads_into_a_plain_module(demo_run):
    state = read_state(demo_run[0] / '000250.tar')
    assert state['global_step'] == 250
    network = NeRF(D=2, W=32, input_ch=3 + 6 * 8, input_ch_views=3 + 6 * 2, use_viewdirs=True)
    network.load_state_dict(state['network_fn_state_dict'])
    network.load_state_dict(state['network_fine_state_dict'])
    assert all(entry['step'].item() == 250 for entry in state['optimizer_state_dict']['state'].values())


def test_without_fine_network_and_directions(tmp_path):
    options = ['--N_importance', 0, '--no-use_viewdirs', '--i_embed', -1, '--lindisp', '--no_batching',
               '--i_img', 2]
    assert run(*DEMO, '--basedir', tmp_path, '--N_iters', 2, *options) == 0
    state = read_state(tmp_path / 'demo/000002.tar')
    assert 'network_fine_state_dict' not in state
    assert state['network_fn_state_dict']['pts_linears.0.weight'].shape == (32, 3)
    assert run(*DEMO, '--basedir', tmp_path, '--N_iters', 3, *options) == 0


def test_the_seed_decides(tmp_path):
    weights = []
    for basedir, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / basedir, '--N_iters', 2, '--seed', seed) == 0
        state = read_state(tmp_path / basedir / 'demo/000002.tar')
        weights.append(state['network_fine_state_dict']['rgb_linear.weight'])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_new_term_of_the_loss_is_trained_and_logged(tmp_path, monkeypatch):
    """One more entry in the dict of losses is all that it takes."""
    original = run_nerf.nerf_losses

    def with_opacity(errors, rgb, acc, extras, target, bkgd):
        return {**original(errors, rgb, acc, extras, target, bkgd), 'opacity': 0.1 * acc.mean()}
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / 'without', '--N_iters', 2, '--i_print', 1) == 0
    monkeypatch.setattr(run_nerf, 'nerf_losses', with_opacity)
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path / 'with', '--N_iters', 2, '--i_print', 1) == 0
    found, _ = scalars(tmp_path / 'with/demo')
    assert found['loss/opacity'].keys() == {1, 2} and all(loss > 0 for loss in found['loss/opacity'].values())
    for step, loss in found['train/loss'].items():
        terms = sum(found[f'loss/{name}'][step] for name in ('coarse', 'fine', 'opacity'))
        assert loss == pytest.approx(terms, rel=1e-5)
    without, _ = scalars(tmp_path / 'without/demo')
    assert found['loss/fine'][1] == without['loss/fine'][1]
    assert found['loss/fine'][2] != without['loss/fine'][2]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize('config, scene', [('lego.txt', 'nerf_synthetic/lego'),
                                           ('fern.txt', 'nerf_llff_data/fern')])
def test_real_scenes_train_a_few_steps(tmp_path, config, scene):
    done = run_script('--config', ROOT / 'configs' / config, '--datadir', DATA / scene, '--basedir', tmp_path,
                      '--N_iters', 2, '--N_rand', 64, '--netchunk', 4096)
    assert done.returncode == 0, done.stderr
    assert 'step 2/2' in done.stdout and len(list(tmp_path.rglob('000002.tar'))) == 1


# --- resuming -----------------------------------------------------------------------------------------------

def test_resuming_counts_no_step_twice(demo_run, tmp_path, capsys):
    basedir = copy_of(demo_run[0], tmp_path)
    assert run(*DEMO, '--basedir', basedir, '--N_iters', 252) == 0
    assert 'resumes after step 250' in capsys.readouterr().out
    state = read_state(basedir / 'demo/000252.tar')
    assert {entry['step'].item() for entry in state['optimizer_state_dict']['state'].values()} == {252}
    assert run(*DEMO, '--basedir', basedir, '--N_iters', 252) == 0
    assert 'nothing to do' in capsys.readouterr().out
    assert run(*DEMO, '--basedir', basedir, '--N_iters', 1, '--no_reload') == 0
    assert (basedir / 'demo/000001.tar').is_file()


def test_a_stopped_and_resumed_run_is_the_same_run(tmp_path):
    for folder, steps in (('whole', 12), ('parts', 5), ('parts', 12)):
        assert run(*DEMO, *NO_OUTPUTS, '--basedir', tmp_path / folder, '--N_iters', steps,
                   '--precrop_iters', 6) == 0
    assert_same_parameters(tmp_path / 'whole/demo/000012.tar', tmp_path / 'parts/demo/000012.tar')


def test_a_checkpoint_remembers_pixel_centers(demo_run):
    options = [*DEMO, '--basedir', demo_run[0].parent, '--no-pixel_centers']
    args = config_parser().parse_args([str(option) for option in options])
    with pytest.warns(UserWarning, match='pixel centres'):
        assert run_nerf.create_nerf(args)[0]['pixel_centers'] is True


def test_pixel_centers_are_remembered_over_more_than_one_resume(tmp_path, capsys):
    assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 1) == 0
    for steps in (2, 3):
        assert run(*TINY, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', steps, '--no-pixel_centers') == 0
        assert 'pixel centres' in capsys.readouterr().err
        assert read_state(tmp_path / f'demo/{steps:06d}.tar')['camera']['pixel_centers'] is True


@needs_data
@needs_golden
@pytest.mark.slow
def test_a_checkpoint_of_nerf_pytorch_resumes(tmp_path, capsys):
    assert run('--config', GOLDEN / 'checkpoint/config.txt', '--ft_path', GOLDEN / 'checkpoint/002000.tar',
               '--datadir', DATA / 'nerf_synthetic/lego', '--basedir', tmp_path, '--N_iters', 2002,
               '--testskip', 104, '--device', 'cpu') == 0
    assert 'resumes after step 2000' in capsys.readouterr().out
    assert read_state(tmp_path / 'lego_small/002002.tar')['global_step'] == 2002


def in_format_1(state):
    """The content of a checkpoint as we wrote it before: an occupancy grid was part of the network, and held
    the state of the ray sampler; the safeguards were called health; sparse backpropagation had a state."""
    state = {**state, 'network_fn_state_dict': dict(state['network_fn_state_dict']), 'format': 1}
    safeguards = state.pop('safeguards_state_dict')
    safeguards['returns'] = safeguards.pop('rollbacks')
    state.update(health=safeguards, with_gradient={'coarse': 0.25})
    mean_samples = state.pop('ray_sampler_state_dict')['mean_samples']
    old_names = {'grid.aabb': 'aabb', 'grid.occs': 'opacity', 'grid.occupied': 'occupied'}
    renderer = state.pop('renderer_state_dict')
    grid = {f'occupancy.{old}': renderer[new] for new, old in old_names.items() if new in renderer}
    if grid:
        grid['occupancy.samples_of_a_ray'] = torch.tensor(mean_samples)
    state['network_fn_state_dict'].update(grid)
    return state


@pytest.mark.parametrize('options', [TINY, FAST_DEMO], ids=['demo', 'fast'])
def test_a_checkpoint_of_format_1_resumes_identically(two_steps, fast_demo_run, tmp_path, capsys, options):
    newest = two_steps / '000002.tar' if options is TINY else fast_demo_run / '000250.tar'
    torch.save(in_format_1(read_state(newest)), tmp_path / newest.name)
    steps, written = int(newest.stem) + 7, []  # the grid is updated after step 256
    for basedir, path in ((tmp_path / 'new', newest), (tmp_path / 'old', tmp_path / newest.name)):
        capsys.readouterr()
        assert run(*options, *NO_OUTPUTS, '--basedir', basedir, '--ft_path', path, '--N_iters', steps) == 0
        assert f'resumes after step {int(newest.stem)}' in capsys.readouterr().out
        assert run('--render_only', '--render_test', '--exact_render', '--ft_path', path,
                   '--basedir', basedir, '--device', 'cpu') == 0
        written.append(next(basedir.rglob(f'{steps:06d}.tar')))
    assert_same_parameters(*written)
    one, other = map(read_state, written)
    for key in ('safeguards_state_dict', 'ray_sampler_state_dict'):
        assert str(one[key]) == str(other[key])
    images = [[image.read_bytes() for image in sorted((tmp_path / name).rglob('renderonly_test*/0*.png'))]
                for name in ('new', 'old')]
    assert images[0] and images[0] == images[1]


# --- rendering only -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('options, folder, size, count', [
    (['--render_test'], 'renderonly_test_000250', 64, 2),
    (['--render_poses', 'path.npy', '--exact_render'], 'renderonly_path_000250', 64, 3),
    (['--render_poses', 'path.npy', '--render_factor', 2], 'renderonly_path_000250', 32, 3)])
def test_render_only(demo_run, tmp_path, capsys, options, folder, size, count):
    basedir = copy_of(demo_run[0], tmp_path)
    before = {path.name for path in (basedir / 'demo').iterdir()}
    assert run(*DEMO, '--basedir', basedir, '--render_only',
               *[demo_run[0].parent / option if option == 'path.npy' else option for option in options]) == 0
    assert {path.name for path in (basedir / 'demo').iterdir()} == before | {folder}
    names = {path.name for path in (basedir / 'demo' / folder).iterdir()}
    metrics = {'metrics.csv', 'metrics.json'} if '--render_test' in options else set()
    assert names == {f'{index:03d}.png' for index in range(count)} | metrics | {
        'video.mp4', 'video_disp.mp4', 'depth', 'disp', 'frames.json'}
    assert iio.imread(basedir / 'demo' / folder / '000.png').shape == (size, size, 3)
    video = iio.imread(basedir / 'demo' / folder / 'video.mp4', plugin='FFMPEG')
    assert video.shape == (count, size, size, 3)
    assert ('PSNR' in capsys.readouterr().out) == ('--render_test' in options)
    if '--render_test' in options:  # the same networks, the same views
        expected = demo_run[0] / 'testset_000250/001.png'
        assert (basedir / 'demo' / folder / '001.png').read_bytes() == expected.read_bytes()


def test_frames_are_reused_until_something_that_affects_them_changes(demo_run, tmp_path, monkeypatch, capsys):
    rendered, original, basedir = [], run_nerf.render_frame, copy_of(demo_run[0], tmp_path)
    monkeypatch.setattr(run_nerf.ImageRenderer, 'render_frame',
                        lambda self, *args: rendered.append(args) or original(*args))

    def render(*options):
        """Number of frames rendered, and what was printed."""
        rendered.clear()
        assert run(*DEMO, '--basedir', basedir, '--render_only',
                   '--render_poses', demo_run[0].parent / 'path.npy', '--render_factor', 4, *options) == 0
        return len(rendered), capsys.readouterr().out

    count, out = render()
    assert count == 3 and 'reusing' not in out
    count, out = render()
    assert count == 0 and 'reusing 3 frames' in out and '--overwrite' in out
    count, out = render('--overwrite')
    assert count == 3 and 'reusing' not in out
    assert render('--chunk', 100)[0] == 0
    assert render('--precision', 'fp32')[0] == 3
    monkeypatch.setattr('training.frames.code_version', lambda: 'edited')
    count, out = render('--precision', 'fp32')
    assert count == 3 and 'reusing' not in out
    (tmp_path / 'demo/renderonly_path_000250/001.png').unlink()
    count, out = render('--precision', 'fp32')
    assert count == 1 and 'reusing 2 frames' in out


def test_rendering_needs_no_optimizer(demo_run, tmp_path):
    state = read_state(demo_run[0] / '000250.tar')
    del state['optimizer_state_dict']
    torch.save(state, tmp_path / 'bare.tar')
    assert run(*DEMO, '--basedir', tmp_path, '--render_only', '--render_test', '--exact_render',
               '--ft_path', tmp_path / 'bare.tar') == 0
    assert (tmp_path / 'demo/renderonly_test_000250/video.mp4').is_file()


def test_rendering_from_a_checkpoint_alone(two_steps, tmp_path):
    """No config, no options, no data set, another working directory."""
    (tmp_path / 'elsewhere').mkdir()
    state = read_state(two_steps / '000002.tar')
    state['args']['datadir'] = '/gone'
    for name in ('render_poses', 'path_cameras'):
        state['camera'][name] = state['camera'][name][:3]
    torch.save(state, tmp_path / 'moved.tar')
    done = run_script('--render_only', '--ft_path', tmp_path / 'moved.tar', cwd=tmp_path / 'elsewhere')
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'elsewhere/logs/demo/renderonly_path_000002'
    assert iio.imread(folder / '002.png').shape == (64, 64, 3) and (folder / 'video.mp4').is_file()


# --- importing, tools ---------------------------------------------------------------------------------------

def test_importing_has_no_effects(tmp_path):
    check = ('import sys, numpy, torch; sys.path.insert(0, sys.argv[1]); before = torch.get_rng_state(); '
             'import run_nerf; assert torch.equal(before, torch.get_rng_state()); '
             'assert torch.get_default_dtype() is torch.float32; import os; assert os.listdir() == []')
    (tmp_path / 'check.py').write_text(check)
    (tmp_path / 'empty').mkdir()
    done = run_python(tmp_path / 'check.py', ROOT, cwd=tmp_path / 'empty')
    assert done.returncode == 0, done.stderr


def test_the_demo_scene_is_made_as_it_ships(monkeypatch):
    """One view of the demo scene, made again; another mathematics library may round a few pixels
    differently."""
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import make_demo_scene
    shipped = iio.imread(ROOT / 'data/demo/test/r_5.png')
    c2w = make_demo_scene.hemisphere(8, 0.71)[5]
    made = make_demo_scene.render_view(c2w, 128, 3)
    assert made.shape == shipped.shape == (128, 128, 4) and (made != shipped).mean() < 0.01
    frame = json.loads((ROOT / 'data/demo/transforms_test.json').read_text(encoding='utf-8'))['frames'][5]
    np.testing.assert_allclose(frame['transform_matrix'], c2w, atol=1e-8)


def test_a_demo_scene_of_another_size(tmp_path):
    done = run_python('tools/make_demo_scene.py', '--out', tmp_path, '--train', 2, '--val', 0, '--test', 1,
                      '--size', 24, '--samples', 1)
    assert done.returncode == 0, done.stderr
    assert iio.imread(tmp_path / 'train/r_1.png').shape == (24, 24, 4)
    assert len(json.loads((tmp_path / 'transforms_train.json').read_text(encoding='utf-8'))['frames']) == 2
