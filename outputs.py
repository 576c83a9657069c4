"""What rendering leaves behind: frames on disk, videos, and panels of a held-out view."""
import hashlib
import itertools
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imageio
import imageio_ffmpeg
import numpy as np

from errors import UserError
from file_io import read_image, write_image, write_text, written_whole
from run_nerf_helpers import to8b
from signals import held_back

FPS = 30
DEPTH_STEPS = 65535  # of a 16-bit image
# Nine colours of matplotlib's magma, from near black to pale yellow.
MAGMA = np.array([[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100],
                  [251, 135, 97], [254, 194, 135], [252, 253, 191]]) / 255


class Frame(NamedTuple):
    """A rendered image as NumPy arrays: colour [H, W, 3], disparity [H, W], opacity [H, W]; where there is a fine network,
    the coarse one's colour [H, W, 3]; and the seconds it took."""
    rgb: np.ndarray
    disp: np.ndarray
    acc: np.ndarray
    rgb0: np.ndarray | None = None
    seconds: float | None = None


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


# --- disparity as a picture -------------------------------------------------------------------------------------

def color_map(x):
    """Values [...] in [0, 1] to colours [..., 3], dark to bright."""
    places = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(x, places, MAGMA[:, channel]) for channel in range(3)], -1)


def disparity_range(disp):
    """The disparities that a picture of `disp` spans: all but the outermost percent of those that are not 0 (empty)."""
    seen = disp[(disp > 0) & np.isfinite(disp)]
    return tuple(np.percentile(seen, [1, 99]).tolist()) if seen.size else (0.0, 1.0)


def normalize_disparity(disp, low, high):
    """Disparities to [0, 1]: 0 is empty or farthest, 1 nearest."""
    return np.where(disp > 0, np.clip((disp - low) / max(high - low, 1e-10), 0, 1), 0)


def panel(frame, target):
    """One picture [H, 5 W, 3] in [0, 1] of a held-out view: render | target | error | nearness | opacity."""
    error = np.clip(4 * np.abs(frame.rgb - target).mean(-1), 0, 1)  # an error of a quarter is the brightest
    near = normalize_disparity(frame.disp, *disparity_range(frame.disp))
    opacity = np.repeat(np.clip(frame.acc, 0, 1)[..., None], 3, -1)
    return np.concatenate([frame.rgb, target, color_map(error), color_map(near), opacity], 1)


# --- frames on disk ---------------------------------------------------------------------------------------------

def frames_mark(render_poses, hwf, K, render_kwargs, render_factor=0):
    """A name for what frames depend on, cameras, weights and settings: equal for equal frames."""
    networks = [render_kwargs['network_fn'], render_kwargs.get('network_fine')]
    weights = [p.detach().cpu().numpy() for network in networks if network is not None for p in network.parameters()]
    keys = ('near', 'far', 'N_samples', 'N_importance', 'white_bkgd', 'ndc', 'lindisp', 'use_viewdirs', 'pixel_centers')
    settings = [render_kwargs.get(key) for key in keys]
    numbers = np.array([0 if setting is None else setting for setting in [*settings, *hwf, render_factor]], np.float64)
    query = getattr(render_kwargs['network_query_fn'], 'keywords', {})
    digest = hashlib.sha256(getattr(query.get('in_chunks'), 'precision', '').encode())
    digest.update(str(getattr(render_kwargs.get('ray_renderer'), '__name__', 'fast')).encode())
    for array in (np.asarray(render_poses, np.float32), np.asarray(K, np.float64), numbers, *weights):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class FrameFolder:
    """Frames in a folder: `000.png`, …, `disp/000.png` (disparity, colour-mapped), `depth/000.png` (16 bit), and
    `frames.json`, which says what the depths mean. A folder of the same fingerprint is gone on with; the frames of any
    other are removed.

    Args:
      folder: is made if it is not there.
      mark: `frames_mark` of the frames.
      far: the depth of the brightest grey.
    """

    def __init__(self, folder, mark, far):
        self.folder, self.far, self.limits = make_folder(folder), float(far), None
        for name in ('disp', 'depth'):
            make_folder(self.folder / name)
        self.about = {'depth': f'grey * {self.far / DEPTH_STEPS:.9g}, along the ray in units of rays_d; 0 is empty',
                      'fingerprint': mark}
        try:
            about = json.loads((self.folder / 'frames.json').read_text())
            self.limits = tuple(about['disparity_range']) if about['fingerprint'] == mark else None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self.limits is None:
            for path in self.paths('[0-9]*'):
                for old in self.folder.glob(str(path.relative_to(self.folder))):
                    old.unlink()

    def paths(self, name):
        return [self.folder / f'disp/{name}.png', self.folder / f'depth/{name}.png', self.folder / f'{name}.png']

    def load(self, index):
        """The frame `index` as it was saved, to 8 bit of colour and 16 of depth; None if it is missing."""
        _, depth_path, rgb_path = self.paths(f'{index:03d}')  # colour is written last
        if self.limits is None or not rgb_path.is_file():
            return None
        try:
            rgb = (read_image(rgb_path) + np.float32(0.5)) / 255
            depth = imageio.v3.imread(depth_path).astype(np.float32) * (self.far / DEPTH_STEPS)
        except (UserError, OSError):
            return None
        disp = np.where(depth > 0, 1 / np.maximum(depth, 1e-10), 0).astype(np.float32)
        return Frame(np.minimum(rgb, 1), disp, (depth > 0).astype(np.float32))

    def colors(self, count):
        """The colours of the first `count` frames, one by one, as they were saved."""
        for index in range(count):
            yield (read_image(self.paths(f'{index:03d}')[2]) + np.float32(0.5)) / 255

    def disparities(self, count):
        """The same for the colour-mapped disparities."""
        for index in range(count):
            yield (read_image(self.paths(f'{index:03d}')[0]) + np.float32(0.5)) / 255

    def save(self, index, frame):
        """Write one frame; the first one sets the range of the colour-mapped disparities."""
        if self.limits is None:
            self.limits = disparity_range(frame.disp)
            about = {**self.about, 'disparity_range': self.limits}
            write_text(self.folder / 'frames.json', json.dumps(about, indent=1) + '\n')
        depth = np.where(frame.disp > 0, 1 / np.maximum(frame.disp, 1e-10), 0)
        grey = np.clip(np.round(depth / self.far * DEPTH_STEPS), 0, DEPTH_STEPS).astype(np.uint16)
        nearness = color_map(normalize_disparity(frame.disp, *self.limits))
        for path, image in zip(self.paths(f'{index:03d}'), (to8b(nearness), grey, to8b(frame.rgb))):
            write_image(path, image)


# --- videos -----------------------------------------------------------------------------------------------------

class Encoder(NamedTuple):
    """A way to write a video: its name, the ending of the file, and ffmpeg's codec if it is ffmpeg that writes."""
    name: str
    suffix: str
    codec: str | None


ENCODERS = [Encoder('H.264', '.mp4', 'libx264'), Encoder('MPEG-4', '.mp4', 'mpeg4'), Encoder('GIF', '.gif', None),
            Encoder('single frames', '', None)]


SINGLE_FRAMES = ENCODERS[-1]


def probe_encoder():
    """The first of ENCODERS that writes a few small frames on this machine."""
    for encoder in ENCODERS[:-1]:
        try:
            with tempfile.TemporaryDirectory() as folder, open_video(Path(folder, 'probe'), encoder) as add:
                for shade in (0.0, 1.0):
                    add(np.full((16, 16, 3), shade))
            return encoder
        except Exception:  # no ffmpeg, no codec, no place to write: whatever it is, the next one is tried
            continue
    return SINGLE_FRAMES


def video_path(stem, encoder):
    """The file that `open_video` writes; a folder of PNGs without an encoder that works."""
    return Path(f'{stem}{encoder.suffix}')


def is_whole(path, count):
    """Whether the video at `path` can be read and has `count` frames."""
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0] == count
    except (OSError, RuntimeError):
        return False


@contextmanager
def open_video(stem, encoder):
    """Write a video frame by frame: yields a function that appends a float frame [H, W, 3] in [0, 1]. The video has its
    name when the block ends well.

    Args:
      stem: path without its ending, which the encoder adds.
      encoder: one of ENCODERS.
    """
    path = video_path(stem, encoder)
    if encoder == SINGLE_FRAMES:
        make_folder(path)
        count = itertools.count()
        yield lambda frame: write_image(path / f'{next(count):03d}.png', to8b(frame))
        return

    ffmpeg = {'fps': FPS, 'codec': encoder.codec, 'quality': 8, 'macro_block_size': 1}
    with written_whole(path) as part:
        writer = imageio.get_writer(part, **(ffmpeg if encoder.codec else {'duration': 1000 / FPS, 'loop': 0}))
        added = itertools.count()

        def add(frame):
            next(added)
            odd = [(0, side % 2) for side in frame.shape[:2]]  # the codecs ask for even sides
            with held_back():
                writer.append_data(np.pad(to8b(frame), [*odd, (0, 0)], mode='edge'))
        try:
            yield add
        finally:
            with held_back():
                writer.close()
        if encoder.codec and not is_whole(part, next(added)):  # ffmpeg does not say so when it fails
            raise OSError(f'{path}: the encoder could not finish it')
