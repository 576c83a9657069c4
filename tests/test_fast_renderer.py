"""Fast rendering: its images are those of exact rendering, and it evaluates networks less often."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_devices import DEVICE, Random, on_cpu_only

import run_nerf
from accel import baking, fast_renderer
from accel.fast_renderer import FastRenderer
from accel.network_query import NetworkQuery
from run_nerf_helpers import RadianceField, get_rays
from training.options import config_parser
from training.processes import Processes

AABB = [[-3.0, -3, -3], [3, 3, 3]]
POSE = np.concatenate([np.eye(3), [[0], [0], [4]]], -1)
DEMO = ['--config', ROOT / 'configs/demo.txt', '--datadir', ROOT / 'data/demo', '--half_res',
        '--device', str(DEVICE)]


class Ball(RadianceField):
    """An opaque ball of radius 0.5."""

    def __init__(self):
        super().__init__()
        self.hardness = torch.nn.Parameter(torch.tensor(200.0))

    def density(self, points):
        return self.hardness * (0.5 - torch.linalg.vector_norm(points, dim=-1))

    def forward(self, points, viewdirs=None):
        return torch.cat([4 * points, self.density(points)[:, None]], -1)


class CountingQuery(NetworkQuery):
    """Counts the points that it evaluates."""
    points = 0

    def evaluate(self, inputs, network, rays=None):
        self.points += len(inputs)
        return super().evaluate(inputs, network, rays)

    def density(self, points, network):
        self.points += len(points)
        return super().density(points, network)


class ScaledQuery(CountingQuery):
    """Less precise: `raw` of the network `of`, or of all, is multiplied by a factor."""

    def __init__(self, factor, of=None):
        super().__init__()
        self.factor, self.of = factor, of

    def scale(self, network):
        return self.factor if self.of in (None, network) else 1.0

    def evaluate(self, inputs, network, rays=None):
        return super().evaluate(inputs, network, rays) * self.scale(network)

    def density(self, points, network):
        return super().density(points, network) * self.scale(network)


@pytest.fixture
def ball():
    """Arguments of `render` for a ball, exact and fast, and what fast rendering evaluates with."""
    exact_query, fast_query = CountingQuery(), CountingQuery()
    exact = {'network_fn': Ball(), 'network_fine': Ball(), 'network_query_fn': exact_query,
             'N_samples': 64, 'N_importance': 64, 'perturb': 0.0, 'raw_noise_std': 0.0,
             'white_bkgd': True, 'near': 2.0, 'far': 6.0, 'ndc': False, 'use_viewdirs': True}
    renderer = FastRenderer(run_nerf.ExactRenderer(), [fast_query, exact_query], AABB, say=lambda line: None)
    return exact, {**exact, 'renderer': renderer}, fast_query


def frame(kwargs, side=64):
    K = np.array([[80.0, 0, side / 2], [0, 80, side / 2], [0, 0, 1]])
    return run_nerf.render_frame(POSE, [side, side, 80.0], K, 4096, kwargs)


def is_fast(frame):
    return frame.rgb0 is None


def without_merging(monkeypatch):
    monkeypatch.setattr(fast_renderer, 'MERGE_LENGTH', 0.0)


def new_renderer(kwargs, *queries, say=lambda line: None):
    """Put a new `FastRenderer` into `kwargs`, with other constants or queries."""
    queries = queries or (CountingQuery(), kwargs['network_query_fn'])
    kwargs['renderer'] = FastRenderer(run_nerf.ExactRenderer(), queries, AABB, say)
    return kwargs['renderer']


def bake_nothing(monkeypatch):
    empty = baking.bounded_grid(8, torch.tensor([[-9.0, -9, -9], [9, 9, 9]]))
    empty.set_occupied(torch.zeros_like(empty.occupied))
    monkeypatch.setattr(fast_renderer, 'bake', lambda *args: empty)


def test_evaluated_samples_are_exact(ball, monkeypatch):
    exact, fast, query = ball
    without_merging(monkeypatch)
    new_renderer(fast, query, query)
    one = frame(exact)
    all_points = exact['network_query_fn'].points
    other = frame(fast)
    assert one.acc.max() > 0.99 and one.acc.min() == 0
    for key in ('rgb', 'acc'):
        np.testing.assert_allclose(getattr(other, key), getattr(one, key), atol=2e-4)
    with_baking, query.points = query.points, 0
    exact['network_query_fn'].points = 0
    frame(fast)
    assert query.points < with_baking and query.points + exact['network_query_fn'].points < all_points / 3


def test_frames_are_exact_where_memory_is_too_small_to_bake(ball, monkeypatch):
    exact, fast, query = ball
    said, baked = [], []

    def bake(*args):
        baked.append(args)
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(fast_renderer, 'bake', bake)
    new_renderer(fast, query, query, say=said.append)
    for _ in range(2):
        other = frame(fast)
        assert not is_fast(other) and np.array_equal(other.rgb, frame(exact).rgb)
    assert len(said) == len(baked) == 1 and 'do not fit in GPU memory' in said[0]
    fast['renderer'].drop_cache()
    frame(fast)
    assert len(said) == 1 and len(baked) == 2


def test_near_samples_are_merged(ball, monkeypatch):
    exact, fast, query = ball
    frame(fast)
    query.points = 0
    merged, one = frame(fast), frame(exact)
    fewer = query.points
    without_merging(monkeypatch)
    new_renderer(fast, query, exact['network_query_fn'])
    frame(fast)
    query.points = 0
    each = frame(fast)
    assert is_fast(merged) and is_fast(each) and fewer < 0.8 * query.points
    assert max(np.abs(other.rgb - one.rgb).max() for other in (each, merged)) < 2e-3


def test_merge_neighbours():
    random = np.random.default_rng(0)
    ray = np.sort(random.integers(0, 6, 80))
    bins = np.concatenate([np.sort(random.integers(0, 5, (ray == i).sum())) for i in range(6)])
    points, lengths = random.random((80, 3)), random.random(80)
    merged = fast_renderer.merge_neighbours(*map(torch.as_tensor, (ray, bins, points, lengths)))
    means, first, group = (part.cpu() for part in merged)
    keys = sorted(set(zip(ray, bins)))
    assert len(means) == len(keys) == first.sum()
    for number, key in enumerate(keys):
        its = [i for i in range(80) if (ray[i], bins[i]) == key]
        np.testing.assert_allclose(means[number], np.average(points[its], 0, lengths[its]), atol=1e-9)
        assert (group[its] == number).all() and first[its].tolist() == [True] + [False] * (len(its) - 1)
    zeros = torch.zeros(2)
    means, *_ = fast_renderer.merge_neighbours(zeros, zeros, torch.tensor([[1.0, 1, 1], [3, 3, 3]]), zeros)
    assert means.tolist() == [[2, 2, 2]]  # two samples in the same place have no length


def test_fog_of_the_coarse_network_alone_is_not_shown(ball):
    exact, fast, query = ball
    for kwargs in (exact, fast):
        kwargs['network_fn'] = Ball()
        torch.nn.init.constant_(kwargs['network_fn'].hardness, -0.5)  # everywhere around
    one, other = frame(exact), frame(fast)
    np.testing.assert_allclose(other.rgb, one.rgb, atol=fast_renderer.TOLERANCE)
    assert ((other.rgb - one.rgb) ** 2).mean() < fast_renderer.RMS_TOLERANCE ** 2
    query.points = exact['network_query_fn'].points = 0
    frame(fast)
    assert query.points + exact['network_query_fn'].points < 64 * 64 * 192 / 3


def test_the_first_pass_is_the_coarse_one_whatever_its_number_of_samples(ball):
    """A sampler whose coarse pass has as many samples as the fine one usually has."""
    exact, fast, query = ball

    class ManySamples(run_nerf.ExactRenderer):
        def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, N_importance=0, **kwargs):
            return run_nerf.render_rays(ray_batch, network_fn, network_query_fn, N_samples + N_importance,
                                        N_importance=N_importance // 2, **kwargs)
    exact['renderer'] = ManySamples()
    fast['renderer'] = FastRenderer(ManySamples(), [query, exact['network_query_fn']], AABB)
    torch.nn.init.constant_(exact['network_fn'].hardness, -0.5)  # a coarse pass that must not be shown
    one, other = frame(exact), frame(fast)
    assert is_fast(other)
    np.testing.assert_allclose(other.rgb, one.rgb, atol=0.01)


def test_changed_networks_are_baked_again(ball):
    exact, fast, _ = ball
    frame(fast)
    with torch.no_grad():
        fast['network_fine'].hardness.neg_()  # everything but the ball
        fast['network_fn'].hardness.neg_()
    fast['renderer'].drop_cache()
    other = frame(fast)
    assert is_fast(other)
    np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_checked_rays_are_rendered_in_chunks(ball, monkeypatch):
    """As the others, so that a chunk always fits in memory."""
    _, fast, _ = ball
    sizes = []

    def render_rays(self, rays, *args, **kwargs):
        sizes.append(len(rays))
        return run_nerf.render_rays(rays, *args, **kwargs)
    monkeypatch.setattr(run_nerf.ExactRenderer, 'render_rays', render_rays)
    K = np.array([[80.0, 0, 32], [0, 80, 32], [0, 0, 1]])
    run_nerf.render_frame(POSE, [64, 64, 80.0], K, 100, fast)
    assert max(sizes) == 100 and sum(sizes) >= fast_renderer.MIN_CHECKED_RAYS


def test_networks_are_baked_once(ball):
    _, fast, _ = ball
    frame(fast)
    grids = dict(fast['renderer'].grids)
    frame(fast)
    assert fast['renderer'].grids == grids and len(grids) == 2
    assert not fast['renderer'].state_dict()


def test_networks_that_show_nothing(ball):
    exact, fast, _ = ball
    for network in (fast['network_fn'], fast['network_fine']):
        torch.nn.init.constant_(network.hardness, 0.0)
    other = frame(fast)
    assert is_fast(other) and (other.rgb == 1).all() and (frame(exact).rgb == 1).all()


def test_exact_where_the_check_fails(ball, monkeypatch):
    exact, fast, _ = ball
    said = []
    bake_nothing(monkeypatch)
    new_renderer(fast, say=said.append)
    for _ in range(2):
        assert (frame(fast).rgb == frame(exact).rgb).all()
    assert len(said) == 2 and 'rendered more precisely' in said[0] and 'rendered exactly' in said[1]


def test_imprecise_products_give_way(ball):
    exact, fast, _ = ball
    said = []
    new_renderer(fast, ScaledQuery(0.5), exact['network_query_fn'], say=said.append)
    other = frame(fast)
    assert is_fast(other) and len(said) == 1 and 'rendered more precisely' in said[0]
    np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_the_opacity_is_checked_too(ball, monkeypatch):
    """The colours of a white ball on white are right without the ball."""
    exact, fast, _ = ball
    forward, white = Ball.forward, torch.tensor([99.0, 99, 99, 0])
    monkeypatch.setattr(Ball, 'forward', lambda self, *args: forward(self, *args) + white)
    bake_nothing(monkeypatch)
    np.testing.assert_allclose(frame(fast).acc, frame(exact).acc, atol=fast_renderer.TOLERANCE)


def test_fog_is_divided_less(ball):
    _, fast, query = ball
    torch.nn.init.constant_(fast['network_fine'].hardness, -1.0)  # everywhere around
    frame(fast)
    cells = baking.BAKING_RESOLUTION ** 3
    assert query.points < (2 * 2 + 2 * baking.MAX_CENTERS) * cells + 64 * 64 * 192
    sizes = {network: grid.resolution for (network, *_), grid in fast['renderer'].grids.items()}
    finest = baking.BAKING_RESOLUTION * baking.MAX_DIVISIONS
    assert baking.BAKING_RESOLUTION < sizes[fast['network_fine']] < sizes[fast['network_fn']] == finest


@pytest.mark.parametrize('options', [
    {'N_importance': 0}, {'N_importance': 0, 'network_fine': None}, {'network_fine': None}, {'N_samples': 33},
    {'N_samples': 3}, {'N_samples': 1, 'N_importance': 0}, {'white_bkgd': False}, {'lindisp': True},
    {'use_viewdirs': False}],
    ids=lambda options: ' '.join(map(str, options.items())))
def test_other_options(ball, options):
    exact, fast, _ = ball
    one, other = frame({**exact, **options}), frame({**fast, **options})
    assert options.get('N_importance') == 0 or (not is_fast(one) and is_fast(other))
    np.testing.assert_allclose(other.rgb, one.rgb, atol=fast_renderer.TOLERANCE)
    assert ((other.rgb - one.rgb) ** 2).mean() < (2 * fast_renderer.RMS_TOLERANCE) ** 2


@on_cpu_only('the stand-in for a GPU lacks inference mode')
def test_inference_mode(ball):
    exact, fast, _ = ball
    with torch.inference_mode():
        other = frame(fast)
        assert is_fast(other)
        np.testing.assert_allclose(other.rgb, frame(exact).rgb, atol=0.01)


def test_small_things_in_a_small_image(ball, monkeypatch):
    """A ball that is a few pixels wide."""
    exact, fast, _ = ball
    density = Ball.density
    # radius 0.2, box 6
    monkeypatch.setattr(Ball, 'density', lambda self, points: density(self, points * 2.5))
    one, other = frame(exact), frame(fast)
    assert 10 < (one.acc > 0.9).sum() < 80 and is_fast(other)
    np.testing.assert_allclose(other.rgb, one.rgb, atol=0.05)


@pytest.mark.parametrize('side', [64, 100, 128, 400])
def test_checked_rays_are_all_over_the_image(side):
    rays = fast_renderer.stratified_indices(side * side, max(256, side * side // fast_renderer.CHECKED_EVERY))
    assert rays.min() >= 0 and rays.max() < side * side and len(rays.unique()) == len(rays)
    cells, _, _ = np.histogram2d(rays // side, rays % side, bins=4, range=[[0, side]] * 2)
    assert cells.min() > 0.5 * cells.mean()


class Wisps(Ball):
    """Beside the ball a region that is just transparent, but for blobs that evaluated points miss."""
    below = -1.0

    def density(self, points):
        blob = torch.relu(torch.cos(100 * points).prod(-1) - 0.9) / 0.1
        away = torch.linalg.vector_norm(points - points.new_tensor([0.9, 0, 0]), dim=-1)
        return torch.where(away < 0.3, (11 - self.below) * blob + self.below,
                           torch.where(away < 0.35, self.below, super().density(points)))


@pytest.fixture
def wisps(ball, monkeypatch):
    """`ball` with these networks, unchecked and without merging."""
    for kwargs in ball[:2]:
        kwargs['network_fn'], kwargs['network_fine'] = Wisps(), Wisps()
    monkeypatch.setattr(fast_renderer, 'CHECKED_EVERY', 10 ** 6)
    monkeypatch.setattr(fast_renderer, 'MIN_CHECKED_RAYS', 1)
    without_merging(monkeypatch)
    new_renderer(ball[1])
    return ball


def test_blobs_between_evaluated_points_are_seen(wisps, monkeypatch):
    exact, fast, _ = wisps
    one, other = frame(exact), frame(fast)
    assert is_fast(other) and np.abs(other.acc - one.acc).max() < 0.01
    monkeypatch.setattr(baking, 'THRESHOLDS', (baking.MIN_OPTICAL_DEPTH,))
    fast['renderer'].drop_cache()
    missed = frame(fast)
    assert is_fast(missed) and np.abs(missed.acc - one.acc).max() > 0.05


def test_suspect_cells_are_kept_if_other_points_find_density(monkeypatch):
    """Between a threshold and half of it, only cells are kept in which one of the eight points is near a
    blob."""
    monkeypatch.setattr(baking, 'THRESHOLDS', (-0.8, baking.MIN_OPTICAL_DEPTH))  # -12.8 in units of density
    network, kept = Wisps(), {}
    for below in (-5.0, -10.0, -14.0):
        monkeypatch.setattr(Wisps, 'below', below)
        grid = baking.bake(lambda points: network.density(points) * 4 / 64, torch.tensor(AABB), 6)
        centers = grid.cell_points(torch.arange(grid.occupied.numel()), 0.5)
        region = torch.linalg.vector_norm(centers - centers.new_tensor([0.9, 0, 0]), dim=-1) < 0.3
        kept[below] = grid.occupied.flatten()[region].float().mean().item()
    assert kept[-5.0] == 1 and kept[-14.0] + 0.005 < kept[-10.0] < 0.9


def test_few_cells_are_suspect_where_most_of_the_box_is_barely_transparent(ball):
    _, fast, query = ball
    for network in (fast['network_fn'], fast['network_fine']):
        torch.nn.init.constant_(network.hardness, 0.3)  # nowhere lower than -1.5
    frame(fast)
    assert query.points < (2 * 2 + 2 * 2 * 6) * baking.BAKING_RESOLUTION ** 3
    for grid in fast['renderer'].grids.values():
        assert grid.resolution == baking.BAKING_RESOLUTION * baking.MAX_DIVISIONS
        assert 0 < grid.occupied.float().mean() < 0.1


def test_more_points_are_evaluated_where_something_was_missed(wisps, monkeypatch):
    """The first threshold is too high for what a checked ray meets."""
    exact, fast, _ = wisps
    monkeypatch.setattr(fast_renderer, 'MIN_CHECKED_RAYS', 64 * 64)
    monkeypatch.setattr(fast_renderer, 'TOLERANCE', 0.05)
    monkeypatch.setattr(fast_renderer, 'FAST_CELLS', 0.5)
    renderer = new_renderer(fast)
    one, other = frame(exact), frame(fast)
    assert is_fast(other) and np.abs(other.acc - one.acc).max() < 0.05
    few, many = ([grid.occupied.sum() for (network, level, _), grid in renderer.grids.items()
                  if (network, level) == (fast['network_fine'], wanted)] for wanted in renderer.levels)
    assert few < many


def test_coarse_samples_that_have_weight_are_evaluated_precisely(ball):
    """Otherwise cheaper products would move the fine samples off the surface."""
    exact, fast, _ = ball
    precise = exact['network_query_fn']
    new_renderer(fast, ScaledQuery(0.2, of=exact['network_fn']), precise)
    one = frame(exact)
    other = frame(fast)
    precise.points = 0
    frame(fast)
    assert is_fast(other) and 256 * 192 < precise.points < 256 * 192 + 64 * 64 * 10
    np.testing.assert_allclose(other.rgb, one.rgb, atol=0.02)


def test_training_and_small_images_are_exact(ball):
    exact, fast, _ = ball
    renderer = fast['renderer']
    names = ('network_fn', 'network_query_fn', 'network_fine', 'N_samples', 'N_importance', 'perturb',
             'raw_noise_std')
    options = {name: exact[name] for name in names}
    # gradients are enabled
    assert renderer.for_rays(torch.zeros(10 ** 4, 11), 1000, **options) is renderer.exact
    with torch.no_grad():
        assert renderer.for_rays(torch.zeros(4, 11), 1000, **options) is renderer.exact
        random = {**options, 'perturb': 1.0}
        assert renderer.for_rays(torch.zeros(10 ** 4, 11), 1000, **random) is renderer.exact
        assert renderer.for_rays(torch.zeros(10 ** 4, 11), 1000, **options, retraw=True) is renderer.exact


# --- in a run ---

def prepared(*options):
    """Options, scene, arguments of exact rendering, and the `ImageRenderer` of a run of the demo."""
    args, processes = config_parser().parse_args([str(option) for option in (*DEMO, *options)]), Processes(1)
    scene, _, kwargs_train, kwargs, *_ = run_nerf.prepare(args, processes)
    frames = run_nerf.frame_renderer(args, scene, kwargs_train, kwargs, processes, None, print)
    return args, scene, kwargs, frames


def test_the_held_out_view_shows_both_networks(tmp_path):
    _, scene, _, frames = prepared('--basedir', tmp_path)
    assert not is_fast(frames.render_view(scene.poses[0]))
    assert is_fast(next(frames.render_path(scene.poses[:1])))


@pytest.mark.parametrize('options, fast', [([], True), (['--exact_render'], False)])
def test_exact_render_leaves_nothing_out(tmp_path, options, fast):
    _, _, kwargs, frames = prepared('--basedir', tmp_path, *options)
    assert isinstance(kwargs['renderer'], run_nerf.ExactRenderer)
    assert isinstance(frames.render_kwargs['renderer'], FastRenderer) == fast
    assert isinstance(frames.view_kwargs['renderer'], run_nerf.ExactRenderer)


@pytest.mark.slow
def test_almost_nothing_visible_is_skipped(tmp_path):
    """Of a trained network, the demo's after a few hundred steps. A blob between evaluated points may be
    missed: that is why some rays of each frame are rendered exactly too."""
    never = [item for name in ('i_img', 'i_testset', 'i_video') for item in (f'--{name}', 10 ** 6)]
    options = ['--testskip', 4, '--basedir', tmp_path, '--N_iters', 300, '--N_rand', 256, *never]
    assert run_nerf.main([str(option) for option in (*DEMO, *options)]) == 0
    args, scene, kwargs, frames = prepared(*options)
    renderer = frames.render_kwargs['renderer']
    aabb = renderer.aabb
    rays = torch.tensor([[0, 0, 0, 0, 0, 0, scene.near, scene.far, 0, 0, 1.0]])
    interval = (scene.far - scene.near) / args.N_samples
    for network in (kwargs['network_fn'], kwargs['network_fine']):
        grid = renderer.grid(network, renderer.levels[0], rays, args.N_samples)
        cells = (~grid.occupied).flatten().nonzero()[:, 0]
        assert 0.3 < len(cells) / grid.occupied.numel() < 1
        cells = cells[Random(0).rand(len(cells)).argsort()[:4000]]
        missed = torch.zeros(len(cells), dtype=torch.bool)
        for i in range(64):  # four times as dense as the small cells along each axis
            within = (torch.tensor([i // 16, i // 4 % 4, i % 4]) + 0.5) / 4
            density = kwargs['network_query_fn'].density(grid.cell_points(cells, within), network)
            missed |= 1 - torch.exp(-torch.relu(density) * interval) > 0.01
        assert missed.float().mean() < 4e-3
    for pose in scene.poses:
        rays_o, rays_d = get_rays(scene.H, scene.W, scene.K, torch.as_tensor(pose))
        for t in (scene.near, scene.far):
            ends = rays_o + t * rays_d
            assert (ends >= aabb[0] - 1e-4).all() and (ends <= aabb[1] + 1e-4).all()
