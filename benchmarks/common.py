"""Shared by the benchmarks: options, a run to measure, nerf-pytorch's way of computing, clocks, tables."""
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from accel.network_query import NetworkQuery  # noqa: E402
from run_nerf import ExactRenderer, frame_renderer, loss_and_gradient, prepare  # noqa: E402
from run_nerf_helpers import EncodedNeRF, NeRF, batchify  # noqa: E402
from scenes.rays import RaySampler  # noqa: E402
from scenes.scene import Scene  # noqa: E402
from training import setup  # noqa: E402
from training.devices import has_fast_bf16  # noqa: E402
from training.frames import FrameRenderer  # noqa: E402
from training.logger import Console  # noqa: E402
from training.options import config_parser  # noqa: E402
from training.processes import Processes  # noqa: E402
from training.signals import StopRequest  # noqa: E402


def parse(doc, *own):
    """Parse the command line.

    Args:
      doc: docstring of the benchmark.
      own: its options beside --json, pairs (name, keywords of add_argument).
    Returns:
      own: namespace of its options; `own.rest` is the list of all other options.
      args: namespace of the options of run_nerf.py.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog='All other options are those of run_nerf.py.')
    for name, keywords in own:
        parser.add_argument(name, **keywords)
    parser.add_argument('--json', metavar='FILE', help='also write the results to this file')
    own, rest = parser.parse_known_args()
    own.rest = rest
    return own, config_parser().parse_args(rest)


# --- a run to measure -------------------------------------------------------------------------------------------

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
        hwf, K = self.scene.hwf, self.scene.K
        return batch, loss_and_gradient(hwf, K, self.args.chunk, batch, self.kwargs_train)

    def follow(self, step, measures):
        """Let the occupancy grid, baked grids and the number of rays follow an update of the networks."""
        self.kwargs_train['renderer'].update(step, **self.kwargs_train)
        self.frames.forget()
        self.rays.follow(measures.num_samples)


def build(args):
    """Build a `Run` as run_nerf.py does.

    Sets --basedir to a temporary folder that is deleted at exit: no checkpoint but that of --ft_path is loaded.
    """
    args.basedir = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, args.basedir, ignore_errors=True)
    processes = Processes(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scene, (path, state), kwargs_train, kwargs_test, start, _, optimizer = prepare(args, processes)
    frames = frame_renderer(args, scene, kwargs_test, processes, StopRequest(print), Console())
    rays = setup.ray_sampler(args, scene, kwargs_train, frames.device, processes)
    return Run(args, scene, path, state, kwargs_train, kwargs_test, start, optimizer, rays, frames)


# --- ways to compute --------------------------------------------------------------------------------------------

class NerfPytorchQuery(NetworkQuery):
    """Evaluates networks as nerf-pytorch does: all points are encoded at once, then go through the network 65,536
    at a time; all activations are kept."""

    def at_points(self, points, viewdirs, network):
        encoded = network.encoding(points)
        if viewdirs is not None:
            encoded = torch.cat([encoded, network.encoding_views(viewdirs)], -1)
        return batchify(partial(NeRF.forward, network), self.netchunk)(encoded)


class UnlimitedRenderer(ExactRenderer):
    """Renders as many rays at once as --chunk says, whatever memory their samples take."""

    def samples_per_ray(self, N_samples, N_importance):
        return 1


def as_nerf_pytorch(render_kwargs):
    """`render_kwargs` for the method as nerf-pytorch computes it."""
    return {**render_kwargs, 'network_query_fn': NerfPytorchQuery(), 'renderer': UnlimitedRenderer()}


def fast_precisions(device):
    """fp32, and the lower precisions in which `device` multiplies matrices faster."""
    fast = has_fast_bf16(device)  # a GPU that has bfloat16 has TF32 too
    return ['fp32'] + ['tf32'] * (fast and device.type == 'cuda') + ['bf16'] * fast


def choose_ways(requested, precisions, run):
    """The ways to measure: those requested, or all that are available. Exits if a requested one is not.

    Args:
      requested: names of ways, or None.
      precisions: dict way -> precision, which the device must support.
      run: a `Run`; nerf-pytorch has its networks and its renderer only.
    """
    available = [way for way, precision in precisions.items() if precision in fast_precisions(run.device)]
    if not isinstance(run.kwargs_train['network_fn'], EncodedNeRF) or run.args.occupancy_grid:
        available.remove('nerf-pytorch')
    missing = [way for way in requested or () if way not in available]
    if missing:
        sys.exit(f'--ways: found {", ".join(missing)}, expected some of {", ".join(available)}')
    return requested or available


# --- measuring --------------------------------------------------------------------------------------------------

def clock(device):
    """The time in seconds once all work given to `device` is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work, device):
    """How long `work()` takes."""
    began = clock(device)
    work()
    return clock(device) - began


def peak_gib(way):
    """Peak memory of a way, measured by this script with --memory_of in its own process."""
    command = [sys.executable, *sys.argv, '--memory_of', way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


# --- results ----------------------------------------------------------------------------------------------------

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
        Path(path).write_text(json.dumps(content, indent=1) + '\n')
