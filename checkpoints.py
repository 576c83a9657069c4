"""Checkpoints: `<basedir>/<expname>/NNNNNN.tar`, named by the number of steps done.

The keys `global_step`, `network_fn_state_dict`, `network_fine_state_dict` and `optimizer_state_dict` are those of the
established code, whose files load here. Beside them stand `args`, `camera` (the scene's cameras, bounds and path),
`random_state`, `health`, `with_gradient` and `format`.
"""
import contextlib
import io
import pickle
import time
import warnings
import zipfile
from pathlib import Path

import torch

from errors import UserError, first_line
from file_io import remove_parts, written_whole

FORMAT = 1
RETRY_SECONDS = 30.0  # after a save that failed
KEPT_BY_CLOCK = 2     # of the checkpoints that only the clock asked for, the newest so many stay

# Options that may differ between a checkpoint and the run that goes on from it without a word.
FREE_OPTIONS = {'config', 'expname', 'basedir', 'datadir', 'device', 'N_iters', 'no_reload', 'ft_path', 'chunk', 'netchunk',
                'render_only', 'render_test', 'render_factor', 'render_poses', 'i_print', 'i_img', 'i_weights', 'i_testset',
                'i_video', 'save_minutes', 'no_restart', 'testskip', 'pixel_centers', 'precision', 'backward', 'given',
                'exact_render'}
# Options that say what the networks are and how they see: rendering takes those from the checkpoint that are not given.
NETWORK_OPTIONS = ('netdepth', 'netwidth', 'netdepth_fine', 'netwidth_fine', 'use_viewdirs', 'i_embed', 'multires',
                   'multires_views', 'i_embed_views', 'n_levels', 'n_features', 'log2_hashmap_size', 'finest_res',
                   'occupancy_grid', 'N_samples', 'N_importance', 'white_bkgd', 'lindisp', 'dataset_type', 'no_ndc',
                   'half_res', 'factor', 'spherify', 'near', 'far', 'pixel_centers', 'datadir', 'expname', 'seed',
                   'llffhold', 'testskip')
# Options that decide the image size and the cameras.
SCENE_OPTIONS = ('dataset_type', 'half_res', 'factor', 'no_ndc', 'spherify')


# --- reading ----------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU; no code in it is run. `steps_done` is added: the established code's
    `global_step` is one less than that.

    Raises:
      UserError: damaged, or not a checkpoint.
      OSError: cannot be read.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of odd pickles; what matters is an error below
            if zipfile.is_zipfile(file):     # torch itself reads past a wrong checksum
                damaged = zipfile.ZipFile(file).testzip()
                if damaged:
                    raise ValueError(f'wrong checksum of {damaged}')
            file.seek(0)
            state = torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f'{path}: not a readable checkpoint (it holds more than tensors and plain values)') from None
    except MemoryError:  # the file may be good
        raise
    except Exception as error:  # zip and tensor errors of many kinds
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)})') from None
    kinds = {'global_step': int, 'network_fn_state_dict': dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f'{path}: found no networks in it, expected a checkpoint of a NeRF')
    for key in ('args', 'camera', 'health', 'with_gradient'):
        state[key] = state[key] if isinstance(state.get(key), dict) else {}
    state['steps_done'] = state['global_step'] + (0 if 'format' in state else 1)
    return state


def load_newest(folder):
    """The newest checkpoint in `folder` that can be read: its path and content, or (None, None). One that is damaged is
    named, set aside as `NNNNNN.tar.damaged`, and the one before is tried."""
    found = [path for path in Path(folder).glob('*.tar') if path.stem.isdigit()]
    for path in sorted(found, key=lambda path: int(path.stem), reverse=True):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            warnings.warn(f'{error}; it is set aside as {path.name}.damaged', stacklevel=2)
            with contextlib.suppress(OSError):  # a folder that cannot be written
                path.rename(path.with_name(path.name + '.damaged'))
    if found:
        warnings.warn(f'{folder}: no checkpoint there can be read', stacklevel=2)
    return None, None


def load_checkpoint(args):
    """The checkpoint to start from: `--ft_path`, else the newest of the experiment; path and content, or (None, None).

    Raises:
      UserError: the file of `--ft_path` is not there or damaged.
    """
    if args.no_reload and not args.render_only:
        return None, None
    if args.ft_path and args.ft_path != 'None':
        if not Path(args.ft_path).is_file():
            raise UserError(f'--ft_path: found no file {args.ft_path}')
        return Path(args.ft_path), read_checkpoint(args.ft_path)
    return load_newest(Path(args.basedir, args.expname or ''))


def changed_options(args, state, keys=None):
    """Options that are other than in the checkpoint: 'N_rand 512 (was 1024)', …; of `keys`, or of all that matter."""
    then = state['args']
    keys = keys or [key for key in sorted(vars(args)) if key not in FREE_OPTIONS]
    changed = [key for key in keys if key in then and then[key] != getattr(args, key)]
    return [f'{key} {getattr(args, key)} (was {then[key]})' for key in changed]


def adopt_options(args, state):
    """For rendering from a checkpoint alone: options that are not given take the checkpoint's value."""
    for key in NETWORK_OPTIONS:
        if key in state['args'] and key not in args.given:
            setattr(args, key, state['args'][key])


def restore(path, state, network_fn, network_fine=None, optimizer=None, changed=()):
    """Load the content of a checkpoint into networks and, where it is given, the optimizer.

    Args:
      changed: options that differ, to be named where it does not fit.

    Raises:
      UserError: the networks are of another kind than the options ask for.
    """
    parts = {'network_fn_state_dict': network_fn, 'network_fine_state_dict': network_fine, 'optimizer_state_dict': optimizer}
    for key, part in parts.items():
        if part is None:
            continue
        if key not in state:
            raise UserError(f'{path}: found no {key}, expected one for these options')
        try:
            part.load_state_dict(state[key])
        except Exception as error:  # missing, superfluous or other shapes; the last line names one
            reason = ', '.join(changed) or str(error).strip().splitlines()[-1].strip()
            raise UserError(f'{path}: its {key} does not fit what the options ask for ({reason})') from None


def restore_random_state(state, seed):
    """Let torch draw what the checkpoint's run would have drawn next, if that run had the seed `seed`."""
    if state['args'].get('seed') == seed and 'random_state' in state:
        torch.set_rng_state(state['random_state']['cpu'])
        for index, cuda_state in enumerate(state['random_state']['cuda'][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)


def trained_pixel_centers(args, path, state):
    """Whether the networks of a checkpoint know rays through pixel centres: that goes on, whatever the options say."""
    pixel_centers = bool(state['camera'].get('pixel_centers', False))
    if pixel_centers != args.pixel_centers:
        warnings.warn(f'{path} was trained with rays through pixel {"centres" if pixel_centers else "corners"}; '
                      'that goes on', stacklevel=3)
    return pixel_centers


# --- writing ----------------------------------------------------------------------------------------------------

def save_checkpoint(path, step, network_fn, network_fine, optimizer, args, camera, health=None, with_gradient=None):
    """Write a checkpoint after `step` steps, whole or not at all.

    Args:
      network_fine: may be None.
      args: the options.
      camera: what rendering needs of the scene, plain numbers and tensors.
      health: state of the run's `Health`.
      with_gradient: share of the samples that had a gradient, by network.
    """
    state = {
        'global_step': step,
        'network_fn_state_dict': network_fn.state_dict(),
        'optimizer_state_dict': optimizer.state_dict(),
        'random_state': {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state_all()},
        'args': {key: value for key, value in vars(args).items() if isinstance(value, (str, int, float, list, type(None)))},
        'camera': camera,
        'health': health or {},
        'with_gradient': with_gradient or {},
        'format': FORMAT,
    }
    if network_fine is not None:
        state['network_fine_state_dict'] = network_fine.state_dict()
    content = io.BytesIO()  # a write that fails is an OSError only if the file is Python's own
    torch.save(state, content)
    with written_whole(path) as part:
        part.write_bytes(content.getbuffer())


class CheckpointKeeper:
    """Saves a run's checkpoints by step and by clock, and again later if that fails.

    Args:
      folder: where they go.
      every: a checkpoint every so many steps, and
      minutes: whenever so long has passed since the last.
      last: the run's last step, which is saved too.
      write: a function (path, step) that writes one, raising OSError where it cannot.
      say: called with a line where a save fails.
      newest: the checkpoint that the run started from, if any.
      idle: nothing is ever due: another process saves.
    """

    def __init__(self, folder, every, minutes, last, write, say, newest=None, idle=False):
        self.folder, self.every, self.minutes, self.last, self.write, self.say = folder, every, minutes, last, write, say
        self.saved_at, self.retry_at, self.by_clock, self.newest = time.monotonic(), None, [], newest
        self.saved_step, self.idle = None, idle

    def path(self, step):
        """Where the checkpoint of a step is."""
        return self.folder / f'{step:06d}.tar'

    def read_newest(self):
        """Path and content of the newest checkpoint, or (None, None)."""
        return self.newest, None if self.newest is None else read_checkpoint(self.newest)

    def due(self, step, well=True):
        """Whether a checkpoint should be written after this step; the last step's always, others only if all is well."""
        now = time.monotonic()
        wanted = (step % self.every == 0 or now - self.saved_at > 60 * self.minutes
                  or (self.retry_at is not None and now > self.retry_at))
        return not self.idle and (step == self.last or (wanted and well))

    def save(self, step):
        """Write `NNNNNN.tar`; returns its path, or None where that failed, which is said."""
        path = self.path(step)
        try:
            self.write(path, step)
        except OSError as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            self.saved_at = time.monotonic()
            again = '' if step == self.last else '; training goes on, and it is tried again'
            self.say(f'{path}: not written ({error.strerror}){again}')
            remove_parts(self.folder)
            return None
        self.saved_at, self.retry_at, self.newest, self.saved_step = time.monotonic(), None, path, step
        if step % self.every and step != self.last:
            self.by_clock.append(path)
            for old in self.by_clock[:-KEPT_BY_CLOCK]:
                old.unlink(missing_ok=True)
            self.by_clock = self.by_clock[-KEPT_BY_CLOCK:]
        return path
