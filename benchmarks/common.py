"""Shared by the benchmarks: options, a run to measure, nerf-pytorch's implementation, clocks, tables."""
import argparse
import atexit
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

# The repository.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from accel.network_query import NetworkQuery  # noqa: E402
from run_nerf import ExactRenderer, frame_renderer, loss_and_gradient, prepare, set_learning_rate  # noqa: E402
from run_nerf_helpers import EncodedNeRF, NeRF, batchify  # noqa: E402
from scenes.rays import RaySampler  # noqa: E402
from scenes.scene import Scene  # noqa: E402
from training.allocator import keep_freed_memory  # noqa: E402
from training.devices import has_fast_bf16  # noqa: E402
from training.frames import FrameRenderer  # noqa: E402
from training.options import config_parser  # noqa: E402
from training.processes import Processes  # noqa: E402
from training.start import ray_sampler  # noqa: E402


def parse(doc, *options):
    """Parse the options of a benchmark and of run_nerf.py.

    Args:
      doc: docstring of the benchmark.
      options: pairs (name, keyword arguments of add_argument), in addition to --json.
    Returns:
      bench, args: namespaces of the options of the benchmark and of run_nerf.py; `bench.rest` is the list of
        the latter.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='All other options are those of run_nerf.py.')
    for name, keywords in options:
        parser.add_argument(name, **keywords)
    parser.add_argument('--json', metavar='FILE', help='also write the results to this file')
    bench, bench.rest = parser.parse_known_args()
    return bench, config_parser().parse_args(bench.rest)


# --- a run to measure ---------------------------------------------------------------------------------------

class Run(NamedTuple):
    """A scene, its networks, and what trains and renders them."""
    args: argparse.Namespace
    scene: Scene
    path: Path | None      # of the checkpoint that was loaded
    state: dict | None     # its content
    kwargs_train: dict     # for `render`
    kwargs_test: dict
    start: int             # number of steps done
    optimizer: torch.optim.Optimizer
    rays: RaySampler
    frames: FrameRenderer

    @property
    def device(self):
        return self.frames.device

    def backpropagate(self, step):
        """Compute the gradient of a training step; returns its `Batch` and `Measures`."""
        batch = self.rays.sample(step)
        self.optimizer.zero_grad()
        kwargs = self.kwargs_train
        chunk = min(self.args.chunk or sys.maxsize, kwargs['renderer'].max_rays(self.device, **kwargs))
        return batch, loss_and_gradient(self.scene.hwf, self.scene.K, chunk, batch, kwargs)

    def update(self, step, measures, finite=True):
        """Update the networks, unless the gradient is not `finite`, and what depends on them."""
        set_learning_rate(self.optimizer, self.args.lrate, self.args.lrate_decay, step)
        if finite:
            self.optimizer.step()
        self.kwargs_train['renderer'].update(step, **self.kwargs_train)
        self.rays.adapt_to(measures.mean_samples)

    def train_step(self, step):
        """Do a training step; returns its `Batch` and `Measures`."""
        batch, measures = self.backpropagate(step)
        self.update(step, measures)
        return batch, measures


def build(args):
    """Build a `Run` as run_nerf.py does. Sets --basedir to a temporary folder, which is deleted at exit, so
    that only a checkpoint of --ft_path is loaded."""
    keep_freed_memory()
    args.basedir = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, args.basedir, ignore_errors=True)
    processes = Processes(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scene, (path, state), kwargs_train, kwargs_test, start, _, optimizer = prepare(args, processes)
    frames = frame_renderer(args, scene, kwargs_train, kwargs_test, processes, None, print)
    rays = ray_sampler(args, scene, kwargs_train['pixel_centers'], frames.device, processes)
    return Run(args, scene, path, state, kwargs_train, kwargs_test, start, optimizer, rays, frames)


# --- variants to compare ------------------------------------------------------------------------------------

class NerfPytorchQuery(NetworkQuery):
    """Evaluates networks as nerf-pytorch does: all points are encoded at once, then go through the network
    65,536 at a time; all activations are kept."""

    def evaluate(self, inputs, network, rays=None):
        encoded = network.encoding(inputs[:, :3])
        if inputs.shape[-1] > 3:
            encoded = torch.cat([encoded, network.encoding_views(inputs[:, 3:])], -1)
        return batchify(partial(NeRF.forward, network), self.netchunk)(encoded)


class UnlimitedRenderer(ExactRenderer):
    """Renders as many rays at once as --chunk says, whatever memory their samples take."""

    def max_rays(self, device, *args, **kwargs):
        return sys.maxsize


def as_nerf_pytorch(render_kwargs):
    """`render_kwargs` for the method as nerf-pytorch computes it."""
    return {**render_kwargs, 'network_query_fn': NerfPytorchQuery(1024 * 64), 'renderer': UnlimitedRenderer()}


def fast_precisions(device):
    """fp32, and the lower precisions in which `device` multiplies matrices faster."""
    fast = has_fast_bf16(device)  # a GPU that has bfloat16 has TF32 too
    return ['fp32'] + ['tf32'] * (fast and device.type == 'cuda') + ['bf16'] * fast


def choose_variants(requested, precisions, run):
    """The variants to measure: those requested, or all that are available. Exits if a requested one is not.

    Args:
      requested: names of variants, or None.
      precisions: dict variant -> precision, which the device must support.
      run: a `Run`; nerf-pytorch has its networks and its renderer only.
    """
    supported = fast_precisions(run.device)
    available = [variant for variant, precision in precisions.items() if precision in supported]
    if not isinstance(run.kwargs_train['network_fn'], EncodedNeRF) or run.args.occupancy_grid:
        available.remove('nerf-pytorch')
    missing = [variant for variant in requested or () if variant not in available]
    if missing:
        sys.exit(f'--variants: found {", ".join(missing)}, expected some of {", ".join(available)}')
    return requested or available


# --- measuring ----------------------------------------------------------------------------------------------

def clock(device):
    """The time in seconds, after all work of `device` is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work, device):
    """How long `work()` takes."""
    began = clock(device)
    work()
    return clock(device) - began


def peak_gib(variant):
    """Peak memory of a variant, measured by this script with --memory_of in its own process."""
    command = [sys.executable, *sys.argv, '--memory_of', variant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


# --- results ------------------------------------------------------------------------------------------------

def machine(device):
    """Name of the device, number of threads, version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU'
    return f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def show(rows, title):
    """Print dicts with the same keys as a table."""
    lines = [[f'{value:.4g}' if isinstance(value, float) else str(value) for value in line]
             for line in itertools.chain([rows[0]], (row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(title)
    for line in lines:
        print('  ' + '  '.join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), flush=True)


def write_json(path, content):
    """Write results to the file of --json, if it was given."""
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
