"""The surface of a trained scene as a triangle mesh.

Marching cubes finds where a cell has an opacity of one half: where the density is ln 2 / cell size, or less
in scenes that are softer than that (`surface_density`). Parts that too few training views see and small
components are removed, and the rest is decimated.
"""
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from scenes.errors import UserError

# The surface encloses where rays end: its density is at most this share of the median density there. The
# value suits the demo, whose geometry is known.
MAX_RELATIVE_DENSITY = 0.35
# The density is sampled in blocks of this many cells along each side.
BLOCK = 64
# The training views are rendered with about this many rays, all together, to find out what they see.
VISIBILITY_RAYS = 2_000_000
# A surface is visible if this many views see it, or all if there are fewer than that.
MIN_VIEWS = 3
# The direction of a pixel and of what is projected to it differ by at most this many pixels; more means that
# the lens distortion does not apply there.
MAX_MISPROJECTION = 3.0
# Invisible parts with fewer triangles than this remain, so that the surface has no pinholes.
MIN_INVISIBLE = 50
# Components with less than this share of the triangles of the largest one are removed.
MIN_COMPONENT = 1e-3


class Surface(NamedTuple):
    """A triangle mesh. Triangles are counterclockwise seen from outside, in the coordinates of the scene."""
    vertices: np.ndarray  # in ray space, float64 [V, 3]
    faces: np.ndarray     # int64 [F, 3]

    def selected(self, keep):
        """The triangles `keep`, bool [F], with their vertices only."""
        used, faces = np.unique(self.faces[keep], return_inverse=True)
        return Surface(self.vertices[used], faces.reshape(-1, 3))


def make_surface(field, resolution, num_faces, aabb=None, say=print):
    """Export the surface of a `Field`.

    Args:
      resolution: cells along the longest side of the box.
      num_faces: the most triangles.
      aabb: the box in ray space, six numbers; `Field.box` if not given.
      say: called with each line for the user.
    Returns:
      a `Surface`.
    Raises:
      UserError: there is no visible surface, or a package is missing.
    """
    require_packages()
    views = list(field.views(stride_for(field.scene), 'visible surfaces'))
    ends = field.ends(views)
    box = field.box(ends) if aabb is None else torch.tensor(aabb, device=field.device).view(2, 3)
    cell = ((box[1] - box[0]).amax() / resolution).item()
    level = surface_density(field.density, ends, box, cell)
    surface = marching_cubes(field.density, box, cell, level)
    if field.ndc:  # which mirrors the scene
        surface = surface._replace(faces=surface.faces[:, ::-1])
    found = len(surface.faces)
    surface = without_invisible(surface, visible_vertices(field, surface, views))
    if not len(surface.faces):
        raise UserError(f'{field.trained.path}: found no surface in the box '
                        f'{np.round(box.tolist(), 3).tolist()} that {MIN_VIEWS} training views see; give '
                        'another one with --aabb')
    kept = len(surface.faces)
    surface = largest_components(decimated(largest_components(surface), num_faces))
    say(f'{found} triangles, {kept} of them visible, {len(surface.faces)} after decimation; cells of '
        f'{cell:.3g}, density {level:.3g} or more')
    return surface


def require_packages():
    """Raise UserError if a package that meshes need is missing."""
    try:
        import fast_simplification  # noqa: F401
        import skimage.measure  # noqa: F401
        import trimesh  # noqa: F401
    except ImportError as error:
        raise UserError(f'--mesh needs {error.name}: pip install -r requirements-tools.txt') from None


def stride_for(scene):
    """Which pixels to render, so that the rays through all training views are about VISIBILITY_RAYS."""
    pixels = sum(scene.cameras[view].H * scene.cameras[view].W for view in scene.i_train)
    return max(1, round((pixels / VISIBILITY_RAYS) ** 0.5))


def surface_density(density, ends, box, cell):
    """The density at the surface: that of a half opaque cell, but no more than what encloses most of the
    points where rays end, `ends` [N, 3], in the box. After little training, and where photos show no texture,
    rays end in fog, of which a small cell is far from half opaque."""
    found = density(ends[((ends >= box[0]) & (ends <= box[1])).all(-1)])
    found, level = found[found > 0], np.log(2) / cell
    return min(level, MAX_RELATIVE_DENSITY * found.median().item()) if len(found) else level


# --- marching cubes -----------------------------------------------------------------------------------------

def marching_cubes(density, box, cell, level):
    """The surface inside a box, closed at its sides, as a `Surface`.

    Args:
      density: function of points [N, 3] that returns densities [N].
      box: [2, 3].
      cell: side of a cell.
      level: density at the surface.
    """
    from skimage.measure import marching_cubes as triangulate
    counts = ((box[1] - box[0]) / cell).ceil().long().tolist()
    vertices, faces, num_vertices = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    # corners -1 and count + 1 are empty
    for start in product(*(range(-1, count + 1, BLOCK) for count in counts)):
        stop = [min(first + BLOCK, count + 1) for first, count in zip(start, counts)]
        opacity = sample_block(density, box[0], cell, level, start, stop, counts)
        if not opacity.min() < 0.5 < opacity.max():
            continue
        own_vertices, own_faces, *_ = triangulate(opacity, 0.5, gradient_direction='ascent')
        vertices.append(own_vertices.astype(np.float64) + start)
        faces.append(own_faces.astype(np.int64) + num_vertices)
        num_vertices += len(own_vertices)
    # blocks share the vertices on their common sides, which are equal bit for bit
    vertices, index = np.unique(np.concatenate(vertices), axis=0, return_inverse=True)
    faces = index.reshape(-1)[np.concatenate(faces)]
    distinct = (faces != np.roll(faces, 1, 1)).all(-1)
    return Surface(box[0].cpu().double().numpy() + cell * vertices, faces[distinct])


def sample_block(density, origin, cell, level, start, stop, counts):
    """How opaque it is at the corners `start` to `stop` of cells, both included, as an array: one half where
    the density is `level`, and 0 at corners outside 0 to `counts`. The opacity, unlike the density, changes
    about evenly across a surface."""
    axes = [torch.arange(first, last + 1, device=origin.device) for first, last in zip(start, stop)]
    inside = [(axis >= 0) & (axis <= count) for axis, count in zip(axes, counts)]
    opacity = torch.zeros([len(axis) for axis in axes], device=origin.device)
    corners = torch.cartesian_prod(*(axis[part] for axis, part in zip(axes, inside)))
    found = 1 - torch.exp2(-density(origin + cell * corners) / level)
    x, y, z = inside
    opacity[x[:, None, None] & y[:, None] & z] = found.nan_to_num(0.0)
    return opacity.cpu().numpy()


# --- what belongs to the scene ------------------------------------------------------------------------------

def visible_vertices(field, surface, views):
    """Which vertices of a surface at least MIN_VIEWS of `views` see, bool [V]."""
    points, needed = field.to_scene(surface.vertices), min(MIN_VIEWS, len(views))
    num_views = np.zeros(len(points), int)
    for view in views:
        undecided = np.flatnonzero(num_views < needed)
        num_views[undecided] += sees(view, points[undecided], field.pixel_centers)
    return num_views >= needed


def sees(view, points, pixel_centers):
    """Whether a `View` sees `points` [N, 3]: about half of a ray, or more, gets there; bool [N]."""
    offsets = points - view.c2w[:, 3]
    x, y = view.camera.pixels(offsets @ view.c2w[:, :3])
    at = (np.stack([y, x]) - 0.5 * pixel_centers) / view.stride                        # row, column
    last = np.array(view.t.shape)[:, None] - 1
    inside = np.flatnonzero(((at >= -0.5) & (at <= last + 0.5)).all(0))  # NaN is not
    at, distance = at[:, inside].clip(0, last), np.linalg.norm(offsets[inside], axis=-1)

    nearest = tuple(np.round(at).astype(int))
    rays_d, reach = view.rays_d[nearest], view.t * np.linalg.norm(view.rays_d, axis=-1)
    cosine = (offsets[inside] * rays_d).sum(-1) / (distance * np.linalg.norm(rays_d, axis=-1))
    pixel = view.stride / view.camera.K.diagonal()[:2].min()  # an angle
    projected = cosine > np.cos(min(MAX_MISPROJECTION * pixel, 0.5))
    result = np.zeros(len(points), bool)
    # between pixels of a slanted surface, or beyond an edge that a pixel just misses
    result[inside] = projected & (distance <= np.maximum(interpolate(reach, at), reach[nearest]))
    return result


def interpolate(image, at):
    """The values of `image` [H, W] at rows and columns `at` [2, N], bilinearly; infinity beside it."""
    first, result = np.floor(at).astype(int), 0.0
    for corner in np.ndindex(2, 2):
        row, column = first + np.array(corner)[:, None]
        weight = (1 - abs(at - (row, column))).prod(0)
        value = image[row.clip(max=image.shape[0] - 1), column.clip(max=image.shape[1] - 1)]
        result = result + weight * np.where(weight > 0, value, 0)
    return result


def without_invisible(surface, visible):
    """A surface without the triangles that have no `visible` vertex, bool [V], apart from small patches."""
    from trimesh.graph import face_adjacency
    keep = visible[surface.faces].any(-1)
    hidden = np.flatnonzero(~keep)
    patch = label(face_adjacency(surface.faces[hidden]), len(hidden))
    keep[hidden] = keep.any() & (np.bincount(patch, minlength=1)[patch] < MIN_INVISIBLE)
    return surface.selected(keep)


def largest_components(surface):
    """The components of a surface that have at least the share MIN_COMPONENT of the triangles of the largest
    one."""
    from trimesh.graph import face_adjacency
    component = label(face_adjacency(surface.faces), len(surface.faces))
    counts = np.bincount(component)
    return surface.selected((counts >= MIN_COMPONENT * counts.max())[component])


def label(edges, count):
    """The number of the connected component of each of `count` items, [count]; `edges` [E, 2] connect
    them."""
    from trimesh.graph import connected_component_labels
    return connected_component_labels(edges, count) if count else np.empty(0, int)


def decimated(surface, num_faces):
    """A surface with at most about `num_faces` triangles (Garland and Heckbert 1997)."""
    import fast_simplification
    if len(surface.faces) <= num_faces:
        return surface
    center = surface.vertices.mean(0)  # simplify computes in float32
    vertices = (surface.vertices - center).astype(np.float32)
    vertices, faces = fast_simplification.simplify(vertices, surface.faces.astype(np.int32),
                                                   target_count=num_faces)
    return Surface(vertices.astype(np.float64) + center, faces.astype(np.int64))


def find_holes(faces, vertices):
    """The holes of a mesh: a list of the centre [3] and the diameter of each, the largest first."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), -1)
    edges, counts = np.unique(edges, axis=0, return_counts=True)
    border, ends = np.unique(edges[counts == 1], return_inverse=True)
    hole = label(ends.reshape(-1, 2), len(border))
    corners = [vertices[border[hole == number]] for number in np.unique(hole)]
    holes = [(0.5 * (part.min(0) + part.max(0)), float(np.linalg.norm(np.ptp(part, axis=0))))
             for part in corners]
    return sorted(holes, key=lambda hole: -hole[1])
