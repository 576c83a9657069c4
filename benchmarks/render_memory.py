"""Peak memory of rendering a long path: it does not grow with the number of frames.

    python benchmarks/render_memory.py --frames 40 --size 1000

Renders large frames with tiny networks into a folder and two videos, as --render_only does, and prints the
peak memory of the process on the way.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_blender import pose_spherical
from run_nerf import create_nerf, frame_renderer
from scenes.scene import Scene
from training.allocator import keep_freed_memory
from training.evaluation import Evaluator
from training.logger import memory_gib
from training.options import config_parser
from training.processes import Processes

# Networks and rays so small that the pictures take most of the memory.
OPTIONS = ['--netdepth', '1', '--netwidth', '4', '--multires', '2', '--N_samples', '4', '--chunk', '16384']


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=40)
    parser.add_argument('--size', type=int, default=1000, help='width and height of a frame in pixels')
    bench = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    size, no_views, device = bench.size, np.arange(0), torch.device('cpu')
    poses = np.stack([pose_spherical(angle, -30, 4)[:3] for angle in np.linspace(0, 360, bench.frames)])
    K = np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    scene = Scene(None, size, size, poses, K, 2.0, 6.0, poses, no_views, no_views, no_views)
    with tempfile.TemporaryDirectory() as folder:
        args = config_parser().parse_args([*OPTIONS, '--expname', 'run', '--basedir', folder, '--render_only',
                                           '--dataset_type', 'blender', '--device', 'cpu'])
        kwargs_train, kwargs_test, *_ = create_nerf(args, (None, None))
        kwargs_test.update(near=scene.near, far=scene.far)
        processes = Processes(1)
        frames = frame_renderer(args, scene, kwargs_train, kwargs_test, processes, None, print)
        evaluator = Evaluator(args, scene, frames, processes, print)
        written = evaluator.write_frames(poses, scene.path_cameras, Path(folder, 'frames'))
        for count, _ in enumerate(written, 1):
            if count in (1, 2, 5) or count % 10 == 0:
                peak = 1024 * memory_gib(device)
                print(f'{count:4} frames of {size}×{size}: peak {peak:,.0f} MiB', flush=True)


if __name__ == '__main__':
    main()
