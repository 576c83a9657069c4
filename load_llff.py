"""The LLFF layout: photos of a real scene, with poses and depth bounds from structure from motion.

    scene/poses_bounds.npy   [N, 17]: a 3 × 5 matrix (axes down, right, back | position | H, W, focal), and
                             the nearest and farthest depth in view
    scene/images/            N photos, in the order of their names
    scene/images_<factor>/   the same, downsampled; created on loading if it is missing
    scene/masks/             optional: only white pixels count
"""
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scenes.cameras import Camera, check_poses, focus_point, homogeneous, normalize, viewmatrix
from scenes.errors import UserError
from scenes.files import PARTIAL, read_array
from scenes.images import (
    IMAGE_EXTENSIONS,
    composite_on_bkgd,
    read_image,
    reduced_size,
    resize_area,
    write_image,
)
from scenes.scene import Scene, uses_ndc
from scenes.views import View, find_mask, load_masks

# Error messages describe the expected files in these words.
LLFF_LAYOUT = 'expected poses_bounds.npy and images/ or images_<factor>/'
# The path of the video has this number of views, half as many with `path_zflat`.
PATH_VIEWS = 120


def load_llff_scene(args):
    """The `Scene` in the folder --datadir, according to the options.

    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    images, poses, bds, render_poses, i_central = load_llff_data(
        args.datadir, args.factor, spherify=args.spherify, white_bkgd=args.white_bkgd, as_uint8=True)
    H, W, focal = poses[0, :, 4].astype(np.float64)
    K = np.array([[focal, 0, 0.5 * W], [0, focal, 0.5 * H], [0, 0, 1]])
    views = np.arange(len(images))
    i_test = views[::args.llffhold] if args.llffhold > 0 else np.array([i_central])
    near, far = (0.0, 1.0) if uses_ndc(args) else (float(bds.min()) * 0.9, float(bds.max()))
    paths = image_files(args.datadir, args.factor)
    camera = Camera(*images.shape[1:3], K)
    masks = load_masks([View(path, camera, True, find_mask(args.datadir, path), (camera.H, camera.W), None, 1)
                        for path in paths])
    return Scene(images, *images.shape[1:3], poses[:, :, :4], K, near, far, render_poses[:, :, :4],
                 np.setdiff1d(views, i_test), i_test, i_test, masks=masks, cameras=[camera] * len(paths),
                 names=[os.path.relpath(path, args.datadir) for path in paths],
                 applied_transform=placement_of(poses, bds, Path(args.datadir, 'poses_bounds.npy')))


def load_llff_data(basedir, factor=8, recenter=True, bd_factor=.75, spherify=False, path_zflat=False, *,
                   white_bkgd=False, as_uint8=False):
    """Load a scene in the LLFF layout.

    Args:
      basedir: folder of the scene.
      factor: use the images downsampled by this factor; 0, 1 or None for full size.
      recenter: put the mean camera at the origin.
      bd_factor: scale the world so that the nearest bound is 1 / bd_factor; None for no scaling.
      spherify: for cameras all around an object: origin at its centre, root mean square distance 1, and a
        circular path.
      path_zflat: a flat path of half the views instead of the spiral.
      white_bkgd: composite images with alpha on white rather than black.
      as_uint8: return the images as uint8 in [0, 255].
    Returns:
      images: float32 [N, H, W, 3] in [0, 1].
      poses: float32 [N, 3, 5], c2w and a column H, W, focal of these images.
      bds: float32 [N, 2], nearest and farthest depth.
      render_poses: float32 [120, 3, 5], or [60, 3, 5] with `path_zflat`.
      i_test: index of the most central view.
    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    basedir, factor = Path(basedir), max(factor or 1, 1)
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; {LLFF_LAYOUT} in it')
    poses, bds = read_poses_bounds(basedir / 'poses_bounds.npy')
    paths = image_files(basedir, factor)
    if len(paths) != len(poses):
        raise UserError(f'{image_folder(basedir, factor)}: found {len(paths)} images, '
                        f'but {len(poses)} poses in poses_bounds.npy')
    images = read_opaque_images(paths, white_bkgd)
    H, W = images.shape[1:3]
    for recorded, found, name in ((poses[0, 0, 4], H, 'high'), (poses[0, 1, 4], W, 'wide')):
        if abs(recorded / factor - found) > 1:
            raise UserError(f'{image_folder(basedir, factor)}: found images {found} pixels {name}, '
                            f'expected {recorded:g} / {factor} as in poses_bounds.npy')
    poses[:, :2, 4] = H, W
    poses[:, 2, 4] /= factor
    poses, bds, render_poses, i_test = place_poses(poses, bds, recenter, bd_factor, spherify, path_zflat)
    return images if as_uint8 else images / np.float32(255), poses, bds, render_poses, i_test


# --- files --------------------------------------------------------------------------------------------------

def image_folder(basedir, factor):
    """The folder of the images downsampled by `factor`; 0, 1 or None for full size."""
    return Path(basedir) / (f'images_{factor}' if factor and factor > 1 else 'images')


def image_files(basedir, factor):
    """The image files of `image_folder`, sorted by name. The folder is created from `images/` if it is
    missing."""
    folder = image_folder(basedir, factor)
    if not folder.is_dir():
        if folder.name == 'images':
            raise UserError(f'{folder}: no such folder; {LLFF_LAYOUT}')
        downsample_images(Path(basedir), factor)
    return list_images(folder)


def list_images(folder):
    """The image files of a folder, sorted by name, without hidden files."""
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith('.'))


def downsample_images(basedir, factor):
    """Create `images_<factor>/` from `images/` with an area filter. The folder gets its name when it is
    complete.

    Raises:
      UserError: there are no photos, two of them have the same name, or the folder cannot be created.
    """
    target, source = basedir / f'images_{factor}', basedir / 'images'
    paths = list_images(source) if source.is_dir() else []
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f'{source}: found two images called {max(names, key=names.count)}, '
                        'expected different names')
    if not paths:
        raise UserError(f'{basedir}: found neither {target.name}/ nor photos in images/; {LLFF_LAYOUT}')
    try:
        partial = Path(tempfile.mkdtemp(prefix=f'.{target.name}{PARTIAL}', dir=basedir))
    except OSError as error:
        raise UserError(f'{target}: is missing and cannot be created ({error.strerror})') from None

    def downsample(path):
        image = read_image(path)
        small = np.round(resize_area(image, *reduced_size(*image.shape[:2], factor))).astype(np.uint8)
        write_image(partial / f'{path.stem}.png', small)

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(downsample, paths))
        partial.chmod(0o755)
        os.rename(partial, target)
    except OSError:
        if not target.is_dir():  # another process may have been quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_opaque_images(paths, white_bkgd):
    """uint8 [N, H, W, 3]: the images at `paths`, composited on white or black if they have alpha."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read_image, paths))
    for path, image in zip(paths, images):
        if image.shape[:2] != images[0].shape[:2]:
            raise UserError(f'{path}: found {image.shape[1]}×{image.shape[0]} pixels, '
                            f'expected {images[0].shape[1]}×{images[0].shape[0]} as in {paths[0]}')

    def opaque(image):
        if image.shape[-1] == 3:
            return image
        return np.round(255 * composite_on_bkgd(image / np.float32(255), white_bkgd)).astype(np.uint8)
    return np.stack([opaque(image) for image in images])


def read_poses_bounds(path):
    """Poses [N, 3, 5] (columns right, up, back, position, [H, W, focal]) and depth bounds [N, 2], float64.

    Raises:
      UserError: the file is missing, is not [N, 17], or has numbers that cannot be cameras or depths.
    """
    if not path.is_file():
        raise UserError(f'{path}: no such file; {LLFF_LAYOUT}')
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
        raise UserError(f'{path}: found H, W, focal {poses[:, :, 4].min(0).tolist()}, '
                        'expected positive numbers')
    check_poses(poses, lambda index: f'{path}: row {index}')
    down, right, others = poses[..., 0:1], poses[..., 1:2], poses[..., 2:]
    return np.concatenate([right, -down, others], -1), bds


# --- poses --------------------------------------------------------------------------------------------------

def average_pose(poses):
    """The mean camera, c2w [3, 4]: mean position, and the sum of the axes made orthogonal."""
    return viewmatrix(poses[:, :3, 2].sum(0), poses[:, :3, 1].sum(0), poses[:, :3, 3].mean(0))


def recenter_poses(poses):
    """Move the world so that the mean camera is at the origin and looks along -z."""
    moved = poses.copy()
    moved[:, :3, :4] = (np.linalg.inv(homogeneous(average_pose(poses))) @ homogeneous(poses))[:, :3, :4]
    return moved


def spiral_path(center, up, radii, focus_depth, rotations, views, rate=0.5):
    """Poses [views, 3, 4] on a spiral around the camera `center`, looking at a point `focus_depth` ahead of
    it.

    Args:
      radii: extent of the spiral along the three axes of `center`, in scene units.
      rate: oscillations along the third axis, for each rotation.
    """
    theta = np.linspace(0, 2 * np.pi * rotations, views + 1)[:-1]
    offsets = np.stack([np.cos(theta), -np.sin(theta), -np.sin(theta * rate)], -1) * radii
    return path_around(center, up, offsets, focus_depth)


def figure_eight_path(center, up, radii, focus_depth, views):
    """Poses [views, 3, 4] on an eight that lies on its side and is as wide and half as high as `radii` [2 or
    3]; other arguments as in `spiral_path`."""
    theta = np.linspace(0, 2 * np.pi, views + 1)[:-1]
    offsets = np.stack([radii[0] * np.sin(theta), 0.5 * radii[1] * np.sin(2 * theta), 0 * theta], -1)
    return path_around(center, up, offsets, focus_depth)


def path_around(center, up, offsets, focus_depth):
    """Poses [M, 3, 4] at `offsets` [M, 3] along the axes of the camera `center`, looking at the point
    `focus_depth` ahead of it."""
    target = center @ np.array([0, 0, -focus_depth, 1.0])
    positions = offsets @ center[:, :3].T + center[:, 3]
    return np.stack([viewmatrix(position - target, up, position) for position in positions])


def forward_facing_path(poses, bds, path_zflat):
    """The spiral of the paper's videos, [M, 3, 4]: as wide as the cameras spread, focused between near and
    far."""
    close_depth, far_depth = bds.min() * 0.9, bds.max() * 5.0
    focus_depth = 1.0 / (0.25 / close_depth + 0.75 / far_depth)  # a weighted mean in disparity
    center, up = average_pose(poses), normalize(poses[:, :3, 1].sum(0))
    radii = np.percentile(np.abs(poses[:, :3, 3]), 90, 0)
    if not path_zflat:
        return spiral_path(center, up, radii, focus_depth, rotations=2, views=PATH_VIEWS)
    center[:, 3] -= 0.1 * close_depth * center[:, 2]
    return spiral_path(center, up, radii * [1, 1, 0], focus_depth, rotations=1, views=PATH_VIEWS // 2)


def spherify_poses(poses, bds):
    """Transform cameras around an object: the point they look at becomes the origin, up becomes z, and their
    root mean square distance becomes 1.

    Returns:
      poses, a circular path [PATH_VIEWS, 3, 4] at the cameras' mean height, and the bounds in the new unit.
    """
    focus = focus_point(poses)
    up = normalize((poses[:, :3, 3] - focus).mean(0))
    right = normalize(np.cross([0.1, 0.2, 0.3], up))  # any direction perpendicular to up
    world = np.stack([right, normalize(np.cross(up, right)), up, focus], 1)
    moved = poses.copy()
    moved[:, :3, :4] = (np.linalg.inv(homogeneous(world)) @ homogeneous(poses))[:, :3, :4]
    scale = 1.0 / np.sqrt(np.mean(np.sum(moved[:, :3, 3] ** 2, -1)))
    moved[:, :3, 3] *= scale

    height = moved[:, 2, 3].mean()
    radius = np.sqrt(1 - height ** 2)
    path = []
    for angle in np.linspace(0, 2 * np.pi, PATH_VIEWS):  # the last view is the first, as in nerf-pytorch
        position = np.array([radius * np.cos(angle), radius * np.sin(angle), height])
        path.append(viewmatrix(position, np.array([0, 0, 1.0]), position))
    return moved, np.stack(path), bds * scale


def place_poses(poses, bds, recenter=True, bd_factor=.75, spherify=False, path_zflat=False):
    """Scale and recenter poses [N, 3, 5] and bounds [N, 2], as `load_llff_data` describes.

    Returns:
      poses, bds, render_poses [M, 3, 5], and the index of the most central camera.
    Raises:
      UserError: the cameras are parallel or coincide, so that they have no focus or no extent.
    """
    poses, bds = poses.astype(np.float32), bds.astype(np.float32)
    scale = 1.0 if bd_factor is None else 1.0 / (bds.min() * bd_factor)
    poses[:, :3, 3] *= scale
    bds = bds * scale
    with np.errstate(divide='ignore', invalid='ignore'):  # checked below
        if recenter:
            poses = recenter_poses(poses)
        if spherify:
            poses, path, bds = spherify_poses(poses, bds)
        else:
            path = forward_facing_path(poses, bds, path_zflat)
    if not (np.isfinite(poses).all() and np.isfinite(path).all()):
        raise UserError('poses_bounds.npy: found cameras that are all parallel or all in one place, '
                        'expected different ones')
    hwf = np.broadcast_to(poses[0, :3, 4:], (len(path), 3, 1))
    render_poses = np.concatenate([path, hwf], -1).astype(np.float32)
    distances = np.sum((average_pose(poses)[:, 3] - poses[:, :3, 3]) ** 2, -1)
    return poses.astype(np.float32), bds.astype(np.float32), render_poses, int(np.argmin(distances))


def placement_of(poses, bds, path):
    """The transform [4, 4] by which `place_poses` has come to poses [N, 3, 5] and bounds [N, 2] from those of
    the file at `path`."""
    placed, (before, bds_before) = poses.astype(np.float64), read_poses_bounds(path)
    scale = float(bds.min() / bds_before.min())
    transform = np.eye(4)
    transform[:3, :3] = scale * placed[0, :, :3] @ np.linalg.inv(before[0, :, :3])
    transform[:3, 3] = placed[0, :, 3] - transform[:3, :3] @ before[0, :, 3]
    return transform
