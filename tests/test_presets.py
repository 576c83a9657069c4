"""The fast presets: hash encoding, occupancy grid and adaptive batches in whole runs."""
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from tiny_devices import Random
from tiny_runs import FAST_DEMO, NO_OUTPUTS, ROOT, assert_killed_and_resumed_is_undisturbed, read_state, run

from accel.hash_nerf import MAX_LOG_DENSITY, TruncatedExp
from run_nerf_helpers import img2mse_random_bkgd
from training.checkpoints import read_checkpoint
from training.options import config_parser

slow = pytest.mark.slow


def test_a_fast_run_learns_and_writes_the_usual_files(fast_demo_run):
    metrics = json.loads((fast_demo_run / 'testset_000250/metrics.json').read_text())
    assert metrics['mean']['psnr'] > 22
    state = read_checkpoint(fast_demo_run / '000250.tar')
    occupied = state['renderer_state_dict']['grid.occupied']
    assert 0 < occupied.float().mean() < 0.5
    network = state['network_fn_state_dict']
    assert {'encoding.table', 'density_linears.0.weight', 'rgb_linears.2.bias'} <= network.keys()
    assert state['args']['occupancy_grid'] is True and state['ray_sampler_state_dict']['mean_samples'] > 0


@pytest.mark.parametrize('options, folder', [(['--render_test'], 'renderonly_test_000250'),
                                             (['--render_factor', 4], 'renderonly_path_000250')])
def test_render_only_takes_all_from_the_checkpoint(fast_demo_run, tmp_path, options, folder):
    assert run('--render_only', '--ft_path', fast_demo_run / '000250.tar', '--basedir', tmp_path,
               '--device', 'cpu', *options) == 0
    frames = sorted((tmp_path / 'demo_fast' / folder).glob('[0-9]*.png'))
    assert frames and iio.imread(frames[0]).std() > 5
    if options == ['--render_test']:
        assert (iio.imread(frames[0]) == iio.imread(fast_demo_run / 'testset_000250/000.png')).all()


def test_a_checkpoint_with_a_grid_is_refused_without_one(fast_demo_run, capsys):
    assert run(*FAST_DEMO, '--basedir', fast_demo_run.parent, '--no-occupancy_grid', '--no-random_bkgd') == 2
    assert 'occupancy_grid False (was True)' in capsys.readouterr().err


@slow
@pytest.mark.parametrize('options', [
    [], ['--i_embed', 0, '--netwidth', 16, '--netdepth', 2, '--lrate', 1e-3]], ids=['hash', 'positional'])
def test_killed_and_resumed_is_bit_equal_to_undisturbed(tmp_path, options):
    assert_killed_and_resumed_is_undisturbed(tmp_path, *FAST_DEMO, *options)


@pytest.mark.parametrize('options', [
    ['--N_importance', 16, '--no-occupancy_grid', '--N_rand', 64, '--no-random_bkgd'], ['--no-use_viewdirs'],
    ['--no-random_bkgd', '--i_embed_views', 0], ['--i_embed', -1, '--netwidth', 16]],
    ids=lambda options: ' '.join(map(str, options)))
def test_other_combinations_train_and_resume(few_views, tmp_path, capsys, options):
    for steps in (20, 22):
        assert run(*FAST_DEMO, *NO_OUTPUTS, '--datadir', few_views, '--basedir', tmp_path, '--N_iters', steps,
                   *options) == 0
    assert 'resumes after step 20' in capsys.readouterr().out


@needs_data
@slow
def test_forward_facing_photos_train_too(tmp_path):
    assert run('--config', ROOT / 'configs/fern_fast.txt', '--datadir', DATA / 'nerf_llff_data/fern',
               '--basedir', tmp_path, '--N_iters', 3, *NO_OUTPUTS, '--N_rand', 64,
               '--log2_hashmap_size', 10) == 0
    aabb = read_checkpoint(tmp_path / 'fern_fast/000003.tar')['network_fn_state_dict']['encoding.aabb']
    assert (aabb[0] < -1).all() and (aabb[1] >= 1).all() and (aabb.abs() < 3).all()  # NDC


def test_a_collapsed_density_is_restarted(few_views, tmp_path, capsys):
    options = [*FAST_DEMO, *NO_OUTPUTS, '--datadir', few_views, '--basedir', tmp_path]
    assert run(*options, '--N_iters', 1) == 0
    path = tmp_path / 'demo_fast/000001.tar'
    state = read_state(path)
    state['network_fn_state_dict']['density_linears.1.bias'][0] = -1000
    torch.save(state, path)
    assert run(*options, '--N_iters', 320, '--i_print', 40) == 0
    assert 'starts again with seed' in capsys.readouterr().out
    network = read_state(tmp_path / 'demo_fast/000320.tar')['network_fn_state_dict']
    assert network['density_linears.1.bias'][0] > -100


@pytest.mark.parametrize('options, problem', [
    (['--N_importance', '16'], 'argument --N_importance: found 16, expected 0 with --occupancy_grid'),
    (['--lindisp'], 'argument --lindisp: not available with --occupancy_grid'),
    (['--no-occupancy_grid'], 'argument --random_bkgd: needs --occupancy_grid or --sampler proposal'),
    (['--aabb', '0', '0', '0', '1', '-1', '1'], 'argument --aabb: found 0 0 0 1 -1 1, expected X0 < X1')])
def test_options_that_contradict_each_other(capsys, options, problem):
    with pytest.raises(SystemExit):
        config_parser().parse_args([str(arg) for arg in FAST_DEMO] + options)
    assert problem in capsys.readouterr().err


def test_a_given_box_is_used(few_views, tmp_path):
    box = [-1, -1, -1.5, 1, 1, 1]
    assert run(*FAST_DEMO, *NO_OUTPUTS, '--datadir', few_views, '--basedir', tmp_path, '--N_iters', 2,
               '--aabb', *box) == 0
    state = read_state(tmp_path / 'demo_fast/000002.tar')
    for part, key in (('renderer', 'grid.aabb'), ('network_fn', 'encoding.aabb')):
        assert state[f'{part}_state_dict'][key].flatten().tolist() == box


# --- the loss over all backgrounds, the exponential density -------------------------------------------------

@pytest.mark.parametrize('bkgd', [0.0, 1.0])
def test_the_loss_is_the_mean_over_all_backgrounds(bkgd):
    random = Random(0)
    color, other = random.rand(2, 50, 3)            # premultiplied
    acc, alpha = random.rand(2, 50)
    backgrounds = random.rand(20000, 1, 3)
    error = (color + (1 - acc[:, None]) * backgrounds) - (other + (1 - alpha[:, None]) * backgrounds)
    target = torch.cat([other + (1 - alpha[:, None]) * bkgd, alpha[:, None]], -1)
    mean = img2mse_random_bkgd(color + (1 - acc[:, None]) * bkgd, acc, target, bkgd)
    torch.testing.assert_close(mean, error.square().mean(), rtol=5e-3, atol=0)


def test_the_exponential_stays_finite():
    x = torch.tensor([-200.0, -1, 0, 3, 14, 200], requires_grad=True)
    y = TruncatedExp.apply(x)
    assert torch.isfinite(y).all() and torch.equal(y[1:5], x[1:5].exp())
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[-1].item() == pytest.approx(np.exp(MAX_LOG_DENSITY))
    torch.testing.assert_close(x.grad[1:5], x[1:5].exp())
