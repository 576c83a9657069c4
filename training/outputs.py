"""Rendered frames on disk, videos, and a comparison picture of a held-out view."""
import hashlib
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imageio
import imageio_ffmpeg
import numpy as np
import torch

from run_nerf_helpers import to8b
from scenes.files import atomic_folder, atomic_write, make_folder, write_text
from scenes.images import read_image, write_image
from scenes.paths import FPS

# Depth images have 16 bits: this value stands for the depth `far`.
MAX_UINT16 = 65535
# These are nine colours of matplotlib's magma, from near black to pale yellow.
MAGMA = np.array([[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100],
                  [251, 135, 97], [254, 194, 135], [252, 253, 191]]) / 255
# The repository, whose code determines what a frame looks like.
ROOT = Path(__file__).resolve().parent.parent
# These patterns match the source files of the program.
SOURCE_FILES = ('*.py', 'accel/**/*', 'scenes/*.py', 'training/*.py')


class Frame(NamedTuple):
    """A rendered image as NumPy arrays."""
    rgb: np.ndarray                 # colour [H, W, 3] in [0, 1]
    disp: np.ndarray                # disparity [H, W]
    acc: np.ndarray                 # opacity [H, W]; 0 or 1 if read from disk
    rgb0: np.ndarray | None = None  # colour of the coarse network [H, W, 3], if there is a fine one
    seconds: float | None = None    # how long rendering took; None if read from disk


# --- images of disparity and error --------------------------------------------------------------------------

def color_map(x):
    """Map values [...] in [0, 1] to colours [..., 3], dark to bright."""
    positions = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(x, positions, MAGMA[:, channel]) for channel in range(3)], -1)


def disparity_range(disp):
    """The 1st and 99th percentile of the disparities `disp` [...] without empty pixels (0); (0, 1) if all
    are."""
    visible = disp[(disp > 0) & np.isfinite(disp)]
    return tuple(np.percentile(visible, [1, 99]).tolist()) if visible.size else (0.0, 1.0)


def normalize_disparity(disp, low, high):
    """Scale disparities from [low, high] to [0, 1]: 0 is farthest or empty, 1 is nearest."""
    return np.where(disp > 0, np.clip((disp - low) / max(high - low, 1e-10), 0, 1), 0)


def comparison_image(frame, target):
    """One image [H, 5 W, 3] in [0, 1]: render | target | error | disparity | opacity.

    Args:
      frame: a `Frame`.
      target: the true image [H, W, 3] in [0, 1].
    """
    error = np.clip(4 * np.abs(frame.rgb - target).mean(-1), 0, 1)  # 0.25 has the brightest colour
    disparity = normalize_disparity(frame.disp, *disparity_range(frame.disp))
    opacity = np.repeat(np.clip(frame.acc, 0, 1)[..., None], 3, -1)
    return np.concatenate([frame.rgb, target, color_map(error), color_map(disparity), opacity], 1)


# --- frames on disk -----------------------------------------------------------------------------------------

def code_version():
    """A hash of the program's source files."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCE_FILES for path in ROOT.glob(pattern) if path.is_file()):
        if path.suffix != '.pyc':
            digest.update(path.relative_to(ROOT).as_posix().encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()


def frames_fingerprint(render_poses, hwf, K, state, settings):
    """A hash of all that frames depend on: equal fingerprints mean equal frames, up to the tolerance of fast
    rendering.

    Args:
      render_poses: c2w matrices [N, 3 or 4, 4 or more].
      hwf: [H, W, focal]; K: intrinsics [3, 3]; both in pixels.
      state: dict of state_dicts by name, of the networks and the renderer.
      settings: dict of plain values (numbers, strings, lists of them) that affect the frames.
    """
    cameras = {'render_poses': torch.as_tensor(np.asarray(render_poses, np.float32)),
               'hwf': torch.as_tensor(np.asarray(hwf, np.float64)),
               'K': torch.as_tensor(np.asarray(K, np.float64))}
    return hash_of_tensors({**state, 'cameras': cameras}, json.dumps(settings, sort_keys=True, default=float))


def hash_of_tensors(state, text=''):
    """The SHA-256 of a text and of the tensors in `state`, a dict of state_dicts by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensors in sorted(state.items()):
        for key, tensor in sorted(tensors.items()):
            digest.update(f'{name}.{key} {tensor.dtype} {list(tensor.shape)}'.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FrameFolder:
    """Frames in a folder: `000.png`, …, `disp/000.png` (colour-mapped disparity), `depth/000.png` (16 bit),
    and `frames.json`, which gives the scale of the depths. Frames with the same fingerprint are reused;
    others are deleted, and the metrics and videos of them.

    Args:
      folder: created if it does not exist.
      fingerprint: the `frames_fingerprint` of the frames.
      far: the depth that is stored as white.
      overwrite: delete the existing frames in any case.
    Attributes:
      reused: number of frames that were in the folder and need not be rendered.
    Raises:
      UserError: the folder cannot be created.
    """

    def __init__(self, folder, fingerprint, far, overwrite=False):
        self.folder, self.far, self.disparity_range = make_folder(folder), float(far), None
        for name in ('disp', 'depth'):
            make_folder(self.folder / name)
        scale = f'grey * {self.far / MAX_UINT16:.9g}, along the ray in units of rays_d; 0 is empty'
        self.about = {'depth': scale, 'fingerprint': fingerprint}
        try:
            about = json.loads((self.folder / 'frames.json').read_text(encoding='utf-8'))
            if about['fingerprint'] == fingerprint and not overwrite:
                self.disparity_range = tuple(about['disparity_range'])
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            pass
        if self.disparity_range is None and (self.folder / 'frames.json').is_file():  # other frames
            others = [self.folder / name for name in ('metrics.*', 'video.*', 'video_disp.*')]
            for path in [*self.paths('[0-9]*'), *others]:
                for old in path.parent.glob(path.name):
                    old.unlink()
        self.reused = len(list(self.folder.glob('[0-9]*.png'))) if self.disparity_range else 0

    def paths(self, name):
        """The files of a frame: disparity, depth, colour."""
        return [self.folder / f'{subfolder}{name}.png' for subfolder in ('disp/', 'depth/', '')]

    def load(self, index):
        """Read frame `index`, with 8 bits of colour and 16 of depth; None if it is missing or damaged."""
        _, depth_path, rgb_path = self.paths(f'{index:03d}')
        if self.disparity_range is None or not rgb_path.is_file():  # colour is written last
            return None
        try:
            rgb = np.minimum(self._read_float(rgb_path), 1)
            depth = imageio.v3.imread(depth_path).astype(np.float32) * (self.far / MAX_UINT16)
        except Exception:  # each codec raises its own type of error for a damaged file
            return None
        disp = np.where(depth > 0, 1 / np.maximum(depth, 1e-10), 0).astype(np.float32)
        return Frame(rgb, disp, (depth > 0).astype(np.float32))

    def colors(self, count):
        """Yield the colours [H, W, 3] of the first `count` frames, as saved."""
        for index in range(count):
            yield self._read_float(self.paths(f'{index:03d}')[2])

    def disparities(self, count):
        """Yield the colour-mapped disparities [H, W, 3] of the first `count` frames, as saved."""
        for index in range(count):
            yield self._read_float(self.paths(f'{index:03d}')[0])

    @staticmethod
    def _read_float(path):
        return (read_image(path) + np.float32(0.5)) / 255  # `to8b` gives the same bytes again

    def save(self, index, frame):
        """Write one frame. The first frame that is saved sets the range of the colour-mapped disparities."""
        if self.disparity_range is None:
            self.disparity_range = disparity_range(frame.disp)
            about = {**self.about, 'disparity_range': self.disparity_range}
            write_text(self.folder / 'frames.json', json.dumps(about, indent=1) + '\n')
        depth = np.where(frame.disp > 0, 1 / np.maximum(frame.disp, 1e-10), 0)
        grey = np.clip(np.round(depth / self.far * MAX_UINT16), 0, MAX_UINT16).astype(np.uint16)
        disparity = color_map(normalize_disparity(frame.disp, *self.disparity_range))
        for path, image in zip(self.paths(f'{index:03d}'), (to8b(disparity), grey, to8b(frame.rgb))):
            write_image(path, image)


# --- videos -------------------------------------------------------------------------------------------------

class Encoder(NamedTuple):
    """A way to write a video: its name, the file ending, and the codec of ffmpeg (None: not written by
    ffmpeg)."""
    name: str
    suffix: str
    codec: str | None


# This encoder always works: it writes a folder of PNGs.
SINGLE_FRAMES = Encoder('single frames', '', None)
# These are the ways to write a video, best first.
ENCODERS = [Encoder('H.264', '.mp4', 'libx264'), Encoder('MPEG-4', '.mp4', 'mpeg4'),
            Encoder('GIF', '.gif', None), SINGLE_FRAMES]


def probe_encoder():
    """Find the first of ENCODERS that can write a small video on this machine."""
    for encoder in ENCODERS[:-1]:
        try:
            with tempfile.TemporaryDirectory() as folder, open_video(Path(folder, 'probe'), encoder) as add:
                for shade in (0.0, 1.0):
                    add(np.full((16, 16, 3), shade))
            return encoder
        except Exception:  # no ffmpeg, no codec, no disk space: try the next encoder in any case
            continue
    return SINGLE_FRAMES


def video_path(stem, encoder):
    """The path that `open_video` writes: a file, or a folder of PNGs with SINGLE_FRAMES."""
    return Path(f'{stem}{encoder.suffix}')


def is_complete_video(path, num_frames):
    """Whether the video at `path` can be read and has `num_frames` frames."""
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0] == num_frames
    except (OSError, RuntimeError):
        return False


@contextmanager
def open_video(stem, encoder, fps=FPS):
    """Write a video frame by frame: yields a function that appends a float frame [H, W, 3] in [0, 1]. The
    file, or folder of PNGs, gets its name when the block ends; after an exception nothing is left of it.

    Args:
      stem: path without the file ending, which the encoder adds.
      encoder: one of ENCODERS.
      fps: frames per second.
    Raises:
      OSError: the encoder failed, or the disk is full.
    """
    path = video_path(stem, encoder)
    if encoder == SINGLE_FRAMES:
        with atomic_folder(path) as folder:
            indices = itertools.count()

            def save(frame):
                write_image(folder / f'{next(indices):03d}.png', to8b(frame))
            yield save
        return

    options = {'fps': fps, 'codec': encoder.codec, 'quality': 8, 'macro_block_size': 1}
    if encoder.codec is None:
        options = {'duration': 1000 / fps, 'loop': 0}
    # Signal handlers raise exceptions in the main thread only. So another thread starts, feeds and closes the
    # encoder: it is never interrupted, and the encoder has ended before the file is renamed or removed.
    with atomic_write(path) as part, ThreadPoolExecutor(1) as thread:
        writer = thread.submit(imageio.get_writer, part, **options).result()
        num_frames = 0

        def add(frame):
            nonlocal num_frames
            num_frames += 1
            even = [(0, side % 2) for side in frame.shape[:2]]  # the codecs need even sides
            image = np.pad(to8b(frame), [*even, (0, 0)], mode='edge')
            thread.submit(writer.append_data, image).result()
        try:
            yield add
        finally:
            thread.submit(writer.close).result()
        if encoder.codec and not is_complete_video(part, num_frames):  # ffmpeg may fail without an error
            raise OSError(f'{path}: the encoder did not finish the video')
