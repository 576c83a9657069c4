"""Loads what a run has trained, for the programs that show it or export it."""
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from run_nerf import frame_renderer, load_scene, prepare
from scenes.errors import UserError, first_line
from scenes.scene import Scene
from training.checkpoints import load_checkpoint
from training.frames import FrameRenderer
from training.options import config_parser
from training.processes import Processes


class Trained(NamedTuple):
    """A trained scene."""
    args: Namespace        # the options that it was trained with
    scene: Scene           # its cameras; `images` is None if the photos were not loaded
    render_kwargs: dict    # arguments of `render`, with near and far
    frames: FrameRenderer  # renders its frames, fast where that is possible
    path: Path             # of the checkpoint
    step: int              # number of steps done


def load_trained(path, options=(), photos=True, say=print):
    """Load a run, ready to render.

    Args:
      path: the folder of a run, whose newest checkpoint is taken, or a checkpoint.
      options: of run_nerf.py, as words of a command line; they override those of the checkpoint.
      photos: load the photos too, if they are on this machine.
      say: called with each line for the user.
    Raises:
      UserError: there is no checkpoint, or it cannot be used.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise UserError(f'{path}: found nothing, expected the folder of a run or a checkpoint')
    folder = path if path.is_dir() else path.parent
    words = ['--render_only', '--basedir', str(folder.parent), '--expname', folder.name, *options]
    if path.is_file():
        words += ['--ft_path', str(path)]
    args, processes = config_parser().parse_args(words), Processes(1)
    _, state = load_checkpoint(args)
    if state is None:
        raise UserError(f'{path}: found no checkpoint, expected one such as 001000.tar')
    if not state['args'] and (folder / 'config.txt').is_file():  # a run of nerf-pytorch
        args = config_parser().parse_args(['--config', str(folder / 'config.txt'), *words])

    scene, (checkpoint, _), kwargs_train, kwargs_test, step, *_ = prepare(args, processes)
    frames = frame_renderer(args, scene, kwargs_train, kwargs_test, processes, None, say)
    if photos and scene.images is None:
        try:
            scene = load_scene(args)
        except (UserError, OSError) as error:
            say(f'The photos are not shown: {first_line(error)}')
    return Trained(args, scene, kwargs_test, frames, checkpoint, step)
