"""The hash encoding: compiled kernel against plain twin, plain twin against loops."""
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.compiled import compiled
from accel.hash_grid import FEATURES, PRIMES, HashGrid, encode
from run_nerf_helpers import spherical_harmonics

needs_compiler = pytest.mark.skipif(compiled('hash_grid') is None, reason='no C compiler')


def grid(seed=0, **options):
    """A grid with entries that are told apart."""
    torch.manual_seed(seed)
    made = HashGrid(**{'n_levels': 5, 'finest_res': 200, 'log2_hashmap_size': 12, 'n_features': 2, **options})
    torch.nn.init.normal_(made.table)
    return made


@needs_compiler
@given(n_levels=st.integers(1, 9), finest_res=st.integers(16, 3000), log2_hashmap_size=st.integers(4, 16),
       n_features=st.sampled_from(FEATURES), N=st.integers(0, 5000), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_kernel_is_its_twin(N, seed, **options):
    made = grid(seed, **options)
    points = torch.rand(N, 3) * 2.4 - 1.2  # some outside
    points[N // 2:N // 2 + 1, 1] = float('nan')
    found = made(points)
    upstream = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, made.table, upstream)
    expected = encode((points + 1) / 2, made.table, made.resolution, made.offset)
    (expected_grad,) = torch.autograd.grad(expected, made.table, upstream)
    assert found.shape == expected.shape == (N, made.out_dim)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


def by_loops(point, made):
    """One point's encoding as the paper says it, in Python's integers."""
    out = []
    for level, resolution in enumerate(made.resolution.tolist()):
        start, end = made.offset[level].item(), made.offset[level + 1].item()
        x = [min(max(float(c), 0.0), 1.0) * resolution for c in point]
        cell = [min(int(c), resolution - 1) for c in x]
        total = np.zeros(made.table.shape[1])
        for up in itertools.product((0, 1), repeat=3):
            corner = [c + u for c, u in zip(cell, up)]
            weight = np.prod([c - i if u else 1 - (c - i) for c, i, u in zip(x, cell, up)])
            if (resolution + 1) ** 3 <= end - start:
                entry = (corner[2] * (resolution + 1) + corner[1]) * (resolution + 1) + corner[0]
            else:
                entry = (corner[0] * PRIMES[0] ^ corner[1] * PRIMES[1] ^ corner[2] * PRIMES[2]) % (end - start)
            total += weight * made.table[start + entry].detach().numpy()
        out.append(total)
    return np.concatenate(out)


def test_the_twin_is_what_the_paper_says():
    made = grid()
    assert made.offset[1] == 17 ** 3 or made.offset[1] == 2 ** 12, 'a coarse level is dense, or as large as the table'
    points = torch.rand(20, 3, dtype=torch.float64)
    found = encode(points, made.table.double(), made.resolution, made.offset).detach()
    expected = np.stack([by_loops(point, made) for point in points])
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_coarsest_and_finest_level():
    made = HashGrid(n_levels=16, finest_res=2048, log2_hashmap_size=19)
    assert made.resolution[0] == 16 and made.resolution[-1] == 2048 and made.out_dim == 32
    assert made.offset[1] == 17 ** 3 and made.offset[-1] - made.offset[-2] == 2 ** 19
    assert made.table.abs().max() <= 1e-4


def test_it_interpolates():
    """At a corner of the dense level the encoding is its entry, and between two corners it goes straight."""
    made = grid(n_levels=1, finest_res=16, log2_hashmap_size=13)
    made.aabb.copy_(torch.tensor([[0.0, 0, 0], [16, 16, 16]]))
    corner = made(torch.tensor([[3.0, 5, 7], [4, 5, 7], [3.25, 5, 7]]))
    assert torch.allclose(corner[0], made.table[(7 * 17 + 5) * 17 + 3])
    assert torch.allclose(corner[2], 0.75 * corner[0] + 0.25 * corner[1], atol=1e-6)


def test_gradients_of_the_points_go_through_the_twin():
    made = grid(n_levels=2, finest_res=32)
    points = torch.rand(9, 3, requires_grad=True)
    made(points).sum().backward()
    assert torch.isfinite(points.grad).all() and points.grad.any()


def test_without_a_compiler_the_twin_does_the_work():
    script = ('import torch; from accel.hash_grid import HashGrid; from accel.compiled import compiled; '
              'made = HashGrid(4, 64, 10, 2); print(compiled("hash_grid") is None, made(torch.rand(3, 3)).shape)')
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={'PATH': '', 'XDG_CACHE_HOME': '/nonexistent', 'TMPDIR': '/nonexistent', 'CC': 'nothing'})
    assert done.returncode == 0 and done.stdout.startswith('True torch.Size([3, 8])'), done.stderr


def test_spherical_harmonics_are_orthonormal():
    """Their products, integrated over the sphere by Gauss-Legendre quadrature, are 1 for equal ones and 0 for others."""
    cosines, weights = np.polynomial.legendre.leggauss(12)
    angles = np.arange(24) * 2 * np.pi / 24
    sines = np.sqrt(1 - cosines ** 2)
    directions = np.stack([sines[:, None] * np.cos(angles), sines[:, None] * np.sin(angles),
                           np.repeat(cosines[:, None], 24, 1)], -1)
    values = spherical_harmonics(torch.from_numpy(directions)).reshape(-1, 16).numpy()
    areas = np.repeat(weights * 2 * np.pi / 24, 24)
    assert np.allclose((values * areas[:, None]).T @ values, np.eye(16), atol=1e-12)
