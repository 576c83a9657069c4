"""Kernels, training steps, quality, frames and resuming on an NVIDIA GPU, in at most nine minutes.

    python benchmarks/gpu.py --datadir data/nerf_synthetic/lego                        # all parts
    python benchmarks/gpu.py --datadir data/nerf_synthetic/lego --part kernels step    # these, also again
    python benchmarks/gpu.py --datadir data/nerf_synthetic/lego --part hash --seconds 5 15 30 60 300
    python benchmarks/gpu.py --quick --device cpu                                      # tries all parts, tiny

Each row is written to the file of --json at once. The same command continues an interrupted one: it keeps
the parts that are complete. A part that takes too long is stopped.
"""
import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from common import ROOT, as_nerf_pytorch, build, choose_variants, clock, seconds_of
from kernels import ALL_KERNELS, calls, checks, indexed, padding, shares_of_a_step
from quality import evaluate
from step import VARIANTS, compare, fractions_with_gradient, take_step

from load_blender import read_frames
from run_nerf_helpers import to8b
from scenes.errors import UserError, first_line
from scenes.files import atomic_write, read_json
from training.checkpoints import Checkpoints, checkpoint_parts, networks_of, restore
from training.devices import pick_device
from training.logger import memory_gib
from training.metrics import psnr
from training.options import config_parser
from training.start import describe_start

# Defaults and sizes of a full measurement, and of --quick. `samples` are those of a kernel; `kernel_steps`
# training steps before kernels are measured, and meanwhile; `steps` those of each variant.
# `resume_steps` are taken before resuming, and again after. `warm_seconds` of training precede the
# measurement of steps and of frames. `frame_seconds` are spent on frames of each variant.
FULL = {'seconds': [5.0, 15.0, 30.0, 60.0], 'vanilla_seconds': [60.0], 'samples': 2 ** 18,
        'kernel_steps': (500, 320), 'steps': 20, 'resume_steps': 100, 'warm_seconds': 15.0,
        'frame_seconds': 8.0}
QUICK = {'seconds': [0.2, 0.4], 'vanilla_seconds': [0.2], 'samples': 2 ** 12,
         'kernel_steps': (4, 16), 'steps': 1, 'resume_steps': 4, 'warm_seconds': 0.2,
         'frame_seconds': 0.1, 'datadir': ROOT / 'data/demo'}
# With --quick, all runs have these options.
QUICK_OPTIONS = ('--half_res --netdepth 2 --netwidth 16 --netdepth_fine 2 --netwidth_fine 16 --N_rand 64 '
                 '--N_samples 32 --N_rand_samples 2048 --n_levels 4 --log2_hashmap_size 11 --finest_res 64')
# The runs of `hash` and `vanilla`: a config, and what differs from it.
HASH = 'lego_fast', '--no-half_res', '--N_rand_samples', 2 ** 18
VANILLA = ('lego', '--occupancy_grid', '--N_importance', 0, '--N_samples', 256, '--N_rand', 2 ** 16,
           '--N_rand_samples', 2 ** 16, '--no-no_batching')
# nerf-pytorch renders this many rays at once.
CHUNK = 1024 * 32
# The learning rate falls to this fraction of it within the training time.
FINAL_LRATE = 1 / 30
# A part starts only if this many seconds are left, and training leaves them for its last evaluation.
RESERVED_SECONDS = 15


class TimeUp(BaseException):
    """A part takes too long. Not an `Exception`, so `except Exception` lets it pass."""


# --- runs ---------------------------------------------------------------------------------------------------

def options(bench, config, *words):
    """The options of run_nerf.py for a config of this repository and `words`."""
    words = ['--config', ROOT / f'configs/{config}.txt', '--datadir', bench.datadir, '--device', bench.device,
             *words, *(QUICK_OPTIONS.split() if bench.quick else ()), *bench.rest]
    args = config_parser().parse_args([str(word) for word in words])
    args.N_importance = min(args.N_importance, 8) if bench.quick else args.N_importance  # 0 with a grid
    return args


def train(run, budgets, deadline=math.inf):
    """Train until `deadline`; yields steps and seconds of training at the end of each of `budgets`. What
    happens in between does not count. The learning rate falls with time, at any speed of the GPU."""
    step, seconds, args = 0, 0.0, run.args
    lrate, args.lrate_decay = args.lrate, math.inf
    for budget in sorted(budgets):
        began = clock(run.device) - seconds
        while seconds < budget and time.monotonic() < deadline:
            step, args.lrate = step + 1, lrate * FINAL_LRATE ** (seconds / max(budgets))
            run.train_step(step)
            seconds = time.perf_counter() - began  # a GPU may be a step behind
        seconds = clock(run.device) - began
        yield step, seconds
        if time.monotonic() >= deadline:
            return


def train_and_evaluate(bench, run, budgets):
    """A row at the end of each of `budgets` of seconds that is reached in time."""
    views, size = len(run.scene.i_test), f'{run.scene.W}×{run.scene.H}'
    for step, seconds in train(run, budgets, bench.deadline - RESERVED_SECONDS):
        yield {'training s': seconds, 'steps': step, 'PSNR': evaluate(run, views), 'test views': views,
               'size': size, 'learning rate': run.args.lrate}


def save(run, step, path):
    """Write a checkpoint."""
    camera = {'pixel_centers': run.kwargs_train['pixel_centers'], **run.scene.checkpoint_fields()}
    parts = checkpoint_parts(run.kwargs_train, run.optimizer, ray_sampler=run.rays)
    Checkpoints(path.parent, parts, run.args, camera, None, 0, print, True).write(path, step)


def peak_gib_of(work, device):
    """Peak memory in GiB of `work()` and what was there before; None on a CPU."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return memory_gib(device) if device.type == 'cuda' else None


# --- parts: each yields rows, and its docstring is printed with them ----------------------------------------

def measure_kernels(bench):
    """Milliseconds of compiled kernels and of their references in PyTorch, and whether kernels pass their
    checks. Then, in a training step of lego_fast.txt, the share of each kernel, with its launch."""
    args = options(bench, 'lego_fast')
    yield from checks(bench.device)
    yield from calls(args, bench.device, bench.samples)
    yield from padding(bench.device, bench.samples)
    yield from shares_of_a_step(build(args), *bench.kernel_steps)


def measure_step(bench):
    """The exact training step of lego.txt, medians; the variants take turns. run_nerf.py takes `sparse bf16`
    where bfloat16 is fast, otherwise `sparse fp32`; its speed depends on how many samples have a gradient."""
    run = build(options(bench, 'lego', '--precrop_iters', 0))
    variants = choose_variants(None, {name: precision for name, (_, precision) in VARIANTS.items()}, run)
    step, end = 0, time.monotonic() + bench.warm_seconds
    while time.monotonic() < end:
        step += 1
        take_step(run, step, variants[-1])
    shares = fractions_with_gradient(run, step + 1)
    for row in compare(run, variants, step + 1, bench.steps):
        peak = peak_gib_of(partial(take_step, run, step, row['variant']), run.device)
        yield {**row, 'rays/s': run.args.N_rand / row['ms'] * 1e3, 'peak GiB': peak, 'after steps': step,
               'samples with gradient': ', '.join(f'{name} {share:.0%}' for name, share in shares.items())}


def measure_hash(bench):
    """lego_fast.txt at full size. All rows are points along one run, whose learning rate falls to a thirtieth
    over the whole training time, so earlier rows understate what a shorter run would reach. Compiling kernels
    and evaluating do not count."""
    run = build(options(bench, *HASH))
    for row in train_and_evaluate(bench, run, bench.seconds):
        yield row
    save(run, row['steps'], bench.checkpoint)


def measure_vanilla(bench):
    """One network of lego.txt, sampled in the occupied cells of a grid (--occupancy_grid); otherwise as
    `hash`."""
    yield from train_and_evaluate(bench, build(options(bench, *VANILLA)), bench.vanilla_seconds)


def measure_frames(bench):
    """Frames of full size: of the network of `hash`, and of the two of lego.txt after a short training. The
    first frame includes baking, where there is any, and its PSNR is shown; the rate is the median of the
    others. `fast` is what run_nerf.py does, `exact` evaluates every sample in fp32."""
    trained = ['--ft_path', bench.checkpoint] if bench.checkpoint.exists() else []
    run = build(options(bench, *HASH, *trained))
    step = run.start or [*train(run, [bench.warm_seconds])][-1][0]
    yield frame_row(bench, 'lego_fast.txt', run, step, run.frames.render_kwargs)

    run = build(options(bench, 'lego', '--no-half_res', '--chunk', CHUNK))
    [(step, _)] = train(run, [2 * bench.warm_seconds])
    yield frame_row(bench, 'lego.txt, fast', run, step, run.frames.render_kwargs)
    run.frames.drop_cache()
    yield frame_row(bench, 'lego.txt, exact', run, step, run.kwargs_test)
    yield frame_row(bench, 'lego.txt, nerf-pytorch', run, step, as_nerf_pytorch(run.kwargs_test))


def frame_row(bench, variant, run, step, render_kwargs):
    """Render test views for about `bench.frame_seconds`, at least two; a row about them."""
    scene, seconds, frames = run.scene, [], []
    views = itertools.cycle(scene.i_test)

    def render():
        frames[1:] = [run.frames.render(scene.poses[next(views)], render_kwargs=render_kwargs)]

    def render_all():
        while len(seconds) < 2 or sum(seconds) < bench.frame_seconds:
            seconds.append(seconds_of(render, run.device))
    peak = peak_gib_of(render_all, run.device)
    return {'variant': variant, 'after steps': step, 'size': f'{scene.W}×{scene.H}',
            'frames/s': 1 / statistics.median(seconds[1:]), 'first frame s': seconds[0],
            'PSNR': psnr(to8b(frames[0].rgb), scene.images[scene.i_test[0]]), 'peak GiB': peak}


def measure_resume(bench):
    """The largest difference between the parameters of an uninterrupted run and those of a run that resumes
    from its checkpoint, and of a run that repeats it. On a GPU the order of atomic additions varies, so that
    even repeated runs differ, and more with each step."""
    for config in ('demo_fast', 'demo'):
        words, half = (config, '--datadir', ROOT / 'data/demo'), bench.resume_steps
        steps = half, half + 1, 2 * half
        run = build(options(bench, *words))
        path, expected = Path(run.args.basedir, 'resume.tar'), parameters_after(run, 0, steps[:1])
        save(run, half, path)
        expected += parameters_after(run, half, steps[1:])
        repeated = parameters_after(build(options(bench, *words)), 0, steps)
        run = build(options(bench, *words, '--ft_path', path))
        restore(run.path, run.state, {'ray_sampler': run.rays})
        resumed = parameters_after(run, run.start, steps)
        for step, one, *others in zip(steps, expected, resumed, repeated):
            differences = [(other - one).abs().max().item() for other in others]
            yield {'config': f'{config}.txt', 'saved at step': half, 'compared at step': step,
                   'resumed differs by': differences[0], 'repeated differs by': differences[1]}


def parameters_after(run, start, steps):
    """Train on after step `start`; returns all parameters of the networks in one tensor for each of
    `steps`."""
    found = []
    for first, last in itertools.pairwise([start, *steps]):
        for step in range(first + 1, last + 1):
            run.train_step(step)
        networks = networks_of(run.kwargs_train).values()
        found.append(torch.cat([part.detach().flatten() for net in networks for part in net.parameters()]))
    return found


# The parts, and how many seconds each may take, in addition to those of --seconds and --vanilla_seconds.
PARTS = {'kernels': (measure_kernels, 60), 'step': (measure_step, 60), 'hash': (measure_hash, 70),
         'vanilla': (measure_vanilla, 50), 'frames': (measure_frames, 100), 'resume': (measure_resume, 50)}


# --- results ------------------------------------------------------------------------------------------------

def describe(device):
    """The machine, the code and the command."""
    found = describe_start(argparse.Namespace(seed=0), 0, device)
    keys = 'device', 'gpu', 'torch', 'cuda', 'threads', 'time', 'commit', 'command'
    header = {key: found[key] for key in keys}
    if device.type == 'cuda':
        header['capability'] = '.'.join(map(str, torch.cuda.get_device_capability(device)))
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        with contextlib.suppress(OSError):
            header['driver'] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return header


def measure(bench, part, record, write):
    """Run a part within its time; its rows, or why it failed, are added to `record` and written at once."""
    function, limit = PARTS[part]
    limit += max({'hash': bench.seconds, 'vanilla': bench.vanilla_seconds}.get(part, [0]))
    began, limit = time.monotonic(), limit * (2 if bench.quick else 1)  # to try the script on slow machines
    bench.deadline = min(began + limit, bench.end)

    def stop(*_):
        raise TimeUp(f'stopped after {time.monotonic() - began:.0f} s')
    if os.name == 'posix':  # Windows has no such timer
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, bench.deadline - began)
    try:
        for row in function(bench):
            record['rows'].append(row)
            write()
            print(f'{part}:', ', '.join(f'{key} {text(row[key])}' for key in row), file=sys.stderr)
        record['seconds'] = time.monotonic() - began
    except (Exception, TimeUp) as error:  # the other parts may work
        record['error'] = first_line(error)
        print(f'{part}: error: {record["error"]}', file=sys.stderr)
    finally:
        if os.name == 'posix':
            signal.setitimer(signal.ITIMER_REAL, 0)
    write()


def text(value):
    """A cell of a table."""
    return '' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)


def markdown(content):
    """All results as Markdown."""
    lines = [f'{key} {value}' for key, value in content['header'].items() if key != 'command']
    lines = [', '.join(lines)]
    for part, record in sorted(content['parts'].items(), key=lambda item: [*PARTS].index(item[0])):
        columns = list(dict.fromkeys(key for row in record['rows'] for key in row))
        state = f'{record["seconds"]:.0f} s' if 'seconds' in record else record.get('error', 'not complete')
        lines += ['', f'**{part}** ({record["measured"]}; {state}). {record["about"]}', '']
        heading = [dict(zip(columns, columns)), dict.fromkeys(columns, '---')] if columns else []
        for row in [*heading, *record['rows']]:
            lines.append('| ' + ' | '.join(text(row.get(key)) for key in columns) + ' |')
    return '\n'.join(lines)


class Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


def parse():
    """The options of this benchmark; `rest` are those of run_nerf.py, for all runs."""
    parser = Parser('benchmarks/gpu.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog='All other options are those of run_nerf.py, for all its runs.')
    parser.add_argument('--datadir', type=Path, default=ROOT / 'data/nerf_synthetic/lego',
                        help='folder of the scene')
    parser.add_argument('--part', nargs='+', choices=PARTS, metavar='PART',
                        help=f'measure only these, also if they are complete: {", ".join(PARTS)}')
    parser.add_argument('--seconds', nargs='+', type=float, metavar='S', help='training time of `hash`')
    parser.add_argument('--vanilla_seconds', nargs='+', type=float, metavar='S', help='that of `vanilla`')
    parser.add_argument('--minutes', type=float, default=8.5, help='time for all parts together')
    parser.add_argument('--json', type=Path, default='gpu.json', metavar='FILE', help='where the results go')
    parser.add_argument('--device', default='cuda', help='cuda, cuda:1, …; cpu to try the script')
    parser.add_argument('--quick', action='store_true', help='the demo scene, tiny networks, a few steps')
    parser.set_defaults(**(QUICK if '--quick' in sys.argv else FULL))
    bench, bench.rest = parser.parse_known_args()
    bench.end = time.monotonic() + 60 * bench.minutes
    bench.checkpoint = bench.json.with_suffix('.tar')
    if bench.quick:
        torch.set_num_threads(1)
    try:
        bench.device = indexed(pick_device(bench.device))
    except UserError as error:
        parser.error(f'found no CUDA device: {error}; --quick --device cpu tries the script')
    try:
        read_frames(bench.datadir)
        options(bench, 'lego')  # unknown ones end here
        header = describe(bench.device)
        setting = [header['gpu'], str(bench.datadir), bench.quick, bench.rest]
        content = read_json(bench.json) if bench.json.exists() else {'setting': setting, 'parts': {}}
        found = content.get('setting') if isinstance(content, dict) else None
        if found != setting:
            raise UserError(f'{bench.json}: found results of {found}, expected {setting}; name another file '
                            'with --json')
    except UserError as error:
        parser.error(error)
    return bench, {**content, 'header': header}


def main():
    bench, content = parse()
    header, parts = content['header'], content['parts']

    def write():
        with atomic_write(bench.json) as path:
            path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')

    for kernels in ALL_KERNELS:  # compile them now, so that no part pays for it
        kernels.usable(bench.device)
    for part in bench.part or [part for part in PARTS if 'seconds' not in parts.get(part, ())]:
        if time.monotonic() > bench.end - RESERVED_SECONDS:
            print(f'{part}: no time left; the same command continues here', file=sys.stderr)
            break
        parts[part] = {'measured': f'{header["time"]}, commit {header["commit"]}', 'rows': [],
                       'about': ' '.join(PARTS[part][0].__doc__.split())}
        measure(bench, part, parts[part], write)
        gc.collect()  # the networks of this part
    print(markdown(content))
    return int(not all('seconds' in parts.get(part, ()) for part in bench.part or PARTS))


if __name__ == '__main__':
    sys.exit(main())
