"""Rendering through an occupancy grid: samples only in occupied cells, any number of them for a ray."""
import sys

import torch

from accel.occupancy import OccupancyGrid
from accel.packed import MAX_OPTICAL_DEPTH, OUT_CHANNELS, PackedSamples, composite, composite_onto
from accel.renderer import Renderer
from run_nerf_helpers import disparity, split_rays

# The grid is updated once in this many training steps.
UPDATE_EVERY_N_STEPS = 16
# The first updates of a new grid, this many, evaluate every cell.
WARMUP_UPDATES = 15
# Without gradients, rays advance until they have about this many new samples altogether.
SAMPLES_PER_ADVANCE = {'cpu': 2 ** 16, 'cuda': 2 ** 21}
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
          dict: rgb_map, disp_map, acc_map, depth_map; num_samples [N_rays], the samples of each ray; with
            retsamples and gradients `packed`, the `PackedSamples`.
        Raises:
          ValueError: retraw, lindisp, pytest or N_importance, which are not available.
        """
        if retraw or lindisp or pytest or N_importance:
            raise ValueError('GridRenderer does not support retraw, lindisp, pytest and N_importance')
        rays_o, rays_d, near, far, viewdirs = split_rays(ray_batch)
        near, far = near[:, 0], far[:, 0]
        step_size = self.grid.step_size(N_samples)
        jitter = torch.rand_like(near) if perturb > 0 else torch.full_like(near, 0.5)
        spacing, num_candidates = self.grid.candidates(rays_o, rays_d, near, far, step_size, jitter)
        step_sizes = torch.full_like(near, step_size)

        def query(t, ray_indices):
            pts = rays_o[ray_indices] + rays_d[ray_indices] * t[:, None]               # [M, 3]
            dirs = None if viewdirs is None else viewdirs[ray_indices]
            raw = network_query_fn.at_points(pts, dirs, network_fn)[:, :4]
            if raw_noise_std > 0:
                raw = torch.cat([raw[:, :3], raw[:, 3:] + raw_noise_std * torch.randn_like(raw[:, 3:])], -1)
            return raw

        if not torch.is_grad_enabled():
            out, num_samples = self.render_until_opaque(query, rays_o, rays_d, spacing, num_candidates,
                                                        step_sizes)
            return {**split_maps(out, white_bkgd), 'num_samples': num_samples}
        t, ray_indices, offsets, _ = self.grid.march(rays_o, rays_d, spacing, num_candidates)
        out, weights = composite(query(t, ray_indices), t, ray_indices, step_sizes, offsets)
        ret = {**split_maps(out, white_bkgd), 'num_samples': offsets.diff()}
        if retsamples:
            half = 0.5 * spacing[:, 1][ray_indices]  # half a step, in units of rays_d
            ret['packed'] = PackedSamples(weights, t - half, t + half, ray_indices, len(ray_batch))
        return ret

    def render_until_opaque(self, query, rays_o, rays_d, spacing, num_candidates, step_sizes):
        """`composite` a few samples of each ray at a time, leaving out rays that have become opaque.

        Returns [N_rays, 5] and the number of samples of each ray.
        """
        out, optical_depth = step_sizes.new_zeros(len(step_sizes), OUT_CHANNELS), torch.zeros_like(step_sizes)
        num_samples = torch.zeros_like(num_candidates)
        alive = (num_candidates > 0).nonzero()[:, 0]
        begin = torch.zeros_like(alive)
        samples_per_advance = SAMPLES_PER_ADVANCE.get(rays_o.device.type, SAMPLES_PER_ADVANCE['cuda'])
        while len(alive):
            max_samples = max(MIN_SAMPLES_PER_ADVANCE, samples_per_advance // len(alive))
            t, ray_indices, offsets, begin = self.grid.march(
                rays_o[alive], rays_d[alive], spacing[alive], num_candidates[alive], begin, max_samples)
            num_samples[alive] += offsets.diff()
            raw = query(t, alive[ray_indices])
            out[alive], optical_depth[alive] = composite_onto(raw, t, ray_indices, step_sizes[alive], offsets,
                                                              optical_depth[alive], out[alive])
            unfinished = (begin < num_candidates[alive]) & (optical_depth[alive] <= MAX_OPTICAL_DEPTH)
            alive, begin = alive[unfinished], begin[unfinished]
        return out, num_samples

    def update(self, step, network_fn, network_query_fn, N_samples, **kwargs):
        """Update the grid from the network's density, every UPDATE_EVERY_N_STEPS steps."""
        if step % UPDATE_EVERY_N_STEPS:
            return

        def density(points):
            return torch.relu(network_query_fn.density(points, network_fn))
        generator = torch.Generator().manual_seed(self.seed + step)
        all_cells = bool(self.num_updates < WARMUP_UPDATES)
        self.grid.update(density, self.grid.step_size(N_samples), generator, all_cells)
        self.num_updates += 1

    def reset(self):
        self.grid.reset()
        self.num_updates.zero_()

    def max_rays(self, device, N_samples, N_importance=0, **kwargs):
        """Any number: a training batch limits its samples itself, and SAMPLES_PER_ADVANCE those of frames."""
        return sys.maxsize


def split_maps(out, white_bkgd):
    """What `composite` returns for rays, [N_rays, 5], as a dict of the maps that `render_rays` returns."""
    rgb_map, acc_map, depth_map = out[:, :3], out[:, 3], out[:, 4]
    disp_map = disparity(depth_map, acc_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[:, None])
    return {'rgb_map': rgb_map, 'disp_map': disp_map, 'acc_map': acc_map, 'depth_map': depth_map}
