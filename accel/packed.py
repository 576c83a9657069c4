"""Volume rendering of packed samples: the samples of all rays in one list, ray after ray, any number for each.

  offsets      [N_rays + 1] the samples of ray n are offsets[n] … offsets[n + 1] - 1
  ray_indices  [M]          the ray of each sample
  lengths      [N_rays]     the length of a ray's samples, in the units in which the density counts

A ray ends where its transmittance falls below MIN_TRANSMITTANCE: samples behind that point have no weight and no gradient.
"""
import math
from typing import NamedTuple

import torch

from accel.kernels.compiled import call, compiled

# The transmittance at which a ray ends.
MIN_TRANSMITTANCE = 1e-4
# The same as an optical depth.
MAX_OPTICAL_DEPTH = -math.log(MIN_TRANSMITTANCE)
# Numbers that are composited for a ray: red, green, blue, opacity, depth.
CHANNELS = 5


class PackedSamples(NamedTuple):
    """The samples of a batch of rays, for losses on their distribution."""
    weights: torch.Tensor      # [M], with gradient
    t_starts: torch.Tensor     # [M], in units of rays_d
    t_ends: torch.Tensor       # [M]
    ray_indices: torch.Tensor  # [M]
    num_rays: int

    @classmethod
    def cat(cls, parts):
        """The samples of several batches as one, rays numbered on."""
        before = [sum(part.num_rays for part in parts[:i]) for i in range(len(parts))]
        indices = [part.ray_indices + start for part, start in zip(parts, before)]
        joined = (torch.cat([part[i] for part in parts]) for i in range(3))
        return cls(*joined, torch.cat(indices), sum(part.num_rays for part in parts))


def composite(raw, t, ray_indices, lengths, offsets):
    """Colour, opacity and depth of rays, and the weights of their samples: Eq. 3 without the interval to infinity.

    Args:
      raw: colour logits and density before its ReLU [M, 4].
      t: positions of the samples along the rays [M].
      ray_indices, lengths, offsets: see above.
    Returns:
      [N_rays, 5]: red, green, blue, opacity, and depth, the sum of weights times t; weights [M].
    """
    if raw.device.type == 'cpu' and compiled('occupancy') is not None:
        return CompiledComposite.apply(raw.contiguous(), t, lengths, offsets)
    return composite_reference(raw, t, ray_indices, lengths, offsets)


def composite_reference(raw, t, ray_indices, lengths, offsets, optical_depth=None):
    """The reference implementation. `optical_depth` [N_rays] is that in front of the samples, 0 if not given."""
    optical = torch.relu(raw[:, 3]) * lengths[ray_indices]
    total = torch.cat([optical.new_zeros(1, dtype=torch.float64), optical.double().cumsum(0)])
    before = (total[:-1] - total[offsets[:-1]][ray_indices]).to(optical.dtype)
    if optical_depth is not None:
        before = before + optical_depth[ray_indices]
    visible = ~(before.detach() > MAX_OPTICAL_DEPTH)  # NaN counts as visible
    weights = torch.where(visible, torch.exp(-before) * (1 - torch.exp(-optical)), torch.zeros_like(optical))
    values = torch.cat([torch.sigmoid(raw[:, :3]), torch.ones_like(t)[:, None], t[:, None]], -1)    # [M, 5]
    return raw.new_zeros(len(lengths), CHANNELS).index_add(0, ray_indices, weights[:, None] * values), weights


def composite_onto(raw, t, ray_indices, lengths, offsets, optical_depth, out):
    """Composite further samples of rays behind those that are done; without gradients.

    Args:
      optical_depth: so far [N_rays].
      out: result of `composite` so far [N_rays, 5].
      others: as in `composite`.
    Returns:
      out, optical_depth: with these samples.
    """
    if raw.device.type == 'cpu' and compiled('occupancy') is not None:
        call('occupancy', 'composite', raw.contiguous(), t, lengths, offsets, len(lengths), MAX_OPTICAL_DEPTH,
             optical_depth, out, None)
        return out, optical_depth
    further, _ = composite_reference(raw, t, ray_indices, lengths, offsets, optical_depth)
    optical = torch.relu(raw[:, 3]) * lengths[ray_indices]
    return out + further, optical_depth.index_add(0, ray_indices, optical)


class CompiledComposite(torch.autograd.Function):
    """`composite` by `occupancy.c`."""

    @staticmethod
    def forward(ctx, raw, t, lengths, offsets):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw, t, lengths, offsets)
        out, weights, optical_depth = raw.new_zeros(len(lengths), CHANNELS), torch.zeros_like(t), torch.zeros_like(lengths)
        call('occupancy', 'composite', raw, t, lengths, offsets, len(lengths), MAX_OPTICAL_DEPTH, optical_depth, out,
             weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_weights):
        raw, t, lengths, offsets = ctx.saved_tensors
        grad_raw = torch.zeros_like(raw)
        grad_out = raw.new_zeros(len(lengths), CHANNELS) if grad_out is None else grad_out.contiguous()
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        call('occupancy', 'composite_gradient', raw, t, lengths, offsets, len(lengths), MAX_OPTICAL_DEPTH, grad_out,
             grad_weights, grad_raw)
        return grad_raw, None, None, None
