"""The image files of a scene's views: their sizes, their cameras, their masks, and their pixels in 8 bit."""
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
    camera: Camera      # of the loaded image
    factor: int         # the image is downsampled by this factor
    upright: bool       # whether it is turned as its EXIF orientation says
    mask: Path | None   # image whose white pixels count; None if all do


def plan_views(paths, masks, camera_of, factor=1, half_res=False):
    """A `View` for each of `paths`, from the headers of the image files alone.

    Args:
      paths, masks: image files, and their masks or None.
      camera_of: function of the index of a path, H and W that returns the camera for an image of that
        size, or raises WrongSize; equal cameras are the same object.
      factor: downsample the images by this factor.
      half_res: then halve width and height.
    Raises:
      UserError: an image is missing, too small, or does not fit its camera.
    """
    views, cameras = [], {}
    for index, (path, mask) in enumerate(zip(paths, masks)):
        size, stored = image_sizes(path)
        try:
            camera, upright = camera_of(index, *size), True
        except WrongSize:
            if stored == size:
                raise
            size, upright = stored, False  # the cameras are of photos that are not turned as EXIF says
            camera = camera_of(index, *size)
        height, width = size
        if factor > 1:
            reduced = find_reduced(path, factor)
            height, width = image_sizes(reduced)[0] if reduced else reduced_size(*size, factor)
        height, width = (height // 2, width // 2) if half_res else (height, width)
        if min(height, width) < 1:
            raise UserError(f'{path}: found {size[1]}×{size[0]} pixels, too small for --half_res')
        key = camera, height, width
        if key not in cameras:
            cameras[key] = camera if size == (height, width) else camera.resized(height, width)
        views.append(View(Path(path), cameras[key], factor, upright, mask))
    return views


def read_view(view):
    """The pixels of a view as float32 in [0, 1]: [H, W, 3], or [H, W, 4] with straight alpha."""
    image = read_reduced(view.path, view.factor, view.upright)
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
      masks: bool, likewise: which pixels count; None if all do.
    Raises:
      UserError: a file is damaged, or a mask has another shape than its image.
    """
    sizes = [(view.camera.H, view.camera.W) for view in views]
    images, alphas, masks = ImageSet(sizes), ImageSet(sizes, ()), None
    if any(view.mask for view in views):
        masks = ImageSet(sizes, (), bool)
        masks.pixels[:] = True

    def load(index):
        image = read_view(views[index])
        images[index][:] = np.round(255 * composite_on_bkgd(image, white_bkgd))
        alphas[index][:] = np.round(255 * image[..., 3]) if image.shape[-1] == 4 else 255
        if views[index].mask:
            masks[index][:] = read_mask(views[index])

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, range(len(views))))
    transparent = alphas.pixels.size and alphas.pixels.min() < 255
    return images.stacked(), alphas.stacked() if transparent else None, masks and masks.stacked()


def read_mask(view):
    """Which pixels of a view count: those that its mask shows white, bool [H, W]."""
    image = read_image(view.mask, view.upright)[..., :3].mean(-1, keepdims=True) > 127
    H, W = view.camera.H, view.camera.W
    if abs(image.shape[0] / image.shape[1] - H / W) > 0.02 * H / W:
        raise UserError(f'{view.mask}: found a mask of {image.shape[1]}×{image.shape[0]} pixels, expected '
                        f'the shape of {view.path.name}, such as {W}×{H}')
    if min(image.shape[0] / H, image.shape[1] / W) < 1:
        raise UserError(f'{view.mask}: found a mask of {image.shape[1]}×{image.shape[0]} pixels, expected at '
                        f'least {W}×{H}')
    return resize_area(image, H, W)[..., 0] >= MIN_MASK_AREA


def find_mask(path):
    """The mask of the image `images/…/<name>.<ending>`: `masks/…/<name>.png` or the like, or
    `masks/…/<name>.<ending>.png`; None if there is none."""
    path = Path(path)
    for folder in path.parents:
        if folder.name.partition('_')[0] == 'images':
            beside = folder.with_name('masks') / path.relative_to(folder)
            names = [beside.with_suffix(ending) for ending in IMAGE_EXTENSIONS] + [Path(f'{beside}.png')]
            return next((name for name in names if name.is_file()), None)
    return None
