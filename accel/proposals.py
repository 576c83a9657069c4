"""Proposal sampling (Barron et al., "Mip-NeRF 360", CVPR 2022): small networks that predict only density
decide where a ray is sampled.

  s_vals   [N_rays, M + 1] edges of the intervals of a ray, ascending: 0 at near, 1 at far
  weights  [N_rays, M] of these intervals, Eq. 3 of NeRF

The first proposal network is evaluated in even intervals. Each later network is evaluated in intervals that
hold equal shares of the previous network's weights; the radiance field comes last.
"""
import torch
import torch.nn.functional as F
from torch import nn

from accel.hash_grid import HashGrid
from accel.hash_nerf import INITIAL_LOG_DENSITY, TruncatedExp
from accel.renderer import Renderer
from run_nerf_helpers import disparity, in_float32

# The proposal networks, first to last: intervals of a ray, and cells along each side of the finest grid.
PROPOSALS = ((64, 64), (48, 128))
# Their hash grids have this many levels of two features.
N_LEVELS = 4
# Their hash grids have at most 2 to this many entries in each level.
LOG2_HASHMAP_SIZE = 16
# Their hidden layer has this many channels.
HIDDEN_WIDTH = 16
# Over this many training steps, intervals change from even ones to those that follow the weights.
ANNEAL_STEPS = 1000
# The larger this is, the more of that change comes early (mip-NeRF 360, Sec. 4).
ANNEAL_SLOPE = 10.0
# This share of the intervals is spread evenly, so that parts without weight are still sampled.
EVEN_SHARE = 0.01
# This keeps quotients of weights finite.
EPS = 1e-7


class ProposalNetwork(nn.Module):
    """Points [N, 3] to densities [N].

    Args:
      finest_res: cells along each side of the finest grid.
    """

    def __init__(self, finest_res):
        super().__init__()
        self.encoding = HashGrid(N_LEVELS, finest_res, LOG2_HASHMAP_SIZE, n_features=2)
        self.linears = nn.ModuleList([nn.Linear(self.encoding.out_dim, HIDDEN_WIDTH),
                                      nn.Linear(HIDDEN_WIDTH, 1)])

    def reset_parameters(self):
        for module in (self.encoding, *self.linears):
            module.reset_parameters()

    def forward(self, points):
        h = F.relu(self.linears[0](self.encoding(points)), inplace=True)
        return TruncatedExp.apply(in_float32(self.linears[1], h)[:, 0] + INITIAL_LOG_DENSITY)


class ProposalRenderer(Renderer):
    """Renders one network in intervals that two proposal networks find.

    Args:
      lambda_distortion: weight of the `distortion_loss`.
      seed: determines the parameters after a `reset`, in all processes of a run.
    """

    def __init__(self, lambda_distortion=0.0, seed=0):
        super().__init__()
        self.networks = nn.ModuleList([ProposalNetwork(finest_res) for _, finest_res in PROPOSALS])
        self.lambda_distortion, self.seed = lambda_distortion, seed
        self.register_buffer('steps', torch.tensor(0.0))  # trained since the networks were new

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False,
                    perturb=0., N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0.,
                    verbose=False, pytest=False, retsamples=False):
        """Render rays by `N_samples` intervals.

        Args: as those of `render_rays` in run_nerf.py.
        Returns:
          dict: rgb_map, disp_map, acc_map, depth_map; with retsamples s_vals and weights, and for each
            proposal network proposal_s_vals0, proposal_weights0, ….
        Raises:
          ValueError: retraw, pytest or N_importance, which are not available.
        """
        if retraw or pytest or N_importance:
            raise ValueError('ProposalRenderer does not support retraw, pytest and N_importance')
        rays_o, rays_d, near, far = ray_batch[:, :8].split([3, 3, 1, 1], -1)
        viewdirs = ray_batch[:, 8:11] if ray_batch.shape[-1] > 8 else None
        length = torch.linalg.vector_norm(rays_d, dim=-1, keepdim=True)

        def intervals(s_vals):
            """Middles and lengths of intervals [N_rays, M], the latter in units of the scene, and the points
            in the middle [N_rays, M, 3]."""
            t = near * (1 - s_vals) + far * s_vals
            if lindisp:
                t = 1 / (1 / near * (1 - s_vals) + 1 / far * s_vals)
            mids = 0.5 * (t[:, 1:] + t[:, :-1])
            return mids, t.diff() * length, rays_o[:, None] + rays_d[:, None] * mids[..., None]

        counts, ret = [*(count for count, _ in PROPOSALS), N_samples], {}
        s_vals = even_edges(near, counts[0], perturb > 0)
        for index, network in enumerate(self.networks):
            _, lengths, pts = intervals(s_vals)
            weights = weights_of(network(pts.flatten(0, 1)).view(lengths.shape) * lengths)
            ret.update({f'proposal_s_vals{index}': s_vals, f'proposal_weights{index}': weights})
            s_vals = resample(s_vals, self.annealed(weights.detach()),
                              even_edges(near, counts[index + 1], perturb > 0))
        mids, lengths, pts = intervals(s_vals)
        raw = network_query_fn(pts, viewdirs, network_fn)
        sigma = raw[..., 3]
        if raw_noise_std > 0:
            sigma = sigma + raw_noise_std * torch.randn_like(sigma)
        weights = weights_of(F.relu(sigma) * lengths)

        rgb_map = (weights[..., None] * torch.sigmoid(raw[..., :3])).sum(-2)
        acc_map, depth_map = weights.sum(-1), (weights * mids).sum(-1)
        if white_bkgd:
            rgb_map = rgb_map + (1.0 - acc_map[:, None])
        maps = {'rgb_map': rgb_map, 'disp_map': disparity(depth_map, acc_map), 'acc_map': acc_map,
                'depth_map': depth_map}
        return {**maps, **ret, 's_vals': s_vals, 'weights': weights} if retsamples else maps

    def annealed(self, weights):
        """Weights to the power of a number that rises from 0 to 1 in the first steps of training."""
        if not torch.is_grad_enabled():
            return weights
        progress = (self.steps / ANNEAL_STEPS).clamp(max=1)
        return weights ** (ANNEAL_SLOPE * progress / ((ANNEAL_SLOPE - 1) * progress + 1))

    def losses(self, extras):
        s_vals, weights = extras['s_vals'], extras['weights']
        losses = {f'proposal{index}': histogram_loss(s_vals, weights, extras[f'proposal_s_vals{index}'],
                                                     extras[f'proposal_weights{index}'])
                  for index in range(len(self.networks))}
        if self.lambda_distortion > 0:
            losses['distortion'] = self.lambda_distortion * distortion_loss(s_vals, weights)
        return losses

    def update(self, step, **kwargs):
        self.steps += 1

    def reset(self):
        devices = [self.steps.device] if self.steps.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            for network in self.networks:
                network.reset_parameters()
        self.steps.zero_()

    def max_rays(self, device, N_samples, N_importance=0, **kwargs):
        return super().max_rays(device, N_samples + sum(count for count, _ in PROPOSALS))


# --- intervals ----------------------------------------------------------------------------------------------

def even_edges(near, count, random):
    """Edges of `count` intervals from 0 to 1 for each ray, [N_rays, count + 1]. If `random`, the inner ones
    are shifted, together, by up to half an interval."""
    edges = torch.linspace(0, 1, count + 1, device=near.device).expand(len(near), -1)
    if not random:
        return edges
    shift = (torch.rand(len(near), 1, device=near.device) - 0.5) / count
    return torch.cat([edges[:, :1], edges[:, 1:-1] + shift, edges[:, -1:]], -1)


def weights_of(optical_depth):
    """The weights T_i (1 - exp(-sigma_i delta_i)) of intervals with these optical depths, [N_rays, M]."""
    in_front = F.pad(torch.cumsum(optical_depth[..., :-1], -1), (1, 0))
    return torch.exp(-in_front) * (1 - torch.exp(-optical_depth))


def resample(s_vals, weights, quantiles):
    """The edges s [N_rays, K + 1] in front of which there are these `quantiles` [N_rays, K + 1], 0 to 1, of
    the weights [N_rays, M] over intervals with the edges s_vals [N_rays, M + 1]. The first and last are
    those of s_vals."""
    pdf = weights / weights.sum(-1, keepdim=True).clamp(min=EPS)
    pdf = (1 - EVEN_SHARE) * pdf + EVEN_SHARE * s_vals.diff()
    cdf = F.pad(torch.cumsum(pdf, -1), (1, 0))
    cdf = cdf / cdf[:, -1:]
    above = torch.searchsorted(cdf, quantiles.contiguous(), right=True).clamp(1, cdf.shape[1] - 1)
    cdf_below, cdf_above = cdf.gather(1, above - 1), cdf.gather(1, above)
    s_below, s_above = s_vals.gather(1, above - 1), s_vals.gather(1, above)
    fraction = (quantiles - cdf_below) / (cdf_above - cdf_below).clamp(min=EPS)
    return s_below + fraction.clamp(0, 1) * (s_above - s_below)


# --- losses -------------------------------------------------------------------------------------------------

def histogram_loss(s_vals, weights, proposal_s_vals, proposal_weights):
    """How far the weights exceed those of the proposal's intervals that they overlap, Eq. 13 of mip-NeRF 360;
    the mean over rays. Only the proposal's weights get a gradient.

    Args:
      s_vals, weights: of the radiance field, [N_rays, M + 1] and [N_rays, M].
      proposal_s_vals, proposal_weights: of a proposal network.
    """
    s_vals, weights, edges = s_vals.detach(), weights.detach(), proposal_s_vals.detach().contiguous()
    total, last = F.pad(torch.cumsum(proposal_weights, -1), (1, 0)), edges.shape[1] - 1
    first = torch.searchsorted(edges, s_vals[:, :-1].contiguous(), right=True).sub(1).clamp(0, last)
    end = torch.searchsorted(edges, s_vals[:, 1:].contiguous()).clamp(0, last)
    bound = total.gather(1, end) - total.gather(1, first)                              # [N_rays, M]
    return (F.relu(weights - bound) ** 2 / (weights + EPS)).sum(-1).mean()


def distortion_loss(s_vals, weights):
    """sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 (s_i+1 - s_i), where m are the middles of the intervals:
    Eq. 15 of mip-NeRF 360, in linear time; the mean over rays. It pulls the weights of a ray together."""
    mids, widths = 0.5 * (s_vals[:, 1:] + s_vals[:, :-1]), s_vals.diff()
    weight_before = torch.cumsum(weights, -1) - weights
    moment_before = torch.cumsum(weights * mids, -1) - weights * mids
    between = 2 * (weights * (mids * weight_before - moment_before)).sum(-1)
    return (between + (weights ** 2 * widths).sum(-1) / 3).mean()
