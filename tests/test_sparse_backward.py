"""Backward through samples with a gradient only: equal to plain autograd, from fewer points."""
from functools import partial

import pytest
import torch
from conftest import GOLDEN, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_devices import DEVICE, on_cpu_only
from tiny_networks import (
    CAMERA,
    LearnedEncoding,
    assert_same_gradients,
    encoded_nerf,
    hash_nerf,
    points_and_directions,
    rays_to_origin,
)

from accel.network_query import NetworkQuery
from accel.sparse_backward import CHUNK_LENGTHS, evaluate_in_chunks, evaluate_padded
from run_nerf import create_nerf, loss_and_gradient, render_rays
from scenes.rays import Batch
from training.options import config_parser

SPARSE, PLAIN = partial(NetworkQuery, backward='sparse'), partial(NetworkQuery, backward='plain')


def two_networks(use_viewdirs=True, seed=0, **options):
    """A coarse and a fine network."""
    torch.manual_seed(seed)
    return [encoded_nerf(use_viewdirs, **options) for _ in range(2)]


def gradients(query, networks, ray_batch, **options):
    """Gradients of a loss of both networks, and the loss."""
    parameters = [p for network in networks for p in network.parameters()]
    for parameter in parameters:
        parameter.grad = None
    options = {'N_samples': 12, 'N_importance': 9, 'perturb': 1.0, 'pytest': True, 'white_bkgd': True,
               **options}
    out = render_rays(ray_batch, networks[0], query, network_fine=networks[1], **options)
    loss = ((out['rgb_map'] - 0.3) ** 2).mean() + ((out['rgb0'] - 0.7) ** 2).mean()
    loss.backward()
    return [p.grad for p in parameters], loss.detach()


@given(N=st.integers(1, 40), samples=st.integers(3, 20), importance=st.integers(1, 12),
       chunk=st.integers(1, 300), depth=st.integers(1, 4), width=st.integers(2, 40),
       use_viewdirs=st.booleans(), noise=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gradients_equal_plain_autograd(N, samples, importance, chunk, depth, width, use_viewdirs, noise,
                                        seed):
    networks = two_networks(use_viewdirs, seed, D=depth, W=width)
    batch = rays_to_origin(N, use_viewdirs)
    options = {'N_samples': samples, 'N_importance': importance, 'raw_noise_std': noise}
    expected, expected_loss = gradients(PLAIN(chunk), networks, batch, **options)
    found, loss = gradients(SPARSE(chunk), networks, batch, **options)
    assert torch.allclose(expected_loss, loss, rtol=1e-6)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize('make', [hash_nerf, partial(encoded_nerf, encoding=LearnedEncoding())])
def test_gradients_of_trained_encodings(make):
    torch.manual_seed(0)
    networks, batch, found = [make(), make()], rays_to_origin(30), []
    for kind in (PLAIN, SPARSE):
        found.append(gradients(kind(100), networks, batch)[0])
    assert any(name.startswith('encoding.') for name, _ in networks[0].named_parameters())
    assert_same_gradients(found[1], found[0])


@needs_golden
@pytest.mark.parametrize('noise', [0.0, 1.0])
def test_the_gradient_on_a_trained_network(noise, tmp_path):
    """The recorded checkpoint, in which most of space is empty."""
    args = config_parser().parse_args([
        '--config', str(GOLDEN / 'checkpoint/config.txt'), '--ft_path', str(GOLDEN / 'checkpoint/002000.tar'),
        '--basedir', str(tmp_path), '--device', str(DEVICE), '--precision', 'fp32', '--backward', 'sparse'])
    kwargs, _, _, _, _ = create_nerf(args)
    networks, query = [kwargs['network_fn'], kwargs['network_fine']], kwargs['network_query_fn']
    assert query.backward_pass == 'sparse' and query.precision == 'fp32'
    query.netchunk = 4096
    torch.manual_seed(0)
    batch, options = rays_to_origin(100), {'N_samples': 32, 'N_importance': 64, 'raw_noise_std': noise}
    expected, _ = gradients(PLAIN(4096), networks, batch, **options)

    evaluated = {network: [] for network in networks}
    for network in networks:
        network.register_forward_pre_hook(lambda network, inputs: evaluated[network].append(len(inputs[0])))
    found, _ = gradients(query, networks, batch, **options)
    assert_same_gradients(found, expected)
    if not noise:
        for network, points in zip(networks, (100 * 32, 100 * 96)):
            assert sum(evaluated[network]) - points < 0.8 * points


def test_the_gradient_in_ndc():
    """Through `render`, with rays in normalised device coordinates."""
    networks = two_networks(seed=1)  # no gradient is a sum that cancels
    K = [[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]
    batch = Batch(torch.stack([torch.zeros(30, 3), torch.randn(30, 3) * 0.2 - CAMERA]), torch.rand(30, 3))
    parameters, found = [p for network in networks for p in network.parameters()], []
    for kind in (PLAIN, SPARSE):
        kwargs = {'network_query_fn': kind(100), 'network_fn': networks[0], 'network_fine': networks[1],
                  'N_samples': 8, 'N_importance': 8, 'ndc': True, 'use_viewdirs': True, 'perturb': 1.0,
                  'raw_noise_std': 1.0, 'pytest': True, 'white_bkgd': False}
        for parameter in parameters:
            parameter.grad = None
        loss_and_gradient([16, 16], K, 1000, batch, kwargs)
        found.append([p.grad for p in parameters])
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU'))])
def test_points_without_gradient_are_not_evaluated_again(device):
    """Points without a gradient are not in the second pass at all, and nothing but the inputs is kept for
    it."""
    network, evaluated, kept = two_networks()[0].to(device), [], []
    points, viewdirs = torch.rand(50, 20, 3, device=device), torch.rand(50, 3, device=device)
    network.register_forward_pre_hook(lambda _, inputs: evaluated.append(len(inputs[0])))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        raw = SPARSE(320)(points, viewdirs, network)
    assert sum(evaluated) == 1000
    parameters = {p.data_ptr() for p in network.parameters()}
    # a position and a direction
    assert sum(t.numel() for t in kept if t.data_ptr() not in parameters) <= 1000 * 6
    (raw * (torch.arange(1000, device=device).reshape(50, 20, 1) % 9 == 0)).sum().backward()
    assert 1112 <= sum(evaluated) <= 1112 + 320 / CHUNK_LENGTHS


def test_gradients_of_points_and_directions():
    """For optimising poses."""
    network, _ = two_networks()
    found = []
    for kind in (PLAIN, SPARSE):
        torch.manual_seed(1)
        points, viewdirs = torch.rand(9, 5, 3, requires_grad=True), torch.rand(9, 3, requires_grad=True)
        raw = kind(7)(points, viewdirs, network)
        (raw * (torch.rand(9, 5, 1) < 0.3)).sum().backward()
        found.append((points.grad, viewdirs.grad))
    assert_same_gradients(found[1], found[0])


def test_gradients_of_points_through_a_frozen_network():
    network, _ = two_networks(use_viewdirs=False)
    points = torch.rand(4, 5, 3, requires_grad=True)
    SPARSE(7)(points, None, network.requires_grad_(False)).sum().backward()
    assert points.grad.any()


def test_no_gradient_at_all():
    network, _ = two_networks(use_viewdirs=False)
    raw = SPARSE(7)(torch.rand(4, 5, 3), None, network)
    (raw * 0).sum().backward()
    assert not any(p.grad.any() for p in network.parameters() if p.grad is not None)


def test_a_gradient_that_is_nan_is_not_taken_for_zero():
    """The step must be recognised as not finite."""
    network, _ = two_networks(use_viewdirs=False)
    raw = SPARSE(7)(torch.rand(4, 5, 3), None, network)
    raw[0, 0].sum().mul(float('nan')).backward()
    assert network.output_linear.weight.grad.isnan().any()


class Direction(torch.nn.Module):
    """Points to their trained direction from the origin, which is not defined at the origin."""
    out_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, points):
        scaled = points * self.scale
        return scaled / scaled.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize('query', [PLAIN(320), SPARSE(320)])
def test_padding_adds_no_point_that_was_not_there(query):
    network = encoded_nerf(use_viewdirs=False, encoding=Direction())
    query(torch.rand(3, 5, 3) + 0.1, None, network).sum().backward()
    assert torch.isfinite(network.encoding.scale.grad).all()


def test_a_part_of_the_parameters_may_be_frozen():
    network, _ = two_networks()
    network.pts_linears.requires_grad_(False)
    found = []
    for kind in (PLAIN, SPARSE):
        torch.manual_seed(1)
        network.zero_grad()
        kind(7).at_points(*points_and_directions(30), network).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    assert found[0][0] is found[1][0] is None
    assert_same_gradients(found[1], found[0])


# --- chunks -------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(N=st.integers(0, 1000), chunk=st.integers(1, 1200))
def test_evaluation_in_chunks_changes_nothing(N, chunk):
    points = torch.randn(N, 3)
    assert torch.equal(evaluate_in_chunks(torch.exp, points, chunk), points.exp())


@on_cpu_only('chunks are padded on CPUs')
@pytest.mark.parametrize('chunk', [1, 7, 31, 32, 33, 63, 64, 65, 300, 4096])
def test_chunks_on_a_cpu_have_few_lengths(chunk):
    """oneDNN compiles a kernel for each of them."""
    lengths = set()

    def identity(points):
        lengths.add(len(points))
        return points
    for N in range(1, chunk + 1):
        assert len(evaluate_padded(identity, torch.empty(N, 1), chunk)) == N
    assert max(lengths) == chunk and len(lengths) <= CHUNK_LENGTHS
