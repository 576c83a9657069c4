"""Occupancy grid (Müller et al., SIGGRAPH 2022): which cells of a bounding box are not empty.

Rays are sampled in steps of equal length, only in occupied cells. While a network trains, the grid follows
its density. A sample that a ray might take is a candidate:

  spacing         [N_rays, 3] start, dt and jitter; candidate k of a ray is at t_k = start + (k + jitter) * dt
  num_candidates  [N_rays]    how many candidates lie in the box, between near and far
"""
import torch
from torch import nn

from accel.kernels.compiled import Kernels
from run_nerf_helpers import BoundedModule

# The grid has this many cells along each side.
RESOLUTION = 128
# Marching skips empty blocks of this many cells along each side; march.c defines the same number.
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
        self.box_changed()
        self.register_load_state_dict_post_hook(state_loaded)

    def set_aabb(self, aabb, possible=None):
        super().set_aabb(aabb)
        self.box_changed()

    def box_changed(self):
        """Measure the box, so that rendering need not read it back from a GPU."""
        sides = self.aabb[1] - self.aabb[0]
        self.diagonal = torch.linalg.vector_norm(sides).item()
        self.shortest_side = sides.amin().item()

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
        inside = ((points >= self.aabb[0]) & (points <= self.aabb[1])).all(-1)
        return self.occupied[self.cell_indices(points)] | ~inside

    def cell_indices(self, points):
        """Indices x, y, z [...] of the cells that hold points [..., 3], or are closest to them."""
        cells = (points - self.aabb[0]) * (self.resolution / (self.aabb[1] - self.aabb[0]))
        return cells.nan_to_num(0.0).clamp(0, self.resolution - 1).long().unbind(-1)

    def candidates(self, ray_batch, step_size, jitter):
        """The candidates of rays.

        Args:
          ray_batch: [N, 8 or more]: origin, direction, near, far.
          step_size: distance between candidates, in units of the box.
          jitter: position of the first candidate, in steps [N].
        Returns:
          spacing [N, 3], num_candidates [N]: see above.
        """
        if not KERNELS.usable(ray_batch.device):
            return self.candidates_reference(ray_batch, step_size, jitter)
        N, ray_batch = len(ray_batch), ray_batch.contiguous()
        spacing, num_candidates = ray_batch.new_empty(N, 3), ray_batch.new_empty(N, dtype=torch.int64)
        KERNELS.call('candidates', N, ray_batch, ray_batch.stride(0), N, self.aabb, step_size, jitter,
                     MAX_CANDIDATES, spacing, num_candidates)
        return spacing, num_candidates

    def candidates_reference(self, ray_batch, step_size, jitter):
        """The reference implementation of `candidates`."""
        rays_o, rays_d, near, far = ray_batch[:, :8].split([3, 3, 1, 1], -1)
        # where the rays cross the three pairs of planes that bound the box; parallel planes bound nothing
        to_sides = (self.aabb[:, None] - rays_o) / rays_d                              # [2, N, 3]
        to_sides = to_sides.nan_to_num(0.0, torch.inf, -torch.inf)
        parallel = rays_d == 0
        enter = torch.where(parallel, -torch.inf, to_sides.amin(0)).amax(-1)
        leave = torch.where(parallel, torch.inf, to_sides.amax(0)).amin(-1)
        misses = (parallel & ((rays_o < self.aabb[0]) | (rays_o > self.aabb[1]))).any(-1)

        start, end = torch.maximum(near[:, 0], enter), torch.minimum(far[:, 0], leave)
        dt = step_size / torch.linalg.vector_norm(rays_d, dim=-1)
        num_candidates = ((end - start) / dt - jitter).ceil().nan_to_num(0.0).clamp(0, MAX_CANDIDATES).long()
        return torch.stack([start, dt, jitter], -1), torch.where(misses, 0, num_candidates)

    def march(self, ray_batch, spacing, num_candidates, begin=None, alive=None, max_samples=MAX_CANDIDATES):
        """The candidates that lie in occupied cells.

        Args:
          ray_batch: [N, 8 or more]; spacing, num_candidates: its `candidates`.
          begin: the first candidate to test for each ray [N]; 0 if not given. Afterwards the first one that
            has not been tested.
          alive: the rays to march along [A]; all if not given.
          max_samples: the most samples of a ray.
        Returns:
          t [M], ray_indices [M], offsets [A + 1]: the samples, see `packed.py`.
        """
        if not KERNELS.usable(ray_batch.device):
            return self.march_reference(ray_batch, spacing, num_candidates, begin, alive, max_samples)
        counts = torch.empty_like(num_candidates if alive is None else alive)
        A, ray_batch = len(counts), ray_batch.contiguous()
        inputs = (ray_batch, ray_batch.stride(0), alive, A, spacing, num_candidates, max_samples,
                  self.occupied, self.blocks, self.resolution, self.aabb, begin)
        KERNELS.call('march', A, *inputs, counts, None, None, None)
        offsets = offsets_of(counts)
        M = int(offsets[-1])
        t, ray_indices = ray_batch.new_empty(M), offsets.new_empty(M)
        KERNELS.call('march', A, *inputs, None, offsets, t, ray_indices)
        return t, ray_indices, offsets

    def march_reference(self, ray_batch, spacing, num_candidates, begin, alive, max_samples):
        """The reference implementation of `march`."""
        begin = torch.zeros_like(num_candidates) if begin is None else begin
        alive = torch.arange(len(begin), device=begin.device) if alive is None else alive
        inputs = ray_batch[alive], spacing[alive], num_candidates[alive], begin[alive]
        width = max(1, int((num_candidates - begin).max())) if len(begin) else 1
        parts = zip(*[x.split(max(1, MAX_LOOKUPS // width)) for x in inputs])
        marched = [self._march_part(*part, width, max_samples) for part in parts]
        t, counts, next_begin = (torch.cat(part) for part in zip(*marched))
        begin[alive] = next_begin
        return t, alive.repeat_interleave(counts), offsets_of(counts)

    def _march_part(self, ray_batch, spacing, num_candidates, begin, width, max_samples):
        k = begin[:, None] + torch.arange(width, device=begin.device)                  # [N, K]
        start, dt, jitter = spacing[..., None].unbind(1)
        t = start + (k + jitter) * dt
        points = ray_batch[:, None, :3] + t[..., None] * ray_batch[:, None, 3:6]       # [N, K, 3]
        hit = self.occupied[self.cell_indices(points)] & (k < num_candidates[:, None])
        hit &= hit.cumsum(-1) <= max_samples
        counts = hit.sum(-1)
        after_last = (hit * (k + 1)).amax(-1)
        return t[hit], counts, torch.where(counts == max_samples, after_last, num_candidates)

    def may_hit(self, ray_batch):
        """Whether rays [N, 8 or more] (origin, direction, near, far) may meet anything: they cross an
        occupied cell, tested twice along its shortest side, or begin or end outside the box; [N]."""
        step_size = self.shortest_side / (2 * self.resolution)
        jitter = torch.zeros_like(ray_batch[:, 0])
        _, _, offsets = self.march(ray_batch, *self.candidates(ray_batch, step_size, jitter), max_samples=1)
        ends = ray_batch[:, None, :3] + ray_batch[:, 6:8, None] * ray_batch[:, None, 3:6]  # [N, 2, 3]
        outside = ((ends < self.aabb[0]) | (ends > self.aabb[1])).flatten(1).any(-1)
        return (offsets.diff() > 0) | outside


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
        return self.diagonal / num_steps

    @torch.no_grad()
    def update(self, density, step_size, all_cells):
        """Evaluate the density at a random point in each of many cells, and decide which cells are occupied.
        Random numbers are torch's.

        Args:
          density: function of points [M, 3] that returns densities [M].
          step_size: length of the rays' steps.
          all_cells: evaluate every possible cell.
        """
        def random(*shape):
            return torch.rand(*shape, device=self.occs.device)

        occs, occupied = self.occs.view(-1), self.occupied.view(-1)
        cells = (occs > IMPOSSIBLE).nonzero()[:, 0]
        if not all_cells and len(cells) > MAX_UPDATED_CELLS:
            drawn = [part[(random(MAX_UPDATED_CELLS // 2) * len(part)).long().clamp(max=len(part) - 1)]
                     for part in (cells, occupied.nonzero()[:, 0]) if len(part)]
            cells = torch.cat(drawn)
        # parts stay in a CPU's caches; a GPU takes all cells at once
        for part in cells.split(MAX_UPDATED_CELLS) if occs.device.type == 'cpu' else [cells]:
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
        self.set_occupied(torch.where(occupied.any(), occupied, possible))


def state_loaded(grid, incompatible_keys):
    """Called after a state has been loaded into `grid`."""
    grid.set_occupied(grid.occupied)
    grid.box_changed()


def offsets_of(counts):
    """Where the samples of each ray begin, and the end of the last ones [N + 1], from their `counts` [N]."""
    offsets = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def any_in_blocks(occupied):
    """Which blocks of BLOCK³ cells hold an occupied one; the last block along an axis may be smaller."""
    blocks = nn.functional.pad(occupied, [0, -len(occupied) % BLOCK] * 3)
    for axis in (2, 1, 0):
        blocks = blocks.unflatten(axis, (-1, BLOCK)).any(axis + 1)
    return blocks.contiguous()


def check_kernels(device):
    """Raise AssertionError if the kernels differ from their references on `device`."""
    generator = torch.Generator('cpu').manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, device='cpu').to(device)

    grid = CellGrid(20).to(device)
    grid.set_occupied(random(20, 20, 20) < 0.1)
    N = 65
    ray_batch = torch.cat([2 * random(N, 3) - 1, random(N, 3) - 0.5, random(N, 1), 3 + random(N, 1)], -1)
    spacing, num_candidates = grid.candidates(ray_batch, 0.05, random(N))
    expected, expected_number = grid.candidates_reference(ray_batch, 0.05, spacing[:, 2])
    torch.testing.assert_close(spacing, expected, rtol=1e-4, atol=1e-4)
    assert (num_candidates - expected_number).abs().max() <= 1  # rounded another way

    begin, alive = torch.ones_like(num_candidates), torch.arange(0, N, 2, device=device)
    for max_samples in (2, MAX_CANDIDATES):
        arguments = ray_batch, spacing, num_candidates
        expected_begin = begin.clone()
        expected = grid.march_reference(*arguments, expected_begin, alive, max_samples)
        found = grid.march(*arguments, begin, alive, max_samples)
        # candidates on a border may be rounded into either cell
        (t, ray_indices, offsets), (expected_t, _, expected_offsets) = found, expected
        counts, expected_counts = offsets.diff(), expected_offsets.diff()
        same = counts == expected_counts                                               # [A]
        assert (counts - expected_counts).abs().max() <= 1 and (~same).sum() <= N // 20, 'counts of march'
        assert ray_indices.equal(alive.repeat_interleave(counts)), 'ray_indices of march'
        close = t[same.repeat_interleave(counts)].isclose(expected_t[same.repeat_interleave(expected_counts)])
        assert close.float().mean() > 0.9, 't of march'
        assert (begin == expected_begin).float().mean() > 0.9, 'begin of march'
        begin = expected_begin


KERNELS = Kernels('march', check_kernels)
