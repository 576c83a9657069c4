"""Bakes the density of a trained network into an occupancy grid.

Cells of a coarse grid that may hold something are divided into small ones, which are evaluated in their centres.
That misses blobs smaller than a cell: ripples of the encoding that rise above 0 in space that is otherwise a bit
below, where a sample counts for all of its interval. So small cells whose density before its ReLU is within a
margin below 0 are evaluated in eight more points, and kept if one of these comes within half of that margin.
"""
import torch
import torch.nn.functional as F

from accel.occupancy import OccupancyGrid

# Cells along a side of the coarse grid.
COARSE_RESOLUTION = 64
# A coarse cell is divided into this many small cells along each side, fewer in fog.
DIVISIONS = 4
# A cell is empty where a coarse sample has at most this optical depth.
MIN_OPTICAL_DEPTH = 1e-4
# Margins below 0 to choose from, as optical depths of a coarse sample; 0 evaluates no cell more closely.
MARGINS = 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0
# For each coarse cell, at most this many small cells are evaluated, and this many points in just empty ones.
MAX_POINTS = 16


@torch.no_grad()
def bake(density, aabb, points_per_cell):
    """Find the cells in which a network may be seen: those where it is not transparent, and their neighbours.

    Args:
      density: function of points [M, 3] that returns densities [M] before their ReLU, multiplied by the length of
        a coarse interval: the optical depth of a coarse sample.
      aabb: box of the grid [2, 3].
      points_per_cell: the largest margin is used that divides at most this many small cells for each coarse cell.
    Returns:
      an `OccupancyGrid` of COARSE_RESOLUTION times up to DIVISIONS cells along each side.
    """
    grid = make_grid(COARSE_RESOLUTION, aabb)
    coarse = max_density_per_cell(grid, density)
    margin = next(margin for margin in MARGINS
                  if margin == 0 or num_small_cells(above(coarse, margin), DIVISIONS) <= points_per_cell)
    divided = above(coarse, margin)
    divisions = max(n for n in range(1, DIVISIONS + 1) if num_small_cells(divided, n) <= MAX_POINTS)

    grid, steps = make_grid(COARSE_RESOLUTION * divisions, aabb), lattice([divisions] * 3, aabb.device)
    cells = (with_neighbours(divided).nonzero()[:, None] * divisions + steps).reshape(-1, 3)
    cells = (cells[:, 0] * grid.resolution + cells[:, 1]) * grid.resolution + cells[:, 2]
    found = density(grid.points_in(cells, 0.5))
    occupied = torch.zeros_like(grid.occupied)
    occupied.view(-1)[cells] = above(found, 0)
    occupied = with_neighbours(occupied)

    # evaluate cells that are only just empty more closely, those nearest to 0 first
    suspects = (above(found, margin) & ~occupied.view(-1)[cells]).nonzero()[:, 0]
    found, nearest = found[suspects].topk(min(len(suspects), MAX_POINTS * coarse.numel() // 8))
    cells = cells[suspects[nearest]]
    for within in lattice([2] * 3, aabb.device) / 2 + 0.25:
        found = torch.maximum(found, density(grid.points_in(cells, within)))
    occupied.view(-1)[cells] = above(found, margin / 2)
    grid.set_occupied(occupied)
    return grid


def above(optical_depth, margin):
    """Which cells are not empty, or not below 0 by more than a `margin` that is not 0; NaN is not."""
    return ~(optical_depth <= (-margin if margin else MIN_OPTICAL_DEPTH))


def num_small_cells(divided, divisions):
    """How many small cells there are for each coarse cell if the cells `divided` [G, G, G] and their neighbours
    are divided into `divisions` along each side."""
    return with_neighbours(divided).float().mean().item() * divisions ** 3


def max_density_per_cell(grid, density):
    """The largest `density` in the corners and the centre of each cell, [G, G, G]."""
    G, device = grid.resolution, grid.aabb.device
    corners = grid.aabb[0] + (grid.aabb[1] - grid.aabb[0]) / G * lattice([G + 1] * 3, device)
    in_corners = F.max_pool3d(density(corners).view(1, 1, G + 1, G + 1, G + 1), 2, 1)[0, 0]
    in_centers = density(grid.points_in(torch.arange(G ** 3, device=device), 0.5)).view(G, G, G)
    return torch.maximum(in_corners, in_centers)


def make_grid(resolution, aabb):
    """An `OccupancyGrid` of the box `aabb` [2, 3], without the opacities that training records."""
    grid = OccupancyGrid(resolution).to(aabb.device)
    grid.set_box(aabb)
    grid.opacity = grid.opacity.new_empty(0)  # of a grid this fine it would be large
    return grid


def lattice(shape, device):
    """All indices of an array of `shape`, [N, 3]."""
    return torch.cartesian_prod(*[torch.arange(count, device=device) for count in shape])


def with_neighbours(occupied):
    """Cells [G, G, G] that are occupied or have an occupied neighbour, diagonal ones included."""
    return F.max_pool3d(occupied[None].float(), 3, 1, 1)[0] > 0
