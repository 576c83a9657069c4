"""Renders frames of trained networks faster: leaves out samples that cannot be seen, merges those close together.

The density of each network is baked into a grid (`accel/baking.py`). Rays keep their samples, but networks are
evaluated only in cells that may hold something, and not behind what is opaque. Some rays of a frame are rendered
exactly too: if they differ by more than a tolerance, the frame is rendered more precisely, and finally exactly.
"""
import math

import torch
import torch.nn.functional as F

from accel.baking import COARSE_RESOLUTION, bake
from accel.packed import MAX_OPTICAL_DEPTH
from accel.renderer import Renderer

# A colour channel or opacity of a checked ray may differ by this much.
TOLERANCE = 0.1
# The root mean square of these differences may be this large: 0.04 dB of a picture of 30 dB.
RMS_TOLERANCE = 0.003
# One ray in this many is checked, at least MIN_CHECKED_RAYS of a frame.
CHECKED_EVERY = 160
MIN_CHECKED_RAYS = 256
# Baking must not evaluate the coarse grid at more points than this many exact frames have samples.
MAX_BAKING_FRAMES = 8
# Baking may evaluate this many small cells for each coarse cell, at first and where that is not precise enough.
POINTS_PER_CELL = 6, 16
# Samples of a ray are merged if they are in the same interval of this length, as a share of a cell's side.
MERGE_LENGTH = 0.2
# The samples of a ray are evaluated in this many parts, front to back, until it is opaque.
PARTS = 4
# Coarse samples of at least this weight are evaluated precisely, because they place the fine samples.
MIN_WEIGHT = 1e-3
# The density, before its ReLU, of samples that are left out.
TRANSPARENT = -1.0


class FastRenderer(Renderer):
    """Chooses for each frame between an exact renderer and faster approximations of it.

    The baked grids are kept until `update` or `forget` is called: whoever changes weights by hand calls `forget`.

    Args:
      exact: the exact `Renderer`.
      queries: `NetworkQuery`s to evaluate networks with, the fastest first, the last one as precise as `exact`.
      box: what lies outside of this box [2, 3] is never left out.
      say: called with a line of text when frames need more than the fastest way.
    """

    def __init__(self, exact, queries, box, say=print):
        super().__init__()
        self.exact, self.box, self.say, self.said = exact, torch.as_tensor(box), say, set()
        # From fast to precise: query, MERGE_LENGTH or 0, POINTS_PER_CELL.
        self.ways = (queries[0], MERGE_LENGTH, POINTS_PER_CELL[0]), (queries[-1], 0.0, POINTS_PER_CELL[1])
        self.forget()

    def forget(self):
        self.grids = {}

    def update(self, step, **kwargs):
        self.forget()

    def samples_per_ray(self, N_samples, N_importance):
        return self.exact.samples_per_ray(N_samples, N_importance)

    def render_rays(self, ray_batch, *args, **kwargs):
        return self.exact.render_rays(ray_batch, *args, **kwargs)

    def for_rays(self, rays_flat, **kwargs):
        """The renderer for the rays of a frame, whatever frames were rendered before: with several processes each
        renders other ones."""
        networks = sampled_networks(**kwargs)
        if torch.is_grad_enabled() or not can_skip(**kwargs) or not pays(len(rays_flat), len(networks), **kwargs):
            return self.exact
        count = min(len(rays_flat), max(MIN_CHECKED_RAYS, len(rays_flat) // CHECKED_EVERY))
        checked = rays_flat[spread(len(rays_flat), count)]
        exact = colors_and_opacities(self.exact, checked, **kwargs)
        for query, merge_length, points_per_cell in self.ways:
            grids = {network: self.grid(network, query, points_per_cell, rays_flat, kwargs['N_samples'])
                     for network in networks}
            renderer = BakedRenderer(self.exact, query, grids, merge_length)
            differences = colors_and_opacities(renderer, checked, **kwargs) - exact
            largest, rms = differences.abs().max().item(), differences.square().mean().sqrt().item()
            if largest <= TOLERANCE and rms <= RMS_TOLERANCE:
                return renderer
            fallback = 'more precisely' if merge_length else 'exactly'
            if fallback not in self.said:
                self.said.add(fallback)
                self.say(f'fast rendering: pixels would differ by up to {largest:.3f}, RMS {rms:.4f}, more than '
                         f'{TOLERANCE} or {RMS_TOLERANCE}; such frames are rendered {fallback}')
        return self.exact

    def grid(self, network, query, points_per_cell, rays, N_samples):
        """The baked grid of a network, which is kept. The bounds of the first ray count for all of `rays`."""
        if (network, points_per_cell) not in self.grids:
            interval = ((rays[0, 7] - rays[0, 6]) / N_samples).item()

            def optical_depth(points):
                return query.density(points, network) * interval
            self.grids[network, points_per_cell] = bake(optical_depth, self.box.to(rays.device), points_per_cell)
        return self.grids[network, points_per_cell]


class BakedRenderer(Renderer):
    """Evaluates networks only where grids say that they may be seen; returns the maps of the last network alone.

    Args:
      exact: the exact `Renderer`.
      query: the `NetworkQuery` to evaluate with.
      grids: baked `OccupancyGrid`s by network.
      merge_length: samples in the same interval of this length, a share of a cell's side, are merged; 0 for none.
    """

    def __init__(self, exact, query, grids, merge_length):
        super().__init__()
        self.exact, self.query, self.grids, self.merge_length = exact, query, grids, merge_length

    @torch.no_grad()
    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, N_importance=0, network_fine=None,
                    white_bkgd=False, **kwargs):
        """As `render_rays` of run_nerf.py; only rays along which the last network may be seen are rendered."""
        last = sampled_networks(network_fn, N_importance, network_fine)[-1]
        viewdirs = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
        ends = ray_batch[:, 0:3] + ray_batch[:, 3:6] * ray_batch[:, 7:8]
        ends = network_query_fn.at_points(ends, viewdirs, last)[:, :4]  # endless, so that any density is opaque
        hit = self.grids[last].hits(ray_batch) | ~(ends[:, 3] <= 0)
        out = {key: ray_batch.new_zeros(len(ray_batch)) for key in ('disp_map', 'acc_map')}
        out['rgb_map'] = ray_batch.new_full([len(ray_batch), 3], float(white_bkgd))
        if not hit.any():
            return out
        coarse = N_importance > 0  # the first pass only places the fine samples

        def query(pts, viewdirs, network):
            nonlocal coarse
            if coarse:
                coarse = False
                return self.coarse_pass(pts, network, network_query_fn)
            return self.last_pass(pts, viewdirs, network, ends[hit])
        found = self.exact.render_rays(ray_batch[hit], network_fn, query, N_samples, N_importance=N_importance,
                                       network_fine=network_fine, white_bkgd=white_bkgd, **kwargs)
        for key, value in out.items():
            value[hit] = found[key]
        return out

    def coarse_pass(self, pts, network, precise):
        """raw [N, S, 4] of `pts` [N, S, 3] with densities alone; by the query `precise` where they have weight."""
        raw = torch.full([*pts.shape[:2], 4], TRANSPARENT, device=pts.device)

        def density(ray, sample):
            raw[ray, sample, 3] = self.query.density(pts[ray, sample], network)
        lengths = self.evaluate_visible(density, raw, pts, network)
        if self.query is not precise:
            optical_depth = torch.relu(raw[..., 3]) * lengths
            after = optical_depth.cumsum(-1)
            weights = torch.exp(optical_depth - after) - torch.exp(-after)
            ray, sample = (weights > MIN_WEIGHT).nonzero(as_tuple=True)
            if len(ray):
                raw[ray, sample, 3] = precise.density(pts[ray, sample], network)
        return raw

    def last_pass(self, pts, viewdirs, network, ends):
        """raw [N, S, 4] of `pts` [N, S, 3], the last ones of which are `ends` [N, 4]."""
        raw = torch.full([*pts.shape[:2], 4], TRANSPARENT, device=pts.device)
        raw[:, -1] = ends
        lengths = interval_lengths(pts)
        if self.merge_length:
            aabb, G = self.grids[network].aabb, self.grids[network].resolution
            merge_length = self.merge_length * (aabb[1] - aabb[0]).amin() / G
            intervals = ((lengths.cumsum(-1) - lengths) / merge_length).int()                 # [N, S]

        def color_and_density(ray, sample):
            points = pts[ray, sample]
            if not self.merge_length:
                raw[ray, sample] = self.query.at_points(points, directions(viewdirs, ray), network)[:, :4]
                return
            points, first, group = merge_neighbours(ray, intervals[ray, sample], points, lengths[ray, sample])
            merged = self.query.at_points(points, directions(viewdirs, ray[first]), network)[:, :4]
            raw[ray, sample] = merged[group]
        self.evaluate_visible(color_and_density, raw, pts, network)
        return raw

    def evaluate_visible(self, evaluate, raw, pts, network):
        """Call `evaluate(ray, sample)`, which writes to `raw` [N, S, 4], for samples in cells that may be occupied
        and not behind what is opaque, the last samples of rays excepted. Returns interval lengths [N, S]."""
        maybe_occupied = self.grids[network].maybe_occupied(pts)                               # [N, S]
        maybe_occupied[:, -1] = False
        lengths, optical_depth = interval_lengths(pts), torch.zeros_like(pts[:, 0, 0])
        size = math.ceil(pts.shape[1] / PARTS)
        for begin in range(0, pts.shape[1], size):
            part = slice(begin, begin + size)
            visible = maybe_occupied[:, part] & (optical_depth <= MAX_OPTICAL_DEPTH)[:, None]
            ray, sample = visible.nonzero(as_tuple=True)
            if len(ray):
                evaluate(ray, sample + begin)
                optical_depth += (torch.relu(raw[:, part, 3]) * lengths[:, part]).sum(-1)
        return lengths


def sampled_networks(network_fn, N_importance=0, network_fine=None, **kwargs):
    """The networks that `render_rays` evaluates, the last one last."""
    return [network_fn] + ([network_fine] if N_importance > 0 and network_fine is not None else [])


def can_skip(N_samples, perturb=0.0, raw_noise_std=0.0, retraw=False, retsamples=False, **kwargs):
    """Whether samples can be left out: nothing random, and nothing wanted of each sample."""
    return N_samples > 1 and not (perturb or raw_noise_std or retraw or retsamples)


def pays(num_rays, num_networks, N_samples, N_importance=0, **kwargs):
    """Whether baking costs less than MAX_BAKING_FRAMES."""
    return 2 * num_networks * COARSE_RESOLUTION ** 3 <= MAX_BAKING_FRAMES * num_rays * (N_samples + N_importance)


def directions(viewdirs, ray):
    """The directions [M, 3] of samples on the rays `ray` [M], or None."""
    return None if viewdirs is None else viewdirs[ray]


def interval_lengths(pts):
    """Distances from each sample of `pts` [N, S, 3] to the next one [N, S], 0 for the last."""
    return F.pad(torch.linalg.vector_norm(pts[:, 1:] - pts[:, :-1], dim=-1), (0, 1))


def colors_and_opacities(renderer, rays, **kwargs):
    """[N, 4] of `rays` [N, 8 or 11]."""
    maps = renderer.render_rays(rays, **kwargs)
    return torch.cat([maps['rgb_map'], maps['acc_map'][:, None]], -1)


def merge_neighbours(ray, interval, points, weights):
    """Merge neighbours in one `interval` [M] of one `ray` [M] into the weighted mean of their `points` [M, 3].

    Returns:
      means [G, 3]; whether a point is the first of its group [M]; the group of each point [M].
    """
    first = torch.ones_like(ray, dtype=torch.bool)
    first[1:] = (ray[1:] != ray[:-1]) | (interval[1:] != interval[:-1])
    group = first.cumsum(0) - 1
    weights = weights.clamp(min=1e-9)[:, None]  # points in the same place have no length between them
    values = torch.cat([points * weights, weights], -1)
    sums = torch.segment_reduce(values, 'sum', lengths=group.bincount(), axis=0)
    return sums[:, :3] / sums[:, 3:], first, group


def spread(N, count):
    """`count` indices below `N`: one at random in each of as many equal parts, the same ones for each frame."""
    random = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return ((torch.arange(count) + random.double()) * (N / count)).long()
