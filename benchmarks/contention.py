"""Speed on a busy machine: training and frames beside other processes, in relation to the quiet machine.

    python benchmarks/contention.py --config configs/lego_fast.txt --datadir data/nerf_synthetic/lego

In each round every load runs once, and under it training for --seconds and one frame, without and with
`yield_when_busy`, in an order that changes from round to round. The quiet machine is measured at the start
and the end of each round. `of quiet` is the median of the rounds' ratios, and what an ideal scheduler would
leave stands beside it. Train for --warmup steps first, or start from --ft_path.
"""
import contextlib
import os
import statistics
import subprocess
import sys
import time

from common import build, machine, parse, seconds_of, show, write_json

from training.threads import CHECK_SECONDS, yield_when_busy

# One process of such a program runs for each core: a busy loop, or matrix products on one thread or on all
# cores.
PRODUCTS = 'import torch; torch.set_num_threads({threads}); a = torch.randn(1500, 1500)\nwhile True: a @ a'
LOADS = {'busy loops': 'while True: pass', 'numeric programs': PRODUCTS.format(threads=1),
         'threaded numeric programs': PRODUCTS.format(threads=os.cpu_count())}
# A load needs this many seconds until it computes.
LOAD_SECONDS = 3.0


def main():
    bench, args = parse(__doc__, ('--seconds', {'type': float, 'default': 5.0}),
                        ('--rounds', {'type': int, 'default': 6}),
                        ('--warmup', {'type': int, 'default': 500, 'help': 'training steps before'}))
    run = build(args)
    steps = iter(range(run.start + 1, sys.maxsize))
    for _ in range(bench.warmup):
        run.train_step(next(steps))
    conditions = [(load, yields) for load in ('quiet', *LOADS) for yields in (False, True)]
    rates, ratios, frames = ({condition: [] for condition in conditions} for _ in range(3))
    for number in range(bench.rounds):
        measured = {}
        for load in ('quiet', *LOADS, 'quiet'):
            with busy(LOADS.get(load)):
                for yields in (False, True)[::-1 if number % 2 else 1]:
                    with yield_when_busy() if yields else contextlib.nullcontext():
                        rays_per_second(run, steps, 3 * CHECK_SECONDS)
                        rate = rays_per_second(run, steps, bench.seconds)
                        measured.setdefault((load, yields), []).append(rate)
                        frames[load, yields].append(seconds_per_frame(run))
        quiet = statistics.mean(measured['quiet', False])
        for condition, found in measured.items():
            rates[condition].append(statistics.mean(found))
            ratios[condition].append(statistics.mean(found) / quiet)
    ideal = {'quiet': 1.0, 'busy loops': 1 / 2, 'numeric programs': 1 / 2,
             'threaded numeric programs': 1 / (1 + os.cpu_count())}
    rows = [{'beside': load, 'yield_when_busy': yields,
             'rays per second': statistics.median(rates[load, yields]),
             'of quiet': f'{statistics.median(ratios[load, yields]):.0%}', 'fair share': f'{ideal[load]:.0%}',
             'seconds per frame': statistics.median(frames[load, yields])} for load, yields in conditions]
    show(rows, f'{args.expname}, {machine(run.device)}')
    write_json(bench.json, rows)


@contextlib.contextmanager
def busy(program):
    """Run one process of `program` for each core; none if it is None."""
    count = os.cpu_count() if program else 0
    command = [sys.executable, '-c', program]
    loads = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)]
    try:
        time.sleep(LOAD_SECONDS if program else 0)
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


def rays_per_second(run, steps, seconds):
    """The speed of training steps over `seconds`."""
    num_rays, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch, _ = run.train_step(next(steps))
        num_rays += len(batch.target)
    return num_rays / (time.perf_counter() - began)


def seconds_per_frame(run):
    """How long the first test view takes, without baking."""
    run.frames.drop_cache()
    pose = run.scene.poses[run.scene.i_test[0]]
    run.frames.render(pose)
    return seconds_of(lambda: run.frames.render(pose), run.device)


if __name__ == '__main__':
    main()
