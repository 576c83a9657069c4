"""Photos, videos and cameras for the tests of tools/photos.py."""
import imageio.v3 as iio
import numpy as np
from PIL import Image
from tiny_scenes import noise

from scenes.cameras import viewmatrix

# The number of an orientation in EXIF, and how a photo must be stored for it.
ORIENTATIONS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def texture(height, width, seed=0):
    """A Pillow image with detail at all scales."""
    layers = [np.kron(noise(-(-height // size), -(-width // size), 3, seed=seed + size),
                      np.ones((size, size, 1)))[:height, :width] for size in (1, 3, 9)]
    return Image.fromarray(np.mean(layers, 0).astype(np.uint8))


def exif(orientation=1, make=None, focal_35mm=None):
    """EXIF with these values."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    if make:
        tags[0x010F] = make
    if focal_35mm:
        tags.get_ifd(0x8769)[0xA405] = focal_35mm
    return tags


def write_video(path, frames):
    """Write frames uint8 [N, H, W, 3] as a video."""
    iio.imwrite(path, frames, fps=10, codec='libx264', quality=10, macro_block_size=1)


def look_at(positions, targets):
    """c2w [N, 3, 4] of cameras at `positions` that look at `targets`; z is up."""
    return np.stack([viewmatrix(position - target, [0, 0, 1.0], position)
                     for position, target in zip(positions, targets)])


def ring(count, radius, height=0.3, turns=1.0):
    """Positions [count, 3] on a circle around the z axis, or a part of it."""
    angle = np.linspace(0, 2 * np.pi * turns, count, endpoint=False)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(count, height)], -1)


# Half the width and height of a photo at depth 1.
TANGENT = 0.7


def tangents(poses):
    """Half the width and height of each photo at depth 1, [N, 2]."""
    return np.full((len(poses), 2), TANGENT)


def in_view(poses, points):
    """For each camera the indices of the points that it sees, within TANGENT of its axis."""
    seen = []
    for pose in poses:
        x, y, z = ((points - pose[:, 3]) @ pose[:, :3]).T
        seen.append(np.flatnonzero((z < 0) & (np.maximum(abs(x), abs(y)) < -TANGENT * z)))
    return seen
