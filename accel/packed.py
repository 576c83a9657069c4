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

from accel.kernels.compiled import Kernels

# Rays end where their transmittance falls below this.
MIN_TRANSMITTANCE = 1e-4
# This is MIN_TRANSMITTANCE as an optical depth.
MAX_OPTICAL_DEPTH = -math.log(MIN_TRANSMITTANCE)
# Behind this optical depth the transmittance is 0 in float32.
INVISIBLE_OPTICAL_DEPTH = 104.0
# These numbers are composited for a ray: red, green, blue, opacity, depth.
OUT_CHANNELS = 5


class PackedSamples(NamedTuple):
    """The samples of a batch of rays, for losses on their distribution. Positions and lengths are in units of
    rays_d."""
    weights: torch.Tensor      # [M], with gradient
    t: torch.Tensor            # positions of the samples [M]
    dt: torch.Tensor           # length of the samples' intervals of each ray [N_rays]
    ray_indices: torch.Tensor  # [M]

    @property
    def num_rays(self):
        return len(self.dt)

    @property
    def mean_samples(self):
        """Mean number of samples of a ray."""
        return len(self.t) / self.num_rays

    @property
    def t_starts(self):
        """Where the interval of each sample begins [M]."""
        return self.t - 0.5 * self.dt[self.ray_indices]

    @property
    def t_ends(self):
        """Where it ends [M]."""
        return self.t + 0.5 * self.dt[self.ray_indices]

    @classmethod
    def cat(cls, parts):
        """The samples of several batches as one; their rays are numbered consecutively."""
        first_rays = [sum(part.num_rays for part in parts[:i]) for i in range(len(parts))]
        ray_indices = torch.cat([part.ray_indices + first for part, first in zip(parts, first_rays)])
        return cls(*(torch.cat([part[i] for part in parts]) for i in range(3)), ray_indices)


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
    if KERNELS.usable(raw.device):
        return CompiledComposite.apply(raw.contiguous(), t, step_sizes, 0.0, offsets, MAX_OPTICAL_DEPTH)
    return composite_reference(raw, t, ray_indices, step_sizes[ray_indices], offsets)


def composite_reference(raw, t, ray_indices, lengths, offsets, optical_depth=None):
    """The reference implementation.

    Args:
      lengths: of the samples' intervals [M].
      optical_depth: accumulated in front of these samples [N_rays]; 0 if not given.
      others: as in `composite`.
    """
    sample_depths = torch.relu(raw[:, 3]) * lengths                                   # of each sample [M]
    # sums over the samples in front, in a row for each ray
    column = torch.arange(len(t), device=t.device) - offsets[ray_indices]
    rows = raw.new_zeros(len(offsets) - 1, 1 + max(offsets.diff().tolist(), default=0))
    rows = rows.index_put((ray_indices, column + 1), sample_depths)
    in_front = rows.cumsum(-1)[ray_indices, column]
    if optical_depth is not None:
        in_front = in_front + optical_depth[ray_indices]
    visible = ~(in_front.detach() > MAX_OPTICAL_DEPTH)  # NaN counts as visible
    weights = torch.exp(-in_front) * (1 - torch.exp(-sample_depths))
    weights = torch.where(visible, weights, torch.zeros_like(weights))
    values = torch.cat([torch.sigmoid(raw[:, :3]), torch.ones_like(t)[:, None], t[:, None]], -1)  # [M, 5]
    out = raw.new_zeros(len(offsets) - 1, OUT_CHANNELS).index_add(0, ray_indices, weights[:, None] * values)
    return out, weights


def composite_onto(raw, t, step_sizes, offsets, optical_depth, out, alive=None):
    """Composite more samples of rays behind those that are done; without gradients.

    Args:
      step_sizes: of all rays [N_rays].
      offsets: of the rays in `alive` [A + 1].
      optical_depth: so far [N_rays]; overwritten.
      out: result of `composite` so far [N_rays, 5]; overwritten.
      alive: the rays that these samples belong to [A]; all if not given.
      others: as in `composite`.
    """
    if KERNELS.usable(raw.device):
        A = len(offsets) - 1
        KERNELS.call('composite', A, raw.contiguous(), t, step_sizes, 0.0, offsets, alive, A,
                     MAX_OPTICAL_DEPTH, optical_depth, out, None)
    else:
        composite_onto_reference(raw, t, step_sizes, offsets, optical_depth, out, alive)


def composite_onto_reference(raw, t, step_sizes, offsets, optical_depth, out, alive=None):
    """The reference implementation of `composite_onto`."""
    alive = torch.arange(len(out), device=out.device) if alive is None else alive
    number = torch.repeat_interleave(offsets.diff(), output_size=len(t))  # of each sample's ray, in `alive`
    lengths = step_sizes[alive[number]]
    added, _ = composite_reference(raw, t, number, lengths, offsets, optical_depth[alive])
    out.index_add_(0, alive, added)
    optical_depth.index_add_(0, alive[number], torch.relu(raw[:, 3]) * lengths)


def can_composite_dense(raw, z_vals, rays_d):
    """Whether `composite_dense` can do what `raw2outputs` of run_nerf.py does: on a GPU, without gradients of
    the samples' positions."""
    positions_fixed = not (torch.is_grad_enabled() and (z_vals.requires_grad or rays_d.requires_grad))
    is_float32 = raw.dtype == z_vals.dtype == rays_d.dtype == torch.float32
    return raw.is_cuda and positions_fixed and is_float32 and KERNELS.usable(raw.device)


def composite_dense(raw, z_vals, rays_d, last_interval):
    """`composite` for the same number of samples along each ray.

    Args:
      raw: [N_rays, N_samples, 4 or more]; z_vals: positions [N_rays, N_samples]; rays_d: directions [N_rays,
        3].
      last_interval: length of the interval behind the last sample, in units of rays_d.
    Returns:
      rgb_map [N_rays, 3]; acc_map, depth_map [N_rays]; weights [N_rays, N_samples].
    """
    N, S = z_vals.shape
    offsets = torch.arange(0, N * S + 1, S, device=raw.device)
    raw = raw[..., :4] if raw.shape[-1] > 4 else raw
    lengths = torch.linalg.vector_norm(rays_d, dim=-1)
    # the reshaped rows of some of the channels may still be apart
    out, weights = CompiledComposite.apply(raw.reshape(-1, 4).contiguous(), z_vals.reshape(-1).contiguous(),
                                           lengths, last_interval, offsets, INVISIBLE_OPTICAL_DEPTH)
    rgb_map, acc_map, depth_map = out.split([3, 1, 1], -1)
    return rgb_map, acc_map.squeeze(-1), depth_map.squeeze(-1), weights.view(N, S)


class CompiledComposite(torch.autograd.Function):
    """`composite` by `composite.c`. If `last_interval` is 0, the intervals of ray n are `lengths[n]` long.
    Otherwise they reach from sample to sample and, behind the last one, over `last_interval`, all times
    `lengths[n]`."""

    @staticmethod
    def forward(ctx, raw, t, lengths, last_interval, offsets, max_optical_depth):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw, t, lengths, offsets)
        ctx.options = last_interval, max_optical_depth
        N = len(lengths)
        out, weights = raw.new_empty(N, OUT_CHANNELS), torch.empty_like(t)
        KERNELS.call('composite', N, raw, t, lengths, last_interval, offsets, None, N, max_optical_depth,
                     None, out, weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_weights):
        raw, t, lengths, offsets = ctx.saved_tensors
        last_interval, max_optical_depth = ctx.options
        grad_raw, N = torch.empty_like(raw), len(lengths)
        grad_out = raw.new_zeros(N, OUT_CHANNELS) if grad_out is None else grad_out.contiguous()
        grad_weights = None if grad_weights is None else grad_weights.contiguous()
        KERNELS.call('composite_gradient', N, raw, t, lengths, last_interval, offsets, N, max_optical_depth,
                     grad_out, grad_weights, grad_raw)
        return grad_raw, *[None] * 5


def check_kernels(device):
    """Raise AssertionError if the kernels differ from their references on `device`."""
    generator = torch.Generator('cpu').manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, device='cpu').to(device)

    def assert_close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    # rays with any number of samples, and with the same number of samples of different lengths
    N, M = 4, 100
    raw, t, step_sizes = (10 * random(M, 4) - 3).requires_grad_(), random(M), 0.2 * random(N)
    z_vals, rays_d = random(N, M // N).sort().values, 0.4 * random(N, 3)
    gaps = torch.cat([z_vals.diff(), z_vals.new_full((N, 1), 0.1)], -1) * rays_d.norm(dim=-1, keepdim=True)
    packed, even = (torch.tensor(part, device=device) for part in ([0, 3, 3, 40, M], [0, 25, 50, 75, M]))
    packed_rays, even_rays = (torch.repeat_interleave(part.diff(), output_size=M) for part in (packed, even))
    for_out, for_weights = random(N, OUT_CHANNELS), random(M)

    def composite_densely():
        rgb, acc, depth, weights = composite_dense(raw.view(N, -1, 4), z_vals, rays_d, 0.1)
        return torch.cat([rgb, acc[:, None], depth[:, None]], -1), weights.flatten()

    for pair in ((lambda: composite(raw, t, packed_rays, step_sizes, packed),
                  lambda: composite_reference(raw, t, packed_rays, step_sizes[packed_rays], packed)),
                 (composite_densely,
                  lambda: composite_reference(raw, z_vals.flatten(), even_rays, gaps.flatten(), even))):
        results = []
        for function in pair:
            out, weights = function()
            loss = (out * for_out).sum() + (weights * for_weights).sum()
            results.append((out, weights, *torch.autograd.grad(loss, raw)))
        for found, expected in zip(*results):
            assert_close(found, expected)

    # more samples of four of five rays
    before, results = (random(N + 1), random(N + 1, OUT_CHANNELS)), []
    for function in (composite_onto, composite_onto_reference):
        optical_depth, out = (part.clone() for part in before)
        alive, lengths = torch.tensor([4, 0, 2, 1], device=device), torch.cat([step_sizes, step_sizes[:1]])
        function(raw.detach(), t, lengths, packed, optical_depth, out, alive)
        results.append((optical_depth, out))
    (optical_depth, out), (expected_depth, expected_out) = results
    assert_close(out, expected_out)
    assert_close(optical_depth.clamp(max=MAX_OPTICAL_DEPTH), expected_depth.clamp(max=MAX_OPTICAL_DEPTH))


KERNELS = Kernels('composite', check_kernels)
