"""What computes, with which precision, and how much of it at once."""
import os

import torch

from errors import UserError, first_line

CPU_ACTIVATIONS = 2 ** 20        # numbers in a layer's output: what stays in a CPU's caches is fastest
CUDA_ACTIVATIONS = 2 ** 26       # 256 MiB of float32: enough to fill a GPU
WIDE = 64                        # on a CPU, narrower layers lose to conversions what bfloat16 gains
SMALLEST_CHUNK = 1024
POINTS_AT_ONCE = {'cpu': 2 ** 18, 'cuda': 2 ** 22}  # samples that are composited together


def pick_device(name):
    """The torch device of `--device`.

    Raises:
      UserError: no such device here.
    """
    if str(name) == 'auto':
        return own_gpu() if torch.cuda.is_available() else torch.device('cpu')
    try:
        device = torch.device(name)
        if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
            return own_gpu()
        if device.type == 'meta':
            raise RuntimeError('a device without memory')
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: not to be had here ({first_line(error)})') from None
    return device


def own_gpu():
    """This process's GPU: the first, or with torchrun the one of its number on this machine.

    Raises:
      UserError: more processes than GPUs.
    """
    if 'LOCAL_RANK' not in os.environ:
        return torch.device('cuda')
    index = int(os.environ['LOCAL_RANK'])
    if index >= torch.cuda.device_count():
        raise UserError(f'found {torch.cuda.device_count()} GPUs, expected one for each process of torchrun; '
                        'lower --nproc_per_node, or give --device cpu')
    torch.cuda.set_device(index)
    return torch.device('cuda', index)


def has_fast_bf16(device):
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = [getattr(torch.cpu, f'_is_{feature}_supported', None) for feature in ('avx512_bf16', 'amx_tile')]
    return device.type == 'cpu' and any(check() for check in supported if check)


def pick_precision(name, device, width):
    """The precision of matrix products for `--precision` on `device`, in layers of `width` channels: fp32, tf32 or bf16.
    TF32 is switched on or off here, for all of torch.

    Raises:
      UserError: TF32 where there is none.
    """
    if name == 'tf32' and (device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f'--precision tf32: found {device}, expected an NVIDIA GPU of the Ampere generation or later')
    torch.set_float32_matmul_precision('high' if name == 'tf32' else 'highest')
    if name == 'auto':
        return 'bf16' if has_fast_bf16(device) and (device.type != 'cpu' or width >= WIDE) else 'fp32'
    return name


def rendering_precision(name, device, width):
    """The precision of rendering for `--precision`: what it names, else float32, screened where that is faster."""
    fast = pick_precision(name, device, width)
    return fast if name != 'auto' else 'screened' if fast == 'bf16' else 'fp32'


def network_chunk(width, device):
    """The most points to send through layers of `width` channels at once."""
    activations = CUDA_ACTIVATIONS if device.type == 'cuda' else CPU_ACTIVATIONS
    return max(SMALLEST_CHUNK, activations // max(width, 1))


def rays_at_once(chunk, samples, device):
    """How many rays of `samples` samples to composite at once, at most `chunk`: memory does not depend on `chunk` then."""
    return max(1, min(chunk, POINTS_AT_ONCE.get(device.type, POINTS_AT_ONCE['cuda']) // max(samples, 1)))
