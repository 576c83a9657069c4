"""Training beside other busy processes: rays per second on a quiet machine, beside busy loops and numeric programs.

    python benchmarks/contention.py --config configs/lego_fast.txt --ft_path 001000.tar --seconds 10 --rounds 3

Takes the options of run_nerf.py besides its own. Each condition trains for --seconds with and without `yield_when_busy`,
in turn; the figures are medians over --rounds. The load is one process per core: a loop in Python, or matrix products with
their default number of threads.
"""
import contextlib
import os
import statistics
import subprocess
import sys
import time

from common import build, machine, parse, show, write_json

from training.threads import CHECK_SECONDS, yield_when_busy

LOADS = {'quiet': None, 'busy loops': 'while True: pass',
         'numeric programs': 'import torch; a = torch.randn(1500, 1500)\nwhile True: a @ a'}


def main():
    own, args = parse(__doc__, ('--seconds', {'type': float, 'default': 10.0}),
                      ('--rounds', {'type': int, 'default': 3}))
    run = build(args)
    rates = {(load, yields): [] for load in LOADS for yields in (True, False)}
    train(run, args, own.seconds)
    for _ in range(own.rounds):
        for load, yields in rates:
            with busy(LOADS[load]), yield_when_busy() if yields else contextlib.nullcontext():
                train(run, args, 3 * CHECK_SECONDS)
                rates[load, yields].append(train(run, args, own.seconds))
    quiet = statistics.median(rates['quiet', False])
    rows = [{'beside': load, 'yield_when_busy': yields, 'rays per second': statistics.median(found),
             'of quiet': f'{statistics.median(found) / quiet:.0%}'} for (load, yields), found in rates.items()]
    show(rows, f'{args.expname}, {machine(run.device)}')
    write_json(own.json, rows)


@contextlib.contextmanager
def busy(program):
    """Run as many processes of `program` as there are cores; none if it is None."""
    count = os.cpu_count() if program else 0
    loads = [subprocess.Popen([sys.executable, '-c', program], stderr=subprocess.DEVNULL) for _ in range(count)]
    try:
        time.sleep(3 if program else 0)  # until they compute
        yield
    finally:
        for load in loads:
            load.kill()
            load.wait()


def train(run, args, seconds):
    """Rays a second of training steps over `seconds`."""
    rays, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        batch, measures = run.backpropagate(args.N_iters)
        run.optimizer.step()
        run.follow(1, measures)
        rays += len(batch.target)
    return rays / (time.perf_counter() - began)


if __name__ == '__main__':
    main()
