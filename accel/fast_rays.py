"""Faster rendering of trained networks: samples that cannot be seen are left out, near ones are asked for together.

The density of each network is baked into a grid. Rays keep the samples that they would have, but the networks are asked
for those alone that lie in cells which may hold something, and not for those behind what is opaque. There the coarse
network, which places the fine samples, is asked as precisely as otherwise; the fine one with cheaper products, and once for
all samples within a fraction of a cell. Of each frame CHECKED rays are rendered exactly too: where their colours and
opacities differ by more than TOLERANCE, or MEAN_TOLERANCE in the mean, a more precise way is taken, at last the exact one.

What looks at cells alone would miss are blobs smaller than the distance between looks: the encoding's ripples, where they
top 0 in space that is else a little below. A sample there counts for all of its interval, and is seen as if the blob were as
large. So cells in which the density before its ReLU is less than a margin below 0 are looked at more closely, and kept where
it comes half as near. The margin is as large as a number of looks allows, a larger one where the checked rays meet what
has been missed.
"""
import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from accel.occupancy import OccupancyGrid, version
from accel.packed import MOST_PASSED

TOLERANCE = 0.1           # largest difference of a colour channel or the opacity, and
MEAN_TOLERANCE = 0.003    # root mean square: 0.04 dB of a picture that is right to 30 dB
CHECKED = 1024            # rays of a frame that are rendered both ways, one in CHECKED_SHARE at most,
CHECKED_SHARE = 64        # but not less than
FEWEST_CHECKED = 256
LEAST_ALPHA = 1e-4        # opacity of a coarse sample; cells with less are empty,
MARGINS = 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0  # but suspect, if it is no more than that below 0
LARGE = 64                # cells along a side
DIVIDED = 4               # those of them that are not empty, so often along each side; less often in fog
LOOKS = 6, 16             # small cells for each large one, empty ones included: at first, and at most; the margin is the
# largest that makes no more
FRAMES = 8                # that the first look of baking may cost
POINTS_AT_ONCE = 2 ** 18  # in baking
TOGETHER = 0.2, 0.1, 0.0  # of a small cell: samples of a ray in an interval of that length are asked for together
PARTS = 8, 4              # of a ray's coarse and last samples: one is asked for before it is known whether the next is seen
OPAQUE = -math.log(1e-3), MOST_PASSED  # optical depth behind which no coarse and no last sample is asked for
LEAST_WEIGHT = 1e-3       # of coarse samples that are asked for as precisely as otherwise
ROUND = 256               # oneDNN compiles kernels for each new number of points: there are few numbers
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
TRANSPARENT = -1.0        # density before its ReLU


class FastRays:
    """What takes the place of `render_rays`. It gives the maps of the last network only. A ray along which the opacity of
    samples is nowhere LEAST_ALPHA is empty, its disparity 0.

    Args:
      render_rays: the function of run_nerf.py.
      queries: network_query_fn to use, the fastest first; the last one is as precise as otherwise.
      box: [2, 3] where rays are; what lies outside is not left out.
      say: called with a line where something is chosen.
    """

    def __init__(self, render_rays, queries, box, say=lambda line: None):
        self.render_rays, self.queries, self.box, self.say = render_rays, queries, torch.as_tensor(box), say
        self.versions, self.baked, self.said = None, {}, set()  # baked by network and looks

    def choose(self, rays_flat, **kwargs):
        """What renders these rays, all of a frame: a function as `render_rays`. Nothing depends on earlier frames, so that
        it does not matter who renders which."""
        N_importance, fine = kwargs.get('N_importance', 0), kwargs.get('network_fine')
        networks = [kwargs['network_fn']] + ([fine] if N_importance > 0 and fine is not None else [])
        samples = kwargs['N_samples'] + N_importance
        looks = 2 * len(networks) * LARGE ** 3
        random = kwargs.get('perturb') or kwargs.get('raw_noise_std')
        if (torch.is_grad_enabled() or random or kwargs.get('retraw') or kwargs['N_samples'] < 2
                or looks > FRAMES * samples * len(rays_flat)):
            return self.render_rays
        versions = [version(parameter) for network in networks for parameter in network.parameters()]
        if versions != self.versions or None in versions:
            self.versions, self.baked = versions, {}
        checked = min(CHECKED, max(FEWEST_CHECKED, len(rays_flat) // CHECKED_SHARE), len(rays_flat))
        some = rays_flat[spread(len(rays_flat), checked)]
        exact = colors_and_opacity(self.render_rays(some, **kwargs))
        for query, looks, together in itertools.product(self.queries, LOOKS, TOGETHER):
            fast = partial(self.fast, query, self.grids(networks, looks, rays_flat, kwargs['N_samples']), together)
            difference = colors_and_opacity(fast(some, **kwargs)) - exact
            largest, mean = difference.abs().max().item(), difference.square().mean().sqrt().item()
            if largest <= TOLERANCE and mean <= MEAN_TOLERANCE:
                return fast
            if (looks, together) == (LOOKS[-1], TOGETHER[-1]) and query not in self.said:
                self.said.add(query)
                less = 'with float32' if query is not self.queries[-1] else 'exactly'
                self.say(f'fast rendering: pixels would differ by up to {largest:.3f}, {mean:.4f} in the mean, more than '
                         f'{TOLERANCE} or {MEAN_TOLERANCE}; such frames are rendered {less}')
        return self.render_rays

    def grids(self, networks, looks, rays, N_samples):
        """{network: `OccupancyGrid`}, of the last one with `looks`."""
        looks = dict.fromkeys(networks, LOOKS[0]) | {networks[-1]: looks}
        for key in looks.items():
            if key not in self.baked:
                self.baked[key] = self.bake(*key, rays, N_samples)
        return {key[0]: self.baked[key] for key in looks.items()}

    @torch.no_grad()
    def bake(self, network, most_looks, rays, N_samples):
        """The cells in which `network` is not transparent, those around them, and those in which it may be opaque. Large
        cells are looked at in their corners and centres; those that are not empty and those beside them are divided into
        small ones, looked at in their centres; suspect ones in those of their eighths."""
        alpha = N_samples / (rays[0, 7] - rays[0, 6]).item()  # the density that has that opacity, if both are small
        direction = rays[:1, -3:] if rays.shape[-1] > 8 else None

        def density(points):
            def ask(pts):
                views = None if direction is None else direction.expand(len(pts), 3)
                return self.queries[0](pts[:, None], views, network)[:, 0, 3]
            return torch.cat([ask(pts) for pts in points.split(POINTS_AT_ONCE)])

        grid = empty_grid(LARGE, self.box.to(rays.device))
        seen = look_at_all(grid, density)
        for margin in MARGINS:
            least = alpha * (-margin if margin else LEAST_ALPHA)
            holds = with_neighbours(seen > least)
            share = holds.float().mean().item()
            if share * DIVIDED ** 3 <= most_looks:
                break
        divided = max(count for count in range(1, DIVIDED + 1) if count == 1 or share * count ** 3 <= LOOKS[-1])
        if divided == 1:
            grid.occupied.copy_(holds)
            return grid

        grid = empty_grid(LARGE * divided, grid.aabb)
        x, y, z = (holds.nonzero()[:, None] * divided + lattice_points([divided] * 3, rays.device).long()).unbind(-1)
        cells = ((x * grid.resolution + y) * grid.resolution + z).flatten()
        seen, occupied = density(grid.points_in(cells, 0.5)), grid.occupied.view(-1)
        occupied[cells] = seen > alpha * LEAST_ALPHA
        grid.occupied.copy_(with_neighbours(grid.occupied))
        suspect = ((seen > least) & ~occupied[cells]).nonzero()[:, 0]
        seen, nearest = seen[suspect].topk(min(len(suspect), most_looks * LARGE ** 3 // 8))
        cells = cells[suspect[nearest]]
        for within in lattice_points([2] * 3, rays.device) / 2 + 0.25:
            seen = torch.maximum(seen, density(grid.points_in(cells, within)))
        occupied[cells] = seen > least / 2
        return grid

    @torch.no_grad()
    def fast(self, query, grids, together, ray_batch, network_fn, network_query_fn, N_samples, N_importance=0,
             network_fine=None, white_bkgd=False, **kwargs):
        """`render_rays` of those rays on which the last network, asked with `query`, may hold anything; the others show the
        background."""
        last = network_fine if N_importance > 0 and network_fine is not None else network_fn
        views = ray_batch[:, -3:] if ray_batch.shape[-1] > 8 else None
        ends = ray_batch[:, None, 0:3] + ray_batch[:, None, 3:6] * ray_batch[:, None, 7:8]
        ends = network_query_fn(ends, views, last)[:, 0, :4]  # the interval there is endless: any density is opaque
        meets = grids[last].meets(ray_batch) | (ends[:, 3] > 0)
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


def empty_grid(resolution, box):
    grid = OccupancyGrid(resolution).to(box.device)
    grid.restrict(box)
    grid.opacity = grid.opacity.new_empty(0)  # nothing looks at it, and of so many cells it would be large
    grid.occupied.zero_()
    return grid


def look_at_all(grid, density):
    """The largest [G, G, G] of what `density` gives in the corners and the centre of each cell."""
    G, device = grid.resolution, grid.occupied.device
    corners = grid.aabb[0] + (grid.aabb[1] - grid.aabb[0]) / G * lattice_points([G + 1] * 3, device)
    seen = F.max_pool3d(density(corners).view(1, 1, G + 1, G + 1, G + 1), 2, 1)[0, 0]
    return torch.maximum(seen, density(grid.points_in(torch.arange(G ** 3, device=device), 0.5)).view(G, G, G))


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
