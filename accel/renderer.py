"""The interface of a renderer, which turns rays into colours.

`ExactRenderer` in run_nerf.py is the paper's hierarchical sampling; `GridRenderer` samples the occupied cells
of a grid; `ProposalRenderer` asks density grids where to sample; `FastRenderer` skips samples that cannot be
seen. A renderer is a module: its parameters, buffers and submodules are trained, saved and moved like those
of any other module.
"""
import torch
from torch import nn

from accel.packed import PackedSamples
from run_nerf_helpers import by_device, ndc_positions

# At most this many samples of the last network are rendered at once, by type of device.
MAX_SAMPLES = {'cpu': 2 ** 18, 'cuda': 2 ** 22}


class Renderer(nn.Module):
    """Turns a batch of rays into colours; subclasses override `render_rays`."""

    # A dense renderer evaluates `network_fn`, then `network_fine`, at samples all along the rays, the last of
    # which is at `far`. `FastRenderer` can skip samples of such renderers.
    dense = False

    # Whether frames are compared with exact pixels, where that is needed.
    checked = True

    # Whether rays reach into contracted space, where `far` has no effect.
    contract = False

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, **kwargs):
        """Render `ray_batch` [N_rays, 8 or 11]; arguments and results are those of `render_rays` in
        run_nerf.py."""
        raise NotImplementedError

    def for_rays(self, rays_flat, chunk, **kwargs):
        """The renderer to use for `rays_flat` [N_rays, 8 or 11], all rays of a frame or batch, which are
        rendered `chunk` at a time: itself unless overridden. The other arguments are those of
        `render_rays`."""
        return self

    def without_shortcuts(self):
        """The renderer that evaluates networks at all samples: itself unless overridden."""
        return self

    def spread(self, extras, t, near, far):
        """The mean distance from positions `t` [N_rays, 1] at which rays end, as a share of the length from
        near to far; what passes through counts as 1. [N_rays]."""
        distance = (extras['z_vals'] - t).abs() / (far - near)
        return 1 + (extras['weights'] * (distance - 1)).sum(-1)

    def losses(self, extras, batch, near=0., far=1., ndc=True, **kwargs):
        """Terms of the loss by name, in addition to those of the colours: `depth`, the mean of weight times
        `spread`, if the batch has depths.

        Args:
          extras: results of `render` with `retsamples`.
          batch: the `Batch` that was rendered.
          others: arguments of `render`.
        """
        if batch.depth is None:
            return {}
        t, weight = batch.depth.unbind(-1)
        if ndc:
            t = ndc_positions(1.0, *batch.rays, t).clamp(0, 1)
        return {'depth': (weight * self.spread(extras, t[:, None], near, far)).mean()}

    def count_samples(self, rays, N_samples, N_importance=0, **kwargs):
        """How often each of the rays [2, ..., 3] is sampled, by all networks together; the other arguments
        are those of `render`."""
        fine = N_samples + N_importance if N_importance else 0
        return torch.full_like(rays[0, ..., 0], N_samples + fine)

    def update(self, step, **kwargs):
        """Called after training step `step` with the arguments of `render_rays`: update what depends on the
        networks."""

    def drop_cache(self):
        """Drop whatever was computed from the networks, because they have changed."""

    def reset(self):
        """Called when a network is reinitialised: forget what was learned about it."""

    def max_rays(self, device, N_samples, N_importance=0, **kwargs):
        """How many rays to render at once at most, so that their samples fit in memory; the other arguments
        are those of `render_rays`."""
        return max(1, by_device(MAX_SAMPLES, device) // (N_samples + N_importance))


def join(parts):
    """The results of `render_rays` for several batches of rays as one dict."""
    if len(parts) == 1:
        return parts[0]
    results = {key: [part[key] for part in parts] for key in parts[0]}
    return {key: PackedSamples.cat(values) if isinstance(values[0], PackedSamples) else torch.cat(values)
            for key, values in results.items()}
