"""Seconds of a training step and of a frame, for a config on this machine.

    python benchmarks/step_time.py --config configs/lego.txt --datadir ../shared/data/nerf_synthetic/lego --steps 6

Takes the options of run_nerf.py, and --steps. Prints the median over the steps after the first, and peak memory.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import config_parser
from run_log import memory_gib
from run_nerf import network_outputs, prepare, render
from scene import RayBatcher


def main():
    steps = int(sys.argv.pop(sys.argv.index('--steps') + 1)) if '--steps' in sys.argv else 10
    args = config_parser().parse_args([option for option in sys.argv[1:] if option != '--steps'])
    with tempfile.TemporaryDirectory() as args.basedir:
        scene, _, _, kwargs, _, _, grad_vars, optimizer = prepare(args)
    device = grad_vars[0].device
    batches = RayBatcher(scene, args.N_rand, args.no_batching, 0, 1.0, kwargs['pixel_centers'], device)
    seconds = []
    for step in range(1, steps + 2):
        began = time.perf_counter()
        rays, target = batches.draw(step)
        rgb, _, acc, extras = render(scene.H, scene.W, scene.K, args.chunk, rays, **kwargs)
        errors, _ = network_outputs(rgb, acc, extras, target)
        optimizer.zero_grad()
        sum(errors.values()).backward()
        optimizer.step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    print(f'{args.expname} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads: '
          f'{step:.3f} s a step ({args.N_rand / step:,.0f} rays/s), peak memory {memory_gib(device):.1f} GiB')


if __name__ == '__main__':
    main()
