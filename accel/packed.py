"""Volume rendering of packed samples: those of all rays in one list, ray after ray, as many of each as there are.

  first   [N_rays + 1] the samples of ray n are first[n] … first[n + 1] - 1
  length  [N_rays]     what a sample of the ray stands for, in the units in which the density counts

A ray ends where its transmittance falls below LEAST_TRANSMITTANCE: no sample behind that counts or has a gradient.
"""
import math

import torch

from accel.compiled import call, compiled

LEAST_TRANSMITTANCE = 1e-4
MOST_PASSED = -math.log(LEAST_TRANSMITTANCE)  # optical depth
CHANNELS = 5                                  # red, green, blue, opacity, depth


def composite(raw, t, ray_index, length, first):
    """Colour, opacity and depth of rays, Eq. 3 without the interval to infinity.

    Args:
      raw: colour logits and density before its ReLU of the samples [M, 4].
      t: their positions along the rays [M].
      ray_index: their rays [M].
      length, first: see above.
    Returns:
      [N_rays, 5]: red, green, blue, opacity, and depth, the sum of weights times t.
    """
    if raw.device.type == 'cpu' and compiled('occupancy') is not None:
        return CompiledComposite.apply(raw.contiguous(), t, length, first)
    return composite_plain(raw, t, ray_index, length, first)


def composite_plain(raw, t, ray_index, length, first, passed=None):
    """The plain twin. `passed` [N_rays] is the optical depth before the first sample, 0 if not given."""
    optical = torch.relu(raw[:, 3]) * length[ray_index]
    total = torch.cat([optical.new_zeros(1, dtype=torch.float64), optical.double().cumsum(0)])
    before = (total[:-1] - total[first[:-1]][ray_index]).to(optical.dtype)
    if passed is not None:
        before = before + passed[ray_index]
    seen = ~(before.detach() > MOST_PASSED)  # NaN too
    weights = torch.where(seen, torch.exp(-before) * (1 - torch.exp(-optical)), torch.zeros_like(optical))
    values = torch.cat([torch.sigmoid(raw[:, :3]), torch.ones_like(t)[:, None], t[:, None]], -1)    # [M, 5]
    return raw.new_zeros(len(length), CHANNELS).index_add(0, ray_index, weights[:, None] * values)


def composite_onto(raw, t, ray_index, length, first, passed, out):
    """Go on with rays of which a part is composited.

    Args:
      passed: optical depth so far [N_rays].
      out: what `composite` gave so far [N_rays, 5].
      others: as in `composite`.
    Returns:
      out, passed: with these samples.
    """
    if raw.device.type == 'cpu' and compiled('occupancy') is not None:
        call('occupancy', 'composite', raw.contiguous(), t, length, first, len(length), MOST_PASSED, passed, out)
        return out, passed
    optical = torch.relu(raw[:, 3]) * length[ray_index]
    return (out + composite_plain(raw, t, ray_index, length, first, passed), passed.index_add(0, ray_index, optical))


class CompiledComposite(torch.autograd.Function):
    """`composite` by `occupancy.c`."""

    @staticmethod
    def forward(ctx, raw, t, length, first):
        ctx.save_for_backward(raw, t, length, first)
        out, passed = raw.new_zeros(len(length), CHANNELS), raw.new_zeros(len(length))
        call('occupancy', 'composite', raw, t, length, first, len(length), MOST_PASSED, passed, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        raw, t, length, first = ctx.saved_tensors
        grad_raw, grad_out = torch.zeros_like(raw), grad_out.contiguous()
        call('occupancy', 'composite_gradient', raw, t, length, first, len(length), MOST_PASSED, grad_out, grad_raw)
        return grad_raw, None, None, None
