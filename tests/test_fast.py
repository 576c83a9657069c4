"""The fast presets and fast rendering: whole runs, kills, many processes, and pictures that are those of the exact way."""
import json
import signal

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_data
from test_ranks import torchrun
from test_resilience import NEVER, finish, start, wait_for

import run_nerf
from accel import baking, fast_rays, occupancy
from accel.fast_rays import FastRays
from accel.hash_nerf import MOST_LOG_DENSITY, TruncatedExp
from checkpoints import read_checkpoint
from options import config_parser
from ranks import Ranks
from run_nerf import main, make_reports, prepare, render_frame
from run_nerf_helpers import get_rays, img2mse_any_bkgd

SMALL = ['--config', ROOT / 'configs/demo_fast.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--testskip', 4,
         '--device', 'cpu', '--log2_hashmap_size', 11, '--n_levels', 4, '--finest_res', 64, '--N_samples', 64, '--N_rand',
         2048, '--N_rand_samples', 2048]


def run(*args):
    return main([str(arg) for arg in args])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A short run of the fast demo; its folder."""
    basedir = tmp_path_factory.mktemp('logs')
    assert run(*SMALL, '--basedir', basedir, '--N_iters', 250, '--i_testset', 250, '--i_video', 10 ** 6) == 0
    return basedir / 'demo_fast'


# --- presets ---

def test_a_fast_run_learns_and_leaves_the_usual_files(trained):
    metrics = json.loads((trained / 'testset_000250/metrics.json').read_text())
    assert metrics['mean']['psnr'] > 22
    state = read_checkpoint(trained / '000250.tar')
    grid = state['network_fn_state_dict']['occupancy.occupied']
    assert 0 < grid.float().mean() < 0.5
    assert {'encoding.table', 'density_linears.0.weight', 'rgb_linears.2.bias'} <= state['network_fn_state_dict'].keys()
    assert state['args']['occupancy_grid'] is True


@pytest.mark.parametrize('options, folder', [(['--render_test'], 'renderonly_test_000250'),
                                             (['--render_factor', 4], 'renderonly_path_000250')])
def test_render_only_takes_all_from_the_checkpoint(trained, tmp_path, options, folder):
    assert run('--render_only', '--ft_path', trained / '000250.tar', '--basedir', tmp_path, '--device', 'cpu', *options) == 0
    frames = sorted((tmp_path / 'demo_fast' / folder).glob('[0-9]*.png'))
    assert frames and iio.imread(frames[0]).std() > 5
    if options == ['--render_test']:
        assert (iio.imread(frames[0]) == iio.imread(trained / 'testset_000250/000.png')).all()


def test_without_the_grid_a_checkpoint_with_one_is_refused_in_one_line(trained, capsys):
    assert run(*SMALL, '--basedir', trained.parent, '--no-occupancy_grid') == 2
    assert 'occupancy_grid False (was True)' in capsys.readouterr().err


@pytest.mark.parametrize('options', [[], ['--i_embed', 0, '--netwidth', 16, '--netdepth', 2, '--lrate', 1e-3]],
                         ids=['hash', 'positional'])
def test_killed_and_resumed_is_bit_equal_to_undisturbed(tmp_path, options):
    args = [*SMALL, *NEVER, '--N_iters', 60, '--i_weights', 20, *options]
    code, output = finish(start(*args, '--basedir', tmp_path / 'whole'))
    assert code == 0, output
    process = start(*args, '--basedir', tmp_path / 'parts')
    wait_for(tmp_path / 'parts/demo_fast/000020.tar', process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for path in (tmp_path / 'parts/demo_fast').glob('0000[46]0.tar'):  # the process may have been quick
        path.unlink()
    code, output = finish(start(*args, '--basedir', tmp_path / 'parts'))
    assert code == 0 and 'goes on after step 20' in output, output
    whole, parts = (tmp_path / name / 'demo_fast/000060.tar' for name in ('whole', 'parts'))
    state, other = (read_checkpoint(path)['network_fn_state_dict'] for path in (whole, parts))
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_two_processes(tmp_path):
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 40, '--i_testset', 40, '--i_video', 10 ** 6)
    assert done.returncode == 0, done.stderr
    done = torchrun(*SMALL, '--basedir', tmp_path, '--N_iters', 50, '--i_video', 10 ** 6, processes=1)
    assert done.returncode == 0 and 'goes on after step 40' in done.stdout, done.stderr
    done = torchrun(*SMALL, '--basedir', tmp_path, '--render_only', '--render_test', processes=1)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('options', [['--N_importance', 16, '--no-occupancy_grid'], ['--no-use_viewdirs'],
                                     ['--no-random_bkgd', '--i_embed_views', 0], ['--i_embed', -1, '--netwidth', 16]])
def test_other_ways_train_too(tmp_path, options):
    assert run(*SMALL, *NEVER, '--basedir', tmp_path, '--N_iters', 20, *options) == 0
    assert run(*SMALL, *NEVER, '--basedir', tmp_path, '--N_iters', 22, *options) == 0


@needs_data
def test_forward_facing_photos_train_too(tmp_path):
    assert run('--config', ROOT / 'configs/fern_fast.txt', '--datadir', DATA / 'nerf_llff_data/fern', '--basedir', tmp_path,
               '--N_iters', 3, *NEVER, '--N_rand_samples', 2048, '--log2_hashmap_size', 10) == 0
    box = read_checkpoint(tmp_path / 'fern_fast/000003.tar')['network_fn_state_dict']['occupancy.aabb']
    assert (box[0] < -1).all() and (box[1] >= 1).all() and (box.abs() < 3).all()  # NDC


def test_a_dead_density_is_found_and_starts_again(tmp_path, capsys):
    assert run(*SMALL, *NEVER, '--basedir', tmp_path, '--N_iters', 1) == 0
    path = tmp_path / 'demo_fast/000001.tar'
    state = torch.load(path, weights_only=True)
    state['network_fn_state_dict']['density_linears.1.bias'][0] = -1000
    torch.save(state, path)
    assert run(*SMALL, *NEVER, '--basedir', tmp_path, '--N_iters', 320, '--i_print', 40) == 0
    said = capsys.readouterr().out
    assert 'starts again with seed' in said
    assert read_checkpoint(tmp_path / 'demo_fast/000320.tar')['network_fn_state_dict']['density_linears.1.bias'][0] > -100


@pytest.mark.parametrize('options, problem', [
    (['--N_importance', '16'], 'argument --N_importance: found 16, expected 0 with --occupancy_grid'),
    (['--aabb', '0', '0', '0', '1', '-1', '1'], 'argument --aabb: found 0 0 0 1 -1 1, expected X0 < X1')])
def test_options_that_cannot_be(capsys, options, problem):
    with pytest.raises(SystemExit):
        config_parser().parse_args([str(arg) for arg in SMALL] + options)
    assert problem in capsys.readouterr().err


def test_a_box_of_ones_own(tmp_path):
    box = [-1, -1, -1.5, 1, 1, 1]
    assert run(*SMALL, *NEVER, '--basedir', tmp_path, '--N_iters', 2, '--aabb', *box) == 0
    state = read_checkpoint(tmp_path / 'demo_fast/000002.tar')['network_fn_state_dict']
    for key in ('occupancy.aabb', 'encoding.aabb'):
        assert state[key].flatten().tolist() == box


# --- the loss over all backgrounds, the exponential ---

@pytest.mark.parametrize('bkgd', [0.0, 1.0])
def test_the_mean_over_all_backgrounds(bkgd):
    random = torch.Generator().manual_seed(0)
    color, other = torch.rand(2, 50, 3, generator=random)            # premultiplied
    acc, alpha = torch.rand(2, 50, generator=random)
    backgrounds = torch.rand(20000, 1, 3, generator=random)
    error = (color + (1 - acc[:, None]) * backgrounds) - (other + (1 - alpha[:, None]) * backgrounds)
    target = torch.cat([other + (1 - alpha[:, None]) * bkgd, alpha[:, None]], -1)
    mean = img2mse_any_bkgd(color + (1 - acc[:, None]) * bkgd, acc, target, bkgd)
    torch.testing.assert_close(mean, error.square().mean(), rtol=5e-3, atol=0)


def test_the_exponential_stays_finite():
    x = torch.tensor([-200.0, -1, 0, 3, 14, 200], requires_grad=True)
    y = TruncatedExp.apply(x)
    assert torch.isfinite(y).all() and torch.equal(y[1:5], x[1:5].exp())
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[-1] == pytest.approx(np.exp(MOST_LOG_DENSITY))
    torch.testing.assert_close(x.grad[1:5], x[1:5].exp())


# --- fast rendering ---

class Ball(torch.nn.Module):
    """An opaque ball of radius 0.5; `NeRF`'s output for points that are not encoded."""

    def __init__(self):
        super().__init__()
        self.hardness = torch.nn.Parameter(torch.tensor(200.0))

    def forward(self, x):
        pts = x[:, :3]
        density = self.hardness * (0.5 - torch.linalg.vector_norm(pts, dim=-1, keepdim=True))
        return torch.cat([4 * pts, density], -1)


@pytest.fixture
def ball():
    """render_kwargs of a ball, exact and fast, and how many points each asked for."""
    asked = {'exact': 0, 'fast': 0}

    def query(name):
        def network_query_fn(pts, viewdirs, network):
            asked[name] += pts.shape[0] * pts.shape[1]
            return network(pts.reshape(-1, 3)).view(*pts.shape[:-1], 4)
        return network_query_fn
    exact = {'network_fn': Ball(), 'network_fine': Ball(), 'network_query_fn': query('exact'), 'N_samples': 64,
             'N_importance': 64, 'perturb': 0.0, 'raw_noise_std': 0.0, 'white_bkgd': True, 'near': 2.0, 'far': 6.0,
             'ndc': False, 'use_viewdirs': True}
    fast = {**exact, 'ray_renderer': FastRays(run_nerf.render_rays, [query('fast')], [[-3.0, -3, -3], [3, 3, 3]])}
    return exact, fast, asked


POSE = np.concatenate([np.eye(3), [[0], [0], [4]]], -1)


def frame(kwargs, side=64):
    K = np.array([[80.0, 0, side / 2], [0, 80, side / 2], [0, 0, 1]])
    return render_frame(POSE, [side, side, 80.0], K, 4096, kwargs)


def test_fast_rendering_is_exact_where_it_asks(ball, monkeypatch):
    monkeypatch.setattr(fast_rays, 'TOGETHER', (0.0,))
    exact, fast, asked = ball
    one = frame(exact)
    before = asked['exact']
    other = frame(fast)
    assert one.acc.max() > 0.99 and one.acc.min() == 0
    for key in ('rgb', 'acc'):
        np.testing.assert_allclose(getattr(other, key), getattr(one, key), atol=2e-4)
    baked = asked['fast']
    asked.update(exact=0, fast=0)
    frame(fast)  # the grid is there already
    assert asked['fast'] < baked and asked['fast'] + asked['exact'] < before / 3


def test_near_samples_are_asked_for_together(ball, monkeypatch):
    exact, fast, asked = ball
    frame(fast)
    asked.update(fast=0)
    together, one = frame(fast), frame(exact)
    fewer = asked['fast']
    monkeypatch.setattr(fast_rays, 'TOGETHER', (0.0,))
    asked.update(fast=0)
    each = frame(fast)
    assert fewer < 0.8 * asked['fast']
    largest = {name: np.abs(other.rgb - one.rgb).max() for name, other in (('each', each), ('together', together))}
    assert max(largest.values()) < 2e-3


def test_means_of_neighbours():
    random = np.random.default_rng(0)
    ray = np.sort(random.integers(0, 6, 80))
    stretch = np.concatenate([np.sort(random.integers(0, 5, (ray == i).sum())) for i in range(6)])
    places, weights = random.random((80, 3)), random.random(80)
    found, first, group = fast_rays.means(*map(torch.as_tensor, (ray, stretch, places, weights)))
    keys = sorted(set(zip(ray, stretch)))
    assert len(found) == len(keys) == first.sum()
    for number, key in enumerate(keys):
        its = [i for i in range(80) if (ray[i], stretch[i]) == key]
        np.testing.assert_allclose(found[number], np.average(places[its], 0, weights[its]), atol=1e-9)
        assert (group[its] == number).all() and first[its].tolist() == [True] + [False] * (len(its) - 1)
    found, *_ = fast_rays.means(torch.zeros(2), torch.zeros(2), torch.tensor([[1.0, 1, 1], [3, 3, 3]]), torch.zeros(2))
    assert found.tolist() == [[2, 2, 2]]  # two samples in one place have no length


def test_fog_of_the_coarse_network_alone_is_not_shown(ball):
    exact, fast, asked = ball
    for kwargs in (exact, fast):
        kwargs['network_fn'] = Ball()
        torch.nn.init.constant_(kwargs['network_fn'].hardness, -0.5)  # everywhere around
    one, other = frame(exact), frame(fast)
    np.testing.assert_allclose(other.rgb, one.rgb, atol=fast_rays.TOLERANCE)
    assert ((other.rgb - one.rgb) ** 2).mean() < fast_rays.MEAN_TOLERANCE ** 2
    asked.update(exact=0, fast=0)
    frame(fast)
    assert asked['fast'] + asked['exact'] < 64 * 64 * 192 / 3


def test_the_held_out_view_shows_both_networks(tmp_path):
    args = config_parser().parse_args([*map(str, ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo',
                                                  '--half_res', '--device', 'cpu', '--basedir', tmp_path])])
    scene, _, _, _, kwargs, *_ = prepare(args, Ranks(1))
    reports = make_reports(args, scene, kwargs, print, Ranks(1))
    assert reports.held_out(scene.poses[0], 1).rgb0 is not None
    assert next(reports.frames(scene.poses[:1])).rgb0 is None  # rendered fast


def test_a_network_that_changes_is_baked_anew(ball):
    exact, fast, _ = ball
    frame(fast)
    with torch.no_grad():
        fast['network_fine'].hardness.neg_()  # everything but the ball
        fast['network_fn'].hardness.neg_()
    other = frame(fast)
    assert other.rgb0 is None  # rendered fast
    np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_networks_that_show_nothing(ball):
    exact, fast, _ = ball
    for network in (fast['network_fn'], fast['network_fine']):
        torch.nn.init.constant_(network.hardness, 0.0)
    other = frame(fast)
    assert other.rgb0 is None and (other.rgb == 1).all() and (frame(exact).rgb == 1).all()


def test_where_it_would_differ_it_is_exact(ball, monkeypatch):
    exact, fast, _ = ball
    said, empty = [], baking.empty_grid(8, torch.tensor([[-9.0, -9, -9], [9, 9, 9]]))
    fast['ray_renderer'].say = said.append
    monkeypatch.setattr(baking.Baker, 'grid', lambda *args: empty)
    assert (frame(fast).rgb == frame(exact).rgb).all()
    assert len(said) == 1 and 'rendered exactly' in said[0]


def test_less_precise_products_give_way(ball):
    exact, fast, _ = ball
    said = []
    precise = exact['network_query_fn']
    queries = [lambda *args: precise(*args) * 0.5, precise]
    fast['ray_renderer'] = FastRays(run_nerf.render_rays, queries, fast['ray_renderer'].baker.box, said.append)
    other = frame(fast)
    assert other.rgb0 is None and len(said) == 1 and 'with float32' in said[0]
    np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_what_shows_in_the_opacity_alone_counts(ball, monkeypatch):
    """A white ball before white is no different in its colours."""
    exact, fast, _ = ball
    empty = baking.empty_grid(8, torch.tensor([[-9.0, -9, -9], [9, 9, 9]]))
    forward, white = Ball.forward, torch.tensor([99.0, 99, 99, 0])
    monkeypatch.setattr(Ball, 'forward', lambda self, x: forward(self, x) + white)
    monkeypatch.setattr(baking.Baker, 'grid', lambda *args: empty)
    np.testing.assert_allclose(frame(fast).acc, frame(exact).acc, atol=fast_rays.TOLERANCE)


def test_fog_is_looked_at_less_closely(ball):
    _, fast, asked = ball
    torch.nn.init.constant_(fast['network_fine'].hardness, -1.0)  # everywhere around
    frame(fast)
    assert asked['fast'] < (2 * 2 + 2 * baking.MOST_LOOKS) * baking.LARGE ** 3 + 64 * 64 * 192
    sizes = {network: grid.resolution for (network, _), grid in fast['ray_renderer'].baker.grids.items()}
    assert baking.LARGE < sizes[fast['network_fine']] < sizes[fast['network_fn']] == baking.LARGE * baking.DIVIDED


@pytest.mark.parametrize('options', [
    {'N_importance': 0}, {'N_importance': 0, 'network_fine': None}, {'network_fine': None}, {'N_samples': 33},
    {'N_samples': 3}, {'N_samples': 1, 'N_importance': 0}, {'white_bkgd': False}, {'lindisp': True},
    {'use_viewdirs': False}],
    ids=lambda options: ' '.join(map(str, options.items())))
def test_fast_rendering_with_other_options(ball, options):
    exact, fast, _ = ball
    one, other = frame({**exact, **options}), frame({**fast, **options})
    assert options.get('N_importance') == 0 or (one.rgb0 is not None and other.rgb0 is None)
    np.testing.assert_allclose(other.rgb, one.rgb, atol=fast_rays.TOLERANCE)
    assert ((other.rgb - one.rgb) ** 2).mean() < (2 * fast_rays.MEAN_TOLERANCE) ** 2


def test_fast_rendering_in_inference_mode(ball):
    exact, fast, _ = ball
    with torch.inference_mode():
        other = frame(fast)
        assert other.rgb0 is None
        np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_small_things_in_a_small_picture(ball, monkeypatch):
    """A ball that is a few pixels wide."""
    exact, fast, _ = ball
    forward = Ball.forward
    monkeypatch.setattr(Ball, 'forward', lambda self, x: forward(self, x * 2.5))  # of radius 0.2 in a box of 6
    one, other = frame(exact), frame(fast)
    assert 10 < (one.acc > 0.9).sum() < 80 and other.rgb0 is None
    np.testing.assert_allclose(other.rgb, one.rgb, atol=0.05)


@pytest.mark.parametrize('side', [64, 100, 128, 400])
def test_the_rays_that_are_checked_are_all_over_the_picture(side):
    rays = fast_rays.spread(side * side, min(1024, max(256, side * side // 64)))
    assert rays.min() >= 0 and rays.max() < side * side and len(rays.unique()) == len(rays)
    cells, _, _ = np.histogram2d(rays // side, rays % side, bins=4, range=[[0, side]] * 2)
    assert cells.min() > 0.5 * cells.mean()


class Wisps(Ball):
    """Beside the ball a region that is just transparent, but for blobs smaller than the distance of looks."""
    below = -1.0

    def forward(self, x):
        raw, pts = super().forward(x), x[:, :3]
        blob = torch.relu(torch.cos(100 * pts).prod(-1) - 0.9) / 0.1
        away = torch.linalg.vector_norm(pts - pts.new_tensor([0.9, 0, 0]), dim=-1)
        density = torch.where(away < 0.3, (11 - self.below) * blob + self.below,
                              torch.where(away < 0.35, self.below, raw[:, 3]))
        return torch.cat([raw[:, :3], density[:, None]], -1)


@pytest.fixture
def wisps(ball, monkeypatch):
    """`ball` with these networks, unchecked."""
    for kwargs in ball[:2]:
        kwargs['network_fn'], kwargs['network_fine'] = Wisps(), Wisps()
    monkeypatch.setattr(fast_rays, 'CHECKED', 1)
    monkeypatch.setattr(fast_rays, 'FEWEST_CHECKED', 1)
    monkeypatch.setattr(fast_rays, 'TOGETHER', (0.0,))
    return ball


def test_blobs_that_looks_miss_are_seen(wisps, monkeypatch):
    exact, fast, _ = wisps
    one, other = frame(exact), frame(fast)
    assert other.rgb0 is None and np.abs(other.acc - one.acc).max() < 0.01
    monkeypatch.setattr(baking, 'MARGINS', (0.0,))
    fast['ray_renderer'].baker.versions = None
    missed = frame(fast)
    assert missed.rgb0 is None and np.abs(missed.acc - one.acc).max() > 0.05


def test_suspect_cells_are_kept_where_a_closer_look_finds_more(wisps, monkeypatch):
    """Between a margin and half of it, those cells alone in which an eighth's centre is near a blob."""
    _, fast, _ = wisps
    monkeypatch.setattr(baking, 'MARGINS', (0.8, 0.0))  # 12.8 in units of density
    kept = {}
    for below in (-5.0, -10.0, -14.0):
        monkeypatch.setattr(Wisps, 'below', below)
        fast['ray_renderer'].baker.versions = None
        frame(fast)
        grid = fast['ray_renderer'].baker.grids[fast['network_fine'], 0.8]
        centers = grid.points_in(torch.arange(grid.occupied.numel()), 0.5)
        region = torch.linalg.vector_norm(centers - centers.new_tensor([0.9, 0, 0]), dim=-1) < 0.3
        kept[below] = grid.occupied.flatten()[region].float().mean().item()
    assert kept[-5.0] == 1 and kept[-14.0] + 0.005 < kept[-10.0] < 0.9


def test_most_of_the_box_is_not_suspect(ball):
    """Where it is barely transparent, the margin is a smaller one."""
    _, fast, _ = ball
    for network in (fast['network_fn'], fast['network_fine']):
        torch.nn.init.constant_(network.hardness, 0.3)  # nowhere lower than -1.5
    frame(fast)
    for (_, margin), grid in fast['ray_renderer'].baker.grids.items():
        assert margin < 0.1 and grid.resolution == baking.LARGE * baking.DIVIDED
        assert 0 < grid.occupied.float().mean() < 0.1


def test_more_looks_where_something_was_missed(wisps, monkeypatch):
    """The margin that the first looks allow is too small for what a checked ray meets."""
    exact, fast, _ = wisps
    monkeypatch.setattr(fast_rays, 'CHECKED', 64 * 64)
    monkeypatch.setattr(fast_rays, 'FEWEST_CHECKED', 64 * 64)
    monkeypatch.setattr(fast_rays, 'TOLERANCE', 0.05)
    monkeypatch.setattr(fast_rays, 'LOOKS', (0.5, 16))
    one, other = frame(exact), frame(fast)
    assert other.rgb0 is None and np.abs(other.acc - one.acc).max() < 0.05
    margins = [margin for network, margin in fast['ray_renderer'].baker.grids if network is fast['network_fine']]
    assert len(margins) == 2 and margins[0] < margins[1]


def test_coarse_samples_that_have_weight_are_asked_for_precisely(ball):
    """Were they not, the cheaper products would move the fine samples off the surface."""
    exact, fast, _ = ball
    coarse, precise, asked = exact['network_fn'], exact['network_query_fn'], []

    def cheaper(pts, viewdirs, network):
        raw = precise(pts, viewdirs, network)
        return raw * 0.2 if network is coarse else raw

    def counted(pts, viewdirs, network):
        asked.append(len(pts))
        return precise(pts, viewdirs, network)
    fast['ray_renderer'] = FastRays(run_nerf.render_rays, [cheaper, counted], [[-3.0, -3, -3], [3, 3, 3]])
    one, other = frame(exact), frame(fast)
    assert other.rgb0 is None and 0 < sum(asked) < 64 * 64 * 10
    np.testing.assert_allclose(other.rgb, one.rgb, atol=0.02)


def test_a_fused_step_counts_as_a_change(tmp_path):
    args = config_parser().parse_args([*map(str, [*SMALL, '--no-occupancy_grid', '--basedir', tmp_path])])
    *_, parameters, optimizer = prepare(args, Ranks(1))
    before = [occupancy.version(parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(occupancy.version(parameter) != one for parameter, one in zip(parameters, before))


def test_training_and_small_pictures_are_left_alone(ball):
    exact, fast, _ = ball
    renderer = fast['ray_renderer']
    options = {key: exact[key] for key in ('network_fn', 'network_fine', 'N_samples', 'N_importance', 'perturb',
                                           'raw_noise_std')}
    assert renderer.choose(torch.zeros(10 ** 4, 11), **options) is run_nerf.render_rays  # there is a gradient
    with torch.no_grad():
        assert renderer.choose(torch.zeros(4, 11), **options) is run_nerf.render_rays
        assert renderer.choose(torch.zeros(10 ** 4, 11), **{**options, 'perturb': 1.0}) is run_nerf.render_rays


def test_little_is_skipped_in_which_a_denser_look_finds_anything(tmp_path):
    """Of a trained network, the demo's after a few hundred steps. A blob smaller than the distance between looks may be
    missed: that is why some rays of each frame are rendered exactly too."""
    options = [*map(str, ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res', '--device',
                          'cpu', '--testskip', 4, '--basedir', tmp_path, '--N_iters', 300, '--N_rand', 256, *NEVER])]
    assert main(options) == 0
    args = config_parser().parse_args(options)
    scene, _, _, _, kwargs, *_ = prepare(args, Ranks(1))
    renderer = kwargs['ray_renderer']
    for network in (kwargs['network_fn'], kwargs['network_fine']):
        rays = torch.tensor([[0, 0, 0, 0, 0, 0, scene.near, scene.far, 0, 0, 1.0]])
        grid = renderer.baker.grid(network, fast_rays.LOOKS[0], rays, args.N_samples)
        cells = (~grid.occupied).flatten().nonzero()[:, 0]
        assert 0.3 < len(cells) / grid.occupied.numel() < 1
        cells = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:4000]]
        thinnest = (scene.far - scene.near) / args.N_samples
        missed = torch.zeros(len(cells), dtype=torch.bool)
        for i in range(64):  # four times as dense as the small cells, each way
            within = (torch.tensor([i // 16, i // 4 % 4, i % 4]) + 0.5) / 4
            points, direction = grid.points_in(cells, within), torch.tensor([[0.0, 0, 1]])
            with torch.no_grad():
                raw = kwargs['network_query_fn'](points[:, None], direction.expand(len(points), 3), network)
            alpha = 1 - torch.exp(-torch.relu(raw[:, 0, 3]) * thinnest)
            missed |= alpha > 0.01
        assert missed.float().mean() < 4e-3
    for pose in scene.poses:
        rays_o, rays_d = get_rays(scene.H, scene.W, scene.K, torch.as_tensor(pose))
        for t in (scene.near, scene.far):
            ends = rays_o + t * rays_d
            assert (ends >= renderer.baker.box[0] - 1e-4).all() and (ends <= renderer.baker.box[1] + 1e-4).all()


@pytest.mark.parametrize('options, fast', [([], True), (['--exact_render'], False)])
def test_exact_render_leaves_nothing_out(tmp_path, options, fast):
    args = config_parser().parse_args([*map(str, ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo',
                                                  '--half_res', '--device', 'cpu', '--basedir', tmp_path, *options])])
    _, _, _, training, rendering, *_ = prepare(args, Ranks(1))
    assert training['ray_renderer'] is run_nerf.render_rays
    assert (rendering['ray_renderer'] is run_nerf.render_rays) == (not fast)
