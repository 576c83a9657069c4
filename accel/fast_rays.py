"""Faster rendering of trained networks: samples that cannot be seen are left out.

The density of each network is baked into a grid. Rays keep the samples that they would have, but the networks are asked for
those alone that lie in cells which hold something, and not for those behind what is opaque. Of each frame CHECKED rays are
rendered exactly too: where they differ by more than TOLERANCE, or MEAN_TOLERANCE in the mean, a more precise way is taken,
and in the end the exact one.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from accel.occupancy import OccupancyGrid
from accel.packed import MOST_PASSED

TOLERANCE = 0.1           # largest difference of a colour channel, and
MEAN_TOLERANCE = 0.003    # root mean square: 0.04 dB of a picture that is right to 30 dB
CHECKED = 1024            # rays of a frame that are rendered both ways, one in CHECKED_SHARE at most
CHECKED_SHARE = 16
LEAST_ALPHA = 1e-4        # opacity of a coarse sample; cells with less are empty
FINEST = 64               # cells along a side, for large images
DIVIDED = 4               # each of those that hold anything, so often along each side
BAKING = 8                # points that are looked at for each large cell, about
GROUP = 32                # samples of a ray that are asked for together
POINTS_AT_ONCE = 2 ** 18  # in baking
ROUND = 256               # oneDNN compiles kernels for each new number of points: there are few numbers
TRANSPARENT = -1.0        # density before its ReLU


class FastRays:
    """What takes the place of `render_rays`.

    Args:
      render_rays: the function of run_nerf.py.
      queries: network_query_fn to use, the fastest first.
      box: [2, 3] where rays are; what lies outside is not left out.
      say: called with a line where something is chosen.
    """

    def __init__(self, render_rays, queries, box, say=lambda line: None):
        self.render_rays, self.queries, self.box, self.say = render_rays, queries, torch.as_tensor(box), say
        self.baked, self.grids, self.said = None, {}, set()

    def choose(self, rays_flat, **kwargs):
        """What renders these rays, all of a frame: a function as `render_rays`. Nothing depends on earlier frames, so that
        it does not matter who renders which."""
        networks = [network for network in (kwargs['network_fn'], kwargs['network_fine']) if network is not None]
        resolution = min(FINEST, 2 ** math.ceil(math.log2(max(8.0, math.sqrt(len(rays_flat)) / 4))))
        cost = len(networks) * BAKING * resolution ** 3
        cost_exact = (kwargs['N_samples'] + kwargs['N_importance']) * len(rays_flat)
        random = kwargs['perturb'] or kwargs['raw_noise_std']
        if torch.is_grad_enabled() or random or kwargs.get('retraw') or cost > cost_exact:
            return self.render_rays
        version = [resolution, *((p.data_ptr(), p._version) for network in networks for p in network.parameters())]
        if version != self.baked:
            self.grids = {network: self.bake(network, resolution, rays_flat, **kwargs) for network in networks}
            self.baked = version
        some = rays_flat[torch.linspace(0, len(rays_flat) - 1, min(CHECKED, len(rays_flat) // CHECKED_SHARE + 1)).long()]
        exact = self.render_rays(some, **kwargs)['rgb_map']
        for query in self.queries:
            fast = partial(self.fast, query)
            difference = fast(some, **kwargs)['rgb_map'] - exact
            largest, mean = difference.abs().max().item(), difference.square().mean().sqrt().item()
            if largest <= TOLERANCE and mean <= MEAN_TOLERANCE:
                return fast
            if query not in self.said:
                self.said.add(query)
                less = 'with float32' if query is not self.queries[-1] else 'exactly'
                self.say(f'fast rendering: pixels would differ by up to {largest:.3f}, {mean:.4f} in the mean, more than '
                         f'{TOLERANCE} or {MEAN_TOLERANCE}; such frames are rendered {less}')
        return self.render_rays

    @torch.no_grad()
    def bake(self, network, resolution, rays, **kwargs):
        """The cells in which `network` is not transparent, and those around them: large cells, looked at in their corners
        and centres; of those that hold anything, small ones."""
        least = LEAST_ALPHA * kwargs['N_samples'] / (rays[0, 7] - rays[0, 6]).item()
        direction = rays[:1, -3:] if rays.shape[-1] > 8 else None

        def opaque(points):
            def ask(pts):
                views = None if direction is None else direction.expand(len(pts), 3)
                return self.queries[0](pts[:, None], views, network)[:, 0, 3] > least
            return torch.cat([ask(pts) for pts in points.split(POINTS_AT_ONCE)])

        large = OccupancyGrid(resolution).to(rays.device)
        large.restrict(self.box.to(rays.device))
        G, side = resolution, (large.aabb[1] - large.aabb[0]) / resolution
        corners = large.aabb[0] + side * lattice_points([G + 1] * 3, rays.device)
        holds = F.max_pool3d(opaque(corners).view(1, 1, G + 1, G + 1, G + 1).float(), 2, 1)
        centers = large.points_in(torch.arange(G ** 3, device=rays.device), 0.5)
        holds = with_neighbours(holds[0, 0].bool() | opaque(centers).view(G, G, G))

        small = OccupancyGrid(resolution * DIVIDED).to(rays.device)
        small.restrict(self.box.to(rays.device))
        small.opacity = small.opacity.new_empty(0)  # of so many cells it would be large, and nothing looks at it
        inner = lattice_points([DIVIDED] * 3, rays.device).long()
        cells = (holds.nonzero()[:, None] * DIVIDED + inner).reshape(-1, 3)
        found = torch.cat([opaque(large.aabb[0] + (part + 0.5) * (side / DIVIDED)) for part in cells.split(POINTS_AT_ONCE)])
        small.occupied.zero_()
        small.occupied[cells[found].unbind(-1)] = True
        small.occupied.copy_(with_neighbours(small.occupied))
        return small

    @torch.no_grad()
    def fast(self, query, ray_batch, network_fn, network_query_fn, network_fine=None, white_bkgd=False, **kwargs):
        """`render_rays` of those rays that meet anything; the others show the background."""
        networks = [network for network in (network_fn, network_fine) if network is not None]
        meets = torch.zeros(len(ray_batch), dtype=torch.bool, device=ray_batch.device)
        views = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
        ends = ray_batch[:, None, 0:3] + ray_batch[:, None, 3:6] * ray_batch[:, None, 7:8]  # the interval there is endless
        for network in networks:
            meets |= self.grids[network].meets(ray_batch) | (query(ends, views, network)[:, 0, 3] > 0)
        out = {'rgb_map': ray_batch.new_full([len(ray_batch), 3], float(white_bkgd))}
        out.update({key: ray_batch.new_zeros(len(ray_batch)) for key in ('disp_map', 'acc_map')})
        if kwargs.get('N_importance'):
            out.update({key + '0': out[f'{key}_map'].clone() for key in ('rgb', 'disp', 'acc')})
            out['z_std'] = out['acc_map'].clone()
        if meets.any():
            found = self.render_rays(ray_batch[meets], network_fn, self.asking(query), network_fine=network_fine,
                                     white_bkgd=white_bkgd, **kwargs)
            for key, value in found.items():
                out[key][meets] = value
        return out

    def asking(self, query):
        """A network_query_fn that asks `query` for what may be seen."""
        def network_query_fn(pts, viewdirs, network):
            N, S = pts.shape[:2]
            wanted = self.grids[network].holds(pts)                                       # [N, S]
            wanted[:, -1] = True
            intervals = torch.linalg.vector_norm(pts[:, 1:] - pts[:, :-1], dim=-1)
            intervals = torch.cat([intervals, torch.zeros_like(intervals[:, :1])], -1)
            raw, passed = pts.new_full([N, S, 4], TRANSPARENT), pts.new_zeros(N)
            for start in range(0, S, GROUP):
                group = slice(start, start + GROUP)
                ray, sample = (wanted[:, group] & (passed <= MOST_PASSED)[:, None]).nonzero(as_tuple=True)
                if len(ray):
                    ray, sample = (F.pad(index, (0, -len(ray) % ROUND), value=index[-1].item()) for index in (ray, sample))
                    views = None if viewdirs is None else viewdirs[ray]
                    raw[ray, start + sample] = query(pts[ray, start + sample][:, None], views, network)[:, 0, :4]
                    passed += (torch.relu(raw[:, group, 3]) * intervals[:, group]).sum(-1)
            return raw
        return network_query_fn


def lattice_points(shape, device):
    """All index triples of an array of `shape`, [., 3] float."""
    return torch.stack(torch.meshgrid(*[torch.arange(count, device=device) for count in shape], indexing='ij'),
                       -1).reshape(-1, 3).float()


def with_neighbours(occupied):
    """Cells [G, G, G] that are occupied, or have an occupied one beside them, diagonally too."""
    for shift in range(3):
        shape = [1, 1] + [3 if axis == shift else 1 for axis in range(3)]
        padding = [size // 2 for size in shape[2:]]
        occupied = F.max_pool3d(occupied[None, None].float(), shape[2:], 1, padding)[0, 0] > 0
    return occupied
