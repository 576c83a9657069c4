"""Kernels that render rays through proposals and a hash network from end to end, against
`ProposalRenderer`."""
import platform

import pytest
import torch
from test_proposals import ray_batch
from tiny_devices import on_cpu_only
from tiny_grids import CPU, NO_C_COMPILER
from tiny_runs import NO_OUTPUTS, PROPOSAL_DEMO, run

from accel import fused_rays
from accel.fused_rays import MAX_INTERVALS, FusedRenderer, can_fuse
from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from accel.kernels import compiled
from accel.kernels.compiled import Kernels
from accel.network_query import NetworkQuery
from accel.proposals import ProposalRenderer
from run_nerf_helpers import get_embedder

pytestmark = [on_cpu_only('the kernels are for CPUs'), NO_C_COMPILER]
QUERY = NetworkQuery()


def scene(contract=False, n_features=4, views=2, scale=1.0, n_levels=4):
    """An untrained `ProposalRenderer` and network, with features of this scale."""
    torch.manual_seed(0)
    exact = ProposalRenderer(contract=contract)
    encoding_views = (None, 0) if views is None else get_embedder(4, views)
    network = HashNeRF(HashGrid(n_levels, 100, 12, n_features, contract), *encoding_views)
    for encoding in (network.encoding, *(grid.encoding for grid in exact.grids)):
        torch.nn.init.uniform_(encoding.table, -scale, scale)
    return exact, network


def render_both(exact, network, N_samples=24, views=True, bf16=False, **options):
    rays = ray_batch(40) if views else ray_batch(40)[:, :8]
    with torch.no_grad():
        return [renderer.render_rays(rays, network, QUERY, N_samples, **options)
                for renderer in (FusedRenderer(exact, bf16), exact)]


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('options', [{}, {'lindisp': True}, {'white_bkgd': True}])
@pytest.mark.parametrize('N_samples', [1, 24, 33, MAX_INTERVALS])
def test_maps_are_those_of_the_reference(N_samples, options):
    exact, network = scene()
    assert_close(*render_both(exact, network, N_samples, **options), tolerance=2e-4)


@pytest.mark.parametrize('settings', [{'contract': True}, {'n_features': 2}, {'n_features': 8},
                                      {'n_features': 1}, {'views': None}, {'n_levels': 16},
                                      {'n_levels': 8, 'n_features': 8}])
def test_any_hash_network(settings):
    exact, network = scene(**settings)
    assert can_fuse(CPU, network, 24)
    assert_close(*render_both(exact, network, views=settings.get('views', 2)), tolerance=2e-4)


@pytest.mark.parametrize('log_density', [-60.0, 60.0])
def test_emptiness_and_solid_matter(log_density):
    exact, network = scene()
    with torch.no_grad():
        network.density_linears[1].bias[0] = log_density
    found, expected = render_both(exact, network)
    assert all(values.isfinite().all() for values in found.values())
    assert_close(found, expected, tolerance=2e-4)


def test_edges_reach_from_near_to_far(monkeypatch):
    calls, call, (exact, network) = [], fused_rays.KERNELS.call, scene(contract=True)
    monkeypatch.setattr(fused_rays.KERNELS, 'call', lambda *args: calls.append(args) or call(*args))
    render_both(exact, network)
    edges = [args[-1] for args in calls if args[0] == 'resample']
    assert len(edges) == 2
    for s_vals in edges:
        assert (s_vals[:, 0] == 0).all() and (s_vals[:, -1] == 1).all() and (s_vals.diff() >= 0).all()


def test_nan_stays_visible():
    exact, network = scene()
    with torch.no_grad():
        network.density_linears[1].bias[3] = float('nan')
    for bf16 in (False, True):
        found, expected = render_both(exact, network, bf16=bf16)
        assert expected['rgb_map'].isnan().all() and found['rgb_map'].isnan().all()


def test_what_the_reference_refuses_is_refused():
    exact, network = scene()
    with pytest.raises(ValueError, match='does not support retraw'), torch.no_grad():
        FusedRenderer(exact).render_rays(ray_batch(3), network, QUERY, 8, retraw=True)


def test_bfloat16_changes_colours_by_less_than_an_8_bit_step():
    exact, network = scene()
    found, expected = render_both(exact, network, bf16=True)
    error = (found['rgb_map'] - expected['rgb_map']).abs()
    assert error.max() < 0.02 and error.square().mean().sqrt() < 1 / 255


@pytest.mark.parametrize('options', [{'retsamples': True}, {'N_samples': MAX_INTERVALS + 1}])
def test_the_reference_does_what_the_kernels_cannot(options):
    exact, network = scene()
    assert_close(*render_both(exact, network, **options), tolerance=0)


def test_networks_that_the_kernels_do_not_have(monkeypatch):
    _, network = scene(views=0)  # directions in the positional encoding
    assert not can_fuse(CPU, network, 24)
    _, network = scene()
    assert can_fuse(CPU, network, 24) and not can_fuse(torch.device('cuda'), network, 24)
    monkeypatch.setenv('NERF_PLAIN', '1')
    assert not can_fuse(CPU, network, 24)


def test_gradients_take_the_reference():
    exact, network = scene()
    ret = FusedRenderer(exact).render_rays(ray_batch(3), network, QUERY, 8)
    ret['rgb_map'].sum().backward()
    assert network.encoding.table.grad.abs().sum() > 0


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='builds for processors of this family')
@pytest.mark.parametrize('processor', ['x86-64', 'haswell'])
def test_older_processors(processor, monkeypatch):
    """Without AVX-512 and bfloat16 the same text compiles to the same results."""
    flags = ['-march=' + processor if flag == '-march=native' else flag for flag in compiled.FLAGS]
    monkeypatch.setattr(compiled, 'FLAGS', flags)
    kernels = Kernels('intervals', fused_rays.check_kernels)
    monkeypatch.setattr(fused_rays, 'KERNELS', kernels)
    assert kernels.usable(CPU)


@pytest.mark.parametrize('right, wrong', [
    ('side * side : 805459861u', 'side * side : 805459863u'),
    ('sum[4] += weight[m]', 'sum[4] += 1.01f * weight[m]'),
    ('sum + weight[m] <= quantile', 'sum + weight[m] < 0.98f * quantile'),
    ('bias[o] += D', 'bias[o] -= D'),
    ('1 / (1 / near', '1 / (1.02f / near'),
    ('even_share * (s[m + 1] - s[m])', '0.2f * (s[m + 1] - s[m])'),
])
def test_kernels_that_compute_something_else_are_not_used(right, wrong, monkeypatch):
    original = compiled.read_source
    assert right in original('intervals')
    monkeypatch.setattr(compiled, 'read_source', lambda name: original(name).replace(right, wrong))
    broken = Kernels('intervals', fused_rays.check_kernels)
    monkeypatch.setattr(fused_rays, 'KERNELS', broken)
    with pytest.warns(UserWarning, match='intervals kernels cannot be used on cpu'):
        assert not broken.usable(CPU)


@pytest.mark.parametrize('option, fused', [('--no-exact_render', True), ('--exact_render', False)])
def test_frames_of_a_run_are_fused_unless_they_are_to_be_exact(option, fused, tmp_path, monkeypatch):
    frames, shade = [], fused_rays.shade
    monkeypatch.setattr(fused_rays, 'shade', lambda *args: frames.append(len(args[0])) or shade(*args))
    assert run(*PROPOSAL_DEMO, *NO_OUTPUTS, '--basedir', tmp_path, '--N_iters', 2, '--i_testset', 2,
               option) == 0
    assert bool(frames) == fused
    assert (tmp_path / 'demo_fast/testset_000002/metrics.json').is_file()
