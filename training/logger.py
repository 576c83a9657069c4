"""What users see of a run: console and log file, progress bar, TensorBoard, and a record of how it was started."""
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scenes.errors import UserError, first_line
from scenes.files import make_folder, remove_partial_files, write_text
from training.options import plain_options

# The progress bar: its description, percentage, steps, times and the latest figures.
BAR_FORMAT = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
# The figures of the progress bar are read no more often than this many seconds, because reading waits for a GPU.
REFRESH_SECONDS = 1.0
# A rank that fails gives rank 0 this many seconds to report the same problem first.
QUIET_SECONDS = 3.0
# After a failed write, TensorBoard's next file is opened this many seconds later.
RETRY_SECONDS = 60.0
# These terms of the loss are mean squared errors of the two networks, and have a PSNR.
NETWORKS = ('coarse', 'fine')
# TensorBoard shows the PSNR of both networks, on training rays and on the held-out view, in one chart.
CHARTS = {'PSNR': {'train and held-out': [
    'Multiline', [f'psnr/{split} {name}' for split in ('train', 'held-out') for name in NETWORKS]]}}


# --- console ----------------------------------------------------------------------------------------------------

class Console:
    """Prints lines and copies them to a log file once there is one.

    Args:
      quiet: print nothing.
    """

    def __init__(self, quiet=False):
        self.quiet, self.log_path, self.early_lines = quiet, None, []

    def say(self, message, file=None):
        """Log a line and print it above a progress bar. A closed console or a full disk behind it does no harm."""
        self.log(message)
        if self.quiet:
            return
        file = file or sys.stdout
        try:
            tqdm.write(message, file=file)
            file.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

    def warn(self, message, *_):
        """Print a warning as one line; takes the place of `warnings.showwarning`."""
        self.say(f'run_nerf.py: warning: {message}', sys.stderr)

    def fail(self, problem):
        """Print the line that ends a run. Other ranks than 0 wait first: if rank 0 failed for the same reason,
        torchrun ends them in that time."""
        if self.quiet:
            time.sleep(QUIET_SECONDS)
            print(f'process {os.environ["RANK"]}: error: {problem}', file=sys.__stderr__)
        self.say(f'run_nerf.py: error: {problem}', sys.stderr)

    def log_to(self, path):
        """From now on write to this log file, beginning with the lines said so far."""
        self.log_path = path
        for line in self.early_lines:
            self.log(line)

    def log(self, message):
        """Write a line to the log file only."""
        if self.log_path is None:
            self.early_lines.append(message)
            return
        with contextlib.suppress(OSError), open(self.log_path, 'a') as file:  # the disk may be full
            file.write(message + '\n')


@contextlib.contextmanager
def rank0_console():
    """A `Console` for rank 0. Other ranks print nothing inside the block, not even argparse's errors."""
    if int(os.environ.get('RANK', 0)) == 0:
        yield Console()
        return
    with open(os.devnull, 'w') as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        yield Console(quiet=True)


def forward_warnings(console):
    """Print warnings as lines of the console; undone by a `warnings.catch_warnings` around it."""
    warnings.simplefilter('always', UserWarning)
    warnings.showwarning = console.warn


# --- TensorBoard ------------------------------------------------------------------------------------------------

def _hide_writer_errors(arguments):
    """A `threading.excepthook` without tracebacks of SummaryWriter's thread: the error that ends it is raised
    again in the main thread."""
    if not type(arguments.thread).__module__.startswith('tensorboard'):
        threading.__excepthook__(arguments)


class TensorBoard:
    """A SummaryWriter that cannot end a run: a failed write, as on a full disk, is reported in one line, and after
    RETRY_SECONDS a new file is opened.

    Args:
      folder: where the files go; None to write nothing.
      say: called with a line when a write fails.
    """

    def __init__(self, folder, say):
        self.folder, self.say, self.writer, self.retry_at = folder, say, None, 0.0
        if folder is not None:
            threading.excepthook = _hide_writer_errors

    def call(self, method, *arguments, **options):
        """Call a method of SummaryWriter, such as `SummaryWriter.add_scalar`."""
        if self.folder is None or time.monotonic() < self.retry_at:
            return
        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.folder)
            method(self.writer, *arguments, **options)
        except Exception as error:  # not always an OSError: TensorFlow, if installed, raises its own
            self.say(f'TensorBoard: cannot write ({first_line(error)}); will try again')
            self.close()
            self.retry_at = time.monotonic() + RETRY_SECONDS

    def close(self):
        """Write what is pending, if possible."""
        with contextlib.suppress(Exception):
            if self.writer is not None:
                self.writer.close()
        self.writer = None


# --- training ---------------------------------------------------------------------------------------------------

class Logger:
    """Progress of a training run on the console and in TensorBoard.

    Args:
      args: the options.
      folder: where the run's files are; None to write and show nothing (other ranks than 0).
      start: number of steps done before this run.
      device: the torch device that trains.
      console: a `Console`.
    Attributes:
      steps_done: number of steps done so far.
    """

    def __init__(self, args, folder, start, device, console):
        self.folder, self.start, self.steps_done, self.device = folder, start, start, device
        self.N_iters, self.i_print = args.N_iters, args.i_print
        self.say, self.log, self.tensorboard = console.say, console.log, TensorBoard(folder, console.say)
        no_bar = True if folder is None else None  # None: no bar unless on a terminal
        self.bar = tqdm(total=args.N_iters, initial=start, desc=args.expname, disable=no_bar, dynamic_ncols=True,
                        bar_format=BAR_FORMAT)
        self.seconds, self.timed_steps, self.timed_rays = 0.0, 0, 0.0  # of training since the last printed line
        self.started_at, self.shown_at, self.outputs = time.perf_counter(), 0.0, {}
        options = ''.join(f'    {key} = {value}\n' for key, value in plain_options(args))
        self.tensorboard.call(SummaryWriter.add_text, 'options', options, start)
        self.tensorboard.call(SummaryWriter.add_custom_scalars, CHARTS)

    def steps(self):
        """Yield the numbers of the steps to do. The time until `step` is called counts as training."""
        with self.bar:
            for step in range(self.start + 1, self.N_iters + 1):
                self.step_began_at = time.perf_counter()
                yield step
                self.bar.update()

    def step(self, step, n_rays, measures, lrate, safeguards):
        """Called when the update of a step is made: prints and logs it where that is due.

        Args:
          step: its number, from 1.
          n_rays: number of its rays, in all processes.
          measures: its `Measures`; read only when they are shown, because that waits for a GPU.
          lrate: its learning rate.
          safeguards: `Safeguards`, whose counts are logged.
        """
        self.steps_done = step
        due = step % self.i_print == 0 or step == self.N_iters
        refresh = not self.bar.disable and time.perf_counter() - self.shown_at > REFRESH_SECONDS
        show = self.folder is not None and (due or refresh)
        losses = {name: float(loss) for name, loss in measures.losses.items()} if show else {}
        now = time.perf_counter()
        self.seconds += now - self.step_began_at
        self.timed_steps, self.timed_rays = self.timed_steps + 1, self.timed_rays + n_rays
        if not show:
            return

        self.shown_at = now
        loss, rays_per_second = sum(losses.values()), self.timed_rays / self.seconds
        psnrs = {name: -10 * math.log10(max(losses[name], 1e-10)) for name in NETWORKS if name in losses}
        line = f'loss {loss:.4f}, PSNR {list(psnrs.values())[-1]:.2f}, {rays_per_second:,.0f} rays/s'
        self.bar.set_postfix_str(line)
        if due:
            (self.say if self.bar.disable else self.log)(f'step {step}/{self.N_iters}: {line}')
            self.scalars(step, {
                'train/loss': loss, 'train/learning rate': lrate,
                **{f'loss/{name}': term for name, term in losses.items()},
                **{f'psnr/train {name}': psnr for name, psnr in psnrs.items()},
                'speed/rays per second': rays_per_second,
                'speed/seconds per step': self.seconds / self.timed_steps,
                'health/memory, GiB': memory_gib(self.device),
                'health/restarts': safeguards.restarts,
                'health/steps left out': safeguards.bad_steps})
            self.tensorboard.call(SummaryWriter.flush)  # a killed process loses nothing before this step
            self.seconds, self.timed_steps, self.timed_rays = 0.0, 0, 0.0

    def scalars(self, step, values):
        """Add a dict name -> number to TensorBoard."""
        for name, value in values.items():
            self.tensorboard.call(SummaryWriter.add_scalar, name, value, step)

    def image(self, step, name, picture):
        """Add a picture [H, W, 3] in [0, 1] to TensorBoard."""
        picture = np.asarray(picture, np.float32)
        self.tensorboard.call(SummaryWriter.add_image, name, picture, step, dataformats='HWC')

    def wrote(self, what, path):
        """Remember the newest output of a kind for the closing lines."""
        self.outputs[what] = path

    def finish(self, checkpoints, processes):
        """End the run: save the last step unless that is done, and say where everything is. If rank 0 was lost,
        the first of the remaining processes saves.

        Args:
          checkpoints: `Checkpoints` of the run.
          processes: a `Processes`.
        """
        self.tensorboard.close()
        if processes.lost:
            self.say('another process of this run has ended: stopping')
        step = self.steps_done
        unsaved = step > self.start and checkpoints.saved_step != step
        if not processes.is_main:
            saves = processes.lost and unsaved and processes.should_save(checkpoints.path(step))
            if saves and checkpoints.save(step):
                print(f'process {processes.index}: saved {checkpoints.newest}', file=sys.__stderr__)
            return
        remove_partial_files(self.folder)  # an encoder may have continued a video that was given up
        if unsaved:
            unsaved = checkpoints.save(step) is None
        minutes, seconds = divmod(round(time.perf_counter() - self.started_at), 60)
        if self.start >= self.N_iters:
            self.say(f'nothing to do: {self.start} steps are done, and --N_iters is {self.N_iters}')
        else:
            self.say(f'{step} steps done, {minutes} min {seconds} s')
        saved = f'{checkpoints.newest or "none"}{"; the steps after it are NOT SAVED" if unsaved else ""}'
        places = {'checkpoint': saved, **self.outputs, 'TensorBoard': f'tensorboard --logdir {self.folder}'}
        for what, where in places.items():
            self.say(f'  {what:11} {where}')


def memory_gib(device):
    """Peak memory in GiB: of the tensors on a GPU, otherwise of the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2 ** 20
    except (OSError, StopIteration):  # not Linux, where ru_maxrss includes the parent process
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float('nan')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return peak / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


# --- the start of a run -----------------------------------------------------------------------------------------

def open_run(args, scene, networks, start, device, console, processes):
    """Prepare the folder of a run and print its header; returns its `Logger`. Called in all processes.

    Args:
      args: the options.
      scene: a `Scene`.
      networks: {'coarse': network} or {'coarse': network, 'fine': network}.
      start: number of steps done before this run.
      device: the torch device that trains.
      console: a `Console`.
      processes: a `Processes`.
    Raises:
      UserError: the folder cannot be written to.
    """
    folder = Path(args.basedir, args.expname)
    processes.from_rank0(partial(prepare_folder, folder, args, start, device))
    if not processes.is_main:
        return Logger(args, None, start, device, console)
    console.log_to(folder / 'log.txt')
    console.say(describe_run(args, scene, device, networks, folder, start, processes.size))
    return Logger(args, folder, start, device, console)


def describe_run(args, scene, device, networks, folder, start, processes=1):
    """The header of a run, a few lines; arguments as in `open_run`, and the number of processes."""
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    views = f'{len(scene.i_train)} train, {len(scene.i_val)} val, {len(scene.i_test)} test'
    fine = f' + {args.N_importance} fine' if args.N_importance else ''
    samples, rays = f'{args.N_samples} coarse{fine} samples', f'{args.N_rand} a step'
    if args.occupancy_grid:
        samples = f'{args.N_samples} steps along the diagonal of the box'
        rays = f'{args.N_rand_samples} samples a step, up to {args.N_rand} rays'
    lines = {
        'scene': f'{args.datadir} ({args.dataset_type})',
        'images': f'{views}, {scene.W}×{scene.H}, near {scene.near:.3g}, far {scene.far:.3g}',
        'rays': f'{rays} from {"one image" if args.no_batching else "all images"}, {samples}',
        'networks': ' + '.join(f'{name} {size:,}' for name, size in sizes.items()) + ' parameters',
        'device': str(device) if processes == 1 else f'{processes} processes, {device.type} each',
        'logs': f'{folder} ({f"resumes after step {start}" if start else "a new run"})',
    }
    return '\n'.join([args.expname] + [f'  {name:9} {text}' for name, text in lines.items()])


def prepare_folder(folder, args, start, device):
    """Create `folder`, write `args.txt`, `config.txt` and `run.json` there, and remove temporary files.

    Raises:
      UserError: it cannot be written to.
    """
    make_folder(folder)
    remove_partial_files(folder)
    try:
        write_text(folder / 'args.txt', ''.join(f'{key} = {value}\n' for key, value in plain_options(args)))
        if args.config is not None:
            write_text(folder / 'config.txt', Path(args.config).read_text())
        starts = [*read_starts(folder), describe_start(args, start, device)]
        write_text(folder / 'run.json', json.dumps(starts, indent=1) + '\n')
    except OSError as error:
        raise UserError(f'{folder}: cannot write there ({error.strerror})') from None


def read_starts(folder):
    """The records of earlier starts of a run from `run.json`; none if it is missing or damaged."""
    try:
        starts = json.loads((folder / 'run.json').read_text())
        return starts if isinstance(starts, list) else []
    except (OSError, ValueError):
        return []


def describe_start(args, start, device):
    """A record for `run.json`: command, code and software of this start."""
    try:
        command = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'command': sys.argv, 'commit': commit, 'seed': args.seed,
        'after_step': start, 'host': platform.node(), 'device': str(device),
        'gpu': torch.cuda.get_device_name(device) if device.type == 'cuda' else None,
        'threads': torch.get_num_threads(), 'python': platform.python_version(), 'torch': torch.__version__,
        'numpy': np.__version__, 'cuda': torch.version.cuda,
    }
