"""How quickly the viewer shows a trained scene: pictures a second while the camera moves, their size, and how
long the full picture takes.

    python benchmarks/viewer.py logs/lego_fast
"""
import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from viser.transforms import SO3

from tools.trained import load_trained
from training.threads import yield_when_busy
from viewing.pictures import PictureRenderer
from viewing.session import FLIP, Session
from viewing.viewer import UNIT_SECONDS

# The window of the browser, in pixels.
WIDTH, HEIGHT = 1280, 720


def encode(image, format, jpeg_quality, depth):
    """What sending a picture costs: JPEG, and depths as PNG."""
    iio.imwrite('<bytes>', image, extension='.jpeg', quality=jpeg_quality)
    iio.imwrite('<bytes>', (depth.clip(0, 167) * 100_000).astype('<u4').view('u1').reshape(*depth.shape, 4),
                extension='.png')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('run', help='folder of a run, or a checkpoint')
    parser.add_argument('--moves', type=int, default=60, help='poses of the camera path that are shown')
    args = parser.parse_args()
    trained = load_trained(args.run, photos=False)
    frames, poses = trained.frames, trained.scene.render_poses
    frames.render_kwargs['renderer'].checked = False
    fov = np.radians(trained.scene.cameras[0].fov)
    camera = SimpleNamespace(image_width=WIDTH, image_height=HEIGHT, fov=fov)
    client = SimpleNamespace(camera=camera, scene=SimpleNamespace(set_background_image=encode))
    pictures = PictureRenderer(frames, frames.render_kwargs, trained.scene.poses, UNIT_SECONDS)
    session = Session(client, pictures, 1.0, HEIGHT)

    def move_to(pose):
        camera.position, camera.wxyz = pose[:, 3], SO3.from_matrix(pose[:, :3] @ FLIP).wxyz
        started = time.perf_counter()
        session.advance()
        return time.perf_counter() - started, session.size[1]
    with yield_when_busy():
        for index in range(args.moves // 2):  # until its size has settled
            move_to(poses[index % len(poses)])
        seconds, rows = zip(*(move_to(poses[index % len(poses)]) for index in range(args.moves)))
        print(f'moving: {1 / statistics.median(seconds):.1f} pictures a second (median of {args.moves}; the '
              f'slowest took {max(seconds):.2f} s) of {statistics.median(rows):.0f} rows', flush=True)
        started = time.perf_counter()
        while not session.complete:
            session.advance()
        print(f'{WIDTH} × {HEIGHT}: {time.perf_counter() - started:.1f} s')


if __name__ == '__main__':
    main()
