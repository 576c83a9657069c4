"""What a page is baked from: density and colour of a trained scene at points of a grid, and the rays of the
training views through it.

The coordinates of the grid are those of the world, normalised device coordinates, or contracted space, in
which rays are curved.
"""
import math

import torch
import torch.nn.functional as F

from accel.baking import bake, bounded_grid, with_neighbours
from accel.hash_grid import contract, expand
from accel.occupancy import offsets_of
from accel.proposals import FAR
from run_nerf_helpers import ndc_rays
from scenes.bounds import box_of_rays
from scenes.rays import camera_rays

# The longest side of a grid has at most this many steps. In forward-facing scenes thin fog fills all space,
# so more take too much time; contracted space holds all surroundings.
MAX_RESOLUTION, MAX_RESOLUTION_NDC, MAX_RESOLUTION_CONTRACTED = 512, 320, 1024
# A point is seen if it has at least this weight in a ray of a training view. In forward-facing scenes the
# opacity is spread over many steps, so points with less weight count too.
MIN_WEIGHT, MIN_WEIGHT_NDC = 0.01, 0.002
# Visibility is computed along about this many rays of a view, and of all views.
RAYS_PER_VIEW, MAX_RAYS = 40_000, 4_000_000
# For scenes without an occupancy grid, at most this many small cells per coarse cell are evaluated.
MAX_BAKED_CELLS = 16
# The network is evaluated at this many points at once.
POINTS_AT_ONCE = 2 ** 20
# Contracted space has this many cells along each side.
CONTRACTED_CELLS = 256
# An interval of a ray through contracted space is visible if it has at least this weight for each cell of its
# length.
MIN_CELL_WEIGHT = 0.003
# This many rays are rendered at once.
RAYS_AT_ONCE = 2 ** 12


class Baking:
    """What baking needs to know of a trained scene.

    Args:
      trained: a `Trained`.
    """
    # The rays of a view cover this many times its width and height.
    widening = 1.0
    max_resolution, min_weight = MAX_RESOLUTION, MIN_WEIGHT

    def __init__(self, trained):
        self.kwargs, self.scene, self.path = trained.render_kwargs, trained.scene, trained.path
        self.network = self.kwargs['network_fine'] or self.kwargs['network_fn']
        self.query, self.ndc = self.kwargs['network_query_fn'], self.kwargs['ndc']
        if self.ndc:
            self.max_resolution, self.min_weight = MAX_RESOLUTION_NDC, MIN_WEIGHT_NDC
        self.unit = 1.0  # of the grid's coordinates, in units of the world
        self.device = next(self.network.parameters()).device
        self.cells = self.kwargs['renderer'].grid if trained.args.occupancy_grid else self.find_cells()
        self.box = self.grid_box()

    def find_cells(self):
        """The cells in which the network may be visible, a `CellGrid`."""
        aabb = box_of_rays(self.scene, self.ndc, self.scene.i_train).to(self.device)
        step = (aabb[1] - aabb[0]).amax() / (4 * self.kwargs['N_samples'])
        for _ in range(2):  # the second time in the box of what was found
            cells = bake(lambda points: self.density(points) * step, aabb, MAX_BAKED_CELLS)
            aabb = occupied_box(cells)
        return cells

    def grid_box(self):
        """The box [2, 3] that the grid covers."""
        return occupied_box(self.cells)

    def density(self, points):
        """Densities [M] at `points` [M, 3]."""
        parts = [self.query.density(part, self.network) for part in points.split(POINTS_AT_ONCE)]
        return torch.relu(torch.cat(parts)) if parts else points[:, 0]

    def colors(self, points, viewdirs):
        """Colours [M, K, 3] at `points` [M, 3], seen in each of `viewdirs` [M, K, 3]."""
        K, found = viewdirs.shape[1], []
        for part, dirs in zip(points.split(POINTS_AT_ONCE // K), viewdirs.split(POINTS_AT_ONCE // K)):
            if not self.kwargs['use_viewdirs']:
                raw = self.query.at_points(part, None, self.network)[:, None].expand(-1, K, -1)
            else:
                repeated = part[:, None].expand(dirs.shape).reshape(-1, 3)
                raw = self.query.at_points(repeated, dirs.reshape(-1, 3), self.network).unflatten(0, (-1, K))
            found.append(torch.sigmoid(raw[..., :3]))
        return torch.cat(found)

    def rays(self, view):
        """Rays of some pixels of a view, evenly spaced: a ray batch [N, 8] in ray space, and unit directions
        in the world [N, 3]."""
        scene, camera = self.scene, self.scene.cameras[view]
        wanted = min(RAYS_PER_VIEW, MAX_RAYS / len(scene.i_train))
        stride = max(1, math.ceil(math.sqrt(camera.H * camera.W / wanted)))
        c2w = torch.from_numpy(scene.poses[view]).to(self.device)
        rays_o, rays_d = camera_rays(camera, c2w, self.kwargs['pixel_centers'])
        rays_o, rays_d = (part[::stride, ::stride].reshape(-1, 3) for part in (rays_o, rays_d))
        depths = rays_d @ -c2w[:, 2:3]                                                 # [N, 1]
        rays_d = self.widening * rays_d + (1 - self.widening) * depths * -c2w[:, 2]
        viewdirs = F.normalize(rays_d, dim=-1)
        if self.ndc:
            rays_o, rays_d = ndc_rays(scene.H, scene.W, scene.K[0, 0], 1.0, rays_o, rays_d)
        bounds = torch.tensor([scene.near, scene.far], device=self.device).expand(len(rays_o), 2)
        return torch.cat([rays_o, rays_d, bounds], -1).float(), viewdirs

    def march(self, view, spacing, generator):
        """Points of the rays of a view in occupied cells, in steps of `spacing`.

        Returns:
          points: of the grid [M, 3].
          viewdirs: of the rays [N, 3]; ray_indices [M]; offsets [N + 1], see `accel/packed.py`.
          lengths: of the steps [M], in units of the step whose optical depth is density * spacing.
        """
        rays, viewdirs = self.rays(view)
        jitter = torch.rand(len(rays), generator=generator, device=self.device)
        t, ray_indices, offsets = self.cells.march(rays, *self.cells.candidates(rays, spacing, jitter))
        points = rays[ray_indices, :3] + t[:, None] * rays[ray_indices, 3:6]
        return points, viewdirs, ray_indices, offsets, torch.ones_like(t)


class ContractedBaking(Baking):
    """The `Baking` of a scene in contracted space. The grid covers the contraction [-2, 2]³, see `contract`
    in accel/hash_grid.py; steps have the same length there, so that they grow with the distance.

    A step of `spacing` in the direction away from the centre is spacing * norm² half sides of the box long,
    where `norm` is the maximum norm of its point. Densities are multiplied by this, which is their optical
    depth in such a step; steps in other directions are shorter.
    """
    # Surroundings do not end at the borders of the photos.
    widening = 1.12

    @torch.no_grad()
    def find_cells(self):
        """The cells that the rays of training views see, a `CellGrid`."""
        box = self.network.encoding.aabb
        self.center, self.half = box.mean(0), 0.5 * (box[1] - box[0])
        self.unit, self.max_resolution = self.half.mean().item(), MAX_RESOLUTION_CONTRACTED
        cells = bounded_grid(CONTRACTED_CELLS, 2 * torch.tensor([[-1.0] * 3, [1.0] * 3], device=self.device))
        occupied, random = torch.zeros_like(cells.occupied), torch.Generator(self.device).manual_seed(0)
        self.intervals, side = {}, 4 / CONTRACTED_CELLS
        for view in self.scene.i_train:
            parts = [self.find_intervals(rays, side) for rays in
                     torch.cat(self.rays(view), -1).split(RAYS_AT_ONCE)]
            self.intervals[view] = [torch.cat(part) for part in zip(*parts)]
            points, *_ = self.march(view, 0.5 * side, random)
            occupied[cells.cell_indices(points)] = True
        cells.set_occupied(with_neighbours(occupied))
        return cells

    def find_intervals(self, rays, side):
        """The edges of intervals of rays [N, 11], t [N, K + 1], and which intervals are visible [N, K]."""
        renderer = self.kwargs['renderer'].without_shortcuts()
        extras = renderer.render_rays(rays, self.network, self.query, self.kwargs['N_samples'],
                                      retsamples=True)
        t = renderer.positions(extras['s_vals'], rays[:, 6:7], rays[:, 7:8], lindisp=False)
        return t, extras['weights'] >= MIN_CELL_WEIGHT * (self.lengths(rays, t) / side).clamp(min=1)

    def lengths(self, rays, t):
        """The lengths [N, K] of intervals of rays [N, 8 or more] in contracted space, from their edges
        t [N, K + 1]."""
        points = rays[:, None, :3] + t[..., None] * rays[:, None, 3:6]
        edges = contract((points - self.center) / self.half)                           # [N, K + 1, 3]
        return torch.linalg.vector_norm(edges.diff(dim=1), dim=-1)

    def grid_box(self):
        return self.cells.aabb

    def density(self, points):
        expanded, norm = expand(points, FAR)
        return super().density(self.center + self.half * expanded) * self.unit * norm[:, 0] ** 2

    def colors(self, points, viewdirs):
        return super().colors(self.center + self.half * expand(points, FAR)[0], viewdirs)

    def march(self, view, spacing, generator):
        (rays, viewdirs), (t, visible) = self.rays(view), self.intervals[view]
        steps = self.lengths(rays, t) / spacing * visible                              # [N, K]
        jitter = torch.rand(len(rays), 1, generator=generator, device=self.device)
        interval, share, offsets = whole_numbers(F.pad(steps.cumsum(-1), (1, 0)) - jitter)
        ray_indices, dt = interval // visible.shape[1], t.diff().flatten()[interval]
        at = t[:, :-1].flatten()[interval] + share * dt
        points = rays[ray_indices, :3] + at[:, None] * rays[ray_indices, 3:6]
        points = (points - self.center) / self.half
        norm = points.abs().amax(-1).clamp(min=1)
        step = dt * torch.linalg.vector_norm(rays[ray_indices, 3:6], dim=-1) / steps.flatten()[interval]
        return contract(points), viewdirs, ray_indices, offsets, step / (spacing * self.unit * norm ** 2)


def whole_numbers(edges):
    """Which of the numbers 0, 1, 2, … are in which intervals, with the `edges` [N, K + 1] along N rays.

    Returns:
      interval: of each number, counted over all rays [M]; share: 0 to 1, where it is in there [M].
      offsets: see `accel/packed.py` [N + 1].
    """
    before = edges.ceil().clamp(min=0).long()
    offsets, starts = offsets_of(before[:, -1]), edges[:, :-1].flatten()
    interval = torch.arange(len(starts), device=edges.device).repeat_interleave(before.diff().flatten())
    number = torch.arange(len(interval), device=edges.device) - offsets[interval // (edges.shape[1] - 1)]
    return interval, (number - starts[interval]) / edges.diff().flatten()[interval], offsets


def occupied_box(grid):
    """The smallest box [2, 3] that holds the occupied cells of a `CellGrid`; its own if none is."""
    index = grid.occupied.nonzero()
    if not len(index):
        return grid.aabb
    side = (grid.aabb[1] - grid.aabb[0]) / grid.resolution
    return grid.aabb[0] + side * torch.stack([index.amin(0), index.amax(0) + 1])
