"""Images and arrays on disk and in memory: read 8 bit, write whole or not at all, shrink by area."""
import os
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from errors import UserError, first_line

IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg')
PART = '.part'  # in the names of files that are being written


def read_image(path):
    """The image at `path` as uint8 [H, W, 3] or, where it has transparency, [H, W, 4].

    Raises:
      UserError: the file is missing, damaged or of another depth than 8 bit.
    """
    try:
        with iio.imopen(path, 'r', plugin='pillow') as file:
            meta = file.metadata()
            mode = None
            if meta['mode'] in ('CMYK', 'YCCK'):   # a fourth channel that is ink, not alpha
                mode = 'RGB'
            elif 'transparency' in meta:           # one transparent colour in place of an alpha channel
                mode = 'RGBA'
            image = np.asarray(file.read(index=0, mode=mode))
    except FileNotFoundError:
        raise UserError(f'{path}: no such image') from None
    except Exception as error:  # each codec raises its own kind for a damaged file
        raise UserError(f'{path}: not a readable image ({first_line(error)})') from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise UserError(f'{path}: found {image.dtype} pixels of shape {image.shape}, expected an 8-bit image')
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] <= 2:  # grey, or grey and alpha
        image = np.concatenate([np.repeat(image[..., :1], 3, -1), image[..., 1:]], -1)
    return image


def composite(image, white_bkgd):
    """Float `image` [H, W, 3 or 4] with straight alpha to RGB [H, W, 3] on white or on black."""
    rgb, alpha = image[..., :3], image[..., 3:]
    return rgb * alpha + (1 - alpha) * white_bkgd if alpha.size else rgb


def read_array(path):
    """The numbers in a .npy file, float64; no code in the file is run.

    Raises:
      UserError: no such file, or not an array of numbers.
    """
    try:
        with open(path, 'rb') as file:
            return np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except Exception as error:  # a header can be wrong in many ways
        raise UserError(f'{path}: not a readable .npy file of numbers ({first_line(error)})') from None


@contextmanager
def written_whole(path):
    """A temporary name beside `path`. What is written there is flushed to disk and gets its final name when the block
    ends well, and is removed when it does not; so a file with a final name is whole, whenever the process dies."""
    path = Path(path)
    part = path.with_name(f'.{path.stem}{PART}{path.suffix}')
    try:
        yield part
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder):
    """Remove the temporary files that killed processes left in `folder` and below."""
    for path in Path(folder).rglob(f'.*{PART}*'):
        if path.is_file():
            path.unlink(missing_ok=True)


def write_image(path, image):
    """Write a uint8 (or, grey only, uint16) `image` whole."""
    with written_whole(path) as part:
        part.write_bytes(iio.imwrite('<bytes>', image, extension=Path(path).suffix))


def write_text(path, text):
    """Write a text file whole."""
    with written_whole(path) as part:
        part.write_text(text)


def area_weights(n_in, n_out):
    """The matrix [n_out, n_in] that averages a line of `n_in` pixels over `n_out` equal intervals."""
    edges = np.linspace(0, n_in, n_out + 1)
    pixels = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * (n_out / n_in)


def resize_area(image, height, width):
    """`image` [H, W, C] shrunk to [height, width, C]: each pixel is the mean of the area it covers. float32."""
    H, W, C = image.shape
    image = image.astype(np.float32)
    if H % height == 0 and W % width == 0:
        return image.reshape(height, H // height, width, W // width, C).mean((1, 3))
    rows, columns = area_weights(H, height), area_weights(W, width)
    return np.einsum('hi,ijc,wj->hwc', rows, image, columns, optimize=True).astype(np.float32)
