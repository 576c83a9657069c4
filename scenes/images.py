"""Images as arrays: read as 8 bit, composite on a background, downsample, write."""
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image

from scenes.errors import UserError, first_line
from scenes.files import atomic_write

# Images of scenes have one of these extensions, in lower or upper case.
IMAGE_EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.heic', '.heif')
# This EXIF tag says how the stored pixels are turned.
ORIENTATION = 0x0112
# These are its values for turns by 90 degrees.
TURNED = (5, 6, 7, 8)
# The lowest level of zlib that compresses: twice as fast as the default level, for files an eighth larger.
PNG_COMPRESSION = 1


class ImageSet:
    """8-bit images, or masks, of several sizes in one buffer; `images[i]` is a view of it.

    Args:
      sizes: height and width of each image, N pairs.
      channels: shape of a pixel, such as (3,) or ().
      dtype: of the buffer.
    Attributes:
      pixels: [P, *channels], those of all images, one after another; zero at first.
    """

    def __init__(self, sizes, channels=(3,), dtype=np.uint8):
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        areas = [height * width for height, width in self.sizes]
        self.ends = np.cumsum(areas)
        self.starts = self.ends - areas
        self.pixels = np.zeros((self.ends[-1] if len(self.ends) else 0, *channels), dtype)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        index = range(len(self))[index]
        return self.pixels_of(index, index).reshape(*self.sizes[index], *self.pixels.shape[1:])

    def pixels_of(self, first, last):
        """The pixels of the images `first` to `last`, [P, *channels]."""
        return self.pixels[self.starts[first]:self.ends[last]]

    def stacked(self):
        """The images as an array [N, H, W, *channels] of the same memory if they have one size; otherwise
        itself."""
        if len(set(self.sizes)) != 1:
            return self
        return self.pixels.reshape(len(self), *self.sizes[0], *self.pixels.shape[1:])


def is_turned(image):
    """Whether width and height of a Pillow image are exchanged when it is turned upright as its EXIF
    says."""
    # Pillow turns the pixels of a TIFF file itself, and gives its size turned
    return image.format != 'TIFF' and image.getexif().get(ORIENTATION) in TURNED


def image_sizes(path):
    """The size of the image at `path` from its header: (H, W) as it is seen, and (H, W) as it is stored,
    which differ if EXIF says that it is turned by 90 degrees. Raises UserError as `read_image` does."""
    try:
        allow_heif(path)
        with Image.open(path) as image:
            stored, turned = image.size[::-1], is_turned(image)
    except FileNotFoundError:
        raise UserError(f'{path}: no such image') from None
    except Exception as error:  # each codec raises its own type of error for a damaged file
        raise UserError(f'{path}: not a readable image ({first_line(error)})') from None
    return stored[::-1] if turned else stored, stored


def allow_heif(path):
    """Have Pillow read HEIC files, if `path` is one. Raises ImportError if the package for that is
    missing."""
    if Path(path).suffix.lower() in ('.heic', '.heif'):
        try:
            import pillow_heif
        except ImportError:
            raise ImportError('pip install pillow-heif to read it') from None
        pillow_heif.register_heif_opener()


def read_image(path, upright=True):
    """The image at `path` as uint8 [H, W, 3], or [H, W, 4] with straight alpha if the file has transparency.

    Args:
      upright: turn it as its EXIF orientation says.
    Raises:
      UserError: the file is missing or damaged, or its pixels are not 8 bit.
    """
    try:
        allow_heif(path)
        with iio.imopen(path, 'r', plugin='pillow') as file:
            meta = file.metadata()
            mode = None
            if meta['mode'] == '1':                # a mask of one bit
                mode = 'L'
            elif meta['mode'] == 'CMYK':           # the fourth channel is ink, not alpha
                mode = 'RGB'
            elif 'transparency' in meta:           # one colour is transparent; there is no alpha channel
                mode = 'RGBA'
            image = np.asarray(file.read(index=0, mode=mode, rotate=upright))
    except FileNotFoundError:
        raise UserError(f'{path}: no such image') from None
    except Exception as error:  # each codec raises its own type of error for a damaged file
        raise UserError(f'{path}: not a readable image ({first_line(error)})') from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise UserError(f'{path}: found {image.dtype} pixels of shape {image.shape}, expected an 8-bit image')
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] <= 2:  # grey, or grey and alpha
        image = np.concatenate([np.repeat(image[..., :1], 3, -1), image[..., 1:]], -1)
    return image


def write_image(path, image):
    """Write an image atomically: uint8 [H, W] or [H, W, 3 or 4], or uint16 [H, W]."""
    with atomic_write(path) as partial:
        content = iio.imwrite('<bytes>', image, extension=Path(path).suffix, compress_level=PNG_COMPRESSION)
        partial.write_bytes(content)


def composite_on_bkgd(image, white_bkgd):
    """Float image [H, W, 3 or 4] with straight alpha to RGB [H, W, 3] on a white or black background."""
    rgb, alpha = image[..., :3], image[..., 3:]
    return rgb * alpha + (1 - alpha) * white_bkgd if alpha.size else rgb


def area_weights(n_in, n_out):
    """The matrix [n_out, n_in] that averages a line of `n_in` pixels over `n_out` equal intervals."""
    edges = np.linspace(0, n_in, n_out + 1)
    pixels = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * (n_out / n_in)


def resize_area(image, height, width):
    """Downsample `image` [H, W, C] to float32 [height, width, C]: each pixel is the mean of the area it
    covers."""
    H, W, C = image.shape
    image = image.astype(np.float32)
    if H % height == 0 and W % width == 0:
        return image.reshape(height, H // height, width, W // width, C).mean((1, 3))
    rows, columns = area_weights(H, height), area_weights(W, width)
    return np.einsum('hi,ijc,wj->hwc', rows, image, columns, optimize=True).astype(np.float32)


def reduced_size(height, width, factor):
    """The size of an image of height × width pixels that is downsampled by `factor`."""
    return max(1, round(height / factor)), max(1, round(width / factor))


def reduced_path(root, path, factor):
    """Where the image at `path`, downsampled by `factor`, is kept: in `<folder>_<factor>/` beside its folder
    of the scene `root`, and in `images_<factor>/` if it is in none."""
    folder, *rest = Path(os.path.relpath(path, root)).parts
    if folder == os.pardir or not rest:
        folder, rest = 'images', [path.name]
    return Path(root, f'{folder}_{factor}', *rest).with_suffix('.png')


def find_reduced(reduced, path):
    """The file of a reduced image: `reduced`, or another with the ending of `path`; None if there is none."""
    files = (reduced, reduced.with_suffix(path.suffix))
    return next((file for file in files if file.is_file()), None)


def read_reduced(path, reduced, factor, upright=True):
    """`read_image` of `path` downsampled by `factor` with an area filter; it is kept in the file `reduced`,
    and read from there if it exists."""
    existing = find_reduced(reduced, path)
    if existing is not None:
        return read_image(existing, upright)
    image = read_image(path, upright)
    size = reduced_size(*image.shape[:2], factor)
    if image.shape[-1] == 4:  # transparent pixels have no colour
        alpha = resize_area(image[..., 3:], *size)
        color = resize_area(image[..., :3] * (image[..., 3:] / np.float32(255)), *size)
        image = np.concatenate([color / np.maximum(alpha / 255, 1e-6), alpha], -1)
    else:
        image = resize_area(image, *size)
    image = np.round(image).astype(np.uint8)
    try:
        reduced.parent.mkdir(parents=True, exist_ok=True)
        write_image(reduced, image)
    except OSError:  # a read-only folder; it takes longer each time
        pass
    return image
