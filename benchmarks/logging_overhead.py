"""What logging, checkpoints and health checks cost: training steps with and without them, alternating in one process.

    python benchmarks/logging_overhead.py --config configs/demo.txt --i_img 500 --i_print 100 --blocks 5

Takes the options of run_nerf.py, and --blocks: pairs of blocks of --i_img steps, one block with and one without. Prints
the median seconds of a step for both, and the share that is added. Test views and videos, which are outputs that one asks
for, are left out.
"""
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from options import config_parser
from run_log import Console
from run_nerf import make_reports, network_outputs, prepare, render, set_learning_rate, start_run
from scene import RayBatcher


def main():
    blocks = int(sys.argv.pop(sys.argv.index('--blocks') + 1)) if '--blocks' in sys.argv else 5
    args = config_parser().parse_args([option for option in sys.argv[1:] if option != '--blocks'])
    with tempfile.TemporaryDirectory() as args.basedir, warnings.catch_warnings():
        compare(args, blocks)


def compare(args, blocks):
    args.N_iters = 10 ** 9  # no last step
    console = Console()
    scene, state, kwargs, kwargs_test, start, grad_vars, optimizer = prepare(args)
    reports = make_reports(args, scene, kwargs_test, console.say)
    log, keeper, health = start_run(args, scene, state, kwargs, start, optimizer, console)
    batches = RayBatcher(scene, args.N_rand, args.no_batching, args.precrop_iters, args.precrop_frac,
                         kwargs['pixel_centers'], grad_vars[0].device)

    def train(step):
        rays, target = batches.draw(step)
        rgb, _, acc, extras = render(scene.H, scene.W, scene.K, args.chunk, rays, **kwargs)
        errors, opacities = network_outputs(rgb, acc, extras, target)
        lrate = set_learning_rate(optimizer, args.lrate, args.lrate_decay, step)
        optimizer.zero_grad()
        sum(errors.values()).backward()
        return target, errors, opacities, lrate

    seconds = {'bare': [], 'logged': []}
    steps = log.steps()
    for _ in range(blocks):
        for kind, times in seconds.items():
            began = time.perf_counter()
            for _ in range(args.i_img):
                step = next(steps)
                target, errors, opacities, lrate = train(step)
                if kind == 'bare':
                    optimizer.step()
                    continue
                if health.step_is_finite(sum(errors.values())):
                    optimizer.step()
                health.watch(step, target, errors, opacities)
                log.step_done(step, errors, lrate, health)
                if keeper.due(step):
                    keeper.save(step)
            if kind == 'logged':
                log.attempt('held-out view', reports.view, log, step)
            times.append((time.perf_counter() - began) / args.i_img)
    bare, logged = (statistics.median(times) for times in seconds.values())
    ratios = sorted(b / a for a, b in zip(*seconds.values()))
    print(f'a step: {bare * 1e3:.2f} ms bare, {logged * 1e3:.2f} ms with all that a run does beside it')
    print(f'added: {100 * (statistics.median(ratios) - 1):+.2f}% (median of {blocks} pairs; '
          f'{100 * (ratios[0] - 1):+.2f}% to {100 * (ratios[-1] - 1):+.2f}%)')


if __name__ == '__main__':
    main()
