"""Bakes the density of a trained network into a grid of the cells where it may be visible.

Coarse cells that may hold something are divided into small ones, which are evaluated at their centres.
Centres miss small blobs: where the density before its ReLU is just below 0, ripples of the encoding rise
above it, and one sample there counts for its whole interval. So small cells slightly below 0 are evaluated
at eight more points, and kept if one of these exceeds half the threshold.
"""
import torch
import torch.nn.functional as F

from accel.occupancy import CellGrid

# The coarse grid has this many cells along each side.
BAKING_RESOLUTION = 64
# A coarse cell is divided into at most this many small cells along each side; fewer in fog.
MAX_DIVISIONS = 4
# A coarse sample of at most this optical depth is not visible.
MIN_OPTICAL_DEPTH = 1e-4
# Cells may hold something if their optical depth, before the ReLU, exceeds the lowest of these that the
# budget allows.
THRESHOLDS = -0.8, -0.4, -0.2, -0.1, -0.05, -0.025, MIN_OPTICAL_DEPTH
# Coarse cells are divided so that at most this many small cells for each of them are evaluated.
MAX_CENTERS = 16
# For each coarse cell, at most this many small cells are evaluated at eight more points.
MAX_SUSPECTS = 2


@torch.no_grad()
def bake(raw_optical_depth, aabb, max_cells):
    """Find the cells in which a network may be visible: those where it is not transparent, and their
    neighbours.

    Args:
      raw_optical_depth: function of points [M, 3] that returns the density before its ReLU, multiplied by the
        length of a coarse interval [M].
      aabb: bounding box of the grid [2, 3].
      max_cells: the grid has at most this many small cells per coarse cell, on average: the lowest of
        THRESHOLDS that allows it is used.
    Returns:
      a `CellGrid` of BAKING_RESOLUTION times up to MAX_DIVISIONS cells along each side.
    """
    coarse = max_per_cell(bounded_grid(BAKING_RESOLUTION, aabb), raw_optical_depth)
    for threshold in THRESHOLDS:
        divided = with_neighbours(exceeds(coarse, threshold))                          # [G, G, G]
        if divided.float().mean() * MAX_DIVISIONS ** 3 <= max_cells:
            break
    divisions = max(n for n in range(1, MAX_DIVISIONS + 1) if divided.float().mean() * n ** 3 <= MAX_CENTERS)

    grid = bounded_grid(BAKING_RESOLUTION * divisions, aabb)
    steps = cell_indices([divisions] * 3, aabb.device)
    cells = (divided.nonzero()[:, None] * divisions + steps).reshape(-1, 3)
    cells = (cells[:, 0] * grid.resolution + cells[:, 1]) * grid.resolution + cells[:, 2]             # [M]
    at_centers = raw_optical_depth(grid.cell_points(cells, 0.5))
    occupied = torch.zeros_like(grid.occupied)
    occupied.view(-1)[cells] = exceeds(at_centers, MIN_OPTICAL_DEPTH)
    occupied = with_neighbours(occupied)

    # evaluate the other cells above the threshold at more points, those closest to 0 first
    suspects = (exceeds(at_centers, threshold) & ~occupied.view(-1)[cells]).nonzero()[:, 0]
    largest, order = at_centers[suspects].topk(min(len(suspects), MAX_SUSPECTS * coarse.numel()))
    cells = cells[suspects[order]]
    for position in cell_indices([2] * 3, aabb.device) / 2 + 0.25:
        largest = torch.maximum(largest, raw_optical_depth(grid.cell_points(cells, position)))
    occupied.view(-1)[cells] = exceeds(largest, threshold / 2)
    grid.set_occupied(occupied)
    return grid


def exceeds(raw_optical_depth, threshold):
    """Where `raw_optical_depth` is greater than `threshold`, or NaN."""
    return ~(raw_optical_depth <= threshold)


def max_per_cell(grid, raw_optical_depth):
    """The largest optical depth at the corners and the centre of each cell, [G, G, G]."""
    G, device = grid.resolution, grid.aabb.device
    corners = grid.aabb[0] + (grid.aabb[1] - grid.aabb[0]) / G * cell_indices([G + 1] * 3, device)
    at_corners = F.max_pool3d(raw_optical_depth(corners).view(1, 1, G + 1, G + 1, G + 1), 2, 1)[0, 0]
    at_centers = raw_optical_depth(grid.cell_points(torch.arange(G ** 3, device=device), 0.5)).view(G, G, G)
    return torch.maximum(at_corners, at_centers)


def bounded_grid(resolution, aabb):
    """A `CellGrid` of the bounding box `aabb` [2, 3]."""
    grid = CellGrid(resolution).to(aabb.device)
    grid.set_aabb(aabb)
    return grid


def cell_indices(shape, device):
    """All indices of an array of `shape`, [N, 3]."""
    return torch.cartesian_prod(*[torch.arange(count, device=device) for count in shape])


def with_neighbours(occupied):
    """Cells [G, G, G] that are occupied or have an occupied neighbour, diagonal ones included."""
    return F.max_pool3d(occupied[None].float(), 3, 1, 1)[0] > 0
