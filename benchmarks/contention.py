"""Speed on a busy machine: rays per second of training and seconds per frame, beside busy loops and programs.

    python benchmarks/contention.py --config configs/lego_fast.txt --datadir data/nerf_synthetic/lego

Each condition trains for --seconds and renders a frame, with and without `yield_when_busy`, in turn; the
figures are medians over --rounds. The load is one process per core: a busy loop in Python, or matrix products
with their default number of threads. Train for --warmup steps first, or start from --ft_path.
"""
import contextlib
import os
import statistics
import subprocess
import sys
import time

from common import build, machine, parse, seconds_of, show, write_json

from training.threads import CHECK_SECONDS, yield_when_busy

# The programs that keep the cores busy, by name.
LOADS = {'quiet': None, 'busy loops': 'while True: pass',
         'numeric programs': 'import torch; a = torch.randn(1500, 1500)\nwhile True: a @ a'}
# A load needs this many seconds until it computes.
LOAD_SECONDS = 3.0


def main():
    bench, args = parse(__doc__, ('--seconds', {'type': float, 'default': 10.0}),
                        ('--rounds', {'type': int, 'default': 3}),
                        ('--warmup', {'type': int, 'default': 500, 'help': 'training steps before'}))
    run = build(args)
    steps = iter(range(run.start + 1, sys.maxsize))
    for _ in range(bench.warmup):
        run.train_step(next(steps))
    rates = {(load, yields): [] for load in LOADS for yields in (True, False)}
    frames = {condition: [] for condition in rates}
    for _ in range(bench.rounds):
        for load, yields in rates:
            with busy(LOADS[load]), yield_when_busy() if yields else contextlib.nullcontext():
                rays_per_second(run, steps, 3 * CHECK_SECONDS)
                rates[load, yields].append(rays_per_second(run, steps, bench.seconds))
                frames[load, yields].append(seconds_per_frame(run))
    rates = {condition: statistics.median(found) for condition, found in rates.items()}
    quiet = rates['quiet', False]
    rows = [{'beside': load, 'yield_when_busy': yields, 'rays per second': rate,
             'of quiet': f'{rate / quiet:.0%}', 'seconds per frame': statistics.median(frames[load, yields])}
            for (load, yields), rate in rates.items()]
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
