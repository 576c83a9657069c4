"""Training speed of one process and of several, one thread each: how well a run scales.

    python benchmarks/processes.py --processes 2 --config configs/demo.txt --N_iters 200

Starts run_nerf.py with torchrun, as one process and as several in turn, and reads the speed that each run
logs last. The processes share the rays of a step, so that the number of rays is the same in both cases.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile

from common import ROOT, parse, show, write_json

from training.time_plan import NEVER


def main():
    bench, args = parse(__doc__, ('--processes', {'type': int, 'default': 2}),
                      ('--rounds', {'type': int, 'default': 3, 'help': 'runs of each number of processes'}))
    speeds = {count: [] for count in (1, bench.processes)}
    for _ in range(bench.rounds):
        for count, measured in speeds.items():
            measured.append(rays_per_second(count, bench.rest, args.N_iters))
    medians = {count: statistics.median(measured) for count, measured in speeds.items()}
    rows = [{'processes': count, 'rays/s': median, 'speed-up': median / medians[1],
             'efficiency': median / medians[1] / count} for count, median in medians.items()]
    show(rows, f'{args.expname}, {args.N_rand} rays a step, one thread per process')
    write_json(bench.json, rows)


def rays_per_second(processes, options, steps):
    """The speed of training over the second half of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node',
                   processes, ROOT / 'run_nerf.py', *options, '--basedir', folder,
                   '--i_print', max(1, steps // 2),
                   '--i_img', NEVER, '--i_video', NEVER, '--i_testset', NEVER]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                              stdout=subprocess.PIPE, text=True, check=True)
    return float(re.findall(r'([\d,]+) rays/s', done.stdout)[-1].replace(',', ''))


if __name__ == '__main__':
    main()
