"""Checkpoints: `<basedir>/<expname>/NNNNNN.tar`, named by the number of steps done.

The keys `global_step`, `network_fn_state_dict`, `network_fine_state_dict` and `optimizer_state_dict` are those of the
established code, whose files load here. Beside them stand `args`, `camera`, `random_state` and `format`.
"""
import os
import pickle
from pathlib import Path

import torch

from errors import UserError, first_line

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


def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU; no code in it is run. `steps_done` is added: the established code's
    `global_step` is one less than that.

    Raises:
      UserError: damaged, or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f'{path}: not a readable checkpoint (it holds more than tensors and plain values)') from None
    except Exception as error:  # zip and tensor errors of many kinds
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)})') from None
    kinds = {'global_step': int, 'network_fn_state_dict': dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f'{path}: found no networks in it, expected a checkpoint of a NeRF')
    for key in ('args', 'camera'):
        state[key] = state[key] if isinstance(state.get(key), dict) else {}
    state['steps_done'] = state['global_step'] + (0 if 'format' in state else 1)
    return state


def restore(path, state, network_fn, network_fine=None, optimizer=None, seed=None):
    """Load the content of a checkpoint into networks and, where it is given, the optimizer; and torch's random state if
    the checkpoint's run had the seed `seed`.

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
            raise UserError(f'{path}: its {key} does not fit what the options ask for '
                            f'({first_line(str(error).strip().splitlines()[-1].strip())})') from None
    if seed is not None and state['args'].get('seed') == seed and 'random_state' in state:
        torch.set_rng_state(state['random_state']['cpu'])
        for index, cuda_state in enumerate(state['random_state']['cuda'][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
