"""Depth maps of the training views, and their cameras in a transforms.json."""
import json
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from scenes.files import atomic_write, make_folder, write_text
from scenes.images import write_image
from tools.exporting.field import max_depth
from training.outputs import MAX_UINT16

# The range of 16-bit depths is found from every this many-th pixel of both axes.
RANGE_STRIDE = 8
# Depth maps in these formats have these endings.
SUFFIXES = {'png': '.png', 'tiff': '.tiff'}


def write_depths(field, coordinates, folder, kind):
    """Write the depth of each training view of a `Field` to `folder`: `000.png`, …, and `transforms.json`.

    A depth is along the optical axis, or along the ray of a fisheye camera; 0 stands for pixels that are not
    opaque. The unit is that of the poses in transforms.json.

    Args:
      coordinates: the `Coordinates` of the poses.
      kind: 'png' for 16 bits; the file says what a grey level is, and depths beyond the range are the largest
        level. 'tiff' for float32.
    Returns:
      number of files.
    """
    make_folder(folder)
    coarse = np.concatenate([view.t.ravel() for view in field.views(RANGE_STRIDE, 'range of depths')])
    finite = coarse[np.isfinite(coarse)]
    longest = min(max_depth(coarse), 1.01 * finite.max()) if len(finite) else 1.0
    level = coordinates.scale * longest / MAX_UINT16
    frames = []
    for number, view in enumerate(field.views(1, 'depth maps')):
        depth = np.where(np.isfinite(view.t), coordinates.scale * view.t, 0.0)
        name = f'{number:03d}{SUFFIXES[kind]}'
        if kind == 'png':
            write_image(folder / name, np.round(depth / level).clip(0, MAX_UINT16).astype(np.uint16))
        else:
            with atomic_write(folder / name) as partial:
                iio.imwrite(partial, depth.astype(np.float32), plugin='pillow')
        frames.append({'file_path': photo_of(field, view, folder), 'depth_file_path': name,
                       **intrinsics(view.camera),
                       'transform_matrix': coordinates.poses(view.c2w[None])[0].tolist()})
    scale = {'integer_depth_scale': level} if kind == 'png' else {}
    about = {'coordinates': coordinates.name, **scale, 'frames': frames}
    write_text(folder / 'transforms.json', json.dumps(about, indent=1) + '\n')
    return len(frames)


def photo_of(field, view, folder):
    """The path of a view's photo, relative to `folder`; a number if it is not known."""
    names = field.scene.names
    if names is None:
        return f'{view.index:03d}'
    return Path(os.path.relpath(Path(field.trained.args.datadir, names[view.index]), folder)).as_posix()


def intrinsics(camera):
    """A `Camera` as the keys of a transforms file."""
    keys = {'w': camera.W, 'h': camera.H, 'fl_x': camera.K[0, 0], 'fl_y': camera.K[1, 1],
            'cx': camera.K[0, 2], 'cy': camera.K[1, 2]}
    if not camera.is_pinhole:
        keys['camera_model'] = 'OPENCV_FISHEYE' if camera.fisheye else 'OPENCV'
        keys.update(zip(('k1', 'k2', 'k3', 'k4', 'p1', 'p2'), camera.distortion or ()))
    return keys
