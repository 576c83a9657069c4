"""Steps a second of one process and of several, one thread each: how well a run scales.

    python benchmarks/ranks.py --processes 2 --config configs/demo.txt --N_iters 200

Starts run_nerf.py with torchrun, by one process and by several in turn, and reads the speed that each run logs last. With
one thread a process, the processes of a CPU have a core each. The rays of a step are the same number in both.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile

from common import ROOT, parse, show, write_json


def main():
    own, args = parse(__doc__, ('--processes', {'type': int, 'default': 2}), ('--rounds', {'type': int, 'default': 3}))
    speeds = {count: [] for count in (1, own.processes)}
    for _ in range(own.rounds):
        for count, found in speeds.items():
            found.append(rays_per_second(count, own.rest, args.N_iters))
    alone = statistics.median(speeds[1])
    rows = [{'processes': count, 'rays/s': statistics.median(found), 'speed-up': statistics.median(found) / alone,
             'efficiency': statistics.median(found) / alone / count} for count, found in speeds.items()]
    show(rows, f'{args.expname}, {args.N_rand} rays a step, one thread a process')
    write_json(own.json, rows)


def rays_per_second(processes, options, steps):
    """The speed over the second half of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                   str(ROOT / 'run_nerf.py'), *options, '--basedir', folder, '--i_print', str(max(1, steps // 2)),
                   '--i_img', str(10 ** 9), '--i_video', str(10 ** 9), '--i_testset', str(10 ** 9)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
                              check=True)
    return float(re.findall(r'([\d,]+) rays/s', done.stdout)[-1].replace(',', ''))


if __name__ == '__main__':
    main()
