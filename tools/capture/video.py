"""Frames of a video: of each window of time the sharpest."""
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scenes.errors import UserError, first_line
from tools.capture.collect import Photo
from tools.capture.quality import sharpness_of


def sharpest_frames(path, num_frames):
    """The sharpest frame of each of `num_frames` windows of equal length; all frames if there are no more.

    Only one frame of a window is in memory at a time.

    Args:
      path: of the video.
      num_frames: as above.
    Yields:
      `Photo`, and the frame as a Pillow image. Names count the frames of the video.
    Raises:
      UserError: the video cannot be read.
    """
    from PIL import Image
    total = count_frames(path)
    best, best_sharpness, window = None, -1.0, 0
    for index, frame in enumerate(tqdm(read_frames(path), 'video frames', total, disable=None)):
        image = Image.fromarray(frame)
        sharpness = sharpness_of(image)
        current = index * num_frames // total if total > num_frames else index
        current = min(current, num_frames - 1)  # some videos have more frames than their header says
        if best is not None and current != window:
            yield best
            best, best_sharpness = None, -1.0
        window = current
        if sharpness > best_sharpness:
            name = f'frame_{index:06d}.jpg'
            photo = Photo(path, name, name, image.width, image.height)
            best, best_sharpness = (photo, image), sharpness
    if best is None:
        raise UserError(f'{path}: found no frame, expected a video')
    yield best


def count_frames(path):
    """The number of frames of a video."""
    import imageio_ffmpeg
    if not Path(path).is_file():
        raise UserError(f'{path}: no such file')
    try:
        return max(1, imageio_ffmpeg.count_frames_and_secs(str(path))[0])
    except Exception as error:  # ffmpeg's own message is long
        raise UserError(f'{path}: not a readable video ({first_line(error)})') from None


def read_frames(path):
    """The frames of a video, uint8 [H, W, 3] each, upright as ffmpeg shows them."""
    import imageio.v3 as iio
    try:
        for frame in iio.imiter(path, plugin='FFMPEG'):
            yield np.asarray(frame)
    except Exception as error:
        raise UserError(f'{path}: not a readable video ({first_line(error)})') from None
