"""The LLFF layout: photos of a real scene, with poses and bounds from structure from motion.

    scene/poses_bounds.npy   [N, 17]: a 3 × 5 matrix (rotation in axes down, right, back | position | H, W, focal),
                             then the nearest and farthest depth seen
    scene/images/            N photos, in the order of their names
    scene/images_<factor>/   the same, reduced; made here where it is missing
"""
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cameras import check_poses, focus_point, homogeneous, look, normalize
from errors import UserError
from file_io import IMAGE_ENDINGS, composite, read_array, read_image, resize_area, write_image

LAYOUT = 'expected poses_bounds.npy and images/ or images_<factor>/'
PATH_VIEWS = 120


# --- files ------------------------------------------------------------------------------------------------------

def list_images(folder):
    """The image files of a folder, sorted by name; hidden files are none."""
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith('.'))


def read_poses_bounds(path):
    """poses [N, 3, 5] (columns right, up, back, position, [H, W, focal]) and bounds [N, 2], float64.

    Raises:
      UserError: no such file, not [N, 17], or not all finite.
    """
    if not path.is_file():
        raise UserError(f'{path}: no such file; {LAYOUT}')
    table = read_array(path)
    if table.ndim != 2 or table.shape[1] != 17 or not len(table):
        raise UserError(f'{path}: found an array of shape {list(table.shape)}, expected [N, 17]')
    bad = np.flatnonzero(~np.isfinite(table).all(-1))
    if bad.size:
        raise UserError(f'{path}: found NaN or infinity in row {bad[0]}')
    poses, bds = table[:, :15].reshape(-1, 3, 5), table[:, 15:]
    if not (bds > 0).all() or not (bds[:, 0] < bds[:, 1]).all():
        row = np.flatnonzero(~((bds > 0).all(-1) & (bds[:, 0] < bds[:, 1])))[0]
        raise UserError(f'{path}: found bounds {bds[row].tolist()} in row {row}, expected 0 < near < far')
    if not (poses[:, :, 4] > 0).all():
        raise UserError(f'{path}: found H, W, focal {poses[:, :, 4].min(0).tolist()}, expected positive numbers')
    check_poses(poses, lambda index: f'{path}: row {index}')
    down, right, others = poses[..., 0:1], poses[..., 1:2], poses[..., 2:]
    return np.concatenate([right, -down, others], -1), bds


def reduce_images(basedir, factor):
    """Make `images_<factor>/` from `images/`: an area filter, into a temporary folder that is renamed when complete."""
    target, source = basedir / f'images_{factor}', basedir / 'images'
    paths = list_images(source) if source.is_dir() else []
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f'{source}: found {max(names, key=names.count)} twice with different endings, expected one of them')
    if not paths:
        raise UserError(f'{basedir}: found neither {target.name}/ nor photos in images/ to make it from; {LAYOUT}')
    try:
        part = Path(tempfile.mkdtemp(prefix=f'.{target.name}.part', dir=basedir))
    except OSError as error:
        raise UserError(f'{target}: is missing and cannot be made ({error.strerror})') from None

    def reduce(path):
        image = read_image(path)
        height, width = (max(1, round(side / factor)) for side in image.shape[:2])
        write_image(part / f'{path.stem}.png', np.round(resize_area(image, height, width)).astype(np.uint8))

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(reduce, paths))
        part.chmod(0o755)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load_llff_files(basedir, factor, white_bkgd=False):
    """8-bit images [N, H, W, 3], composited on white or black where they have alpha; poses [N, 3, 5] with H, W, focal of
    these images; bounds [N, 2]."""
    basedir = Path(basedir)
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; {LAYOUT} in it')
    poses, bds = read_poses_bounds(basedir / 'poses_bounds.npy')
    factor = max(factor or 1, 1)
    folder = basedir / ('images' if factor == 1 else f'images_{factor}')
    if not folder.is_dir():
        if factor == 1:
            raise UserError(f'{folder}: no such folder; {LAYOUT}')
        folder = reduce_images(basedir, factor)
    paths = list_images(folder)
    if len(paths) != len(poses):
        raise UserError(f'{folder}: found {len(paths)} images, but {len(poses)} poses in poses_bounds.npy')

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read_image, paths))
    for path, image in zip(paths, images):
        if image.shape[:2] != images[0].shape[:2]:
            raise UserError(f'{path}: found {image.shape[1]}×{image.shape[0]} pixels, '
                            f'expected {images[0].shape[1]}×{images[0].shape[0]} as in {paths[0]}')
    H, W = images[0].shape[:2]
    for recorded, found, name in ((poses[0, 0, 4], H, 'high'), (poses[0, 1, 4], W, 'wide')):
        if abs(recorded / factor - found) > 1:
            raise UserError(f'{folder}: found images {found} pixels {name}, expected {recorded:g} / {factor} '
                            'as poses_bounds.npy says')
    poses[:, :2, 4] = H, W
    poses[:, 2, 4] /= factor
    images = [np.round(composite(image / np.float32(255), white_bkgd) * 255).astype(np.uint8) if image.shape[-1] == 4
              else image for image in images]
    return np.stack(images), poses, bds


# --- poses ------------------------------------------------------------------------------------------------------

def average_pose(poses):
    """The mean camera, c2w [3, 4]: mean position, mean axes made orthogonal."""
    return look(poses[:, :3, 2].sum(0), poses[:, :3, 1].sum(0), poses[:, :3, 3].mean(0))


def recenter_poses(poses):
    """Move the world so that the mean camera is at the origin and looks along -z."""
    moved = poses.copy()
    moved[:, :3, :4] = (np.linalg.inv(homogeneous(average_pose(poses))) @ homogeneous(poses))[:, :3, :4]
    return moved


def spiral_path(center, up, radii, focus_depth, rotations, views, rate=0.5):
    """Poses [views, 3, 4] on a spiral about the camera `center`, all looking at a point `focus_depth` before it."""
    target = center @ np.array([0, 0, -focus_depth, 1.0])
    path = []
    for theta in np.linspace(0, 2 * np.pi * rotations, views + 1)[:-1]:
        offset = np.array([np.cos(theta), -np.sin(theta), -np.sin(theta * rate)]) * radii
        position = center @ np.append(offset, 1.0)
        path.append(look(position - target, up, position))
    return np.stack(path)


def forward_facing_path(poses, bds, path_zflat):
    """The spiral of the paper's videos: as wide as the cameras are spread, focused between near and far."""
    near, far = bds.min() * 0.9, bds.max() * 5.0
    focus_depth = 1.0 / (0.25 / near + 0.75 / far)  # a mean in disparity that leans towards far
    center, up = average_pose(poses), normalize(poses[:, :3, 1].sum(0))
    radii = np.percentile(np.abs(poses[:, :3, 3]), 90, 0)
    if not path_zflat:
        return spiral_path(center, up, radii, focus_depth, rotations=2, views=PATH_VIEWS)
    center[:, 3] -= 0.1 * near * center[:, 2]
    return spiral_path(center, up, radii * [1, 1, 0], focus_depth, rotations=1, views=PATH_VIEWS // 2)


def spherify_poses(poses, bds):
    """For cameras all around an object: move the point they look at to the origin, up to z, their mean distance to 1.

    Returns poses, a circular path [PATH_VIEWS, 3, 4] at the cameras' mean height, and the bounds in the new unit.
    """
    focus = focus_point(poses)
    up = normalize((poses[:, :3, 3] - focus).mean(0))
    right = normalize(np.cross([0.1, 0.2, 0.3], up))  # any direction across
    world = np.stack([right, normalize(np.cross(up, right)), up, focus], 1)
    moved = poses.copy()
    moved[:, :3, :4] = (np.linalg.inv(homogeneous(world)) @ homogeneous(poses))[:, :3, :4]
    scale = 1.0 / np.sqrt(np.mean(np.sum(moved[:, :3, 3] ** 2, -1)))
    moved[:, :3, 3] *= scale

    height = moved[:, 2, 3].mean()
    radius = np.sqrt(1 - height ** 2)
    path = []
    for angle in np.linspace(0, 2 * np.pi, PATH_VIEWS):
        position = np.array([radius * np.cos(angle), radius * np.sin(angle), height])
        path.append(look(position, np.array([0, 0, 1.0]), position))
    return moved, np.stack(path), bds * scale


def place_poses(poses, bds, recenter=True, bd_factor=.75, spherify=False, path_zflat=False):
    """Scale and centre poses [N, 3, 5] and bounds as `load_llff_data` describes.

    Returns poses, bds, render_poses [M, 3, 5] and the index of the most central camera.
    """
    poses, bds = poses.astype(np.float32), bds.astype(np.float32)
    scale = 1.0 if bd_factor is None else 1.0 / (bds.min() * bd_factor)
    poses[:, :3, 3] *= scale
    bds = bds * scale
    with np.errstate(divide='ignore', invalid='ignore'):  # looked at below
        if recenter:
            poses = recenter_poses(poses)
        if spherify:
            poses, path, bds = spherify_poses(poses, bds)
        else:
            path = forward_facing_path(poses, bds, path_zflat)
    if not (np.isfinite(poses).all() and np.isfinite(path).all()):
        raise UserError('the cameras cannot be centred: found parallel or coinciding ones, expected cameras that differ')
    hwf = np.broadcast_to(poses[0, :3, 4:], (len(path), 3, 1))
    render_poses = np.concatenate([path, hwf], -1).astype(np.float32)
    distances = np.sum((average_pose(poses)[:, 3] - poses[:, :3, 3]) ** 2, -1)
    return poses.astype(np.float32), bds.astype(np.float32), render_poses, int(np.argmin(distances))


def load_llff_data(basedir, factor=8, recenter=True, bd_factor=.75, spherify=False, path_zflat=False):
    """Load a scene in the LLFF layout.

    Args:
      basedir: folder of the scene.
      factor: use the images reduced by it; 0, 1 or None for full size.
      recenter: put the mean camera at the origin.
      bd_factor: scale the world so that the nearest bound is 1 / bd_factor; None for no scaling.
      spherify: for cameras all around an object: origin at its centre, mean distance 1, a circular path.
      path_zflat: a flat path of half the views in place of the spiral.
    Returns:
      images: float32 [N, H, W, 3] in [0, 1].
      poses: float32 [N, 3, 5], c2w and a column H, W, focal.
      bds: float32 [N, 2], nearest and farthest depth.
      render_poses: float32 [120, 3, 5], or [60, 3, 5] with path_zflat.
      i_test: index of the most central view.
    Raises:
      UserError: files missing, damaged or not matching each other.
    """
    images, poses, bds = load_llff_files(basedir, factor)
    poses, bds, render_poses, i_test = place_poses(poses, bds, recenter, bd_factor, spherify, path_zflat)
    return images / np.float32(255), poses, bds, render_poses, i_test
