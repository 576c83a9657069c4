"""Time of the compiled kernels, beside their reference implementations in PyTorch and within a training step.

    python benchmarks/kernels.py --config configs/lego_fast.txt --datadir data/nerf_synthetic/lego

Needs a config with a hash grid and an occupancy grid. Kernels and references take turns, and times are
medians. Within a step each kernel is waited for, and its time includes the launch.
"""
import itertools
import os
import statistics
import warnings
from collections import Counter
from functools import partial
from unittest import mock

import torch
from common import build, machine, parse, seconds_of, show, write_json

from accel import hash_grid, occupancy, packed, positional
from accel.half_precision import GPU_MULTIPLE, HalfPrecision
from accel.hash_grid import HashGrid
from accel.kernels.compiled import Kernels
from accel.occupancy import RESOLUTION, CellGrid
from accel.positional import padded_encoding
from run_nerf_helpers import EncodedNeRF, get_embedder
from training.devices import pick_device

ALL_KERNELS = hash_grid.KERNELS, occupancy.KERNELS, packed.KERNELS, positional.KERNELS
# Each implementation is timed this many times, the first of which does not count.
ROUNDS = 6
# Each time, it is called this many times in a row.
CALLS = 10
# Radius of the ball that rays cross, in a box whose sides are 2.
BALL_RADIUS = 0.5


def main():
    bench, args = parse(__doc__,
                        ('--samples', {'type': int, 'default': 2 ** 18, 'help': 'samples of a kernel'}),
                        ('--warmup', {'type': int, 'default': 500, 'help': 'training steps before'}),
                        ('--steps', {'type': int, 'default': 320, 'help': 'training steps to measure'}))
    device = indexed(pick_device(args.device))
    tables = {'kernels': [*checks(device)],
              'calls': [*calls(args, device, bench.samples), *padding(device, bench.samples)],
              'a training step': [*shares_of_a_step(build(args), bench.warmup, bench.steps)]}
    for title, rows in tables.items():
        show(rows, f'{title}, {machine(device)}')
    write_json(bench.json, {'config': args.expname, 'machine': machine(device), **tables})


def indexed(device):
    """`device` as its tensors name it, such as cuda:0, for which kernels are compiled."""
    return torch.empty(0, device=device).device


def repeat(work, count):
    for _ in range(count):
        work()


def checks(device):
    """Compile and check the kernels: a row for each set."""
    for kernels in ALL_KERNELS:
        kernels.libraries.pop(device, None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            seconds = seconds_of(partial(kernels.usable, device), device)
        usable = 'yes' if kernels.usable(device) else 'no'
        yield {'what': f'compile and check {kernels.name}', 'ms': 1e3 * seconds,
               'usable': ': '.join([usable, *(str(warning.message) for warning in caught)])}


def calls(args, device, samples):
    """Time the functions that have kernels: a row for each."""
    for kernels, work, size in functions_with_kernels(args, device, samples):
        seconds = {'': [], '1': []} if kernels.usable(device) else {'1': []}  # by NERF_PLAIN
        for _, plain in itertools.product(range(ROUNDS), seconds):
            with mock.patch.dict(os.environ, NERF_PLAIN=plain):
                seconds[plain].append(seconds_of(partial(repeat, work, CALLS), device) / CALLS)
        medians = {plain: 1e3 * statistics.median(times[1:]) for plain, times in seconds.items()}
        compiled, reference = medians.get(''), medians['1']
        yield {'what': f'{work.__name__.replace("_", " ")}, {size} samples', 'ms': compiled,
               'reference ms': reference, 'speed-up': compiled and reference / compiled}


def functions_with_kernels(args, device, samples):
    """Triples: `Kernels`, a function that calls some of them, and its number of samples."""
    grid = HashGrid(args.n_levels, args.finest_res, args.log2_hashmap_size, args.n_features).to(device)
    embedder, _ = get_embedder(10)
    points, encoded = 2 * torch.rand(samples, 3, device=device) - 1, {}

    # parallel rays that cross the box, and most of them a ball in its middle
    cells, rays = CellGrid(RESOLUTION).to(device), torch.zeros(samples // 32, 8, device=device)
    centers = cells.cell_points(torch.arange(RESOLUTION ** 3, device=device), 0.5)
    cells.set_occupied((centers.norm(dim=-1) < BALL_RADIUS).view_as(cells.occupied))
    rays[:, :2], rays[:, 2], rays[:, 5], rays[:, 7] = torch.rand_like(rays[:, :2]) - BALL_RADIUS, -4, 1, 8
    step_size, jitter = cells.diagonal / 256, torch.full_like(rays[:, 0], 0.5)

    def march():
        return cells.march(rays, *cells.candidates(rays, step_size, jitter))
    t, ray_indices, offsets = march()
    raw = torch.randn(len(t), 4, device=device, requires_grad=True)
    step_sizes = torch.full_like(jitter, step_size)

    @torch.no_grad()
    def encode():
        return grid(points)

    def gradient_of_the_table():
        implementation = os.environ['NERF_PLAIN']
        if implementation not in encoded:
            encoded[implementation] = grid(points)
        output = encoded[implementation]
        return torch.autograd.grad(output, grid.table, torch.ones_like(output), retain_graph=True)

    def positional_encoding():
        return padded_encoding(embedder, GPU_MULTIPLE, points)

    def composite_with_gradient():
        out, _ = packed.composite(raw, t, ray_indices, step_sizes, offsets)
        return torch.autograd.grad(out, raw, torch.ones_like(out))

    return ((hash_grid.KERNELS, encode, samples), (hash_grid.KERNELS, gradient_of_the_table, samples),
            (occupancy.KERNELS, march, len(t)), (packed.KERNELS, composite_with_gradient, len(t)),
            (positional.KERNELS, positional_encoding, samples))


@torch.no_grad()
def padding(device, samples):
    """Time the network of lego.txt in bfloat16, with and without padded encodings: a row for each."""
    (encoding, input_ch), (encoding_views, input_ch_views) = get_embedder(10), get_embedder(4)
    network = EncodedNeRF(encoding, encoding_views, input_ch=input_ch, input_ch_views=input_ch_views,
                          use_viewdirs=True).to(device)
    inputs, seconds = torch.rand(2, samples, 3, device=device), {GPU_MULTIPLE: [], 1: []}
    for _, multiple in itertools.product(range(ROUNDS), seconds):
        evaluate = HalfPrecision(EncodedNeRF.__call__, network, multiple)
        seconds[multiple].append(seconds_of(partial(evaluate, *inputs), device))
    for multiple, times in seconds.items():
        yield {'what': f'network of lego, {samples} samples, sizes padded to multiples of {multiple}',
               'ms': 1e3 * statistics.median(times[1:])}


def shares_of_a_step(run, warmup, count):
    """Train: a row for a step, the mean of `count`, and one for each kernel in it."""
    call, spent, steps = Kernels.call, Counter(), itertools.count(run.start + 1)

    def train_step():
        run.train_step(next(steps))

    def timed_call(kernels, function, *arguments):
        spent[function] += seconds_of(partial(call, kernels, function, *arguments), run.device)
    repeat(train_step, warmup)
    total = seconds_of(partial(repeat, train_step, count), run.device)
    with mock.patch.object(Kernels, 'call', timed_call):
        repeat(train_step, count)
    for name, seconds in {'': total, **spent}.items():
        yield {'what': f'a step of {run.args.expname}{f": {name}" if name else ""}',
               'ms': 1e3 * seconds / count, 'share of the step': seconds / total}


if __name__ == '__main__':
    main()
