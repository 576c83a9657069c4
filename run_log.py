"""What a person sees of a run: console and log file, progress bar, TensorBoard, and the record of how it was made."""
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary
from tqdm import tqdm

from errors import UserError, first_line
from file_io import remove_parts, write_text
from options import listed
from outputs import make_folder

BAR = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
REFRESH_SECONDS = 1.0  # reading the loss waits for a GPU; the bar does it no more often than this
QUIET_SECONDS = 3.0    # for the first of several processes to name what has failed
RETRY_SECONDS = 60.0   # after a failed write to TensorBoard's file
NETWORKS = ('coarse', 'fine')
CHARTS = {'PSNR': {'train and held-out': ['Multiline', [f'psnr/{split} {name}' for split in ('train', 'held-out')
                                                         for name in NETWORKS]]}}


class Console:
    """Lines for the console, and the same for a log file once there is one; in silence if `quiet`."""

    def __init__(self, quiet=False):
        self.early, self.path, self.quiet = [], None, quiet

    def say(self, message, file=None):
        """Log a line, and print it above a progress bar. A console that is gone, or a full disk behind it, is no harm."""
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
        """A warning as one line, in the place of `warnings.showwarning`."""
        self.say(f'run_nerf.py: warning: {message}', sys.stderr)

    def fail(self, problem):
        """The line that ends a run. A process that is not the first has most likely the same to say: it waits, in which time
        torchrun ends it if the first one has failed too."""
        if self.quiet:
            time.sleep(QUIET_SECONDS)
            print(f'process {os.environ["RANK"]}: error: {problem}', file=sys.__stderr__)
        self.say(f'run_nerf.py: error: {problem}', sys.stderr)

    def log_to(self, path):
        """From now on to this file too, with the lines that were said before."""
        self.path, early = path, self.early
        for line in early:
            self.log(line)

    def log(self, message):
        """A line for the log file alone."""
        if self.path is None:
            self.early.append(message)
            return
        try:
            with open(self.path, 'a') as file:
                file.write(message + '\n')
        except OSError:  # a full disk; what matters is on the console
            pass


@contextlib.contextmanager
def speaking_for_all():
    """A `Console`, which is quiet in all but the first process of torchrun; what argparse has to say is said once too."""
    quiet = int(os.environ.get('RANK', 0)) > 0
    if not quiet:
        yield Console()
        return
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield Console(quiet)


class Board:
    """TensorBoard's file, in `folder`; none if that is None. Writing to it never ends a run: after a failure it is tried
    again later, in a new file."""

    def __init__(self, folder, say):
        self.folder, self.say, self.file, self.not_before = folder, say, None, 0.0

    def add(self, step, content):
        """Write a summary protocol buffer."""
        if self.folder is None or time.monotonic() < self.not_before:
            return
        try:
            if self.file is None:
                name = f'events.out.tfevents.{time.time():.6f}.{platform.node()}.{id(self)}'
                self.file = open(self.folder / name, 'ab')  # noqa: SIM115 - open for as long as the run
                self._write(Event(wall_time=time.time(), file_version='brain.Event:2'))
            self._write(Event(wall_time=time.time(), step=step, summary=content))
        except OSError as error:
            self.say(f'TensorBoard: cannot write ({first_line(error)}); tried again later')
            self.close()
            self.not_before = time.monotonic() + RETRY_SECONDS

    def _write(self, event):
        RecordWriter(self.file).write(event.SerializeToString())
        self.file.flush()

    def close(self):
        try:
            if self.file is not None:
                self.file.close()
        except OSError:  # what was buffered could not be written
            pass
        self.file = None


class RunLog:
    """Progress of a training run on the console and in TensorBoard.

    Args:
      args: the options.
      folder: where the run's files are.
      start: the run goes on after this step.
      device: what computes.
      console: a `Console`.
      idle: show and write nothing: another process does.
    """

    def __init__(self, args, folder, start, device, console, idle=False):
        self.folder, self.start, self.stop, self.device = folder, start, args.N_iters, device
        self.every, self.idle = args.i_print, idle
        self.say, self.log, self.board = console.say, console.log, Board(None if idle else folder, console.say)
        self.bar = tqdm(total=self.stop, initial=start, desc=args.expname, disable=idle or None, dynamic_ncols=True,
                        bar_format=BAR)
        self.train_seconds, self.timed_steps, self.timed_rays, self.refreshed = 0.0, 0, 0.0, 0.0
        self.began, self.written, self.step, self.done = time.perf_counter(), {}, start, start
        options = ''.join(f'    {key} = {value}\n' for key, value in listed(args))
        self.board.add(start, summary.text('options', options))
        self.board.add(start, summary.custom_scalars(CHARTS))

    def steps(self):
        """The numbers of the steps to do; the time from a step's start to its `step_done` counts as training."""
        with self.bar:
            while self.step < self.stop:
                self.step += 1
                self.step_start = time.perf_counter()
                yield self.step
                self.bar.update(self.step - self.bar.n)

    def rewind(self, step):
        """Go on after an earlier step."""
        self.step = self.done = step

    def step_done(self, step, rays, errors, lrate, health):
        """To be called when a step's update is made.

        Args:
          rays: how many the step had, in all processes.
          errors: mean squared errors of the networks, [1 or 2]; read only when they are shown.
          lrate: learning rate of the step.
          health: its counts are shown too.
        """
        now, self.done = time.perf_counter(), step
        due = step % self.every == 0 or step == self.stop
        show = not self.idle and (due or (not self.bar.disable and now - self.refreshed > REFRESH_SECONDS))
        found = dict(zip(NETWORKS, errors.tolist())) if show else {}
        now = time.perf_counter()
        self.train_seconds += now - self.step_start
        self.timed_steps, self.timed_rays = self.timed_steps + 1, self.timed_rays + rays
        if not show:
            return
        self.refreshed = now
        seconds, rate = self.train_seconds / self.timed_steps, self.timed_rays / self.train_seconds
        psnrs = {name: -10 * float(np.log10(max(mse, 1e-10))) for name, mse in found.items()}
        loss, last = sum(found.values()), list(psnrs.values())[-1]
        shown = f'loss {loss:.4f}, PSNR {last:.2f}, {rate:,.0f} rays/s'
        self.bar.set_postfix_str(shown)
        if due:
            (self.say if self.bar.disable else self.log)(f'step {step}/{self.stop}: {shown}')
            self.scalars(step, {
                'train/loss': loss, 'train/learning rate': lrate, **{f'psnr/train {name}': x for name, x in psnrs.items()},
                'speed/rays per second': rate, 'speed/seconds per step': seconds,
                'health/memory, GiB': memory_gib(self.device), 'health/restarts': health.restarts,
                'health/steps left out': health.bad_steps})
            self.train_seconds, self.timed_steps, self.timed_rays = 0.0, 0, 0.0

    def scalars(self, step, values):
        """A dict of numbers to TensorBoard."""
        for name, value in values.items():
            self.board.add(step, summary.scalar(name, value))

    def image(self, step, name, picture):
        """A picture [H, W, 3] in [0, 1] to TensorBoard."""
        self.board.add(step, summary.image(name, np.asarray(picture, np.float32), dataformats='HWC'))

    def attempt(self, what, make, *arguments):
        """`make(*arguments)`; where that fails for want of space, memory or an encoder, say so and go on: None."""
        try:
            return make(*arguments)
        except (OSError, RuntimeError, UserError) as error:
            self.say(f'{what}: not written ({first_line(error)}); training goes on')
            remove_parts(self.folder)
            return None

    def wrote(self, what, path):
        """Remember the newest output of a kind for the closing lines."""
        self.written[what] = path

    def finish(self, keeper):
        """Save the last step if that is not done, end TensorBoard's file, and say where everything is."""
        self.board.close()
        remove_parts(self.folder)  # of a video that was given up, an encoder may have written more
        if self.done > self.start and keeper.saved_step != self.done:
            keeper.save(self.done)
        minutes, seconds = divmod(round(time.perf_counter() - self.began), 60)
        if self.start >= self.stop:
            self.say(f'nothing to do: {self.start} steps are done, and --N_iters is {self.stop}')
        else:
            self.say(f'{self.done} steps done, {minutes} min {seconds} s')
        saved = keeper.newest or 'none'
        if self.done > self.start and keeper.saved_step != self.done:
            saved = f'{saved}; the steps after it are NOT SAVED'
        places = {'checkpoint': saved, **self.written, 'TensorBoard': f'tensorboard --logdir {self.folder}'}
        for what, where in places.items():
            self.say(f'  {what:11} {where}')


def memory_gib(device):
    """Peak memory: of the GPU's tensors, or of the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2 ** 20
    except (OSError, StopIteration):  # not Linux, whose other figure counts the process that started this one too
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float('nan')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on a Mac
    return peak / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


def describe_run(args, scene, device, networks, folder, start, processes=1):
    """The few lines that open a run."""
    parameters = [f'{name} {sum(p.numel() for p in network.parameters()):,}' for name, network in networks.items()]
    views = f'{len(scene.i_train)} train, {len(scene.i_val)} val, {len(scene.i_test)} test'
    samples = f'{args.N_samples} coarse' + (f' + {args.N_importance} fine' if args.N_importance else '') + ' samples'
    rays = f'{args.N_rand} a step'
    if args.occupancy_grid:
        samples = f'{args.N_samples} steps along the diagonal of the box'
        rays = f'{args.N_rand_samples} samples a step, up to {args.N_rand} rays'
    lines = {
        'scene': f'{args.datadir} ({args.dataset_type})',
        'images': f'{views}, {scene.W}×{scene.H}, near {scene.near:.3g}, far {scene.far:.3g}',
        'rays': f'{rays} from {"one image" if args.no_batching else "all images"}, {samples}',
        'networks': ' + '.join(parameters) + ' parameters',
        'device': str(device) if processes == 1 else f'{processes} processes, {device.type} each',
        'logs': f'{folder} ({f"goes on after step {start}" if start else "a new run"})',
    }
    return '\n'.join([args.expname] + [f'  {name:9} {text}' for name, text in lines.items()])


def prepare_folder(folder, args, start, device):
    """Make `folder`, `<basedir>/<expname>`; leave `args.txt`, `config.txt` and `run.json` there, and no temporary files.

    Raises:
      UserError: it cannot be written.
    """
    make_folder(folder)
    remove_parts(folder)
    try:
        write_text(folder / 'args.txt', ''.join(f'{key} = {value}\n' for key, value in listed(args)))
        if args.config is not None:
            write_text(folder / 'config.txt', Path(args.config).read_text())
        starts = [*earlier_starts(folder), this_start(args, start, device)]
        write_text(folder / 'run.json', json.dumps(starts, indent=1) + '\n')
    except OSError as error:
        raise UserError(f'{folder}: cannot write there ({error.strerror})') from None


def earlier_starts(folder):
    """The records of a run that was started before; none that can be read counts as none."""
    try:
        starts = json.loads((folder / 'run.json').read_text())
        return starts if isinstance(starts, list) else []
    except (OSError, ValueError):
        return []


def this_start(args, start, device):
    """How the run was started, and with what."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'command': sys.argv, 'commit': commit, 'seed': args.seed,
        'after_step': start, 'host': platform.node(), 'device': str(device),
        'gpu': torch.cuda.get_device_name(device) if device.type == 'cuda' else None, 'threads': torch.get_num_threads(),
        'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__, 'cuda': torch.version.cuda,
    }


def forward_warnings(console):
    """Let warnings be lines of the console; undone by the `warnings.catch_warnings` around it."""
    warnings.simplefilter('always', UserWarning)
    warnings.showwarning = console.warn
