"""A placed scene on disk, in the formats of this project, nerfstudio, instant-ngp, LLFF and COLMAP."""
import json
import os
import re
import shlex
import shutil
from itertools import chain, count
from pathlib import Path

import numpy as np

from scenes.cameras import homogeneous
from scenes.files import partial_path, read_json

# The folder of the presets.
CONFIGS = Path(__file__).parents[2] / 'configs'
# One view in this many is held out to measure quality, as is usual for LLFF's scenes.
LLFFHOLD = 8
# Poses that differ by less than this, in units of the placed scene, are the same.
SAME_POSE = 1e-3
# Photos are reduced for training until their longer side has no more than this number of pixels.
TRAINING_SIDE = 1000
# A scene is trained in the LLFF layout, which has no lens distortion, if that costs no more than this mean
# reprojection error at the size for training, in pixels.
MAX_PINHOLE_ERROR = 1.0
# Results of an earlier run, which are replaced; training makes folders of reduced photos anew.
OUTPUTS = re.compile(r'images(_\d+)?|masks|sparse|transforms\.json|sparse_points\.ply|config\.txt|'
                     r'poses_bounds\.npy|report\.(json|html)')

# Presets for photos in the LLFF layout, of an object on white, and of anything else.
FORWARD_PRESET, OBJECT_PRESET, PRESET = 'fern_fast.txt', 'fast.txt', 'photos_fast.txt'
# FORWARD_PRESET does without sparse points; scenes of this tool have them, and depth helps those most.
LAMBDA_DEPTH = 0.1
# Lines of a preset that `write_config` replaces.
REPLACED = re.compile(r'(#.*|(expname|basedir|datadir|dataset_type|factor|llffhold|random_bkgd) = .*)?\n')
# The box that is not contracted: `Placement` puts the focus at 0, at distance 1 from cameras or subject.
UNIT_BOX = (-1, -1, -1, 1, 1, 1)


def training_factor(views):
    """The integer that divides the size of the photos for training, for a list of `View`."""
    return max(1, -(-max(max(view.width, view.height) for view in views) // TRAINING_SIDE))


def write_transforms(path, views, placement, masks=()):
    """Write transforms.json with the keys of nerfstudio and instant-ngp.

    Args:
      path: of the file.
      views: list of `View`, one for each pose of the placement.
      placement: a `Placement`.
      masks: file names in `masks/`, named as `mask_name` has it.
    """
    meta = {'camera_model': 'OPENCV'}
    shared = all(view.intrinsics() == views[0].intrinsics() for view in views)
    if shared:
        meta.update(views[0].intrinsics())
    frames = []
    for view, pose in zip(views, placement.poses):
        frame = {'file_path': f'images/{view.name}', 'colmap_im_id': view.image_id}
        if not shared:
            frame.update(view.intrinsics())
        if mask_name(view.name) in masks:
            frame['mask_path'] = f'masks/{mask_name(view.name)}'
        frames.append({**frame, 'transform_matrix': homogeneous(pose).tolist()})
    transform = np.concatenate([placement.rotation, placement.translation[:, None]], 1)
    # instant-ngp fits aabb into a unit cube, and its volume is aabb_scale times as wide
    meta.update(applied_transform=transform.tolist(), applied_scale=placement.scale,
                ply_file_path='sparse_points.ply', aabb=placement.aabb.tolist(), aabb_scale=1,
                near=placement.near, far=placement.far, frames=frames)
    path.write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')


def mask_name(name):
    """The file name of the mask of the photo `name`."""
    return f'{name.rpartition(".")[0]}.png'


def write_ply(path, points, colors):
    """Write points [M, 3] with colours uint8 [M, 3] as a binary PLY file."""
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(points)}',
              *(f'property float {axis}' for axis in 'xyz'),
              *(f'property uchar {color}' for color in ('red', 'green', 'blue')), 'end_header\n']
    vertices = np.empty(len(points), [('xyz', '<f4', 3), ('rgb', 'u1', 3)])
    vertices['xyz'], vertices['rgb'] = points, colors
    path.write_bytes('\n'.join(header).encode() + vertices.tobytes())


def write_poses_bounds(path, poses, bounds, view):
    """Write LLFF's poses_bounds.npy: [N, 17], axes down, right, back.

    Args:
      path: of the file.
      poses: c2w [N, 3, 4] in OpenGL axes.
      bounds: nearest and farthest depth of each view, [N, 2].
      view: a `View` with the size and the focal length of all photos.
    """
    right, up, back, position = np.moveaxis(poses, -1, 0)
    hwf = np.broadcast_to([view.height, view.width, view.params[0]], right.shape)
    table = np.stack([-up, right, back, position, hwf], -1).reshape(len(poses), 15)
    np.save(path, np.concatenate([table, bounds], -1))


def experiment_name(datadir, transforms):
    """The `expname` for the config of a scene: that of the config in `datadir` if the file `transforms` has
    the same cameras as the one there. Otherwise it is the folder's name, with a number if there is a run of
    that name, which would be resumed with cameras that it does not fit."""
    known = [path for path in (datadir / 'transforms.json', datadir / 'config.txt') if path.is_file()]
    if len(known) == 2 and same_cameras(known[0], transforms):
        name = re.search(r'^expname = (\S+)$', known[1].read_text(encoding='utf-8'), re.MULTILINE)
        if name:
            return name[1]
    name = re.sub(r'[^\w.-]+', '_', datadir.resolve().name)
    names = chain([name], (f'{name}_{number}' for number in count(2)))
    return next(name for name in names if not any(Path('logs', name).glob('*.tar')))


def same_cameras(*files):
    """Whether two files transforms.json have the same images with the same poses, but for rounding: bundle
    adjustment on several threads does not repeat exactly."""
    a, b = ({frame['file_path']: np.array(frame['transform_matrix']) for frame in read_json(file)['frames']}
            for file in files)
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], atol=SAME_POSE) for name in a)


def quoted(path):
    """A path as a config file has it: in quotes if it would be read as something else."""
    text = path.as_posix()
    text = f'./{text}' if text.startswith('[') else text  # not a list
    if not re.search(r"\s[#;]|^['\"]", text):
        return text
    return f'"{text}"' if "'" in text else f"'{text}'"


def write_config(path, datadir, name, placement, factor, white_bkgd=False, llff_error=None):
    """Write config.txt with the fast preset for the scene.

    Args:
      path: of the file.
      datadir: folder of the scene.
      name: the `expname`.
      placement: a `Placement`.
      factor: by how much the photos are reduced.
      white_bkgd: whether the photos show an object on plain white.
      llff_error: with poses_bounds.npy, its mean reprojection error in pixels; None without.
    """
    config = shlex.quote((datadir / 'config.txt').as_posix())
    head = f'# Scene type: {placement.scene_type}.\n#   python run_nerf.py --config {config}\n'
    if llff_error is not None:
        head += ('# Uses poses_bounds.npy and images/, with normalised device coordinates. That layout has\n'
                 '# no lens distortion: cameras were fitted without it, with a mean reprojection error of\n'
                 f'# {llff_error:.2f} pixels. transforms.json has it.\n')
        data, preset = {'dataset_type': 'llff', 'lambda_depth': LAMBDA_DEPTH}, FORWARD_PRESET
    else:
        head += '# Uses transforms.json, with lens distortion.\n'
        preset = OBJECT_PRESET if white_bkgd else PRESET
        box = placement.aabb.ravel() if white_bkgd else UNIT_BOX
        data = {'dataset_type': 'blender', 'near': f'{placement.near:.4g}', 'far': f'{placement.far:.4g}',
                'aabb': f'[{", ".join(f"{x:.4g}" for x in box)}]'}
    data = {'expname': name, 'basedir': './logs', 'datadir': quoted(datadir), **data, 'factor': factor,
            'llffhold': LLFFHOLD, **({'white_bkgd': True} if white_bkgd else {})}
    lines = (CONFIGS / preset).read_text(encoding='utf-8').splitlines(keepends=True)
    rest = ''.join(line for line in lines if not REPLACED.fullmatch(line))
    text = ''.join(f'{key} = {value}\n' for key, value in data.items())
    path.write_text(f'{head}{text}\n{rest}', encoding='utf-8')


def link_files(folder, files):
    """A new folder with `files`, a dict name → path. They take no space of their own where the file system
    has links."""
    folder.mkdir()
    for name, path in files.items():
        try:
            os.link(path, folder / name)
        except OSError:
            shutil.copyfile(path, folder / name)


def publish(staging, datadir):
    """Move everything in the folder `staging` to `datadir`, in place of the outputs of an earlier run. If
    something cannot be moved, everything is moved back. config.txt is there only with all the rest."""
    old = partial_path(staging.parent / 'old')
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    outputs = [path for path in datadir.iterdir() if OUTPUTS.fullmatch(path.name)]
    moves = [(path, old / path.name) for path in sorted(outputs, key=is_config, reverse=True)]
    moves += [(path, datadir / path.name) for path in sorted(staging.iterdir(), key=is_config)]
    done = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.rename(target, source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
    staging.rmdir()


def is_config(path):
    return path.name == 'config.txt'
