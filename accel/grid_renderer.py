"""Rendering through an occupancy grid: samples in occupied cells alone, any number of them for a ray."""
import torch

from accel.occupancy import OccupancyGrid
from accel.packed import MAX_OPTICAL_DEPTH, PackedSamples, composite, composite_onto
from accel.renderer import Renderer
from run_nerf_helpers import disparity

# Training steps between updates of the grid.
UPDATE_EVERY_N_STEPS = 16
# Up to this step an update evaluates every cell.
WARMUP_STEPS = 256
# Without gradients, rays advance until they have about this many new samples together.
SAMPLES_AT_ONCE = {'cpu': 2 ** 16, 'cuda': 2 ** 21}


class GridRenderer(Renderer):
    """Renders one network by samples in the occupied cells of a grid that follows its density.

    Args:
      grid: an `OccupancyGrid`; a new one if not given.
      seed: of the points at which the grid is updated.
    """

    def __init__(self, grid=None, seed=0):
        super().__init__()
        self.grid, self.seed = OccupancyGrid() if grid is None else grid, seed

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False, perturb=0.,
                    N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0., verbose=False, pytest=False,
                    retsamples=False):
        """Render rays by samples in steps of the box's diagonal divided by N_samples; without gradients, rays end where
        they have become opaque.

        Args: as those of `render_rays` in run_nerf.py; raw, lindisp, pytest and a fine network are not available.
        Returns:
          dict: rgb_map, disp_map, acc_map, depth_map; num_samples [N_rays], the samples of each ray; with retsamples and
          gradients `packed`, the `PackedSamples`.
        """
        rays_o, rays_d = ray_batch[:, 0:3].contiguous(), ray_batch[:, 3:6].contiguous()
        near, far = ray_batch[:, 6], ray_batch[:, 7]
        viewdirs = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
        step_length = self.grid.step_length(N_samples)
        offset = torch.rand_like(near) if perturb > 0 else torch.full_like(near, 0.5)
        lattice, num_points = self.grid.lattice(rays_o, rays_d, near, far, step_length, offset)
        lengths = torch.full_like(near, step_length)

        def query(t, ray_indices):
            pts = rays_o[ray_indices] + rays_d[ray_indices] * t[:, None]                        # [M, 3]
            dirs = None if viewdirs is None else viewdirs[ray_indices]
            raw = network_query_fn.at_points(pts, dirs, network_fn)[:, :4]
            if raw_noise_std > 0:
                raw = torch.cat([raw[:, :3], raw[:, 3:] + raw_noise_std * torch.randn_like(raw[:, 3:])], -1)
            return raw

        if not torch.is_grad_enabled():
            out, num_samples = self.render_until_opaque(query, rays_o, rays_d, lattice, num_points, lengths)
            return {**maps(out, white_bkgd), 'num_samples': num_samples}
        t, ray_indices, offsets, _ = self.grid.march(rays_o, rays_d, lattice, num_points)
        out, weights = composite(query(t, ray_indices), t, ray_indices, lengths, offsets)
        ret = {**maps(out, white_bkgd), 'num_samples': offsets.diff()}
        if retsamples:
            half = 0.5 * lattice[:, 1][ray_indices]  # half a step, in units of rays_d
            ret['packed'] = PackedSamples(weights, t - half, t + half, ray_indices, len(ray_batch))
        return ret

    def render_until_opaque(self, query, rays_o, rays_d, lattice, num_points, lengths):
        """`composite` of all rays, a few samples further at a time, without those that have become opaque.

        Returns [N_rays, 5] and the number of samples of each ray.
        """
        out, optical_depth = lengths.new_zeros(len(lengths), 5), torch.zeros_like(lengths)
        num_samples = torch.zeros_like(num_points)
        alive = (num_points > 0).nonzero()[:, 0]
        begin = torch.zeros_like(alive)
        at_once = SAMPLES_AT_ONCE.get(lengths.device.type, SAMPLES_AT_ONCE['cuda'])
        while len(alive):
            t, ray_indices, offsets, begin = self.grid.march(
                rays_o[alive], rays_d[alive], lattice[alive], num_points[alive], begin, max(4, at_once // len(alive)))
            num_samples[alive] += offsets.diff()
            raw = query(t, alive[ray_indices])
            out[alive], optical_depth[alive] = composite_onto(raw, t, ray_indices, lengths[alive], offsets,
                                                              optical_depth[alive], out[alive])
            unfinished = (begin < num_points[alive]) & (optical_depth[alive] <= MAX_OPTICAL_DEPTH)
            alive, begin = alive[unfinished], begin[unfinished]
        return out, num_samples

    def update(self, step, network_fn, network_query_fn, N_samples, **kwargs):
        """Let the grid follow the network, every UPDATE_EVERY_N_STEPS steps."""
        if step % UPDATE_EVERY_N_STEPS:
            return

        def density(points):
            return torch.relu(network_query_fn.density(points, network_fn))
        generator = torch.Generator().manual_seed(self.seed + step)
        self.grid.update(density, self.grid.step_length(N_samples), generator, all_cells=step < WARMUP_STEPS)

    def reset_parameters(self):
        self.grid.reset_parameters()

    def samples_per_ray(self, N_samples, N_importance):
        """The number of samples is bounded elsewhere: in training by the batch, in rendering by SAMPLES_AT_ONCE."""
        return 1


def maps(out, white_bkgd):
    """What `composite` returns, [N_rays, 5], as the maps that `render_rays` returns."""
    rgb_map, acc_map, depth_map = out[:, :3], out[:, 3], out[:, 4]
    disp_map = disparity(depth_map, acc_map)
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[:, None])
    return {'rgb_map': rgb_map, 'disp_map': disp_map, 'acc_map': acc_map, 'depth_map': depth_map}
