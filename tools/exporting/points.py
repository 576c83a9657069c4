"""Coloured points with normals where the rays of the training views end."""
import numpy as np

from tools.exporting.field import max_depth

# Only pixels of at least this opacity become points.
OPAQUE = 0.9
# A surface is seen at less than this cosine between its normal and the ray where one side of an edge is far
# behind the other; such pixels are left out.
MIN_COSINE = 0.15
# Several times as many pixels are rendered as points are needed, because many show no surface.
PIXELS_PER_POINT = 4


def collect_points(field, num_points, aabb=None, seed=0):
    """Points of the surfaces that the training views of a `Field` see.

    Args:
      num_points: the most points; each view gives equally many, if it has them.
      aabb: only points in this box of ray space, six numbers.
      seed: of the choice of pixels.
    Returns:
      points, unit normals, colours in [0, 1]: [N, 3] each, in the coordinates of the scene.
    """
    random, scene = np.random.default_rng(seed), field.scene
    share = -(-num_points // len(scene.i_train))
    largest = max(scene.cameras[view].H * scene.cameras[view].W for view in scene.i_train)
    stride = max(1, int((largest / (PIXELS_PER_POINT * share)) ** 0.5))
    parts, depths = [], []
    for view in field.views(stride, 'points'):
        points, normals, usable = surface_of(view)
        if aabb is not None:
            usable &= in_box(field, points, aabb)
        chosen = np.flatnonzero(usable)
        chosen = np.sort(random.permutation(chosen)[:share])
        colors = view.rgb
        if field.trained.render_kwargs['white_bkgd']:  # of the surface alone
            colors = colors - (1 - view.acc[..., None])
        colors = (colors / view.acc[..., None].clip(OPAQUE)).clip(0, 1)
        parts.append([part.reshape(-1, 3)[chosen] for part in (points, normals, colors)])
        depths.append(view.t.reshape(-1)[chosen])
    depths = np.concatenate(depths)
    near = np.flatnonzero(depths < max_depth(depths))
    near = np.sort(random.permutation(near)[:num_points])
    return [np.concatenate(part)[near] for part in zip(*parts)]


def surface_of(view):
    """The surface that a `View` shows: points and unit normals towards the camera [h, w, 3], and which
    pixels are usable, bool [h, w]: opaque ones with opaque neighbours, without those at edges."""
    points = view.points()
    with np.errstate(invalid='ignore', divide='ignore'):
        down, right = (np.gradient(points, axis=axis) for axis in (0, 1))
        normals = np.cross(down, right)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        cosine = (normals * view.rays_d).sum(-1) / np.linalg.norm(view.rays_d, axis=-1)
        normals *= -np.sign(cosine)[..., None]
        usable = np.isfinite(normals).all(-1) & (view.acc >= OPAQUE) & (np.abs(cosine) >= MIN_COSINE)
    return points, normals, usable


def in_box(field, points, aabb):
    """Which `points` [h, w, 3] of the scene are in a box of ray space, six numbers."""
    low, high = np.reshape(aabb, (2, 3))
    with np.errstate(invalid='ignore'):
        points = field.from_scene(points)
        return ((points >= low) & (points <= high)).all(-1)
