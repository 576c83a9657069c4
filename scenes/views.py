"""The image files of a scene's views: their sizes, their cameras, their masks, and their pixels in 8 bit."""
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scenes.cameras import Camera
from scenes.errors import UserError
from scenes.images import (
    IMAGE_EXTENSIONS,
    ImageSet,
    composite_on_bkgd,
    find_reduced,
    image_sizes,
    read_image,
    read_reduced,
    reduced_path,
    reduced_size,
    resize_area,
)

# A pixel of a reduced mask counts if this fraction of its area does.
MIN_MASK_AREA = 0.99


class WrongSize(UserError):
    """An image has another size than its camera."""


class View(NamedTuple):
    """An image file and how it is loaded."""
    path: Path
    camera: Camera        # of the loaded image
    upright: bool         # whether it is turned as its EXIF orientation says
    mask: Path | None     # image whose white pixels count; None if all do
    size: tuple           # height and width of the image, or of the reduced one, before --half_res
    reduced: Path | None  # where the image is kept downsampled by `factor`; None for the full size
    factor: int


def plan_views(root, paths, masks, camera_of, factor=1, half_res=False, stored_first=False):
    """A `View` for each of `paths`, from the headers of the image files alone.

    Args:
      root: folder of the scene.
      paths, masks: image files, and their masks or None.
      camera_of: function of the index of a path, H and W that returns the camera for an image of that
        size, or raises WrongSize; equal cameras are the same object.
      factor: downsample the images by this factor.
      half_res: then halve width and height, which drops an odd row or column.
      stored_first: the cameras are of photos as they are stored, not as their EXIF orientation says, if that
        has their size.
    Raises:
      UserError: an image is missing, too small, or does not fit its camera; or two have the same reduced
        file.
    """
    views, cameras, sources = [], {}, {}
    for index, (path, mask) in enumerate(zip(paths, masks)):
        size, camera, upright = fit_camera(path, index, camera_of, stored_first)
        reduced, final = None, size
        if factor > 1:
            reduced = reduced_path(root, path, factor)
            if sources.setdefault(reduced, path) != path:
                raise UserError(f'{path}: found {sources[reduced]} too, expected different names: both are '
                                f'{reduced} with --factor {factor}')
            final = size_of_reduced(path, reduced, size, factor, upright)
        loaded, (height, width) = final, final
        if half_res:
            height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise UserError(f'{path}: found {size[1]}×{size[0]} pixels, too small to be reduced')
        key = camera, height, width
        if key not in cameras:
            cameras[key] = camera.resized(height, width)
        views.append(View(Path(path), cameras[key], upright, mask, loaded, reduced, factor))
    return views


def fit_camera(path, index, camera_of, stored_first):
    """Height and width of the image at `path`, its camera, and whether it is turned as EXIF says; arguments
    as in `plan_views`."""
    seen, stored = image_sizes(path)
    ways = [(seen, True), (stored, False)]
    for size, upright in reversed(ways) if stored_first else ways:
        try:
            return size, camera_of(index, *size), upright
        except WrongSize as error:
            problem = error
    raise problem


def size_of_reduced(path, reduced, size, factor, upright):
    """Height and width of the image at `path` downsampled by `factor`, which may be in the file `reduced`."""
    existing = find_reduced(reduced, path)
    if existing is None:
        return reduced_size(*size, factor)
    found = image_sizes(existing)[0 if upright else 1]
    if any(abs(side - full / factor) > 1 for side, full in zip(found, size)):
        raise UserError(f'{existing}: found {found[1]}×{found[0]} pixels, expected {size[1]}×{size[0]} / '
                        f'{factor} as in {path}; delete it to have it made again')
    return found


def read_view(view):
    """The pixels of a view as float32 in [0, 1]: [H, W, 3], or [H, W, 4] with straight alpha."""
    if view.reduced is None:
        image = read_image(view.path, view.upright)
    else:
        image = read_reduced(view.path, view.reduced, view.factor, view.upright)
    if image.shape[:2] != view.size:
        raise UserError(f'{view.path}: found {image.shape[1]}×{image.shape[0]} pixels, expected '
                        f'{view.size[1]}×{view.size[0]}')
    height, width = view.camera.H, view.camera.W
    image = image / np.float32(255)
    return image if image.shape[:2] == (height, width) else resize_area(image, height, width)


def load_images(views, white_bkgd):
    """Load the pixels of all views on several threads.

    Args:
      views: a list of `View`s.
      white_bkgd: composite images with alpha on white rather than black.
    Returns:
      images: uint8 [N, H, W, 3], or an `ImageSet` if sizes differ.
      alphas: uint8 [N, H, W], or an `ImageSet`; None if all pixels are opaque.
    Raises:
      UserError: a file is damaged.
    """
    sizes = [(view.camera.H, view.camera.W) for view in views]
    images, alphas = ImageSet(sizes), ImageSet(sizes, ())

    def load(index):
        image = read_view(views[index])
        images[index][:] = np.round(255 * composite_on_bkgd(image, white_bkgd))
        alphas[index][:] = np.round(255 * image[..., 3]) if image.shape[-1] == 4 else 255

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(len(views))))
    transparent = alphas.pixels.size and alphas.pixels.min() < 255
    return images.stacked(), alphas.stacked() if transparent else None


# --- masks --------------------------------------------------------------------------------------------------

def find_mask(root, path):
    """The mask of the image `images/…/<name>.<ending>` of the scene `root`: `masks/…/<name>.png` or the like,
    or `masks/…/<name>.<ending>.png`; None if there is none. `images_<factor>` counts as `images`."""
    try:
        folder, *rest = Path(path).relative_to(root).parts
    except ValueError:  # elsewhere
        return None
    if not rest or not re.fullmatch(r'images(_\d+)?', folder):
        return None
    beside = Path(root, 'masks', *rest)
    names = [beside.with_suffix(ending) for ending in IMAGE_EXTENSIONS] + [Path(f'{beside}.png')]
    return next((name for name in names if name.is_file()), None)


def load_masks(views):
    """Which pixels of the views count, bool [N, H, W], or an `ImageSet` if sizes differ; None if all do.
    Warns if only some of the views have masks.

    Raises:
      UserError: a mask is damaged, or has another shape than its image.
    """
    missing = [view for view in views if view.mask is None]
    if len(missing) == len(views):
        return None
    if missing:
        warnings.warn(f'{len(missing)} of {len(views)} images have no mask, such as {missing[0].path.name}: '
                      'all their pixels count', stacklevel=2)
    masks = ImageSet([(view.camera.H, view.camera.W) for view in views], (), bool)
    masks.pixels[:] = True

    def load(index):
        if views[index].mask:
            masks[index][:] = read_mask(views[index])
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(len(views))))
    return masks.stacked()


def read_mask(view):
    """Which pixels of a view count: those that its mask shows white, bool [H, W]."""
    image = read_image(view.mask, view.upright)[..., :3].mean(-1, keepdims=True) > 127
    H, W = view.camera.H, view.camera.W
    if abs(image.shape[0] / image.shape[1] - H / W) > 0.02 * H / W or min(image.shape[:2]) < min(H, W):
        raise UserError(f'{view.mask}: found a mask of {image.shape[1]}×{image.shape[0]} pixels, expected '
                        f'the shape of {view.path.name}, such as {W}×{H}')
    return resize_area(image, H, W)[..., 0] >= MIN_MASK_AREA
