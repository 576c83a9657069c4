"""Small occupancy grids and rays through them, for tests with and without the compiled kernels."""
import pytest
import torch

from accel.kernels.compiled import load_kernels
from accel.occupancy import OccupancyGrid

needs_compiler = pytest.mark.skipif(load_kernels('occupancy') is None, reason='no C compiler')


@pytest.fixture(params=['compiled', 'reference'])
def each_implementation(request, monkeypatch):
    """Runs a test with the compiled kernels, and with the reference implementations."""
    if request.param == 'reference':
        monkeypatch.setattr('accel.occupancy.load_kernels', lambda name: None)
        monkeypatch.setattr('accel.packed.load_kernels', lambda name: None)


def occupied_grid(share, resolution=20, seed=0):
    """A grid with `share` of its cells occupied, in clusters."""
    grid = OccupancyGrid(resolution)
    grid.set_aabb([[-1.0, -2, 0], [1.5, 1, 1]])
    noise = torch.rand([1, 1] + [resolution] * 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0]
    grid.set_occupied(noise < torch.quantile(noise, share) if share < 1 else torch.ones_like(noise))
    return grid


def rays_around(N, seed=0):
    """Rays from around and within the box of `occupied_grid`; some are parallel to an axis, some miss the
    box."""
    random = torch.Generator().manual_seed(seed)
    rays_o = 4 * torch.rand(N, 3, generator=random) - 2
    rays_d = torch.rand(N, 3, generator=random) - 0.5 - 0.3 * rays_o
    rays_d[::7, 0] = 0
    rays_d[::11, 1:] = 0
    rays_d[::11, 0] = 1
    return rays_o, rays_d


def march(grid, rays_o, rays_d, step=0.03, near=0.1, far=6.0, **options):
    """Spacing and number of candidates of each ray, and what `grid.march` returns for them."""
    N = len(rays_o)
    spacing, num_candidates = grid.candidates(rays_o, rays_d, torch.full([N], near),
                                                 torch.full([N], far), step, torch.full([N], 0.5))
    return spacing, num_candidates, grid.march(rays_o, rays_d, spacing, num_candidates, **options)
