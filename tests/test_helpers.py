"""Encoding, networks, rays, NDC and sampling: properties, and reference implementations of the fast forms."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_devices import DEVICE, Random
from tiny_networks import LearnedEncoding, encoded_nerf, points_and_directions

from run_nerf_helpers import (
    Embedder,
    NeRF,
    SphericalHarmonics,
    get_embedder,
    get_rays,
    img2mse,
    mse2psnr,
    ndc_rays,
    pixel_rays,
    sample_pdf,
    to8b,
)

K = np.array([[60.0, 0, 17.0], [0, 50.0, 9.0], [0, 0, 1]])


def some_pose(seed=0):
    """A rotation and a position, [3, 4]."""
    random = Random(seed)
    rotation, _ = torch.linalg.qr(random.randn(3, 3))
    return torch.cat([rotation, random.randn(3, 1)], -1)


# --- losses -------------------------------------------------------------------------------------------------

def test_psnr_of_a_known_error():
    x = torch.rand(7, 3)
    assert mse2psnr(img2mse(x, x + 0.1)).item() == pytest.approx(20.0, abs=1e-4)


def test_to8b_clips():
    assert to8b(np.array([-1.0, 0.0, 0.5, 1.0, 7.0])).tolist() == [0, 0, 127, 255, 255]


# --- encoding -----------------------------------------------------------------------------------------------

def encode_term_by_term(x, frequencies, include_input=True, periodic_fns=(torch.sin, torch.cos)):
    """The reference implementation of Eq. 4."""
    waves = [fn(x * frequency) for frequency in frequencies for fn in periodic_fns]
    return torch.cat([x] * include_input + waves, -1)


@given(L=st.integers(1, 12), shape=st.lists(st.integers(1, 4), max_size=3))
def test_encoding_equals_the_reference_implementation(L, shape):
    x = torch.randn(*shape, 3)
    embed, dim = get_embedder(L)
    assert dim == 3 + 6 * L
    assert torch.equal(embed(x), encode_term_by_term(x, [2.0 ** k for k in range(L)]))


@settings(deadline=None)
@given(C=st.integers(1, 5), L=st.integers(0, 8), shape=st.lists(st.integers(0, 4), max_size=3),
       include_input=st.booleans(), log_sampling=st.booleans(), with_gradient=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64]))
def test_vectors_of_any_size_are_encoded(C, L, shape, include_input, log_sampling, with_gradient, dtype):
    """With and without gradients, whatever `input_dims` says; that is for `out_dim`."""
    x = torch.randn(*shape, C, dtype=dtype, requires_grad=with_gradient)
    powers, evenly_spaced = [2.0 ** k for k in range(L)], torch.linspace(1, 2.0 ** (L - 1), L, dtype=dtype)
    frequencies = powers if log_sampling else evenly_spaced
    expected = encode_term_by_term(x, frequencies, include_input) if L or include_input else x[..., :0]
    for input_dims in (3, C):
        embedder = Embedder(include_input, input_dims, L - 1, L, log_sampling)
        found = embedder(x)
        assert found.dtype == dtype and torch.equal(found, expected)
        assert torch.equal(embedder.embed(x), expected)
        assert found.requires_grad == (with_gradient and expected.requires_grad)
    assert found.shape[-1] == embedder.out_dim
    if found.requires_grad:
        upstream = torch.randn_like(found)
        gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)]
        rounding = 2.0 ** L * torch.finfo(dtype).eps  # terms of up to 2^(L - 1) are summed in another order
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=16 * rounding)
        with torch.no_grad():
            assert torch.equal(embedder(x), found) and not embedder(x).requires_grad


def test_encoding_options():
    embedder = Embedder(include_input=False, input_dims=2, max_freq_log2=3, num_freqs=4, log_sampling=False,
                        periodic_fns=[torch.sin])
    x = torch.randn(5, 2)
    expected = encode_term_by_term(x, torch.linspace(1, 8, 4), False, [torch.sin])
    assert embedder.out_dim == 8 and torch.equal(embedder.embed(x), expected)


def test_spherical_harmonics_are_orthonormal():
    """By Gauss-Legendre quadrature over the sphere."""
    cosines, weights = np.polynomial.legendre.leggauss(12)
    angles = np.arange(24) * 2 * np.pi / 24
    sines = np.sqrt(1 - cosines ** 2)
    directions = np.stack([sines[:, None] * np.cos(angles), sines[:, None] * np.sin(angles),
                           np.repeat(cosines[:, None], 24, 1)], -1)
    values = SphericalHarmonics()(torch.from_numpy(directions)).reshape(-1, 16).numpy()
    areas = np.repeat(weights * 2 * np.pi / 24, 24)
    assert np.allclose((values * areas[:, None]).T @ values, np.eye(16), atol=1e-12)


def test_get_embedder_knows_three_encodings():
    x = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
    for i in (-1, 0, 2):
        embed, dim = get_embedder(4, i)
        assert embed(x).shape == (5, dim)
    with pytest.raises(ValueError, match='found encoding 99, expected 0'):
        get_embedder(4, 99)


# --- networks -----------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(D=st.integers(1, 9), W=st.integers(2, 20), skips=st.lists(st.integers(0, 10), max_size=4),
       use_viewdirs=st.booleans())
def test_any_depth_width_and_skips(D, W, skips, use_viewdirs):
    network = NeRF(D=D, W=W, input_ch=5, input_ch_views=4 if use_viewdirs else 0, output_ch=5, skips=skips,
                   use_viewdirs=use_viewdirs)
    out = network(torch.randn(2, 3, 9 if use_viewdirs else 5))
    assert out.shape == (2, 3, 4 if use_viewdirs else 5)
    out.sum().backward()
    unused = set() if use_viewdirs else {'views_linears.0.weight', 'views_linears.0.bias'}
    assert {name for name, p in network.named_parameters() if p.grad is None} == unused


def test_state_dict_keys_and_shapes():
    network = NeRF(D=8, W=256, input_ch=63, input_ch_views=27, skips=[4], use_viewdirs=True)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    layers = [f'pts_linears.{i}' for i in range(8)]
    layers += ['views_linears.0', 'feature_linear', 'alpha_linear', 'rgb_linear']
    names = [f'{layer}.{part}' for layer in layers for part in ('weight', 'bias')]
    assert list(shapes) == names  # optimizer states depend on the order
    assert shapes['pts_linears.5.weight'] == (256, 319) and shapes['views_linears.0.weight'] == (128, 283)


def test_density_does_not_depend_on_the_direction():
    network = NeRF(D=3, W=16, input_ch=3, input_ch_views=3, use_viewdirs=True)
    position = torch.randn(10, 3)
    one, other = (network(torch.cat([position, torch.randn(10, 3)], -1)) for _ in range(2))
    assert torch.equal(one[:, 3], other[:, 3]) and not torch.equal(one[:, :3], other[:, :3])


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_density_of_an_encoded_nerf_is_that_of_forward(use_viewdirs):
    network = encoded_nerf(use_viewdirs)
    points, viewdirs = points_and_directions(50, use_viewdirs)
    raw = network(points, viewdirs)
    assert raw.shape == (50, 4 if use_viewdirs else 5) and torch.equal(network.density(points), raw[:, 3])


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_an_encoded_nerf_is_a_nerf_on_encoded_inputs(use_viewdirs):
    network = encoded_nerf(use_viewdirs)
    nerf = NeRF(D=3, W=32, input_ch=27, input_ch_views=15 if use_viewdirs else 0, output_ch=5, skips=[1],
                use_viewdirs=use_viewdirs)
    assert list(network.state_dict()) == list(nerf.state_dict()), 'checkpoints and optimizer states fit both'
    nerf.load_state_dict(network.state_dict())
    points, viewdirs = points_and_directions(50, use_viewdirs)
    encoded = [network.encoding(points)] + ([network.encoding_views(viewdirs)] if use_viewdirs else [])
    assert torch.equal(network(points, viewdirs), nerf(torch.cat(encoded, -1)))


def test_a_learned_encoding_belongs_to_its_network():
    """It is trained, saved, loaded and moved with it."""
    network = encoded_nerf(encoding=LearnedEncoding())
    assert {id(p) for p in network.encoding.parameters()} <= {id(p) for p in network.parameters()}
    assert {'encoding.linear.weight', 'encoding.linear.bias'} <= network.state_dict().keys()
    points, viewdirs = points_and_directions(50)
    assert torch.equal(network.density(points), network(points, viewdirs)[:, 3])
    network(points, viewdirs).sum().backward()
    assert network.encoding.linear.weight.grad.any()
    other = encoded_nerf(encoding=LearnedEncoding())
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(points, viewdirs), network(points, viewdirs))
    assert network.to('meta').encoding.linear.weight.device.type == 'meta'


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_reset_parameters_initialises_all_layers(use_viewdirs):
    torch.manual_seed(0)
    network = encoded_nerf(use_viewdirs)
    first = [parameter.detach().clone() for parameter in network.parameters()]
    network.reset_parameters()
    assert all((parameter != old).any() for parameter, old in zip(network.parameters(), first))
    torch.manual_seed(0)
    network.reset_parameters()
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), first)), 'like a new network'


def test_reset_parameters_initialises_a_learned_encoding():
    network = encoded_nerf(encoding=LearnedEncoding())
    first = network.encoding.linear.weight.detach().clone()
    network.reset_parameters()
    assert (network.encoding.linear.weight != first).any()


def keras_forward(weights, D, skips, points, views):
    """The paper's TensorFlow model in NumPy; kernels are [in, out]."""
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    pairs = list(zip(weights[0::2], weights[1::2]))
    h = points
    for i in range(D):
        h = relu(h @ pairs[i][0] + pairs[i][1])
        if i in skips:
            h = np.concatenate([points, h], -1)
    if views is None:
        return h @ pairs[D][0] + pairs[D][1]
    feature, view, rgb, alpha = pairs[D:]
    color = relu(np.concatenate([h @ feature[0] + feature[1], views], -1) @ view[0] + view[1])
    return np.concatenate([color @ rgb[0] + rgb[1], h @ alpha[0] + alpha[1]], -1)


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_weights_from_keras(use_viewdirs):
    D, W, random = 6, 8, np.random.RandomState(0)
    sizes = [(3, W)] + [(W + 3 if i == 4 else W, W) for i in range(D - 1)]
    sizes += [(W, W), (W + 2, W // 2), (W // 2, 3), (W, 1)] if use_viewdirs else [(W, 4)]
    weights = [random.randn(*shape).astype(np.float32) for size in sizes for shape in (size, size[1:])]
    network = NeRF(D=D, W=W, input_ch=3, input_ch_views=2 if use_viewdirs else 0, skips=[4],
                   use_viewdirs=use_viewdirs)
    network.load_weights_from_keras(weights)
    points = random.randn(5, 3).astype(np.float32)
    views = random.randn(5, 2).astype(np.float32) if use_viewdirs else None
    inputs = points if views is None else np.concatenate([points, views], -1)
    expected = keras_forward(weights, D, [4], points, views)
    found = network(torch.from_numpy(inputs).to(DEVICE)).detach().cpu()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='expected'):
        network.load_weights_from_keras(weights[:-2])


# --- rays ---------------------------------------------------------------------------------------------------

def test_rays_project_to_their_pixels():
    c2w, H, W = some_pose(), 18, 34
    rays_o, rays_d = get_rays(H, W, K, c2w)
    world = rays_o + 2.5 * rays_d
    camera = (world - c2w[:, 3]) @ c2w[:, :3]  # OpenGL: looks along -z
    x = K[0, 0] * camera[..., 0] / -camera[..., 2] + K[0, 2]
    y = -K[1, 1] * camera[..., 1] / -camera[..., 2] + K[1, 2]
    rows, columns = np.mgrid[:H, :W]
    np.testing.assert_allclose(x.cpu(), columns, atol=1e-3)
    np.testing.assert_allclose(y.cpu(), rows, atol=1e-3)


def test_pixel_centers_are_half_a_pixel_further():
    c2w, moved = some_pose(), K.copy()
    moved[:2, 2] -= 0.5
    for one, other in zip(get_rays(6, 8, K, c2w, pixel_centers=True), get_rays(6, 8, moved, c2w)):
        torch.testing.assert_close(one, other)


def test_rays_of_single_pixels_equal_those_of_the_image():
    poses = torch.stack([some_pose(0), some_pose(1)])
    images = [get_rays(6, 8, K, c2w) for c2w in poses]
    view, y, x = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 3]), torch.tensor([7, 2, 0])
    rays_o, rays_d = pixel_rays(x.float(), y.float(), K, poses[view])
    for k in range(3):
        torch.testing.assert_close(rays_o[k], images[view[k]][0][y[k], x[k]])
        torch.testing.assert_close(rays_d[k], images[view[k]][1][y[k], x[k]])


def test_ndc_keeps_points_on_their_rays():
    """Projecting a point of a ray gives a point of the NDC ray, at t' = 1 - o_z / (o_z + t d_z) (Eq. 20
    ff.)."""
    H, W, focal, near = 20, 30, 25.0, 1.0
    rays_o = torch.randn(50, 3) * 0.1
    rays_d = torch.cat([torch.randn(50, 2) * 0.3, -torch.ones(50, 1)], -1)
    ndc_o, ndc_d = ndc_rays(H, W, focal, near, rays_o, rays_d)
    start = rays_o + (-(near + rays_o[:, 2:]) / rays_d[:, 2:]) * rays_d
    for t in (0.0, 0.7, 9.0):
        point = start + t * rays_d
        projected = torch.stack([-focal / (W / 2) * point[:, 0] / point[:, 2],
                                 -focal / (H / 2) * point[:, 1] / point[:, 2],
                                 1 + 2 * near / point[:, 2]], -1)
        along = 1 - start[:, 2:] / point[:, 2:]
        torch.testing.assert_close(ndc_o + along * ndc_d, projected, atol=1e-4, rtol=1e-4)


def test_ndc_of_a_ray_along_the_image_plane_is_finite():
    rays_o, rays_d = torch.zeros(1, 3), torch.tensor([[1.0, 0.5, 0.0]])
    assert all(torch.isfinite(part).all() for part in ndc_rays(20, 30, 25.0, 1.0, rays_o, rays_d))


# --- sampling -----------------------------------------------------------------------------------------------

def sample_in_a_loop(bins, weights, u):
    """The reference implementation: inverts the piecewise linear distribution function, sample by sample."""
    pdf = (weights + 1e-5) / np.sum(weights + 1e-5)
    cdf = np.concatenate([[0], np.cumsum(pdf)])
    samples = []
    for value in u:
        k = min(int(np.searchsorted(cdf, value, side='right')) - 1, len(weights) - 1)
        samples.append(bins[k] + (value - cdf[k]) / (cdf[k + 1] - cdf[k]) * (bins[k + 1] - bins[k]))
    return np.array(samples)


def test_sampling_equals_the_reference_implementation():
    random = np.random.RandomState(1)
    bins, weights = np.sort(random.rand(6, 20), -1), random.rand(6, 19) ** 4
    found = sample_pdf(torch.from_numpy(bins), torch.from_numpy(weights), 40, pytest=True)
    u = np.random.RandomState(0).rand(6, 40)
    for row in range(6):
        np.testing.assert_allclose(found[row], sample_in_a_loop(bins[row], weights[row], u[row]), atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.booleans(), st.integers(0, 10 ** 6))
def test_samples_stay_within_the_bins(M, N_samples, det, seed):
    random = Random(seed)
    bins = torch.sort(random.rand(3, M + 1) * 10 - 5, -1)[0]
    weights = random.rand(3, M) * (random.rand(3, M) > 0.5)
    samples = sample_pdf(bins, weights, N_samples, det=det)
    assert samples.shape == (3, N_samples)
    assert (samples >= bins[:, :1] - 1e-5).all() and (samples <= bins[:, -1:] + 1e-5).all()
    if det:
        assert (samples[:, 1:] >= samples[:, :-1] - 1e-5).all()


def test_samples_are_distributed_as_the_weights():
    torch.manual_seed(0)
    bins, weights = torch.tensor([[0.0, 1.0, 3.0, 4.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    samples = sample_pdf(bins, weights, 20000)
    shares = torch.histogram(samples[0].cpu(), bins[0].cpu())[0] / 20000
    torch.testing.assert_close(shares, weights[0].cpu() / 8, atol=0.02, rtol=0)


def test_fixed_random_numbers_leave_the_global_state_alone():
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    sample_pdf(torch.linspace(0, 1, 5)[None], torch.ones(1, 4), 7, pytest=True)
    assert np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])
