"""Renders frames faster: skips samples that cannot be seen, and merges those that are close together.

The density of each network is baked into a grid (`accel/baking.py`). Rays keep their samples, but networks
are evaluated only in cells that may hold something, and not behind what is opaque. Some rays of each frame
are also rendered exactly. If the two differ by more than a tolerance, the frame is rendered at the next, more
precise level, and in the end exactly.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from accel.baking import BAKING_RESOLUTION, bake
from accel.network_query import NetworkQuery
from accel.packed import MAX_OPTICAL_DEPTH
from accel.renderer import Renderer
from run_nerf_helpers import split_rays

# A colour channel or opacity of a checked ray may differ by this much.
TOLERANCE = 0.1
# The root mean square of these differences may be this large, which costs 0.04 dB of an image of 30 dB.
RMS_TOLERANCE = 0.003
# One ray in this many is checked.
CHECKED_EVERY = 160
# At least this many rays of a frame are checked.
MIN_CHECKED_RAYS = 256
# A frame is rendered exactly if evaluating the coarse grids costs more than this many exact frames.
MAX_BAKING_FRAMES = 8
# This is `max_cells` of `bake` at the fastest level.
FAST_CELLS = 6
# This is `max_cells` of `bake` at the more precise level.
PRECISE_CELLS = 16
# Samples of a ray are merged if they are in the same interval of this length, as a share of a cell's side.
MERGE_LENGTH = 0.2
# The samples of a ray are evaluated in this many parts, front to back, until it is opaque.
PARTS = 4
# Coarse samples of at least this weight are evaluated again precisely, because they place the fine samples.
MIN_WEIGHT = 1e-3
# Samples that are skipped have this density before its ReLU.
TRANSPARENT = -1.0


class Level(NamedTuple):
    """One way to render a frame faster."""
    query: NetworkQuery   # to evaluate networks with
    merge_length: float   # samples are merged in intervals of this length, a share of a cell's side
    max_cells: int        # for `bake`
    fallback: str         # how frames that fail the check at this level are rendered


class FastRenderer(Renderer):
    """Renders each frame at the fastest level that passes a check, or else by an exact renderer.

    The baked grids are kept until `drop_cache` is called: call it after changing the networks' weights.

    Args:
      exact: the exact `Renderer`, which must be dense.
      queries: `NetworkQuery`s to evaluate networks with, the fastest first, the last one as precise as
        `exact`.
      aabb: bounding box [2, 3]; samples outside it are never skipped.
      say: called with a line of text when frames need more than the fastest level.
    """

    def __init__(self, exact, queries, aabb, say=print):
        super().__init__()
        self.exact, self.aabb, self.say, self.said = exact, torch.as_tensor(aabb), say, set()
        self.levels = (Level(queries[0], MERGE_LENGTH, FAST_CELLS, 'more precisely'),
                       Level(queries[-1], 0.0, PRECISE_CELLS, 'exactly'))
        self.drop_cache()

    def drop_cache(self):
        self.grids, self.grids_fit = {}, True

    def without_shortcuts(self):
        return self.exact

    def max_rays(self, device, *args, **kwargs):
        return self.exact.max_rays(device, *args, **kwargs)

    def render_rays(self, ray_batch, *args, **kwargs):
        return self.exact.render_rays(ray_batch, *args, **kwargs)

    def for_rays(self, rays_flat, chunk, **kwargs):
        """The renderer for the rays of a frame: the first level whose pixels differ little enough from exact
        ones, otherwise the exact renderer. It does not depend on earlier frames, because with several
        processes each of them renders different ones."""
        networks, N = evaluated_networks(**kwargs), len(rays_flat)
        if torch.is_grad_enabled() or not self.grids_fit or not can_skip(**kwargs):
            return self.exact
        if not self.checked:
            return self.at_level(self.levels[0], networks, rays_flat, **kwargs)
        if not baking_pays(N, len(networks), **kwargs):
            return self.exact
        count = min(N, max(MIN_CHECKED_RAYS, N // CHECKED_EVERY))
        checked = rays_flat[stratified_indices(N, count)].split(chunk)
        expected = colors_and_opacities(self.exact, checked, **kwargs)
        for level in self.levels:
            renderer = self.at_level(level, networks, rays_flat, **kwargs)
            if renderer is self.exact:
                return renderer
            differences = colors_and_opacities(renderer, checked, **kwargs) - expected
            largest, rms = torch.stack([differences.abs().max(), differences.square().mean().sqrt()]).tolist()
            if largest <= TOLERANCE and rms <= RMS_TOLERANCE:
                return renderer
            self.say_once(level, f'fast rendering: pixels would differ by up to {largest:.3f}, '
                          f'RMS {rms:.4f}, more than {TOLERANCE} or {RMS_TOLERANCE}; '
                          f'such frames are rendered {level.fallback}')
        return self.exact

    def at_level(self, level, networks, rays_flat, **kwargs):
        """The renderer of a level; the exact one if the baked grids do not fit in memory."""
        try:
            grids = {network: self.grid(network, level, rays_flat, **kwargs) for network in networks}
        except torch.OutOfMemoryError:
            self.grids, self.grids_fit = {}, False
            self.say_once('memory', 'fast rendering: the baked grids do not fit in GPU memory; frames '
                          'are rendered exactly')
            return self.exact
        return BakedRenderer(self.exact, level.query, grids, level.merge_length)

    def say_once(self, about, text):
        if about not in self.said:
            self.said.add(about)
            self.say(text)

    def grid(self, network, level, rays, N_samples, **kwargs):
        """The baked grid of a network, which is kept. Near and far of the first ray count for all of
        `rays`."""
        interval = float(f'{((rays[0, 7] - rays[0, 6]) / N_samples).item():.5g}')  # without rounding errors

        def raw_optical_depth(points):
            return level.query.density(points, network) * interval
        key = network, level, interval
        if key not in self.grids:
            self.grids[key] = bake(raw_optical_depth, self.aabb.to(rays.device), level.max_cells)
        return self.grids[key]


class BakedRenderer(Renderer):
    """Evaluates networks only where grids say that they may be visible; returns the maps of the last network
    only.

    Args:
      exact: the exact `Renderer`.
      query: the `NetworkQuery` to evaluate with.
      grids: the baked grid of each network, a dict.
      merge_length: see `Level`.
    """

    def __init__(self, exact, query, grids, merge_length):
        super().__init__()
        self.exact, self.query, self.grids, self.merge_length = exact, query, grids, merge_length

    @torch.no_grad()
    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, N_importance=0,
                    network_fine=None, white_bkgd=False, **kwargs):
        """As `render_rays` of run_nerf.py; only rays along which the last network may be visible are
        rendered."""
        last = evaluated_networks(network_fn, N_importance, network_fine)[-1]
        rays_o, rays_d, _, far, viewdirs = split_rays(ray_batch)
        ends = rays_o + rays_d * far
        ends = network_query_fn.at_points(ends, viewdirs, last)[:, :4]
        # the last interval is so long that any density there is opaque
        hit = self.grids[last].may_hit(ray_batch) | ~(ends[:, 3] <= 0)
        out = {key: ray_batch.new_zeros(len(ray_batch)) for key in ('disp_map', 'acc_map')}
        out['rgb_map'] = ray_batch.new_full([len(ray_batch), 3], float(white_bkgd))
        if not hit.any():
            return out

        passes = [partial(self.last_pass, ends[hit])]
        if N_importance > 0:  # the first pass only places the fine samples
            passes.insert(0, partial(self.coarse_pass, network_query_fn))
        passes = iter(passes)

        def query(pts, viewdirs, network):
            return next(passes)(pts, viewdirs, network)
        found = self.exact.render_rays(ray_batch[hit], network_fn, query, N_samples, white_bkgd=white_bkgd,
                                       N_importance=N_importance, network_fine=network_fine, **kwargs)
        for key, value in out.items():
            value[hit] = found[key]
        return out

    def coarse_pass(self, precise, pts, viewdirs, network):
        """raw [N, S, 4] of `pts` [N, S, 3] with densities only; by the query `precise` where they have
        weight."""
        raw, lengths = pts.new_full([*pts.shape[:2], 4], TRANSPARENT), interval_lengths(pts)

        def evaluate(ray, sample):
            raw[ray, sample, 3] = self.query.density(pts[ray, sample], network)
        self.evaluate_visible(evaluate, raw, lengths, pts, network)
        if self.query is not precise:
            optical_depth = (torch.relu(raw[..., 3]) * lengths).cumsum(-1)             # behind each sample
            transmittance = torch.exp(-F.pad(optical_depth, (1, 0)))                   # [N, S + 1]
            weights = transmittance[:, :-1] - transmittance[:, 1:]
            ray, sample = (weights > MIN_WEIGHT).nonzero(as_tuple=True)
            if len(ray):
                raw[ray, sample, 3] = precise.density(pts[ray, sample], network)
        return raw

    def last_pass(self, ends, pts, viewdirs, network):
        """raw [N, S, 4] of `pts` [N, S, 3]; that of the last sample of each ray is `ends` [N, 4]."""
        raw, lengths = pts.new_full([*pts.shape[:2], 4], TRANSPARENT), interval_lengths(pts)
        raw[:, -1] = ends
        if self.merge_length:
            grid = self.grids[network]
            merge_length = self.merge_length * (grid.aabb[1] - grid.aabb[0]).amin() / grid.resolution
            bins = ((lengths.cumsum(-1) - lengths) / merge_length).int()               # [N, S]

        def evaluate(ray, sample):
            points, group = pts[ray, sample], slice(None)
            if self.merge_length:
                points, first, group = merge_neighbours(ray, bins[ray, sample], points, lengths[ray, sample])
                ray_of_points = ray[first]
            else:
                ray_of_points = ray
            dirs = None if viewdirs is None else viewdirs[ray_of_points]
            raw[ray, sample] = self.query.at_points(points, dirs, network)[:, :4][group]
        self.evaluate_visible(evaluate, raw, lengths, pts, network)
        return raw

    def evaluate_visible(self, evaluate, raw, lengths, pts, network):
        """Call `evaluate(ray, sample)`, which writes to `raw` [N, S, 4], for the samples in cells that may be
        occupied and not behind what is opaque, except the last sample of each ray."""
        maybe_occupied = self.grids[network].maybe_occupied(pts)                       # [N, S]
        maybe_occupied[:, -1] = False
        optical_depth = torch.zeros_like(lengths[:, 0])
        size = math.ceil(pts.shape[1] / PARTS)
        for begin in range(0, pts.shape[1], size):
            part = slice(begin, begin + size)
            visible = maybe_occupied[:, part] & (optical_depth <= MAX_OPTICAL_DEPTH)[:, None]
            ray, sample = visible.nonzero(as_tuple=True)
            if len(ray):
                evaluate(ray, sample + begin)
                optical_depth += (torch.relu(raw[:, part, 3]) * lengths[:, part]).sum(-1)


def evaluated_networks(network_fn, N_importance=0, network_fine=None, **kwargs):
    """The networks that `render_rays` evaluates, the last one last."""
    return [network_fn] + ([network_fine] if N_importance > 0 and network_fine is not None else [])


def can_skip(N_samples, perturb=0.0, raw_noise_std=0.0, retraw=False, retsamples=False, **kwargs):
    """Whether samples can be skipped: nothing is random, and no output of each sample is requested."""
    return N_samples > 1 and not (perturb or raw_noise_std or retraw or retsamples)


def baking_pays(num_rays, num_networks, N_samples, N_importance=0, **kwargs):
    """Whether evaluating the coarse grids, at corners and centres, costs at most MAX_BAKING_FRAMES exact
    frames."""
    points = 2 * num_networks * BAKING_RESOLUTION ** 3
    return points <= MAX_BAKING_FRAMES * num_rays * (N_samples + N_importance)


def interval_lengths(pts):
    """Distances from each sample of `pts` [N, S, 3] to the next one [N, S], 0 for the last."""
    return F.pad(torch.linalg.vector_norm(pts[:, 1:] - pts[:, :-1], dim=-1), (0, 1))


def colors_and_opacities(renderer, chunks, **kwargs):
    """Colours and opacities [N, 4] of the rays in `chunks`, [., 8 or 11] each."""
    maps = [renderer.render_rays(rays, **kwargs) for rays in chunks]
    return torch.cat([torch.cat([part['rgb_map'], part['acc_map'][:, None]], -1) for part in maps])


def merge_neighbours(ray, bins, points, lengths):
    """Merge samples in the same one of `bins` [M] and on the same `ray` [M], which must be neighbours in
    these lists.

    Args:
      points: positions of the samples [M, 3].
      lengths: how much each point counts in the mean [M].
    Returns:
      means [G, 3]; whether a sample is the first of its group [M]; the group of each sample [M].
    """
    first = torch.ones_like(ray, dtype=torch.bool)
    first[1:] = (ray[1:] != ray[:-1]) | (bins[1:] != bins[:-1])
    group = first.cumsum(0) - 1
    lengths = lengths.clamp(min=1e-9)[:, None]  # samples at the same place have no length
    values = torch.cat([points * lengths, lengths], -1)
    sums = torch.segment_reduce(values, 'sum', lengths=group.bincount(), axis=0)
    return sums[:, :3] / sums[:, 3:], first, group


def stratified_indices(N, count):
    """`count` indices below N: a random one in each of as many equal parts, the same ones for each frame."""
    random = torch.rand(count, generator=torch.Generator('cpu').manual_seed(0), device='cpu')
    return ((torch.arange(count, device='cpu') + random.double()) * (N / count)).long()
