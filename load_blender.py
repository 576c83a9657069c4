"""The Blender layout: `transforms_{train,val,test}.json` or a single `transforms.json`, and folders of
images.

    scene/transforms_train.json   {"camera_angle_x": .69, "frames": [{"file_path": "./train/r_0",
    scene/transforms_val.json         "transform_matrix": [[…] × 4]}, …]}
    scene/transforms_test.json    or, for intrinsics in pixels, "fl_x", "fl_y", "cx", "cy", "w", "h"
    scene/train/r_0.png …         PNG or JPEG, RGBA or RGB; "file_path" may omit the extension
"""
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import check_poses, focus_point, homogeneous, normalize, viewmatrix
from scenes.errors import UserError
from scenes.files import read_json
from scenes.images import IMAGE_EXTENSIONS, composite_on_bkgd, read_image, resize_area
from scenes.scene import Scene

# Error messages describe the expected files in these words.
BLENDER_LAYOUT = ('expected transforms_train.json, transforms_val.json and transforms_test.json, '
                  'or transforms.json')
# These keys of a transforms file give the intrinsics in pixels.
INTRINSICS = ('fl_x', 'fl_y', 'cx', 'cy')
# These keys of a transforms file give the lens distortion.
DISTORTION = ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')
# Sampling along a ray starts at this distance, which suits the synthetic scenes.
NEAR = 2.0
# Sampling along a ray ends at this distance, which suits the synthetic scenes.
FAR = 6.0


class BlenderFrames(NamedTuple):
    """The content of a scene's transforms files, with the frames of all splits in one list."""
    paths: list          # one image file per frame
    poses: np.ndarray    # c2w, float32 [N, 4, 4]
    i_split: list        # three index arrays: train, val, test
    intrinsics: dict     # camera_angle_x, or fl_x and so on, as in the file
    source: Path         # the file that the intrinsics come from
    has_splits: bool     # whether each split has its own file, as in the synthetic scenes


def load_blender_scene(args):
    """The `Scene` in the folder --datadir, according to the options.

    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    def to_8bit(image):
        """uint8 [H, W, 4]: RGB composited on the background, and alpha."""
        alpha = image[..., 3:] if image.shape[-1] == 4 else np.ones_like(image[..., :1])
        rgba = np.concatenate([composite_on_bkgd(image, args.white_bkgd), alpha], -1)
        return np.round(255 * rgba).astype(np.uint8)

    imgs, poses, render_poses, _, (i_train, i_val, i_test), K, names = load_blender_data(
        args.datadir, args.half_res, args.testskip, llffhold=args.llffhold, convert=to_8bit, details=True)
    alphas = np.ascontiguousarray(imgs[..., 3])
    return Scene(np.ascontiguousarray(imgs[..., :3]), *imgs.shape[1:3], poses[:, :3], K, NEAR, FAR,
                 render_poses[:, :3], i_train, i_val, i_test, alphas if alphas.min() < 255 else None, names)


def load_blender_data(basedir, half_res=False, testskip=1, *, llffhold=8, convert=np.asarray, details=False):
    """Load a scene in the Blender layout.

    Args:
      basedir: folder of the scene.
      half_res: halve width and height, averaging over areas of 2 × 2 pixels.
      testskip: load every n-th image of val and test, 0 means 1; no effect on a single transforms.json.
      llffhold: in a single transforms.json every n-th frame is a test view; 0 means the first frame only.
      convert: applied to each image, float32 [H, W, 3 or 4], right after it is read.
      details: also return the intrinsics and the names of the images.
    Returns:
      imgs: float32 [N, H, W, 4] in [0, 1], straight alpha; [N, H, W, 3] if no image has alpha.
      poses: float32 [N, 4, 4], c2w.
      render_poses: float32 [40, 4, 4], c2w on an orbit.
      [H, W, focal]: focal length in pixels.
      i_split: index arrays of train, val and test.
      K, names: with `details`, intrinsics in pixels, float64 [3, 3], and paths of the images within
        `basedir`.
    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    frames = read_frames(basedir, testskip, llffhold)
    images, K = read_images(frames, half_res, convert)
    if any(image.shape[-1] == 4 for image in images):
        images = [image if image.shape[-1] == 4 else np.dstack([image, np.ones_like(image[..., :1])])
                  for image in images]
    imgs = np.stack(images)
    render_poses = synthetic_orbit() if frames.has_splits else orbit_of_cameras(frames.poses)
    loaded = imgs, frames.poses, render_poses, [*imgs.shape[1:3], K[0, 0]], frames.i_split
    names = [os.path.relpath(path, basedir) for path in frames.paths]
    return (*loaded, K, names) if details else loaded


# --- camera paths -------------------------------------------------------------------------------------------

def pose_spherical(theta, phi, radius):
    """c2w [4, 4] float32 of a camera that looks at the origin from distance `radius`; z is up.

    The camera's azimuth is `90 - theta` and its elevation `-phi`, in degrees, as in nerf-pytorch.
    """
    azimuth, elevation = np.radians(90 - theta), np.radians(-phi)
    level = np.array([np.cos(azimuth), np.sin(azimuth)])
    back = np.append(np.cos(elevation) * level, np.sin(elevation))
    return homogeneous(viewmatrix(back, [0.0, 0.0, 1.0], radius * back)).astype(np.float32)


def synthetic_orbit(count=40):
    """The path of the synthetic scenes: a circle at distance 4, looking down by 30 degrees; [count, 4, 4]."""
    return np.stack([pose_spherical(angle, -30.0, 4.0) for angle in np.linspace(-180, 180, count + 1)[:-1]])


def orbit_of_cameras(poses, count=40):
    """A circle around the point that the cameras look at, at their mean height and mean distance from the
    vertical axis through it; [count, 4, 4] float32."""
    poses = poses.astype(np.float64)
    up, focus = normalize(poses[:, :3, 1].sum(0)), focus_point(poses)
    arms = poses[:, :3, 3] - focus
    height = (arms @ up).mean()
    radius = np.linalg.norm(arms - (arms @ up)[:, None] * up, axis=-1).mean()
    across = normalize(np.cross(up, np.eye(3)[np.argmin(np.abs(up))]))  # any direction perpendicular to up
    path = []
    for angle in np.linspace(0, 2 * np.pi, count + 1)[:-1]:
        arm = radius * (np.cos(angle) * across + np.sin(angle) * np.cross(up, across)) + height * up
        path.append(homogeneous(viewmatrix(arm, up, focus + arm)))
    if not np.isfinite(path).all():
        raise UserError('found cameras that are all in one place, expected cameras around a scene')
    return np.stack(path).astype(np.float32)


# --- transforms files ---------------------------------------------------------------------------------------

def read_frames(basedir, testskip=1, llffhold=8):
    """The content of the transforms files in `basedir` as `BlenderFrames`; the images are not opened.
    Arguments and errors are those of `load_blender_data`.
    """
    basedir = Path(basedir)
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; {BLENDER_LAYOUT} in it')
    source = basedir / 'transforms.json'
    has_splits = (basedir / 'transforms_train.json').is_file()
    if has_splits:
        source, intrinsics, frames, i_split = read_splits(basedir, testskip)
    elif source.is_file():
        intrinsics = read_transforms(source)
        frames = intrinsics['frames']
        i_test = np.arange(len(frames))[::llffhold] if llffhold > 0 else np.arange(1)
        i_split = [np.setdiff1d(np.arange(len(frames)), i_test), i_test, i_test]
    else:
        raise UserError(f'{basedir}: found no transforms file; {BLENDER_LAYOUT}')
    paths = [find_image(basedir, frame['file_path']) for frame in frames]
    poses = np.stack([frame['transform_matrix'] for frame in frames])
    return BlenderFrames(paths, poses, i_split, intrinsics, source, has_splits)


def read_splits(basedir, testskip):
    """Read transforms_{train,val,test}.json.

    Returns:
      the file that the intrinsics come from, its content, the frames of all splits, and their index arrays.
    """
    files = {split: basedir / f'transforms_{split}.json' for split in ('train', 'val', 'test')}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f'{basedir}: found no {" and no ".join(missing)}; {BLENDER_LAYOUT}')
    metas = {split: read_transforms(path) for split, path in files.items()}
    for split, meta in metas.items():
        for key in ('camera_angle_x', *INTRINSICS):
            if not np.isclose(meta.get(key, 0), metas['test'].get(key, 0), rtol=1e-6):
                raise UserError(f'{files[split]}: {key} differs from that in {files["test"].name}, '
                                'expected one camera for all frames')
    splits = [meta['frames'][::1 if split == 'train' else max(testskip, 1)] for split, meta in metas.items()]
    ends = np.cumsum([0, *(len(frames) for frames in splits)])
    i_split = [np.arange(start, end) for start, end in pairwise(ends)]
    return files['test'], metas['test'], [frame for frames in splits for frame in frames], i_split


def read_transforms(path):
    """The content of a transforms file, checked; each `transform_matrix` as float32 [4, 4].

    Raises:
      UserError: malformed JSON, no frames, a frame without `file_path` or a finite 4 × 4 `transform_matrix`.
    """
    meta = read_json(path)
    frames = meta.get('frames') if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path}: found no "frames", expected a list with at least one')
    for index, frame in enumerate(frames):
        for key, kind in (('file_path', str), ('transform_matrix', list)):
            if not isinstance(frame, dict) or not isinstance(frame.get(key), kind) or not frame[key]:
                raise UserError(f'{path}: frame {index} has no "{key}"')
        frame['transform_matrix'] = parse_matrix(frame['transform_matrix'], f'{path}: frame {index}')
        for key in (*INTRINSICS, *DISTORTION):
            if key in frame and frame[key] != meta.setdefault(key, frame[key]):
                raise UserError(f'{path}: frame {index} has its own {key}, '
                                'expected one camera for all frames')
    check_intrinsics(meta, path)
    poses = np.stack([frame['transform_matrix'] for frame in frames])
    check_poses(poses, lambda index: f'{path}: frame {index}')
    return meta


def parse_matrix(rows, where):
    """Nested lists as a float32 matrix [4, 4]; `where` is the start of the error message."""
    try:
        pose = np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        pose = np.empty(0)
    if pose.shape != (4, 4):
        raise UserError(f'{where}: found a "transform_matrix" that is not 4 × 4 numbers')
    if np.abs(pose).max() > np.finfo(np.float32).max:
        raise UserError(f'{where}: found a number in "transform_matrix" that is too large')
    return pose.astype(np.float32)


def check_intrinsics(meta, path):
    """Raise UserError if an intrinsic is not a positive number, or `camera_angle_x` is not a field of
    view."""
    for key in ('camera_angle_x', *INTRINSICS, 'w', 'h'):
        value = meta.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise UserError(f'{path}: found {key} = {str(value)[:40]}, expected a positive number')
    if meta.get('camera_angle_x', 1) >= np.pi:
        raise UserError(f'{path}: found camera_angle_x = {meta["camera_angle_x"]:g}, '
                        'expected radians less than pi')


def intrinsics_matrix(frames, H, W):
    """K [3, 3] float64 in pixels, for images of H × W pixels on disk. Lens distortion is ignored, with a
    warning.

    Raises:
      UserError: there is neither a field of view nor a focal length, or `w` and `h` are not the images' size.
    """
    meta, source = frames.intrinsics, frames.source
    if any(meta.get(key) for key in DISTORTION):
        warnings.warn(f'{source}: lens distortion (k1, …) is not modelled; undistort the images',
                      stacklevel=2)
    if (meta.get('w', W), meta.get('h', H)) != (W, H):
        raise UserError(f'{source}: found w, h = {meta.get("w")}, {meta.get("h")}, '
                        f'but the images are {W}×{H}')
    if 'fl_x' in meta:
        fx = meta['fl_x']
    elif 'camera_angle_x' in meta:
        fx = 0.5 * W / np.tan(0.5 * meta['camera_angle_x'])
    else:
        raise UserError(f'{source}: found no intrinsics, expected "camera_angle_x" or "fl_x"')
    fy, cx, cy = meta.get('fl_y', fx), meta.get('cx', 0.5 * W), meta.get('cy', 0.5 * H)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


# --- images -------------------------------------------------------------------------------------------------

def find_image(basedir, file_path):
    """The image file that `file_path` refers to; an extension is added if it has none.

    Raises:
      UserError: the file exists, but is not of a supported type.
    """
    path = basedir / file_path
    if path.suffix.lower() in IMAGE_EXTENSIONS:
        return path
    if path.is_file():
        raise UserError(f'{path}: found a type of image that is not supported, '
                        f'expected {" or ".join(IMAGE_EXTENSIONS)}')
    extensions = [*IMAGE_EXTENSIONS, *(extension.upper() for extension in IMAGE_EXTENSIONS)]
    paths = [basedir / (file_path + extension) for extension in extensions]
    return next((path for path in paths if path.is_file()), paths[0])


def read_images(frames, half_res, convert):
    """Read the images of all frames on several threads, and apply `convert` to each as float32 in [0, 1].

    Returns:
      the list of images, and K [3, 3] for their size.
    """
    first = read_image(frames.paths[0])
    H, W = first.shape[:2]
    K = intrinsics_matrix(frames, H, W)
    height, width = (H // 2, W // 2) if half_res else (H, W)
    if min(height, width) < 1:
        raise UserError(f'{frames.paths[0]}: found {W}×{H} pixels, too small for --half_res')

    def load(path):
        image = read_image(path)
        if image.shape[:2] != (H, W):
            raise UserError(f'{path}: found {image.shape[1]}×{image.shape[0]} pixels, '
                            f'expected {W}×{H} as in {frames.paths[0]}')
        image = image / np.float32(255)
        return convert(resize_area(image, height, width) if half_res else image)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(load, frames.paths))
    K[0], K[1] = K[0] * width / W, K[1] * height / H
    return images, K
