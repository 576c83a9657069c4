"""Progress of a training run: progress bar, printed lines, TensorBoard."""
import contextlib
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scenes.errors import first_line
from scenes.files import remove_partial_files
from training.options import plain_options

# The progress bar shows its name, percentage, steps, times and the latest figures.
BAR_FORMAT = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
# The figures of the progress bar are read no more often than this many seconds, because reading waits for a
# GPU.
REFRESH_SECONDS = 1.0
# After a failed write, TensorBoard's next file is opened this many seconds later.
TENSORBOARD_RETRY_SECONDS = 60.0
# TensorBoard shows the PSNR of both networks, on training rays and on the held-out view, in one chart.
CHARTS = {'PSNR': {'train and held-out': [
    'Multiline', [f'psnr/{split} {name}' for split in ('train', 'held-out') for name in ('coarse', 'fine')]]}}


# --- TensorBoard --------------------------------------------------------------------------------------------

def _hide_writer_errors(arguments):
    """A `threading.excepthook` without tracebacks of SummaryWriter's thread: the error that ends it is raised
    again in the main thread."""
    if not type(arguments.thread).__module__.startswith('tensorboard'):
        threading.__excepthook__(arguments)


class TensorBoard:
    """A SummaryWriter that cannot end a run: a failed write, as on a full disk, is reported in one line, and
    after TENSORBOARD_RETRY_SECONDS a new file is opened.

    Args:
      folder: where the files go; None to write nothing.
      say: called with a line when a write fails.
    """

    def __init__(self, folder, say):
        self.folder, self.say, self.writer, self.retry_at = folder, say, None, 0.0
        self.previous_hook = threading.excepthook
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
            self.retry_at = time.monotonic() + TENSORBOARD_RETRY_SECONDS

    def close(self):
        """Write what is pending, if possible."""
        with contextlib.suppress(Exception):
            if self.writer is not None:
                self.writer.close()
        self.writer = None

    def finish(self):
        """Close the file for good."""
        self.close()
        threading.excepthook = self.previous_hook


# --- training -----------------------------------------------------------------------------------------------

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
        self.folder, self.device = folder, device
        self.args, self.start, self.steps_done = args, start, start
        self.say, self.log, self.tensorboard = console.say, console.log, TensorBoard(folder, console.say)
        no_bar = True if folder is None else None  # None: no bar unless on a terminal
        self.bar = tqdm(total=args.N_iters, initial=start, desc=args.expname, disable=no_bar,
                        dynamic_ncols=True, bar_format=BAR_FORMAT)
        self.seconds, self.timed_steps, self.timed_rays = 0.0, 0, 0.0  # since the last printed line
        self.started_at, self.shown_at = time.perf_counter(), 0.0
        self.outputs = {}  # the newest output of each kind
        options = ''.join(f'    {key} = {value}\n' for key, value in plain_options(args))
        self.tensorboard.call(SummaryWriter.add_text, 'options', options, start)
        self.tensorboard.call(SummaryWriter.add_custom_scalars, CHARTS)

    def steps(self):
        """Yield the numbers of the steps to do. The time until `finish_step` counts as training."""
        with self.bar:
            step = self.start
            while step < self.args.N_iters:  # which --minutes changes
                step += 1
                self.step_began_at = time.perf_counter()
                yield step
                self.bar.total = self.args.N_iters
                self.bar.update()

    def finish_step(self, step, num_rays, measures, lrate, safeguards):
        """Called after the update of a step: prints and logs it if that is due.

        Args:
          step: its number, from 1.
          num_rays: number of its rays, in all processes.
          measures: its `Measures`; read only when they are shown, because that waits for a GPU.
          lrate: its learning rate.
          safeguards: `Safeguards`, whose counts are logged.
        """
        self.steps_done = step
        due = step % self.args.i_print == 0 or step == self.args.N_iters
        refresh = not self.bar.disable and time.perf_counter() - self.shown_at > REFRESH_SECONDS
        show = self.folder is not None and (due or refresh)
        losses = {name: float(loss) for name, loss in measures.losses.items()} if show else {}
        now = time.perf_counter()
        self.seconds += now - self.step_began_at
        self.timed_steps, self.timed_rays = self.timed_steps + 1, self.timed_rays + num_rays
        if not show:
            return

        self.shown_at = now
        loss, rays_per_second = sum(losses.values()), self.timed_rays / self.seconds
        psnrs = {name: -10 * math.log10(max(float(error), 1e-10)) for name, error in measures.errors.items()}
        line = f'loss {loss:.4f}, PSNR {list(psnrs.values())[-1]:.2f}, {rays_per_second:,.0f} rays/s'
        self.bar.set_postfix_str(line)
        if due:
            (self.say if self.bar.disable else self.log)(f'step {step}/{self.args.N_iters}: {line}')
            self.scalars(step, {
                'train/loss': loss, 'train/learning rate': lrate,
                **{f'loss/{name}': term for name, term in losses.items()},
                **{f'psnr/train {name}': psnr for name, psnr in psnrs.items()},
                'speed/rays per second': rays_per_second,
                'speed/seconds per step': self.seconds / self.timed_steps,
                'health/memory, GiB': memory_gib(self.device),
                'health/restarts': safeguards.restarts,
                'health/skipped steps': safeguards.bad_steps})
            self.tensorboard.call(SummaryWriter.flush)  # a killed process loses nothing before this step
            self.seconds, self.timed_steps, self.timed_rays = 0.0, 0, 0.0

    def scalars(self, step, values):
        """Add a dict name -> number to TensorBoard."""
        for name, value in values.items():
            self.tensorboard.call(SummaryWriter.add_scalar, name, value, step)

    def image(self, step, name, image):
        """Add an image [H, W, 3] in [0, 1] to TensorBoard."""
        image = np.asarray(image, np.float32)
        self.tensorboard.call(SummaryWriter.add_image, name, image, step, dataformats='HWC')

    def record_output(self, what, path):
        """Remember the newest output of a kind for the closing lines."""
        self.outputs[what] = path

    def finish(self, checkpoint, saved, processes):
        """End the run and say where everything is.

        Args:
          checkpoint: path of the newest checkpoint, or None.
          saved: whether it is that of the last step.
          processes: a `Processes`.
        """
        self.tensorboard.finish()
        if self.folder is None:
            return
        if processes.lost:
            self.say('another process of this run has ended; stopping')
        remove_partial_files(self.folder)  # an encoder may have continued a video that was given up
        minutes, seconds = divmod(round(time.perf_counter() - self.started_at), 60)
        if self.steps_done == self.start and self.start >= self.args.N_iters:
            self.say(f'nothing to do: {self.start} steps are done, and --N_iters is {self.args.N_iters}')
        else:
            self.say(f'{self.steps_done} steps done, {minutes} min {seconds} s')
        unsaved = '' if saved else '; the steps after it are NOT SAVED'
        places = {'checkpoint': f'{checkpoint or "none"}{unsaved}', **self.outputs,
                  'TensorBoard': f'tensorboard --logdir {self.folder}'}
        for what, where in places.items():
            self.say(f'  {what:11} {where}')


def memory_gib(device):
    """Peak memory in GiB: of the tensors on a GPU, otherwise of the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2 ** 20
    except (OSError, StopIteration):  # not Linux, where ru_maxrss includes the parent process
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float('nan')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; bytes on macOS
    return peak / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)
