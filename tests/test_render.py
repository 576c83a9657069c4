"""The rendering chain: plain twins, invariances, finite outputs and gradients."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_nerf import batchify, raw2outputs, render, render_frame, render_frames, render_path, render_rays, run_network
from run_nerf_helpers import NeRF, get_embedder, get_rays

K = np.array([[12.0, 0, 5.0], [0, 12.0, 4.0], [0, 0, 1]])
HWF = [8, 10, 12.0]


def chain(use_viewdirs=True, netchunk=64 * 1024, **options):
    """kwargs for `render` with two small networks, the same ones at each call."""
    torch.manual_seed(3)
    embed_fn, input_ch = get_embedder(4)
    embeddirs_fn, input_ch_views = get_embedder(2) if use_viewdirs else (None, 0)
    coarse, fine = (NeRF(D=3, W=16, input_ch=input_ch, input_ch_views=input_ch_views, output_ch=5,
                         use_viewdirs=use_viewdirs) for _ in range(2))

    def query(inputs, viewdirs, network):
        return run_network(inputs, viewdirs, network, embed_fn, embeddirs_fn, netchunk)
    return {'network_fn': coarse, 'network_fine': fine, 'network_query_fn': query, 'N_samples': 6, 'N_importance': 5,
            'use_viewdirs': use_viewdirs, 'ndc': False, 'near': 2.0, 'far': 6.0, **options}


def some_rays(*shape):
    torch.manual_seed(4)
    return torch.stack([torch.randn(*shape, 3) * 0.1, torch.randn(*shape, 3)])


def assert_same(one, other):
    for a, b in zip(one[:3], other[:3]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert one[3].keys() == other[3].keys()
    for key in one[3]:
        torch.testing.assert_close(one[3][key], other[3][key], atol=1e-6, rtol=1e-5)


# --- compositing ------------------------------------------------------------------------------------------------

def composite_one_by_one(raw, z_vals, ray_d, white_bkgd):
    """Eq. 3 for one ray, a sample at a time, in double precision."""
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
def test_compositing_equals_its_plain_twin(white_bkgd, samples):
    torch.manual_seed(0)
    raw = torch.randn(9, samples, 4) * 3
    raw[2, :, 3] = -1.0  # an empty ray
    z_vals, rays_d = torch.sort(torch.rand(9, samples) * 4 + 2, -1)[0], torch.randn(9, 3)
    found = raw2outputs(raw, z_vals, rays_d, white_bkgd=white_bkgd)
    for ray in range(9):
        expected = composite_one_by_one(raw[ray].double().numpy(), z_vals[ray].double().numpy(),
                                        rays_d[ray].double().numpy(), white_bkgd)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a[ray], b, atol=1e-5)


extreme = st.sampled_from([-1e38, -1e10, -50.0, -1.0, -1e-30, 0.0, 1e-30, 1e-12, 1e-3, 1.0, 90.0, 1e4, 1e10, 1e30, 1e38])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(extreme, extreme), min_size=1, max_size=8), st.booleans(), st.sampled_from([0.0, 2.0]),
       st.booleans())
def test_outputs_and_gradients_are_finite_whatever_the_network_says(values, white_bkgd, near, doubled):
    raw = torch.tensor([[[color, -color, 0.0, density] for color, density in values]], requires_grad=True)
    z_vals = torch.linspace(near, 6.0, len(values))[None]
    if doubled:
        z_vals = z_vals.round()  # samples that fall together
    outputs = raw2outputs(raw, z_vals, torch.tensor([[0.3, -0.2, -1.0]]), raw_noise_std=1.0, white_bkgd=white_bkgd)
    rgb, disp, acc, weights, depth = outputs
    assert all(torch.isfinite(output).all() for output in outputs)
    assert (weights >= 0).all() and acc.item() <= 1 + 1e-5 and (rgb >= -1e-5).all() and (rgb <= 1 + 1e-5).all()
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
    rgb, disp, _, weights, depth = raw2outputs(raw, torch.linspace(2, 6, 5)[None], torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(rgb, torch.tensor([[1.0, 0.0, 0.5]]))
    assert depth.item() == pytest.approx(4) and disp.item() == pytest.approx(0.25) and weights[0, 2].item() == 1


# --- chunks and shapes ------------------------------------------------------------------------------------------

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
    rays = some_rays(40)
    whole = render(8, 10, K, rays=rays, retraw=True, **chain(use_viewdirs))
    assert_same(whole, render(8, 10, K, chunk=7, rays=rays, retraw=True, **chain(use_viewdirs, netchunk=11)))


def test_shapes():
    rgb, disp, acc, extras = render(8, 10, K, rays=some_rays(3, 4), retraw=True, **chain())
    assert rgb.shape == (3, 4, 3) and disp.shape == acc.shape == (3, 4)
    assert {key: tuple(value.shape) for key, value in extras.items()} == {
        'raw': (3, 4, 11, 4), 'rgb0': (3, 4, 3), 'disp0': (3, 4), 'acc0': (3, 4), 'z_std': (3, 4)}


def test_a_camera_is_its_rays():
    c2w = torch.eye(4)[:3]
    for centers in (False, True):
        rays = torch.stack(get_rays(8, 10, K, c2w, pixel_centers=centers))
        assert_same(render(8, 10, K, c2w=c2w, pixel_centers=centers, **chain()), render(8, 10, K, rays=rays, **chain()))


def test_static_camera_keeps_its_rays_and_takes_the_directions():
    kwargs = chain()
    still, moved = torch.eye(4)[:3], torch.eye(4)[:3] + torch.tensor([[0.3, 0, 0, 0.0]])
    plain = render(8, 10, K, c2w=still, **kwargs)
    seen_from_elsewhere = render(8, 10, K, c2w=moved, c2w_staticcam=still, **kwargs)
    torch.testing.assert_close(plain[2], seen_from_elsewhere[2])  # the opacity does not depend on the direction
    assert not torch.allclose(plain[0], seen_from_elsewhere[0])


def test_without_fine_network_the_coarse_one_does_both():
    kwargs = chain(network_fine=None)
    one = render(8, 10, K, rays=some_rays(6), **kwargs)
    assert_same(one, render(8, 10, K, rays=some_rays(6), **{**kwargs, 'network_fine': kwargs['network_fn']}))


def test_without_importance_samples_there_is_one_pass():
    _, _, _, extras = render(8, 10, K, rays=some_rays(6), **chain(N_importance=0, network_fine=None))
    assert extras == {}


@pytest.mark.parametrize('ndc, near, far', [(True, 0.0, 1.0), (False, 2.0, 6.0)])
@pytest.mark.parametrize('options', [{'perturb': 1.0}, {'raw_noise_std': 1.0}, {'white_bkgd': True}])
def test_gradients_are_finite_all_along_the_chain(ndc, near, far, options):
    kwargs = chain(**options)
    kwargs.update(ndc=ndc, near=near, far=far)
    rays_o, rays_d = some_rays(30)
    rays_d[:, 2] = -rays_d[:, 2].abs() - 0.1
    rgb, disp, acc, extras = render(8, 10, K, rays=torch.stack([rays_o, rays_d]), **kwargs)
    (rgb.sum() + acc.sum() + disp.clamp(max=100).sum() + extras['rgb0'].sum()).backward()
    for network in (kwargs['network_fn'], kwargs['network_fine']):
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_fixed_numbers_repeat():
    kwargs = chain(perturb=1.0, raw_noise_std=1.0, pytest=True)
    assert_same(render(8, 10, K, rays=some_rays(6), **kwargs), render(8, 10, K, rays=some_rays(6), **kwargs))


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
    mids = (places[1:] + places[:-1]) / 2  # a sample keeps to the interval around its place
    lower, upper = torch.cat([places[:1], mids]), torch.cat([mids, places[-1:]])
    assert (seen[0] >= lower - 1e-5).all() and (seen[0] <= upper + 1e-5).all()
    if perturb == 0:
        torch.testing.assert_close(seen[0], places.expand(50, 16))


# --- frames -----------------------------------------------------------------------------------------------------

def test_render_path_returns_and_writes_the_frames(tmp_path, capsys):
    poses = torch.eye(4).repeat(2, 1, 1).numpy()
    rgbs, disps = render_path(poses, HWF, K, 64, chain(), gt_imgs=np.zeros((2, 8, 10, 3)), savedir=tmp_path)
    assert rgbs.shape == (2, 8, 10, 3) and disps.shape == (2, 8, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['000.png', '001.png', 'depth', 'disp', 'frames.json']
    assert capsys.readouterr().out.count('PSNR') == 2


def test_render_factor_shows_the_same_picture_smaller():
    """Every second pixel of the full frame: the intrinsics shrink with the image."""
    pose = torch.eye(4)[None].numpy()
    full, half = (next(render_frames(pose, HWF, K, 64, chain(), factor)).rgb for factor in (0, 2))
    assert half.shape == (4, 5, 3)
    np.testing.assert_allclose(half, full[::2, ::2], atol=1e-5)


@pytest.mark.parametrize('ndc', [False, True])
@pytest.mark.parametrize('centers', [False, True])
def test_a_stride_keeps_the_rays_of_the_pixels_that_are_left(ndc, centers):
    kwargs = chain(ndc=ndc, near=0.0, far=1.0, pixel_centers=centers)
    full, some = (render_frame(np.eye(4), HWF, K, 64, kwargs, stride=stride).rgb for stride in (1, 3))
    assert some.shape == (3, 4, 3)
    np.testing.assert_allclose(some, full[::3, ::3], atol=1e-5)
