"""Occupancy grid (Müller et al., SIGGRAPH 2022): which cells of a bounding box are not empty.

Rays are sampled in steps of equal length, only in occupied cells. While a network trains, the grid follows
its density. A sample that a ray might take is a candidate:

  spacing         [N_rays, 3] start, dt and jitter; candidate k of a ray is at t_k = start + (k + jitter) * dt
  num_candidates  [N_rays]    how many candidates lie in the box, between near and far
"""
import torch
from torch import nn

from accel.kernels.compiled import call_kernel, load_kernels
from run_nerf_helpers import BoundedModule, split_rays

# The grid has this many cells along each side.
RESOLUTION = 128
# Marching skips empty blocks of this many cells along each side; occupancy.c defines the same number.
BLOCK = 8
# Before a cell is evaluated, its recorded optical depth decays by this factor, faster than in instant-ngp
# (0.95).
DECAY = 0.8
# A cell is occupied if its recorded optical depth exceeds OCC_MARGIN * min(OCC_THRE, the mean of all cells).
OCC_THRE = 0.01
# This factor leaves room for points of a cell that are denser than the one that is evaluated.
OCC_MARGIN = 0.25
# After the warm-up, an update evaluates at most this many cells: half of them any cells, half of them
# occupied ones.
MAX_UPDATED_CELLS = 2 ** 17
# A ray has at most this many candidates.
MAX_CANDIDATES = 2 ** 14
# The reference implementation of marching looks up at most this many candidates at once.
MAX_LOOKUPS = 2 ** 22
# Cells that cannot hold anything have this recorded optical depth; they are never evaluated or sampled.
IMPOSSIBLE = -1.0


class CellGrid(BoundedModule):
    """The cells of a bounding box, and which of them are occupied; all at first.

    Args:
      resolution: number G of cells along each side.
    Buffers, in addition to `aabb`:
      occupied: whether rays are sampled in a cell, [G, G, G].
    """

    def __init__(self, resolution):
        super().__init__()
        self.resolution = resolution
        self.register_buffer('occupied', torch.ones([resolution] * 3, dtype=torch.bool))
        self.register_buffer('blocks', any_in_blocks(self.occupied), persistent=False)
        self.register_load_state_dict_post_hook(refresh_blocks)

    def set_occupied(self, occupied):
        """Sample rays in the cells `occupied` [G, G, G]."""
        self.occupied.copy_(occupied)
        self.blocks = any_in_blocks(self.occupied)

    def cell_points(self, cells, position):
        """Points [M, 3] in `cells` [M], numbered as in `occupied.flatten()`, at `position` within each cell:
        [M, 3], [3] or a number, in [0, 1]."""
        G = self.resolution
        index = torch.stack([cells // (G * G), cells // G % G, cells % G], -1)
        return self.aabb[0] + (index + position) * ((self.aabb[1] - self.aabb[0]) / G)

    def maybe_occupied(self, points):
        """Whether points [..., 3] are in occupied cells, or outside the box, where nothing is known;
        [...]."""
        cells = (points - self.aabb[0]) * (self.resolution / (self.aabb[1] - self.aabb[0]))
        inside = ((cells >= 0) & (cells <= self.resolution)).all(-1)
        x, y, z = cells.nan_to_num(0.0).clamp(0, self.resolution - 1).long().unbind(-1)
        return self.occupied[x, y, z] | ~inside

    def candidates(self, rays_o, rays_d, near, far, step_size, jitter):
        """The candidates of rays.

        Args:
          rays_o, rays_d: [N, 3].
          near, far: bounds in units of rays_d [N].
          step_size: distance between candidates, in units of the box.
          jitter: position of the first candidate, in steps [N].
        Returns:
          spacing [N, 3], num_candidates [N]: see above.
        """
        # where the rays cross the three pairs of planes that bound the box; parallel planes bound nothing
        to_sides = (self.aabb[:, None] - rays_o) / rays_d                              # [2, N, 3]
        to_sides = to_sides.nan_to_num(0.0, torch.inf, -torch.inf)
        parallel = rays_d == 0
        enter = torch.where(parallel, -torch.inf, to_sides.amin(0)).amax(-1)
        leave = torch.where(parallel, torch.inf, to_sides.amax(0)).amin(-1)
        misses = (parallel & ((rays_o < self.aabb[0]) | (rays_o > self.aabb[1]))).any(-1)

        start, end = torch.maximum(near, enter), torch.minimum(far, leave)
        dt = step_size / torch.linalg.vector_norm(rays_d, dim=-1)
        num_candidates = ((end - start) / dt - jitter).ceil().nan_to_num(0.0).clamp(0, MAX_CANDIDATES).long()
        return torch.stack([start, dt, jitter], -1), torch.where(misses, 0, num_candidates)

    def march(self, rays_o, rays_d, spacing, num_candidates, begin=None, max_samples=MAX_CANDIDATES):
        """The candidates that lie in occupied cells.

        Args:
          begin: the first candidate to test for each ray [N]; 0 if not given.
          max_samples: the most samples of a ray.
        Returns:
          t [M], ray_indices [M], offsets [N + 1]: the samples, see `packed.py`.
          next_begin [N]: the first candidate that has not been tested.
        """
        begin = torch.zeros_like(num_candidates) if begin is None else begin
        if rays_o.device.type == 'cpu' and load_kernels('occupancy') is not None:
            return self._march_compiled(rays_o, rays_d, spacing, num_candidates, begin, max_samples)
        return self.march_reference(rays_o, rays_d, spacing, num_candidates, begin, max_samples)

    def may_hit(self, ray_batch):
        """Whether rays [N, 8 or more] (origin, direction, near, far) may meet anything: they cross an
        occupied cell, tested twice along its shortest side, or begin or end outside the box; [N]."""
        rays_o, rays_d, near, far, _ = split_rays(ray_batch)
        near, far = near[:, 0], far[:, 0]
        step_size = ((self.aabb[1] - self.aabb[0]).amin() / (2 * self.resolution)).item()
        jitter = torch.zeros_like(near)
        spacing, num_candidates = self.candidates(rays_o, rays_d, near, far, step_size, jitter)
        _, _, offsets, _ = self.march(rays_o, rays_d, spacing, num_candidates, max_samples=1)
        ends = torch.stack([rays_o + rays_d * t[:, None] for t in (near, far)])        # [2, N, 3]
        outside = ((ends < self.aabb[0]) | (ends > self.aabb[1])).any(-1).any(0)
        return (offsets.diff() > 0) | outside

    def march_reference(self, rays_o, rays_d, spacing, num_candidates, begin, max_samples):
        """The reference implementation of `march`."""
        width = max(1, int((num_candidates - begin).max())) if len(begin) else 1
        inputs = rays_o, rays_d, spacing, num_candidates, begin
        parts = zip(*[x.split(max(1, MAX_LOOKUPS // width)) for x in inputs])
        marched = [self._march_part(*part, width, max_samples) for part in parts]
        t, counts, next_begin = (torch.cat(part) for part in zip(*marched))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return t, torch.arange(len(begin), device=t.device).repeat_interleave(counts), offsets, next_begin

    def _march_part(self, rays_o, rays_d, spacing, num_candidates, begin, width, max_samples):
        k = begin[:, None] + torch.arange(width, device=begin.device)                  # [N, K]
        start, dt, jitter = spacing[..., None].unbind(1)
        t = start + (k + jitter) * dt
        G = self.resolution
        points = rays_o[:, None] + t[..., None] * rays_d[:, None]                      # [N, K, 3]
        cells = (points - self.aabb[0]) * (G / (self.aabb[1] - self.aabb[0]))
        x, y, z = cells.nan_to_num(0.0).clamp(0, G - 1).long().unbind(-1)
        hit = self.occupied[x, y, z] & (k < num_candidates[:, None])
        hit &= hit.cumsum(-1) <= max_samples
        counts = hit.sum(-1)
        after_last = (hit * (k + 1)).amax(-1)
        return t[hit], counts, torch.where(counts == max_samples, after_last, num_candidates)

    def _march_compiled(self, rays_o, rays_d, spacing, num_candidates, begin, max_samples):
        N, G = len(begin), self.resolution
        rays = torch.cat([rays_o, rays_d], -1)
        counts, next_begin = torch.empty_like(begin), torch.empty_like(begin)
        inputs = (rays, spacing.contiguous(), num_candidates, begin, N, max_samples, self.occupied,
                  self.blocks, G, self.aabb[0], G / (self.aabb[1] - self.aabb[0]), counts, next_begin)
        call_kernel('occupancy', 'march', *inputs, None, None, None)  # counts the samples
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        t, ray_indices = rays.new_empty(int(offsets[-1])), offsets.new_empty(int(offsets[-1]))
        call_kernel('occupancy', 'march', *inputs, offsets, t, ray_indices)
        return t, ray_indices, offsets, next_begin


class OccupancyGrid(CellGrid):
    """A `CellGrid` that follows the density of a network in training.

    Buffers, in addition to those of `CellGrid`:
      occs: recorded optical depth of a step through each cell [G, G, G]; IMPOSSIBLE where nothing can be.
    """

    def __init__(self, resolution=RESOLUTION):
        super().__init__(resolution)
        self.register_buffer('occs', torch.zeros([resolution] * 3))

    def set_aabb(self, aabb, possible=None):
        super().set_aabb(aabb)
        self.occs.zero_()
        if possible is not None:
            self.occs[~possible.to(self.occs.device)] = IMPOSSIBLE
        self.reset()

    def reset(self):
        """Forget all recorded optical depths: every possible cell is occupied again."""
        possible = self.occs != IMPOSSIBLE
        self.occs.copy_(torch.where(possible, 0.0, IMPOSSIBLE))
        self.set_occupied(possible)

    def step_size(self, num_steps):
        """The length of a step if the diagonal of the box is divided into `num_steps`."""
        return torch.linalg.vector_norm(self.aabb[1] - self.aabb[0]).item() / num_steps

    @torch.no_grad()
    def update(self, density, step_size, generator, all_cells):
        """Evaluate the density at a random point in each of many cells, and decide which cells are occupied.

        Args:
          density: function of points [M, 3] that returns densities [M].
          step_size: length of the rays' steps.
          generator: a generator on the CPU, in the same state in all processes of a run.
          all_cells: evaluate every possible cell.
        """
        def random(*shape):
            return torch.rand(*shape, generator=generator).to(self.occs.device)

        occs, occupied = self.occs.view(-1), self.occupied.view(-1)
        cells = (occs > IMPOSSIBLE).nonzero()[:, 0]
        if not all_cells and len(cells) > MAX_UPDATED_CELLS:
            drawn = [part[(random(MAX_UPDATED_CELLS // 2) * len(part)).long().clamp(max=len(part) - 1)]
                     for part in (cells, occupied.nonzero()[:, 0]) if len(part)]
            cells = torch.cat(drawn)
        for part in cells.split(MAX_UPDATED_CELLS):
            # a network that diverges may return NaN, which would stay in the grid
            found = density(self.cell_points(part, random(len(part), 3))).nan_to_num(0.0) * step_size
            occs[part] = occs[part] * DECAY
            occs.scatter_reduce_(0, part, found, 'amax')  # a cell may be drawn twice
        self.apply_threshold()

    def apply_threshold(self):
        """Decide from the recorded optical depths which cells are occupied: all possible ones if none would
        be."""
        possible = self.occs > IMPOSSIBLE
        mean = self.occs.clamp(min=0).sum() / possible.sum().clamp(min=1)
        occupied = possible & (self.occs > OCC_MARGIN * mean.clamp(max=OCC_THRE))
        self.set_occupied(occupied if occupied.any() else possible)


def refresh_blocks(grid, incompatible_keys):
    """Called after a state has been loaded into `grid`."""
    grid.set_occupied(grid.occupied)


def any_in_blocks(occupied):
    """Which blocks of BLOCK³ cells hold an occupied one; the last block along an axis may be smaller."""
    blocks = nn.functional.pad(occupied, [0, -len(occupied) % BLOCK] * 3)
    for axis in (2, 1, 0):
        blocks = blocks.unflatten(axis, (-1, BLOCK)).any(axis + 1)
    return blocks.contiguous()
