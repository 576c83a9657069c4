"""Volume rendering of packed samples: the compiled kernel against its reference implementation, both against
`raw2outputs`."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_devices import Random
from tiny_grids import each_implementation, each_kernel, implementation  # noqa: F401

from accel.packed import (
    MAX_OPTICAL_DEPTH,
    MIN_TRANSMITTANCE,
    PackedSamples,
    composite,
    composite_dense,
    composite_onto,
)
from run_nerf import LAST_INTERVAL, raw2outputs

both_implementations = pytest.mark.usefixtures('each_implementation')


def random_samples(N, seed, density=30.0, most=40):
    """raw, t, ray_indices, step_sizes and offsets of N rays, some of which have no samples."""
    random = Random(seed)
    counts = random.randint(0, most, (N,)) * (random.rand(N) > 0.3)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    M = int(offsets[-1])
    raw = random.randn(M, 4) * torch.tensor([1, 1, 1, density])
    t = random.rand(M) + torch.arange(M)
    step_sizes = 0.01 + 0.02 * random.rand(N)
    return raw, t, torch.arange(N).repeat_interleave(counts), step_sizes, offsets


def one_ray(raw, length):
    """The arguments of `composite` for a single ray with samples at t = 0, 1, 2, …"""
    M = len(raw)
    ray_indices, offsets = torch.zeros(M, dtype=torch.long), torch.tensor([0, M])
    return raw, torch.arange(float(M)), ray_indices, torch.tensor([length]), offsets


def outputs_and_gradient(function, raw, samples, loss):
    """out and weights of `composite`, and the gradient of `loss` of both."""
    leaf = raw.clone().requires_grad_()
    out, weights = function(leaf, *samples)
    return out.detach(), weights.detach(), torch.autograd.grad(loss(out, weights), leaf)[0]


# The loss that a test differentiates: on the maps, on the weights of the samples, or on both.
LOSSES = st.sampled_from(['maps', 'weights', 'both'])


def random_loss(kind, seed):
    def loss(out, weights):
        random = Random(seed)
        on_out, on_weights = (random.randn(value.shape) for value in (out, weights))
        of_maps, of_weights = (out * on_out).sum(), (weights * on_weights).sum() + (weights ** 2).sum()
        return {'maps': of_maps, 'weights': of_weights, 'both': of_maps + of_weights}[kind]
    return loss


@each_kernel
@given(N=st.integers(0, 50), seed=st.integers(0, 999), density=st.sampled_from([1.0, 30.0, 1000.0]),
       kind=LOSSES)
@settings(max_examples=60, deadline=None)
def test_composite_equals_the_reference_implementation(kernels, N, seed, density, kind):
    """Outputs and gradients; at the highest density most samples are behind MAX_OPTICAL_DEPTH."""
    raw, *samples = random_samples(N, seed, density)
    loss = random_loss(kind, seed)
    with implementation(kernels):
        out, weights, grad = outputs_and_gradient(composite, raw, samples, loss)
    with implementation('reference'):
        expected_out, expected_weights, expected_grad = outputs_and_gradient(composite, raw, samples, loss)
    per_unit = torch.ones(5)  # a depth is as exact as the largest t
    per_unit[4] = 1 / max(1.0, samples[0].amax().item() if len(raw) else 1.0)
    torch.testing.assert_close(out * per_unit, expected_out * per_unit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5)
    scale = expected_grad.abs().amax().item() if len(raw) else 1.0
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5 * scale)


@both_implementations
def test_the_gradient_in_front_of_an_extremely_dense_sample():
    """That of the first sample depends on its transmittance and on what is behind it, however dense that
    is."""
    raw, *samples = one_ray(torch.tensor([[1.0, 0, 0, 3], [-1, 0, 0, 1e8]]), 0.1)
    *_, grad = outputs_and_gradient(composite, raw, samples, lambda out, weights: out[:, 0].sum())
    after = math.exp(-0.3)
    expected = 0.1 * after * (torch.sigmoid(torch.tensor(1.0)) - torch.sigmoid(torch.tensor(-1.0)))
    torch.testing.assert_close(grad[0, 3], expected, rtol=1e-4, atol=0)


@each_kernel
@pytest.mark.parametrize('kind', ['maps', 'weights', 'both'])
@pytest.mark.parametrize('channel', [0, 3])
def test_nan_is_found_in_outputs_and_gradients(kernels, kind, channel):
    """In the last ray, because it spreads to the rays behind it in the reference implementation."""
    clean, *samples = random_samples(8, seed=1)
    offsets, loss = samples[-1], random_loss(kind, 1)
    last = int((offsets.diff() > 2).nonzero()[-1])
    first = int(offsets[last])
    clean[first, 3] = 1.0
    raw = clean.clone()
    raw[first + 1, channel] = math.nan
    with implementation(kernels):
        out, weights, grad = outputs_and_gradient(composite, raw, samples, loss)
        *_, clean_grad = outputs_and_gradient(composite, clean, samples, loss)
    with implementation('reference'):
        expected_out, expected_weights, expected_grad = outputs_and_gradient(composite, raw, samples, loss)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert out[last].isnan().any() and torch.isfinite(out[:last]).all()
    if channel == 3 or kind != 'weights':  # colours do not affect the weights
        assert grad[first:].isnan().any() and expected_grad.isnan().any()
    torch.testing.assert_close(grad[:first], clean_grad[:first])


@both_implementations
def test_composite_equals_raw2outputs():
    """With equal steps, and a transparent sample at the end, whose interval is infinite in `raw2outputs`."""
    raw = torch.randn(20, 16, 4)
    raw[:, -1, 3] = -1
    z_vals = (0.1 * torch.arange(16.0)).expand(20, 16)
    rays_d = torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)
    rgb, _, acc, expected_weights, depth = raw2outputs(raw, z_vals, rays_d)
    ray_indices, offsets = torch.arange(20).repeat_interleave(16), torch.arange(0, 321, 16)
    samples = z_vals.reshape(-1).contiguous(), ray_indices, torch.full([20], 0.1), offsets
    out, weights = composite(raw.reshape(-1, 4), *samples)
    torch.testing.assert_close(out, torch.cat([rgb, acc[:, None], depth[:, None]], -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.reshape(20, 16), expected_weights, rtol=1e-5, atol=1e-5)


@both_implementations
def test_the_weights_of_a_ray_sum_to_its_opacity():
    raw, t, ray_indices, step_sizes, offsets = random_samples(50, seed=3)
    out, weights = composite(raw, t, ray_indices, step_sizes, offsets)
    assert weights.shape == t.shape and (weights >= 0).all()
    torch.testing.assert_close(torch.zeros(50).index_add(0, ray_indices, weights), out[:, 3])
    torch.testing.assert_close(torch.zeros(50).index_add(0, ray_indices, weights * t), out[:, 4])


@both_implementations
@pytest.mark.parametrize('kind', ['maps', 'weights', 'both'])
def test_gradients_equal_finite_differences(kind):
    """With a loss on the weights, colours have no gradient."""
    torch.manual_seed(0)
    raw, samples = torch.randn(6, 4) + torch.tensor([0, 0, 0, 1.0]), one_ray(torch.empty(6, 4), 0.3)[1:]
    loss = random_loss(kind, 5)
    *_, grad = outputs_and_gradient(composite, raw, samples, loss)
    for place in range(raw.numel()):
        step = torch.zeros_like(raw).view(-1)
        step[place] = 1e-2
        up, down = (loss(*composite(raw + sign * step.view_as(raw), *samples)) for sign in (1, -1))
        crosses_relu = place % 4 == 3 and raw.view(-1)[place].abs() < 1e-2
        assert crosses_relu or abs((up - down).item() / 2e-2 - grad.view(-1)[place].item()) < 2e-3
    assert kind != 'weights' or not grad[:, :3].any()


@both_implementations
@pytest.mark.parametrize('kind', ['maps', 'weights', 'both'])
def test_nothing_counts_behind_what_is_opaque(kind):
    raw, *samples = one_ray(torch.full([5, 4], 3.0), 2.0)
    leaf = raw.clone().requires_grad_()
    out, weights = composite(leaf, *samples)
    grad = torch.autograd.grad({'maps': out.sum(), 'weights': (weights * torch.arange(1.0, 6)).sum(),
                                'both': out.sum() + weights.sum()}[kind], leaf)[0]
    visible = math.ceil(-math.log(MIN_TRANSMITTANCE) / 6)
    assert (grad[:visible].abs().sum(-1) > 0).all() and (grad[visible:] == 0).all()
    assert (weights[:visible] > 0).all() and (weights[visible:] == 0).all()


@both_implementations
def test_without_gradients_weights_are_returned_too():
    raw, *samples = random_samples(10, seed=0)
    with torch.no_grad():
        out, weights = composite(raw, *samples)
    assert not out.requires_grad and not weights.requires_grad and weights.any()


# --- in parts -----------------------------------------------------------------------------------------------

@both_implementations
def test_compositing_in_parts_equals_the_whole():
    raw, t, ray_indices, step_sizes, offsets = one_ray(torch.randn(8, 4), 0.3)
    whole, _ = composite(raw, t, ray_indices, step_sizes, offsets)
    out, optical_depth = torch.zeros(1, 5), torch.zeros(1)
    for part in (slice(0, 3), slice(3, 8)):
        ends = torch.tensor([0, part.stop - part.start])
        composite_onto(raw[part], t[part], step_sizes, ends, optical_depth, out)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optical_depth, (raw[:, 3].relu() * 0.3).sum()[None])


@both_implementations
def test_further_samples_of_an_opaque_ray_change_nothing():
    raw, t, _, step_sizes, offsets = one_ray(torch.full([4, 4], 3.0), 1.0)
    out = torch.rand(1, 5)
    before = out.clone()
    composite_onto(raw, t, step_sizes, offsets, torch.tensor([MAX_OPTICAL_DEPTH + 0.01]), out)
    assert torch.equal(out, before)


@both_implementations
def test_compositing_some_of_the_rays():
    raw, t, _, step_sizes, offsets = random_samples(9, seed=3)
    alive, out, optical_depth = torch.arange(0, 18, 2), torch.zeros(18, 5), torch.zeros(18)
    expected_out, expected_depth = torch.zeros(9, 5), torch.zeros(9)
    composite_onto(raw, t, step_sizes, offsets, expected_depth, expected_out)
    composite_onto(raw, t, step_sizes.repeat_interleave(2), offsets, optical_depth, out, alive)
    torch.testing.assert_close(out[::2], expected_out)
    torch.testing.assert_close(optical_depth[::2], expected_depth)
    assert expected_out.any() and not out[1::2].any() and not optical_depth[1::2].any()


# --- the same number of samples along each ray --------------------------------------------------------------

@each_kernel
@given(N=st.integers(0, 20), S=st.integers(1, 30), seed=st.integers(0, 999),
       density=st.sampled_from([1.0, 100.0, 1e6, 1e30]), channels=st.sampled_from([4, 5]), kind=LOSSES)
@settings(max_examples=40, deadline=None)
def test_composite_dense_equals_raw2outputs(kernels, N, S, seed, density, channels, kind):
    random = Random(seed)
    raw = random.randn(N, S, channels)
    raw[..., 3] *= density ** random.rand(N, S)
    z_vals = random.rand(N, S).sort(-1).values
    rays_d, loss, results = random.randn(N, 3), random_loss(kind, seed), []

    def dense(raw):
        with implementation(kernels):
            rgb_map, acc_map, depth_map, weights = composite_dense(raw, z_vals, rays_d, LAST_INTERVAL)
        return torch.cat([rgb_map, acc_map[:, None], depth_map[:, None]], -1), weights

    def reference(raw):
        rgb_map, _, acc_map, weights, depth_map = raw2outputs(raw, z_vals, rays_d)
        return torch.cat([rgb_map, acc_map[:, None], depth_map[:, None]], -1), weights
    for function in (dense, reference):
        with implementation(kernels):  # also of the backward pass
            results.append(outputs_and_gradient(function, raw, (), loss))
    for found, expected in zip(*results):
        scale = expected.abs().amax().item() if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


# --- packed samples -----------------------------------------------------------------------------------------

def packed_samples(N, seed):
    raw, t, ray_indices, dt, _ = random_samples(N, seed)
    return PackedSamples(raw[:, 0].requires_grad_(), t, dt, ray_indices)


def test_joined_samples_keep_their_rays():
    parts = [packed_samples(5, 0), packed_samples(0, 1), packed_samples(7, 2)]
    whole = PackedSamples.cat(parts)
    assert whole.num_rays == 12
    for name in ('weights', 't_starts', 't_ends'):
        assert getattr(whole, name).equal(torch.cat([getattr(part, name) for part in parts]))
    first = len(parts[0].ray_indices)
    assert whole.ray_indices[:first].equal(parts[0].ray_indices)
    assert whole.ray_indices[first:].equal(parts[2].ray_indices + 5)
    whole.weights.sum().backward()
    assert all(part.weights.grad.equal(torch.ones_like(part.weights)) for part in parts)


def test_joining_one_part_changes_nothing():
    part = packed_samples(5, 0)
    whole = PackedSamples.cat([part])
    assert whole.num_rays == 5 and all(torch.equal(*pair) for pair in zip(whole[:4], part[:4]))
