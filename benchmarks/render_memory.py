"""Peak memory of rendering a long path: it does not grow with the number of frames.

    python benchmarks/render_memory.py --frames 40 --size 1000

Renders a path of large frames with tiny networks into a folder and two videos, as --render_only does, and prints the
peak memory of the process on the way.
"""
import argparse
import resource
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_blender import pose_spherical
from options import config_parser
from ranks import Ranks
from run_nerf import create_nerf, make_reports
from scene import Scene


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=40)
    parser.add_argument('--size', type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = config_parser().parse_args([
            '--expname', 'run', '--basedir', folder, '--netdepth', '1', '--netwidth', '4', '--N_samples', '4',
            '--multires', '2', '--dataset_type', 'blender', '--chunk', '16384', '--device', 'cpu', '--render_only'])
        _, kwargs, _, _, _ = create_nerf(args)
        kwargs.update(near=2.0, far=6.0)
        path = np.stack([pose_spherical(angle, -30, 4)[:3] for angle in np.linspace(0, 360, options.frames)])
        K = np.array([[options.size, 0, options.size / 2], [0, options.size, options.size / 2], [0, 0, 1.0]])
        scene = Scene(None, options.size, options.size, path, K, 2.0, 6.0, path, *[np.arange(0)] * 3)
        reports = make_reports(SimpleNamespace(**vars(args)), scene, kwargs, print, Ranks(1))
        for index, _ in enumerate(reports.path(path, Path(folder, 'frames')), 1):
            if index in (1, 2, 5) or index % 10 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f'{index:4} frames of {options.size}×{options.size}: peak {peak:,.0f} MiB', flush=True)


if __name__ == '__main__':
    main()
