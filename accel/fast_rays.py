"""Faster rendering of trained networks: samples that cannot be seen are left out, near ones are asked for together.

The density of each network is baked into a grid. Rays keep the samples that they would have, but the networks are asked
for those alone that lie in cells which may hold something, and not for those behind what is opaque. There they are asked
with cheaper products, the fine one once for all samples within a fraction of a cell; the coarse one, which places the fine
samples, as precisely as otherwise where its samples have weight. Of each frame CHECKED rays are rendered exactly too: where
their colours and opacities differ by more than TOLERANCE, or MEAN_TOLERANCE in the mean, a more precise way is taken, at
last the exact one.
"""
import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from accel.baking import LARGE, MOST_LOOKS, Baker
from accel.packed import MOST_PASSED

TOLERANCE = 0.1           # largest difference of a colour channel or the opacity, and
MEAN_TOLERANCE = 0.003    # root mean square: 0.04 dB of a picture that is right to 30 dB
CHECKED = 1024            # rays of a frame that are rendered both ways, one in CHECKED_SHARE at most,
CHECKED_SHARE = 64        # but not less than
FEWEST_CHECKED = 256
LOOKS = 6, MOST_LOOKS     # small cells for each large one that baking may cost: at first, and where that does not do
FRAMES = 8                # that the first look of baking may cost
TOGETHER = 0.2, 0.1, 0.0  # of a small cell: samples of a ray in an interval of that length are asked for together
PARTS = 8, 4              # of a ray's coarse and last samples: one is asked for before it is known whether the next is seen
OPAQUE = -math.log(1e-3), MOST_PASSED  # optical depth behind which no coarse and no last sample is asked for
LEAST_WEIGHT = 1e-3       # of coarse samples that are asked for as precisely as otherwise
ROUND = 256               # oneDNN compiles kernels for each new number of points: there are few numbers
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
TRANSPARENT = -1.0        # density before its ReLU


class FastRays:
    """What takes the place of `render_rays`. It gives the maps of the last network only. A ray along which the opacity of
    samples is nowhere `baking.LEAST_ALPHA` is empty, its disparity 0.

    Args:
      render_rays: the function of run_nerf.py.
      queries: network_query_fn to use, the fastest first; the last one is as precise as otherwise.
      box: [2, 3] where rays are; what lies outside is not left out.
      say: called with a line where something is chosen.
    """

    def __init__(self, render_rays, queries, box, say=lambda line: None):
        self.render_rays, self.queries, self.say, self.said = render_rays, queries, say, set()
        self.baker = Baker(queries[0], box)

    def choose(self, rays_flat, **kwargs):
        """What renders these rays, all of a frame: a function as `render_rays`. Nothing depends on earlier frames, so that
        it does not matter who renders which."""
        N_importance, fine = kwargs.get('N_importance', 0), kwargs.get('network_fine')
        networks = [kwargs['network_fn']] + ([fine] if N_importance > 0 and fine is not None else [])
        samples = kwargs['N_samples'] + N_importance
        first_looks = 2 * len(networks) * LARGE ** 3
        random = kwargs.get('perturb') or kwargs.get('raw_noise_std')
        if (torch.is_grad_enabled() or random or kwargs.get('retraw') or kwargs['N_samples'] < 2
                or first_looks > FRAMES * samples * len(rays_flat)):
            return self.render_rays
        self.baker.forget_unless(networks)
        checked = min(CHECKED, max(FEWEST_CHECKED, len(rays_flat) // CHECKED_SHARE), len(rays_flat))
        some = rays_flat[spread(len(rays_flat), checked)]
        exact = colors_and_opacity(self.render_rays(some, **kwargs))
        for query in self.queries:
            tried = set()
            for looks, together in itertools.product(LOOKS, TOGETHER):
                grids = {network: self.baker.grid(network, looks, rays_flat, kwargs['N_samples']) for network in networks}
                way = *grids.values(), together
                if way in tried:  # more looks have changed nothing
                    continue
                tried.add(way)
                fast = partial(self.fast, query, grids, together)
                difference = colors_and_opacity(fast(some, **kwargs)) - exact
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
    def fast(self, query, grids, together, ray_batch, network_fn, network_query_fn, N_samples, N_importance=0,
             network_fine=None, white_bkgd=False, **kwargs):
        """`render_rays` of those rays on which the last network, asked with `query`, may hold anything; the others show the
        background."""
        last = network_fine if N_importance > 0 and network_fine is not None else network_fn
        views = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
        ends = ray_batch[:, None, 0:3] + ray_batch[:, None, 3:6] * ray_batch[:, None, 7:8]
        ends = network_query_fn(ends, views, last)[:, 0, :4]  # the interval there is endless: any density is opaque
        meets = grids[last].meets(ray_batch) | ~(ends[:, 3] <= 0)
        out = {key: ray_batch.new_zeros(len(ray_batch)) for key in ('disp_map', 'acc_map')}
        out['rgb_map'] = ray_batch.new_full([len(ray_batch), 3], float(white_bkgd))
        if not meets.any():
            return out

        def ask(pts, viewdirs, network):
            if pts.shape[1] == N_samples + N_importance:
                return self.ask(query, grids[network], pts, viewdirs, network, together, ends[meets], PARTS[1], OPAQUE[1])
            raw = self.ask(query, grids[network], pts, viewdirs, network, 0.0, TRANSPARENT, PARTS[0], OPAQUE[0])
            if query is not self.queries[-1]:
                self.ask_again(raw, pts, viewdirs, network)
            return raw
        found = self.render_rays(ray_batch[meets], network_fn, ask, N_samples, N_importance=N_importance,
                                 network_fine=network_fine, white_bkgd=white_bkgd, **kwargs)
        for key, value in out.items():
            value[meets] = found[key]
        return out

    def ask(self, query, grid, pts, viewdirs, network, together, ends, parts, opaque):
        """raw [N, S, 4] of `pts` [N, S, 3], TRANSPARENT where `grid` holds nothing and behind what is `opaque`. `query` is
        asked for the others, the last ones excepted, which are `ends`."""
        N, S = pts.shape[:2]
        wanted = grid.holds(pts)                                                      # [N, S]
        wanted[:, -1] = False
        intervals = torch.linalg.vector_norm(pts[:, 1:] - pts[:, :-1], dim=-1)
        if together:
            side = (grid.aabb[1] - grid.aabb[0]).amin() / grid.resolution
            stretch = (F.pad(intervals.cumsum(-1), (1, 0)) / (together * side)).int()
        intervals = F.pad(intervals, (0, 1))
        raw, passed = pts.new_full([N, S, 4], TRANSPARENT), pts.new_zeros(N)
        raw[:, -1] = ends
        size = math.ceil(S / parts)
        for begin in range(0, S, size):
            part = slice(begin, begin + size)
            ray, sample = (wanted[:, part] & (passed <= opaque)[:, None]).nonzero(as_tuple=True)
            if len(ray) == 0:
                continue
            sample += begin
            places, views, of_sample = pts[ray, sample], ray, slice(None)
            if together:
                places, first, of_sample = means(ray, stretch[ray, sample], places, intervals[ray, sample])
                views = ray[first]
            raw[ray, sample] = at_points(query, places, views, viewdirs, network)[of_sample]
            passed += (torch.relu(raw[:, part, 3]) * intervals[:, part]).sum(-1)
        return raw

    def ask_again(self, raw, pts, viewdirs, network):
        """The samples of `raw` that have weight, as precisely as otherwise, in place."""
        intervals = F.pad(torch.linalg.vector_norm(pts[:, 1:] - pts[:, :-1], dim=-1), (0, 1))
        optical_depth = torch.relu(raw[..., 3]) * intervals
        passed = optical_depth.cumsum(-1)
        ray, sample = (torch.exp(optical_depth - passed) - torch.exp(-passed) > LEAST_WEIGHT).nonzero(as_tuple=True)
        if len(ray):
            raw[ray, sample] = at_points(self.queries[-1], pts[ray, sample], ray, viewdirs, network)


def at_points(query, places, ray, viewdirs, network):
    """raw [M, 4] in `places` [M, 3], seen along the rays [M] of those with `viewdirs` [N, 3] or None."""
    padding = -len(places) % ROUND
    views = None if viewdirs is None else viewdirs[F.pad(ray, (0, padding))]
    return query(F.pad(places, (0, 0, 0, padding))[:, None], views, network)[:len(places), 0, :4]


def colors_and_opacity(maps):
    """[N, 4] of what `render_rays` returns."""
    return torch.cat([maps['rgb_map'], maps['acc_map'][:, None]], -1)


def means(ray, stretch, places, weights):
    """Means of `places` [M, 3] by `weights` [M], of those neighbours that are in one `stretch` [M] of one `ray` [M].

    Returns:
      means [G, 3]; whether a place is the first of its group [M]; the group of each place [M].
    """
    first = torch.ones_like(ray, dtype=torch.bool)
    first[1:] = (ray[1:] != ray[:-1]) | (stretch[1:] != stretch[:-1])
    group = first.cumsum(0) - 1
    weights = weights.clamp(min=1e-9)[:, None]
    sums = torch.segment_reduce(torch.cat([places * weights, weights], -1), 'sum', lengths=group.bincount(), axis=0)
    return sums[:, :3] / sums[:, 3:], first, group


def spread(N, count):
    """`count` indices below `N`, one in each of as many equal parts; in an image they are not in a few columns alone."""
    i = torch.arange(count, dtype=torch.float64)
    return ((i + i * GOLDEN_RATIO % 1) * (N / count)).long()
