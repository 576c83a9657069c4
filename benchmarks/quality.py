"""PSNR of the test views against steps and seconds of training, for several seeds and precisions.

    python benchmarks/quality.py --config configs/demo.txt --seeds 0 1 2 --precisions fp32 bf16 --json quality.json
    python benchmarks/quality.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --minutes 9

Trains as run_nerf.py does, one run after another, and renders the test views --evaluations times on the way, with the time
for that not counted. With --minutes all runs together take no longer than that, and end before --N_iters if they must; the
learning rate falls as in a run of --N_iters. The last lines are means over the seeds.
"""
import itertools
import statistics
import time

from common import batches_of, built, clock, machine, parse, show, write_json

from devices import has_fast_bf16, pick_device
from evaluation import psnr
from health import Health
from run_nerf import loss_and_gradient, render_frames, set_learning_rate
from run_nerf_helpers import to8b


def main():
    own, args = parse(__doc__, ('--seeds', {'type': int, 'nargs': '+', 'default': [0, 1, 2]}),
                      ('--precisions', {'nargs': '+', 'help': 'by default fp32 and, where it is faster, tf32 and bf16'}),
                      ('--evaluations', {'type': int, 'default': 4, 'help': 'how often the test views are rendered'}),
                      ('--views', {'type': int, 'default': 8, 'help': 'test views to render, evenly spread'}),
                      ('--minutes', {'type': float, 'default': 1e9, 'help': 'for all runs together'}))
    device = pick_device(args.device)
    fast = has_fast_bf16(device)  # a GPU that has bfloat16 has TF32 too
    precisions = own.precisions or ['fp32'] + ['tf32'] * (fast and device.type == 'cuda') + ['bf16'] * fast
    runs, deadline = list(itertools.product(own.seeds, precisions)), time.monotonic() + 60 * own.minutes
    results = []
    for number, (seed, precision) in enumerate(runs):
        args.seed, args.precision = seed, precision
        budget = (deadline - time.monotonic()) / (len(runs) - number)
        curve = train(args, own, budget)
        show(curve, f'{args.expname}, seed {seed}, {precision}, {machine(device)}')
        results.append({'seed': seed, 'precision': precision, 'curve': curve})
        write_json(own.json, {'config': args.expname, 'machine': machine(device), 'runs': results})
    means = []
    for precision in precisions:
        ends = [run['curve'][-1] for run in results if run['precision'] == precision]
        means.append({'precision': precision, 'seeds': len(ends),
                      **{key: statistics.mean(end[key] for end in ends) for key in ('step', 'seconds', 'psnr')}})
    show(means, 'means at the end')


def train(args, own, budget):
    """A run; its PSNR against steps and seconds of training. Half of the budget's rest is left for the evaluations."""
    began = time.monotonic()
    scene, kwargs, kwargs_test, _, parameters, optimizer = built(args)
    device, seconds, curve = parameters[0].device, 0.0, []
    batches = batches_of(args, scene, kwargs)
    batches.precrop_iters, batches.precrop_frac = args.precrop_iters, args.precrop_frac
    networks = {'coarse': kwargs['network_fn'], 'fine': kwargs['network_fine']}
    health = Health({name: network for name, network in networks.items() if network is not None}, optimizer, args.seed,
                    not args.no_restart, print)
    longest = 0.0  # evaluation so far
    for step in range(1, args.N_iters + 1):
        started = clock(device)
        rays, target = batches.draw(step)
        optimizer.zero_grad()
        errors, *others = loss_and_gradient(scene.hwf, scene.K, args.chunk, rays, target, kwargs)
        set_learning_rate(optimizer, args.lrate, args.lrate_decay, step - 1)
        if health.step_is_finite(errors.sum()):
            optimizer.step()
        health.watch(step, errors, *others)
        seconds += clock(device) - started
        last = step == args.N_iters or time.monotonic() - began > budget - 1.2 * longest
        if last or step % max(1, args.N_iters // own.evaluations) == 0:
            started = time.monotonic()
            curve.append({'step': step, 'seconds': seconds, 'psnr': evaluate(args, scene, kwargs_test, own.views),
                          'restarts': health.restarts})
            longest = max(longest, time.monotonic() - started)
        if last:
            return curve


def evaluate(args, scene, kwargs, count):
    """Mean PSNR of `count` test views, from 8-bit images."""
    views = scene.i_test[:: max(1, len(scene.i_test) // count)][:count]
    frames = render_frames(scene.poses[views], scene.hwf, scene.K, args.chunk, kwargs)
    return statistics.mean(psnr(to8b(frame.rgb), scene.images[view]) for view, frame in zip(views, frames))


if __name__ == '__main__':
    main()
