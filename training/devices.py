"""Which device computes, and with which precision."""
import os
import sys
import warnings

import torch

from run_nerf_helpers import by_device
from scenes.errors import UserError, first_line

# When memory runs out, the number of rays at once is not halved below this.
MIN_RAYS = 256
# Layers narrower than this lose more to conversions than they gain from bfloat16, by type of device.
MIN_BF16_WIDTH = {'cpu': 64, 'cuda': 128}


def pick_device(name):
    """The torch device for `--device`; for 'auto' a GPU if there is one that works, otherwise the CPU.

    Raises:
      UserError: the device is not available.
    """
    if str(name) == 'auto':
        device = own_gpu() if torch.cuda.is_available() else torch.device('cpu')
        problem = problem_of(device)
        if problem:
            warnings.warn(f'this build of torch cannot use the GPU ({problem}); the CPU is used. See '
                          'https://pytorch.org/get-started for builds that support it', stacklevel=2)
            return torch.device('cpu')
        return device
    try:
        device = torch.device(name)
        problem = 'a device without memory' if device.type == 'meta' else None
        if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
            device = own_gpu()
    except RuntimeError as error:
        problem = first_line(error)
    problem = problem or problem_of(device)
    if problem:
        raise UserError(f'--device {name}: not available ({problem})')
    return device


def problem_of(device):
    """Why `device` cannot compute, one line; None if it can. A GPU may be present, but too old for this build
    of torch."""
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None


def own_gpu():
    """The GPU of this process: the default one, or with torchrun the one numbered by LOCAL_RANK.

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
    """Whether `device` multiplies bfloat16 matrices faster than float32 matrices."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = [getattr(torch.cpu, f'_is_{feature}_supported', None) for feature in ('avx512_bf16', 'amx_tile')]
    return device.type == 'cpu' and any(check() for check in checks if check)


def pick_precision(name, device, width):
    """Resolve `--precision` for layers of `width` channels on `device`. Also switches TF32 on or off,
    globally.

    Returns:
      'fp32', 'tf32' or 'bf16'.
    Raises:
      UserError: the device has no TF32.
    """
    if name == 'tf32' and (device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f'--precision tf32: found {device}, '
                        'expected an NVIDIA GPU of the Ampere generation or later')
    torch.set_float32_matmul_precision('high' if name == 'tf32' else 'highest')
    if name != 'auto':
        return name
    wide = width >= by_device(MIN_BF16_WIDTH, device)
    return 'bf16' if wide and has_fast_bf16(device) else 'fp32'


def rendering_precision(name):
    """The precision of frames for --precision: the one it names, and 'fp32' for 'auto'."""
    return 'fp32' if name == 'auto' else name


class MemoryLimit:
    """The most rays to process at once: halved when the memory of a GPU runs out.

    Args:
      max_rays: the limit at first; None for no limit.
      purpose: what the rays are for, for the warning.
      before_retry: called before work is repeated.
    """

    def __init__(self, max_rays, purpose, before_retry=lambda: None):
        self.max_rays, self.purpose, self.before_retry = max_rays or sys.maxsize, purpose, before_retry

    def fit(self, work, num_rays):
        """Returns `work(chunk)` for the first chunk, of at most `num_rays` rays, that fits in memory.

        Raises:
          torch.OutOfMemoryError: MIN_RAYS do not fit.
        """
        while True:
            chunk = min(self.max_rays, num_rays)
            try:
                return work(chunk)
            except torch.OutOfMemoryError:
                if chunk <= MIN_RAYS:
                    raise
            self.max_rays = chunk // 2
            warnings.warn(f'out of GPU memory in {self.purpose}: continuing with --chunk {self.max_rays}',
                          stacklevel=2)
            torch.cuda.empty_cache()
            self.before_retry()
