"""Camera paths: their files, the cameras of their frames, and smooth paths through keyframes.

docs/paths.md describes the files.
"""
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import camera_of_fov, check_poses, homogeneous
from scenes.errors import UserError
from scenes.files import read_array, read_json, write_text
from scenes.quaternions import exp, inverse, log, matrices_of, multiply, quaternions_of

# Videos play this many frames per second unless the path or an option says otherwise.
FPS = 30
# A side of a frame has at most this many pixels.
MAX_SIDE = 2 ** 14
# The least and largest values of the numbers in a file: degrees, seconds, and frames per second.
FOV_RANGE, TIME_RANGE, FPS_RANGE = (0.1, 179), (0, 1e6), (1, 1000)
# nerfstudio writes this file for each of its runs.
DATAPARSER_TRANSFORMS = 'dataparser_transforms.json'


class CameraPath(NamedTuple):
    """What a file says about a camera path; None for what it does not say."""
    poses: np.ndarray               # c2w of the frames, float32 [N, 3, 4]
    fovs: np.ndarray | None = None  # their vertical fields of view in degrees [N]
    size: tuple | None = None       # their width and height in pixels
    fps: float | None = None        # frames per second
    keyframes: tuple | None = None  # poses [K, 3, 4], fovs [K] or None, times [K] in seconds or None
    loop: bool | None = None        # whether the first frame follows the last one


def cameras_of_path(path, camera):
    """The `Camera` of each frame of a `CameraPath`. What the path does not say is as in `camera`."""
    W, H = path.size or (camera.W, camera.H)
    if path.fovs is None:
        return [camera.with_size(H, W)] * len(path.poses)
    fovs = path.fovs.tolist()
    cameras = {fov: camera_of_fov(fov, H, W) for fov in set(fovs)}
    return [cameras[fov] for fov in fovs]


# --- reading ------------------------------------------------------------------------------------------------

def read_camera_path(path, applied_transform=None, dataparser_transforms=None):
    """Read a camera path: our own file, nerfstudio's, the frames of a transforms file, or c2w matrices
    [N, 3 or 4, 4] in a .json list or a .npy file.

    The poses are in the coordinates of the scene. Those of a file with "coordinates": "input" are brought
    there from the input's, such as COLMAP's; those of nerfstudio from its normalised ones to the input's
    before.

    Args:
      path: of the file.
      applied_transform: from the input's coordinates to the scene's, [4, 4], or None if they are the same.
      dataparser_transforms: nerfstudio's file of this name, if it is not in the folder of `path`.
    Raises:
      UserError: a file cannot be read, or does not hold finite c2w matrices and plausible numbers.
    """
    path, transform = Path(path), np.eye(4)
    content = read_json(path) if path.suffix.lower() == '.json' else read_array(path)
    if not isinstance(content, dict):  # matrices alone
        matrices = content if isinstance(content, list) else np.atleast_1d(content)
        content = {'frames': [{'transform_matrix': matrix} for matrix in matrices]}
    if 'camera_path' in content:
        transform = undo_dataparser(path, dataparser_transforms)
        content = {**from_nerfstudio(content, path), 'coordinates': 'input'}
    elif dataparser_transforms is not None:
        raise UserError(f'{path}: found no "camera_path", expected a path of nerfstudio with '
                        '--dataparser_transforms')
    coordinates = content.get('coordinates', 'scene')
    if coordinates not in ('scene', 'input'):
        raise UserError(f'{path}: found coordinates = {str(coordinates)[:40]}, expected scene or input')
    if coordinates == 'input' and applied_transform is not None:
        transform = applied_transform @ transform
    return parse_path(content, path, transform)


def parse_path(content, path, transform):
    """The `CameraPath` in the content of our file at `path`, moved by `transform` [4, 4]."""
    poses, fovs = parse_frames(content.get('frames'), path, transform)
    keyframes = content.get('keyframes') or None
    if keyframes:
        keyframes = (*parse_frames(keyframes, path, transform),
                     numbers_of(keyframes, 'time', path, *TIME_RANGE))
        if keyframes[2] is not None and not (np.diff(keyframes[2]) > 0).all():
            raise UserError(f'{path}: found keyframes whose "time" does not ascend')
    sides = [number_of(content, side, path, 1, MAX_SIDE) for side in ('width', 'height')]
    size = None if None in sides else tuple(map(int, sides))
    loop = bool(content['loop']) if content.get('loop') is not None else None
    return CameraPath(poses, fovs, size, number_of(content, 'fps', path, *FPS_RANGE), keyframes, loop)


def parse_frames(frames, path, transform):
    """The poses [N, 3, 4] of frames, moved by `transform`, and their fields of view [N] or None."""
    try:
        poses = np.array([frame['transform_matrix'] for frame in frames], np.float64)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise UserError(f'{path}: found no matrices, expected c2w matrices [N, 3 or 4, 4]') from None
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise UserError(f'{path}: found an array of shape {list(poses.shape)}, '
                        'expected c2w matrices [N, 3 or 4, 4]')
    check_poses(poses, lambda index: f'{path}: pose {index}')
    poses = transform @ homogeneous(poses)
    poses[:, :3, :3] /= np.cbrt(np.linalg.det(transform[:3, :3]))  # positions alone are scaled
    return poses[:, :3].astype(np.float32), numbers_of(frames, 'fov', path, *FOV_RANGE)


def numbers_of(frames, key, path, least, most):
    """The number `key` of each frame, float64 [N]; None if no frame has it."""
    values = [number_of(frame, key, f'{path}: frame {index}', least, most)
              for index, frame in enumerate(frames)]
    if None not in values:
        return np.array(values, np.float64)
    if any(value is not None for value in values):
        raise UserError(f'{path}: frame {values.index(None)}: found no {key}, which other frames have')
    return None


def number_of(entry, key, where, least, most):
    """The number `key` of a dict, from `least` to `most`; None if it is missing. `where` is the start of the
    error message."""
    value = entry.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and least <= value <= most):
        raise UserError(f'{where}: found {key} = {str(value)[:40]}, expected a number from {least:g} to '
                        f'{most:g}')
    return value


def from_nerfstudio(content, path):
    """The content of nerfstudio's camera path in the form of our own file. As in nerfstudio, frames have the
    size that the file gives, whatever their `aspect` is."""
    kind = content.get('camera_type') or 'perspective'
    if str(kind).lower() != 'perspective':
        raise UserError(f'{path}: found camera_type = {str(kind)[:40]}, expected perspective')
    try:
        frames = [{'transform_matrix': np.reshape(np.array(frame['camera_to_world'], np.float64), (4, 4)),
                   'fov': frame.get('fov')} for frame in content['camera_path']]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        raise UserError(f'{path}: found a frame without "camera_to_world", expected 16 numbers') from None
    return {'frames': frames, 'width': content.get('render_width'), 'height': content.get('render_height'),
            'fps': content.get('fps'), 'loop': content.get('is_cycle')}


def undo_dataparser(path, named=None):
    """The transform from nerfstudio's normalised coordinates to those of its input, [4, 4], by the file
    `named` or that beside `path`. Warns if there is none, and returns the identity."""
    source = Path(named) if named else path.with_name(DATAPARSER_TRANSFORMS)
    if not named and not source.is_file():
        warnings.warn(f'{path}: found no {DATAPARSER_TRANSFORMS} beside it, so its poses are taken to be in '
                      'the coordinates of the input; --dataparser_transforms names the file', stacklevel=2)
        return np.eye(4)
    content = read_json(source)
    try:
        transform = homogeneous(np.reshape(np.array(content['transform'], np.float64)[:3], (3, 4)))
        transform[:3] *= float(content['scale'])
        undo = np.linalg.inv(transform)
    except (TypeError, KeyError, ValueError, OverflowError, np.linalg.LinAlgError):
        undo = np.full((4, 4), np.nan)
    if not np.isfinite(undo).all():
        raise UserError(f'{source}: found no invertible transform, expected 3 × 4 numbers as "transform" and '
                        'a number as "scale"')
    return undo


# --- writing ------------------------------------------------------------------------------------------------

def write_camera_path(path, poses, fovs, fps, size, keyframes=None, loop=False):
    """Write a camera path in the coordinates of the scene.

    Args:
      path: of the file, which is replaced.
      poses: c2w of the frames [N, 3 or 4, 4].
      fovs: their vertical fields of view in degrees [N]; None for that of the scene's camera.
      fps: frames per second.
      size: width and height of the frames in pixels.
      keyframes: what the path was made from: poses [K, 3 or 4, 4], fovs [K] or None, and times [K] in seconds
        or None.
      loop: whether the first frame follows the last one.
    Raises:
      UserError: the file cannot be written.
    """
    about = {'coordinates': 'scene', 'fps': fps, 'width': int(size[0]), 'height': int(size[1]),
             'loop': bool(loop)}
    lists = {'keyframes': frame_list(*keyframes)} if keyframes else {}
    lists['frames'] = frame_list(poses, fovs)
    parts = [f'"{key}": {json.dumps(value)}' for key, value in about.items()]
    parts += [f'"{key}": [\n  ' + ',\n  '.join(map(json.dumps, frames)) + ']'  # a line for each frame
              for key, frames in lists.items()]
    try:
        write_text(path, '{' + ',\n '.join(parts) + '}\n')
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror})') from None


def frame_list(poses, fovs=None, times=None):
    """Frames in the form of the file, a list of dicts."""
    columns = {'transform_matrix': homogeneous(np.asarray(poses, np.float64)), 'fov': fovs, 'time': times}
    columns = {key: np.asarray(values).tolist() for key, values in columns.items() if values is not None}
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]


# --- interpolation ------------------------------------------------------------------------------------------

def interpolate_path(poses, fovs, times, count, loop=False):
    """A path through keyframes with continuous velocities. Positions and logarithms of focal lengths follow
    Catmull-Rom splines, rotations the same splines on unit quaternions (Kim, Kim and Shin 1995, "A General
    Construction Scheme for Unit Quaternion Curves with Simple High Order Derivatives").

    Args:
      poses: c2w of the keyframes [K, 3 or 4, 4].
      fovs: their vertical fields of view in degrees [K], or None.
      times: when the path reaches them, in seconds [K], ascending; None for evenly spaced. A loop returns
        from the last one to the first in the mean time between the others.
      count: number of frames, evenly spaced from the first keyframe to the last one, or around the loop
        without repeating the first one.
      loop: return to the first keyframe.
    Returns:
      poses float32 [count, 3, 4], with orthonormal axes, and fovs [count], or None.
    Raises:
      ValueError: there is no keyframe, or `times` do not ascend.
    """
    poses, K = np.asarray(poses, np.float64), len(poses)
    times = np.arange(K, dtype=np.float64) if times is None else np.asarray(times, np.float64)
    if K == 0 or not (np.diff(times) > 0).all():
        raise ValueError('expected at least one keyframe, and ascending times')
    keys = np.arange(K)
    if loop or K == 1:  # a single keyframe is a path that stays there
        back = np.diff(times).mean() if K > 1 else 1.0
        keys, times = np.append(keys, 0), np.append(times, times[-1] + back)
    segments = find_segments(times, np.linspace(times[0], times[-1], count, endpoint=not loop), loop)

    positions = interpolate(poses[keys, :3, 3], segments)
    rotations = matrices_of(interpolate_rotations(quaternions_of(poses[keys, :3, :3]), segments))
    if fovs is not None:
        log_tangents = np.log(np.tan(np.radians(fovs) / 2))[keys, None]
        fovs = np.degrees(2 * np.arctan(np.exp(interpolate(log_tangents, segments)[:, 0])))
    return np.concatenate([rotations, positions[..., None]], -1).astype(np.float32), fovs


class Segments(NamedTuple):
    """The parts of a path between its K keyframes; of a loop the last keyframe is the first one."""
    spans: np.ndarray    # how long they take [K - 1, 1]
    index: np.ndarray    # which one each frame is in [N]
    weights: tuple       # how much of the three steps of its Bézier curve each frame has made, [N, 1] each
    loop: bool


def find_segments(times, sampled, loop):
    """The `Segments` between keyframes at `times` [K], for frames at the times `sampled` [N]."""
    index = np.clip(np.searchsorted(times, sampled, 'right') - 1, 0, len(times) - 2)
    spans = np.diff(times)[:, None]
    u = (sampled - times[index])[:, None] / spans[index]
    return Segments(spans, index, (1 - (1 - u) ** 3, u * u * (3 - 2 * u), u ** 3), loop)


def interpolate(values, segments):
    """The Catmull-Rom spline through `values` [K, C] at each frame, [N, C]."""
    steps, start = np.diff(values, axis=0), segments.index
    first, last = outer_steps(steps, segments)
    middle = steps[start] - first - last
    a, b, c = segments.weights
    return values[start] + a * first + b * middle + c * last


def interpolate_rotations(q, segments):
    """`interpolate` for unit quaternions [K, 4], [N, 4]: products take the place of sums, and steps are
    rotations around vectors in the camera's axes."""
    turns, start = multiply(inverse(q[:-1]), q[1:]), segments.index
    first, last = outer_steps(log(turns), segments)
    middle = log(multiply(exp(-first), turns[start], exp(-last)))
    a, b, c = segments.weights
    return multiply(q[start], exp(a * first), exp(b * middle), exp(c * last))


def outer_steps(steps, segments):
    """The first and the last of the three steps of each frame's Bézier curve, [N, C] each, from the steps
    between keyframes [K - 1, C]. The velocity at a keyframe is the mean velocity between its neighbours."""
    spans = segments.spans
    if segments.loop:
        steps, spans = (np.concatenate([x[-1:], x, x[:1]]) for x in (steps, spans))
    velocities = (steps[:-1] + steps[1:]) / (spans[:-1] + spans[1:])
    if not segments.loop:
        velocities = np.concatenate([steps[:1] / spans[:1], velocities, steps[-1:] / spans[-1:]])
    third = segments.spans[segments.index] / 3
    return velocities[segments.index] * third, velocities[segments.index + 1] * third
