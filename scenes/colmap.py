"""The COLMAP layout: a sparse model beside a folder of images.

    scene/sparse/0/   cameras, images and points3D, each as .bin or .txt
    scene/images/…    the photos that the model names
    scene/masks/…     optional: only white pixels count
"""
import os
import struct
import warnings
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import Camera, check_poses, orbit_of_cameras
from scenes.errors import UserError, first_line
from scenes.scene import Scene
from scenes.views import WrongSize, find_mask, load_images, load_masks, plan_views

# COLMAP's camera models by number: the name, and where in its parameters fx, fy, cx, cy are, and the
# distortion k1, k2, k3, k4, p1, p2; None stands for 0.
MODELS = {0: ('SIMPLE_PINHOLE', (0, 0, 1, 2), ()), 1: ('PINHOLE', (0, 1, 2, 3), ()),
          2: ('SIMPLE_RADIAL', (0, 0, 1, 2), (3,)), 3: ('RADIAL', (0, 0, 1, 2), (3, 4)),
          4: ('OPENCV', (0, 1, 2, 3), (4, 5, None, None, 6, 7)),
          5: ('OPENCV_FISHEYE', (0, 1, 2, 3), (4, 5, 6, 7)),
          8: ('SIMPLE_RADIAL_FISHEYE', (0, 0, 1, 2), (3,)), 9: ('RADIAL_FISHEYE', (0, 0, 1, 2), (3, 4))}
# The numbers of parameters of all of COLMAP's models.
NUM_PARAMETERS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12)
# The names of the models that are not supported.
UNSUPPORTED = {6: 'FULL_OPENCV', 7: 'FOV', 10: 'THIN_PRISM_FISHEYE'}
# Points nearer to a camera than this percentile of those that it sees do not count, nor do as many far ones.
OUTLIERS = 1.0
# Between near and far there is this much more room than the points need.
ROOM = 1.25


class Photo(NamedTuple):
    """An image of a COLMAP model."""
    name: str
    camera: int            # its number
    c2w: np.ndarray        # OpenGL axes, [3, 4]
    points: np.ndarray     # the numbers of the points that it sees [M]
    pixels: np.ndarray     # where it sees them: x, y [M, 2]; (0, 0) is the image's upper left corner


class Model(NamedTuple):
    """A sparse model."""
    cameras: dict          # `Camera`s by number
    photos: list           # `Photo`s, sorted by name
    numbers: np.ndarray    # of the points [M], ascending
    points: np.ndarray     # their positions, float64 [M, 3]
    errors: np.ndarray     # their mean reprojection errors in pixels [M]


def load_colmap_scene(args):
    """The `Scene` in the folder --datadir, according to the options. It keeps COLMAP's coordinates.

    Raises:
      UserError: files are missing, damaged or inconsistent.
    """
    basedir = Path(args.datadir)
    model = read_model(model_folder(basedir))
    folder, count = basedir / 'images', len(model.photos)
    photos = [photo for photo in model.photos if (folder / photo.name).is_file()]
    if not photos:
        raise UserError(f'{folder}: found none of the {count} images of the model, such as '
                        f'{model.photos[0].name}')
    if len(photos) < count:
        warnings.warn(f'{folder}: {count - len(photos)} of {count} images of the model do not exist; they '
                      'are left out', stacklevel=2)

    paths = [folder / photo.name for photo in photos]
    resized = {}  # so that equal cameras are one object

    def camera_of(index, H, W):
        camera = model.cameras[photos[index].camera]
        if abs(H * camera.W - W * camera.H) > max(camera.H, camera.W):  # more than rounding
            raise WrongSize(f'{paths[index]}: found {W}×{H} pixels, but {camera.W}×{camera.H} in the model')
        key = camera, H, W
        return resized.setdefault(key, camera.resized(H, W))
    masks = [find_mask(basedir, path) for path in paths]
    views = plan_views(basedir, paths, masks, camera_of, args.factor, args.half_res, stored_first=True)
    images, alphas = load_images(views, args.white_bkgd)

    poses = np.stack([photo.c2w for photo in photos]).astype(np.float32)
    check_poses(poses, lambda index: paths[index])
    near, far = bounds_of(model, photos)
    i_test = np.arange(len(photos))[::args.llffhold] if args.llffhold > 0 else np.arange(1)
    camera = views[0].camera.undistorted()
    return Scene(images, camera.H, camera.W, poses, camera.K, near, far,
                 orbit_of_cameras(poses)[:, :3], np.setdiff1d(np.arange(len(photos)), i_test), i_test, i_test,
                 alphas, [os.path.relpath(path, basedir) for path in paths], [view.camera for view in views],
                 load_masks(views), points=model.points.astype(np.float32))


def model_folder(basedir):
    """The folder of the sparse model of a scene. Raises UserError if there is none."""
    if not basedir.is_dir():
        raise UserError(f'{basedir}: no such folder; expected sparse/0 and images in it')
    for name in ('sparse/0', 'sparse', 'colmap/sparse/0'):
        if any((basedir / name / f'cameras.{ending}').is_file() for ending in ('bin', 'txt')):
            return basedir / name
    raise UserError(f'{basedir}: found no COLMAP model, expected sparse/0/cameras.bin or cameras.txt')


def bounds_of(model, photos):
    """near and far in units of rays_d, from the points that each photo sees; (0.1, 10) without points."""
    nearest, farthest = [], []
    for photo in photos:
        seen = model.points[np.searchsorted(model.numbers, photo.points)]
        depths = depths_of(seen, photo.c2w, model.cameras[photo.camera].fisheye)
        depths = depths[depths > 0]
        if len(depths):
            low, high = np.percentile(depths, [OUTLIERS, 100 - OUTLIERS])
            nearest.append(low)
            farthest.append(high)
    return (float(min(nearest) / ROOM), float(max(farthest) * ROOM)) if nearest else (0.1, 10.0)


def depths_of(points, c2w, fisheye):
    """How far `points` [M, 3] are from a camera, c2w [3, 4], in units of rays_d, [M]: depths, negative behind
    it, or distances from a fisheye camera, whose rays_d have unit length."""
    offsets, back = c2w[:, 3] - points, c2w[:, 2]
    return np.linalg.norm(offsets, axis=-1) if fisheye else offsets @ back / (back @ back)


def read_model(folder):
    """The sparse model in `folder`, binary or text.

    Raises:
      UserError: a file is missing or damaged, or a camera model is not supported.
    """
    def read(name, read_binary, read_text):
        path = folder / f'{name}.bin'
        try:
            if path.is_file():
                return read_binary(Bytes(path.read_bytes()), path)
            path = folder / f'{name}.txt'
            lines = path.read_text(encoding='utf-8').splitlines()
            return read_text([line for line in lines if not line.startswith('#')], path)
        except FileNotFoundError:
            raise UserError(f'{folder}: found neither {name}.bin nor {name}.txt') from None
        except UserError:
            raise
        except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
            raise UserError(f'{path}: not a readable file of COLMAP ({first_line(error)})') from None

    cameras = read('cameras', cameras_from_bytes, cameras_from_text)
    photos = sorted(read('images', photos_from_bytes, photos_from_text), key=attrgetter('name'))
    numbers, points, errors = read('points3D', points_from_bytes, points_from_text)
    repeated = [one.name for one, other in pairwise(photos) if one.name == other.name]
    if repeated:
        raise UserError(f'{folder}: found two images called {repeated[0]}, expected different names')
    unknown = [photo.name for photo in photos if photo.camera not in cameras]
    if not photos or unknown:
        problem = f'no camera of {unknown[0]}' if unknown else 'no image'
        raise UserError(f'{folder}: found {problem} in the model')
    order = np.argsort(numbers)
    numbers = numbers[order]
    known = [np.isin(photo.points, numbers) for photo in photos]
    photos = [photo._replace(points=photo.points[known], pixels=photo.pixels[known])
              for photo, known in zip(photos, known)]
    return Model(cameras, photos, numbers, points[order], errors[order])


# --- the files ----------------------------------------------------------------------------------------------

class Bytes:
    """The content of a binary file, and how far it has been read."""

    def __init__(self, content):
        self.content, self.at = content, 0

    def numbers(self, layout):
        """The next numbers, as `struct` describes them."""
        values = struct.unpack_from('<' + layout, self.content, self.at)
        self.at += struct.calcsize('<' + layout)
        return values

    def array(self, dtype, count):
        """The next `count` items of an array."""
        items = np.frombuffer(self.content, dtype, count, self.at)
        self.at += items.nbytes
        return items

    def text(self):
        """The next text, up to a zero."""
        end = self.content.index(b'\0', self.at)
        text = self.content[self.at:end].decode()
        self.at = end + 1
        return text


def camera_of_model(model, width, height, parameters, path):
    """A `Camera` from a model's number or name, and its parameters. Raises UserError for a model that is not
    supported, or numbers that cannot be a camera."""
    names = {name: number for number, (name, _, _) in MODELS.items()}
    model = names.get(model, model)
    if model not in MODELS:
        raise UserError(f'{path}: found camera model {UNSUPPORTED.get(model, model)}, expected one of '
                        f'{", ".join(names)}; undistort the images with COLMAP')
    name, intrinsics, distortion = MODELS[model]
    fx, fy, cx, cy = (parameters[index] for index in intrinsics)
    if not (np.isfinite(parameters).all() and min(fx, fy, int(width), int(height)) > 0):
        raise UserError(f'{path}: found {width}×{height} pixels and parameters {list(parameters)}, '
                        'expected positive sizes and focal lengths')
    distortion = [0.0 if index is None else parameters[index] for index in distortion]
    distortion = tuple(distortion + [0.0] * (6 - len(distortion)))
    return Camera(int(height), int(width), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]),
                  distortion if any(distortion) else None, name.endswith('FISHEYE'))


def photo_of(name, camera, quaternion, translation, points, pixels):
    """A `Photo` from the rotation (w, x, y, z) and translation from the world to the camera's OpenCV axes;
    the numbers of points are negative where there is none."""
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    w2c = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
    position = -w2c.T @ np.array(translation)
    return Photo(name, camera, np.column_stack([w2c.T * [1, -1, -1], position]), points[points >= 0],
                 pixels[points >= 0])


def cameras_from_bytes(content, path):
    cameras = {}
    for _ in range(*content.numbers('Q')):
        number, model, width, height = content.numbers('iiQQ')
        if not 0 <= model < len(NUM_PARAMETERS):
            raise UserError(f'{path}: found camera model {model}, expected one of '
                            f'{", ".join(name for name, _, _ in MODELS.values())}')
        parameters = content.numbers(f'{NUM_PARAMETERS[model]}d')
        cameras[number] = camera_of_model(model, width, height, parameters, path)
    return cameras


def cameras_from_text(lines, path):
    cameras = {}
    for number, model, width, height, *parameters in (line.split() for line in lines if line.strip()):
        cameras[int(number)] = camera_of_model(model, width, height, [float(x) for x in parameters], path)
    return cameras


def photos_from_bytes(content, path):
    photos = []
    for _ in range(*content.numbers('Q')):
        _, *pose, camera = content.numbers('i7di')
        name, (count,) = content.text(), content.numbers('Q')
        seen = content.array(np.dtype([('xy', '<f8', 2), ('point', '<i8')]), count)
        photos.append(photo_of(name, camera, pose[:4], pose[4:], seen['point'], seen['xy']))
    return photos


def photos_from_text(lines, path):
    photos = []
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    for line, seen in zip(lines[::2], [*lines[1::2], '']):  # the second line of an image may be empty
        _, *pose, camera, name = line.split(maxsplit=9)
        pose, seen = [float(x) for x in pose], np.array(seen.split()).reshape(-1, 3)
        photos.append(photo_of(name.strip(), int(camera), pose[:4], pose[4:], seen[:, 2].astype(np.int64),
                               seen[:, :2].astype(np.float64)))
    return photos


def points_from_bytes(content, path):
    numbers, points, errors = [], [], []
    for _ in range(*content.numbers('Q')):
        number, x, y, z, *_, error, length = content.numbers('Q3d3BdQ')
        content.at += 8 * length
        numbers.append(number)
        points.append((x, y, z))
        errors.append(error)
    return np.array(numbers, np.int64), np.array(points).reshape(-1, 3), np.array(errors)


def points_from_text(lines, path):
    rows = [line.split()[:8] for line in lines if line.strip()]
    values = np.array([[*row[1:4], row[7] if len(row) > 7 else 0] for row in rows], np.float64).reshape(-1, 4)
    return np.array([row[0] for row in rows], np.int64), values[:, :3], values[:, 3]
