"""Occupancy grid (Müller et al., "Instant Neural Graphics Primitives", SIGGRAPH 2022): which cells of a box hold anything.

Rays are sampled in steps of equal length, in occupied cells alone. While a network trains, the grid follows its density.

  lattice   [N_rays, 3] start, dt, offset of each ray: its points are at t_k = start + (k + offset) * dt
  count     [N_rays]    how many of them lie in the box, between near and far
"""
import torch
from torch import nn

from accel.compiled import call, compiled

RESOLUTION = 128             # cells along a side of the grid
BLOCK = 8                    # as in occupancy.c
DECAY = 0.8                  # of what was seen of a cell, with each look at it; the paper's 0.95 is for longer runs
THRESHOLD = 0.01             # optical depth of a step in an occupied cell; less where the mean is less
MARGIN = 0.25                # of that: cells that have shown no more are empty, since a look sees one point of a cell
EVERY = 16                   # steps of training between looks
ALL_CELLS_UNTIL = 256        # steps in which every cell is looked at
MOST_CELLS = 2 ** 17         # in one look, later: half anywhere, half among the occupied
MOST_STEPS = 2 ** 14         # of a ray, however far it goes
LATTICE_AT_ONCE = 2 ** 22    # points that the plain twin looks up together
IMPOSSIBLE = -1.0            # opacity of cells that are known to be empty


def version(tensor):
    """What changes when `tensor` is written to; None if that is not known."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


class OccupancyGrid(nn.Module):
    """The cells of the box `aabb` [2, 3], lower and upper corner.

    Args:
      resolution: cells along each side.
    Buffers:
      opacity [G, G, G]: optical depth of a step in the cell, as it was seen last; IMPOSSIBLE where nothing can be.
      occupied [G, G, G]: whether rays are sampled there.
      samples_of_a_ray: how many a ray had on average in the last step of training, 0 if none was made.
    """

    def __init__(self, resolution=RESOLUTION):
        super().__init__()
        self.register_buffer('aabb', torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
        self.register_buffer('opacity', torch.zeros([resolution] * 3))
        self.register_buffer('occupied', torch.ones([resolution] * 3, dtype=torch.bool))
        self.register_buffer('samples_of_a_ray', torch.zeros(()))
        self._blocks = None

    def reset_parameters(self):
        """All possible cells are occupied again."""
        self.opacity.clamp_(max=0.0)
        self.occupied.copy_(self.opacity > IMPOSSIBLE)
        self.samples_of_a_ray.zero_()

    def restrict(self, aabb, possible=None):
        """Take the box `aabb`; only cells of `possible` [G, G, G] can hold anything, all if it is None."""
        self.aabb.copy_(torch.as_tensor(aabb))
        if possible is not None:
            self.opacity.copy_(torch.where(possible.to(self.opacity.device), 0.0, IMPOSSIBLE))
        self.reset_parameters()

    @property
    def resolution(self):
        return len(self.occupied)

    def blocks(self):
        """Which blocks of BLOCK³ cells hold an occupied one; the last ones are cut off by the grid's end."""
        now = version(self.occupied)
        if self._blocks is None or now is None or self._blocks[0] != now:
            blocks = nn.functional.pad(self.occupied, [0, -self.resolution % BLOCK] * 3)
            for axis in (2, 1, 0):
                blocks = blocks.unflatten(axis, (-1, BLOCK)).any(axis + 1)
            self._blocks = now, blocks.contiguous()
        return self._blocks[1]

    def step_length(self, steps):
        """The length of a step, if the box's diagonal is `steps` long."""
        return torch.linalg.vector_norm(self.aabb[1] - self.aabb[0]).item() / steps

    def points_in(self, cells, within):
        """Points [M, 3] in `cells` [M], numbered as in `opacity.flatten()`, at `within`, [M, 3] or a number in
        [0, 1], of each."""
        G = self.resolution
        place = torch.stack([cells // (G * G), cells // G % G, cells % G], -1) + within
        return self.aabb[0] + place * ((self.aabb[1] - self.aabb[0]) / G)

    @torch.no_grad()
    def look(self, density, step_length, generator, everywhere):
        """Look at cells, each in a random point, and decide anew which are occupied.

        Args:
          density: function of points [M, 3] -> [M].
          step_length: of the rays' steps.
          generator: of the random numbers, on the CPU: the same for all processes of a run, whatever else they draw.
          everywhere: look at every possible cell.
        """
        def random(*shape):
            return torch.rand(*shape, generator=generator).to(self.opacity.device)

        seen, occupied = self.opacity.view(-1), self.occupied.view(-1)
        cells = (seen > IMPOSSIBLE).nonzero()[:, 0]
        if not everywhere and len(cells) > MOST_CELLS:
            busy = occupied.nonzero()[:, 0]
            cells = torch.cat([some[(random(MOST_CELLS // 2) * len(some)).long().clamp(max=len(some) - 1)]
                               for some in (cells, busy) if len(some)])
        for part in cells.split(MOST_CELLS):
            found = density(self.points_in(part, random(len(part), 3))) * step_length
            seen[part] = torch.maximum(seen[part] * DECAY, found)
        self.decide()

    def decide(self):
        """Which cells are occupied, as far as is known. All possible ones, where none would be."""
        possible = self.opacity > IMPOSSIBLE
        mean = self.opacity.clamp(min=0).sum() / possible.sum().clamp(min=1)
        self.occupied.copy_(possible & (self.opacity > MARGIN * mean.clamp(max=THRESHOLD)))
        if not self.occupied.any():
            self.occupied.copy_(possible)

    def holds(self, points):
        """Whether points [..., 3] are in occupied cells, or outside of the box, where nothing is known; [...]."""
        places = (points - self.aabb[0]) * (self.resolution / (self.aabb[1] - self.aabb[0]))
        inside = ((places >= 0) & (places <= self.resolution)).all(-1)
        x, y, z = places.nan_to_num(0.0).clamp(0, self.resolution - 1).long().unbind(-1)
        return self.occupied[x, y, z] | ~inside

    # --- rays ---

    def lattice(self, rays_o, rays_d, near, far, step_length, offset):
        """The points at which rays may be sampled.

        Args:
          rays_o, rays_d: [N, 3].  near, far: bounds in units of rays_d [N].
          step_length: distance of the points, in units of the box.
          offset: of the first point, in steps [N].
        Returns:
          lattice [N, 3], count [N].
        """
        to_sides = (self.aabb[:, None] - rays_o) / rays_d                     # [2, N, 3]
        outside = ((rays_o < self.aabb[0]) | (rays_o > self.aabb[1])) & (rays_d == 0)
        to_sides = to_sides.nan_to_num(0.0, torch.inf, -torch.inf)
        parallel = rays_d == 0
        entry = torch.where(parallel, -torch.inf, to_sides.amin(0)).amax(-1)
        leave = torch.where(parallel, torch.inf, to_sides.amax(0)).amin(-1)
        start, end = torch.maximum(near, entry), torch.minimum(far, leave)
        dt = step_length / torch.linalg.vector_norm(rays_d, dim=-1)
        count = ((end - start) / dt - offset).ceil().nan_to_num(0.0).clamp(0, MOST_STEPS).long()
        count = torch.where(outside.any(-1), 0, count)
        return torch.stack([start, dt, offset], -1), count

    def march(self, rays_o, rays_d, lattice, count, begin=None, most=MOST_STEPS):
        """Those points of the lattice that lie in occupied cells.

        Args:
          begin: the point of each ray to begin with [N]; 0 if not given.
          most: so many of a ray at most.
        Returns:
          t [M], ray_index [M], first [N + 1] (see `packed.py`), resume [N]: the points to begin with next time.
        """
        begin = torch.zeros_like(count) if begin is None else begin
        if rays_o.device.type == 'cpu' and compiled('occupancy') is not None:
            return self._march_compiled(rays_o, rays_d, lattice, count, begin, most)
        return self.march_plain(rays_o, rays_d, lattice, count, begin, most)

    def meets(self, ray_batch):
        """Whether rays [N, 8 or more] (origin, direction, near, far) pass an occupied cell, looked at twice in each, or
        leave the box; [N]."""
        rays_o, rays_d = ray_batch[:, 0:3].contiguous(), ray_batch[:, 3:6].contiguous()
        near, far = ray_batch[:, 6], ray_batch[:, 7]
        step = ((self.aabb[1] - self.aabb[0]).amin() / (2 * self.resolution)).item()
        lattice, count = self.lattice(rays_o, rays_d, near, far, step, torch.zeros_like(near))
        _, _, first, _ = self.march(rays_o, rays_d, lattice, count, most=1)
        ends = [rays_o + rays_d * t[:, None] for t in (near, far)]
        outside = [((end < self.aabb[0]) | (end > self.aabb[1])).any(-1) for end in ends]
        return (first.diff() > 0) | outside[0] | outside[1]

    def march_plain(self, rays_o, rays_d, lattice, count, begin, most):
        """The plain twin."""
        width = int((count - begin).max().clamp(min=1)) if len(count) else 1
        parts = [self._march_together(*part, most) for part in zip(*[
            whole.split(max(1, LATTICE_AT_ONCE // width)) for whole in (rays_o, rays_d, lattice, count, begin)])]
        t, found, resume = (torch.cat(part) for part in zip(*parts))
        first = torch.cat([found.new_zeros(1), found.cumsum(0)])
        return t, torch.arange(len(count), device=t.device).repeat_interleave(found), first, resume

    def _march_together(self, rays_o, rays_d, lattice, count, begin, most):
        width = (count - begin).max().clamp(min=1)
        k = begin[:, None] + torch.arange(width, device=count.device)                      # [N, K]
        start, dt, offset = lattice[..., None].unbind(1)
        t = start + (k + offset) * dt
        G = self.resolution
        places = (rays_o[:, None] + t[..., None] * rays_d[:, None] - self.aabb[0]) * (G / (self.aabb[1] - self.aabb[0]))
        x, y, z = places.nan_to_num(0.0).clamp(0, G - 1).long().unbind(-1)
        hit = self.occupied[x, y, z] & (k < count[:, None])
        hit &= hit.cumsum(-1) <= most
        found = hit.sum(-1)
        last = (hit * (k + 1)).amax(-1)
        return t[hit], found, torch.where(found == most, last, count)

    def _march_compiled(self, rays_o, rays_d, lattice, count, begin, most):
        N, G = len(count), self.resolution
        scale = G / (self.aabb[1] - self.aabb[0])
        blocks = self.blocks()
        rays = torch.cat([rays_o, rays_d], -1)
        found, resume, first = torch.empty_like(count), torch.empty_like(count), count.new_zeros(N + 1)
        grid = (self.occupied, blocks, G, self.aabb[0], scale)
        lattice = lattice.contiguous()
        call('occupancy', 'march', rays, lattice, count, begin, N, most, *grid, found, resume, None, None, None)
        torch.cumsum(found, 0, out=first[1:])
        t, ray_index = rays.new_empty(int(first[-1])), first.new_empty(int(first[-1]))
        call('occupancy', 'march', rays, lattice, count, begin, N, most, *grid, found, resume, first, t, ray_index)
        return t, ray_index, first, resume
