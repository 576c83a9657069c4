"""Depths of the sparse points of a COLMAP model in the training views."""
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import check_poses
from scenes.colmap import depths_of, model_folder, read_model
from scenes.errors import UserError

# The cameras of the model and of the scene may differ by this share of their RMS distance from their mean.
MAX_MISFIT = 0.1


class SparseDepths(NamedTuple):
    """What is known about the depth of P pixels."""
    view: np.ndarray    # the view of each pixel, int64 [P]
    y: np.ndarray       # its row, int64 [P]
    x: np.ndarray       # its column, int64 [P]
    t: np.ndarray       # how far away the point is, in units of rays_d, float32 [P]
    weight: np.ndarray  # from 0 to 1, less for points with large reprojection errors, float32 [P]


def sparse_depths(basedir, scene):
    """The `SparseDepths` of the training views of a `Scene`, from `sparse/` in its folder. The model must be
    of the same images, not of distorted ones if the scene has undistorted ones.

    Weights are those of DS-NeRF (Deng et al., CVPR 2022): exp(-(e / mean e)²) of the reprojection error e.

    Raises:
      UserError: there is no model, or it is not of these views.
    """
    folder = model_folder(Path(basedir))
    model = read_model(folder)
    views = photos_of_views(folder, model, scene)
    check_poses(np.stack([photo.c2w for photo in model.photos]),
                lambda index: f'{folder}: {model.photos[index].name}')
    rotation, scale, translation = similarity(
        folder, np.stack([photo.c2w for photo in views.values()]), scene.poses[list(views)])
    points = scale * model.points @ rotation.T + translation
    known = np.isfinite(model.errors) & (model.errors >= 0)  # COLMAP writes -1 for errors not computed
    mean = model.errors[known].mean() if known.any() else 1.0
    weights = np.exp(-(np.where(known, model.errors, mean) / max(mean, 1e-9)) ** 2)

    parts = []
    for view in np.intersect1d(scene.i_train, list(views)):
        photo, camera, pose = views[view], scene.cameras[view], scene.poses[view]
        seen = np.searchsorted(model.numbers, photo.points)
        size, recorded = np.array([camera.W, camera.H]), model.cameras[photo.camera]
        if abs(camera.H * recorded.W - camera.W * recorded.H) > max(recorded.H, recorded.W):
            raise UserError(f'{folder}: found {photo.name} of {recorded.W}×{recorded.H} pixels, expected the '
                            f'shape of the image that is trained, {camera.W}×{camera.H}')
        x, y = np.floor(photo.pixels * size / [recorded.W, recorded.H]).astype(np.int64).T
        t = depths_of(points[seen], pose, camera.fisheye)
        use = (t > 0) & np.isfinite(t) & (x >= 0) & (y >= 0) & (x < camera.W) & (y < camera.H)
        if scene.masks is not None:
            use[use] = scene.masks[view][y[use], x[use]]
        parts.append(np.stack([np.full(len(x), view), y, x, t, weights[seen]])[:, use])
    view, y, x, t, weight = np.concatenate([np.empty((5, 0)), *parts], 1)
    if not len(view):
        raise UserError(f'{folder}: found no points in the training views, expected some')
    return SparseDepths(*(part.astype(np.int64) for part in (view, y, x)),
                        *(part.astype(np.float32) for part in (t, weight)))


def photos_of_views(folder, model, scene):
    """The model's photo of each view that it has, a dict by index: by the paths without endings or, if none
    agrees and there are as many, by their order. A model has the paths within the scene or, more often,
    within its folder of images; those that several views or photos then share are not used."""
    photos = index_of_unique([Path(photo.name).with_suffix('').parts for photo in model.photos])
    paths = [Path(name).with_suffix('').parts for name in scene.names or ()]
    ways = [index_of_unique(paths), index_of_unique([path[1:] for path in paths])]
    found = max(({view: model.photos[photos[path]] for path, view in views.items() if path in photos}
                 for views in ways), key=len)
    if not found and len(scene.poses) == len(model.photos):
        found = dict(enumerate(model.photos))
    if len(found) < 2:
        raise UserError(f'{folder}: found photos such as {model.photos[0].name}, expected the '
                        f'{len(scene.poses)} of the scene' + (f', such as {scene.names[0]}' if paths else ''))
    return found


def index_of_unique(items):
    """The index of each item that occurs once in the list `items`, a dict."""
    counts = Counter(items)
    return {item: index for index, item in enumerate(items) if counts[item] == 1}


def similarity(folder, source, target):
    """Rotation [3, 3], scale and translation [3] that map cameras `source` to `target`, c2w [N, 3, 4] each.
    Raises UserError if they do not fit."""
    u, _, vt = np.linalg.svd(np.einsum('nij,nkj->ik', target[:, :, :3], source[:, :, :3]))
    rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    centers = [cameras[:, :, 3].mean(0) for cameras in (source, target)]
    before = (source[:, :, 3] - centers[0]) @ rotation.T
    after = target[:, :, 3] - centers[1]
    scale = (before * after).sum() / max((before ** 2).sum(), 1e-12)
    misfit = np.linalg.norm(scale * before - after) / max(np.linalg.norm(after), 1e-12)
    if not (scale > 0 and misfit < MAX_MISFIT):
        raise UserError(f'{folder}: its cameras are not those of the scene; expected a model of the same '
                        'photos')
    return rotation, scale, centers[1] - scale * rotation @ centers[0]
