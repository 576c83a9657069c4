"""Small occupancy grids and rays through them, for tests of each implementation of the kernels."""
import contextlib
import functools
import shutil

import pytest
import torch
from tiny_devices import DEVICE, Random, on_cpu_only

from accel import hash_grid, occupancy, packed, positional
from accel.kernels.compiled import read_source
from accel.kernels.cuda import CudaLibrary
from accel.occupancy import OccupancyGrid
from benchmarks import cuda_on_cpu

CPU = torch.device('cpu')
ALL_KERNELS = hash_grid.KERNELS, occupancy.KERNELS, packed.KERNELS, positional.KERNELS
# Implementations of the kernels for tensors on DEVICE: by the C compiler; the CUDA text, on a CPU.
NO_C_COMPILER = pytest.mark.skipif(not occupancy.KERNELS.usable(CPU), reason='no C compiler')
COMPILED = [pytest.param('c', marks=[NO_C_COMPILER, on_cpu_only('compiled for CPUs')]),
            pytest.param('cuda', marks=pytest.mark.skipif(shutil.which('g++') is None, reason='no g++'))]
each_kernel = pytest.mark.parametrize('kernels', COMPILED)


@functools.cache
def cuda_library(name):
    return CudaLibrary(read_source(name), DEVICE)


@contextlib.contextmanager
def implementation(kernels):
    """Run the kernels of tensors on DEVICE as 'c' or 'cuda', see above, or their 'reference'
    implementations."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels == 'reference':
            patch.setenv('NERF_PLAIN', '1')
        if kernels == 'cuda':
            cuda_on_cpu.install(patch.setattr)
            for part in ALL_KERNELS:
                patch.setattr(part, 'libraries', {DEVICE: cuda_library(part.name)})
        yield


@pytest.fixture(params=[*COMPILED, 'reference'])
def each_implementation(request):
    """Runs a test with each implementation."""
    with implementation(request.param):
        yield request.param


def occupied_grid(share, resolution=20, seed=0):
    """A grid with `share` of its cells occupied, in clusters."""
    grid = OccupancyGrid(resolution)
    grid.set_aabb([[-1.0, -2, 0], [1.5, 1, 1]])
    noise = Random(seed).rand([1, 1] + [resolution] * 3)
    noise = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0]
    grid.set_occupied(noise < torch.quantile(noise.cpu(), share) if share < 1 else torch.ones_like(noise))
    return grid


def rays_around(N, seed=0):
    """Rays from around and within the box of `occupied_grid`; some are parallel to an axis, some miss the
    box."""
    random = Random(seed)
    rays_o = 4 * random.rand(N, 3) - 2
    rays_d = random.rand(N, 3) - 0.5 - 0.3 * rays_o
    rays_d[::7, 0] = 0
    rays_d[::11, 1:] = 0
    rays_d[::11, 0] = 1
    return rays_o, rays_d


def march(grid, rays_o, rays_d, step=0.03, near=0.1, far=6.0, **options):
    """Spacing and number of candidates of each ray, and what `grid.march` returns for them."""
    rays = bounded_rays(rays_o, rays_d, near, far)
    spacing, num_candidates = grid.candidates(rays, step, torch.full([len(rays)], 0.5))
    return spacing, num_candidates, grid.march(rays, spacing, num_candidates, **options)


def bounded_rays(rays_o, rays_d, near=0.1, far=6.0):
    """A ray batch [N, 8]."""
    return torch.cat([rays_o, rays_d, torch.tensor([[near, far]]).expand(len(rays_o), 2)], -1)
