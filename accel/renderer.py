"""The interface of a renderer: how rays become colours.

`ExactRenderer` in run_nerf.py is the paper's hierarchical sampling; `GridRenderer` samples the occupied cells of a grid;
`FastRenderer` leaves out samples that cannot be seen. A renderer is a module: its grids and networks are saved, moved and
trained like those of any other module.
"""
from torch import nn


class Renderer(nn.Module):
    # `FastRenderer` may leave out samples of a dense renderer: one that evaluates `network_fn`, then `network_fine`, at
    # samples all along the rays.
    dense = False

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, **kwargs):
        """Render `ray_batch` [N_rays, 8 or 11]; arguments and results as those of `render_rays` in run_nerf.py."""
        raise NotImplementedError

    def for_rays(self, rays_flat, **kwargs):
        """The renderer to use for `rays_flat` [N_rays, 8 or 11], all rays of a frame or batch: itself unless overridden.

        Args:
          kwargs: those of `render_rays`.
        """
        return self

    def update(self, step, **kwargs):
        """Called after training step `step` with the arguments of `render_rays`, for what follows the networks."""

    def forget(self):
        """Drop whatever was computed from the networks, because they have changed."""

    def reset_parameters(self):
        """Called when a network is initialised anew."""

    def samples_per_ray(self, N_samples, N_importance):
        """How many samples of a ray are in memory at the same time."""
        return N_samples + N_importance
