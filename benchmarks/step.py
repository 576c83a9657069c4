"""Time, rate and peak memory of a training step: nerf-pytorch's way and ours, in turns within one run.

    python benchmarks/step.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path 001000.tar
    python benchmarks/step.py --config configs/demo.txt --warmup 1000

The speed of the sparse ways depends on how many samples have a gradient, and so on the state of training: start
from a checkpoint, or train for --warmup steps first. Operations are those of the matrix products that a step
really does; their rate is compared with that of a large float32 product, measured between the steps. Peak memory
is that of a process that takes two such steps and nothing else.
"""
import statistics
from functools import partial

import torch
from common import as_nerf_pytorch, build, choose_ways, machine, parse, peak_gib, seconds_of, show, write_json
from torch.utils.flop_counter import FlopCounterMode

from accel.network_query import NetworkQuery
from run_nerf import set_learning_rate
from training.devices import pick_precision
from training.logger import memory_gib
from training.setup import networks_of

# Backward and precision of the networks, by way.
WAYS = {'nerf-pytorch': ('plain', 'fp32'), 'plain fp32': ('plain', 'fp32'), 'sparse fp32': ('sparse', 'fp32'),
        'sparse tf32': ('sparse', 'tf32'), 'sparse bf16': ('sparse', 'bf16')}
# The machine's rate is measured by a product of two square matrices of this size.
PRODUCT_SIZE = 4096


def main():
    own, args = parse(__doc__, ('--steps', {'type': int, 'default': 5, 'help': 'number of steps of each way'}),
                      ('--warmup', {'type': int, 'default': 0, 'help': 'number of training steps before'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'default: all available'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print only the peak memory in GiB'}))
    args.precrop_iters = 0
    run = build(args)
    set_learning_rate(run.optimizer, args.lrate, args.lrate_decay, run.start)
    if own.memory_of:
        for step in (1, 2):
            take_step(run, run.start + step, own.memory_of)
        print(memory_gib(run.device))
        return

    ways = choose_ways(own.ways, {way: precision for way, (_, precision) in WAYS.items()}, run)
    for step in range(1, own.warmup + 1):
        take_step(run, run.start + step, ways[-1])
    steps_done = run.start + own.warmup
    shares = shares_with_gradient(run, steps_done + 1)
    rows = compare(run, ways, steps_done + 1, own.steps)
    for row in rows:
        row['peak GiB'] = peak_gib(row['way'])
    with_gradient = ', '.join(f'{name} {share:.1%}' for name, share in shares.items())
    show(rows, f'{args.expname} after {steps_done} steps, {args.N_rand} rays a step, {machine(run.device)}\n'
               f'samples with gradient: {with_gradient}')
    write_json(own.json, {'config': args.expname, 'after_steps': steps_done, 'N_rand': args.N_rand,
                          'with_gradient': shares, 'machine': machine(run.device), 'ways': rows})


def take_step(run, step, way):
    """Take a training step in one of WAYS."""
    backward, precision = WAYS[way]
    pick_precision(precision, run.device, run.args.netwidth)  # switches TF32 on or off
    run = run_with(run, NetworkQuery(run.args.netchunk, precision, backward))
    if way == 'nerf-pytorch':
        run = run._replace(kwargs_train=as_nerf_pytorch(run.kwargs_train))
    _, measures = run.backpropagate(step)
    run.optimizer.step()
    run.follow(step, measures)


def run_with(run, query):
    """`run` with another `NetworkQuery` in training."""
    return run._replace(kwargs_train={**run.kwargs_train, 'network_query_fn': query})


def compare(run, ways, first_step, count):
    """A row for each way: medians over `count` steps, one of each way in turn."""
    operations, seconds, rates = {}, {way: [] for way in ways}, []
    for way in ways:  # these steps are not timed: memory is allocated and kernels are chosen in them
        with FlopCounterMode(display=False) as counter:
            take_step(run, first_step, way)
        operations[way] = counter.get_total_flops()
    for step in range(first_step + 1, first_step + 1 + count):
        rates.append(product_rate(run.device))
        for way in ways:
            seconds[way].append(seconds_of(partial(take_step, run, step, way), run.device))
    medians, product = {way: statistics.median(seconds[way]) for way in ways}, statistics.median(rates)
    return [{'way': way, 'ms': 1e3 * median, f'speed-up over {ways[0]}': medians[ways[0]] / median,
             'TFLOP': operations[way] / 1e12, 'GFLOP/s': operations[way] / median / 1e9,
             'share of large product': operations[way] / median / product} for way, median in medians.items()]


def product_rate(device):
    """Floating-point operations per second of a large float32 matrix product."""
    torch.set_float32_matmul_precision('highest')
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    return 2 * PRODUCT_SIZE ** 3 / seconds_of(lambda: a @ a, device)


class GradientCounter(NetworkQuery):
    """Counts the samples, and those that have a gradient, of each network."""

    def __init__(self, netchunk):
        super().__init__(netchunk)
        self.counts = {}

    def at_points(self, points, viewdirs, network):
        raw = super().at_points(points, viewdirs, network)
        if raw.requires_grad:
            raw.register_hook(partial(self.count, network))
        return raw

    def count(self, network, grad_raw):
        samples, with_gradient = self.counts.get(network, (0, 0))
        self.counts[network] = samples + len(grad_raw), with_gradient + int((grad_raw != 0).any(-1).sum())


def shares_with_gradient(run, step):
    """The share of a step's samples whose `raw` has a gradient that is not zero, by network."""
    counter = GradientCounter(run.args.netchunk)
    run_with(run, counter).backpropagate(step)
    shares = {network: with_gradient / samples for network, (samples, with_gradient) in counter.counts.items()}
    return {name: shares[network] for name, network in networks_of(run.kwargs_train).items()}


if __name__ == '__main__':
    main()
