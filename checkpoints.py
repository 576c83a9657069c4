"""Checkpoints: `<basedir>/<expname>/NNNNNN.tar`, named by the number of steps done.

The keys `global_step`, `network_fn_state_dict`, `network_fine_state_dict` and `optimizer_state_dict` are those of the
established code, whose files load here. Beside them stand `args`, `camera`, `random_state` and `format`.
"""
import os
from pathlib import Path

import torch

from errors import UserError

FORMAT = 1


def find_checkpoint(args):
    """The checkpoint to start from: `--ft_path`, else the newest of the experiment, else None.

    Raises:
      UserError: the file of `--ft_path` is not there.
    """
    if args.no_reload:
        return None
    if args.ft_path and args.ft_path != 'None':
        if not Path(args.ft_path).is_file():
            raise UserError(f'--ft_path: found no file {args.ft_path}')
        return Path(args.ft_path)
    found = [path for path in Path(args.basedir, args.expname).glob('*.tar') if path.stem.isdigit()]
    return max(found, key=lambda path: int(path.stem), default=None)


def save_checkpoint(path, step, network_fn, network_fine, optimizer, args, camera):
    """Write a checkpoint after `step` steps, under a temporary name until it is whole.

    Args:
      network_fine: may be None.
      args: the options.
      camera: what rendering needs of the scene, plain numbers and tensors.
    """
    state = {
        'global_step': step,
        'network_fn_state_dict': network_fn.state_dict(),
        'optimizer_state_dict': optimizer.state_dict(),
        'random_state': {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state_all()},
        'args': {key: value for key, value in vars(args).items() if isinstance(value, (str, int, float, type(None)))},
        'camera': camera,
        'format': FORMAT,
    }
    if network_fine is not None:
        state['network_fine_state_dict'] = network_fine.state_dict()
    path = Path(path)
    part = path.with_name(f'.{path.name}.part')
    try:
        with open(part, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path, device):
    """The content of a checkpoint file, its tensors on `device`; no code in it is run. `steps_done` is added: the
    established code's `global_step` is one less than that.

    Raises:
      UserError: damaged, or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'{path}: not a readable checkpoint ({reason})') from None
    if not isinstance(state, dict) or not {'global_step', 'network_fn_state_dict'} <= state.keys():
        raise UserError(f'{path}: found no networks in it, expected a checkpoint of a NeRF')
    state['steps_done'] = state['global_step'] + (0 if 'format' in state else 1)
    return state


def restore(path, state, network_fn, network_fine, optimizer):
    """Load the content of a checkpoint into networks, optimizer and torch's random state.

    Raises:
      UserError: the networks are of another kind than the options ask for.
    """
    try:
        network_fn.load_state_dict(state['network_fn_state_dict'])
        if network_fine is not None:
            network_fine.load_state_dict(state['network_fine_state_dict'])
        optimizer.load_state_dict(state['optimizer_state_dict'])
    except KeyError as error:
        raise UserError(f'{path}: found no {error.args[0]}, expected one for these options') from None
    except (RuntimeError, ValueError) as error:
        first = [line.strip() for line in str(error).splitlines()][-1]
        raise UserError(f'{path}: does not fit the networks that the options ask for ({first})') from None
    random_state = state.get('random_state')
    if random_state:
        torch.set_rng_state(random_state['cpu'].cpu())
        for index, cuda_state in enumerate(random_state['cuda'][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), index)
