"""Time, rate and peak memory of a training step: the established way and ours, taking turns in one run.

    python benchmarks/step.py --config configs/lego.txt --datadir data/nerf_synthetic/lego --ft_path 001000.tar
    python benchmarks/step.py --config configs/demo.txt --warmup 1000

The established way sends 65,536 points at once through the networks and keeps all activations. `--warmup` trains so many
steps before the clock starts: how many samples have a gradient depends on the state. Operations are those of the networks'
matrix products that are really done; the share is of the rate that a large product reaches between the steps, in float32.
Peak memory of a way, on a CPU, is that of a process which takes two such steps and nothing else.
"""
import json
import statistics
import subprocess
import sys
import weakref

import torch
from common import batches_of, built, clock, established, machine, parse, product_rate, seconds_of, show, write_json
from torch import nn

from accel.sparse_backward import InChunks
from devices import has_fast_bf16, network_chunk
from run_log import memory_gib
from run_nerf import loss_and_gradient, network_outputs, render, set_learning_rate

WAYS = {'established': None, 'plain fp32': ('plain', 'fp32'), 'sparse fp32': ('sparse', 'fp32'),
        'sparse tf32': ('sparse', 'tf32'), 'sparse bf16': ('sparse', 'bf16')}


def main():
    own, args = parse(__doc__, ('--steps', {'type': int, 'default': 5, 'help': 'of each way'}),
                      ('--warmup', {'type': int, 'default': 0, 'help': 'steps of training before'}),
                      ('--ways', {'nargs': '+', 'choices': WAYS, 'help': 'by default all that this device has'}),
                      ('--memory_of', {'choices': WAYS, 'help': 'print the peak memory of two steps in GiB, and no more'}))
    scene, kwargs, _, start, parameters, optimizer = built(args)
    device = parameters[0].device
    batches = batches_of(args, scene, kwargs)
    set_learning_rate(optimizer, args.lrate, args.lrate_decay, start)
    ways = own.ways or [way for way in WAYS if (way != 'sparse tf32' or (device.type == 'cuda' and has_fast_bf16(device)))
                        and (way != 'sparse bf16' or has_fast_bf16(device))]
    steps = {way: Step(way, scene, args, kwargs, batches, optimizer) for way in [*ways, own.memory_of or ways[0]]}
    if own.memory_of:
        for count in range(2):
            steps[own.memory_of].take(count)
        print(json.dumps(memory_gib(device)))
        return
    for count in range(own.warmup):
        steps[ways[-1]].take(count)
    rows = compare(ways, steps, own.steps, device)
    for row in rows:
        row['peak GiB'] = peak_memory(row['way'], device, steps)
    show(rows, f'{args.expname} after {start + own.warmup} steps, {args.N_rand} rays a step, {machine(device)}')
    write_json(own.json, {'config': args.expname, 'after_steps': start + own.warmup, 'N_rand': args.N_rand,
                          'machine': machine(device), 'ways': rows})


def compare(ways, steps, count, device):
    """A row for each way: medians over `count` steps, one of each way in turn."""
    seconds, rates, operations = {way: [] for way in ways}, [], {}
    for way in ways:
        steps[way].take(0)  # memory is asked for, kernels are chosen
    for number in range(count):
        rates.append(product_rate(device))
        for way in ways:
            seconds[way].append(seconds_of(lambda way=way, number=number: steps[way].take(number), device))
            operations[way] = steps[way].operations()
    rate, slowest = statistics.median(rates), statistics.median(seconds[ways[0]])
    rows = []
    for way in ways:
        median = statistics.median(seconds[way])
        rows.append({'way': way, 'ms': 1e3 * median, f'against {ways[0]}': slowest / median,
                     'TFLOP': operations[way] / 1e12, 'GFLOP/s': operations[way] / median / 1e9,
                     'of a large product': operations[way] / median / rate,
                     'with gradient': ', '.join(f'{share:.1%}' for share in steps[way].shares())})
    return rows


class Shares(weakref.WeakKeyDictionary):
    """Remembers all shares of a step, not the last alone."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __setitem__(self, network, share):
        super().__setitem__(network, share)
        self.seen.append((network, share))


class Step:
    """A training step in one of WAYS."""

    def __init__(self, way, scene, args, kwargs, batches, optimizer):
        self.way, self.scene, self.args, self.batches, self.optimizer = way, scene, args, batches, optimizer
        self.kwargs, self.in_chunks = established(kwargs), None
        if WAYS[way] is not None:
            self.in_chunks = InChunks(*WAYS[way], network_chunk)
            self.in_chunks.shares = Shares()
            query = kwargs['network_query_fn']
            self.kwargs['network_query_fn'] = type(query)(query.func, **{**query.keywords, 'in_chunks': self.in_chunks})

    def take(self, number):
        torch.set_float32_matmul_precision('high' if self.way.endswith('tf32') else 'highest')
        rays, target = self.batches.draw(number + 1)
        self.optimizer.zero_grad()
        if self.in_chunks is not None:
            self.in_chunks.shares.seen.clear()
        if self.in_chunks is None:
            rgb, _, acc, extras = render(self.scene.H, self.scene.W, self.scene.K, self.args.chunk, rays, **self.kwargs)
            network_outputs(rgb, acc, extras, target)[0].sum().backward()
        else:
            loss_and_gradient(self.scene.hwf, self.scene.K, self.args.chunk, rays, target, self.kwargs)
        self.optimizer.step()

    def shares(self):
        """Of the coarse and the fine network's points, those that went back."""
        seen = [] if self.in_chunks is None else self.in_chunks.shares.seen
        by_network = [[share for other, share in seen if other is network] for network in self.networks()]
        return [statistics.mean(shares) if shares else 1.0 for shares in by_network]

    def networks(self):
        return [network for network in (self.kwargs['network_fn'], self.kwargs['network_fine']) if network is not None]

    def operations(self):
        """Of the matrix products of a step: forward one, backward two; with the sparse way another forward before it."""
        counts = [self.args.N_samples, self.args.N_samples + self.args.N_importance]
        total, sparse = 0, self.way.startswith('sparse')
        for network, count, share in zip(self.networks(), counts, self.shares()):
            layers = [layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear)]
            backward = 3 * sum(layers) - layers[0] if sparse else 2 * sum(layers) - layers[0]  # the input has no gradient
            total += 2 * self.args.N_rand * count * (sum(layers) + share * backward)
        return total


def peak_memory(way, device, steps):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        steps[way].take(0)
        clock(device)
        return memory_gib(device)
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--memory_of', way], capture_output=True, text=True,
                          check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == '__main__':
    main()
