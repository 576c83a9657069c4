"""`render_rays` through an occupancy grid, and batches of rays that come to a fixed number of samples."""
import torch
import torch.nn.functional as F

from accel.occupancy import ALL_CELLS_UNTIL, EVERY
from accel.packed import MOST_PASSED, composite, composite_onto

SAMPLES_AT_ONCE = {'cpu': 2 ** 16, 'cuda': 2 ** 21}   # rendering takes rays forward until it has about so many
ROUND = 8192  # oneDNN compiles kernels for each new number of samples: a few too many, so that there are few numbers
EMPTY = 1e-10


def render_rays_in_grid(ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False, perturb=0.,
                        N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0., verbose=False,
                        pytest=False):
    """Render rays by samples in the occupied cells of `network_fn.occupancy` alone, in steps of the box's diagonal divided
    by N_samples. What `render_rays` in run_nerf.py is, with one network; without gradients, rays that have become opaque
    go no further.

    Args: as there; `raw`, `lindisp`, `pytest` and a fine network are not to be had.
    Returns:
      dict: rgb_map, disp_map, acc_map.
    """
    rays_o, rays_d = ray_batch[:, 0:3].contiguous(), ray_batch[:, 3:6].contiguous()
    near, far = ray_batch[:, 6], ray_batch[:, 7]
    viewdirs = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
    grid, device_type = network_fn.occupancy, ray_batch.device.type
    step_length = grid.step_length(N_samples)
    offset = torch.rand_like(near) if perturb > 0 else torch.full_like(near, 0.5)
    lattice, count = grid.lattice(rays_o, rays_d, near, far, step_length, offset)
    length = torch.full_like(near, step_length)

    def query(t, ray_index):
        M = len(t)
        if M % ROUND and device_type == 'cpu':
            t, ray_index = (F.pad(part, (0, -M % ROUND)) for part in (t, ray_index))
        pts = rays_o[ray_index] + rays_d[ray_index] * t[:, None]                            # [M, 3]
        raw = network_query_fn(pts[:, None], None if viewdirs is None else viewdirs[ray_index], network_fn)[:M, 0]
        if raw_noise_std > 0:
            raw = torch.cat([raw[:, :3], raw[:, 3:4] + raw_noise_std * torch.randn_like(raw[:, 3:4])], -1)
        return raw[:, :4]

    if torch.is_grad_enabled():
        t, ray_index, first, _ = grid.march(rays_o, rays_d, lattice, count)
        grid.samples_of_a_ray.fill_(len(t) / max(len(ray_batch), 1))
        out = composite(query(t, ray_index), t, ray_index, length, first)
    else:
        out = _until_opaque(grid, query, rays_o, rays_d, lattice, count, length)
    return maps(out, white_bkgd)


def _until_opaque(grid, query, rays_o, rays_d, lattice, count, length):
    """`composite` of rays, a few samples further at a time, those that light still passes; [N_rays, 5]."""
    out, passed = length.new_zeros(len(length), 5), torch.zeros_like(length)
    alive = (count > 0).nonzero()[:, 0]
    begin = torch.zeros_like(alive)
    at_once = SAMPLES_AT_ONCE.get(length.device.type, SAMPLES_AT_ONCE['cuda'])
    while len(alive):
        most = max(4, at_once // len(alive))
        t, ray_index, first, begin = grid.march(rays_o[alive], rays_d[alive], lattice[alive], count[alive], begin, most)
        raw = query(t, alive[ray_index])
        out[alive], passed[alive] = composite_onto(raw, t, ray_index, length[alive], first, passed[alive], out[alive])
        going_on = (begin < count[alive]) & (passed[alive] <= MOST_PASSED)
        alive, begin = alive[going_on], begin[going_on]
    return out


def maps(out, white_bkgd):
    """[N_rays, 5] as `composite` gives it to the maps that `render_rays` returns."""
    rgb_map, acc_map, depth_map = out[:, :3], out[:, 3], out[:, 4]
    empty = acc_map < EMPTY
    disp_map = torch.where(empty, 0.0, acc_map / torch.where(empty, 1.0, depth_map).clamp(min=1e-10))
    if white_bkgd:
        rgb_map = rgb_map + (1.0 - acc_map[:, None])
    return {'rgb_map': rgb_map, 'disp_map': disp_map, 'acc_map': acc_map}


class GridBatches:
    """Batches of as many rays as come to `samples` samples; and the grid's looks at the network, when they are due.

    Args:
      batches: a `RayBatcher`; its N_rand is the most rays.
      render_kwargs: of training.
      samples: for each step.
      seed: of the points at which the grid looks.
    """

    def __init__(self, batches, render_kwargs, samples, seed):
        self.batches, self.samples, self.seed, self.most_rays = batches, samples, seed, batches.N_rand
        self.share = batches.share
        self.network, self.query = render_kwargs['network_fn'], render_kwargs['network_query_fn']
        self.N_samples, self.use_viewdirs = render_kwargs['N_samples'], render_kwargs['use_viewdirs']

    def density(self, points):
        """[M, 3] -> [M]."""
        direction = points.new_tensor([[0.0, 0.0, 1.0]]).expand(len(points), 3) if self.use_viewdirs else None
        return torch.relu(self.query(points[:, None], direction, self.network)[:, 0, 3])

    def draw(self, step):
        grid = self.network.occupancy
        if step % EVERY == 0:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2 ** 63)
            grid.look(self.density, grid.step_length(self.N_samples), generator, step < ALL_CELLS_UNTIL)
        expected = grid.samples_of_a_ray.item() or self.N_samples / 4
        self.batches.N_rand = max(1, min(self.most_rays, int(self.samples / expected)))
        return self.batches.draw(step)
