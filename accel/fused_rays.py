"""Renders the frames of a `ProposalRenderer` and a `HashNeRF` on a CPU: compiled kernels take each ray from
end to end, so that nothing but its colour goes through memory."""
import torch
import torch.nn.functional as F

from accel.fused_network import layers_of, padded
from accel.hash_grid import HashGrid
from accel.hash_nerf import DENSITY_OUTPUTS, HIDDEN_WIDTH, INITIAL_LOG_DENSITY, MAX_LOG_DENSITY, HashNeRF
from accel.kernels.compiled import Kernels
from accel.network_query import NetworkQuery
from accel.proposals import EVEN_SHARE, FAR, PROPOSALS, ProposalRenderer
from accel.renderer import Renderer
from run_nerf_helpers import SphericalHarmonics, disparity, get_embedder

# The kernels take at most this many intervals of a ray.
MAX_INTERVALS = 128
# The kernels take at most this many channels of an encoding.
MAX_CHANNELS = 64
# This many rays are rendered at once, so that a signal to stop does not wait for a whole frame.
MAX_RAYS = 2 ** 15


class FusedRenderer(Renderer):
    """Renders as `exact` does where the kernels can, and otherwise by it.

    Args:
      exact: a `ProposalRenderer`.
      bf16: use bfloat16 products in all layers, if the processor has them.
    """

    def __init__(self, exact, bf16=True):
        super().__init__()
        self.exact, self.bf16 = exact, bf16

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, lindisp=False, perturb=0.,
                    white_bkgd=False, raw_noise_std=0., retsamples=False, retraw=False, pytest=False,
                    N_importance=0, **kwargs):
        """The maps that `exact` renders, with the arguments of its `render_rays`."""
        if (retsamples or retraw or pytest or N_importance or perturb or raw_noise_std
                or torch.is_grad_enabled() or not can_fuse(ray_batch.device, network_fn, N_samples)):
            return self.exact.render_rays(
                ray_batch, network_fn, network_query_fn, N_samples, retraw, lindisp, perturb, N_importance,
                white_bkgd=white_bkgd, raw_noise_std=raw_noise_std, pytest=pytest, retsamples=retsamples)
        out = shade(ray_batch, self.exact.grids, network_fn, N_samples, spacing_of(self.exact, lindisp),
                    self.bf16)
        rgb_map, acc_map, depth_sum = out[:, :3], out[:, 3], out[:, 4]
        depth_map = self.exact.depth_of(depth_sum, acc_map)
        if white_bkgd:
            rgb_map = rgb_map + (1.0 - acc_map[:, None])
        return {'rgb_map': rgb_map, 'disp_map': disparity(depth_map, acc_map), 'acc_map': acc_map,
                'depth_map': depth_map}

    def without_shortcuts(self):
        return self.exact

    def max_rays(self, device, N_samples, N_importance=0, network_fn=None, **kwargs):
        if can_fuse(device, network_fn, N_samples):
            return MAX_RAYS
        return self.exact.max_rays(device, N_samples, N_importance)


def can_fuse(device, network, N_samples):
    """Whether the kernels can render `N_samples` intervals of rays with this network."""
    return (device.type == 'cpu' and type(network) is HashNeRF and N_samples <= MAX_INTERVALS
            and network.encoding.out_dim <= MAX_CHANNELS and network.encoding.out_dim % 2 == 0
            and (network.encoding_views is None or isinstance(network.encoding_views, SphericalHarmonics))
            and KERNELS.usable(device))


def spacing_of(renderer, lindisp):
    """How a `ProposalRenderer` spaces intervals, as arguments of the kernels: kind, unit, last disparity."""
    return (2, float(renderer.unit()), 1 - 0.5 / FAR) if renderer.contract else (int(lindisp), 1.0, 1.0)


def shade(ray_batch, grids, network, N_samples, spacing, bf16):
    """Rays [N, 8 or 11] to their colour, opacity and sum of weights times depths or disparities, [N, 5].
    `spacing` is as `spacing_of` returns it."""
    N, rays = len(ray_batch), (ray_batch, ray_batch.stride(0), len(ray_batch), *spacing)
    counts = [*(count for count, _ in PROPOSALS), N_samples]
    s_vals = torch.linspace(0, 1, counts[0] + 1, device=ray_batch.device).repeat(N, 1)
    for grid, count, next_count in zip(grids, counts, counts[1:]):
        edges = ray_batch.new_empty(N, next_count + 1)
        KERNELS.call('resample', N, *rays, s_vals, count, *arguments_of(grid.encoding), INITIAL_LOG_DENSITY,
                     MAX_LOG_DENSITY, EVEN_SHARE, next_count, edges)
        s_vals = edges
    of_features, of_direction = network.rgb_linears[0].weight.tensor_split([DENSITY_OUTPUTS], 1)
    layers = padded(layers_of(network))
    layers[4:5] = [of_features.contiguous(), of_direction.contiguous() if of_direction.numel() else None]
    out = ray_batch.new_empty(N, 5)
    KERNELS.call('shade', N, *rays, s_vals, N_samples, *arguments_of(network.encoding), *layers, HIDDEN_WIDTH,
                 DENSITY_OUTPUTS, INITIAL_LOG_DENSITY, MAX_LOG_DENSITY, int(bf16), out)
    return out


def arguments_of(encoding):
    """A `HashGrid` as arguments of the kernels."""
    return (encoding.aabb, int(encoding.contract), encoding.table, len(encoding.resolutions),
            encoding.table.shape[1], encoding.resolutions, encoding.level_offsets)


@torch.no_grad()
def check_kernels(device):
    """Raise AssertionError if the kernels differ from their reference on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rays = torch.rand(33, 11, device=device)
        rays[:, 6:8] = torch.tensor([0.5, 4.0])
        rays[:, 8:] = F.normalize(rays[:, 8:], dim=-1)
        for n_features, contract, lindisp, views in ((4, False, False, True), (2, True, False, True),
                                                     (8, False, True, False)):
            exact = ProposalRenderer(contract=contract).to(device)
            network = HashNeRF(HashGrid(4, 100, 12, n_features, contract),
                               *get_embedder(4, 2) if views else (None, 0)).to(device)
            for encoding in (network.encoding, *(grid.encoding for grid in exact.grids)):
                encoding.table.uniform_(-2, 2)
            expected = exact.render_rays(rays if views else rays[:, :8], network, NetworkQuery(), 40,
                                         lindisp=lindisp)
            for bf16, tolerance in ((False, 1e-3), (True, 3e-2)):
                spacing = spacing_of(exact, lindisp)
                out = shade(rays, exact.grids, network, 40, spacing, bf16)
                for found, name in ((out[:, :3], 'rgb_map'), (out[:, 3], 'acc_map'),
                                    (exact.depth_of(out[:, 4], out[:, 3]), 'depth_map')):
                    torch.testing.assert_close(found, expected[name], rtol=tolerance, atol=tolerance)


KERNELS = Kernels('intervals', check_kernels)
