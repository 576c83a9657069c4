"""The Blender layout: `transforms_{train,val,test}.json` or a single `transforms.json`, and folders of
images.

    scene/transforms_train.json   {"camera_angle_x": .69, "frames": [{"file_path": "./train/r_0",
    scene/transforms_val.json         "transform_matrix": [[…] × 4]}, …]}
    scene/transforms_test.json    or in pixels "fl_x", "fl_y", "cx", "cy", "w", "h", and the lens distortion
                                  "k1", …; a frame may have its own
    scene/train/r_0.png …         "file_path" may omit the extension
    scene/masks/…                 for scene/images/…, or as "mask_path" of a frame: only white pixels count
"""
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import Camera, check_poses, homogeneous, orbit_of_cameras, viewmatrix
from scenes.errors import UserError
from scenes.files import read_json
from scenes.images import IMAGE_EXTENSIONS
from scenes.points import read_ply
from scenes.scene import Scene
from scenes.views import WrongSize, find_mask, load_images, plan_views, read_view

# Error messages describe the expected files in these words.
BLENDER_LAYOUT = ('expected transforms_train.json, transforms_val.json and transforms_test.json, '
                  'or transforms.json')
# These keys of a transforms file give the intrinsics in pixels.
INTRINSICS = ('fl_x', 'fl_y', 'cx', 'cy')
# These keys of a transforms file give the lens distortion.
DISTORTION = ('k1', 'k2', 'k3', 'k4', 'p1', 'p2')
# All keys that describe a camera; those of a frame take precedence over those of the file.
CAMERA_KEYS = ('camera_angle_x', *INTRINSICS, 'w', 'h', *DISTORTION, 'camera_model', 'is_fisheye')
# These values of "camera_model" are supported.
CAMERA_MODELS = ('PERSPECTIVE', 'SIMPLE_PINHOLE', 'PINHOLE', 'SIMPLE_RADIAL', 'RADIAL', 'OPENCV',
                 'OPENCV_FISHEYE')
# Sampling along a ray starts at this distance, which suits the synthetic scenes.
NEAR = 2.0
# Sampling along a ray ends at this distance, which suits the synthetic scenes.
FAR = 6.0


class BlenderFrames(NamedTuple):
    """The content of a scene's transforms files, with the frames of all splits in one list."""
    paths: list            # one image file per frame
    masks: list            # the mask of each, or None
    poses: np.ndarray      # c2w, float32 [N, 4, 4]
    cameras: list          # the CAMERA_KEYS that each frame has, a dict
    i_split: list          # three index arrays: train, val, test
    source: Path           # a transforms file, for error messages
    has_splits: bool       # whether each split has its own file, as in the synthetic scenes
    meta: dict             # the content of `source`


def load_blender_scene(args):
    """The `Scene` in the folder --datadir, according to the options.

    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    frames = read_frames(args.datadir, args.testskip, args.llffhold)
    views = plan_frames(frames, args.half_res, args.factor)
    images, alphas, masks = load_images(views, args.white_bkgd)
    names = [os.path.relpath(path, args.datadir) for path in frames.paths]
    applied_transform, points = read_extras(frames)
    camera = views[0].camera.undistorted()
    return Scene(images, camera.H, camera.W, frames.poses[:, :3], camera.K, NEAR, FAR,
                 path_of(frames)[:, :3], *frames.i_split, alphas, names,
                 [view.camera for view in views], masks, applied_transform, points)


def load_blender_data(basedir, half_res=False, testskip=1, *, llffhold=8):
    """Load a scene in the Blender layout.

    Args:
      basedir: folder of the scene.
      half_res: halve width and height, averaging over areas of 2 × 2 pixels.
      testskip: load every n-th image of val and test, 0 means 1; no effect on a single transforms.json.
      llffhold: in a single transforms.json every n-th frame is a test view; 0 means the first frame only.
    Returns:
      imgs: float32 [N, H, W, 4] in [0, 1], straight alpha; [N, H, W, 3] if no image has alpha. A list if the
        images have several sizes.
      poses: float32 [N, 4, 4], c2w.
      render_poses: float32 [40, 4, 4], c2w on an orbit.
      [H, W, focal]: of the first image, the focal length in pixels.
      i_split: index arrays of train, val and test.
    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    frames = read_frames(basedir, testskip, llffhold)
    views = plan_frames(frames, half_res)
    imgs = [read_view(view) for view in views]
    if any(image.shape[-1] == 4 for image in imgs):
        imgs = [image if image.shape[-1] == 4 else np.dstack([image, np.ones_like(image[..., :1])])
                for image in imgs]
    imgs = np.stack(imgs) if len({image.shape for image in imgs}) == 1 else imgs
    camera = views[0].camera
    return imgs, frames.poses, path_of(frames), [camera.H, camera.W, camera.K[0, 0]], frames.i_split


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


# --- transforms files ---------------------------------------------------------------------------------------

def read_frames(basedir, testskip=1, llffhold=8):
    """The content of the transforms files in `basedir` as `BlenderFrames`; the images are not opened. Frames
    of a single transforms.json whose images are missing are left out, with a warning. Arguments and errors
    are those of `load_blender_data`. """
    basedir = Path(basedir)
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; {BLENDER_LAYOUT} in it')
    source = basedir / 'transforms.json'
    has_splits = (basedir / 'transforms_train.json').is_file()
    if has_splits:
        source, meta, frames, i_split = read_splits(basedir, testskip)
        paths = [find_image(basedir, frame['file_path']) for frame in frames]
    elif source.is_file():
        meta = read_transforms(source)
        frames = meta['frames']
        paths = [find_image(basedir, frame['file_path']) for frame in frames]
        frames, paths = leave_out_missing(source, frames, paths)
        i_test = np.arange(len(frames))[::llffhold] if llffhold > 0 else np.arange(1)
        i_split = [np.setdiff1d(np.arange(len(frames)), i_test), i_test, i_test]
    else:
        raise UserError(f'{basedir}: found no transforms file; {BLENDER_LAYOUT}')
    masks = [mask_of(basedir, frame, path) for frame, path in zip(frames, paths)]
    poses = np.stack([frame['transform_matrix'] for frame in frames])
    cameras = [frame['camera'] for frame in frames]
    return BlenderFrames(paths, masks, poses, cameras, i_split, source, has_splits, meta)


def read_splits(basedir, testskip):
    """Read transforms_{train,val,test}.json.

    Returns:
      the test split's file and content, the frames of all splits, and their index arrays.
    """
    files = {split: basedir / f'transforms_{split}.json' for split in ('train', 'val', 'test')}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f'{basedir}: found no {" and no ".join(missing)}; {BLENDER_LAYOUT}')
    metas = {split: read_transforms(path) for split, path in files.items()}
    splits = [meta['frames'][::1 if split == 'train' else max(testskip, 1)] for split, meta in metas.items()]
    ends = np.cumsum([0, *(len(frames) for frames in splits)])
    i_split = [np.arange(start, end) for start, end in pairwise(ends)]
    return files['test'], metas['test'], [frame for frames in splits for frame in frames], i_split


def read_transforms(path):
    """The content of a transforms file, checked; each `transform_matrix` as float32 [4, 4], and in each frame
    `camera`, its CAMERA_KEYS.

    Raises:
      UserError: malformed JSON, no frames, a frame without `file_path` or a finite 4 × 4 `transform_matrix`,
        or numbers that cannot be a camera.
    """
    meta = read_json(path)
    frames = meta.get('frames') if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{path}: found no "frames", expected a list with at least one')
    shared = {key: meta[key] for key in CAMERA_KEYS if key in meta}
    check_camera(shared, path)
    for index, frame in enumerate(frames):
        for key, kind in (('file_path', str), ('transform_matrix', list)):
            if not isinstance(frame, dict) or not isinstance(frame.get(key), kind) or not frame[key]:
                raise UserError(f'{path}: frame {index} has no "{key}"')
        frame['transform_matrix'] = parse_matrix(frame['transform_matrix'], f'{path}: frame {index}')
        own = {key: frame[key] for key in CAMERA_KEYS if key in frame}
        if own:
            check_camera(own, f'{path}: frame {index}')
        frame['camera'] = {**shared, **own}
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


def check_camera(camera, where):
    """Raise UserError if an intrinsic is not a positive number, `camera_angle_x` is not a field of view, a
    coefficient of the distortion is not a number, or the model is not supported."""
    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9

    for key in ('camera_angle_x', *INTRINSICS, 'w', 'h'):
        value = camera.get(key, 1)
        if not is_number(value) or not value > 0:
            raise UserError(f'{where}: found {key} = {str(value)[:40]}, expected a positive number')
    for key in DISTORTION:
        if not is_number(camera.get(key, 0)):
            raise UserError(f'{where}: found {key} = {str(camera[key])[:40]}, expected a number')
    if camera.get('camera_angle_x', 1) >= np.pi:
        raise UserError(f'{where}: found camera_angle_x = {camera["camera_angle_x"]:g}, '
                        'expected radians less than pi')
    if camera.get('camera_model', 'OPENCV') not in CAMERA_MODELS:
        raise UserError(f'{where}: found camera_model = {str(camera["camera_model"])[:40]}, '
                        f'expected {", ".join(CAMERA_MODELS)}')


def read_extras(frames):
    """What a transforms file says beside the views.

    Returns:
      applied_transform: float64 [4, 4], from the frame of the input, such as COLMAP's, to that of the file;
        None if the file does not say.
      points: sparse points, float32 [M, 3]; None if there are none.
    Raises:
      UserError: the transform is not 3 × 4 numbers, or the file of the points is damaged.
    """
    meta, applied_transform, points = frames.meta, None, None
    if 'applied_transform' in meta or 'applied_scale' in meta:
        try:
            rows = np.array(meta.get('applied_transform', np.eye(4)), np.float64)[:3].reshape(3, 4)
            applied_transform = homogeneous(rows * float(meta.get('applied_scale', 1.0)))
        except (TypeError, ValueError):
            raise UserError(f'{frames.source}: found an "applied_transform" or "applied_scale" that is not '
                            '3 × 4 numbers and a number') from None
    if isinstance(meta.get('ply_file_path'), str):
        path = frames.source.parent / meta['ply_file_path']
        points = read_ply(path) if path.is_file() else None
    return applied_transform, points


# --- images and cameras -------------------------------------------------------------------------------------

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


def leave_out_missing(source, frames, paths):
    """The frames of a single transforms.json whose images exist, and their paths; warns if there are
    others."""
    existing = [index for index, path in enumerate(paths) if path.is_file()]
    if not existing:
        raise UserError(f'{paths[0]}: no such image; none of the {len(paths)} images in {source.name} exists')
    if len(existing) < len(paths):
        missing = next(path for path in paths if not path.is_file())
        warnings.warn(f'{source}: {len(paths) - len(existing)} of {len(paths)} images do not exist, such as '
                      f'{missing.name}; their frames are left out', stacklevel=2)
    return [frames[index] for index in existing], [paths[index] for index in existing]


def mask_of(basedir, frame, path):
    """The mask of a frame whose image is at `path`, or None. Raises UserError if `mask_path` does not
    exist."""
    if not frame.get('mask_path'):
        return find_mask(path)
    mask = basedir / str(frame['mask_path'])
    if not mask.is_file():
        raise UserError(f'{mask}: no such mask')
    return mask


def plan_frames(frames, half_res=False, factor=1):
    """The `View`s of `BlenderFrames`. Raises UserError as `plan_views` and `camera_from` do."""
    cameras = {}

    def camera_of(index, H, W):
        key = H, W, *frames.cameras[index].items()
        if key not in cameras:
            cameras[key] = camera_from(frames.cameras[index], H, W, frames.source, frames.paths[index])
        return cameras[key]
    return plan_views(frames.paths, frames.masks, camera_of, factor, half_res)


def camera_from(keys, H, W, source, path):
    """The camera that the CAMERA_KEYS of a frame in the file `source` describe, for the image of H × W pixels
    at `path`.

    Raises:
      WrongSize: `w` and `h` are another size.
      UserError: there is neither a field of view nor a focal length.
    """
    if (keys.get('w', W), keys.get('h', H)) != (W, H):
        raise WrongSize(f'{path}: found {W}×{H} pixels, but w, h = {keys.get("w")}, {keys.get("h")} in '
                        f'{source.name}')
    if 'fl_x' in keys:
        fx = keys['fl_x']
    elif 'camera_angle_x' in keys:
        fx = 0.5 * W / np.tan(0.5 * keys['camera_angle_x'])
    else:
        raise UserError(f'{source}: found no intrinsics, expected "camera_angle_x" or "fl_x"')
    fy, cx, cy = keys.get('fl_y', fx), keys.get('cx', 0.5 * W), keys.get('cy', 0.5 * H)
    distortion = tuple(float(keys.get(key, 0)) for key in DISTORTION)
    fisheye = bool(keys.get('is_fisheye')) or keys.get('camera_model') == 'OPENCV_FISHEYE'
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    return Camera(H, W, K, distortion if any(distortion) else None, fisheye)


def path_of(frames):
    """The camera path of a scene, [40, 4, 4]."""
    return synthetic_orbit() if frames.has_splits else orbit_of_cameras(frames.poses)
