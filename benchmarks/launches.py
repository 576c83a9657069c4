"""Kernel launches, waits and bytes of a training step and of a frame on a GPU, counted on a stand-in for one.

    PYTHONPATH=<folder of fake_cuda.py> python benchmarks/launches.py --config configs/lego_fast.txt \
        --ft_path logs/lego_fast/003000.tar

A wait is an operation for whose result the host waits. The stand-in, `fake_cuda`, computes on the CPU; it is
not part of this repository. Compiled kernels count as one launch each.
"""
import os
import sys
from collections import Counter
from pathlib import Path

# The stand-in names lines of the project and must be imported before torch.
os.environ.setdefault('FAKE_CUDA_ROOT', str(Path(__file__).resolve().parent.parent))
import fake_cuda

fake_cuda.install()
import cuda_on_cpu  # noqa: E402
from common import build, parse, show, write_json  # noqa: E402
from fake_cuda import Counts, Memory  # noqa: E402

from training.safeguards import Safeguards  # noqa: E402


def launched(kernel):
    """Count a launch of a compiled kernel."""
    if Counts.log is not None:
        Counts.log.append((kernel, 'kernels', f'{kernel}, compiled', 0, 0, 1, 0, []))


def counted(name, work, times, lines):
    """Do `work()` `times` times; returns a row of means, and prints the `lines` lines with most launches."""
    Counts.log, Memory.peak = [], Memory.now
    for _ in range(times):
        work()
    launches, waits = Counter(), Counter()
    for operation, _, line, _, _, count, wait, _ in Counts.log:
        launches[f'{operation} in {line}' if line == 'autograd' else line] += count
        if wait:
            waits[f'{operation} in {line}'] += wait
    for what, counts in (('launches', launches), ('waits', waits)):
        for line, count in counts.most_common(lines):
            print(f'  {count / times:8.2f} {what} of a {name}: {line}')
    row = {'of': name, 'launches': sum(launches.values()) / times, 'waits': sum(waits.values()) / times,
           'MB': sum(entry[3] for entry in Counts.log) / times / 1e6, 'peak GiB': Memory.peak / 2 ** 30}
    Counts.log = None
    return row


def main():
    bench, args = parse(__doc__,
                        ('--warm', {'type': int, 'default': 1, 'help': 'steps before the counted ones'}),
                        ('--steps', {'type': int, 'default': 16, 'help': 'steps to count'}),
                        ('--frames', {'type': int, 'default': 1, 'help': 'frames to count'}),
                        ('--lines', {'type': int, 'default': 12, 'help': 'lines of code to list'}))
    args.device = 'cuda'
    cuda_on_cpu.install(launched=launched)
    run = build(args)
    networks = {'coarse': run.kwargs_train['network_fn'], 'fine': run.kwargs_train['network_fine']}
    safeguards = Safeguards({name: part for name, part in networks.items() if part is not None},
                            run.optimizer, 0, True, print)
    step = run.start

    def train_step():
        nonlocal step
        step += 1
        _, measures = run.backpropagate(step)
        run.update(step, measures, safeguards.all_finite(measures))
        safeguards.restart_collapsed(step, measures)

    for _ in range(bench.warm):
        train_step()
    rows = [counted('step', train_step, bench.steps, bench.lines)] if bench.steps else []
    if bench.frames:
        pose = run.scene.poses[run.scene.i_test[0]]
        rows.append(counted('frame', lambda: run.frames.render(pose), bench.frames, bench.lines))
    show(rows, f'{args.expname} after step {run.start}')
    write_json(bench.json, rows)


if __name__ == '__main__':
    sys.exit(main())
