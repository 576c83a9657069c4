"""Kernels that evaluate and differentiate a whole hash network, against the network itself."""
import pytest
import torch
import torch.nn.functional as F
from tiny_devices import on_cpu_only
from tiny_grids import NO_C_COMPILER
from tiny_kernels import assert_refused, on_older_processors, usable_on

from accel import fused_network
from accel.fused_network import BLOCK, can_fuse, evaluate, layers_of
from accel.half_precision import HalfPrecision
from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from accel.network_query import NetworkQuery
from accel.occupancy import offsets_of
from accel.packed import composite
from run_nerf_helpers import get_embedder

pytestmark = [on_cpu_only('the kernels are for CPUs'), NO_C_COMPILER]


def hash_network(n_levels=4, n_features=4, contract=False, views=2, scale=1.0):
    torch.manual_seed(0)
    encoding_views = (None, 0) if views is None else get_embedder(4, views)
    network = HashNeRF(HashGrid(n_levels, 100, 12, n_features, contract), *encoding_views)
    torch.nn.init.uniform_(network.encoding.table, -scale, scale)
    return network


def random_inputs(count, views=True):
    """Points, some outside of the box, and directions."""
    points = 3 * torch.rand(count, 3) - 1.5
    return torch.cat([points, F.normalize(torch.randn(count, 3), dim=-1)], -1) if views else points


def gradients(raw, weights, network):
    return torch.autograd.grad((raw * weights).sum(), [network.encoding.table, *layers_of(network)])


def assert_equal_to_reference(network, inputs, weights):
    assert can_fuse(network, inputs)
    found, expected = evaluate(network, inputs), network(*inputs.split(3, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for part, reference in zip(gradients(found, weights, network), gradients(expected, weights, network)):
        atol = 1e-4 * reference.abs().max().item() + 1e-9
        torch.testing.assert_close(part, reference, rtol=1e-3, atol=atol)


@pytest.mark.parametrize('count', [0, 1, 31, 32, 33, BLOCK, 2 * BLOCK + 5])
def test_outputs_and_gradients_are_those_of_the_network(count):
    network = hash_network()
    assert_equal_to_reference(network, random_inputs(count), torch.randn(count, 4))


@pytest.mark.parametrize('settings', [{'contract': True}, {'n_features': 2}, {'n_features': 8},
                                      {'views': None}, {'n_levels': 8}, {'n_levels': 8, 'n_features': 8},
                                      {'n_levels': 16, 'n_features': 1}])
def test_any_hash_network(settings):
    network, inputs = hash_network(**settings), random_inputs(200, settings.get('views', 2) is not None)
    assert_equal_to_reference(network, inputs, torch.randn(200, 4))


@pytest.mark.parametrize('weights', [torch.zeros(300, 4), torch.eye(4).repeat(75, 1),
                                     torch.tensor([0.0, 0, 0, 1]).expand(300, 4)])
def test_points_without_a_gradient_change_nothing(weights):
    weights = weights * (torch.arange(300) % 7 == 0)[:, None]
    assert_equal_to_reference(hash_network(), random_inputs(300), weights)


def test_samples_that_are_hidden_are_left_out():
    network, counts = hash_network(), torch.randint(0, 90, (1200,))
    counts[::3], counts[0] = 0, 400
    inputs, offsets = random_inputs(int(counts.sum())), offsets_of(counts)
    ray_indices, step_sizes = torch.arange(1200).repeat_interleave(counts), torch.linspace(0, 2, 1200)
    raws = [evaluate(network, inputs, rays=rays) for rays in (None, (step_sizes, offsets))]
    maps, grads = zip(*[composited(raw, network, ray_indices, step_sizes, offsets) for raw in raws])
    torch.testing.assert_close(*maps)
    for part, reference in zip(*grads):
        torch.testing.assert_close(part, reference)
    left_out = (raws[1] == 0).all(-1)
    torch.testing.assert_close(raws[0][~left_out], raws[1][~left_out])
    assert left_out.float().mean() > 0.3


def composited(raw, network, ray_indices, step_sizes, offsets):
    """Maps of rays, and the gradient of some loss of theirs by the network's parameters."""
    out, _ = composite(raw, torch.linspace(1, 2, len(raw)), ray_indices, step_sizes, offsets)
    return out.detach(), gradients(out, torch.linspace(-1, 1, out.numel()).view_as(out), network)


@pytest.mark.parametrize('log_density', [-60.0, 60.0])
def test_emptiness_and_solid_matter(log_density):
    network = hash_network()
    with torch.no_grad():
        network.density_linears[1].bias[0] = log_density
    assert_equal_to_reference(network, random_inputs(100), 1e-6 * torch.randn(100, 4))


def test_nan_stays_visible():
    network, inputs = hash_network(), random_inputs(100)
    with torch.no_grad():
        network.density_linears[1].bias[3] = float('nan')
    for bf16 in (False, True):
        raw = evaluate(network, inputs, bf16)
        assert raw[:, :3].isnan().all() and raw[:, 3].isfinite().all()
    network, weights = hash_network(), torch.zeros(100, 4)
    weights[50, 1] = float('nan')
    for bf16 in (False, True):
        assert gradients(evaluate(network, inputs, bf16), weights, network)[0].isnan().any()


def test_bfloat16_is_as_close_as_autocast():
    network, inputs, weights = hash_network(scale=2.0), random_inputs(4000), torch.randn(4000, 4)
    results = []
    for raw in (network(*inputs.split(3, -1)), evaluate(network, inputs, bf16=True),
                HalfPrecision(HashNeRF.__call__, network)(*inputs.split(3, -1))):
        results.append([raw.detach(), *gradients(raw, weights, network)])
    for expected, found, autocast in zip(*results):
        limit = 0.005 * expected.norm() + 2 * (autocast - expected).norm()
        assert (found - expected).norm() <= limit


@pytest.mark.parametrize('bf16', [False, True])
def test_the_number_of_threads_changes_nothing(bf16):
    network, inputs, weights = hash_network(), random_inputs(5000), torch.randn(5000, 4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            raw = evaluate(network, inputs, bf16)
            results.append([raw, *gradients(raw, weights, network)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*parts) for parts in zip(*results))


def test_a_query_uses_the_kernels_unless_something_speaks_against_it(monkeypatch):
    network, inputs = hash_network(), random_inputs(50)
    calls, call = [], fused_network.KERNELS.call
    monkeypatch.setattr(fused_network.KERNELS, 'call', lambda *args: calls.append(args[0]) or call(*args))

    def called(query, inputs):
        calls.clear()
        query.evaluate(inputs, network).sum().backward()
        return calls
    assert called(NetworkQuery(), inputs) == ['evaluate', 'evaluate_gradient', 'encode_gradient']
    assert not called(NetworkQuery(backward='plain'), inputs)
    assert not called(NetworkQuery(), inputs.clone().requires_grad_())  # --refine_poses
    assert not can_fuse(hash_network(views=0), inputs)                  # positional encoding of directions
    assert not can_fuse(hash_network(n_levels=3, n_features=2), inputs)
    monkeypatch.setenv('NERF_PLAIN', '1')
    assert not called(NetworkQuery(), inputs)


@on_older_processors
def test_older_processors(processor, monkeypatch):
    assert usable_on(processor, fused_network, 'KERNELS', monkeypatch)


@pytest.mark.parametrize('right, wrong', [
    ('in[l][i][m] > 0 ?', 'in[l][i][m] > -9 ?'),
    ('of_in[0][m] += by_log_density[m]', 'of_in[0][m] -= by_log_density[m]'),
    ('layers + 1, false, in[1]', 'layers + 1, true, in[1]'),
    ('grad_parameters[p] += partial', 'grad_parameters[p] = partial'),
])
def test_kernels_that_compute_something_else_are_not_used(right, wrong, monkeypatch):
    assert_refused(fused_network, 'KERNELS', right, wrong, monkeypatch)
