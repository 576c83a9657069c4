"""Rendering through an occupancy grid: samples only in occupied cells, any number of them for a ray."""
import sys

import torch

from accel.occupancy import OccupancyGrid
from accel.packed import MAX_OPTICAL_DEPTH, OUT_CHANNELS, PackedSamples, composite, composite_onto
from accel.renderer import Renderer
from run_nerf_helpers import by_device, disparity

# The grid is updated once in this many training steps.
UPDATE_EVERY_N_STEPS = 16
# The first updates of a new grid, this many, evaluate every cell.
WARMUP_UPDATES = 15
# Without gradients, rays advance until they have about this many new samples altogether.
SAMPLES_PER_ADVANCE = {'cpu': 2 ** 16, 'cuda': 2 ** 21}
# At most this many rays advance together, by type of device.
MAX_RAYS = {'cpu': 2 ** 15, 'cuda': 2 ** 20}
# Each advance takes at least this many samples of a ray, if it has them.
MIN_SAMPLES_PER_ADVANCE = 4


class GridRenderer(Renderer):
    """Renders one network by samples in the occupied cells of a grid that follows its density.

    Args:
      grid: an `OccupancyGrid`; a new one if not given.
      seed: determines the points at which the grid is updated.
    """

    def __init__(self, grid=None, seed=0):
        super().__init__()
        self.grid, self.seed = OccupancyGrid() if grid is None else grid, seed
        self.register_buffer('num_updates', torch.tensor(0))  # since the grid was new

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False,
                    perturb=0., N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0.,
                    verbose=False, pytest=False, retsamples=False):
        """Render rays by samples in steps of the box's diagonal divided by N_samples. Without gradients, the
        network is not evaluated behind what is opaque.

        Args: as those of `render_rays` in run_nerf.py.
        Returns:
          dict: rgb_map, disp_map, acc_map, depth_map; with retsamples and gradients `packed`, the
            `PackedSamples`.
        Raises:
          ValueError: retraw, lindisp, pytest or N_importance, which are not available.
        """
        if retraw or lindisp or pytest or N_importance:
            raise ValueError('GridRenderer does not support retraw, lindisp, pytest and N_importance')
        near, uses_viewdirs, fixed = ray_batch[:, 6], ray_batch.shape[-1] > 8, ray_batch.detach()
        step_size = self.grid.step_size(N_samples)
        jitter = torch.rand_like(near) if perturb > 0 else torch.full_like(near, 0.5)
        spacing, num_candidates = self.grid.candidates(fixed, step_size, jitter)
        step_sizes = torch.full_like(near, step_size)

        def query(t, ray_indices, steps_and_offsets=None):
            rays = ray_batch.index_select(0, ray_indices)                              # [M, 8 or 11]
            pts = torch.addcmul(rays[:, :3], rays[:, 3:6], t[:, None])                 # [M, 3]
            raw = network_query_fn.at_points(pts, rays[:, 8:11] if uses_viewdirs else None, network_fn,
                                             steps_and_offsets)
            raw = raw[:, :4] if raw.shape[-1] > 4 else raw
            if raw_noise_std > 0:
                raw = torch.cat([raw[:, :3], raw[:, 3:] + raw_noise_std * torch.randn_like(raw[:, 3:])], -1)
            return raw

        if not torch.is_grad_enabled():
            out = self.render_until_opaque(query, ray_batch, spacing, num_candidates, step_sizes)
            return split_maps(out, white_bkgd)
        t, ray_indices, offsets = self.grid.march(fixed, spacing, num_candidates)
        # noise would show what is hidden without it
        steps_and_offsets = None if raw_noise_std > 0 else (step_sizes, offsets)
        raw = query(t, ray_indices, steps_and_offsets)
        out, weights = composite(raw, t, ray_indices, step_sizes, offsets)
        ret = split_maps(out, white_bkgd)
        if retsamples:
            ret['packed'] = PackedSamples(weights, t, spacing[:, 1], ray_indices)
        return ret

    def render_until_opaque(self, query, ray_batch, spacing, num_candidates, step_sizes):
        """`composite` a few samples of each ray at a time, leaving out rays that have become opaque; returns
        [N_rays, 5]."""
        out, optical_depth = step_sizes.new_zeros(len(step_sizes), OUT_CHANNELS), torch.zeros_like(step_sizes)
        begin = torch.zeros_like(num_candidates)
        alive = torch.arange(len(begin), device=begin.device)
        samples_per_advance = by_device(SAMPLES_PER_ADVANCE, ray_batch.device)
        while len(alive):
            max_samples = max(MIN_SAMPLES_PER_ADVANCE, samples_per_advance // len(alive))
            t, ray_indices, offsets = self.grid.march(ray_batch, spacing, num_candidates, begin, alive,
                                                      max_samples)
            composite_onto(query(t, ray_indices), t, step_sizes, offsets, optical_depth, out, alive)
            unfinished = (begin < num_candidates) & (optical_depth <= MAX_OPTICAL_DEPTH)
            alive = alive[unfinished[alive]]
        return out

    def spread(self, extras, t, near, far):
        packed = extras['packed']
        distance = (packed.t - t[packed.ray_indices, 0]).abs() / (far - near)
        return torch.ones_like(packed.dt).index_add(0, packed.ray_indices, packed.weights * (distance - 1))

    def count_samples(self, rays, N_samples, near=0., far=1., **kwargs):
        bounds = torch.ones_like(rays[0, ..., :1])
        ray_batch = torch.cat([*rays, near * bounds, far * bounds], -1).flatten(0, -2)
        step_size, jitter = self.grid.step_size(N_samples), torch.full_like(ray_batch[:, 6], 0.5)
        *_, offsets = self.grid.march(ray_batch, *self.grid.candidates(ray_batch, step_size, jitter))
        return offsets.diff().view(bounds.shape[:-1])

    def update(self, step, network_fn, network_query_fn, N_samples, **kwargs):
        """Update the grid from the network's density, every UPDATE_EVERY_N_STEPS steps."""
        if step % UPDATE_EVERY_N_STEPS:
            return

        def density(points):
            return torch.relu(network_query_fn.density(points, network_fn))
        all_cells, device = bool(self.num_updates < WARMUP_UPDATES), self.num_updates.device
        # the same random points in all processes of a run, which have different random states
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            torch.manual_seed(self.seed + step)
            self.grid.update(density, self.grid.step_size(N_samples), all_cells)
        self.num_updates += 1

    def reset(self):
        self.grid.reset()
        self.num_updates.zero_()

    def max_rays(self, device, N_samples, N_importance=0, **kwargs):
        """In training any number, because a batch limits its samples itself."""
        return sys.maxsize if torch.is_grad_enabled() else by_device(MAX_RAYS, device)


def split_maps(out, white_bkgd):
    """What `composite` returns for rays, [N_rays, 5], as a dict of the maps that `render_rays` returns."""
    rgb_map, acc_map, depth_map = out.split([3, 1, 1], -1)
    acc_map, depth_map = acc_map.squeeze(-1), depth_map.squeeze(-1)
    disp_map = disparity(depth_map, acc_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[:, None])
    return {'rgb_map': rgb_map, 'disp_map': disp_map, 'acc_map': acc_map, 'depth_map': depth_map}
