"""What logging, checkpoints and health checks cost, beside the training steps of the same run.

    python benchmarks/logging_overhead.py --config configs/demo.txt --i_img 500 --i_print 100 --blocks 2

Takes the options of run_nerf.py, and --blocks: how often --i_img steps. Prints the seconds of a step, and the share that all
else adds: the check for finite gradients, the watch for collapse, bar, log, TensorBoard, checkpoints, held-out view.
Test views and videos, which are outputs that one asks for, are left out.
"""
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import config_parser
from ranks import Ranks
from run_log import Console
from run_nerf import loss_and_gradient, make_reports, prepare, set_learning_rate
from scene import RayBatcher
from training_run import start_run


def main():
    blocks = int(sys.argv.pop(sys.argv.index('--blocks') + 1)) if '--blocks' in sys.argv else 5
    args = config_parser().parse_args([option for option in sys.argv[1:] if option != '--blocks'])
    with tempfile.TemporaryDirectory() as args.basedir, warnings.catch_warnings():
        compare(args, blocks)


def compare(args, blocks):
    args.N_iters = 10 ** 9  # no last step
    console, ranks = Console(), Ranks(1)
    scene, path, state, kwargs, kwargs_test, start, grad_vars, optimizer = prepare(args, ranks)
    reports = make_reports(args, scene, kwargs_test, console.say, ranks)
    log, keeper, health = start_run(args, scene, path, state, kwargs, start, optimizer, console, ranks)
    batches = RayBatcher(scene, args.N_rand, args.no_batching, args.precrop_iters, args.precrop_frac,
                         kwargs['pixel_centers'], grad_vars[0].device)

    def train(step):
        rays, target = batches.draw(step)
        optimizer.zero_grad()
        measures = loss_and_gradient(scene.hwf, scene.K, args.chunk, rays, target, kwargs)
        return measures, set_learning_rate(optimizer, args.lrate, args.lrate_decay, step)

    def clock():
        if grad_vars[0].device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    training = beside = 0.0
    steps = log.steps()
    for count in range(1, blocks * args.i_img + 1):
        step = next(steps)
        began = clock()
        (errors, *others), lrate = train(step)
        trained = clock()
        finite = health.step_is_finite(errors.sum())
        checked = clock()
        if finite:
            optimizer.step()
        stepped = clock()
        health.watch(step, errors, *others)
        log.step_done(step, args.N_rand, errors, lrate, health)
        if keeper.due(step):
            keeper.save(step)
        if count % args.i_img == 0:
            log.attempt('held-out view', reports.view, log, step)
        training += trained - began + stepped - checked
        beside += checked - trained + clock() - stepped
    steps = blocks * args.i_img
    print(f'a step: {1e3 * training / steps:.2f} ms; all else: {1e3 * beside / steps:.2f} ms')
    print(f'added: {100 * beside / training:.2f}%')


if __name__ == '__main__':
    main()
