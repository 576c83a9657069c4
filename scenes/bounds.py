"""The bounding box of a scene, and the cells of it that may contain something, from cameras and silhouettes.

A box is a tensor [2, 3]: lowest and highest corner. Cells divide each side of a box into `resolution`
intervals.
"""
import numpy as np
import torch
import torch.nn.functional as F

from run_nerf_helpers import BoundedModule, cast_rays, ndc_rays
from scenes.cameras import distort

# A box is widened by this fraction of its extent on each side.
BOX_MARGIN = 0.01
# The visual hull is first computed with about this number of cells along a side.
HULL_RESOLUTION = 32
# The box around the visual hull is found after halving these cells this number of times.
BOX_SUBDIVISIONS = 2
# A cell of the visual hull has opaque pixels in more than this fraction of the views that see it.
MIN_OPAQUE_FRACTION = 0.5
# A cell of the visual hull is seen by more than this fraction of the views that see the most visible cell.
MIN_VIEW_FRACTION = 0.25
# A sphere reaches at most this much farther from its centre's pixel than focal length * radius / depth, up to
# about 48 degrees off the optical axis.
PERSPECTIVE_STRETCH = 1.5
# Lens distortion applies to positions up to this multiple of the distance of the image's corners.
MAX_OUTSIDE = 1.1
# Positions beyond are this many times as far from the centre.
FAR_OUTSIDE = 10
# This number of cells is projected into a view at once, so that intermediate results stay small.
CELLS_AT_ONCE = 1 << 16


def fit_bounds(modules, scene, ndc, resolution, aabb=None, contract=False):
    """Give the `BoundedModule`s among `modules` the bounding box of a scene; the others are left as they are.
    With `contract`, the box is what is not contracted: `aabb` or, if not given, the `cube_of_cameras`. The
    other arguments are those of `find_bounds`."""
    bounded = [part for module in modules for part in module.modules() if isinstance(part, BoundedModule)]
    if contract:
        possible = None
        aabb = cube_of_cameras(scene) if aabb is None else torch.tensor(aabb).view(2, 3)
    elif bounded:
        aabb, possible = find_bounds(scene, ndc, resolution, aabb, bounded[0].aabb.device)
    for module in bounded:
        module.set_aabb(aabb, possible)


def find_bounds(scene, ndc, resolution, aabb=None, device='cpu'):
    """The bounding box of a scene, and which of its cells may contain something.

    Images with alpha bound the scene by their visual hull (Laurentini 1994). Without alpha, and in NDC, the
    box holds everything that the training views see between near and far.

    Args:
      scene: a `Scene`.
      ndc: whether rays are mapped to normalised device coordinates.
      resolution: number G of cells along a side.
      aabb: the box as six numbers, lowest corner first, if it is known. Cells of it that few views see are
        kept.
      device: where the bounds are computed, and returned.
    Returns:
      aabb: [2, 3].
      possible: cells that may contain something, bool [G, G, G]; None for all.
    """
    if aabb is None:
        box = box_of_rays(scene, ndc, scene.i_train)
    else:
        box = torch.tensor(aabb, dtype=torch.float32).view(2, 3)
    box = box.to(device)
    fisheye = any(camera.fisheye for camera in scene.cameras)
    if scene.alphas is None or scene.masks is not None or ndc or fisheye:
        return box, None
    if aabb is None:
        # first find a tighter box, then the cells of that box
        centers, half = visual_hull(scene, box, HULL_RESOLUTION * 2 ** BOX_SUBDIVISIONS)
        if len(centers) == 0:  # the images show nothing but background
            return box, None
        box = add_margin(centers.amin(0) - half, centers.amax(0) + half)
    centers, half = visual_hull(scene, box, resolution, keep_rarely_seen=aabb is not None)
    if len(centers) == 0:
        return box, None
    possible = torch.zeros([resolution] * 3, dtype=torch.bool, device=device)
    possible[((centers - box[0]) / (2 * half)).long().unbind(-1)] = True
    return box, possible


def cube_of_cameras(scene):
    """The cube [2, 3] around the cameras of the training views, with sides of at least twice `near`."""
    positions = torch.from_numpy(scene.poses[scene.i_train][:, :, 3])
    low, high = positions.amin(0), positions.amax(0)
    half = (0.5 * (high - low).amax()).clamp(min=scene.near)
    center = 0.5 * (low + high)
    return torch.stack([center - half, center + half])


def box_of_rays(scene, ndc, views):
    """The box [2, 3] around everything that `views` [N] see between near and far.

    With `ndc` the box is in normalised device coordinates.
    """
    borders = {camera: directions_to_border(camera) for camera in dict.fromkeys(scene.cameras)}
    dirs = torch.from_numpy(np.stack([borders[scene.cameras[view]] for view in views])).float()  # [N, 8, 3]
    rays_o, rays_d = cast_rays(dirs, torch.from_numpy(scene.poses[views])[:, None])
    if ndc:
        rays_o, rays_d = ndc_rays(scene.H, scene.W, scene.K[0, 0], 1.0, rays_o, rays_d)
    ends = torch.cat([(rays_o + t * rays_d).reshape(-1, 3) for t in (scene.near, scene.far)])
    return add_margin(ends.amin(0), ends.amax(0))


def directions_to_border(camera):
    """Directions [8, 3] to the corners of a camera's image and the middles of its sides."""
    x, y = np.meshgrid([0, camera.W / 2, camera.W], [0, camera.H / 2, camera.H])
    border = np.arange(9) != 4
    return camera.directions(x.flatten()[border], y.flatten()[border])


def add_margin(low, high):
    """The box [2, 3] from `low` to `high`, widened by BOX_MARGIN."""
    margin = BOX_MARGIN * (high - low).clamp(min=1e-6)
    return torch.stack([low - margin, high + margin])


def visual_hull(scene, aabb, resolution, keep_rarely_seen=False):
    """The cells of a box that the silhouettes in the training images do not rule out, from coarse to fine.

    Returns:
      centers: of these cells, [N, 3].
      half: half the extent of a cell, [3].
    """
    halvings = 0
    while resolution % 2 == 0 and resolution > HULL_RESOLUTION:
        resolution, halvings = resolution // 2, halvings + 1
    centers, half = divide_box(aabb, resolution)
    centers = centers[in_visual_hull(scene, centers, half, keep_rarely_seen)]
    octants = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], device=aabb.device)] * 3)  # [8, 3]
    for _ in range(halvings):
        half = half / 2
        centers = (centers[:, None] + octants * half).reshape(-1, 3)
        centers = centers[in_visual_hull(scene, centers, half, keep_rarely_seen)]
    return centers, half


def divide_box(aabb, resolution):
    """Centres [resolution³, 3] of a box's cells, and half the extent [3] of a cell."""
    half = (aabb[1] - aabb[0]) / resolution / 2
    index = torch.cartesian_prod(*[torch.arange(resolution, device=aabb.device)] * 3)
    return aabb[0] + (2 * index + 1) * half, half


def in_visual_hull(scene, centers, half, keep_rarely_seen=False):
    """Which cells belong to the visual hull of the training images.

    A view sees a cell if a part of it lies in the image and between near and far. The view rules the cell out
    if it sees all of it and only transparent pixels there. The remaining cells need opaque pixels in enough
    of the views that see them, and enough such views, because few views hardly ever rule a cell out.

    Args:
      scene: a `Scene` with alphas.
      centers: of the cells, [N, 3].
      half: half the extent of a cell, [3].
      keep_rarely_seen: keep every cell that is not ruled out and has opaque pixels in at least one view.
    Returns:
      bool [N].
    """
    device, radius = centers.device, torch.linalg.vector_norm(half).item()
    num_views, num_opaque = torch.zeros(2, len(centers), dtype=torch.int32, device=device)
    remaining = torch.ones(len(centers), dtype=torch.bool, device=device)
    # operations on whole rows of coordinates, [3, N], are several times faster than on columns
    parts = [part.split(CELLS_AT_ONCE, -1)
             for part in (centers.T.contiguous(), num_views, num_opaque, remaining)]
    axes, lenses = torch.tensor([1, -1, -1, 1], device=device), {}  # y down, z forward
    poses = torch.from_numpy(scene.poses).to(device) * axes
    for view in scene.i_train:
        camera = scene.cameras[view]
        lens = lenses.setdefault(camera, Lens(camera, device))
        frustum = [[0, 0, scene.near], [camera.W, camera.H, scene.far]]
        first, last = torch.tensor(frustum, dtype=torch.float32, device=device)[..., None]  # [3, 1] each
        sums = summed_area_table(torch.from_numpy(scene.alphas[view]).to(device) > 0)
        for part, part_views, part_opaque, part_remaining in zip(*parts, strict=True):
            low, high = project_spheres(lens, poses[view], part, radius)
            # one comparison of the smallest distance takes less time than six comparisons
            seen = torch.minimum(high - first, last - low).amin(0) > 0
            seen_whole = torch.minimum(low - first, last - high).amin(0) > 0
            corners = [x[:2].clamp(min=0).minimum(last[:2]).int() for x in (low, high.ceil())]
            opaque = num_true(sums, *corners) > 0
            part_views += seen
            part_opaque += seen & opaque
            part_remaining &= opaque | ~seen_whole
    if keep_rarely_seen:
        return remaining & (num_opaque > 0)
    hull = remaining & (num_opaque > MIN_OPAQUE_FRACTION * num_views)
    return hull & (num_views > MIN_VIEW_FRACTION * num_views[hull].amax()) if hull.any() else hull


class Lens:
    """How a `Camera` without fisheye lens projects directions to pixels."""

    def __init__(self, camera, device):
        K = torch.as_tensor(camera.K, dtype=torch.float32, device=device)
        self.focal, self.center, self.distortion = K.diagonal()[:2, None], K[:2, 2:], camera.distortion
        self.stretch = PERSPECTIVE_STRETCH * self.focal.max()
        if self.distortion is not None:
            border = directions_to_border(camera)[:, :2]
            self.limit = MAX_OUTSIDE * np.linalg.norm(border, axis=-1).max()
            beyond, here = (distort(*(scale * border.T), self.distortion) for scale in (1.001, 1.0))
            steps = np.subtract(beyond, here)
            slopes = np.linalg.norm(steps, axis=0) / np.linalg.norm(0.001 * border, axis=-1)
            self.stretch = self.stretch * max(1.0, slopes.max())

    def project(self, plane):
        """Pixels of positions in the image plane, [2, N] both."""
        if self.distortion is not None:
            # beyond the image the polynomials mean nothing, and positions are moved far away
            inside = torch.linalg.vector_norm(plane, dim=0) < self.limit
            plane = torch.where(inside, torch.stack(distort(*plane, self.distortion)), FAR_OUTSIDE * plane)
        return self.center + self.focal * plane


def project_spheres(lens, c2w, centers, radius):
    """Lower and upper bounds [3, N] each of x, y (in pixels) and depth of spheres around `centers` [3, N]. In
    `c2w` [3, 4] y points down and z forward."""
    # not a matrix product, which a GPU may compute with TF32
    in_camera = (c2w[:, :3, None] * (centers - c2w[:, 3:])[:, None]).sum(0)            # [3, N]
    depth = in_camera[2:]
    nearest, farthest = depth - radius, depth + radius
    pixel = lens.project(in_camera[:2] / depth.clamp(min=1e-6))                        # [2, N]
    reach = lens.stretch * radius / nearest.clamp(min=1e-6) + 1
    return torch.cat([pixel - reach, nearest]), torch.cat([pixel + reach, farthest])


def summed_area_table(mask):
    """Number of true values of `mask` [H, W] above and to the left of each pixel corner, [H + 1, W + 1]."""
    return F.pad(mask.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))


def num_true(sums, first, last):
    """Number of true values of a mask in rectangles, [N].

    Args:
      sums: the `summed_area_table` of the mask.
      first, last: x and y of the rectangles' first and last pixel corners, int [2, N].
    """
    (x0, y0), (x1, y1), width, sums = first, last, sums.shape[1], sums.flatten()

    def above_left(x, y):
        return sums.index_select(0, y * width + x)  # faster than sums[y, x]
    return above_left(x1, y1) - above_left(x1, y0) - above_left(x0, y1) + above_left(x0, y0)
