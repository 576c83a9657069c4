"""PSNR of the test views against steps and seconds of training, for several seeds, precisions and options.

    python benchmarks/quality.py --config configs/demo.txt --seeds 0 1 2 --precisions fp32 bf16
    python benchmarks/quality.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --minutes 9
    python benchmarks/quality.py --config configs/fern_fast.txt --datadir data/nerf_llff_data/fern \
        --precisions auto --variant= --variant="--lambda_distortion 2e-3"

Trains as run_nerf.py does, one run after another, and renders test views --evaluations times in each run,
fast unless --exact_render is given; that time does not count as training. --minutes limits the time of all
runs together: a run may then end before --N_iters, but its learning rate falls as in a full run. Each
--variant is trained with these further options. The last table shows the means over the seeds.
"""
import itertools
import shlex
import statistics
import time

from common import build, clock, fast_precisions, machine, parse, show, write_json

from run_nerf_helpers import to8b
from training.checkpoints import networks_of
from training.devices import pick_device
from training.metrics import corrected_half, psnr
from training.options import config_parser
from training.safeguards import Safeguards

# The time reserved for the last evaluation is this multiple of the longest one so far.
RESERVED_EVALUATIONS = 1.2


def main():
    bench, args = parse(
        __doc__, ('--seeds', {'type': int, 'nargs': '+', 'default': [0, 1, 2]}),
        ('--precisions', {'nargs': '+', 'help': 'default: fp32 and those that are faster'}),
        ('--variant', {'action': 'append', 'metavar': 'OPTIONS',
                       'help': 'further options of run_nerf.py, as in --variant="--lrate 1e-3"; repeatable'}),
        ('--evaluations', {'type': int, 'default': 4, 'help': 'times to render the test views'}),
        ('--views', {'type': int, 'default': 8, 'help': 'number of test views, evenly spread'}),
        ('--right_half', {'action': 'store_true',
                          'help': 'measure as with --appearance, to compare with it: right halves of the '
                                  'views after fitting colours to their left halves'}),
        ('--minutes', {'type': float, 'default': 1e9, 'help': 'time for all runs together'}))
    device = pick_device(args.device)
    precisions = bench.precisions or fast_precisions(device)
    kinds = list(itertools.product(bench.variant or [''], precisions))
    runs, deadline = list(itertools.product(bench.seeds, kinds)), time.monotonic() + 60 * bench.minutes
    results = []
    for number, (seed, kind) in enumerate(runs):
        args = config_parser().parse_args([*bench.rest, *shlex.split(kind[0])])
        args.seed, args.precision = seed, kind[1]
        budget = (deadline - time.monotonic()) / (len(runs) - number)
        curve = train(args, bench, budget)
        show(curve, ' '.join([args.expname, *kind, 'seed', str(seed), machine(device)]))
        results.append({'seed': seed, 'options': kind[0], 'precision': kind[1], 'curve': curve})
        write_json(bench.json, {'config': args.expname, 'machine': machine(device), 'runs': results})
    means = []
    for kind in kinds:
        ends = [result['curve'][-1] for result in results if (result['options'], result['precision']) == kind]
        columns = {key: [end[key] for end in ends] for key in ('step', 'seconds', 'psnr')}
        means.append({'options': kind[0] or 'as it is', 'precision': kind[1], 'seeds': len(ends),
                      **{key: statistics.mean(values) for key, values in columns.items()},
                      'least': min(columns['psnr']), 'most': max(columns['psnr'])})
    show(means, 'means at the end')


def train(args, bench, budget):
    """Train for at most `budget` seconds, evaluations included; returns a row for each evaluation."""
    began = time.monotonic()
    run = build(args)
    followers = {'renderer': run.kwargs_train['renderer'], 'ray_sampler': run.rays}
    networks = networks_of(run.kwargs_train)
    safeguards = Safeguards(networks, run.optimizer, args.seed, not args.no_restart, print, followers)
    seconds, longest_evaluation, curve = 0.0, 0.0, []
    for step in range(1, args.N_iters + 1):
        started = clock(run.device)
        _, measures = run.backpropagate(step)
        run.update(step, measures, safeguards.all_finite(measures))
        safeguards.restart_collapsed(step, measures)
        seconds += clock(run.device) - started
        time_left = budget - (time.monotonic() - began)
        last = step == args.N_iters or time_left < RESERVED_EVALUATIONS * longest_evaluation
        if last or step % max(1, args.N_iters // bench.evaluations) == 0:
            started = time.monotonic()
            mean_psnr = evaluate(run, bench.views, bench.right_half)
            curve.append({'step': step, 'seconds': seconds, 'psnr': mean_psnr,
                          'restarts': safeguards.restarts})
            longest_evaluation = max(longest_evaluation, time.monotonic() - started)
        if last:
            return curve


def evaluate(run, count, right_half=False):
    """Mean PSNR of `count` test views, or of their right halves as in `corrected_half`; with --refine_poses
    after aligning their poses."""
    scene = run.scene
    views = scene.i_test[:: max(1, len(scene.i_test) // count)][:count]
    run.frames.drop_cache()
    pairs, poses = [], scene.poses[views]
    if run.args.refine_poses:
        poses = run.frames.align_views(scene, views, left_half=right_half)
    for view, frame in zip(views, run.frames.render_path(poses)):
        pair = frame.rgb, scene.images[view]
        pairs.append(corrected_half(*pair)[:2] if right_half else pair)
    return statistics.mean(psnr(to8b(rgb), target) for rgb, target in pairs)


if __name__ == '__main__':
    main()
