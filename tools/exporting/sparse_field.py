"""Bakes a trained scene into a sparse grid of opacities and colours, which a browser can march through.

  lattice   points low + spacing * (i, j, k), in the coordinates of the world, normalised device coordinates
            (NDC) or contracted space, see baking.py
  opacity   1 - exp(-density * spacing) at a point of the lattice, the opacity of a step along a ray
  colour    base + sum of gloss * basis(viewdir): a base colour at each point of the lattice, and at every
            second one along each axis how much of each basis function red, green and blue have
  basis     N_BASIS functions of the viewing direction, learned for the scene, as in NeX (Wizadwongsa et al.,
            CVPR 2021). Highlights of few surfaces are sharper than spherical harmonics of low degree.

Only points that some training view sees are kept, in bricks of BRICK³ points.
"""
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from accel.baking import with_neighbours
from accel.packed import composite
from scenes.errors import UserError
from tools.exporting.baking import POINTS_AT_ONCE

# Points of the lattice along each side of a brick.
BRICK = 8
# The gloss is stored at every second point along each axis.
GLOSS_EVERY = 2
# Functions of the viewing direction, and the side of their table, see `octahedron`.
N_BASIS, TABLE_SIDE = 4, 64
# They are learned from the colours of this many points, a batch of which is used in each of so many steps.
LEARNED_POINTS, BATCH_POINTS, LEARNING_STEPS = 16384, 512, 300
# Lower opacities are lost in 8 bits.
MIN_OPACITY = 1 / 255
# No step is more opaque than this, so that optical depths stay finite.
MAX_OPACITY = 0.998
# For each cell of CELL³ points, up to MAX_DIRECTIONS directions are kept from which a view sees it.
CELL, MAX_DIRECTIONS = 4, 16
# The base colour is fitted to the network's colours from this many of these directions.
BASE_DIRECTIONS = 6
# Gloss is fitted with this weight on its square, so that few or similar directions do not make it large.
GLOSS_PENALTY = 0.1
# Base colours are stored as (colour - BASE_LOW) / BASE_RANGE in 8 bits; gloss and basis from -1 to 1.
BASE_LOW, BASE_RANGE = -0.5, 2.0


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


class Lattice:
    """The points low + spacing * (i, j, k) in bricks of BRICK³, as far as something may be in these. They are
    numbered brick after brick.

    Args:
      cells: a `CellGrid`; bricks that touch its occupied cells, or are in front of one that does, are kept.
      box: the points cover this box [2, 3].
      resolution: steps along its longest side.
    """

    def __init__(self, cells, box, resolution):
        sides = box[1] - box[0]
        self.low, self.spacing = box[0], (sides.amax() / resolution).item()
        occupied = cells.occupied
        for axis, count in enumerate(((sides / self.spacing + 1) / BRICK).ceil().int().tolist()):
            # the cells in which each brick begins and ends
            ends = self.low[axis] + self.spacing * BRICK * torch.arange(count + 1, device=box.device)
            side = (cells.aabb[1] - cells.aabb[0])[axis] / cells.resolution
            ends = ((ends - cells.aabb[0, axis]) / side).long().clamp(0, cells.resolution - 1).tolist()
            occupied = torch.stack([occupied.narrow(axis, first, last - first + 1).any(axis)
                                    for first, last in itertools.pairwise(ends)], axis)
        # those in front of them too, because they interpolate with them
        kept = F.max_pool3d(F.pad(occupied, (0, 1) * 3)[None].float(), 2, 1)[0] > 0
        self.bricks = torch.where(kept, kept.flatten().cumsum(0).view(kept.shape) - 1, -1)
        self.corners = BRICK * kept.nonzero()                                          # [B, 3]

    @property
    def shape(self):
        """How many points there are along each axis, those of all bricks."""
        return [BRICK * count for count in self.bricks.shape]

    def index(self, numbers, every=1):
        """Indices i, j, k [M, 3] of points with `numbers` [M]. If only `every` so many points along each axis
        are numbered, these are their numbers."""
        side = BRICK // every
        local = torch.stack([numbers // side ** 2 % side, numbers // side % side, numbers % side], -1)
        return self.corners[numbers // side ** 3] + every * local

    def number(self, index, every=1):
        """The inverse of `index`: numbers [M], -1 where there is no brick."""
        side, shape = BRICK // every, index.new_tensor(self.bricks.shape)
        brick, local = index.div(BRICK, rounding_mode='floor'), index % BRICK // every
        inside = ((brick >= 0) & (brick < shape)).all(-1)
        number = self.bricks[torch.where(inside[:, None], brick, 0).unbind(-1)]
        x, y, z = local.unbind(-1)
        return torch.where(inside & (number >= 0), ((number * side + x) * side + y) * side + z, -1)

    def points(self, numbers):
        return self.low + self.spacing * self.index(numbers)

    def nearest(self, points):
        """Numbers [M] of the points of the lattice nearest to `points` [M, 3], -1 where there is no brick."""
        return self.number(((points - self.low) / self.spacing).round().long())


@torch.no_grad()
def bake_opacity(baking, lattice):
    """Opacities of the points of a lattice, [512 B]; 0 outside of occupied cells, and below MIN_OPACITY."""
    opacity = torch.zeros(len(lattice.corners) * BRICK ** 3, device=lattice.low.device)
    for numbers in torch.arange(len(opacity), device=opacity.device).split(POINTS_AT_ONCE):
        points = lattice.points(numbers)
        inside = baking.cells.occupied[baking.cells.cell_indices(points)]
        inside &= (points <= baking.cells.aabb[1]).all(-1)
        found = 1 - torch.exp(-baking.density(points[inside]) * lattice.spacing)
        opacity[numbers[inside]] = found.clamp(max=MAX_OPACITY) * (found >= MIN_OPACITY)
    return opacity


@torch.no_grad()
def look(baking, lattice, opacity):
    """What the training views see.

    Returns:
      seen: whether points, or neighbours of theirs, are seen; bool, as `opacity` [512 B].
      viewdirs: directions from which cells of CELL³ points are seen, [cells, MAX_DIRECTIONS, 3], 0 where
        there are fewer.
    """
    seen = torch.zeros_like(opacity, dtype=torch.bool)
    viewdirs = opacity.new_zeros(len(opacity) // CELL ** 3 * MAX_DIRECTIONS, 3)
    random = torch.Generator(opacity.device).manual_seed(0)
    for view in baking.scene.i_train:
        points, dirs, ray_indices, offsets, lengths = baking.march(view, lattice.spacing, random)
        numbers = lattice.nearest(points)
        optical_depths = torch.where(numbers < 0, 0, -torch.log1p(-opacity[numbers]) * lengths)
        raw = torch.stack([optical_depths] * 4, -1)
        _, weights = composite(raw, lengths, ray_indices, torch.ones_like(dirs[:, 0]), offsets)
        hits = weights >= baking.min_weight
        numbers, ray_indices = numbers[hits], ray_indices[hits]
        seen[numbers] = True
        # one slot for each cell, so that no view overwrites all others
        slots = torch.randint(MAX_DIRECTIONS, (len(viewdirs) // MAX_DIRECTIONS,), generator=random,
                              device=dirs.device)
        cells = lattice.number(lattice.index(numbers), CELL)
        viewdirs[cells * MAX_DIRECTIONS + slots[cells]] = dirs[ray_indices]
    return with_adjacent(lattice, seen), viewdirs.view(-1, MAX_DIRECTIONS, 3)


def with_adjacent(lattice, seen):
    """Points [512 B] that are `seen`, or have a neighbour that is, diagonal ones included."""
    for axis in range(3):
        index, grown = lattice.index(seen.nonzero()[:, 0]), seen.clone()
        for step in (-1, 1):
            index[:, axis] += step
            numbers = lattice.number(index)
            grown[numbers[numbers >= 0]] = True
            index[:, axis] -= step
        seen = grown
    return seen


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
    """The gloss [64 B, 3 * N_BASIS] at every GLOSS_EVERY-th point along each axis, each that of the most
    opaque point around."""
    most = opacity.new_zeros(len(opacity) // GLOSS_EVERY ** 3)
    numbers = torch.arange(len(most), device=opacity.device)
    index, of_most = lattice.index(numbers, GLOSS_EVERY), numbers
    for offset in torch.cartesian_prod(*[torch.arange(-1, 2, device=opacity.device)] * 3):
        around = lattice.number(index + offset)
        found = torch.where(around < 0, 0, opacity[around])
        of_most, most = torch.where(found > most, around, of_most), torch.maximum(found, most)
    gloss = opacity.new_zeros(len(most), 3 * N_BASIS)
    for part in most.nonzero()[:, 0].split(POINTS_AT_ONCE // MAX_DIRECTIONS):
        dirs, is_set = directions_at(lattice, viewdirs, of_most[part], MAX_DIRECTIONS)
        found, *_ = fit_gloss(basis(dirs), baking.colors(lattice.points(of_most[part]), dirs), is_set)
        gloss[part] = found.flatten(1).clamp(-1, 1)
    return gloss


@torch.no_grad()
def bake_base(baking, lattice, numbers, viewdirs, gloss, basis):
    """Base colours [N, 3] of points with flat `numbers` [N]: what gloss leaves of the network's colours, on
    average."""
    base = []
    for part in numbers.split(POINTS_AT_ONCE // BASE_DIRECTIONS):
        dirs, is_set = directions_at(lattice, viewdirs, part, BASE_DIRECTIONS)
        around = interpolate_gloss(lattice, gloss, part).unflatten(-1, (3, N_BASIS))
        rest = baking.colors(lattice.points(part), dirs) - basis(dirs) @ around.mT      # [M, K, 3]
        base.append((is_set[..., None] * rest).sum(1) / is_set.sum(-1, keepdim=True))
    return torch.cat(base)


def interpolate_gloss(lattice, gloss, numbers):
    """The gloss [M, 3 * N_BASIS] at points with flat `numbers` [M], trilinearly."""
    index, result = lattice.index(numbers), 0
    share = index % GLOSS_EVERY / GLOSS_EVERY                                              # [M, 3]
    for corner in torch.cartesian_prod(*[torch.arange(2, device=gloss.device)] * 3):
        weight = torch.where(corner == 1, share, 1 - share).prod(-1, keepdim=True)
        at = lattice.number(index + GLOSS_EVERY * corner, GLOSS_EVERY)
        result = result + torch.where(at[:, None] < 0, 0, weight * gloss[at])
    return result


def occupied_bricks(lattice, filled):
    """Which bricks hold points that are `filled` [512 B], or border on such points of the next bricks; bool
    [X, Y, Z]."""
    filled, (X, Y, Z) = filled.view(-1, BRICK, BRICK, BRICK), lattice.bricks.shape
    occupied = torch.zeros_like(lattice.bricks, dtype=torch.bool)
    for a, b, c in itertools.product((0, 1), repeat=3):
        # of the next brick along an axis only the first points count
        border = filled[:, :1 if a else None, :1 if b else None, :1 if c else None].flatten(1).any(1)
        found = F.pad((lattice.bricks >= 0) & border[lattice.bricks], (0, 1) * 3)
        occupied |= found[a:a + X, b:b + Y, c:c + Z]
    return occupied


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
    lattice = Lattice(baking.cells, baking.box, resolution)
    opacity = bake_opacity(baking, lattice)
    seen, viewdirs = look(baking, lattice, opacity)
    opacity *= seen
    numbers = opacity.nonzero()[:, 0]
    say(f'{" × ".join(map(str, lattice.shape))} points, of which {len(numbers)} are visible')
    if not len(numbers):
        raise UserError(f'{baking.path}: found nothing that the training views see, expected a trained scene')
    if len(numbers) > max_points:
        return None, len(numbers)

    basis = learn_basis(baking, lattice, numbers, viewdirs)
    gloss = bake_gloss(baking, lattice, opacity, viewdirs, basis)
    base = bake_base(baking, lattice, numbers, viewdirs, gloss, basis)
    base = ((base - BASE_LOW) / BASE_RANGE * 255).round().clamp(0, 255).byte()
    occupied = occupied_bricks(lattice, opacity > 0)
    kept = lattice.bricks[occupied]
    opacity = (opacity * 255).round().byte()
    field = SparseField(lattice.low, lattice.spacing, number_bricks(occupied),
                        opacity.view(-1, BRICK ** 3)[kept], base[opacity[numbers] > 0],
                        signed_bytes(gloss).view(len(lattice.corners), -1, 3 * N_BASIS)[kept],
                        signed_bytes(basis(octahedron(TABLE_SIDE).to(base.device))))
    return field, len(numbers)
