"""Bakes a trained scene into a sparse grid of opacities and colours, which a browser can march through.

  lattice   points low + spacing * (i, j, k), in the coordinates that the network is evaluated in: those of
            the world, or normalised device coordinates (NDC)
  opacity   1 - exp(-density * spacing) at a point of the lattice, the opacity of a step along a ray
  colour    base + sum of gloss * basis(viewdir): a base colour at each point of the lattice, and at every
            second one along each axis how much of each basis function red, green and blue have
  basis     N_BASIS functions of the viewing direction, learned for the scene, as in NeX (Wizadwongsa et al.,
            CVPR 2021). Highlights of few surfaces are sharper than spherical harmonics of low degree.

Only points that some training view sees are kept, in bricks of BRICK³ points.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from accel.baking import bake, with_neighbours
from accel.packed import composite
from run_nerf_helpers import ndc_rays
from scenes.bounds import box_of_rays
from scenes.errors import UserError
from scenes.rays import camera_rays

# Points of the lattice along each side of a brick.
BRICK = 8
# The gloss is stored at every second point along each axis.
GLOSS_EVERY = 2
# Functions of the viewing direction, and the side of their table, see `octahedron`.
N_BASIS, TABLE_SIDE = 4, 64
# They are learned from the colours of this many points, a batch of which is used in each of so many steps.
LEARNED_POINTS, BATCH_POINTS, LEARNING_STEPS = 16384, 512, 300
# Points of less opacity than this are empty. Forward-facing scenes are full of thin fog.
MIN_OPACITY, MIN_OPACITY_NDC = 0.03, 0.008
# A point is seen if at least this share of the light from it reaches a training view.
MIN_TRANSMITTANCE = 0.1
# No step is more opaque than this, so that optical depths stay finite.
MAX_OPACITY = 0.998
# Visibility is computed along the rays of every RAY_STRIDE-th pixel of both axes.
RAY_STRIDE = 2
# For each cell of CELL³ points, up to MAX_DIRECTIONS directions are kept from which a view sees it.
CELL, MAX_DIRECTIONS = 4, 16
# The base colour is fitted to the network's colours from this many of these directions.
BASE_DIRECTIONS = 6
# Gloss is fitted with this weight on its square, so that few or similar directions do not make it large.
GLOSS_PENALTY = 0.1
# Base colours are stored as (colour - BASE_LOW) / BASE_RANGE in 8 bits; gloss and basis from -1 to 1.
BASE_LOW, BASE_RANGE = -0.5, 2.0
# For scenes without an occupancy grid, at most this many small cells per coarse cell are evaluated.
MAX_BAKED_CELLS = 16
# The network is evaluated at this many points at once.
POINTS_AT_ONCE = 2 ** 20


class SparseField(NamedTuple):
    """A scene on a lattice of X × Y × Z bricks, of which B hold something, in which N points do."""
    low: torch.Tensor      # the lattice's first point [3]
    spacing: float
    bricks: torch.Tensor   # number of each brick, or -d if it is the d-th from the nearest one that holds
                           # something, int32 [X, Y, Z]
    opacity: torch.Tensor  # uint8 [B, BRICK³]
    base: torch.Tensor     # colour of each point that is not empty, brick after brick, uint8 [N, 3]
    gloss: torch.Tensor    # int8 [B, (BRICK / GLOSS_EVERY)³, 3 * N_BASIS], first all of red
    basis: torch.Tensor    # int8 [TABLE_SIDE, TABLE_SIDE, N_BASIS], see `octahedron`


class Baking:
    """What baking needs to know of a trained scene.

    Args:
      trained: a `Trained`.
    """

    def __init__(self, trained):
        kwargs, self.scene, self.path = trained.render_kwargs, trained.scene, trained.path
        self.network = kwargs['network_fine'] or kwargs['network_fn']
        self.query, self.ndc = kwargs['network_query_fn'], kwargs['ndc']
        self.pixel_centers, self.uses_viewdirs = kwargs['pixel_centers'], kwargs['use_viewdirs']
        self.device = next(self.network.parameters()).device
        renderer = kwargs['renderer']
        self.cells = renderer.grid if trained.args.occupancy_grid else self.find_cells(kwargs)
        self.box, self.min_opacity = occupied_box(self.cells), MIN_OPACITY_NDC if self.ndc else MIN_OPACITY

    def find_cells(self, kwargs):
        """The cells in which the network may be visible, a `CellGrid`."""
        aabb = box_of_rays(self.scene, self.ndc, self.scene.i_train).to(self.device)
        step = (aabb[1] - aabb[0]).amax() / (4 * kwargs['N_samples'])
        for _ in range(2):  # the second time in the box of what was found
            cells = bake(lambda points: self.density(points) * step, aabb, MAX_BAKED_CELLS)
            aabb = occupied_box(cells)
        return cells

    def density(self, points):
        """Densities [M] at `points` [M, 3]."""
        parts = [self.query.density(part, self.network) for part in points.split(POINTS_AT_ONCE)]
        return torch.relu(torch.cat(parts)) if parts else points[:, 0]

    def colors(self, points, viewdirs):
        """Colours [M, K, 3] at `points` [M, 3], seen in each of `viewdirs` [M, K, 3]."""
        K, found = viewdirs.shape[1], []
        for part, dirs in zip(points.split(POINTS_AT_ONCE // K), viewdirs.split(POINTS_AT_ONCE // K)):
            if not self.uses_viewdirs:
                raw = self.query.at_points(part, None, self.network)[:, None].expand(-1, K, -1)
            else:
                repeated = part[:, None].expand(dirs.shape).reshape(-1, 3)
                raw = self.query.at_points(repeated, dirs.reshape(-1, 3), self.network).unflatten(0, (-1, K))
            found.append(torch.sigmoid(raw[..., :3]))
        return torch.cat(found)

    def rays(self, view):
        """Rays of every RAY_STRIDE-th pixel of a view: a ray batch [N, 8] in the grid's coordinates, and unit
        directions in the world [N, 3]."""
        scene = self.scene
        c2w = torch.from_numpy(scene.poses[view]).to(self.device)
        rays_o, rays_d = camera_rays(scene.cameras[view], c2w, self.pixel_centers)
        rays_o, rays_d = (part[::RAY_STRIDE, ::RAY_STRIDE].reshape(-1, 3) for part in (rays_o, rays_d))
        viewdirs = F.normalize(rays_d, dim=-1)
        if self.ndc:
            rays_o, rays_d = ndc_rays(scene.H, scene.W, scene.K[0, 0], 1.0, rays_o, rays_d)
        bounds = torch.tensor([scene.near, scene.far], device=self.device).expand(len(rays_o), 2)
        return torch.cat([rays_o, rays_d, bounds], -1).float(), viewdirs


def occupied_box(grid):
    """The smallest box [2, 3] that holds the occupied cells of a `CellGrid`; its own if none is."""
    index = grid.occupied.nonzero()
    if not len(index):
        return grid.aabb
    side = (grid.aabb[1] - grid.aabb[0]) / grid.resolution
    return grid.aabb[0] + side * torch.stack([index.amin(0), index.amax(0) + 1])


class Lattice:
    """The points low + spacing * (i, j, k), numbered i, j, k from 0 to shape - 1; a multiple of BRICK in each
    direction."""

    def __init__(self, aabb, resolution):
        sides = aabb[1] - aabb[0]
        self.low, self.spacing = aabb[0], (sides.amax() / resolution).item()
        self.shape = [int(-(-count // BRICK)) * BRICK for count in (sides / self.spacing + 1).ceil().tolist()]

    def index(self, numbers):
        """Indices [M, 3] of points with flat `numbers` [M]."""
        _, Y, Z = self.shape
        return torch.stack([numbers // (Y * Z), numbers // Z % Y, numbers % Z], -1)

    def number(self, index, divide=1):
        """Flat numbers of the points with `index` [M, 3], or of the cells of `divide`³ points around them."""
        _, Y, Z = (side // divide for side in self.shape)
        x, y, z = (index // divide).unbind(-1)
        return (x * Y + y) * Z + z

    def points(self, numbers):
        return self.low + self.spacing * self.index(numbers)

    def nearest(self, points):
        """Indices [M, 3] of the points of the lattice nearest to `points` [M, 3]."""
        index = ((points - self.low) / self.spacing).round().long()
        return index.clamp(min=0).minimum(index.new_tensor(self.shape) - 1)


@torch.no_grad()
def bake_opacity(density, cells, lattice, min_opacity):
    """Opacities [X, Y, Z] at the points of the lattice.

    Args:
      density: a function of points [M, 3].
      cells: a `CellGrid`; outside of its occupied cells opacities are 0.
      lattice: a `Lattice`.
      min_opacity: lower opacities are 0.
    """
    opacity = torch.zeros(lattice.shape, device=lattice.low.device)
    for start in range(0, opacity.numel(), 4 * POINTS_AT_ONCE):
        numbers = torch.arange(start, min(start + 4 * POINTS_AT_ONCE, opacity.numel()), device=opacity.device)
        points = lattice.points(numbers)
        inside = cells.occupied[cells.cell_indices(points)] & (points <= cells.aabb[1]).all(-1)
        found = 1 - torch.exp(-density(points[inside]) * lattice.spacing)
        opacity.view(-1)[numbers[inside]] = found.clamp(max=MAX_OPACITY) * (found >= min_opacity)
    return opacity


@torch.no_grad()
def look(baking, lattice, opacity):
    """What the training views see.

    Returns:
      seen: whether points, or neighbours of theirs, are seen; bool, as `opacity` [X, Y, Z].
      viewdirs: directions from which cells of CELL³ points are seen, [cells, MAX_DIRECTIONS, 3], 0 where
        there are fewer.
    """
    seen = torch.zeros_like(opacity, dtype=torch.bool)
    viewdirs = opacity.new_zeros(opacity.numel() // CELL ** 3 * MAX_DIRECTIONS, 3)
    random = torch.Generator(opacity.device).manual_seed(0)
    for view in baking.scene.i_train:
        rays, dirs = baking.rays(view)
        jitter = torch.rand(len(rays), generator=random, device=rays.device)
        t, ray_indices, offsets = baking.cells.march(rays, *baking.cells.candidates(rays, lattice.spacing,
                                                                                    jitter))
        index = lattice.nearest(rays[ray_indices, :3] + t[:, None] * rays[ray_indices, 3:6])
        numbers = lattice.number(index)
        at = opacity.view(-1)[numbers]
        raw = torch.stack([-torch.log1p(-at) / lattice.spacing] * 4, -1)
        _, weights = composite(raw, t, ray_indices, torch.full_like(jitter, lattice.spacing), offsets)
        hits = ((at > 0) & (weights >= MIN_TRANSMITTANCE * at)).nonzero()[:, 0]
        seen.view(-1)[numbers[hits]] = True
        slots = torch.randint(MAX_DIRECTIONS, hits.shape, generator=random, device=rays.device)
        viewdirs[lattice.number(index[hits], CELL) * MAX_DIRECTIONS + slots] = dirs[ray_indices[hits]]
    return with_neighbours(seen), viewdirs.view(-1, MAX_DIRECTIONS, 3)


def directions_at(lattice, viewdirs, numbers, count):
    """Up to `count` directions from which points are seen [M, count, 3], and which of these are set
    [M, count]; arguments as in `look`. Points that are not seen have one that is set, 0."""
    found = viewdirs[lattice.number(lattice.index(numbers), CELL)]
    is_set = (found != 0).any(-1)                                                       # [M, MAX_DIRECTIONS]
    order = is_set.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
    is_set = is_set.gather(1, order)
    is_set[:, 0] = True
    return found.gather(1, order[..., None].expand(-1, -1, 3)), is_set.float()


def octahedron(side):
    """Unit vectors [side, side, 3] to the centres of the cells of a square, onto which the sphere is unfolded
    as an octahedron: the upper half in the middle, the lower half in the corners."""
    line = (torch.arange(side) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(line, line, indexing='ij')
    z = 1 - x.abs() - y.abs()
    fold = z.clamp(max=0)
    return F.normalize(torch.stack([x + fold * x.sign(), y + fold * y.sign(), z], -1), dim=-1)


def fit_gloss(values, colors, is_set):
    """The gloss [M, 3, N_BASIS] of points, and what remains of the colours, by least squares.

    Args:
      values: of the basis in the directions from which the points are seen, [M, K, N_BASIS].
      colors: seen from there [M, K, 3]; is_set: 1 or 0, whether a direction counts [M, K].
    Returns:
      gloss; base colours [M, 3]; the errors of colours [M, K, 3], 0 where a direction does not count.
    """
    is_set = is_set[..., None]
    share = is_set / is_set.sum(1, keepdim=True)
    mean_values, mean_colors = (share * values).sum(1, True), (share * colors).sum(1, True)
    values, colors = is_set * (values - mean_values), is_set * (colors - mean_colors)
    penalty = GLOSS_PENALTY * torch.eye(values.shape[-1], device=values.device)
    gloss = torch.linalg.solve(values.mT @ values + penalty, values.mT @ colors)       # [M, N_BASIS, 3]
    return gloss.mT, (mean_colors - mean_values @ gloss)[:, 0], colors - values @ gloss


def learn_basis(baking, lattice, numbers, viewdirs):
    """Learn functions of the viewing direction, of which few describe the colours of the points with flat
    `numbers` [N] well: a module, [..., 3] to [..., N_BASIS]. In each step the gloss of a batch of points is
    fitted, and the functions are changed to leave less error."""
    device = numbers.device
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        torch.manual_seed(0)
        basis = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                              nn.Linear(64, N_BASIS), nn.Tanh()).to(device)
        chosen = numbers[torch.randperm(len(numbers), device=device)[:LEARNED_POINTS]]
        dirs, is_set = directions_at(lattice, viewdirs, chosen, MAX_DIRECTIONS)
        colors = baking.colors(lattice.points(chosen), dirs)
        optimizer = torch.optim.Adam(basis.parameters(), 5e-3)
        for _ in range(LEARNING_STEPS):
            batch = torch.randint(len(chosen), (BATCH_POINTS,), device=device)
            with torch.enable_grad():
                *_, error = fit_gloss(basis(dirs[batch]), colors[batch], is_set[batch])
                optimizer.zero_grad()
                error.square().mean().backward()
            optimizer.step()
    return basis.requires_grad_(False)


@torch.no_grad()
def bake_gloss(baking, lattice, opacity, viewdirs, basis):
    """The gloss [X / 2, Y / 2, Z / 2, 3 * N_BASIS], each that of the most opaque point around."""
    most, numbers = F.max_pool3d(opacity[None], 3, GLOSS_EVERY, 1, return_indices=True)
    filled = (most[0] > 0).view(-1).nonzero()[:, 0]
    gloss = opacity.new_zeros(most.numel(), 3 * N_BASIS)
    for part in filled.split(POINTS_AT_ONCE // MAX_DIRECTIONS):
        at = numbers.view(-1)[part]
        dirs, is_set = directions_at(lattice, viewdirs, at, MAX_DIRECTIONS)
        found, *_ = fit_gloss(basis(dirs), baking.colors(lattice.points(at), dirs), is_set)
        gloss[part] = found.flatten(1).clamp(-1, 1)
    return gloss.view(*most.shape[1:], 3 * N_BASIS)


@torch.no_grad()
def bake_base(baking, lattice, numbers, viewdirs, gloss, basis):
    """Base colours [N, 3] of points with flat `numbers` [N]: what gloss leaves of the network's colours, on
    average."""
    base = []
    for part in numbers.split(POINTS_AT_ONCE // BASE_DIRECTIONS):
        dirs, is_set = directions_at(lattice, viewdirs, part, BASE_DIRECTIONS)
        around = interpolate(gloss, lattice.index(part) / GLOSS_EVERY).unflatten(-1, (3, N_BASIS))
        rest = baking.colors(lattice.points(part), dirs) - basis(dirs) @ around.mT      # [M, K, 3]
        base.append((is_set[..., None] * rest).sum(1) / is_set.sum(-1, keepdim=True))
    return torch.cat(base)


def interpolate(values, position):
    """Values [X, Y, Z, C] at positions [M, 3] in units of their lattice, trilinearly; [M, C]."""
    first, result = position.floor().long(), 0
    last = first.new_tensor(values.shape[:3]) - 1
    for corner in torch.cartesian_prod(*[torch.arange(2, device=values.device)] * 3):
        weight = torch.where(corner == 1, position - first, 1 - (position - first)).prod(-1, keepdim=True)
        result = result + weight * values[(first + corner).minimum(last).unbind(-1)]
    return result


def into_bricks(values, occupied, side):
    """Values [X, Y, Z, …] in the bricks of `side`³ values that are `occupied`: [B, side³, …]."""
    for axis in (2, 1, 0):
        values = values.unflatten(axis, (-1, side))
    return values.permute(0, 2, 4, 1, 3, 5, *range(6, values.ndim))[occupied].flatten(1, 3)


def occupied_bricks(opacity):
    """Which bricks hold points that are not empty, or border on such points of the next bricks; [X, Y, Z]."""
    padded = F.pad(opacity, (0, BRICK) * 3)[None]
    return F.max_pool3d(padded, BRICK + 1, BRICK)[0] > 0


def signed_bytes(values):
    """Values from -1 to 1 as int8."""
    return (values * 127).round().to(torch.int8)


def number_bricks(occupied):
    """The number of each brick that is `occupied`, and how far others are from these, see `SparseField`."""
    numbers = torch.where(occupied, occupied.flatten().cumsum(0).view(occupied.shape) - 1, -1).int()
    reached, distance = occupied, 1
    while reached.any() and not reached.all():
        grown = with_neighbours(reached)
        numbers[grown & ~reached] = -distance
        reached, distance = grown, distance + 1
    return numbers


@torch.no_grad()
def bake_field(baking, resolution, max_points, say):
    """Bake a scene.

    Args:
      baking: a `Baking`.
      resolution: the longest side of the scene's box has this many steps of the lattice.
      max_points: the most points that may be kept.
      say: called with each line for the user.
    Returns:
      a `SparseField`, or None if there are too many points; and their number.
    Raises:
      UserError: there are no points.
    """
    lattice = Lattice(baking.box, resolution)
    opacity = bake_opacity(baking.density, baking.cells, lattice, baking.min_opacity)
    seen, viewdirs = look(baking, lattice, opacity)
    opacity *= seen
    numbers = (opacity > 0).view(-1).nonzero()[:, 0]
    say(f'{" × ".join(map(str, lattice.shape))} points, of which {len(numbers)} are visible')
    if not len(numbers):
        raise UserError(f'{baking.path}: found nothing that the training views see, expected a trained scene')
    if len(numbers) > max_points:
        return None, len(numbers)

    basis = learn_basis(baking, lattice, numbers, viewdirs)
    gloss = bake_gloss(baking, lattice, opacity, viewdirs, basis)
    base = bake_base(baking, lattice, numbers, viewdirs, gloss, basis)
    occupied = occupied_bricks(opacity)
    colors = torch.zeros(*lattice.shape, 3, dtype=torch.uint8, device=base.device)
    colors.view(-1, 3)[numbers] = ((base - BASE_LOW) / BASE_RANGE * 255).round().clamp(0, 255).byte()
    opacity = into_bricks((opacity * 255).round().byte(), occupied, BRICK)
    field = SparseField(lattice.low, lattice.spacing, number_bricks(occupied), opacity,
                        into_bricks(colors, occupied, BRICK)[opacity > 0],
                        into_bricks(signed_bytes(gloss), occupied, BRICK // GLOSS_EVERY),
                        signed_bytes(basis(octahedron(TABLE_SIDE).to(base.device))))
    return field, len(numbers)
