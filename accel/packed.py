"""Volume rendering of packed samples: those of all rays in one list, ray after ray, any number for each.

  offsets      [N_rays + 1] the samples of ray n are offsets[n] … offsets[n + 1] - 1
  ray_indices  [M]          the ray of each sample
  step_sizes   [N_rays]     the length of each sample's interval, in units of the scene

Rays end where their transmittance falls below MIN_TRANSMITTANCE: samples behind that have no weight and no
gradient.
"""
import math
from typing import NamedTuple

import torch

from accel.kernels.compiled import call_kernel, load_kernels

# Rays end where their transmittance falls below this.
MIN_TRANSMITTANCE = 1e-4
# This is MIN_TRANSMITTANCE as an optical depth.
MAX_OPTICAL_DEPTH = -math.log(MIN_TRANSMITTANCE)
# These numbers are composited for a ray: red, green, blue, opacity, depth.
OUT_CHANNELS = 5


class PackedSamples(NamedTuple):
    """The samples of a batch of rays, for losses on their distribution."""
    weights: torch.Tensor      # [M], with gradient
    t_starts: torch.Tensor     # [M], in units of rays_d
    t_ends: torch.Tensor       # [M]
    ray_indices: torch.Tensor  # [M]
    num_rays: int

    @classmethod
    def cat(cls, parts):
        """The samples of several batches as one; their rays are numbered consecutively."""
        first_rays = [sum(part.num_rays for part in parts[:i]) for i in range(len(parts))]
        ray_indices = torch.cat([part.ray_indices + first for part, first in zip(parts, first_rays)])
        joined = (torch.cat([part[i] for part in parts]) for i in range(3))
        return cls(*joined, ray_indices, sum(part.num_rays for part in parts))


def composite(raw, t, ray_indices, step_sizes, offsets):
    """Colour, opacity and depth of rays, and the weights of their samples: Eq. 3 without the interval to
    infinity.

    Args:
      raw: colour logits and density before its ReLU [M, 4].
      t: positions of the samples along the rays [M]; no gradient flows to them.
      ray_indices, step_sizes, offsets: see above.
    Returns:
      [N_rays, 5]: red, green, blue, opacity, and depth, the sum of weights times t; weights [M].
    """
    if raw.device.type == 'cpu' and load_kernels('occupancy') is not None:
        return CompiledComposite.apply(raw.contiguous(), t, step_sizes, offsets)
    return composite_reference(raw, t, ray_indices, step_sizes, offsets)


def composite_reference(raw, t, ray_indices, step_sizes, offsets, optical_depth=None):
    """The reference implementation. `optical_depth` [N_rays] has been accumulated in front of these samples;
    0 if not given."""
    sample_depths = torch.relu(raw[:, 3]) * step_sizes[ray_indices]                   # of each sample [M]
    # sums over the samples in front, by differences of a sum over all rays, which needs float64
    total = torch.cat([sample_depths.new_zeros(1, dtype=torch.float64), sample_depths.double().cumsum(0)])
    in_front = (total[:-1] - total[offsets[:-1]][ray_indices]).to(raw.dtype)
    if optical_depth is not None:
        in_front = in_front + optical_depth[ray_indices]
    visible = ~(in_front.detach() > MAX_OPTICAL_DEPTH)  # NaN counts as visible
    weights = torch.exp(-in_front) * (1 - torch.exp(-sample_depths))
    weights = torch.where(visible, weights, torch.zeros_like(weights))
    values = torch.cat([torch.sigmoid(raw[:, :3]), torch.ones_like(t)[:, None], t[:, None]], -1)  # [M, 5]
    out = raw.new_zeros(len(step_sizes), OUT_CHANNELS).index_add(0, ray_indices, weights[:, None] * values)
    return out, weights


def composite_onto(raw, t, ray_indices, step_sizes, offsets, optical_depth, out):
    """Composite more samples of rays behind those that are done; without gradients.

    Args:
      optical_depth: so far [N_rays]; may be overwritten.
      out: result of `composite` so far [N_rays, 5]; may be overwritten.
      others: as in `composite`.
    Returns:
      out, optical_depth: with these samples.
    """
    if raw.device.type == 'cpu' and load_kernels('occupancy') is not None:
        call_kernel('occupancy', 'composite', raw.contiguous(), t, step_sizes, offsets, len(step_sizes),
                    MAX_OPTICAL_DEPTH, optical_depth, out, None)
        return out, optical_depth
    added, _ = composite_reference(raw, t, ray_indices, step_sizes, offsets, optical_depth)
    sample_depths = torch.relu(raw[:, 3]) * step_sizes[ray_indices]
    return out + added, optical_depth.index_add(0, ray_indices, sample_depths)


class CompiledComposite(torch.autograd.Function):
    """`composite` by `occupancy.c`."""

    @staticmethod
    def forward(ctx, raw, t, step_sizes, offsets):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw, t, step_sizes, offsets)
        N = len(step_sizes)
        out, weights, optical_depth = raw.new_zeros(N, OUT_CHANNELS), torch.zeros_like(t), raw.new_zeros(N)
        call_kernel('occupancy', 'composite', raw, t, step_sizes, offsets, N, MAX_OPTICAL_DEPTH,
                    optical_depth, out, weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_weights):
        raw, t, step_sizes, offsets = ctx.saved_tensors
        grad_raw, N = torch.zeros_like(raw), len(step_sizes)
        grad_out = raw.new_zeros(N, OUT_CHANNELS) if grad_out is None else grad_out.contiguous()
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        call_kernel('occupancy', 'composite_gradient', raw, t, step_sizes, offsets, N, MAX_OPTICAL_DEPTH,
                    grad_out, grad_weights, grad_raw)
        return grad_raw, None, None, None
