"""Make a camera path for `run_nerf.py --render_poses`.

    python tools/path.py path.json --run logs/lego_fast --views r_0.png r_7.png r_30.png --loop
    python tools/path.py path.json --run logs/lego_fast --keyframes saved_by_the_viewer.json --seconds 12
    python tools/path.py path.json --run logs/lego_fast --orbit         # or --spiral, --figure_eight
    python run_nerf.py --config configs/lego_fast.txt --render_only --render_poses path.json

docs/paths.md describes the paths and the file.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_llff import average_pose, figure_eight_path, spiral_path
from scenes.cameras import focus_point, homogeneous, orbit_of_cameras
from scenes.errors import UserError, first_line, print_any_text
from scenes.paths import FPS, FPS_RANGE, CameraPath, interpolate_path, read_camera_path, write_camera_path
from tools.trained import load_trained
from training.options import number

# How long a path takes in seconds, unless its keyframes have times.
SECONDS = 8.0
# Cameras face the same way if their mean viewing direction is at least this long.
FACING_TOGETHER = 0.75
# A spiral or figure eight extends by at most these fractions of the distance to what the cameras look at,
# to the side, up and ahead.
MAX_RADII = np.array([0.4, 0.4, 0.1])


def make_path(args, scene):
    """The `CameraPath` through a `Scene` that the options ask for. Raises UserError if there is none."""
    saved = CameraPath(scene.poses)
    if args.keyframes:
        saved = read_camera_path(args.keyframes, scene.applied_transform)
    fps, size = args.fps or saved.fps or FPS, saved.size or (scene.W, scene.H)
    if args.shape:
        poses = shape_path(args.shape, scene.poses, frame_count(args.seconds or SECONDS, fps))
        return CameraPath(poses, np.full(len(poses), scene.pinhole.fov), size, fps, loop=True)

    keys, fovs, times = saved.keyframes or (saved.poses, saved.fovs, None)
    if args.views:
        views = [find_view(name, scene) for name in args.views]
        keys, fovs = scene.poses[views], np.array([scene.cameras[view].fov for view in views])
    loop = args.loop or bool(saved.loop)
    times, seconds = schedule(times, len(keys), args.seconds, loop)
    poses, all_fovs = interpolate_path(keys, fovs, times, frame_count(seconds, fps), loop)
    return CameraPath(poses, all_fovs, size, fps, (keys, fovs, times), loop)


def frame_count(seconds, fps):
    """The number of frames of a video, at least one."""
    return max(round(seconds * fps), 1)


def schedule(times, count, seconds, loop):
    """When a path reaches its `count` keyframes, and how long it takes.

    Args:
      times: of the keyframes [count], scaled to `seconds`, if these are given; None for evenly spaced.
    """
    if count == 1:
        return np.zeros(1), seconds or SECONDS
    if times is None:
        times, seconds = np.arange(count), seconds or SECONDS
    length = times[-1] - times[0] + (np.diff(times).mean() if loop else 0)
    seconds = seconds or length
    return (times - times[0]) * (seconds / length), seconds


def find_view(name, scene):
    """The index of the view whose image has the path `name`, or a path that ends with it, or that is number
    `name`. A training view counts before others."""
    parts = Path(name).parts
    found = [view for view, path in enumerate(scene.names or []) if Path(path).parts[-len(parts):] == parts]
    found = [view for view in found if view in scene.i_train] or found
    if not found and name.isdecimal() and int(name) < len(scene.poses):
        return int(name)
    if len(found) > 1:
        raise UserError(f'--views: found {len(found)} images {name}, expected one, such as '
                        f'{scene.names[found[0]]}')
    if not found:
        example = f', such as {scene.names[scene.i_train[0]]}' if scene.names else ''
        raise UserError(f'--views: found no image {name}, expected a name{example}, or a number below '
                        f'{len(scene.poses)}')
    return found[0]


def shape_path(shape, cameras, count):
    """A closed path around or among cameras.

    Args:
      shape: orbit, spiral or figure_eight.
      cameras: their c2w [N, 3, 4].
      count: number of frames.
    Returns:
      c2w [count, 3, 4].
    Raises:
      UserError: the cameras do not look at a common point.
    """
    if shape == 'orbit':
        return orbit_of_cameras(cameras, count)[:, :3]
    cameras = cameras.astype(np.float64)
    center = average_pose(cameras)
    if np.linalg.norm(cameras[:, :, 2].mean(0)) < FACING_TOGETHER:  # they surround the scene
        center = orbit_of_cameras(cameras)[0, :3].astype(np.float64)
    to_center = np.linalg.inv(homogeneous(center))
    distance = -(to_center @ np.append(focus_point(cameras), 1.0))[2]
    if not distance > 0:
        raise UserError('found cameras that do not look at a common point, expected ones that do; --views '
                        'makes a path of any cameras')
    offsets = (to_center @ homogeneous(cameras))[:, :3, 3]
    radii = np.minimum(np.percentile(np.abs(offsets), 90, 0), MAX_RADII * distance)
    if shape == 'spiral':
        return spiral_path(center, center[:, 1], radii, distance, rotations=2, views=count)
    return figure_eight_path(center, center[:, 1], radii, distance, count)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, metavar='OUT.json', help='the file to write')
    parser.add_argument('--run', required=True, help='folder of the trained run, or one of its checkpoints')
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument('--views', nargs='+', metavar='IMAGE',
                      help='through the cameras of these images of the scene: names or numbers')
    kind.add_argument('--keyframes', metavar='FILE',
                      help='through the keyframes of a path file, or through its frames if it has none')
    for shape, text in (('orbit', 'around what the cameras look at'),
                        ('spiral', "the spiral of the paper's videos, among the cameras"),
                        ('figure_eight', 'an eight on its side, among the cameras')):
        kind.add_argument(f'--{shape}', dest='shape', action='store_const', const=shape, help=text)
    parser.add_argument('--loop', action='store_true', help='return to the first keyframe')
    parser.add_argument('--seconds', type=number(above=0, most=3600),
                        help=f'length (default: as the keyframes say, or {SECONDS:g})')
    parser.add_argument('--fps', type=number(least=FPS_RANGE[0], most=FPS_RANGE[1]),
                        help=f'frames per second (default: as the file of keyframes says, or {FPS})')
    return parser.parse_args(argv)


def main(argv=None):
    """Run the program; returns 0, or 2 for errors that the user can fix."""
    print_any_text()
    args = parse_args(argv)
    try:
        has_names = args.views is not None and not all(name.isdecimal() for name in args.views)
        path = make_path(args, load_trained(args.run, photos=has_names, say=say).scene)
        write_camera_path(args.out, path.poses, path.fovs, path.fps, path.size, path.keyframes, path.loop)
    except (UserError, OSError) as error:
        say(f'path.py: error: {first_line(error)}')
        return 2
    print(f'{args.out}: {len(path.poses)} frames, {len(path.poses) / path.fps:.1f} s')
    return 0


def say(message):
    print(message, file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
