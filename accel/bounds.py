"""The box that holds a scene, found from its cameras and images; no path or file is read here."""
import numpy as np
import torch

from run_nerf_helpers import ndc_rays, pixel_rays

MARGIN = 0.01         # of each side, added to a box
COARSEST = 32         # cells along a side, where a smaller box is searched
OFTEN = 0.25          # of the views that see the cell which most see
MOSTLY = 0.5          # of the views that see a cell, if only a part: something is there
DIVISIONS = 2         # of those that are left, each in eight


def box_of_rays(scene, ndc, poses):
    """The box [2, 3] of what cameras `poses` [N, 3, 4] see between near and far, in normalised device coordinates with
    `ndc`."""
    x, y = torch.meshgrid(torch.tensor([0.0, scene.W]), torch.tensor([0.0, scene.H]), indexing='xy')
    c2w = torch.from_numpy(poses)[:, None, None]
    rays_o, rays_d = pixel_rays(x.expand(len(c2w), 2, 2), y.expand(len(c2w), 2, 2), scene.K, c2w)
    if ndc:
        rays_o, rays_d = ndc_rays(scene.H, scene.W, scene.K[0, 0], 1.0, rays_o, rays_d)
    ends = torch.cat([(rays_o + t * rays_d).reshape(-1, 3) for t in (scene.near, scene.far)])
    return widened(ends.amin(0), ends.amax(0))


def widened(low, high):
    margin = MARGIN * (high - low).clamp(min=1e-6)
    return torch.stack([low - margin, high + margin])


def cells_of(aabb, resolution):
    """Centres [G^3, 3] of a box's cells, and half the extent [3] of one."""
    half = (aabb[1] - aabb[0]) / resolution / 2
    index = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 3, indexing='ij'), -1).reshape(-1, 3)
    return aabb[0] + (2 * index + 1) * half, half


def in_hull(scene, centers, half, seen_by_few=False):
    """Which cells the images' alpha leaves: the training views have pixels there, between near and far, that are not wholly
    transparent, and none that sees all of the cell has only transparent ones. Cells that few views see, against those
    that most do, are left out: behind an object that all cameras look at, there is a shadow in which anything could be.

    Args:
      scene: a `Scene` with alpha.
      centers: of the cells [N, 3].
      half: half the extent [3] of one.
      seen_by_few: leave those cells in.
    Returns:
      [N] bool.
    """
    radius = torch.linalg.vector_norm(half).item()
    left, opaque, views = torch.arange(len(centers)), torch.zeros(len(centers)), torch.zeros(len(centers))
    K = torch.as_tensor(scene.K, dtype=torch.float32)
    focal, limits = K.diagonal()[:2].max(), torch.tensor([scene.W, scene.H])
    for view in scene.i_train:
        c2w = torch.from_numpy(scene.poses[view])
        seen = (centers[left] - c2w[:, 3]) @ c2w[:, :3]
        depth = -seen[:, 2:]
        near, far = depth - radius, depth + radius
        pixel = K[:2, 2] + seen[:, :2] * K.diagonal()[:2] * torch.tensor([1.0, -1.0]) / depth.clamp(min=1e-6)  # [., 2]
        reach = 1.5 * focal * radius / near.clamp(min=1e-6) + 1                     # pixels around a cell [., 1]
        low, high = pixel - reach, pixel + reach
        touches = ((far > scene.near) & (near < scene.far) & (high > 0) & (low < limits)).all(-1).nonzero()[:, 0]
        (x0, y0), (x1, y1) = (torch.minimum(side[touches].clamp(min=0), limits).long().T for side in (low, high.ceil()))
        counts = sums_of_corner(scene.alphas[view] > 0)
        here = counts[y1, x1] - counts[y0, x1] - counts[y1, x0] + counts[y0, x0] > 0
        opaque[left[touches[here]]] += 1
        views[left[touches]] += 1
        wholly = ((near > scene.near) & (far < scene.far) & (low > 0) & (high < limits)).all(-1)
        wholly[touches[here]] = False
        left = left[~wholly]
    hull = torch.zeros(len(centers), dtype=torch.bool)
    hull[left] = opaque[left] > (0 if seen_by_few else MOSTLY * views[left])
    if seen_by_few or not hull.any():
        return hull
    return hull & (views > OFTEN * views[hull].amax())


def sums_of_corner(mask):
    """[H + 1, W + 1]: how often the array `mask` [H, W] is true above and left of each pixel corner."""
    return torch.from_numpy(np.pad(mask.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0))))


def hull_of(scene, aabb, resolution, seen_by_few=False):
    """The cells of the box `aabb`, `resolution` along a side, that the silhouettes leave: centres [N, 3], and half the
    extent [3] of one. Large cells first; those that are left are divided. `seen_by_few` as in `in_hull`."""
    divisions = (resolution & -resolution).bit_length() - 1  # as often as it is even
    divisions = max(0, min(divisions, resolution.bit_length() - COARSEST.bit_length()))
    centers, half = cells_of(aabb, resolution >> divisions)
    eighths = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=torch.float32)
    centers = centers[in_hull(scene, centers, half, seen_by_few)]
    for _ in range(divisions):
        half = half / 2
        centers = (centers[:, None] + eighths * half).reshape(-1, 3)
        centers = centers[in_hull(scene, centers, half, seen_by_few)]
    return centers, half


def box_of_hull(scene, aabb):
    """The box [2, 3] of what the silhouettes leave of the box `aabb`, None where that is nothing."""
    centers, half = hull_of(scene, aabb, COARSEST * 2 ** DIVISIONS)
    return widened(centers.amin(0) - half, centers.amax(0) + half) if len(centers) else None


def find_bounds(scene, ndc, resolution, aabb=None):
    """Box [2, 3] of a scene, and the cells [G, G, G] of it that can hold anything, None for all: where the images have
    alpha, those that their silhouettes leave, else what the training views see between near and far.

    Args:
      scene: a `Scene`.
      ndc: rays go through normalised device coordinates.
      resolution: G.
      aabb: the box, where it is known. All of it is wanted, also where few views look.
    """
    if aabb is None:
        box = box_of_rays(scene, ndc, scene.poses[scene.i_train])
    else:
        box = torch.tensor(aabb, dtype=torch.float32).view(2, 3)
    if scene.alphas is None or ndc:
        return box, None
    if aabb is None:
        box_around = box_of_hull(scene, box)
        if box_around is None:  # nothing but background
            return box, None
        box = box_around
    centers, half = hull_of(scene, box, resolution, seen_by_few=aabb is not None)
    if len(centers) == 0:
        return box, None
    possible = torch.zeros([resolution] * 3, dtype=torch.bool)
    possible[((centers - box[0]) / (2 * half)).long().unbind(-1)] = True
    return box, possible
