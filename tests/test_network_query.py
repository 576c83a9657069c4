"""Networks on many points: against nerf-pytorch's `run_network`, in chunks of any size, in each precision."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_devices import DEVICE
from tiny_grids import each_implementation  # noqa: F401
from tiny_networks import (
    LearnedEncoding,
    assert_same_gradients,
    encoded_nerf,
    hash_nerf,
    points_and_directions,
)

from accel.half_precision import HalfPrecision
from accel.network_query import NetworkQuery
from run_nerf_helpers import NeRF, RadianceField, run_network

CPU = torch.device('cpu')


def samples(N_rays, N_samples, use_viewdirs=True):
    """Points [N_rays, N_samples, 3], and unit directions [N_rays, 3] or None."""
    points, _ = points_and_directions(N_rays * N_samples)
    return points.reshape(N_rays, N_samples, 3), points_and_directions(N_rays, use_viewdirs)[1]


@pytest.mark.parametrize('backward', ['sparse', 'plain'])
@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_a_query_equals_run_network(use_viewdirs, backward):
    """With the same weights in a `NeRF` whose encodings are outside of it: the same outputs and gradients."""
    torch.manual_seed(0)
    network = encoded_nerf(use_viewdirs)
    nerf = NeRF(D=3, W=32, input_ch=27, input_ch_views=15 if use_viewdirs else 0, output_ch=5, skips=[1],
                use_viewdirs=use_viewdirs)
    nerf.load_state_dict(network.state_dict())
    points, viewdirs = samples(20, 15, use_viewdirs)
    found = NetworkQuery(70, backward=backward)(points, viewdirs, network)
    expected = run_network(points, viewdirs, nerf, network.encoding, network.encoding_views, 70)
    assert found.shape == (20, 15, 4 if use_viewdirs else 5)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for raw in (found, expected):
        (raw * upstream).sum().backward()
    assert_same_gradients([p.grad for p in network.parameters()], [p.grad for p in nerf.parameters()])


# --- chunks -------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=30)
@given(N=st.integers(0, 300), chunk=st.integers(1, 400), with_gradient=st.booleans(), hashed=st.booleans(),
       use_viewdirs=st.booleans())
def test_chunks_and_padding_change_nothing(N, chunk, with_gradient, hashed, use_viewdirs):
    torch.manual_seed(0)
    network = hash_nerf(use_viewdirs) if hashed else encoded_nerf(use_viewdirs)
    points, viewdirs = points_and_directions(N, use_viewdirs)
    with torch.set_grad_enabled(with_gradient):
        raw = NetworkQuery(chunk).at_points(points, viewdirs, network)
    assert raw.requires_grad == with_gradient
    torch.testing.assert_close(raw.detach(), network(points, viewdirs).detach())


@given(netchunk=st.none() | st.integers(1, 10 ** 7), width=st.integers(1, 4096),
       kind=st.sampled_from(['cpu', 'cuda']), gib=st.sampled_from([2, 8, 24, 141]))
def test_chunks_fit_caches_memory_and_netchunk(netchunk, width, kind, gib):
    network, device = encoded_nerf(D=1, W=2), torch.device(kind)
    network.W = width
    with pytest.MonkeyPatch.context() as patch:
        memory = SimpleNamespace(total_memory=gib * 2 ** 30)
        patch.setattr(torch.cuda, 'get_device_properties', lambda _: memory)
        chunk, preferred = (NetworkQuery(most).chunk(network, device) for most in (netchunk, None))
    assert chunk == min(netchunk or preferred, preferred)
    assert 1 <= preferred * width <= max(network.CHUNK_ACTIVATIONS[kind], network.MIN_CHUNK_POINTS * width)
    if kind == 'cuda' and width <= 256:  # ten layers' activations and gradients take a quarter of the memory
        assert 10 * 2 * 4 * preferred * width < gib * 2 ** 30 / 4


def test_chunks_of_a_hash_network_are_large():
    assert NetworkQuery().chunk(hash_nerf(), CPU) == 2 ** 18
    assert NetworkQuery(100).chunk(hash_nerf(), CPU) == 100


# --- density ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('make', [encoded_nerf, hash_nerf])
def test_density_is_that_of_raw_without_gradient(make, precision):
    torch.manual_seed(0)
    network, query = make(), NetworkQuery(64, precision)
    points, viewdirs = points_and_directions(150)
    density = query.density(points, network)
    assert density.shape == (150,) and density.dtype == torch.float32 and not density.requires_grad
    torch.testing.assert_close(density, query.at_points(points, viewdirs, network)[:, 3].detach())


# --- backward -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, backward, expected', [
    (encoded_nerf, 'auto', 'sparse'), (encoded_nerf, 'sparse', 'sparse'), (encoded_nerf, 'plain', 'plain'),
    (hash_nerf, 'auto', 'sparse' if DEVICE.type == 'cpu' else 'plain'),
    (hash_nerf, 'sparse', 'sparse'), (hash_nerf, 'plain', 'plain')])
def test_backward_is_sparse_unless_it_is_plain(make, backward, expected, monkeypatch):
    monkeypatch.setenv('NERF_PLAIN', '1')  # hash networks have kernels of their own
    raw = NetworkQuery(50, backward=backward).at_points(*points_and_directions(100), make())
    assert raw.grad_fn.name().startswith('SparseBackward') == (expected == 'sparse')


@pytest.mark.parametrize('make', [encoded_nerf, *[hash_nerf] * (DEVICE.type == 'cpu')])  # otherwise plain
def test_a_sampled_gradient_is_right_on_average(make):
    """Over many draws; of rows with a gradient, far from all count."""
    torch.manual_seed(0)
    network, (points, viewdirs) = make(), points_and_directions(200)
    upstream = torch.randn(200, 4) * 10 ** (-3 * torch.rand(200, 1))
    upstream[::4], draws = 0, 400
    exact, _ = gradient(network, points, viewdirs, upstream, 'sparse')
    found, rows = zip(*[gradient(network, points, viewdirs, upstream, 'sampled') for _ in range(draws)])
    error = torch.stack(found).mean(0) - exact
    # with the deviation of a mean of so many draws
    deviation = torch.stack(found).std(0).norm() / draws ** 0.5
    assert error.norm() < 2 * deviation and deviation < 0.1 * exact.norm()
    rows = torch.stack(rows)                                                           # [draws, 200]
    assert not rows[:, ::4].any() and 0.2 < rows.float().mean() < 0.5
    assert rows[:, upstream.abs().amax(-1) > 1].all()


def gradient(network, points, viewdirs, upstream, backward):
    """The gradient of the parameters as a vector, and at which points that of the outputs is not zero."""
    seen = []
    raw = NetworkQuery(70, backward=backward).at_points(points, viewdirs, network)
    (raw.grad_fn.next_functions[0][0] if backward == 'sampled' else raw.grad_fn).register_prehook(
        lambda grads: seen.append((grads[0] != 0).any(-1)))
    grads = torch.autograd.grad(raw, [*network.parameters()], upstream)
    return torch.cat([grad.flatten() for grad in grads]), seen[0]


@pytest.mark.parametrize('scale', [0.0, 1e-44])
def test_a_sampled_gradient_may_vanish(scale):
    network = hash_nerf()
    points, viewdirs = points_and_directions(100)
    upstream = scale * (torch.arange(100) % 3)[:, None].expand(100, 4)
    found, _ = gradient(network, points, viewdirs, upstream, 'sampled')
    assert found.abs().max() < 1e-30


def test_nan_in_a_sampled_gradient_is_passed_on():
    network = hash_nerf()
    raw = NetworkQuery(70, backward='sampled').at_points(*points_and_directions(100), network)
    upstream = torch.ones_like(raw)
    upstream[3, 1] = torch.nan
    raw.backward(upstream)
    assert network.rgb_linears[0].weight.grad.isnan().any()


def test_without_parameters_to_train_there_is_no_gradient():
    network = encoded_nerf().requires_grad_(False)
    assert not NetworkQuery(50).at_points(*points_and_directions(100), network).requires_grad


@pytest.mark.parametrize('backward', ['sparse', 'plain'])
def test_a_learned_encoding_is_trained(backward):
    torch.manual_seed(0)
    network = encoded_nerf(encoding=LearnedEncoding())
    before = network.encoding.linear.weight.detach().clone()
    optimizer = torch.optim.Adam(network.parameters())
    NetworkQuery(50, backward=backward).at_points(*points_and_directions(100), network).sum().backward()
    optimizer.step()
    assert (network.encoding.linear.weight != before).all()


def test_a_network_with_parameters_of_its_own_must_say_how_to_reset_them():
    network = RadianceField()
    network.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(NotImplementedError, match='RadianceField has parameters of its own'):
        network.reset_parameters()


# --- precision ----------------------------------------------------------------------------------------------

def test_bf16_is_for_products_of_hidden_layers_only():
    """Outputs and gradients are float32, near those of float32 products; so is the encoding."""
    torch.manual_seed(0)
    network, encodings = encoded_nerf(W=64), []
    points, viewdirs = samples(60, 20)
    network.encoding.register_forward_hook(lambda _, inputs, output: encodings.append(output.dtype))
    found = []
    for precision in ('fp32', 'bf16'):
        network.zero_grad()
        raw = NetworkQuery(700, precision, 'sparse')(points, viewdirs, network)
        raw.square().mean().backward()
        found.append((raw.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])))
    (raw, grad), (raw_bf16, grad_bf16) = found
    assert raw_bf16.dtype == grad_bf16.dtype == torch.float32 and set(encodings) == {torch.float32}
    assert not torch.equal(raw, raw_bf16)
    assert (raw - raw_bf16).norm() < 0.02 * raw.norm()
    assert (grad - grad_bf16).norm() < 0.05 * grad.norm()


@pytest.mark.usefixtures('each_implementation')
@pytest.mark.parametrize('use_viewdirs, encoding', [(True, None), (False, None), (True, LearnedEncoding())])
def test_padded_sizes_change_nothing(use_viewdirs, encoding):
    """Encodings and weights padded with zeros, as on a GPU."""
    torch.manual_seed(0)
    network, found = encoded_nerf(use_viewdirs, encoding, W=40), []
    inputs, upstream = points_and_directions(100, use_viewdirs), None
    for multiple in (1, 8):
        evaluate = HalfPrecision(type(network).__call__, network, multiple)
        with torch.no_grad():
            rendered = evaluate(*inputs)
        raw = evaluate(*inputs)
        assert torch.equal(raw, rendered)
        assert all(weight.shape[1] % multiple == 0 for weight in evaluate.weights[::2])
        upstream = torch.randn_like(raw) if upstream is None else upstream
        network.zero_grad()
        raw.backward(upstream)
        found.append((raw.detach(), [p.grad for p in network.parameters()]))
    (raw, grads), (padded_raw, padded_grads) = found
    torch.testing.assert_close(padded_raw, raw, rtol=0.02, atol=0.002)
    assert_same_gradients(padded_grads, grads, tolerance=0.01)


@pytest.mark.parametrize('multiple', [1, 8])
def test_a_network_in_half_precision_may_change(multiple):
    """Its layers, encodings and parameters; and an evaluation leaves it as it was, also one that fails."""
    torch.manual_seed(0)
    network, other = encoded_nerf(), encoded_nerf(encoding=LearnedEncoding())
    inputs = points_and_directions(50)

    def evaluate():
        with torch.no_grad():
            return HalfPrecision(type(network).__call__, network, multiple)(*inputs)
    evaluate()
    before = vars(network).keys(), [vars(layer).keys() for layer in network.half_layers()]
    for name in ('encoding', 'input_ch', 'pts_linears'):
        setattr(network, name, getattr(other, name))
    network.load_state_dict(other.state_dict(), assign=True)
    found = evaluate()
    assert before == (vars(network).keys(), [vars(layer).keys() for layer in network.half_layers()])
    network = other
    assert torch.equal(found, evaluate())
    with pytest.raises(RuntimeError):
        HalfPrecision(type(network).__call__, network, multiple)(inputs[0][:, :2], inputs[1])
    assert torch.equal(found, evaluate())


@pytest.mark.parametrize('make', [encoded_nerf, hash_nerf])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_training_and_rendering_compute_the_same(make, precision):
    torch.manual_seed(0)
    network, inputs = make(), points_and_directions(300)
    sparse, plain = (NetworkQuery(64, precision, backward).at_points(*inputs, network).detach()
                     for backward in ('sparse', 'plain'))
    with torch.no_grad():
        rendered = NetworkQuery(64, precision).at_points(*inputs, network)
    assert rendered.dtype == torch.float32
    assert torch.equal(sparse, rendered)
    if make is encoded_nerf:
        assert torch.equal(plain, rendered)
    else:  # the others may be computed by kernels
        tolerance = {'fp32': 1e-5, 'bf16': 5e-3}[precision]
        torch.testing.assert_close(plain, rendered, rtol=tolerance, atol=tolerance)
