"""Occupancy grid (Müller et al., "Instant Neural Graphics Primitives", SIGGRAPH 2022): which cells of a box hold anything.

Rays are sampled in steps of equal length, in occupied cells alone. While a network trains, the grid follows its density.

  lattice     [N_rays, 3] start, dt and offset of each ray: its points are at t_k = start + (k + offset) * dt
  num_points  [N_rays]    how many of these points lie in the box, between near and far
"""
import torch
from torch import nn

from accel.kernels.compiled import call, compiled

# Cells along a side of the grid.
RESOLUTION = 128
# Cells along a side of a block, which marching skips as a whole where it is empty; occupancy.c has the same number.
BLOCK = 8
# The recorded optical depth of a cell is multiplied by this at each update; the paper's 0.95 suits longer runs.
DECAY = 0.8
# A cell is occupied if a step through it has at least OCCUPIED_SHARE of this optical depth, or of the mean if that is less.
OCC_THRE = 0.01
# Below 1 because an update evaluates one point of a cell, which may not be its densest.
OCCUPIED_SHARE = 0.25
# Later updates evaluate at most this many cells: half of them anywhere, half of them occupied.
MAX_UPDATED_CELLS = 2 ** 17
# A ray has at most this many points, however long it is.
MAX_STEPS = 2 ** 14
# The reference implementation of marching looks up at most this many points at once.
MAX_LOOKUPS = 2 ** 22
# The recorded optical depth of cells that cannot hold anything.
IMPOSSIBLE = -1.0


class OccupancyGrid(nn.Module):
    """The cells of the box `aabb` [2, 3], lower and upper corner.

    Args:
      resolution: cells along each side, G.
    Buffers:
      opacity [G, G, G]: recorded optical depth of a step through the cell; IMPOSSIBLE where nothing can be.
      occupied [G, G, G]: whether rays are sampled there.
    """

    def __init__(self, resolution=RESOLUTION):
        super().__init__()
        self.resolution = resolution
        self.register_buffer('aabb', torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
        self.register_buffer('opacity', torch.zeros([resolution] * 3))
        self.register_buffer('occupied', torch.ones([resolution] * 3, dtype=torch.bool))
        self.register_buffer('blocks', any_in_blocks(self.occupied), persistent=False)
        self.register_load_state_dict_post_hook(refresh_blocks)

    def reset_parameters(self):
        """All possible cells are occupied again."""
        self.opacity.clamp_(max=0.0)
        self.set_occupied(self.opacity > IMPOSSIBLE)

    def set_box(self, aabb, possible=None):
        """Use the box `aabb` [2, 3]; only cells of `possible` [G, G, G] can hold anything, all if it is None."""
        self.aabb.copy_(torch.as_tensor(aabb))
        if possible is not None:
            self.opacity.copy_(torch.where(possible.to(self.opacity.device), 0.0, IMPOSSIBLE))
        self.reset_parameters()

    def set_occupied(self, occupied):
        """Sample rays in the cells `occupied` [G, G, G]."""
        self.occupied.copy_(occupied)
        self.blocks = any_in_blocks(self.occupied)

    def step_length(self, steps):
        """The length of a step if the box's diagonal is divided into `steps`."""
        return torch.linalg.vector_norm(self.aabb[1] - self.aabb[0]).item() / steps

    def points_in(self, cells, within):
        """Points [M, 3] in `cells` [M], numbered as in `opacity.flatten()`, at the position `within` of each cell: [M, 3],
        [3] or a number, in [0, 1]."""
        G = self.resolution
        place = torch.stack([cells // (G * G), cells // G % G, cells % G], -1) + within
        return self.aabb[0] + place * ((self.aabb[1] - self.aabb[0]) / G)

    @torch.no_grad()
    def update(self, density, step_length, generator, all_cells):
        """Evaluate the density in one random point of each of many cells, and decide which cells are occupied.

        Args:
          density: function of points [M, 3] that returns densities [M].
          step_length: length of the rays' steps.
          generator: source of random numbers on the CPU, the same in all processes of a run.
          all_cells: evaluate every possible cell.
        """
        def random(*shape):
            return torch.rand(*shape, generator=generator).to(self.opacity.device)

        opacity, occupied = self.opacity.view(-1), self.occupied.view(-1)
        cells = (opacity > IMPOSSIBLE).nonzero()[:, 0]
        if not all_cells and len(cells) > MAX_UPDATED_CELLS:
            some = [(part, (random(MAX_UPDATED_CELLS // 2) * len(part)).long().clamp(max=len(part) - 1))
                    for part in (cells, occupied.nonzero()[:, 0]) if len(part)]
            cells = torch.cat([part[index] for part, index in some])
        for part in cells.split(MAX_UPDATED_CELLS):
            found = density(self.points_in(part, random(len(part), 3))) * step_length
            opacity[part] = opacity[part] * DECAY
            opacity.scatter_reduce_(0, part, found, 'amax')  # a cell may be there twice, with different densities
        self.apply_threshold()

    def apply_threshold(self):
        """Decide from the recorded opacity which cells are occupied: all possible ones if none would be."""
        possible = self.opacity > IMPOSSIBLE
        mean = self.opacity.clamp(min=0).sum() / possible.sum().clamp(min=1)
        occupied = possible & (self.opacity > OCCUPIED_SHARE * mean.clamp(max=OCC_THRE))
        self.set_occupied(occupied if occupied.any() else possible)

    def maybe_occupied(self, points):
        """Whether points [..., 3] are in occupied cells, or outside of the box, where nothing is known; [...]."""
        cells = (points - self.aabb[0]) * (self.resolution / (self.aabb[1] - self.aabb[0]))
        inside = ((cells >= 0) & (cells <= self.resolution)).all(-1)
        x, y, z = cells.nan_to_num(0.0).clamp(0, self.resolution - 1).long().unbind(-1)
        return self.occupied[x, y, z] | ~inside

    # --- rays ---

    def lattice(self, rays_o, rays_d, near, far, step_length, offset):
        """The points at which rays may be sampled.

        Args:
          rays_o, rays_d: [N, 3].  near, far: bounds in units of rays_d [N].
          step_length: distance between the points, in units of the box.
          offset: position of the first point, in steps [N].
        Returns:
          lattice [N, 3], num_points [N].
        """
        to_sides = (self.aabb[:, None] - rays_o) / rays_d                     # [2, N, 3]
        outside = ((rays_o < self.aabb[0]) | (rays_o > self.aabb[1])) & (rays_d == 0)
        to_sides = to_sides.nan_to_num(0.0, torch.inf, -torch.inf)
        parallel = rays_d == 0
        entry = torch.where(parallel, -torch.inf, to_sides.amin(0)).amax(-1)
        leave = torch.where(parallel, torch.inf, to_sides.amax(0)).amin(-1)
        start, end = torch.maximum(near, entry), torch.minimum(far, leave)
        dt = step_length / torch.linalg.vector_norm(rays_d, dim=-1)
        num_points = ((end - start) / dt - offset).ceil().nan_to_num(0.0).clamp(0, MAX_STEPS).long()
        num_points = torch.where(outside.any(-1), 0, num_points)
        return torch.stack([start, dt, offset], -1), num_points

    def march(self, rays_o, rays_d, lattice, num_points, begin=None, max_samples=MAX_STEPS):
        """The points of the lattice that lie in occupied cells.

        Args:
          begin: the point at which each ray begins [N]; 0 if not given.
          max_samples: the most samples of a ray.
        Returns:
          t [M], ray_indices [M], offsets [N + 1] (see `packed.py`), resume [N]: the points to begin with next time.
        """
        begin = torch.zeros_like(num_points) if begin is None else begin
        if rays_o.device.type == 'cpu' and compiled('occupancy') is not None:
            return self._march_compiled(rays_o, rays_d, lattice, num_points, begin, max_samples)
        return self.march_reference(rays_o, rays_d, lattice, num_points, begin, max_samples)

    def hits(self, ray_batch):
        """Whether rays [N, 8 or more] (origin, direction, near, far) pass through an occupied cell, sampled twice along
        its side, or leave the box; [N]."""
        rays_o, rays_d = ray_batch[:, 0:3].contiguous(), ray_batch[:, 3:6].contiguous()
        near, far = ray_batch[:, 6], ray_batch[:, 7]
        step = ((self.aabb[1] - self.aabb[0]).amin() / (2 * self.resolution)).item()
        lattice, num_points = self.lattice(rays_o, rays_d, near, far, step, torch.zeros_like(near))
        _, _, offsets, _ = self.march(rays_o, rays_d, lattice, num_points, max_samples=1)
        ends = [rays_o + rays_d * t[:, None] for t in (near, far)]
        outside = [((end < self.aabb[0]) | (end > self.aabb[1])).any(-1) for end in ends]
        return (offsets.diff() > 0) | outside[0] | outside[1]

    def march_reference(self, rays_o, rays_d, lattice, num_points, begin, max_samples):
        """The reference implementation of `march`."""
        width = int((num_points - begin).max().clamp(min=1)) if len(num_points) else 1
        parts = [self._march_part(*part, max_samples) for part in zip(*[
            whole.split(max(1, MAX_LOOKUPS // width)) for whole in (rays_o, rays_d, lattice, num_points, begin)])]
        t, found, resume = (torch.cat(part) for part in zip(*parts))
        offsets = torch.cat([found.new_zeros(1), found.cumsum(0)])
        return t, torch.arange(len(num_points), device=t.device).repeat_interleave(found), offsets, resume

    def _march_part(self, rays_o, rays_d, lattice, num_points, begin, max_samples):
        width = (num_points - begin).max().clamp(min=1)
        k = begin[:, None] + torch.arange(width, device=num_points.device)                 # [N, K]
        start, dt, offset = lattice[..., None].unbind(1)
        t = start + (k + offset) * dt
        G = self.resolution
        cells = (rays_o[:, None] + t[..., None] * rays_d[:, None] - self.aabb[0]) * (G / (self.aabb[1] - self.aabb[0]))
        x, y, z = cells.nan_to_num(0.0).clamp(0, G - 1).long().unbind(-1)
        hit = self.occupied[x, y, z] & (k < num_points[:, None])
        hit &= hit.cumsum(-1) <= max_samples
        found = hit.sum(-1)
        last = (hit * (k + 1)).amax(-1)
        return t[hit], found, torch.where(found == max_samples, last, num_points)

    def _march_compiled(self, rays_o, rays_d, lattice, num_points, begin, max_samples):
        N, G = len(num_points), self.resolution
        scale = G / (self.aabb[1] - self.aabb[0])
        rays = torch.cat([rays_o, rays_d], -1)
        found, resume = torch.empty_like(num_points), torch.empty_like(num_points)
        offsets = num_points.new_zeros(N + 1)
        inputs = (rays, lattice.contiguous(), num_points, begin, N, max_samples, self.occupied, self.blocks, G,
                  self.aabb[0], scale, found, resume)
        call('occupancy', 'march', *inputs, None, None, None)  # counts
        torch.cumsum(found, 0, out=offsets[1:])
        t, ray_indices = rays.new_empty(int(offsets[-1])), offsets.new_empty(int(offsets[-1]))
        call('occupancy', 'march', *inputs, offsets, t, ray_indices)
        return t, ray_indices, offsets, resume


def refresh_blocks(grid, incompatible_keys):
    """Called after a state has been loaded into `grid`."""
    grid.set_occupied(grid.occupied)


def any_in_blocks(occupied):
    """Which blocks of BLOCK³ cells hold an occupied one; the last ones are cut off by the grid's end."""
    blocks = nn.functional.pad(occupied, [0, -len(occupied) % BLOCK] * 3)
    for axis in (2, 1, 0):
        blocks = blocks.unflatten(axis, (-1, BLOCK)).any(axis + 1)
    return blocks.contiguous()
