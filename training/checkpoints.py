"""Checkpoints `<basedir>/<expname>/NNNNNN.tar`, named by the number of steps done.

nerf-pytorch's keys are `global_step`, `network_fn_state_dict`, `network_fine_state_dict`,
`optimizer_state_dict`. The others are `renderer_state_dict`, `ray_sampler_state_dict`,
`safeguards_state_dict`, `random_state`, `args`, `camera` (cameras, bounds and path of the scene),
`seconds` (that the run has taken) and `format`. Older files are converted when they are read.
"""
import contextlib
import io
import pickle
import sys
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch

from scenes.errors import UserError, first_line
from scenes.files import atomic_write, remove_partial_files
from training.options import options_that_affect, plain_options

# The version of the layout: 2 is current, 1 older; files of nerf-pytorch have none.
FORMAT = 2
# These parts must be in a checkpoint; the others are loaded if they are there.
REQUIRED_PARTS = ('network_fn', 'network_fine', 'optimizer')
# Only option values of these types are saved, so that the file can be read without running code.
PLAIN_TYPES = (str, int, float, list, type(None))
# A failed save is retried after this many seconds.
SAVE_RETRY_SECONDS = 30.0
# Of the checkpoints saved only because of --save_minutes, this many of the newest are kept.
TIMED_CHECKPOINTS_KEPT = 2


class DamagedCheckpoint(UserError):
    """A checkpoint file that is not complete, or not a checkpoint."""


# --- reading ------------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """Read a checkpoint file to the CPU, without running any code in it.

    Returns:
      state: dict with the keys of the file and `steps_done`; nerf-pytorch's `global_step` is one less.
    Raises:
      DamagedCheckpoint: the file is damaged or not a checkpoint.
      UserError: the file holds objects that might run code, or has a newer format.
      OSError: the file cannot be read.
    """
    file = io.BytesIO(Path(path).read_bytes())
    is_zip = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about odd pickles; real problems are errors
            if is_zip:                       # torch itself ignores checksums
                damaged = zipfile.ZipFile(file).testzip()
                if damaged:
                    raise ValueError(f'wrong checksum of {damaged}')
            file.seek(0)
            state = torch.load(file, map_location='cpu', weights_only=True)
    except MemoryError:  # the file may be good
        raise
    except Exception as error:  # zip and torch raise errors of many types
        if is_zip and isinstance(error, pickle.UnpicklingError):  # its checksums are right
            raise UserError(f'{path}: not a readable checkpoint (it holds more than tensors and plain '
                            'values)') from None
        raise DamagedCheckpoint(f'{path}: not a readable checkpoint ({first_line(error)})') from None
    types = {'global_step': int, 'network_fn_state_dict': dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), types[key]) for key in types):
        raise DamagedCheckpoint(f'{path}: found no networks in it, expected a checkpoint of a NeRF')
    if state.get('format') not in (None, 1, FORMAT):
        raise UserError(f'{path}: found format {state["format"]}, expected at most {FORMAT}; '
                        'it was written by a newer version of this code')
    for key in ('args', 'camera'):
        state[key] = state[key] if isinstance(state.get(key), dict) else {}
    if state['args'].get('dataset_type') == 'blender' and 'check_data' not in state['args']:
        state['args']['factor'] = 1  # it had no effect in older versions
    state['steps_done'] = state['global_step'] + (0 if 'format' in state else 1)
    return state if state.get('format') == FORMAT else convert_older(state)


def convert_older(state):
    """Bring the content of a checkpoint of nerf-pytorch, or of format 1, to today's keys."""
    state = {**state, 'renderer_state_dict': {}}
    state.pop('with_gradient', None)
    safeguards = state.pop('health', None)
    if safeguards:
        state['safeguards_state_dict'] = {**safeguards, 'rollbacks': safeguards.get('returns', 0)}

    # an occupancy grid was part of the network, and held the state of the ray sampler
    network = dict(state['network_fn_state_dict'])
    grid = {key.partition('.')[2]: network.pop(key) for key in list(network) if key.startswith('occupancy.')}
    if grid:
        mean_samples = float(grid.pop('samples_of_a_ray', 0)) or None
        grid['occs'] = grid.pop('opacity')
        state['network_fn_state_dict'] = network
        state['renderer_state_dict'] = {f'grid.{key}': value for key, value in grid.items()}
        num_updates = state['steps_done'] // 16  # the grid was updated every 16 steps
        state['renderer_state_dict']['num_updates'] = torch.tensor(num_updates)
        state['ray_sampler_state_dict'] = {'mean_samples': mean_samples}
    return state


def load_newest(folder):
    """Read the newest checkpoint in `folder`. Damaged ones are renamed to `NNNNNN.tar.damaged` with a
    warning.

    Returns:
      path, state; or (None, None) if there is none that can be read.
    Raises:
      UserError: a file that is not damaged, but cannot be used.
    """
    found = [path for path in Path(folder).glob('*.tar') if path.stem.isdigit()]
    for path in sorted(found, key=lambda path: int(path.stem), reverse=True):
        try:
            return path, read_checkpoint(path)
        except DamagedCheckpoint as error:
            warnings.warn(f'{error}; renamed to {path.name}.damaged', stacklevel=2)
            with contextlib.suppress(OSError):  # a read-only folder
                path.rename(path.with_name(path.name + '.damaged'))
    if found:
        warnings.warn(f'{folder}: none of its checkpoints can be read', stacklevel=2)
    return None, None


def load_checkpoint(args):
    """Read the checkpoint to start from: `--ft_path`, otherwise the newest of the experiment.

    Returns:
      path, state; or (None, None) to start from scratch.
    Raises:
      UserError: the file of `--ft_path` is missing or damaged.
    """
    if args.no_reload and not args.render_only:
        return None, None
    if args.ft_path and args.ft_path != 'None':
        if not Path(args.ft_path).is_file():
            raise UserError(f'--ft_path: found no file {args.ft_path}')
        return Path(args.ft_path), read_checkpoint(args.ft_path)
    return load_newest(Path(args.basedir, args.expname or ''))


def find_checkpoint(args, processes):
    """Path and content of the checkpoint to start from, or (None, None); with --render_only its options are
    adopted.

    Raises:
      UserError: a checkpoint that cannot be used; --render_only without one.
    """
    path, state = processes.from_rank0(partial(load_checkpoint, args))
    if args.render_only:
        if state is None:
            folder = Path(args.basedir, args.expname or '')
            raise UserError(f'--render_only: found no checkpoint in {folder}; '
                            'train first, or give --ft_path FILE')
        adopt_options(args, state)
        if not args.expname:
            raise UserError(f'{path}: found no name of the experiment in it; give --expname NAME')
    return path, state


# --- a checkpoint and the options ---------------------------------------------------------------------------

def changed_options(args, state, *kinds):
    """Describe the options that differ from the checkpoint's: ['N_rand 512 (was 1024)', …].

    Args:
      kinds: what the options affect; by default everything that a resumed run depends on.
    """
    saved = state['args']
    planned = {'lrate_decay'} if args.minutes is not None else {}
    names = options_that_affect(*(kinds or ('networks', 'scene', 'training')))
    changed = [name for name in names if name in saved and saved[name] != getattr(args, name)
               and name not in planned]
    return [f'{name} {getattr(args, name)} (was {saved[name]})' for name in changed]


def adopt_options(args, state):
    """For `--render_only`: set the options that are not given to the checkpoint's values."""
    for name in options_that_affect('networks', 'scene', 'training', 'source'):
        if name in state['args'] and name not in args.given:
            setattr(args, name, state['args'][name])


def warn_of_changes(args, scene, path, state):
    """Warn if the options or the cameras of `scene` differ from those of the checkpoint."""
    if args.render_only:
        changed = changed_options(args, state, 'networks', 'scene', 'source')
    else:
        changed = changed_options(args, state)
        if not scene.has_cameras_of(state['camera']):
            changed.append('other cameras')
    if changed:
        warnings.warn(f'options differ from those of {path}: {", ".join(changed)}', stacklevel=2)


def trained_pixel_centers(args, path, state):
    """Whether the checkpoint was trained with rays through pixel centres. A resumed run keeps that choice;
    warns if --pixel_centers differs."""
    pixel_centers = bool(state['camera'].get('pixel_centers', False))
    if pixel_centers != args.pixel_centers:
        place = 'centres' if pixel_centers else 'corners'
        warnings.warn(f'{path} was trained with rays through pixel {place}, which this run keeps',
                      stacklevel=2)
    return pixel_centers


# --- restoring ----------------------------------------------------------------------------------------------

def restore(path, state, parts, changed=()):
    """Load the content of a checkpoint into the objects of a run.

    Args:
      path, state: as returned by `load_checkpoint`.
      parts: dict name -> object with `load_state_dict`, or None to leave it out.
      changed: descriptions of options that differ, for the error message.
    Raises:
      UserError: a required part is missing, or a part does not fit its object.
    """
    for name, part in parts.items():
        key = f'{name}_state_dict'
        if part is None or (key not in state and name not in REQUIRED_PARTS):
            continue
        if key not in state:
            raise UserError(f'{path}: found no {key}, expected one for these options')
        try:
            part.load_state_dict(state[key])
        except Exception as error:  # missing, unexpected or reshaped entries; the last line names one
            cause = f'these options ({", ".join(changed)})'
            if not changed:
                reason = str(error).strip().splitlines()[-1].strip()
                cause = f'these options or this version of the code ({reason})'
            raise UserError(f'{path}: its {key} does not fit {cause}') from None


def restore_random_state(state, seed, device):
    """Restore torch's random state, so that a resumed run on `device` draws what an uninterrupted one would
    have drawn; unless the checkpoint's run had a different seed."""
    if state['args'].get('seed') == seed and 'random_state' in state:
        torch.set_rng_state(state['random_state']['cpu'])
        if device.type == 'cuda':  # a GPU that is not used is left alone: its driver may be too old for torch
            for cuda_state in state['random_state']['cuda'][:1]:
                torch.cuda.set_rng_state(cuda_state, device)


def networks_of(render_kwargs):
    """The networks in the arguments of `render` by name: {'coarse': …, 'fine': …} or {'coarse': …}."""
    networks = {'coarse': render_kwargs['network_fn'], 'fine': render_kwargs['network_fine']}
    return {name: network for name, network in networks.items() if network is not None}


def checkpoint_parts(render_kwargs, optimizer, **others):
    """What a checkpoint holds, by name: networks, renderer, optimizer and others; None for a part that does
    not exist."""
    return {'network_fn': render_kwargs['network_fn'], 'network_fine': render_kwargs['network_fine'],
            'renderer': render_kwargs['renderer'], 'optimizer': optimizer, **others}


def load_into(args, path, state, render_kwargs, optimizer):
    """Load a checkpoint into networks, renderer, optimizer and torch's random state; returns the number of
    steps done. Rays go through the pixel centres or corners that it was trained with.

    Raises:
      UserError: it fits other networks.
    """
    parts = checkpoint_parts(render_kwargs, None if args.render_only else optimizer)
    restore(path, state, parts, changed_options(args, state, 'networks'))
    restore_random_state(state, args.seed, next(render_kwargs['network_fn'].parameters()).device)
    render_kwargs['pixel_centers'] = trained_pixel_centers(args, path, state)
    return state['steps_done']


# --- writing ------------------------------------------------------------------------------------------------

class Checkpoints:
    """Saves the checkpoints of a run, by step and by time, and retries after a failure.

    Args:
      folder: where the files go.
      parts: dict name -> object with `state_dict`, or None to leave it out. Includes the network
        `network_fn`.
      args: the options.
      camera: what rendering needs to know of the scene, plain numbers and tensors.
      start_path, start: the checkpoint that the run started from and its step; None and 0 for a new run.
      say: called with a line if a save fails.
      is_main: whether this process saves what is due.
      seconds_taken: returns how many seconds the run has taken.
    Attributes:
      newest: path of the newest checkpoint of this run, `start_path` at first.
      saved_step: its step.
    """

    def __init__(self, folder, parts, args, camera, start_path, start, say, is_main,
                 seconds_taken=lambda: 0.0):
        self.folder, self.parts, self.args, self.camera = Path(folder), parts, args, camera
        self.newest, self.saved_step, self.say, self.is_main = start_path, start, say, is_main
        self.seconds_taken, self.saved_at, self.retry_at = seconds_taken, time.monotonic(), None
        self.timed = []  # paths of checkpoints that were saved only because of --save_minutes
        self.missed = False  # whether a checkpoint of --i_weights has failed and is still to be saved

    def path_of(self, step):
        """Where the checkpoint of a step is."""
        return self.folder / f'{step:06d}.tar'

    def read_newest(self):
        """Path and content of the newest checkpoint of this run, or (None, None)."""
        return self.newest, None if self.newest is None else read_checkpoint(self.newest)

    def save_if_due(self, step, is_healthy=lambda: True):
        """Save after `step` if --i_weights, --save_minutes or a retry is due and the run `is_healthy()`, and
        after the last step in any case."""
        now = time.monotonic()
        due = (step % self.args.i_weights == 0 or now - self.saved_at > 60 * self.args.save_minutes
               or (self.retry_at is not None and now > self.retry_at))
        if self.is_main and (step == self.args.N_iters or (due and is_healthy())):
            self.save(step)

    def save(self, step):
        """Write the checkpoint of `step`; any process may call this. Returns its path, or None after a
        failure, which is reported and retried later."""
        path, is_last = self.path_of(step), step == self.args.N_iters
        try:
            self.write(path, step)
        except OSError as error:
            self.saved_at = time.monotonic()
            self.retry_at = self.saved_at + SAVE_RETRY_SECONDS
            self.missed = self.missed or step % self.args.i_weights == 0
            retry = '' if is_last else '; training continues and will retry'
            self.say(f'{path}: not written ({error.strerror}){retry}')
            remove_partial_files(self.folder)
            return None
        self.newest, self.saved_step = path, step
        self.saved_at, self.retry_at = time.monotonic(), None
        was_missed, self.missed = self.missed, False
        if step % self.args.i_weights and not is_last and not was_missed:
            self.timed.append(path)
            for old in self.timed[:-TIMED_CHECKPOINTS_KEPT]:
                with contextlib.suppress(OSError):
                    old.unlink()
            self.timed = self.timed[-TIMED_CHECKPOINTS_KEPT:]
        return path

    def finish(self, step, processes):
        """At the end of a run, save its last step unless that is done. If rank 0 is lost, the lowest
        remaining rank saves. Returns whether the step is saved.

        Args:
          step: number of steps done.
          processes: a `Processes`.
        """
        if step == self.saved_step:
            return True
        if self.is_main:
            return self.save(step) is not None
        if processes.lost and processes.should_save(self.path_of(step)) and self.save(step):
            print(f'process {processes.rank}: saved {self.newest}', file=sys.__stderr__)
        return self.path_of(step).exists()

    def write(self, path, step):
        """Write a checkpoint after `step` steps, all of it or nothing.

        Raises:
          OSError: it cannot be written.
        """
        device = next(self.parts['network_fn'].parameters()).device
        cuda_state = [torch.cuda.get_rng_state(device)] if device.type == 'cuda' else []
        parts = {name: part for name, part in self.parts.items() if part is not None}
        options = {name: value for name, value in plain_options(self.args) if isinstance(value, PLAIN_TYPES)}
        state = {
            'global_step': step,
            **{f'{name}_state_dict': part.state_dict() for name, part in parts.items()},
            'random_state': {'cpu': torch.get_rng_state(), 'cuda': cuda_state},
            'args': options,
            'camera': self.camera,
            'seconds': self.seconds_taken(),
            'format': FORMAT,
        }
        content = io.BytesIO()  # torch's own file writing does not raise OSError
        torch.save(state, content)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getbuffer())
