"""Proposal sampling: intervals, losses against double loops, rendering against the formula, runs."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_devices import DEVICE, Random
from tiny_networks import hash_nerf
from tiny_runs import NO_OUTPUTS, PROPOSAL_DEMO, assert_killed_and_resumed_is_undisturbed, read_state, run

from accel.network_query import NetworkQuery
from accel.proposals import (
    FAR,
    PROPOSALS,
    RELATIVE_MEMORY,
    TRAIN_EVERY_N_STEPS,
    WARMUP_STEPS,
    ProposalRenderer,
    distortion_loss,
    even_edges,
    from_disparity,
    histogram_loss,
    resample,
    to_disparity,
)
from run_nerf import loss_and_gradient, raw2outputs
from run_nerf_helpers import weights_of
from scenes.rays import Batch

NO_DEPTHS = Batch(None, None)


def random_intervals(N, M, seed=0):
    """Edges [N, M + 1] from 0 to 1, and weights [N, M] whose sums are below 1."""
    random = Random(seed)
    s_vals, weights = random.rand(N, M + 1).sort(-1).values, random.rand(N, M) ** 4
    s_vals[:, 0], s_vals[:, -1] = 0, 1
    return s_vals.double(), (0.9 * weights / weights.sum(-1, keepdim=True)).double()


def ray_batch(N, near=0.5, far=4.0):
    """Rays [N, 11] from around (0, 0, 2) downwards through the box, of different lengths."""
    random = Random(0)
    rays_o = torch.tensor([0.0, 0, 2]) + 0.3 * random.rand(N, 3)
    rays_d = torch.tensor([0.0, 0, -1]) + 0.5 * random.rand(N, 3)
    bounds = torch.tensor([[near, far]]).expand(N, 2)
    return torch.cat([rays_o, rays_d, bounds, torch.nn.functional.normalize(rays_d, dim=-1)], -1)


def renderer_and_network(**settings):
    torch.manual_seed(0)
    return ProposalRenderer(**settings).to(DEVICE), hash_nerf().to(DEVICE)


# --- intervals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('random', [False, True])
def test_edges_are_ascending_and_fill_the_ray(random):
    edges = even_edges(torch.zeros(50, 1), 7, random)
    assert (edges.diff() > 0).all() and (edges[:, 0] == 0).all() and (edges[:, -1] == 1).all()
    assert (len(edges[:, 3].unique()) > 1) == random


@pytest.mark.parametrize('M, K', [(1, 5), (9, 4), (16, 16)])
def test_resampled_intervals_hold_equal_shares_of_the_weights(M, K):
    """The share in front of each edge, by a loop over the intervals, is the quantile."""
    s_vals, weights = random_intervals(20, M)
    quantiles = even_edges(s_vals[:, :1], K, True).double()
    edges = resample(s_vals, weights, quantiles)
    assert (edges.diff() >= 0).all() and (edges[:, 0] == 0).all() and (edges[:, -1] == 1).all()
    pdf = 0.99 * weights / weights.sum(-1, keepdim=True) + 0.01 * s_vals.diff()
    for n in range(len(s_vals)):
        for k in range(K + 1):
            share = sum(pdf[n, m] * ((edges[n, k] - s_vals[n, m]) / s_vals[n].diff()[m]).clamp(0, 1)
                        for m in range(M))
            assert float(share) == pytest.approx(float(quantiles[n, k]), abs=1e-6)


def test_without_weights_the_ray_is_sampled_evenly():
    s_vals, weights = random_intervals(5, 8)
    edges = resample(s_vals, torch.zeros_like(weights), even_edges(s_vals[:, :1], 8, False).double())
    torch.testing.assert_close(edges, torch.linspace(0, 1, 9).double().expand(5, -1), rtol=0, atol=1e-6)


# --- losses -------------------------------------------------------------------------------------------------

def histogram_double_loop(s_vals, weights, edges, proposal):
    total = 0.0
    for n in range(len(weights)):
        for i in range(weights.shape[1]):
            bound = sum(proposal[n, j] for j in range(proposal.shape[1])
                        if edges[n, j] < s_vals[n, i + 1] and edges[n, j + 1] > s_vals[n, i])
            total += max(0.0, weights[n, i] - bound) ** 2 / (weights[n, i] + 1e-7)
    return total / len(weights)


def distortion_double_loop(s_vals, weights):
    total = 0.0
    for n in range(len(weights)):
        mids = (s_vals[n, 1:] + s_vals[n, :-1]) / 2
        for i in range(len(mids)):
            total += weights[n, i] ** 2 * (s_vals[n, i + 1] - s_vals[n, i]) / 3
            total += sum(weights[n, i] * weights[n, j] * abs(mids[i] - mids[j]) for j in range(len(mids)))
    return total / len(weights)


@pytest.mark.parametrize('M, P', [(1, 1), (6, 3), (5, 12), (20, 20)])
def test_losses_equal_double_loops(M, P):
    (s_vals, weights), (edges, proposal) = random_intervals(6, M), random_intervals(6, P, seed=1)
    arguments = [part.cpu().numpy() for part in (s_vals, weights, edges, proposal)]
    assert float(histogram_loss(s_vals, weights, edges, proposal)) == pytest.approx(
        histogram_double_loop(*arguments), rel=1e-6)
    assert float(distortion_loss(s_vals, weights)) == pytest.approx(
        distortion_double_loop(*arguments[:2]), rel=1e-6)


def test_a_proposal_that_covers_the_weights_costs_nothing():
    s_vals, weights = random_intervals(6, 12)
    assert float(histogram_loss(s_vals, weights, s_vals, weights)) < 1e-12
    coarse = s_vals[:, ::4].contiguous()
    assert float(histogram_loss(s_vals, weights, coarse, weights.view(6, 3, 4).sum(-1))) < 1e-12


def test_the_histogram_loss_trains_only_the_proposal():
    (s_vals, weights), (edges, proposal) = random_intervals(6, 12), random_intervals(6, 5, seed=1)
    weights, proposal = weights.requires_grad_(), proposal.requires_grad_()
    histogram_loss(s_vals, weights, edges, proposal).backward()
    assert weights.grad is None and proposal.grad.abs().sum() > 0


# --- rendering ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lindisp', [False, True])
@pytest.mark.parametrize('perturb', [0.0, 1.0])
def test_samples_lie_between_near_and_far_and_are_composited(lindisp, perturb):
    """The maps are those of raw2outputs for the samples at which the network was evaluated."""
    renderer, network = renderer_and_network()
    rays, seen = ray_batch(30), []

    def query(pts, viewdirs, network):
        seen.append((pts, QUERY(pts, viewdirs, network)))
        return seen[-1][1]
    ret = renderer.render_rays(rays, network, query, 24, lindisp=lindisp, perturb=perturb, white_bkgd=True,
                               retsamples=True)
    (pts, raw), = seen
    t = ((pts - rays[:, None, :3]) / rays[:, None, 3:6]).mean(-1)                       # [N_rays, 24]
    assert pts.shape == (30, 24, 3) and (t > 0.5).all() and (t < 4).all() and (t.diff() >= 0).all()
    s = ret['s_vals'].double()
    edges = 1 / (2 * (1 - s) + 0.25 * s) if lindisp else 0.5 * (1 - s) + 4 * s
    torch.testing.assert_close(t.double(), (edges[:, 1:] + edges[:, :-1]) / 2, rtol=1e-4, atol=1e-4)
    # raw2outputs takes intervals from sample to sample, so it gets the lengths in the densities
    lengths = edges.diff().float() / torch.cat([t.diff(), torch.full_like(t[:, :1], 1e10)], -1)
    scaled = torch.cat([raw[..., :3], raw[..., 3:] * lengths[..., None]], -1)
    rgb, disp, acc, weights, depth = raw2outputs(scaled, t, rays[:, 3:6], white_bkgd=True)
    for name, expected in (('rgb_map', rgb), ('disp_map', disp), ('acc_map', acc), ('depth_map', depth),
                           ('weights', weights)):
        torch.testing.assert_close(ret[name], expected, rtol=1e-3, atol=1e-4)


def test_rays_through_contracted_space_reach_everywhere():
    """Intervals are even in distance up to the box's side, and in its inverse beyond."""
    renderer, _ = renderer_and_network(contract=True)
    for grid in renderer.grids:
        grid.encoding.set_aabb([[-2.0] * 3, [2.0] * 3])
    near, s_vals = torch.tensor([[0.5]]), torch.linspace(0, 1, 65)[None]
    t = renderer.positions(s_vals, near, near + 1, False)[0]
    assert float(t[0]) == pytest.approx(0.5) and float(t[-1]) == pytest.approx(2 * FAR, rel=1e-3)
    inside = t < 2
    assert 20 < inside.sum() < 40
    for steps in (t[inside].diff(), (1 / t[~inside]).diff()):
        torch.testing.assert_close(steps, steps[:1].expand(len(steps)), rtol=1e-2, atol=0)


def test_a_little_weight_far_away_hardly_moves_the_depth():
    renderer, _ = renderer_and_network(contract=True)
    for grid in renderer.grids:
        grid.encoding.set_aabb([[-2.0] * 3, [2.0] * 3])
    mids = torch.tensor([[1.0, 1.0, 1800.0]])
    for weights in ([0.5, 0.5, 0.0], [0.4, 0.4, 0.0]):
        torch.testing.assert_close(renderer.depth_map(torch.tensor([weights]), mids),
                                   torch.tensor([sum(weights)]))
    assert 1 < float(renderer.depth_map(torch.tensor([[0.5, 0.49, 0.01]]), mids)) < 1.05


@given(st.floats(1e-3, 900))
def test_spacing_inverts(x):
    x = torch.tensor(x, dtype=torch.float64)
    assert float(from_disparity(to_disparity(x))) == pytest.approx(float(x))


QUERY = NetworkQuery()


@pytest.mark.parametrize('log_density', [-30.0, 0.0, 30.0])
def test_gradients_are_finite_in_emptiness_and_in_solid_matter(log_density):
    renderer, network = renderer_and_network(lambda_distortion=0.1)
    with torch.no_grad():
        network.density_linears[-1].bias[0] = log_density
        for grid in renderer.grids:
            grid.encoding.table[:] = log_density
    ret = renderer.render_rays(ray_batch(20), network, QUERY, 16, perturb=1.0, retsamples=True)
    loss = sum(renderer.losses(ret, NO_DEPTHS).values()) + ret['rgb_map'].sum()
    loss.backward()
    for parameter in [*renderer.parameters(), *network.parameters()]:
        assert torch.isfinite(parameter.grad).all()


def test_training_sharpens_the_proposals_and_the_image():
    """A wall is learned: the error falls, and samples gather where it is."""
    renderer, network = renderer_and_network()
    optimizer = torch.optim.Adam([*renderer.parameters(), *network.parameters()], 1e-2)
    kwargs = {'network_fn': network, 'network_fine': None, 'network_query_fn': QUERY, 'N_samples': 16,
              'renderer': renderer, 'near': 0.5, 'far': 4.0, 'use_viewdirs': True, 'ndc': False,
              'perturb': 1.0, 'white_bkgd': False}
    rays, errors = ray_batch(256), []
    where = rays[:, :2] + 2 / -rays[:, 5:6] * rays[:, 3:5]  # on the plane z = 0
    target = 0.5 + 0.5 * torch.sin(8 * torch.cat([where, where[:, :1]], -1))
    batch = Batch(torch.stack([rays[:, :3], rays[:, 3:6]]), target)
    for step in range(1, 151):
        optimizer.zero_grad()
        measures = loss_and_gradient([16, 16, 16.0], np.eye(3), 256, batch, kwargs)
        optimizer.step()
        renderer.update(step)
        errors.append(float(measures.errors['coarse']))
        assert {'coarse', 'proposal0', 'proposal1'} == measures.losses.keys()
    with torch.no_grad():
        widths = renderer.render_rays(rays, network, QUERY, 16, retsamples=True)['s_vals'].diff()
    assert errors[-1] < 0.2 * errors[0]
    assert widths.amin(-1).median() < 0.2 / 16  # the shortest interval; even ones have 1 / 16


def test_intervals_are_even_at_first_and_reset_forgets():
    renderer, network = renderer_and_network()
    rays = ray_batch(4)
    first = renderer.render_rays(rays, network, QUERY, 16, retsamples=True)['s_vals']
    even = torch.linspace(0, 1, 17, device=DEVICE).expand(4, -1)
    torch.testing.assert_close(first, even, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in renderer.parameters():
            parameter += 1
    renderer.update(1)
    renderer.reset()
    assert renderer.steps == 0 and not any(parameter.any() for parameter in renderer.parameters())


def test_after_the_warm_up_only_some_steps_train_the_grids():
    renderer, network = renderer_and_network()
    trained = []
    for step in range(1, WARMUP_STEPS + 2 * TRAIN_EVERY_N_STEPS + 1):
        if step > WARMUP_STEPS - 2:
            ret = renderer.render_rays(ray_batch(4), network, QUERY, 8, retsamples=True)
            losses = renderer.losses(ret, NO_DEPTHS)
            trained.append('proposal0' in losses and losses['proposal1'].requires_grad)
        renderer.update(step)
    every = [False] * (TRAIN_EVERY_N_STEPS - 1) + [True]
    assert trained == [True, True, *every, *every]


def test_a_step_has_as_many_rays_as_fit_in_memory():
    renderer, _ = renderer_and_network()
    per_ray = 32 + int(RELATIVE_MEMORY * sum(count for count, _ in PROPOSALS))
    rays = renderer.max_rays(torch.device('cpu'), 32)
    assert rays * per_ray <= 2 ** 18 < (rays + 1) * per_ray


def test_weights_of_no_density_are_0_and_sum_to_1_in_solid_matter():
    assert weights_of(torch.zeros(2, 5)).sum() == 0
    torch.testing.assert_close(weights_of(torch.full((2, 5), 50.0)).sum(-1), torch.ones(2))


@pytest.mark.parametrize('option', ['retraw', 'pytest', 'N_importance'])
def test_what_is_not_available_is_an_error(option):
    renderer, network = renderer_and_network()
    with pytest.raises(ValueError, match='does not support'):
        renderer.render_rays(ray_batch(2), network, QUERY, 8, **{option: 1})


# --- runs ---------------------------------------------------------------------------------------------------

def test_a_run_is_resumed_exactly(tmp_path):
    assert_killed_and_resumed_is_undisturbed(tmp_path, *PROPOSAL_DEMO)


def test_a_run_renders_from_its_checkpoint_alone(tmp_path):
    assert run(*PROPOSAL_DEMO, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 3) == 0
    (path,) = tmp_path.rglob('*.tar')
    state = read_state(path)
    assert state['renderer_state_dict']['_extra_state'] == 3
    assert any(name.startswith('grids.1.encoding') for name in state['renderer_state_dict'])
    assert run('--render_only', '--render_test', '--ft_path', path, '--basedir', tmp_path / 'out',
               '--render_factor', 4) == 0
    assert len(list((tmp_path / 'out').rglob('renderonly_test_000003/000.png'))) == 1


@pytest.mark.parametrize('options, message', [
    (['--occupancy_grid'], 'proposal is not available with --occupancy_grid and --N_importance'),
    (['--N_importance', '8'], 'proposal is not available with --occupancy_grid and --N_importance'),
    (['--sampler', 'hierarchical', '--no-random_bkgd'], '--lambda_distortion: needs --sampler proposal'),
])
def test_options_that_exclude_each_other(options, message, capsys):
    with pytest.raises(SystemExit):
        run(*PROPOSAL_DEMO, *options)
    assert message in capsys.readouterr().err
