"""Renders the frames of a `HashNeRF` on a CPU: compiled kernels take rays from end to end, so that nothing
but their colours goes through memory."""
import sys

import torch
import torch.nn.functional as F

from accel.fused_network import MAX_CHANNELS, arguments_of, grid_of, layers_of, padded
from accel.grid_renderer import GridRenderer, split_maps
from accel.hash_grid import HashGrid
from accel.hash_nerf import DENSITY_OUTPUTS, HIDDEN_WIDTH, INITIAL_LOG_DENSITY, MAX_LOG_DENSITY, HashNeRF
from accel.kernels.compiled import Kernels
from accel.network_query import NetworkQuery
from accel.occupancy import OccupancyGrid
from accel.packed import MIN_TRANSMITTANCE
from accel.proposals import EVEN_SHARE, FAR, PROPOSALS, ProposalRenderer
from accel.renderer import Renderer
from run_nerf_helpers import SphericalHarmonics, get_embedder

# This many rays are rendered at once, so that a signal to stop does not wait for a whole frame.
MAX_RAYS = 2 ** 15
# The kernels take at most this many intervals of a ray.
MAX_INTERVALS = 128
# In the cells of a grid, the colours of samples with less weight are not evaluated.
MIN_WEIGHT = MIN_TRANSMITTANCE


def fused(renderer, bf16=True):
    """The `FusedRenderer` of a renderer, or the renderer itself if it has none."""
    classes = {ProposalRenderer: FusedProposals, GridRenderer: FusedGrid}
    return classes[type(renderer)](renderer, bf16) if type(renderer) in classes else renderer


class FusedRenderer(Renderer):
    """Renders as `exact` does where the kernels can, and otherwise by it. Subclasses define `shade`.

    Args:
      exact: the renderer.
      bf16: use bfloat16 products, if the processor has them: in the hidden layers or, with proposals, in all.
    """

    max_samples = sys.maxsize  # the largest N_samples that the kernels take
    # With any of these arguments of `render_rays`, `exact` renders.
    unsupported = ('retsamples', 'retraw', 'pytest', 'N_importance', 'perturb', 'raw_noise_std')

    def __init__(self, exact, bf16=True):
        super().__init__()
        self.exact, self.bf16 = exact, bf16

    def shade(self, ray_batch, network, N_samples, lindisp):
        """Rays [N, 8 or 11] to colour, opacity and depth [N, 5]."""
        raise NotImplementedError

    def usable(self, device):
        """Whether there are kernels for `device`."""
        raise NotImplementedError

    def can_fuse(self, device, network, N_samples):
        """Whether the kernels can render `N_samples` of each ray with this network."""
        return (device.type == 'cpu' and type(network) is HashNeRF and N_samples <= self.max_samples
                and network.encoding.out_dim <= MAX_CHANNELS and network.encoding.out_dim % 2 == 0
                and (network.encoding_views is None or isinstance(network.encoding_views, SphericalHarmonics))
                and self.usable(device))

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, **options):
        """The maps that `exact` renders, with the arguments of its `render_rays`."""
        if (torch.is_grad_enabled() or any(options.get(name) for name in self.unsupported)
                or not self.can_fuse(ray_batch.device, network_fn, N_samples)):
            return self.exact.render_rays(ray_batch, network_fn, network_query_fn, N_samples, **options)
        out = self.shade(ray_batch, network_fn, N_samples, options.get('lindisp', False))
        return split_maps(out, options.get('white_bkgd', False))

    def without_shortcuts(self):
        return self.exact

    def count_samples(self, *args, **kwargs):
        return self.exact.count_samples(*args, **kwargs)

    def max_rays(self, device, N_samples, N_importance=0, network_fn=None, **kwargs):
        if self.can_fuse(device, network_fn, N_samples):
            return MAX_RAYS
        return self.exact.max_rays(device, N_samples, N_importance)


class FusedGrid(FusedRenderer):
    """Renders as a `GridRenderer` does."""

    unsupported = (*FusedRenderer.unsupported, 'lindisp')

    def usable(self, device):
        return CELLS.usable(device)

    def shade(self, ray_batch, network, N_samples, lindisp=False):
        grid, N, out = self.exact.grid, len(ray_batch), ray_batch.new_empty(len(ray_batch), 5)
        step_size = grid.step_size(N_samples)
        spacing, num_candidates = grid.candidates(ray_batch, step_size, torch.full_like(out[:, 0], 0.5))
        CELLS.call('render', N, ray_batch, ray_batch.stride(0), N, spacing, num_candidates, grid.occupied,
                   grid.blocks, grid.resolution, grid.aabb, step_size, MIN_WEIGHT,
                   *arguments_of(network, padded(layers_of(network)), self.bf16), out)
        return out


class FusedProposals(FusedRenderer):
    """Renders as a `ProposalRenderer` does."""

    max_samples = MAX_INTERVALS

    def usable(self, device):
        return INTERVALS.usable(device)

    def shade(self, ray_batch, network, N_samples, lindisp=False):
        N, rays = len(ray_batch), (ray_batch, ray_batch.stride(0), len(ray_batch), *self.spacing(lindisp))
        counts = [*(count for count, _ in PROPOSALS), N_samples]
        s_vals = torch.linspace(0, 1, counts[0] + 1, device=ray_batch.device).repeat(N, 1)
        for grid, count, next_count in zip(self.exact.grids, counts, counts[1:]):
            edges = ray_batch.new_empty(N, next_count + 1)
            INTERVALS.call('resample', N, *rays, s_vals, count, *grid_of(grid.encoding), INITIAL_LOG_DENSITY,
                           MAX_LOG_DENSITY, EVEN_SHARE, next_count, edges)
            s_vals = edges
        of_features, of_direction = network.rgb_linears[0].weight.tensor_split([DENSITY_OUTPUTS], 1)
        layers = padded(layers_of(network))
        layers[4:5] = [of_features.contiguous(), of_direction.contiguous() if of_direction.numel() else None]
        out = ray_batch.new_empty(N, 5)
        INTERVALS.call('shade', N, *rays, s_vals, N_samples, *grid_of(network.encoding), *layers,
                       HIDDEN_WIDTH, DENSITY_OUTPUTS, INITIAL_LOG_DENSITY, MAX_LOG_DENSITY, int(self.bf16),
                       out)
        out[:, 4] = self.exact.depth_of(out[:, 4], out[:, 3])
        return out

    def spacing(self, lindisp):
        """How intervals are spaced, as arguments of the kernels: kind, unit, last disparity."""
        if self.exact.contract:
            return 2, float(self.exact.unit()), 1 - 0.5 / FAR
        return int(lindisp), 1.0, 1.0


# --- checks of the kernels ----------------------------------------------------------------------------------

def check_cells(device):
    """Raise AssertionError if the kernels of `FusedGrid` differ from their reference on `device`."""
    def make(contract):
        grid = OccupancyGrid(20)
        grid.set_occupied(torch.rand(20, 20, 20) < 0.3)
        return GridRenderer(grid)
    check(make, [False], device)


def check_intervals(device):
    """Raise AssertionError if the kernels of `FusedProposals` differ from their reference on `device`."""
    def make(contract):
        exact = ProposalRenderer(contract=contract)
        for grid in exact.grids:
            grid.encoding.table.uniform_(-2, 2)
        return exact
    check(make, [False, True], device)


@torch.no_grad()
def check(make, lindisps, device):
    """Compare the renderers `make(contract)` with what replaces them, for several networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rays = torch.rand(33, 11)
        rays[:, 6:8] = torch.tensor([0.5, 4.0])
        rays[:, 8:] = F.normalize(rays[:, 8:], dim=-1)
        for n_features, contract, views in ((4, False, True), (2, True, True), (8, False, False)):
            exact = make(contract).to(device)
            network = HashNeRF(HashGrid(4, 100, 12, n_features, contract),
                               *get_embedder(4, 2) if views else (None, 0)).to(device)
            network.encoding.table.uniform_(-2, 2)
            inputs = (rays if views else rays[:, :8]).to(device)
            for lindisp in lindisps:
                expected = exact.render_rays(inputs, network, NetworkQuery(), 40, lindisp=lindisp)
                for bf16, tolerance in ((False, 1e-3), (True, 3e-2)):
                    found = split_maps(fused(exact, bf16).shade(inputs, network, 40, lindisp), False)
                    for name in ('rgb_map', 'acc_map', 'depth_map'):
                        torch.testing.assert_close(found[name], expected[name], rtol=tolerance,
                                                   atol=tolerance)


CELLS, INTERVALS = Kernels('cells', check_cells), Kernels('intervals', check_intervals)
