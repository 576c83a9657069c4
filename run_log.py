"""What a person sees of a run: the lines at its start, the progress bar, TensorBoard."""
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError
from outputs import make_folder

BAR = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
REFRESH_SECONDS = 1.0  # reading the loss waits for a GPU; the bar does it no more often than this


class RunLog:
    """Progress of a training run on the console and in TensorBoard.

    Args:
      folder: where the TensorBoard file goes, and where the outputs are.
      start, stop: the run goes on after step `start` and ends after `stop`.
      rays_per_step: for the rays a second.
      name: what the bar says first.
    """

    def __init__(self, folder, start, stop, rays_per_step, name):
        self.folder, self.start, self.stop, self.rays_per_step = folder, start, stop, rays_per_step
        self.writer = SummaryWriter(str(folder))
        self.bar = tqdm(total=stop, initial=start, desc=name, disable=None, dynamic_ncols=True, bar_format=BAR)
        self.train_seconds, self.timed_steps, self.refreshed = 0.0, 0, 0.0
        self.began, self.written = time.perf_counter(), {}

    def steps(self):
        """The numbers of the steps to do; the time from a step's start to its `step_done` counts as training."""
        for step in range(self.start + 1, self.stop + 1):
            self.step_start = time.perf_counter()
            yield step
            self.bar.update()
        self.bar.close()

    def say(self, message):
        """A line on the console, above the bar."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def step_done(self, step, numbers, lrate, every):
        """To be called when a step's update is made.

        Args:
          numbers: a function that returns this step's loss and PSNRs; called only when they are shown.
          lrate: learning rate of the step.
          every: TensorBoard, and a console without a bar, get the numbers every so many steps.
        """
        now = time.perf_counter()
        due = step % every == 0 or step == self.stop
        show = due or (not self.bar.disable and now - self.refreshed > REFRESH_SECONDS)
        found = numbers() if show else None
        now = time.perf_counter()
        self.train_seconds += now - self.step_start
        self.timed_steps += 1
        if not show:
            return
        self.refreshed = now
        speed = self.timed_steps * self.rays_per_step / self.train_seconds
        shown = f'loss {found["loss"]:.4f}, PSNR {found["psnr"]:.2f}, {speed:,.0f} rays/s'
        self.bar.set_postfix_str(shown)
        if due:
            if self.bar.disable:
                self.say(f'step {step}/{self.stop}: {shown}')
            self.scalars(step, {f'train/{name}': value for name, value in found.items()})
            self.scalars(step, {'train/learning rate': lrate, 'speed/rays per second': speed})
            self.train_seconds, self.timed_steps = 0.0, 0

    def scalars(self, step, values):
        """A dict of numbers to TensorBoard."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step, name, picture):
        """A picture [H, W, 3] in [0, 1] to TensorBoard."""
        self.writer.add_image(name, picture, step, dataformats='HWC')

    def wrote(self, what, path):
        """Remember the newest output of a kind for the closing lines."""
        self.written[what] = path

    def close(self):
        """End TensorBoard's file, and say where everything is."""
        self.writer.close()
        minutes, seconds = divmod(round(time.perf_counter() - self.began), 60)
        if self.start >= self.stop:
            print(f'nothing to do: {self.start} steps are done, and --N_iters is {self.stop}')
        else:
            print(f'{self.stop} steps done, {minutes} min {seconds} s for {self.stop - self.start} of them')
        for what, path in {**self.written, 'TensorBoard': f'tensorboard --logdir {self.folder}'}.items():
            print(f'  {what:11} {path}', flush=True)


def describe_run(args, scene, device, network_fn, network_fine, folder, start):
    """The few lines that open a run."""
    def parameters(network):
        return f'{sum(p.numel() for p in network.parameters()):,}'

    views = f'{len(scene.i_train)} train, {len(scene.i_val)} val, {len(scene.i_test)} test'
    samples = f'{args.N_samples} coarse' + (f' + {args.N_importance} fine' if args.N_importance else '') + ' samples'
    networks = f'coarse {parameters(network_fn)}' + (f' + fine {parameters(network_fine)}' if network_fine else '')
    lines = {
        'scene': f'{args.datadir} ({args.dataset_type})',
        'images': f'{views}, {scene.W}×{scene.H}, near {scene.near:.3g}, far {scene.far:.3g}',
        'rays': f'{args.N_rand} a step from {"one image" if args.no_batching else "all images"}, {samples}',
        'networks': f'{networks} parameters',
        'device': str(device),
        'logs': f'{folder} ({f"goes on after step {start}" if start else "a new run"})',
    }
    return '\n'.join([args.expname] + [f'  {name:9} {text}' for name, text in lines.items()])


def prepare_folder(args):
    """Make `<basedir>/<expname>` and leave `args.txt` and `config.txt` there.

    Raises:
      UserError: it cannot be written.
    """
    folder = make_folder(Path(args.basedir, args.expname))
    try:
        (folder / 'args.txt').write_text(''.join(f'{key} = {value}\n' for key, value in sorted(vars(args).items())))
        if args.config is not None:
            (folder / 'config.txt').write_text(Path(args.config).read_text())
    except OSError as error:
        raise UserError(f'{folder}: cannot write there ({error.strerror})') from None
    return folder
