"""Rendering and losses of run_nerf.py: reference implementations, invariances, finite outputs and
gradients."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_devices import DEVICE
from tiny_networks import CAMERA, LearnedEncoding, assert_same_gradients, encoded_nerf

import run_nerf
from accel.network_query import NetworkQuery
from accel.renderer import MAX_SAMPLES, Renderer
from run_nerf import (
    EXACT,
    ImageRenderer,
    batchify,
    create_nerf,
    loss_and_gradient,
    nerf_losses,
    raw2outputs,
    render,
    render_frame,
    render_path,
    render_rays,
    set_learning_rate,
)
from run_nerf_helpers import disparity, get_rays, img2mse
from scenes.rays import Batch
from training.options import config_parser

K = np.array([[12.0, 0, 5.0], [0, 12.0, 4.0], [0, 0, 1]])
HWF = [8, 10, 12.0]


def chain(use_viewdirs=True, netchunk=64 * 1024, **options):
    """kwargs for `render` with two small networks, the same at each call."""
    torch.manual_seed(3)
    coarse, fine = (encoded_nerf(use_viewdirs, W=16, skips=()) for _ in range(2))
    return {'network_fn': coarse, 'network_fine': fine, 'network_query_fn': NetworkQuery(netchunk),
            'N_samples': 6, 'N_importance': 5, 'use_viewdirs': use_viewdirs, 'ndc': False, 'near': 2.0,
            'far': 6.0, **options}


def random_rays(*shape):
    torch.manual_seed(4)
    return torch.stack([torch.randn(*shape, 3) * 0.1, torch.randn(*shape, 3)])


def assert_same(one, other):
    for a, b in zip(one[:3], other[:3]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert one[3].keys() == other[3].keys()
    for key in one[3]:
        torch.testing.assert_close(one[3][key], other[3][key], atol=1e-6, rtol=1e-5)


# --- compositing --------------------------------------------------------------------------------------------

def composite_in_a_loop(raw, z_vals, ray_d, white_bkgd):
    """The reference implementation of Eq. 3 for one ray, sample by sample, in double precision."""
    transmittance, rgb, depth, acc, weights = 1.0, np.zeros(3), 0.0, 0.0, []
    for i, z in enumerate(z_vals):
        delta = (z_vals[i + 1] - z if i + 1 < len(z_vals) else 1e10) * np.linalg.norm(ray_d)
        alpha = 1 - np.exp(-max(raw[i, 3], 0) * delta)
        weight = transmittance * alpha
        rgb = rgb + weight / (1 + np.exp(-raw[i, :3]))
        depth, acc, transmittance = depth + weight * z, acc + weight, transmittance * (1 - alpha)
        weights.append(weight)
    disp = acc / depth if acc > 0 else 0.0
    return rgb + (1 - acc) * white_bkgd, disp, acc, np.array(weights), depth


@pytest.mark.parametrize('white_bkgd', [False, True])
@pytest.mark.parametrize('samples', [1, 2, 17])
def test_compositing_equals_the_reference_implementation(white_bkgd, samples):
    torch.manual_seed(0)
    raw = torch.randn(9, samples, 4) * 3
    raw[2, :, 3] = -1.0  # an empty ray
    z_vals, rays_d = torch.sort(torch.rand(9, samples) * 4 + 2, -1)[0], torch.randn(9, 3)
    found = raw2outputs(raw, z_vals, rays_d, white_bkgd=white_bkgd)
    for ray in range(9):
        inputs = (values[ray].double().cpu().numpy() for values in (raw, z_vals, rays_d))
        for a, b in zip(found, composite_in_a_loop(*inputs, white_bkgd)):
            np.testing.assert_allclose(a[ray].cpu(), b, atol=1e-5)


extreme = st.sampled_from([-1e38, -1e10, -50.0, -1.0, -1e-30, 0.0, 1e-30, 1e-12, 1e-3, 1.0, 90.0, 1e4,
                           1e10, 1e30, 1e38])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(extreme, extreme), min_size=1, max_size=8), st.booleans(),
       st.sampled_from([0.0, 2.0]), st.booleans())
def test_outputs_and_gradients_are_finite_for_any_network(values, white_bkgd, near, doubled):
    raw = torch.tensor([[[color, -color, 0.0, density] for color, density in values]], requires_grad=True)
    z_vals = torch.linspace(near, 6.0, len(values))[None]
    if doubled:
        z_vals = z_vals.round()  # samples in the same place
    outputs = raw2outputs(raw, z_vals, torch.tensor([[0.3, -0.2, -1.0]]), raw_noise_std=1.0,
                          white_bkgd=white_bkgd)
    rgb, disp, acc, weights, depth = outputs
    assert all(torch.isfinite(output).all() for output in outputs)
    assert (weights >= 0).all() and acc.item() <= 1 + 1e-5
    assert (rgb >= -1e-5).all() and (rgb <= 1 + 1e-5).all()
    (gradient,) = torch.autograd.grad(rgb.sum() + acc.sum() + depth.sum(), raw, retain_graph=True)
    assert torch.isfinite(gradient).all()
    (gradient,) = torch.autograd.grad(disp.clamp(max=1e3).sum(), raw)
    assert torch.isfinite(gradient).all()


def test_an_empty_ray_has_disparity_zero():
    raw = torch.full((1, 5, 4), -1.0)
    rgb, disp, acc, _, _ = raw2outputs(raw, torch.linspace(2, 6, 5)[None], torch.ones(1, 3), white_bkgd=True)
    assert disp.item() == 0 and acc.item() == 0 and torch.equal(rgb, torch.ones(1, 3))


def test_an_opaque_sample_gives_its_depth_and_colour():
    raw = torch.full((1, 5, 4), -1.0)
    raw[0, 2] = torch.tensor([50.0, -50.0, 0.0, 1e4])
    rgb, disp, _, weights, depth = raw2outputs(raw, torch.linspace(2, 6, 5)[None],
                                               torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(rgb, torch.tensor([[1.0, 0.0, 0.5]]))
    assert depth.item() == pytest.approx(4) and disp.item() == pytest.approx(0.25)
    assert weights[0, 2].item() == 1


# --- chunks and shapes --------------------------------------------------------------------------------------

@given(st.integers(0, 20), st.integers(1, 25))
def test_batchify_changes_nothing(rows, chunk):
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    assert torch.equal(batchify(lambda part: part * 2, chunk)(x), x * 2)


def test_batchify_without_chunk_is_the_function():
    def fn(x):
        return x
    assert batchify(fn, None) is fn


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_chunks_change_nothing(use_viewdirs):
    rays = random_rays(40)
    whole = render(8, 10, K, rays=rays, retraw=True, **chain(use_viewdirs))
    assert_same(whole, render(8, 10, K, chunk=7, rays=rays, retraw=True, **chain(use_viewdirs, netchunk=11)))


def test_shapes():
    rgb, disp, acc, extras = render(8, 10, K, rays=random_rays(3, 4), retraw=True, **chain())
    assert rgb.shape == (3, 4, 3) and disp.shape == acc.shape == (3, 4)
    assert {key: tuple(value.shape) for key, value in extras.items()} == {
        'raw': (3, 4, 11, 4), 'rgb0': (3, 4, 3), 'disp0': (3, 4), 'acc0': (3, 4), 'z_std': (3, 4)}


def test_a_camera_stands_for_its_rays():
    c2w = torch.eye(4)[:3]
    for centers in (False, True):
        rays = torch.stack(get_rays(8, 10, K, c2w, pixel_centers=centers))
        of_camera = render(8, 10, K, c2w=c2w, pixel_centers=centers, **chain())
        assert_same(of_camera, render(8, 10, K, rays=rays, **chain()))


def test_static_camera_keeps_its_rays_and_takes_the_directions():
    kwargs = chain()
    still, moved = torch.eye(4)[:3], torch.eye(4)[:3] + torch.tensor([[0.3, 0, 0, 0.0]])
    usual = render(8, 10, K, c2w=still, **kwargs)
    other_directions = render(8, 10, K, c2w=moved, c2w_staticcam=still, **kwargs)
    torch.testing.assert_close(usual[2], other_directions[2])  # the opacity does not depend on the direction
    assert not torch.allclose(usual[0], other_directions[0])


def test_without_a_fine_network_the_coarse_network_does_both():
    kwargs = chain(network_fine=None)
    one = render(8, 10, K, rays=random_rays(6), **kwargs)
    other = render(8, 10, K, rays=random_rays(6), **{**kwargs, 'network_fine': kwargs['network_fn']})
    assert_same(one, other)


def test_without_importance_samples_there_is_one_pass():
    _, _, _, extras = render(8, 10, K, rays=random_rays(6), **chain(N_importance=0, network_fine=None))
    assert extras == {}


@pytest.mark.parametrize('ndc, near, far', [(True, 0.0, 1.0), (False, 2.0, 6.0)])
@pytest.mark.parametrize('options', [{'perturb': 1.0}, {'raw_noise_std': 1.0}, {'white_bkgd': True}])
def test_gradients_are_finite_throughout(ndc, near, far, options):
    kwargs = chain(**options)
    kwargs.update(ndc=ndc, near=near, far=far)
    rays_o, rays_d = random_rays(30)
    rays_d[:, 2] = -rays_d[:, 2].abs() - 0.1
    rgb, disp, acc, extras = render(8, 10, K, rays=torch.stack([rays_o, rays_d]), **kwargs)
    (rgb.sum() + acc.sum() + disp.clamp(max=100).sum() + extras['rgb0'].sum()).backward()
    for network in (kwargs['network_fn'], kwargs['network_fine']):
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_pytest_fixes_the_random_numbers():
    kwargs = chain(perturb=1.0, raw_noise_std=1.0, pytest=True)
    assert_same(render(8, 10, K, rays=random_rays(6), **kwargs),
                render(8, 10, K, rays=random_rays(6), **kwargs))


@pytest.mark.parametrize('lindisp', [False, True])
@pytest.mark.parametrize('perturb', [0.0, 1.0])
def test_samples_cover_near_to_far(lindisp, perturb):
    seen = []

    def query(pts, viewdirs, network):
        seen.append(pts[..., 2])
        return torch.zeros(*pts.shape[:-1], 4)
    batch = torch.tensor([[0.0, 0, 0, 0, 0, 1, 2, 6]]).expand(50, 8)
    render_rays(batch, None, query, 16, lindisp=lindisp, perturb=perturb)
    places = 1 / torch.linspace(1 / 2, 1 / 6, 16) if lindisp else torch.linspace(2, 6, 16)
    mids = (places[1:] + places[:-1]) / 2  # a sample stays in the interval around its place
    lower, upper = torch.cat([places[:1], mids]), torch.cat([mids, places[-1:]])
    assert (seen[0] >= lower - 1e-5).all() and (seen[0] <= upper + 1e-5).all()
    if perturb == 0:
        torch.testing.assert_close(seen[0], places.expand(50, 16))


# --- samples ------------------------------------------------------------------------------------------------

def test_the_samples_of_the_maps_are_returned():
    rays = random_rays(3, 4)
    rgb, disp, acc, extras = render(8, 10, K, rays=rays, retraw=True, retsamples=True, **chain())
    shapes = {'weights': (3, 4, 11), 'z_vals': (3, 4, 11), 'depth_map': (3, 4), 'weights0': (3, 4, 6),
              'z_vals0': (3, 4, 6)}
    for key, shape in shapes.items():
        assert extras[key].shape == shape
    weights, z_vals, raw = extras['weights'], extras['z_vals'], extras['raw']
    torch.testing.assert_close(weights.sum(-1), acc)
    torch.testing.assert_close((weights * z_vals).sum(-1), extras['depth_map'])
    torch.testing.assert_close((weights[..., None] * raw[..., :3].sigmoid()).sum(-2), rgb)
    torch.testing.assert_close(disparity(extras['depth_map'], acc), disp)
    torch.testing.assert_close(extras['weights0'].sum(-1), extras['acc0'])
    assert (z_vals.diff() >= 0).all() and (z_vals >= 2).all() and (z_vals <= 6).all()
    for z_val in extras['z_vals0'].unbind(-1):
        assert (z_vals == z_val[..., None]).any(-1).all(), 'coarse samples are kept'
    expected = raw2outputs(raw.flatten(0, 1), z_vals.flatten(0, 1), rays[1].flatten(0, 1))
    torch.testing.assert_close(weights.flatten(0, 1), expected[3])


def test_without_importance_samples_the_coarse_samples_are_returned():
    *_, extras = render(8, 10, K, rays=random_rays(5), retsamples=True,
                        **chain(N_importance=0, network_fine=None))
    assert extras.keys() == {'weights', 'z_vals', 'depth_map'} and extras['weights'].shape == (5, 6)


@pytest.mark.parametrize('backward', ['sparse', 'plain'])
def test_gradients_flow_through_the_weights(backward):
    kwargs = chain(network_query_fn=NetworkQuery(backward=backward))
    *_, extras = render(8, 10, K, rays=random_rays(30), retsamples=True, **kwargs)
    (extras['weights'] * extras['z_vals']).sum().backward()
    assert kwargs['network_fine'].alpha_linear.weight.grad.any()
    assert kwargs['network_fn'].alpha_linear.weight.grad is None, 'fine samples are drawn without gradient'
    *_, extras = render(8, 10, K, rays=random_rays(30), retsamples=True, **kwargs)
    extras['weights0'][..., 0].sum().backward()
    assert kwargs['network_fn'].alpha_linear.weight.grad.any()


# --- renderers ----------------------------------------------------------------------------------------------

class Grey(Renderer):
    """A renderer that returns the same for every ray, and records how it is called."""

    def __init__(self):
        super().__init__()
        self.grey, self.calls = torch.nn.Parameter(torch.tensor(0.25)), []

    def for_rays(self, rays_flat, chunk, **kwargs):
        self.calls.append(('for_rays', len(rays_flat), kwargs['N_samples']))
        return self

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, **kwargs):
        self.calls.append(('render_rays', len(ray_batch), N_samples))
        grey = self.grey.expand(len(ray_batch))
        return {'rgb_map': grey[:, None].expand(-1, 3), 'disp_map': grey, 'acc_map': grey, 'kind': grey + 1}


def test_a_custom_renderer_is_used():
    """It is chosen once for all rays, and renders them in chunks."""
    renderer = Grey()
    rgb, disp, acc, extras = render(8, 10, K, chunk=5, rays=random_rays(3, 4), renderer=renderer, **chain())
    assert rgb.shape == (3, 4, 3) and (rgb == 0.25).all() and (disp == acc).all()
    assert extras.keys() == {'kind'} and (extras['kind'] == 1.25).all()
    assert renderer.calls == [('for_rays', 12, 6), *[('render_rays', count, 6) for count in (5, 5, 2)]]
    rgb.sum().backward()
    assert renderer.grey.grad == 36 and 'grey' in renderer.state_dict()


def test_a_custom_renderer_renders_frames_and_batches():
    kwargs = chain(renderer=Grey(), network_fine=None, white_bkgd=False)
    assert (render_frame(np.eye(4), HWF, K, 64, kwargs).rgb == 0.25).all()
    measures = loss_and_gradient(HWF, K, 64, Batch(random_rays(7), torch.ones(7, 3)), kwargs)
    assert measures.losses['coarse'].item() == pytest.approx(0.75 ** 2)
    assert kwargs['renderer'].grey.grad.item() == pytest.approx(-1.5)


def test_a_renderer_may_choose_another_for_the_rays():
    class Chooser(Renderer):
        def for_rays(self, rays_flat, chunk, **kwargs):
            return Grey() if len(rays_flat) > 10 else EXACT
    kwargs = chain(renderer=Chooser())
    for count, expected in ((20, True), (5, False)):
        *_, extras = render(8, 10, K, chunk=4, rays=random_rays(count), **kwargs)
        assert ('kind' in extras) == expected


def test_defaults_of_a_renderer():
    renderer = Renderer()
    assert renderer.for_rays(torch.zeros(1, 8), 100) is renderer
    assert renderer.max_rays(torch.device('cpu'), 64, 128) == MAX_SAMPLES['cpu'] // 192
    renderer.update(1, network_fn=None)
    renderer.drop_cache()
    renderer.reset()
    assert not renderer.state_dict()
    with pytest.raises(NotImplementedError):
        renderer.render_rays(torch.zeros(1, 8), None, None, 3)


def test_the_exact_renderer_is_render_rays():
    torch.manual_seed(0)
    kwargs = chain(use_viewdirs=False)
    batch = torch.cat([*random_rays(9), torch.tensor([[2.0, 6.0]]).expand(9, 2)], -1)
    arguments = batch, kwargs['network_fn'], kwargs['network_query_fn'], 6
    found, expected = EXACT.render_rays(*arguments, N_importance=4), render_rays(*arguments, N_importance=4)
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)


# --- losses -------------------------------------------------------------------------------------------------

def training_batch(N):
    """Rays towards the origin, with random colours."""
    torch.manual_seed(5)
    rays = torch.stack([torch.zeros(N, 3) + CAMERA, torch.randn(N, 3) * 0.2 - CAMERA / 4])
    return Batch(rays, torch.rand(N, 3))


def parameters_of(kwargs):
    return [p for name in ('network_fn', 'network_fine') for p in kwargs[name].parameters()]


def test_the_loss_of_parts_is_that_of_the_whole_batch(monkeypatch):
    """Large batches are split; losses, opacities and gradients are those of the whole."""
    batch, kwargs, results = training_batch(50), chain(white_bkgd=True, N_samples=8, N_importance=8), []
    for samples in (10 ** 6, 7 * 16):
        monkeypatch.setitem(MAX_SAMPLES, DEVICE.type, samples)
        for parameter in parameters_of(kwargs):
            parameter.grad = None
        measures = loss_and_gradient([16, 16], None, 1000, batch, kwargs)
        results.append(([p.grad for p in parameters_of(kwargs)], measures))
    (gradients, whole), (gradients_of_parts, parts) = results
    assert_same_gradients(gradients_of_parts, gradients, 1e-4)  # sums that cancel, in another order
    assert list(whole.losses) == list(whole.errors) == list(whole.opacities) == ['coarse', 'fine']
    for one, other in zip(whole.tensors(), parts.tensors(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    assert whole.background.item() == pytest.approx(((1 - batch.target) ** 2).mean().item())
    assert whole.mean_samples is None


def test_losses_are_the_colour_errors_of_both_networks():
    batch, kwargs = training_batch(20), chain(white_bkgd=False)
    measures = loss_and_gradient([16, 16], None, 1000, batch, kwargs)
    rgb, _, acc, extras = render(16, 16, None, rays=batch.rays, **kwargs)
    torch.testing.assert_close(measures.losses['fine'], img2mse(rgb, batch.target).detach())
    torch.testing.assert_close(measures.losses['coarse'], img2mse(extras['rgb0'], batch.target).detach())
    torch.testing.assert_close(measures.total, measures.losses['fine'] + measures.losses['coarse'])
    torch.testing.assert_close(measures.opacities['fine'], acc.mean().detach())
    torch.testing.assert_close(measures.opacities['coarse'], extras['acc0'].mean().detach())
    kwargs = chain(network_fine=None, N_importance=0, white_bkgd=False)
    single = loss_and_gradient([16, 16], None, 1000, batch, kwargs)
    assert list(single.losses) == list(single.opacities) == ['coarse']


def test_a_new_term_of_the_loss_is_trained_and_measured(monkeypatch):
    """`nerf_losses` is the only function to change, also for a loss on the samples."""
    def losses_with_spread(errors, rgb, acc, extras, target, bkgd):
        spread = (extras['weights'] * (extras['z_vals'] - 4) ** 2).sum(-1).mean()
        return {**nerf_losses(errors, rgb, acc, extras, target, bkgd), 'spread': 0.1 * spread}
    batch, kwargs, results = training_batch(20), chain(white_bkgd=False), []
    for losses in (nerf_losses, losses_with_spread):
        monkeypatch.setattr(run_nerf, 'nerf_losses', losses)
        for parameter in parameters_of(kwargs):
            parameter.grad = None
        measures = loss_and_gradient([16, 16], None, 1000, batch, kwargs)
        results.append((measures, kwargs['network_fine'].alpha_linear.weight.grad.clone()))
    (before, gradient), (after, gradient_with_spread) = results
    assert after.losses.keys() - before.losses.keys() == {'spread'} and after.losses['spread'] > 0
    torch.testing.assert_close(after.total, before.total + after.losses['spread'])
    torch.testing.assert_close(after.losses['fine'], before.losses['fine'])
    assert not torch.allclose(gradient, gradient_with_spread)


@pytest.mark.parametrize('step, expected', [(1, 5e-4), (2, 5e-4 * 0.1 ** (1 / 250000)), (250001, 5e-5)])
def test_the_learning_rate_decays_to_a_tenth(step, expected):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    assert set_learning_rate(optimizer, 5e-4, 250, step) == pytest.approx(expected, rel=1e-9)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-9)


# --- set-up -------------------------------------------------------------------------------------------------

def test_a_learned_encoding_is_optimised_and_saved_with_its_network(tmp_path, monkeypatch):
    monkeypatch.setattr(run_nerf, 'get_embedder',
                        lambda multires, i: (LearnedEncoding(), LearnedEncoding.out_dim))
    args = config_parser().parse_args([
        '--expname', 'x', '--basedir', str(tmp_path), '--device', 'cpu', '--netwidth', '16',
        '--netwidth_fine', '16', '--N_importance', '5', '--use_viewdirs'])
    kwargs, _, _, grad_vars, optimizer = create_nerf(args)
    optimised = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert optimised == {id(p) for p in grad_vars}
    for network in (kwargs['network_fn'], kwargs['network_fine']):
        encodings = [*network.encoding.parameters(), *network.encoding_views.parameters()]
        assert len(encodings) == 4 and {id(p) for p in encodings} <= optimised
        assert 'encoding_views.linear.weight' in network.state_dict()


# --- frames -------------------------------------------------------------------------------------------------

def test_render_path_returns_and_writes_the_frames(tmp_path, capsys):
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    rgbs, disps = render_path(poses, HWF, K, 64, chain(), gt_imgs=np.zeros((2, 8, 10, 3)), savedir=tmp_path)
    assert rgbs.shape == (2, 8, 10, 3) and disps.shape == (2, 8, 10)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['000.png', '001.png', 'depth', 'disp', 'frames.json']
    assert capsys.readouterr().out.count('PSNR') == 2


def test_render_factor_makes_the_same_image_smaller():
    """Every second pixel of the full frame: the intrinsics shrink with the image."""
    pose = np.eye(4, dtype=np.float32)[None]
    full, half = (next(ImageRenderer(HWF, K, 64, chain(), factor).render_path(pose)).rgb
                  for factor in (0, 2))
    assert half.shape == (4, 5, 3)
    np.testing.assert_allclose(half, full[::2, ::2], atol=1e-5)


@pytest.mark.parametrize('ndc', [False, True])
@pytest.mark.parametrize('centers', [False, True])
def test_a_stride_leaves_pixels_out_and_changes_no_others(ndc, centers):
    kwargs = chain(ndc=ndc, near=0.0, far=1.0, pixel_centers=centers)
    full, some = (render_frame(np.eye(4), HWF, K, 64, kwargs, stride=stride).rgb for stride in (1, 3))
    assert some.shape == (3, 4, 3)
    np.testing.assert_allclose(some, full[::3, ::3], atol=1e-5)
