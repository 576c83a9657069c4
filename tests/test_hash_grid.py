"""The hash encoding: the compiled kernel against its reference implementation, that against loops."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_grids import each_kernel, implementation

from accel.hash_grid import (
    BASE_RESOLUTION,
    PRIMES,
    SUPPORTED_N_FEATURES,
    HashGrid,
    encode,
    encode_directions,
    expand,
)
from accel.hash_grid import contract as contracted
from run_nerf_helpers import SphericalHarmonics


def random_grid(seed=0, **options):
    """A grid whose entries are all different."""
    torch.manual_seed(seed)
    grid = HashGrid(**{'n_levels': 5, 'finest_res': 200, 'log2_hashmap_size': 12, 'n_features': 2, **options})
    torch.nn.init.normal_(grid.table)
    return grid


@each_kernel
@given(n_levels=st.integers(1, 9), finest_res=st.integers(16, 3000), log2_hashmap_size=st.integers(4, 16),
       n_features=st.sampled_from(SUPPORTED_N_FEATURES), contract=st.booleans(), N=st.integers(0, 5000),
       seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_kernel_equals_the_reference_implementation(kernels, N, seed, **options):
    grid = random_grid(seed, **options)
    points = torch.rand(N, 3) * 2.4 - 1.2  # some outside
    points[:N // 4] *= torch.rand(N // 4, 1) * 1000
    points[N // 2:N // 2 + 1, 1] = float('nan')
    points = torch.cat([points, torch.rand(N, 2)], -1)[:, :3]  # rows that are apart
    with implementation(kernels):
        found = grid(points)
        upstream = torch.randn_like(found)
        upstream[::3] = 0
        (grad,) = torch.autograd.grad(found, grid.table, upstream)
    expected = encode(points, grid.aabb, grid.contract, grid.table, grid.resolutions, grid.level_offsets)
    (expected_grad,) = torch.autograd.grad(expected, grid.table, upstream)
    assert found.shape == expected.shape == (N, grid.out_dim)
    # the contraction rounds a position by about 1e-7 of the side; entries differ by about 1 a cell
    tolerance = 1e-6 * options['finest_res'] if options['contract'] else 1e-5
    assert torch.allclose(found, expected, atol=tolerance, rtol=1e-5)
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


@each_kernel
def test_the_kernel_of_spherical_harmonics_equals_the_reference_implementation(kernels):
    harmonics = SphericalHarmonics()
    directions = torch.nn.functional.normalize(torch.randn(99, 6)[:, 2:5], dim=-1)
    with implementation(kernels):
        found = encode_directions(harmonics, directions)
    torch.testing.assert_close(found, harmonics(directions), rtol=1e-6, atol=1e-6)
    leaf = directions.clone().requires_grad_()
    assert encode_directions(harmonics, leaf).requires_grad


def encode_in_loops(point, grid):
    """The encoding of one point as in the paper, with Python's integers."""
    out = []
    for level, resolution in enumerate(grid.resolutions.tolist()):
        start, end = grid.level_offsets[level].item(), grid.level_offsets[level + 1].item()
        x = [min(max(float(c), 0.0), 1.0) * resolution for c in point]
        cell = [min(int(c), resolution - 1) for c in x]
        total = np.zeros(grid.table.shape[1])
        for up in itertools.product((0, 1), repeat=3):
            corner = [c + u for c, u in zip(cell, up)]
            weight = np.prod([c - i if u else 1 - (c - i) for c, i, u in zip(x, cell, up)])
            if (resolution + 1) ** 3 <= end - start:
                entry = (corner[2] * (resolution + 1) + corner[1]) * (resolution + 1) + corner[0]
            else:
                mixed = corner[0] * PRIMES[0] ^ corner[1] * PRIMES[1] ^ corner[2] * PRIMES[2]
                entry = mixed % (end - start)
            total += weight * grid.table[start + entry].detach().cpu().numpy()
        out.append(total)
    return np.concatenate(out)


def test_the_reference_implementation_equals_loops():
    grid = random_grid(log2_hashmap_size=13)
    sizes, dense = grid.level_offsets.diff(), (grid.resolutions + 1) ** 3
    assert sizes[0] == dense[0] and sizes[-1] < dense[-1], 'some levels are dense, others are hashed'
    points = torch.rand(20, 3, dtype=torch.float64)
    found = encode(2 * points - 1, grid.aabb, False, grid.table.double(), grid.resolutions,
                   grid.level_offsets).detach()
    expected = np.stack([encode_in_loops(point, grid) for point in points])
    assert np.allclose(found.cpu().numpy(), expected, atol=1e-6)


def test_coarsest_and_finest_level():
    grid = HashGrid(n_levels=16, finest_res=2048, log2_hashmap_size=19)
    assert grid.resolutions[0] == 16 and grid.resolutions[-1] == 2048 and grid.out_dim == 32
    assert grid.level_offsets[1] == 17 ** 3 and grid.level_offsets[-1] - grid.level_offsets[-2] == 2 ** 19
    assert grid.table.abs().max() <= 1e-4


def test_encoding_interpolates_between_corners():
    """At a corner of a dense level the encoding is its entry; between two corners it is linear."""
    grid = random_grid(n_levels=1, finest_res=16, log2_hashmap_size=13)
    grid.set_aabb([[0.0, 0, 0], [16, 16, 16]])
    corner = grid(torch.tensor([[3.0, 5, 7], [4, 5, 7], [3.25, 5, 7]]))
    assert torch.allclose(corner[0], grid.table[(7 * 17 + 5) * 17 + 3])
    assert torch.allclose(corner[2], 0.75 * corner[0] + 0.25 * corner[1], atol=1e-6)


@each_kernel
@pytest.mark.parametrize('contract', [False, True])
@pytest.mark.parametrize('n_features', SUPPORTED_N_FEATURES)
def test_the_gradient_of_points(kernels, contract, n_features):
    """Against the reference implementation in float64, away from the faces of cells, where it jumps."""
    grid, points = random_grid(n_features=n_features, contract=contract), torch.rand(999, 6) * 2.4 - 1.2
    points[::4] *= 100
    points = points[:, 1:4].requires_grad_()  # rows that are apart
    upstream = torch.randn(999, grid.out_dim)
    upstream[::3] = 0
    with implementation(kernels):
        found, by_table = torch.autograd.grad(grid(points), [points, grid.table], upstream)
    precise = points.detach().double().requires_grad_()
    expected, expected_by_table = torch.autograd.grad(
        encode(precise, grid.aabb.double(), contract, grid.table.double(), grid.resolutions,
               grid.level_offsets), [precise, grid.table], upstream.double())
    torch.testing.assert_close(by_table, expected_by_table, rtol=1e-4, atol=1e-4)
    unit = 0.25 * contracted(precise.detach()) + 0.5 if contract else 0.5 * precise.detach() + 0.5
    scaled = unit[:, None] * grid.resolutions[:, None]                                 # [N, L, 3]
    smooth = ((scaled - scaled.round()).abs() > 1e-3).flatten(1).all(-1)
    assert smooth.sum() > 900
    inside = (unit > 0) & (unit < 1)
    assert inside[smooth].any() and (contract or not found[~inside].any())
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).mean()
    assert error[smooth].max() < 1e-3


def test_only_gradients_that_are_needed_are_computed():
    grid, points = random_grid(n_levels=2, finest_res=32), torch.rand(9, 3, requires_grad=True)
    grid.requires_grad_(False)
    grid(points).sum().backward()
    assert torch.isfinite(points.grad).all() and points.grad.any() and grid.table.grad is None


@each_kernel
def test_axes_of_equal_distance_share_the_gradient(kernels):
    grid = random_grid(contract=True)
    points = torch.tensor([[3.0, 3, 0.5], [3, -3, 3], [-2, 2, 0]], requires_grad=True)
    with implementation(kernels):
        (found,) = torch.autograd.grad(grid(points).sum(), points)
    with implementation('reference'):
        (expected,) = torch.autograd.grad(grid(points).sum(), points)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_points_outside_of_the_box_are_clamped_to_it():
    grid = random_grid()
    grid.set_aabb([[0.0, 0, 0], [2, 2, 2]])
    found = grid(torch.tensor([[-5.0, 1, 1], [0, 1, 1], [2, 2, 2], [3, 9, 2.5]]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_a_gradient_whose_rows_overlap():
    """That of a sum is one number, expanded. The kernel gets a copy, which must live until it is done."""
    grid, points = random_grid(n_levels=2, finest_res=32), torch.rand(2 ** 19, 3)  # the copy: 8 MB
    grid(points).sum().backward()
    assert float(grid.table.grad.sum()) == pytest.approx(2 * 2 * len(points), rel=1e-3)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3))
def test_contraction_inverts(point):
    points = torch.tensor([point], dtype=torch.float64)
    inner, norm = contracted(points), float(points.abs().max())
    assert float(inner.abs().max()) == pytest.approx(norm if norm <= 1 else 2 - 1 / norm)
    expanded, expanded_norm = expand(inner, farthest=1e4)
    torch.testing.assert_close(expanded, points, rtol=1e-9, atol=1e-12)
    assert expanded_norm.item() == pytest.approx(max(norm, 1))
    assert expand(2 * torch.eye(3), farthest=50)[0].equal(50 * torch.eye(3))


def test_a_contracted_grid_covers_all_space():
    """Inside the box it is a grid of twice the size; infinity is its surface."""
    contracted, plain = random_grid(contract=True), random_grid()
    contracted.set_aabb([[1.0, 1, 1], [3, 3, 3]])
    plain.set_aabb([[0.0, 0, 0], [4, 4, 4]])
    points = 1 + 2 * torch.rand(50, 3)
    torch.testing.assert_close(contracted(points), plain(points), rtol=1e-4, atol=1e-4)
    far = torch.tensor([[2.0, 2, 2 + 1e9], [2, 2, 4.0]])
    torch.testing.assert_close(contracted(far)[0], plain(far)[1], rtol=1e-4, atol=1e-4)


def test_any_number_of_axes():
    grid, points = random_grid(), torch.rand(2, 3, 4, 3)
    assert torch.equal(grid(points).reshape(-1, grid.out_dim), grid(points.reshape(-1, 3)))


def test_reset_parameters_initialises_the_table_but_not_the_box():
    grid = random_grid()
    grid.set_aabb([[0.0, 0, 0], [2, 2, 2]])
    grid.reset_parameters()
    assert 0 < grid.table.abs().max() <= 1e-4 and grid.aabb[1].tolist() == [2, 2, 2]
    assert grid.state_dict().keys() == {'table', 'aabb'} and grid.resolutions[0] == BASE_RESOLUTION
