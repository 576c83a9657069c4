"""The Blender layout: `transforms_{train,val,test}.json`, or one `transforms.json`, beside folders of images.

    scene/transforms_train.json   {"camera_angle_x": .69, "frames": [{"file_path": "./train/r_0",
    scene/transforms_val.json         "transform_matrix": [[…] × 4]}, …]}
    scene/transforms_test.json    or, for intrinsics in pixels, "fl_x", "fl_y", "cx", "cy", "w", "h"
    scene/train/r_0.png …         PNG or JPEG, RGBA or RGB; "file_path" may leave the ending out
"""
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cameras import check_poses, focus_point, homogeneous, look, normalize
from errors import UserError, first_line
from file_io import IMAGE_ENDINGS, composite, read_image, resize_area

LAYOUT = 'expected transforms_train.json, transforms_val.json and transforms_test.json, or transforms.json'
INTRINSICS = ('fl_x', 'fl_y', 'cx', 'cy')
DISTORTION = ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')


class BlenderFrames(NamedTuple):
    """What the JSON files of a scene say, all splits in one list."""
    paths: list          # an image file each
    poses: np.ndarray    # c2w, float32 [N, 4, 4]
    i_split: list        # three index arrays: train, val, test
    intrinsics: dict     # camera_angle_x, or fl_x and its like, as they stand in the file
    source: Path         # the file that the intrinsics come from
    own_path: bool       # whether the orbit of the synthetic scenes suits this scene


# --- camera paths -----------------------------------------------------------------------------------------------

def pose_spherical(theta, phi, radius):
    """c2w [4, 4] float32 of a camera that looks at the origin from elevation `-phi` and an azimuth that falls with
    `theta`, in degrees; z is up."""
    azimuth, elevation = np.radians(90 - theta), np.radians(-phi)
    back = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    return homogeneous(look(back, [0.0, 0.0, 1.0], radius * back)).astype(np.float32)


def synthetic_orbit(count=40):
    """The path of the synthetic scenes: a circle of radius 4, looking down by 30 degrees; [count, 4, 4]."""
    return np.stack([pose_spherical(angle, -30.0, 4.0) for angle in np.linspace(-180, 180, count + 1)[:-1]])


def orbit_of_cameras(poses, count=40):
    """A circle at the cameras' mean distance and height around the point they look at, [count, 4, 4] float32."""
    poses = poses.astype(np.float64)
    up, focus = normalize(poses[:, :3, 1].sum(0)), focus_point(poses)
    arms = poses[:, :3, 3] - focus
    height = (arms @ up).mean()
    radius = np.linalg.norm(arms - (arms @ up)[:, None] * up, axis=-1).mean()
    across = normalize(np.cross(up, np.eye(3)[np.argmin(np.abs(up))]))  # any direction off the axis
    path = []
    for angle in np.linspace(0, 2 * np.pi, count + 1)[:-1]:
        arm = radius * (np.cos(angle) * across + np.sin(angle) * np.cross(up, across)) + height * up
        path.append(homogeneous(look(arm, up, focus + arm)))
    return np.stack(path).astype(np.float32)


# --- the JSON files ---------------------------------------------------------------------------------------------

def read_transforms(path):
    """The content of a transforms file, its frames checked.

    Raises:
      UserError: malformed JSON, no frames, a frame without `file_path` or a finite 4 × 4 `transform_matrix`.
    """
    meta = read_json(path)
    frames = meta.get('frames') if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path}: found no "frames", expected a list of at least one')
    for index, frame in enumerate(frames):
        for key, kind in (('file_path', str), ('transform_matrix', list)):
            if not isinstance(frame, dict) or not isinstance(frame.get(key), kind) or not frame[key]:
                raise UserError(f'{path}: frame {index} has no "{key}"')
        frame['transform_matrix'] = matrix(frame['transform_matrix'], f'{path}: frame {index}')
        for key in INTRINSICS:
            if key in frame and frame[key] != meta.setdefault(key, frame[key]):
                raise UserError(f'{path}: frame {index} has its own {key}, expected one camera for all frames')
    check_intrinsics(meta, path)
    check_poses(np.stack([frame['transform_matrix'] for frame in frames]), lambda index: f'{path}: frame {index}')
    return meta


def read_json(path):
    """The content of a JSON file.

    Raises:
      UserError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON ({first_line(error)})') from None


def matrix(rows, where):
    """Nested lists to a 4 × 4 matrix, float32."""
    try:
        pose = np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        pose = np.empty(0)
    if pose.shape != (4, 4):
        raise UserError(f'{where}: found a "transform_matrix" that is not 4 × 4 numbers')
    if np.abs(pose).max() > np.finfo(np.float32).max:
        raise UserError(f'{where}: found a number in "transform_matrix" that is too large')
    return pose.astype(np.float32)


def _image_path(basedir, file_path):
    """The file that `file_path` means: as it is written, or with one of the image endings."""
    if Path(file_path).suffix.lower() in IMAGE_ENDINGS:
        return basedir / file_path
    endings = [*IMAGE_ENDINGS, *(ending.upper() for ending in IMAGE_ENDINGS)]
    paths = [basedir / (file_path + ending) for ending in endings]
    return next((path for path in paths if path.is_file()), paths[0])


def read_frames(basedir, testskip=1, hold=8):
    """Read the JSON files of the scene in `basedir` into `BlenderFrames`; no image is opened.

    Args:
      testskip: take every n-th frame of val and test (0 as 1).
      hold: of a single transforms.json, every n-th frame is a test view.
    """
    basedir = Path(basedir)
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; {LAYOUT} in it')
    files = {split: basedir / f'transforms_{split}.json' for split in ('train', 'val', 'test')}
    single = basedir / 'transforms.json'
    if files['train'].is_file():
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise UserError(f'{basedir}: found no {" and no ".join(missing)}; {LAYOUT}')
        metas = {split: read_transforms(path) for split, path in files.items()}
        chosen = {split: meta['frames'][::1 if split == 'train' else max(testskip, 1)] for split, meta in metas.items()}
        frames = [frame for part in chosen.values() for frame in part]
        for split, meta in metas.items():
            for key in ('camera_angle_x', *INTRINSICS):
                if not np.isclose(meta.get(key, 0), metas['test'].get(key, 0), rtol=1e-6):
                    raise UserError(f'{files[split]}: found another {key} than in {files["test"].name}, '
                                    'expected one camera for all frames')
        ends = np.cumsum([0, *(len(part) for part in chosen.values())])
        i_split = [np.arange(start, end) for start, end in pairwise(ends)]
        intrinsics, source = metas['test'], files['test']
    elif single.is_file():
        intrinsics, source = read_transforms(single), single
        frames = intrinsics['frames']
        i_test = np.arange(len(frames))[::hold] if hold > 0 else np.arange(1)
        i_split = [np.setdiff1d(np.arange(len(frames)), i_test), i_test, i_test]
    else:
        raise UserError(f'{basedir}: found no transforms file; {LAYOUT}')
    if any(intrinsics.get(key) for key in DISTORTION):
        warnings.warn(f'{source}: lens distortion (k1 and its like) is not modelled; undistort the images', stacklevel=2)
    paths = [_image_path(basedir, frame['file_path']) for frame in frames]
    poses = np.stack([frame['transform_matrix'] for frame in frames])
    return BlenderFrames(paths, poses, i_split, intrinsics, source, own_path=source == single)


def check_intrinsics(meta, path):
    """Raises UserError for intrinsics that are not positive numbers, or an angle that is no field of view."""
    for key in ('camera_angle_x', *INTRINSICS, 'w', 'h'):
        value = meta.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise UserError(f'{path}: found {key} = {str(value)[:40]}, expected a positive number')
    if meta.get('camera_angle_x', 1) >= np.pi:
        raise UserError(f'{path}: found camera_angle_x = {meta["camera_angle_x"]:g}, expected radians below 3.14')


def intrinsics_matrix(frames, H, W):
    """K [3, 3] float64 in pixels for images of H × W as they lie on disk.

    Raises:
      UserError: no field of view and no focal length, or `w` and `h` of another size than the images.
    """
    meta, source = frames.intrinsics, frames.source
    if (meta.get('w', W), meta.get('h', H)) != (W, H):
        raise UserError(f'{source}: found w, h = {meta.get("w")}, {meta.get("h")}, but the images are {W}×{H}')
    if 'fl_x' in meta:
        fx = meta['fl_x']
    elif 'camera_angle_x' in meta:
        fx = 0.5 * W / np.tan(0.5 * meta['camera_angle_x'])
    else:
        raise UserError(f'{source}: found no intrinsics, expected "camera_angle_x" or "fl_x"')
    return np.array([[fx, 0, meta.get('cx', 0.5 * W)], [0, meta.get('fl_y', fx), meta.get('cy', 0.5 * H)], [0, 0, 1]])


# --- images -----------------------------------------------------------------------------------------------------

def _read_all(frames, half_res, convert):
    """Read all images on a few threads and stack `convert(float image in [0, 1])`; also K of the resulting size."""
    first = read_image(frames.paths[0])
    H, W = first.shape[:2]
    K = intrinsics_matrix(frames, H, W)
    height, width = (H // 2, W // 2) if half_res else (H, W)
    if min(height, width) < 1:
        raise UserError(f'{frames.paths[0]}: found {W}×{H} pixels, too few for --half_res')

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


def load_blender_data(basedir, half_res=False, testskip=1):
    """Load a scene in the Blender layout.

    Args:
      basedir: folder of the scene.
      half_res: halve width and height (mean of 2 × 2 pixels).
      testskip: load every n-th image of val and test (0 as 1).
    Returns:
      imgs: float32 [N, H, W, 4] in [0, 1], straight alpha; [N, H, W, 3] where no image has alpha.
      poses: float32 [N, 4, 4] c2w.
      render_poses: float32 [40, 4, 4], an orbit.
      [H, W, focal]: focal in pixels.
      i_split: index arrays of train, val and test.
    Raises:
      UserError: files missing, damaged or not matching each other.
    """
    frames = read_frames(basedir, testskip)
    images, K = _read_all(frames, half_res, np.asarray)
    if any(image.shape[-1] == 4 for image in images):
        images = [image if image.shape[-1] == 4 else np.dstack([image, np.ones_like(image[..., :1])]) for image in images]
    imgs = np.stack(images)
    return imgs, frames.poses, path_around(frames), [*imgs.shape[1:3], K[0, 0]], frames.i_split


def load_blender_images(frames, half_res, white_bkgd):
    """8-bit RGB images [N, H, W, 3] of `frames`, composited on white or black; their alpha [N, H, W], None where none is
    transparent; and K [3, 3] in their pixels."""
    def to_rgb(image):
        alpha = np.round(255 * image[..., 3]).astype(np.uint8) if image.shape[-1] == 4 else None
        return np.round(255 * composite(image, white_bkgd)).astype(np.uint8), alpha

    images, K = _read_all(frames, half_res, to_rgb)
    images, alphas = zip(*images)
    if all(alpha is None or alpha.min() == 255 for alpha in alphas):
        return np.stack(images), None, K
    opaque = np.full_like(images[0][..., 0], 255)
    return np.stack(images), np.stack([opaque if alpha is None else alpha for alpha in alphas]), K


def path_around(frames):
    """The camera path of a scene, [40, 4, 4]: the synthetic scenes' orbit, or one fitted to a scene's own cameras."""
    return orbit_of_cameras(frames.poses) if frames.own_path else synthetic_orbit()
