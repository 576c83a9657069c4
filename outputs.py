"""What rendering leaves behind: numbered PNGs, videos, and panels of a held-out view."""
import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np

from errors import UserError
from evaluation import psnr
from file_io import write_image
from run_nerf_helpers import to8b

FPS = 30
# Nine colours of matplotlib's magma, from near black to pale yellow.
MAGMA = np.array([[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100],
                  [251, 135, 97], [254, 194, 135], [252, 253, 191]]) / 255


class Frame(NamedTuple):
    """A rendered image as NumPy arrays: colour [H, W, 3], disparity [H, W], opacity [H, W] and, where there is a fine
    network, the coarse one's colour [H, W, 3]."""
    rgb: np.ndarray
    disp: np.ndarray
    acc: np.ndarray
    rgb0: np.ndarray | None = None


def make_folder(path):
    """Make the folder `path` and those above it; returns it as a Path.

    Raises:
      UserError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path}: cannot make this folder ({error.strerror}), expected a place to write to') from None
    return Path(path)


def color_map(x):
    """Values [...] in [0, 1] to colours [..., 3], dark to bright."""
    places = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(x, places, MAGMA[:, channel]) for channel in range(3)], -1)


def disparity_range(disp):
    """The disparities that a picture of `disp` spans: all but the outermost percent of those that are not 0 (empty)."""
    seen = disp[(disp > 0) & np.isfinite(disp)]
    return tuple(np.percentile(seen, [1, 99])) if seen.size else (0.0, 1.0)


def normalize_disparity(disp, low, high):
    """Disparities to [0, 1]: 0 is empty or farthest, 1 nearest."""
    return np.where(disp > 0, np.clip((disp - low) / max(high - low, 1e-10), 0, 1), 0)


def panel(frame, target):
    """One picture [H, 5 W, 3] in [0, 1] of a held-out view: render | target | error | nearness | opacity."""
    error = np.clip(4 * np.abs(frame.rgb - target).mean(-1), 0, 1)  # an error of a quarter is the brightest
    near = normalize_disparity(frame.disp, *disparity_range(frame.disp))
    opacity = np.repeat(np.clip(frame.acc, 0, 1)[..., None], 3, -1)
    return np.concatenate([frame.rgb, target, color_map(error), color_map(near), opacity], 1)


class VideoWriter:
    """Writes frames to an H.264 file as they come; the file gets its name when it is complete.

        with VideoWriter(path) as video:
            video.add(rgb)
    """

    def __init__(self, path):
        self.path = Path(path)
        self.part = self.path.with_name(f'.{self.path.stem}.part{self.path.suffix}')

    def __enter__(self):
        self.writer = imageio.get_writer(self.part, fps=FPS, quality=8, macro_block_size=1)
        return self

    def add(self, frame):
        """Append a float frame [H, W, 3] or [H, W] in [0, 1]; odd sides get their last line twice, as H.264 asks."""
        frame = to8b(frame)
        if frame.ndim == 2:
            frame = np.repeat(frame[..., None], 3, -1)
        odd = [(0, side % 2) for side in frame.shape[:2]]
        self.writer.append_data(np.pad(frame, [*odd, (0, 0)], mode='edge'))

    def __exit__(self, kind, error, trace):
        self.writer.close()
        if kind is None:
            os.replace(self.part, self.path)
        self.part.unlink(missing_ok=True)


def write_videos(frames, prefix):
    """Write `<prefix>rgb.mp4` and `<prefix>disp.mp4` of an iterable of frames, one at a time; returns
    the path of the first. The first frame sets the range of the disparities."""
    limits, paths = None, [Path(f'{prefix}{what}.mp4') for what in ('rgb', 'disp')]
    with VideoWriter(paths[0]) as rgb_video, VideoWriter(paths[1]) as disp_video:
        for frame in frames:
            limits = limits or disparity_range(frame.disp)
            rgb_video.add(frame.rgb)
            disp_video.add(normalize_disparity(frame.disp, *limits))
    return paths[0]


def write_frames(frames, folder, targets=None, video=None):
    """Write an iterable of frames as `000.png`, `001.png`, … in `folder`, one at a time.

    Args:
      targets: uint8 images to compare with.
      video: path of a video of the frames.
    Returns:
      the PSNR of each frame, from the 8-bit images; none without targets.
    """
    psnrs = []
    make_folder(folder)
    with VideoWriter(video) if video else nullcontext() as writer:
        for index, frame in enumerate(frames):
            image = to8b(frame.rgb)
            write_image(Path(folder, f'{index:03d}.png'), image)
            if targets is not None:
                psnrs.append(psnr(image, targets[index]))
            if writer:
                writer.add(frame.rgb)
    return psnrs
