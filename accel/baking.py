"""The density of a network that is trained, baked into an occupancy grid.

What looks at cells alone would miss are blobs smaller than the distance between looks: the encoding's ripples, where they
top 0 in space that is else a little below. A sample there counts for all of its interval, and is seen as if the blob were as
large. So cells in which the density before its ReLU is less than a margin below 0 are looked at more closely, and kept where
it comes half as near. The margin is as large as a number of looks allows.

Densities are in units of that which gives a coarse sample the opacity 1, were it proportional.
"""
import torch
import torch.nn.functional as F

from accel.occupancy import OccupancyGrid, version

LEAST_ALPHA = 1e-4        # opacity of a coarse sample; cells with less are empty,
MARGINS = 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0  # but suspect, if it is no more than that below 0
LARGE = 64                # cells along a side
DIVIDED = 4               # those of them that are not empty, so often along each side; less often in fog, since
MOST_LOOKS = 16           # for each large cell, empty or not, there are no more small cells, nor looks at suspect ones
POINTS_AT_ONCE = 2 ** 18


class Baker:
    """Bakes grids, and keeps them until a network changes.

    Args:
      query: a network_query_fn.
      box: [2, 3] of the grids.
    """

    def __init__(self, query, box):
        self.query, self.box = query, torch.as_tensor(box)
        self.versions = None
        self.seen, self.margins, self.grids = {}, {}, {}  # by network, by network and looks, by network and margin

    def forget_unless(self, networks):
        """Forget what was baked, unless these are the networks, and are as they were."""
        versions = [version(parameter) for network in networks for parameter in network.parameters()]
        if versions != self.versions or None in versions:
            self.versions, self.seen, self.margins, self.grids = versions, {}, {}, {}

    @torch.no_grad()
    def grid(self, network, looks, rays, N_samples):
        """The cells in which a network is not transparent, those around them, and those in which it may be opaque.

        Args:
          looks: small cells for each large one that a margin may cost.
          rays: [N, 8 or 11] as in `render_rays`: their bounds count, and the first one's direction.
          N_samples: coarse samples of a ray.
        """
        if (network, looks) in self.margins:
            return self.grids[network, self.margins[network, looks]]
        unit = N_samples / (rays[0, 7] - rays[0, 6]).item()
        direction = rays[:1, -3:] if rays.shape[-1] > 8 else None

        def density(points):
            found = []
            for part in points.split(POINTS_AT_ONCE):
                views = None if direction is None else direction.expand(len(part), 3)
                found.append(self.query(part[:, None], views, network)[:, 0, 3] / unit)
            return torch.cat(found)

        grid = empty_grid(LARGE, self.box.to(rays.device))
        if network not in self.seen:
            self.seen[network] = look_at_all(grid, density)
        seen = self.seen[network]
        margin = next(margin for margin in MARGINS if margin == 0 or small_cells(held(seen, margin), DIVIDED) <= looks)
        if (network, margin) not in self.grids:
            self.grids[network, margin] = divide(grid, held(seen, margin), margin, density)
        self.margins[network, looks] = margin
        return self.grids[network, margin]


def held(seen, margin):
    """Which of the densities `seen` are not those of emptiness; NaN is not."""
    return ~(seen <= (-margin if margin else LEAST_ALPHA))


def small_cells(holds, divided):
    """How many there are for each large cell, if those that hold something and those beside them are divided."""
    return with_neighbours(holds).float().mean().item() * divided ** 3


def divide(large, holds, margin, density):
    """The cells that `Baker.grid` gives. Cells of the grid `large` that hold something [G, G, G], and those beside them, are
    divided into small ones, which are looked at in their centres; suspect ones, as many as are allowed, in those of their
    eighths."""
    divided = max(count for count in range(1, DIVIDED + 1) if small_cells(holds, count) <= MOST_LOOKS)
    grid, device = empty_grid(large.resolution * divided, large.aabb), holds.device
    cells = with_neighbours(holds).nonzero()[:, None] * divided + lattice_points([divided] * 3, device).long()
    cells = ((cells[..., 0] * grid.resolution + cells[..., 1]) * grid.resolution + cells[..., 2]).flatten()
    seen, occupied = density(grid.points_in(cells, 0.5)), grid.occupied.view(-1)
    occupied[cells] = held(seen, 0)
    grid.occupied.copy_(with_neighbours(grid.occupied))
    suspect = (held(seen, margin) & ~occupied[cells]).nonzero()[:, 0]
    seen, nearest = seen[suspect].topk(min(len(suspect), MOST_LOOKS * large.occupied.numel() // 8))
    cells = cells[suspect[nearest]]
    for within in lattice_points([2] * 3, device) / 2 + 0.25:
        seen = torch.maximum(seen, density(grid.points_in(cells, within)))
    occupied[cells] = held(seen, margin / 2)
    return grid


def look_at_all(grid, density):
    """The largest [G, G, G] of what `density` gives in the corners and the centre of each cell."""
    G, device = grid.resolution, grid.occupied.device
    corners = grid.aabb[0] + (grid.aabb[1] - grid.aabb[0]) / G * lattice_points([G + 1] * 3, device)
    seen = F.max_pool3d(density(corners).view(1, 1, G + 1, G + 1, G + 1), 2, 1)[0, 0]
    return torch.maximum(seen, density(grid.points_in(torch.arange(G ** 3, device=device), 0.5)).view(G, G, G))


def empty_grid(resolution, box):
    grid = OccupancyGrid(resolution).to(box.device)
    grid.restrict(box)
    grid.opacity = grid.opacity.new_empty(0)  # nothing looks at it, and of so many cells it would be large
    grid.occupied.zero_()
    return grid


def lattice_points(shape, device):
    """All index triples of an array of `shape`, [., 3] float."""
    return torch.stack(torch.meshgrid(*[torch.arange(count, device=device) for count in shape], indexing='ij'),
                       -1).reshape(-1, 3).float()


def with_neighbours(occupied):
    """Cells [G, G, G] that are occupied, or have an occupied one beside them, diagonally too."""
    for axis in range(3):
        before, lower, upper = occupied, slice(None, -1), slice(1, None)
        occupied = before.clone()
        for here, there in ((lower, upper), (upper, lower)):
            index = (slice(None),) * axis
            occupied[(*index, here)] |= before[(*index, there)]
    return occupied
