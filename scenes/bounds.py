"""The bounding box of a scene, and the cells of it that may contain something, from cameras and silhouettes.

A box is a tensor [2, 3]: lowest and highest corner. Cells divide each side of a box into `resolution`
intervals.
"""
import numpy as np
import torch

from run_nerf_helpers import BoundedModule, ndc_rays, pixel_rays

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


def fit_bounds(modules, scene, ndc, resolution, aabb=None):
    """Give the `BoundedModule`s among `modules` the bounding box of a scene; the others are left as they are.
    The other arguments are those of `find_bounds`."""
    bounded = [part for module in modules for part in module.modules() if isinstance(part, BoundedModule)]
    if bounded:
        aabb, possible = find_bounds(scene, ndc, resolution, aabb)
    for module in bounded:
        module.set_aabb(aabb, possible)


def find_bounds(scene, ndc, resolution, aabb=None):
    """The bounding box of a scene, and which of its cells may contain something.

    Images with alpha bound the scene by their visual hull (Laurentini 1994). Without alpha, and in NDC, the
    box holds everything that the training views see between near and far.

    Args:
      scene: a `Scene`.
      ndc: whether rays are mapped to normalised device coordinates.
      resolution: number G of cells along a side.
      aabb: the box as six numbers, lowest corner first, if it is known. Cells of it that few views see are
        kept.
    Returns:
      aabb: [2, 3].
      possible: cells that may contain something, bool [G, G, G]; None for all.
    """
    if aabb is None:
        box = box_of_rays(scene, ndc, scene.poses[scene.i_train])
    else:
        box = torch.tensor(aabb, dtype=torch.float32).view(2, 3)
    if scene.alphas is None or ndc:
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
    possible = torch.zeros([resolution] * 3, dtype=torch.bool)
    possible[((centers - box[0]) / (2 * half)).long().unbind(-1)] = True
    return box, possible


def box_of_rays(scene, ndc, poses):
    """The box [2, 3] around everything that cameras `poses` [N, 3, 4] see between near and far.

    With `ndc` the box is in normalised device coordinates.
    """
    x, y = torch.meshgrid(torch.tensor([0.0, scene.W]), torch.tensor([0.0, scene.H]), indexing='xy')
    c2w = torch.from_numpy(poses)[:, None, None]
    rays_o, rays_d = pixel_rays(x.expand(len(c2w), 2, 2), y.expand(len(c2w), 2, 2), scene.K, c2w)
    if ndc:
        rays_o, rays_d = ndc_rays(scene.H, scene.W, scene.K[0, 0], 1.0, rays_o, rays_d)
    ends = torch.cat([(rays_o + t * rays_d).reshape(-1, 3) for t in (scene.near, scene.far)])
    return add_margin(ends.amin(0), ends.amax(0))


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
    octants = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)                   # [8, 3]
    for _ in range(halvings):
        half = half / 2
        centers = (centers[:, None] + octants * half).reshape(-1, 3)
        centers = centers[in_visual_hull(scene, centers, half, keep_rarely_seen)]
    return centers, half


def divide_box(aabb, resolution):
    """Centres [resolution³, 3] of a box's cells, and half the extent [3] of a cell."""
    half = (aabb[1] - aabb[0]) / resolution / 2
    index = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 3, indexing='ij'), -1).reshape(-1, 3)
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
    radius = torch.linalg.vector_norm(half).item()
    remaining = torch.arange(len(centers))
    num_views, num_opaque = torch.zeros(len(centers)), torch.zeros(len(centers))
    K = torch.as_tensor(scene.K, dtype=torch.float32)
    size = torch.tensor([scene.W, scene.H])
    for view in scene.i_train:
        # the square of pixels that each cell's bounding sphere projects to, and the range of its depths
        c2w = torch.from_numpy(scene.poses[view])
        in_camera = (centers[remaining] - c2w[:, 3]) @ c2w[:, :3]                     # [N_remaining, 3]
        depth = -in_camera[:, 2:]
        nearest, farthest = depth - radius, depth + radius
        focal = K.diagonal()[:2]
        pixel = K[:2, 2] + in_camera[:, :2] * focal * torch.tensor([1.0, -1.0]) / depth.clamp(min=1e-6)
        reach = PERSPECTIVE_STRETCH * focal.max() * radius / nearest.clamp(min=1e-6) + 1
        low, high = pixel - reach, pixel + reach                                      # [N_remaining, 2]

        in_range = (farthest > scene.near) & (nearest < scene.far)                    # [N_remaining, 1]
        seen = (in_range & (high > 0) & (low < size)).all(-1).nonzero()[:, 0]
        x0, y0 = torch.minimum(low[seen].clamp(min=0), size).long().T
        x1, y1 = torch.minimum(high[seen].ceil().clamp(min=0), size).long().T
        sums = summed_area_table(scene.alphas[view] > 0)
        opaque = seen[sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0] > 0]
        num_views[remaining[seen]] += 1
        num_opaque[remaining[opaque]] += 1

        ruled_out = ((nearest > scene.near) & (farthest < scene.far) & (low > 0) & (high < size)).all(-1)
        ruled_out[opaque] = False
        remaining = remaining[~ruled_out]
    hull = torch.zeros(len(centers), dtype=torch.bool)
    if keep_rarely_seen:
        hull[remaining] = num_opaque[remaining] > 0
        return hull
    hull[remaining] = num_opaque[remaining] > MIN_OPAQUE_FRACTION * num_views[remaining]
    return hull & (num_views > MIN_VIEW_FRACTION * num_views[hull].amax()) if hull.any() else hull


def summed_area_table(mask):
    """Number of true values of `mask` [H, W] above and to the left of each pixel corner, [H + 1, W + 1]."""
    sums = mask.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    return torch.from_numpy(np.pad(sums, ((1, 0), (1, 0))))
