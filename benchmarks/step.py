"""Time, FLOP rate and peak memory of a training step: nerf-pytorch's implementation and ours, in turns.

    python benchmarks/step.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path FILE
    python benchmarks/step.py --config configs/demo.txt --warmup 1000

The speed of the sparse variants depends on how many samples have a gradient, and so on the state of training:
start from a checkpoint, or train for --warmup steps first. FLOPs are those of the matrix products that a step
really does; their rate is compared with that of a large float32 product, measured between the steps. Peak
memory is that of a process that takes two such steps and nothing else.
"""
import statistics
from functools import partial

import torch
from common import (
    as_nerf_pytorch,
    build,
    choose_variants,
    machine,
    parse,
    peak_gib,
    seconds_of,
    show,
    write_json,
)
from torch.utils.flop_counter import FlopCounterMode

from accel.network_query import NetworkQuery
from training.checkpoints import networks_of
from training.devices import pick_precision
from training.logger import memory_gib

# Each variant has a way to backpropagate and a precision.
VARIANTS = {'nerf-pytorch': ('plain', 'fp32'), 'plain fp32': ('plain', 'fp32'),
            'sparse fp32': ('sparse', 'fp32'), 'sparse tf32': ('sparse', 'tf32'),
            'sparse bf16': ('sparse', 'bf16'), 'sampled fp32': ('sampled', 'fp32'),
            'sampled bf16': ('sampled', 'bf16')}
# The rate of the machine is measured by a product of two square matrices of this size.
PRODUCT_SIZE = 4096


def main():
    bench, args = parse(__doc__,
                        ('--steps', {'type': int, 'default': 5, 'help': 'number of steps of each variant'}),
                        ('--warmup', {'type': int, 'default': 0, 'help': 'number of training steps before'}),
                        ('--variants', {'nargs': '+', 'choices': VARIANTS, 'help': 'default: all available'}),
                        ('--memory_of', {'choices': VARIANTS, 'help': 'print only the peak memory in GiB'}))
    args.precrop_iters = 0
    run = build(args)
    if bench.memory_of:
        for step in (1, 2):
            take_step(run, run.start + step, bench.memory_of)
        print(memory_gib(run.device))
        return

    precisions = {variant: precision for variant, (_, precision) in VARIANTS.items()}
    variants = choose_variants(bench.variants, precisions, run)
    for step in range(1, bench.warmup + 1):
        take_step(run, run.start + step, variants[-1])
    steps_done = run.start + bench.warmup
    fractions = fractions_with_gradient(run, steps_done + 1)
    rows = compare(run, variants, steps_done + 1, bench.steps)
    for row in rows:
        row['peak GiB'] = peak_gib(row['variant'])
    with_gradient = ', '.join(f'{name} {fraction:.1%}' for name, fraction in fractions.items())
    show(rows, f'{args.expname} after {steps_done} steps, {args.N_rand} rays a step, {machine(run.device)}\n'
               f'samples with gradient: {with_gradient}')
    write_json(bench.json, {'config': args.expname, 'after_steps': steps_done, 'N_rand': args.N_rand,
                            'with_gradient': fractions, 'machine': machine(run.device), 'variants': rows})


def take_step(run, step, variant):
    """Take a training step in one of VARIANTS."""
    backward, precision = VARIANTS[variant]
    pick_precision(precision, run.device, run.args.netwidth)  # switches TF32 on or off
    run = run_with(run, NetworkQuery(run.args.netchunk, precision, backward))
    if variant == 'nerf-pytorch':
        run = run._replace(kwargs_train=as_nerf_pytorch(run.kwargs_train))
    run.train_step(step)


def run_with(run, query):
    """`run` with another `NetworkQuery` in training."""
    return run._replace(kwargs_train={**run.kwargs_train, 'network_query_fn': query})


def compare(run, variants, first_step, count):
    """A row for each variant: medians over `count` steps, one of each variant in turn."""
    flops, seconds, rates = {}, {variant: [] for variant in variants}, []
    for variant in variants:  # these steps are not timed: memory is allocated and kernels are chosen in them
        with FlopCounterMode(display=False) as counter:
            take_step(run, first_step, variant)
        flops[variant] = counter.get_total_flops()
    for step in range(first_step + 1, first_step + 1 + count):
        rates.append(product_rate(run.device))
        for variant in variants:
            seconds[variant].append(seconds_of(partial(take_step, run, step, variant), run.device))
    medians = {variant: statistics.median(seconds[variant]) for variant in variants}
    slowest, product = medians[variants[0]], statistics.median(rates)
    return [{'variant': variant, 'ms': 1e3 * median, f'speed-up over {variants[0]}': slowest / median,
             'TFLOP': flops[variant] / 1e12, 'GFLOP/s': flops[variant] / median / 1e9,
             'of fp32 product': flops[variant] / median / product} for variant, median in medians.items()]


def product_rate(device):
    """FLOPs per second of a large float32 matrix product."""
    torch.set_float32_matmul_precision('highest')
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    return 2 * PRODUCT_SIZE ** 3 / seconds_of(lambda: a @ a, device)


class GradientCounter(NetworkQuery):
    """Counts the samples, and those that have a gradient, of each network."""

    def __init__(self, netchunk):
        super().__init__(netchunk)
        self.counts = {}

    def evaluate(self, inputs, network, rays=None):
        raw = super().evaluate(inputs, network, rays)
        if raw.requires_grad:
            raw.register_hook(partial(self.count, network))
        return raw

    def count(self, network, grad_raw):
        samples, with_gradient = self.counts.get(network, (0, 0))
        self.counts[network] = samples + len(grad_raw), with_gradient + int((grad_raw != 0).any(-1).sum())


def fractions_with_gradient(run, step):
    """The fraction of a step's samples whose `raw` has a gradient that is not zero, by network."""
    counter = GradientCounter(run.args.netchunk)
    run_with(run, counter).backpropagate(step)
    networks = {name: counter.counts[network] for name, network in networks_of(run.kwargs_train).items()}
    return {name: with_gradient / samples for name, (samples, with_gradient) in networks.items()}


if __name__ == '__main__':
    main()
