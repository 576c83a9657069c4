"""Images as arrays: read as 8 bit, composite on a background, downsample, write."""
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from scenes.errors import UserError, first_line
from scenes.files import atomic_write

# Images of scenes have one of these extensions, in lower or upper case.
IMAGE_EXTENSIONS = ('.png', '.jpg', '.jpeg')
# The lowest level of zlib that compresses: twice as fast as the default level, for files an eighth larger.
PNG_COMPRESSION = 1


def read_image(path):
    """The image at `path` as uint8 [H, W, 3], or [H, W, 4] with straight alpha if the file has transparency.

    Raises:
      UserError: the file is missing or damaged, or its pixels are not 8 bit.
    """
    try:
        with iio.imopen(path, 'r', plugin='pillow') as file:
            meta = file.metadata()
            mode = None
            if meta['mode'] == 'CMYK':             # the fourth channel is ink, not alpha
                mode = 'RGB'
            elif 'transparency' in meta:           # one colour is transparent; there is no alpha channel
                mode = 'RGBA'
            image = np.asarray(file.read(index=0, mode=mode))
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
