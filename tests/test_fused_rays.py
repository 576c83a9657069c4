"""Kernels that render rays through a hash network from end to end, against `ProposalRenderer` and
`GridRenderer`."""
import pytest
import torch
from test_proposals import ray_batch
from tiny_devices import on_cpu_only
from tiny_grids import CPU, NO_C_COMPILER, bounded_rays, occupied_grid, rays_around
from tiny_kernels import assert_refused, on_older_processors, usable_on
from tiny_runs import FAST_DEMO, NO_OUTPUTS, PROPOSAL_DEMO, run

from accel import fused_rays
from accel.fused_rays import MAX_INTERVALS, FusedGrid, FusedProposals, fused
from accel.grid_renderer import GridRenderer
from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from accel.network_query import NetworkQuery
from accel.proposals import ProposalRenderer
from accel.renderer import Renderer
from run_nerf_helpers import get_embedder

pytestmark = [on_cpu_only('the kernels are for CPUs'), NO_C_COMPILER]
both_kinds = pytest.mark.parametrize('kind', ['proposals', 'cells'])
QUERY = NetworkQuery()


def scene(kind='proposals', contract=False, n_features=4, views=2, n_levels=4):
    """An untrained renderer, with proposals or in the `cells` of a grid, and network."""
    torch.manual_seed(0)
    encoding_views = (None, 0) if views is None else get_embedder(4, views)
    network = HashNeRF(HashGrid(n_levels, 100, 12, n_features, contract), *encoding_views)
    exact = GridRenderer(occupied_grid(0.3)) if kind == 'cells' else ProposalRenderer(contract=contract)
    for part in (network, exact):
        for module in part.modules():
            if isinstance(module, HashGrid):
                torch.nn.init.uniform_(module.table, -1, 1)
    return exact, network


def rays_of(exact, N):
    """Rays [N, 11] through the box."""
    if isinstance(exact, ProposalRenderer):
        return ray_batch(N)
    rays = bounded_rays(*rays_around(N))
    return torch.cat([rays, torch.nn.functional.normalize(rays[:, 3:6], dim=-1)], -1)


def render_both(exact, network, N_samples=24, views=True, bf16=False, N=150, **options):
    rays = rays_of(exact, N) if views else rays_of(exact, N)[:, :8]
    with torch.no_grad():
        return [renderer.render_rays(rays, network, QUERY, N_samples, **options)
                for renderer in (fused(exact, bf16), exact)]


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('options', [{}, {'lindisp': True}, {'white_bkgd': True}])
@pytest.mark.parametrize('N_samples', [1, 24, 33, MAX_INTERVALS])
def test_intervals_are_those_of_the_reference(N_samples, options):
    assert_close(*render_both(*scene(), N_samples, **options), tolerance=2e-4)


@pytest.mark.parametrize('options', [{}, {'white_bkgd': True}])
@pytest.mark.parametrize('N, N_samples', [(1, 100), (150, 1), (150, 500), (3000, 50)])
def test_cells_are_those_of_the_reference(N, N_samples, options):
    """Few and many rays, which miss all cells or cross many."""
    found, expected = render_both(*scene('cells'), N_samples, N=N, **options)
    assert_close(found, expected, tolerance=1e-3)  # samples of little weight add no colour
    if N_samples == 500:
        assert expected['acc_map'].min() == 0 and expected['acc_map'].max() > 0.99


@both_kinds
@pytest.mark.parametrize('settings', [{'contract': True}, {'n_features': 2}, {'n_features': 8},
                                      {'n_features': 1}, {'views': None}, {'n_levels': 16},
                                      {'n_levels': 8, 'n_features': 8}])
def test_any_hash_network(settings, kind):
    exact, network = scene(kind, **settings)
    assert fused(exact).can_fuse(CPU, network, 24)
    assert_close(*render_both(exact, network, views=settings.get('views', 2)), tolerance=1e-3)


@both_kinds
@pytest.mark.parametrize('log_density', [-60.0, 60.0])
def test_emptiness_and_solid_matter(log_density, kind):
    exact, network = scene(kind)
    with torch.no_grad():
        network.density_linears[1].bias[0] = log_density
    found, expected = render_both(exact, network)
    assert all(values.isfinite().all() for values in found.values())
    assert_close(found, expected, tolerance=2e-4)


def test_edges_reach_from_near_to_far(monkeypatch):
    calls, call = [], fused_rays.INTERVALS.call
    monkeypatch.setattr(fused_rays.INTERVALS, 'call', lambda *args: calls.append(args) or call(*args))
    render_both(*scene(contract=True))
    edges = [args[-1] for args in calls if args[0] == 'resample']
    assert len(edges) == 2
    for s_vals in edges:
        assert (s_vals[:, 0] == 0).all() and (s_vals[:, -1] == 1).all() and (s_vals.diff() >= 0).all()


@both_kinds
@pytest.mark.parametrize('broken', [0, 3])  # density, and a feature that colours alone depend on
@pytest.mark.parametrize('bf16', [False, True])
def test_nan_stays_visible(bf16, broken, kind):
    exact, network = scene(kind)
    with torch.no_grad():
        network.density_linears[1].bias[broken] = float('nan')
    found, expected = render_both(exact, network, bf16=bf16)
    hit = expected['rgb_map'].isnan()
    assert hit.any() and found['rgb_map'].isnan().equal(hit)


@pytest.mark.parametrize('kind, options', [('proposals', {'retraw': True}), ('cells', {'retraw': True}),
                                           ('cells', {'lindisp': True})])
def test_what_the_reference_refuses_is_refused(kind, options):
    with pytest.raises(ValueError, match='does not support retraw'):
        render_both(*scene(kind), **options)


@both_kinds
def test_bfloat16_changes_colours_by_less_than_an_8_bit_step(kind):
    found, expected = render_both(*scene(kind), bf16=True)
    error = (found['rgb_map'] - expected['rgb_map']).abs()
    assert error.max() < 0.02 and error.square().mean().sqrt() < 1 / 255


@pytest.mark.parametrize('options', [{'retsamples': True}, {'N_samples': MAX_INTERVALS + 1}])
def test_the_reference_does_what_the_kernels_cannot(options):
    assert_close(*render_both(*scene(), **options), tolerance=0)


@both_kinds
def test_networks_that_the_kernels_do_not_have(kind, monkeypatch):
    exact, network = scene(kind, views=0)  # directions in the positional encoding
    assert not fused(exact).can_fuse(CPU, network, 24)
    exact, network = scene(kind)
    assert fused(exact).can_fuse(CPU, network, 24)
    assert not fused(exact).can_fuse(torch.device('cuda'), network, 24)
    monkeypatch.setenv('NERF_PLAIN', '1')
    assert not fused(exact).can_fuse(CPU, network, 24)


def test_only_some_renderers_are_replaced():
    renderer = Renderer()
    assert fused(renderer) is renderer


@both_kinds
def test_gradients_take_the_reference(kind):
    exact, network = scene(kind)
    ret = fused(exact).render_rays(rays_of(exact, 30), network, QUERY, 50)
    ret['rgb_map'].sum().backward()
    assert network.encoding.table.grad.abs().sum() > 0


@on_older_processors
@pytest.mark.parametrize('name', ['CELLS', 'INTERVALS'])
def test_older_processors(name, processor, monkeypatch):
    assert usable_on(processor, fused_rays, name, monkeypatch)


@pytest.mark.parametrize('name, right, wrong', [
    ('INTERVALS', 'side * side : 805459861u', 'side * side : 805459863u'),
    ('INTERVALS', 'sum[4] += weight[m]', 'sum[4] += 1.01f * weight[m]'),
    ('INTERVALS', 'sum + weight[m] <= quantile', 'sum + weight[m] < 0.98f * quantile'),
    ('INTERVALS', 'bias[o] += D', 'bias[o] -= D'),
    ('INTERVALS', '1 / (1 / near', '1 / (1.02f / near'),
    ('INTERVALS', 'even_share * (s[m + 1] - s[m])', '0.2f * (s[m + 1] - s[m])'),
    ('CELLS', 'ray->k + 1', 'ray->k + 2'),
    ('CELLS', 'ray->transmittance *= passing[m]', 'ray->transmittance *= 0.9f * passing[m]'),
    ('CELLS', 'seen[m].rgb[i] +=', 'seen[0].rgb[i] +='),
    ('CELLS', 'sample->harmonics[i]', 'seen->harmonics[i]'),
])
def test_kernels_that_compute_something_else_are_not_used(name, right, wrong, monkeypatch):
    assert_refused(fused_rays, name, right, wrong, monkeypatch)


@pytest.mark.parametrize('option, expected', [('--no-exact_render', True), ('--exact_render', False)])
@pytest.mark.parametrize('demo, renderer', [(PROPOSAL_DEMO, FusedProposals), (FAST_DEMO, FusedGrid)])
def test_frames_of_a_run_are_fused_unless_they_are_to_be_exact(demo, renderer, option, expected, tmp_path,
                                                               monkeypatch):
    frames, shade = [], renderer.shade
    monkeypatch.setattr(renderer, 'shade', lambda *args: frames.append(args) or shade(*args))
    assert run(*demo, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 2, '--i_testset', 2, option) == 0
    assert bool(frames) == expected
    assert (tmp_path / 'demo_fast/testset_000002/metrics.json').is_file()
