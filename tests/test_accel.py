"""Backward through the samples that have a gradient: the same gradient as the plain way's, in a fraction of the memory."""
import pytest
import torch
from conftest import GOLDEN, needs_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.sparse_backward import InChunks, Screen
from devices import CPU_ACTIVATIONS, POINTS_AT_ONCE, network_chunk, pick_precision, rays_at_once
from errors import UserError
from options import config_parser
from run_nerf import create_nerf, loss_and_gradient, render_rays, run_network
from run_nerf_helpers import NeRF, get_embedder

RAYS_AWAY = torch.tensor([0.0, 0.0, 4.0])


def networks(depth=3, width=32, use_viewdirs=True, seed=0):
    torch.manual_seed(seed)
    embed_fn, channels = get_embedder(4)
    embeddirs_fn, channels_views = get_embedder(2) if use_viewdirs else (None, 0)
    built = [NeRF(depth, width, channels, channels_views, 5, [1], use_viewdirs) for _ in range(2)]
    return built, embed_fn, embeddirs_fn


def rays(N, use_viewdirs=True):
    """A ray batch [N, 11 or 8] towards the origin."""
    directions = torch.randn(N, 3) * 0.2 - RAYS_AWAY
    unit = directions / directions.norm(dim=-1, keepdim=True)
    bounds = torch.tensor([[2.0, 6.0]]).expand(N, 2)
    columns = [RAYS_AWAY.expand(N, 3), directions / 4, bounds] + ([unit] if use_viewdirs else [])
    return torch.cat(columns, -1)


def gradients(in_chunks, built, embed_fn, embeddirs_fn, ray_batch, netchunk=64, use_viewdirs=True, **options):
    """Gradients of a loss of both networks, and the loss."""
    def query(points, viewdirs, network):
        return run_network(points, viewdirs, network, embed_fn, embeddirs_fn, netchunk, in_chunks)
    parameters = [p for network in built for p in network.parameters()]
    for parameter in parameters:
        parameter.grad = None
    options = {'N_samples': 12, 'N_importance': 9, 'perturb': 1.0, 'pytest': True, 'white_bkgd': True, **options}
    out = render_rays(ray_batch, built[0], query, network_fine=built[1], **options)
    loss = ((out['rgb_map'] - 0.3) ** 2).mean() + ((out['rgb0'] - 0.7) ** 2).mean()
    loss.backward()
    return [p.grad for p in parameters], loss.detach()


def assert_same(found, expected, tolerance=1e-5):
    for mine, twin in zip(found, expected):
        if twin is None:
            assert mine is None or not mine.any()
        else:
            assert (mine - twin).norm() <= tolerance * twin.norm() + 1e-12


@given(N=st.integers(1, 40), samples=st.integers(3, 20), importance=st.integers(1, 12), chunk=st.integers(1, 300),
       depth=st.integers(1, 4), width=st.integers(2, 40), use_viewdirs=st.booleans(), noise=st.sampled_from([0.0, 1.0]),
       seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_the_plain_ways(N, samples, importance, chunk, depth, width, use_viewdirs, noise, seed):
    setup = networks(depth, width, use_viewdirs, seed)
    batch = rays(N, use_viewdirs)
    options = {'N_samples': samples, 'N_importance': importance, 'raw_noise_std': noise, 'netchunk': chunk}
    expected, loss = gradients(None, *setup, batch, **options)
    found, same_loss = gradients(InChunks('sparse'), *setup, batch, **options)
    assert torch.allclose(loss, same_loss, rtol=1e-6)
    assert_same(found, expected)


@needs_golden
@pytest.mark.parametrize('noise', [0.0, 1.0])
def test_the_gradient_is_the_plain_ways_on_a_trained_network(noise, tmp_path):
    """The recorded checkpoint, in which most of the space is empty."""
    args = config_parser().parse_args([
        '--config', str(GOLDEN / 'checkpoint/config.txt'), '--ft_path', str(GOLDEN / 'checkpoint/002000.tar'),
        '--basedir', str(tmp_path), '--device', 'cpu', '--precision', 'fp32', '--backward', 'sparse'])
    kwargs, _, _, _, _ = create_nerf(args)
    query = kwargs['network_query_fn']
    built, in_chunks = [kwargs['network_fn'], kwargs['network_fine']], query.keywords['in_chunks']
    encodings = query.keywords['embed_fn'], query.keywords['embeddirs_fn']
    torch.manual_seed(0)
    batch, options = rays(100), {'N_samples': 32, 'N_importance': 64, 'raw_noise_std': noise, 'netchunk': 4096}
    expected, _ = gradients(None, built, *encodings, batch, **options)
    found, _ = gradients(in_chunks, built, *encodings, batch, **options)
    assert_same(found, expected)
    if not noise:
        assert all(share < 0.8 for share in in_chunks.shares.values())


def test_the_gradient_is_the_plain_ways_in_ndc():
    """Through `render`, whose rays are then those of normalised device coordinates."""
    built, embed_fn, embeddirs_fn = networks()
    K = [[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]
    batch_rays, target = torch.stack([torch.zeros(30, 3), torch.randn(30, 3) * 0.2 - RAYS_AWAY]), torch.rand(30, 3)
    found = []
    for in_chunks in (None, InChunks('sparse')):
        def query(points, viewdirs, network, in_chunks=in_chunks):
            return run_network(points, viewdirs, network, embed_fn, embeddirs_fn, 100, in_chunks)
        kwargs = {'network_query_fn': query, 'network_fn': built[0], 'network_fine': built[1], 'N_samples': 8,
                  'N_importance': 8, 'ndc': True, 'use_viewdirs': True, 'perturb': 1.0, 'raw_noise_std': 1.0,
                  'pytest': True, 'white_bkgd': False}
        parameters = [p for network in built for p in network.parameters()]
        for parameter in parameters:
            parameter.grad = None
        loss_and_gradient([16, 16], K, 1000, batch_rays, target, kwargs)
        found.append([p.grad for p in parameters])
    assert_same(found[1], found[0])


def test_a_loss_in_parts_is_the_loss(monkeypatch):
    """Large batches go in parts; errors, opacities and gradients are those of the whole."""
    built, embed_fn, embeddirs_fn = networks()
    batch_rays = torch.stack([torch.zeros(50, 3) + RAYS_AWAY, torch.randn(50, 3) * 0.2 - RAYS_AWAY / 4])
    target = torch.rand(50, 3)

    def query(points, viewdirs, network):
        return run_network(points, viewdirs, network, embed_fn, embeddirs_fn, 100)
    kwargs = {'network_query_fn': query, 'network_fn': built[0], 'network_fine': built[1], 'N_samples': 8, 'near': 2.0,
              'far': 6.0, 'N_importance': 8, 'ndc': False, 'use_viewdirs': True, 'white_bkgd': True}
    parameters, results = [p for network in built for p in network.parameters()], []
    for points in (10 ** 6, 7 * 16):
        monkeypatch.setitem(POINTS_AT_ONCE, 'cpu', points)
        for parameter in parameters:
            parameter.grad = None
        measures = loss_and_gradient([16, 16], None, 1000, batch_rays, target, kwargs)
        results.append(([p.grad for p in parameters], measures))
    assert_same(results[1][0], results[0][0])
    for whole, parts in zip(results[0][1], results[1][1]):
        assert torch.allclose(whole, parts, rtol=1e-5)
    assert results[0][1][2].item() == pytest.approx(((1 - target) ** 2).mean().item())


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU'))])
def test_few_samples_go_back(device):
    """Points without a gradient are not in the second pass at all, and nothing but the inputs is kept for it."""
    built, embed_fn, embeddirs_fn = networks()
    network, seen, kept = built[0].to(device), [], []
    points = torch.rand(50, 20, 3, device=device)
    network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        raw = run_network(points, None, network, lambda x: torch.cat([embed_fn(x), embeddirs_fn(x)], -1), None, 300,
                          InChunks('sparse'))
    assert sum(seen) == 1000
    own = {p.data_ptr() for p in network.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= points.numel()
    (raw * (torch.arange(1000, device=device).reshape(50, 20, 1) % 10 == 0)).sum().backward()
    assert 1100 <= sum(seen) <= 1100 + 300 / 16


def test_gradients_of_the_points():
    """For those who optimise poses."""
    (network, _), embed_fn, embeddirs_fn = networks()
    found = []
    for in_chunks in (None, InChunks('sparse')):
        torch.manual_seed(1)
        points, viewdirs = torch.rand(9, 5, 3, requires_grad=True), torch.rand(9, 3, requires_grad=True)
        raw = run_network(points, viewdirs, network, embed_fn, embeddirs_fn, 7, in_chunks)
        (raw * (torch.rand(9, 5, 1) < 0.3)).sum().backward()
        found.append((points.grad, viewdirs.grad))
    assert_same(found[1], found[0])


def test_gradients_of_the_points_through_a_frozen_network():
    (network, _), embed_fn, _ = networks(use_viewdirs=False)
    points = torch.rand(4, 5, 3, requires_grad=True)
    run_network(points, None, network.requires_grad_(False), embed_fn, None, 7, InChunks('sparse')).sum().backward()
    assert points.grad.any()


def test_no_gradient_at_all():
    (network, _), embed_fn, _ = networks(use_viewdirs=False)
    raw = run_network(torch.rand(4, 5, 3), None, network, embed_fn, None, 7, InChunks('sparse'))
    (raw * 0).sum().backward()
    assert not any(p.grad.any() for p in network.parameters() if p.grad is not None)


def test_not_a_number_goes_on():
    """A gradient that is not a number is not taken for zero: the step must be seen to be bad."""
    (network, _), embed_fn, _ = networks(use_viewdirs=False)
    raw = run_network(torch.rand(4, 5, 3), None, network, embed_fn, None, 7, InChunks('sparse'))
    raw[0, 0].sum().mul(float('nan')).backward()
    assert network.output_linear.weight.grad.isnan().any()


def test_the_plain_way_is_taken_where_it_is_cheaper():
    (network, _), embed_fn, _ = networks(use_viewdirs=False)
    auto, ways = InChunks('auto'), []

    def step(live):
        raw = run_network(torch.rand(10, 10, 3), None, network, embed_fn, None, 50, auto)
        ways.append('sparse' if raw.grad_fn.next_functions[0][0].name().startswith('Sparse') else 'plain')
        (raw * (torch.arange(100).reshape(10, 10, 1) < live)).sum().backward()
    for live in (100, 100, 60, 60, 100):
        step(live)
    assert ways == ['sparse', 'plain', 'sparse', 'sparse', 'sparse']
    resumed = InChunks('auto')
    resumed.load_state_dict(auto.state_dict({'coarse': network}), {'coarse': network})
    assert resumed.is_plain(network, 100), 'a run that goes on takes the way that it would have taken'
    assert InChunks('plain').is_plain(network, 10 ** 9) and not InChunks('sparse').is_plain(network, 1)
    auto.shares[network] = 1.0
    assert not auto.is_plain(network, 10 ** 7), 'activations of gigabytes'


def test_bf16_is_for_the_products_alone():
    """What comes out, and the gradients, are float32, near those of float32 products; so is what the encoding hands on."""
    (network, _), embed_fn, embeddirs_fn = networks(width=64)
    points, viewdirs, inputs = torch.rand(60, 20, 3), torch.rand(60, 3), []
    network.register_forward_pre_hook(lambda _, found: inputs.append(found[0].dtype))
    found = []
    for precision in ('fp32', 'bf16'):
        network.zero_grad()
        raw = run_network(points, viewdirs, network, embed_fn, embeddirs_fn, 700, InChunks('sparse', precision))
        raw.square().mean().backward()
        found.append((raw.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])))
    (raw, grad), (raw_bf16, grad_bf16) = found
    assert raw_bf16.dtype == grad_bf16.dtype == torch.float32 and set(inputs) == {torch.float32}
    assert not torch.equal(raw, raw_bf16)
    assert (raw - raw_bf16).norm() < 0.02 * raw.norm()
    assert (grad - grad_bf16).norm() < 0.05 * grad.norm()


@pytest.mark.parametrize('scale', [1.0, 300.0])
@torch.no_grad()
def test_what_is_screened_renders_as_float32(scale):
    """Fewer points go through the network in float32, and pictures do not show it, whatever the scale of the density."""
    built, embed_fn, embeddirs_fn = networks(width=64)
    for network in built:
        network.alpha_linear.weight *= 40 * scale
        network.alpha_linear.bias -= 3 * scale
    counts, pictures = [], []
    for precision in ('fp32', 'screened'):
        in_chunks, seen = InChunks('auto', precision), []
        hooks = [network.rgb_linear.register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])) if inputs[0].dtype == torch.float32 else None)
            for network in built]

        def query(points, viewdirs, network, in_chunks=in_chunks):
            return run_network(points, viewdirs, network, embed_fn, embeddirs_fn, 500, in_chunks)
        torch.manual_seed(0)
        for _ in range(3):
            out = render_rays(rays(200), built[0], query, N_samples=16, N_importance=16, network_fine=built[1])
        counts.append(sum(seen))
        pictures.append(out)
        for hook in hooks:
            hook.remove()
    for key in ('rgb_map', 'acc_map', 'disp_map', 'rgb0'):
        assert torch.allclose(pictures[0][key], pictures[1][key], atol=1e-5), key
    assert 0.1 < pictures[0]['acc_map'].mean() < 0.999, 'neither empty nor full'


def test_where_bf16_errs_too_much_all_is_done_in_float32():
    screen, network = Screen(), torch.nn.Linear(1, 1)
    exact = torch.linspace(-2, 2, 41)[:, None].expand(41, 4)
    points, asked = torch.arange(41), []

    def fn(points):
        asked.append(len(points))
        return exact[points]
    raw = screen(network, fn, lambda points: exact[points] + 0.01, points)
    assert torch.equal(raw.relu(), exact.relu()) and asked == [26]
    raw = screen(network, fn, lambda points: exact[points] + 1.0, points)
    assert torch.equal(raw, exact) and asked[-1] == 41 and screen.errors[network] == pytest.approx(1.0)
    assert torch.equal(screen(network, fn, lambda points: exact[points] * float('nan'), points), exact)


def test_errors_of_large_densities_do_not_widen_the_margin():
    """bfloat16 errs in proportion: by 1 where the density is 100, by 0.004 where its sign is decided."""
    screen, network, asked = Screen(), torch.nn.Linear(1, 1), []
    exact = torch.linspace(-100, 100, 2001)[:, None].expand(2001, 4)
    points = torch.arange(2001)

    def fn(points):
        asked.append(len(points))
        return exact[points]
    for _ in range(4):
        assert torch.equal(screen(network, fn, lambda points: exact[points] * 1.01, points).relu(), exact.relu())
    assert max(asked) <= 1010

    far = points[exact[:, 3] < -10]  # nothing near zero, from which to learn
    other = torch.nn.Linear(1, 1)
    screen(other, fn, lambda points: exact[points] * 1.01, far)
    assert other not in screen.errors
    screen(other, fn, lambda points: torch.where(exact[points] < 20, -0.4, 50.0), points)  # signs that are wrong
    assert screen.errors[other] >= 0.4


def test_precision_of_a_device(monkeypatch):
    cpu = torch.device('cpu')
    assert pick_precision('fp32', cpu, 256) == 'fp32' and pick_precision('bf16', cpu, 8) == 'bf16'
    with pytest.raises(UserError, match='--precision tf32: found cpu, expected an NVIDIA GPU'):
        pick_precision('tf32', cpu, 256)
    for fast, expected in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr('devices.has_fast_bf16', lambda device, fast=fast: fast)
        assert pick_precision('auto', cpu, 256) == expected
        assert pick_precision('auto', cpu, 32) == 'fp32', 'conversions cost more there'


def test_rendering_is_exact_unless_a_precision_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr('devices.has_fast_bf16', lambda device: True)
    for name, training, rendering in (('auto', 'bf16', 'screened'), ('bf16', 'bf16', 'bf16'), ('fp32', 'fp32', 'fp32')):
        args = config_parser().parse_args(['--expname', 'x', '--basedir', str(tmp_path), '--device', 'cpu',
                                           '--netwidth', '128', '--precision', name])
        train, test, *_ = create_nerf(args)
        assert train['network_query_fn'].keywords['in_chunks'].precision == training
        assert test['network_query_fn'].keywords['in_chunks'].precision == rendering


@given(chunk=st.integers(1, 10 ** 7), samples=st.integers(1, 2000), width=st.integers(1, 4096))
def test_sizes_of_what_is_done_at_once(chunk, samples, width):
    rays = rays_at_once(chunk, samples, torch.device('cpu'))
    assert 1 <= rays <= chunk and (rays * samples <= POINTS_AT_ONCE['cpu'] or rays == 1)
    assert network_chunk(width, torch.device('cpu')) * width <= max(CPU_ACTIVATIONS, 1024 * width)
