"""A texture for a mesh: xatlas unwraps it, and each texel gets the colour of its point of the surface."""
import numpy as np

from scenes.errors import UserError

# Charts are this many texels apart, so that neither filtering nor smaller copies of the texture mix them.
PADDING = 4
# At most about this many texels are tested at once.
TEXELS_AT_ONCE = 2 ** 21


def unwrap(vertices, faces, size):
    """Lay out a mesh in a square texture of `size` texels along a side.

    Args:
      vertices: [V, 3]; faces: [F, 3].
    Returns:
      origin: which vertex each new one is a copy of, [W]; vertices at seams have several copies.
      faces: [F, 3], of the new vertices.
      uv: of the new vertices, [W, 2] in [0, 1], from the lower left corner.
    Raises:
      UserError: xatlas is missing.
    """
    try:
        import xatlas
    except ImportError:
        raise UserError('--texture needs xatlas: pip install -r requirements-tools.txt') from None
    atlas, options = xatlas.Atlas(), xatlas.PackOptions()
    options.resolution, options.padding = size, PADDING
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    atlas.generate(pack_options=options)
    origin, faces, uv = atlas[0]
    return origin.astype(np.int64), faces.astype(np.int64), uv


def texels_of(corners, height, width):
    """The texels whose centres lie in triangles.

    Args:
      corners: of the triangles [F, 3, 2]: x, y in texels, from the upper left corner of the texture.
    Yields:
      face, row, column [M] each, and barycentric coordinates [M, 3], a part of the triangles at a time.
    """
    limits = np.array([width, height])
    low = np.ceil(corners.min(1) - 0.5).clip(0, limits).astype(np.int64)               # [F, 2]
    sizes = (np.floor(corners.max(1) - 0.5) + 1).clip(0, limits).astype(np.int64) - low
    areas = sizes.clip(0).prod(-1)
    parts = np.cumsum(areas) // TEXELS_AT_ONCE
    for part in np.unique(parts):
        faces = np.flatnonzero((parts == part) & (areas > 0))
        face = faces.repeat(areas[faces])
        k = np.arange(len(face)) - (np.cumsum(areas[faces]) - areas[faces]).repeat(areas[faces])
        column, row = low[face, 0] + k % sizes[face, 0], low[face, 1] + k // sizes[face, 0]
        center = np.stack([column, row], -1) + 0.5
        opposite = [cross(corners[face, (i + 2) % 3] - corners[face, (i + 1) % 3],
                          center - corners[face, (i + 1) % 3]) for i in range(3)]
        with np.errstate(divide='ignore', invalid='ignore'):
            barycentric = np.stack(opposite, -1) / np.sum(opposite, 0)[:, None]
        inside = (barycentric >= 0).all(-1)
        yield face[inside], row[inside], column[inside], barycentric[inside]


def cross(a, b):
    """The cross product of vectors of a plane, [..., 2] to [...]."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def bake_texture(color_of, faces, uv, size):
    """The texture of a mesh, uint8 [size, size, 3].

    Args:
      color_of: function of the numbers of triangles [M] and barycentric coordinates [M, 3] that returns the
        colours in [0, 1] of these points of the surface, [M, 3].
      faces, uv: as `unwrap` returns them.
    """
    texture, filled = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
    corners = uv[faces] * [size, -size] + [0, size]
    for face, row, column, barycentric in texels_of(corners, size, size):
        texture[row, column] = np.round(255 * color_of(face, barycentric))
        filled[row, column] = True
    for _ in range(PADDING):  # colour the gaps between charts as their borders
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            found = np.roll(filled, shift, axis) & ~filled
            texture[found] = np.roll(texture, shift, axis)[found]
            filled |= found
    return texture
