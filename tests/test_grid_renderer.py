"""Rendering through an occupancy grid: against the formula, training against rendering, changes of the
grid."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_devices import DEVICE
from tiny_grids import CPU, each_implementation, march, occupied_grid, rays_around  # noqa: F401
from tiny_networks import encoded_nerf, hash_nerf, points_and_directions

from accel.grid_renderer import MAX_RAYS, SAMPLES_PER_ADVANCE, UPDATE_EVERY_N_STEPS, GridRenderer
from accel.network_query import NetworkQuery
from accel.occupancy import OccupancyGrid
from accel.packed import MIN_TRANSMITTANCE
from run_nerf import ImageRenderer, batchify_rays, loss_and_gradient, nerf_losses, render
from run_nerf_helpers import RadianceField
from scenes.cameras import Camera
from scenes.rays import Batch, RaySampler

both_implementations = pytest.mark.usefixtures('each_implementation')
QUERY, N_SAMPLES = NetworkQuery(), 128


class Fog(RadianceField):
    """The same raw outputs everywhere."""

    def __init__(self, density):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.tensor([0.0, 1.0, -1.0, density]))

    def forward(self, points, viewdirs=None):
        return self.raw.expand(len(points), 4)

    def density(self, points):
        return self.raw[3].expand(len(points))


def ray_batch(N):
    """Rays [N, 11] around the box, between 0.1 and 6."""
    rays_o, rays_d = rays_around(N)
    return torch.cat([rays_o, rays_d, torch.full([N, 1], 0.1), torch.full([N, 1], 6.0),
                      torch.nn.functional.normalize(rays_d, dim=-1)], -1)


# --- maps ---------------------------------------------------------------------------------------------------

@both_implementations
@pytest.mark.parametrize('at_once', [2 ** 16, 1500])
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_rendering_equals_training_and_the_formula(share, at_once, monkeypatch):
    """Without gradients rays advance in parts, several of them where few samples are computed at once."""
    monkeypatch.setitem(SAMPLES_PER_ADVANCE, DEVICE.type, at_once)
    grid, fog, rays = occupied_grid(share), Fog(2.0), ray_batch(300)
    renderer = GridRenderer(grid)
    trained = renderer.render_rays(rays, fog, QUERY, N_SAMPLES, white_bkgd=True)
    trained['rgb_map'].sum().backward()  # also where there is no sample at all
    with torch.no_grad():
        rendered = renderer.render_rays(rays, fog, QUERY, N_SAMPLES, white_bkgd=True)
    assert rendered.keys() == trained.keys() == {'rgb_map', 'disp_map', 'acc_map', 'depth_map'}
    for key, value in rendered.items():
        torch.testing.assert_close(value, trained[key].detach(), rtol=1e-4, atol=1e-5)
    _, _, (_, _, offsets) = march(grid, rays[:, :3], rays[:, 3:6], grid.step_size(N_SAMPLES))
    acc = 1 - torch.exp(-2.0 * grid.step_size(N_SAMPLES) * offsets.diff())
    torch.testing.assert_close(rendered['acc_map'], acc, rtol=1e-4, atol=MIN_TRANSMITTANCE)
    colors = torch.sigmoid(torch.tensor([0.0, 1.0, -1.0])) * acc[:, None] + 1 - acc[:, None]
    torch.testing.assert_close(rendered['rgb_map'], colors, rtol=1e-4, atol=MIN_TRANSMITTANCE)
    assert torch.isfinite(rendered['disp_map']).all() and (rendered['disp_map'][acc == 0] == 0).all()


@pytest.mark.parametrize('make', [encoded_nerf, hash_nerf])
def test_rendering_equals_training_for_any_network(make):
    torch.manual_seed(0)
    network, rays, renderer = make(), ray_batch(200), GridRenderer(occupied_grid(0.3))
    trained = renderer.render_rays(rays, network, QUERY, N_SAMPLES)
    with torch.no_grad():
        rendered = renderer.render_rays(rays, network, QUERY, N_SAMPLES)
    for key in ('rgb_map', 'disp_map', 'acc_map', 'depth_map'):
        torch.testing.assert_close(rendered[key], trained[key].detach(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_opaque_rays_end_early(monkeypatch):
    monkeypatch.setitem(SAMPLES_PER_ADVANCE, DEVICE.type, 400)
    evaluated = []

    def network(density):
        fog = Fog(density)
        fog.register_forward_pre_hook(lambda _, inputs: evaluated.append(len(inputs[0])))
        return fog
    counts = []
    for density in (2.0, 1000.0):
        evaluated.clear()
        renderer = GridRenderer(occupied_grid(1.0))
        renderer.render_rays(ray_batch(100), network(density), NetworkQuery(31), N_SAMPLES)
        counts.append(sum(evaluated))
    assert 0 < counts[1] < 0.2 * counts[0]


@pytest.mark.parametrize('options', [{'retraw': True}, {'lindisp': True}, {'pytest': True},
                                     {'N_importance': 4}])
def test_options_that_are_not_available(options):
    with pytest.raises(ValueError, match='GridRenderer does not support'):
        GridRenderer(occupied_grid(0.3)).render_rays(ray_batch(3), Fog(2.0), QUERY, N_SAMPLES, **options)


def test_noise_and_perturbation_are_random():
    network, rays, renderer = Fog(2.0), ray_batch(100), GridRenderer(occupied_grid(0.3))
    for options in ({'perturb': 1.0}, {'raw_noise_std': 1.0}, {}):
        one, other = (renderer.render_rays(rays, network, QUERY, N_SAMPLES, **options)['acc_map']
                      for _ in range(2))
        assert one.equal(other) == (not options)


# --- packed samples -----------------------------------------------------------------------------------------

@both_implementations
def test_packed_samples_are_those_of_the_maps():
    torch.manual_seed(0)
    network, rays, renderer = encoded_nerf(), ray_batch(200), GridRenderer(occupied_grid(0.3))
    out = renderer.render_rays(rays, network, QUERY, N_SAMPLES, retsamples=True, perturb=1.0)
    packed = out['packed']
    assert packed.num_rays == 200
    assert packed.mean_samples == len(packed.weights) / 200
    middle = (packed.t_starts + packed.t_ends) / 2
    for key, values in (('acc_map', packed.weights), ('depth_map', packed.weights * middle)):
        sums = torch.zeros(200).index_add(0, packed.ray_indices, values)
        torch.testing.assert_close(sums, out[key], rtol=1e-4, atol=1e-5)
    length = (packed.t_ends - packed.t_starts) * rays[:, 3:6].norm(dim=-1)[packed.ray_indices]
    step_size = torch.full_like(length, renderer.grid.step_size(N_SAMPLES))
    torch.testing.assert_close(length, step_size, rtol=1e-3, atol=1e-5)
    points = rays[packed.ray_indices, :3] + middle[:, None] * rays[packed.ray_indices, 3:6]
    assert renderer.grid.maybe_occupied(points).float().mean() > 0.999  # rounding may put a few on a face


@both_implementations
def test_gradients_of_the_weights_reach_the_network():
    torch.manual_seed(0)
    network, renderer = encoded_nerf(), GridRenderer(occupied_grid(0.3))
    packed = renderer.render_rays(ray_batch(200), network, QUERY, N_SAMPLES, retsamples=True)['packed']
    (packed.weights * (packed.t_ends - 2) ** 2).sum().backward()
    assert network.alpha_linear.weight.grad.any() and network.pts_linears[0].weight.grad.any()
    assert not network.rgb_linear.weight.grad.any(), 'weights do not depend on colours'


def test_packed_samples_need_gradients_and_retsamples():
    renderer, arguments = GridRenderer(occupied_grid(0.3)), (ray_batch(10), Fog(2.0), QUERY, N_SAMPLES)
    assert 'packed' not in renderer.render_rays(*arguments)
    with torch.no_grad():
        assert 'packed' not in renderer.render_rays(*arguments, retsamples=True)


def test_chunks_of_rays_join_their_packed_samples():
    network, rays = Fog(2.0), ray_batch(200)
    kwargs = {'network_fn': network, 'network_query_fn': QUERY, 'N_samples': N_SAMPLES, 'retsamples': True,
              'renderer': GridRenderer(occupied_grid(0.3))}
    whole, parts = batchify_rays(rays, 200, **kwargs), batchify_rays(rays, 30, **kwargs)
    assert whole.keys() == parts.keys() and parts['packed'].num_rays == 200
    for key in whole.keys() - {'packed'}:
        torch.testing.assert_close(whole[key], parts[key])
    for one, other in zip(whole['packed'], parts['packed']):
        torch.testing.assert_close(one, other)


def test_render_hands_packed_samples_through():
    rays = torch.stack(rays_around(12)).reshape(2, 3, 4, 3)
    kwargs = training_kwargs(Fog(2.0), GridRenderer(occupied_grid(0.3)))
    *_, extras = render(8, 10, None, chunk=5, rays=rays, retsamples=True, **kwargs)
    assert extras['depth_map'].shape == (3, 4)
    assert extras['packed'].num_rays == 12 and len(extras['packed'].weights) == len(extras['packed'].t) > 0


# --- the grid -----------------------------------------------------------------------------------------------

def state_of(renderer):
    return {key: value.clone() for key, value in renderer.state_dict().items()}


def is_state_of(renderer, state):
    return all(value.equal(state[key]) for key, value in renderer.state_dict().items())


def training_kwargs(network, renderer):
    return {'network_fn': network, 'network_fine': None, 'network_query_fn': QUERY, 'N_samples': N_SAMPLES,
            'N_importance': 0, 'perturb': 1.0, 'raw_noise_std': 0.0, 'white_bkgd': True, 'use_viewdirs': True,
            'ndc': False, 'lindisp': False, 'near': 0.1, 'far': 6.0, 'renderer': renderer}


def batch_of(N):
    rays = ray_batch(N)
    return Batch(torch.stack([rays[:, :3], rays[:, 3:6]]), torch.rand(N, 3))


def test_only_update_changes_the_grid():
    """Neither rendering nor a step of training does."""
    torch.manual_seed(0)
    network, renderer = encoded_nerf(), GridRenderer(occupied_grid(0.3))
    kwargs, state = training_kwargs(network, renderer), state_of(renderer)
    assert state.keys() == {'grid.aabb', 'grid.occs', 'grid.occupied', 'num_updates'}
    with torch.no_grad():
        renderer.render_rays(ray_batch(100), network, QUERY, N_SAMPLES)
    loss_and_gradient([8, 10], None, 1000, batch_of(100), kwargs)
    assert is_state_of(renderer, state)
    renderer.drop_cache()
    for step in range(1, UPDATE_EVERY_N_STEPS):
        renderer.update(step, **kwargs)
    assert is_state_of(renderer, state)
    renderer.update(UPDATE_EVERY_N_STEPS, **kwargs)
    assert not renderer.grid.occs.equal(state['grid.occs'])


def test_the_grid_follows_the_network():
    """It is occupied where the density is positive, whatever random numbers the run has drawn."""
    class Ball(RadianceField):
        def density(self, points):
            return 1000 * (0.5 - points.norm(dim=-1))
    grids = []
    for seed in (1, 2):
        renderer = GridRenderer(OccupancyGrid(16), seed=5)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        renderer.update(UPDATE_EVERY_N_STEPS, **training_kwargs(Ball(), renderer))
        assert torch.get_rng_state().equal(state)
        grids.append(renderer.grid)
    assert grids[0].occupied.equal(grids[1].occupied)
    points, _ = points_and_directions(5000)
    radius, cell = points.norm(dim=-1), 3 ** 0.5 / 8  # its diagonal
    occupied = grids[0].maybe_occupied(points)
    assert occupied[radius < 0.5 - cell].all() and not occupied[radius > 0.5 + cell].any()


def test_reset_occupies_all_possible_cells():
    possible = torch.zeros(16, 16, 16, dtype=torch.bool)
    possible[4:9] = True
    renderer = GridRenderer(OccupancyGrid(16))
    renderer.grid.set_aabb([[-1.0, -1, -1], [1, 1, 1]], possible)
    state = state_of(renderer)
    renderer.grid.update(lambda points: 40.0 * (points[:, 0] < -0.3), 0.02, all_cells=True)
    assert not is_state_of(renderer, state)
    renderer.reset()
    assert is_state_of(renderer, state) and renderer.grid.occupied.equal(possible)


def test_after_a_reset_every_cell_is_evaluated_again(monkeypatch):
    """Cells that have not been evaluated since are not taken for empty, however late the reset is."""
    monkeypatch.setattr('accel.occupancy.MAX_UPDATED_CELLS', 512)
    renderer, network = GridRenderer(OccupancyGrid(16)), Fog(2.0)
    for step in range(0, 1600, UPDATE_EVERY_N_STEPS):
        renderer.update(step, network, QUERY, N_SAMPLES)
    assert renderer.grid.occupied.all()
    renderer.reset()
    renderer.update(1600, network, QUERY, N_SAMPLES)
    assert renderer.grid.occupied.all()


def test_a_renderer_is_a_module():
    """Its grid is saved, loaded and moved with it."""
    renderer, other = GridRenderer(occupied_grid(0.3)), GridRenderer(OccupancyGrid(20))
    other.load_state_dict(renderer.state_dict())
    arguments = ray_batch(100), Fog(2.0), QUERY, N_SAMPLES
    assert renderer.render_rays(*arguments)['acc_map'].equal(other.render_rays(*arguments)['acc_map'])
    assert all(buffer.device.type == 'meta' for buffer in renderer.to('meta').buffers())
    assert GridRenderer().max_rays(CPU, 64) > 10 ** 9, 'a batch for training is not split'
    with torch.no_grad():
        assert GridRenderer().max_rays(CPU, 64) == MAX_RAYS['cpu'] and not list(renderer.parameters())
    frames = ImageRenderer([500, 400, 1.0], None, None, {'renderer': renderer, 'network_fn': hash_nerf(),
                                                         'N_samples': 64})
    frames.render_frame = lambda pose, hwf, K, chunk, *others: chunk
    assert frames.render(None) == min(MAX_RAYS[DEVICE.type], 500 * 400)


# --- training -----------------------------------------------------------------------------------------------

def test_a_loss_on_packed_samples_is_minimised(monkeypatch):
    """The weights of samples can enter the loss in `nerf_losses` without any other change."""
    def losses_with_thickness(errors, rgb, acc, extras, target, bkgd):
        thickness = 0.1 * (extras['packed'].weights ** 2).mean()
        return {**nerf_losses(errors, rgb, acc, extras, target, bkgd), 'thickness': thickness}
    torch.manual_seed(0)
    network, batch, gradients = Fog(2.0), batch_of(100), []
    kwargs = {**training_kwargs(network, GridRenderer(occupied_grid(0.3))), 'perturb': 0.0}
    for terms in ({'coarse'}, {'coarse', 'thickness'}):
        network.zero_grad()
        measures = loss_and_gradient([8, 10], None, 1000, batch, kwargs)
        assert measures.losses.keys() == terms and measures.mean_samples > 0
        assert measures.total == sum(measures.losses.values())
        gradients.append(network.raw.grad.clone())
        monkeypatch.setattr('run_nerf.nerf_losses', losses_with_thickness)
    assert gradients[0][3] != gradients[1][3]
    torch.testing.assert_close(gradients[0][:3], gradients[1][:3])


def test_batches_reach_the_number_of_samples():
    """A `RaySampler` that follows the samples per ray."""
    pose = np.concatenate([np.eye(3), [[0.2], [0.1], [4]]], -1).astype(np.float32)
    K = np.array([[60.0, 0, 32], [0, 60, 32], [0, 0, 1]])
    scene = SimpleNamespace(images=np.zeros([1, 64, 64, 3], np.uint8), poses=pose[None], alphas=None,
                            masks=None, cameras=[Camera(64, 64, K)], i_train=np.array([0]))
    sampler = RaySampler(scene, 20000, False, 0, 0.5, False, DEVICE, N_rand_samples=5000,
                         expected_samples=N_SAMPLES / 4)
    kwargs = training_kwargs(Fog(2.0), GridRenderer(occupied_grid(0.3)))
    torch.manual_seed(0)
    for step in range(1, 5):
        batch = sampler.sample(step)
        measures = loss_and_gradient([64, 64], K, 1000, batch, kwargs)
        sampler.adapt_to(measures.mean_samples)
        samples = len(batch.target) * measures.mean_samples
    assert 0.7 * 5000 < samples < 1.4 * 5000
    kwargs['renderer'].grid.set_occupied(torch.zeros(20, 20, 20, dtype=torch.bool))
    measures = loss_and_gradient([64, 64], K, 1000, sampler.sample(5), kwargs)
    sampler.adapt_to(measures.mean_samples)
    assert measures.mean_samples == 0 and 1 <= len(sampler.sample(6).target) <= 20000
