"""Proposal sampling (Barron et al., "Mip-NeRF 360", CVPR 2022): grids of densities decide where a ray is
sampled.

  s_vals   [N_rays, M + 1] edges of the intervals of a ray, ascending: 0 at near, 1 at far
  weights  [N_rays, M] of these intervals, Eq. 3 of NeRF

The first proposal grid is evaluated in even intervals. The next one is evaluated in intervals that hold equal
shares of the first one's weights, and so on; the radiance field comes last.
"""
import torch
import torch.nn.functional as F
from torch import nn

from accel.hash_grid import HashGrid
from accel.hash_nerf import INITIAL_LOG_DENSITY, TruncatedExp
from accel.renderer import Renderer
from run_nerf_helpers import disparity, invert_cdf, split_rays, weights_of

# The proposal grids, first to last: intervals of a ray, and cells along each side of the finest level.
PROPOSALS = ((32, 64), (24, 128))
# A proposal grid has this many levels.
N_LEVELS = 2
# Its levels have at most 2 to this many entries; those of PROPOSALS have one for each corner.
LOG2_HASHMAP_SIZE = 22
# The proposal grids are trained in every one of this many first steps.
WARMUP_STEPS = 256
# After the warm-up, the proposal grids are trained once in this many steps.
TRAIN_EVERY_N_STEPS = 4
# Over this many training steps, intervals change from even ones to those that follow the weights.
ANNEAL_STEPS = 1000
# The larger this is, the more of that change comes early (mip-NeRF 360, Sec. 4).
ANNEAL_SLOPE = 10.0
# This share of the intervals is spread evenly, so that parts without weight are still sampled.
EVEN_SHARE = 0.01
# Rays through contracted space end at this distance, in units of the uncontracted box's half side.
FAR = 1000.0
# A sample in a proposal grid takes about this fraction of the memory of one of the network.
RELATIVE_MEMORY = 1 / 8
# This keeps quotients finite.
EPS = 1e-7


class ProposalGrid(nn.Module):
    """Points [N, 3] to densities [N]: the exponential of the sum of grids of different resolution.

    Args:
      finest_res: cells along each side of the finest level.
      contract: see `HashGrid`.
    """

    def __init__(self, finest_res, contract=False):
        super().__init__()
        self.encoding = HashGrid(N_LEVELS, finest_res, LOG2_HASHMAP_SIZE, n_features=1, contract=contract)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.encoding.table)

    def forward(self, points):
        return TruncatedExp.apply(self.encoding(points).sum(-1) + INITIAL_LOG_DENSITY)


class ProposalRenderer(Renderer):
    """Renders one network in intervals that proposal grids find.

    Args:
      lambda_distortion: weight of the `distortion_loss`.
      contract: rays reach into contracted space, see `contract` in accel/hash_grid.py: intervals are even in
        disparity beyond the box, and `far` has no effect.
    """

    def __init__(self, lambda_distortion=0.0, contract=False):
        super().__init__()
        self.grids = nn.ModuleList([ProposalGrid(finest_res, contract) for _, finest_res in PROPOSALS])
        self.lambda_distortion, self.contract = lambda_distortion, contract
        self.set_steps(0)

    def set_steps(self, steps):
        """Set how many steps have been trained since the grids were new."""
        self.steps = steps
        self.grids.requires_grad_(self.trains_grids)

    @property
    def trains_grids(self):
        """Whether the next step trains the grids."""
        return self.steps < WARMUP_STEPS or (self.steps + 1) % TRAIN_EVERY_N_STEPS == 0

    def get_extra_state(self):
        return torch.tensor(self.steps)

    def set_extra_state(self, state):
        self.set_steps(int(state))

    def render_rays(self, ray_batch, network_fn, network_query_fn, N_samples, retraw=False, lindisp=False,
                    perturb=0., N_importance=0, network_fine=None, white_bkgd=False, raw_noise_std=0.,
                    verbose=False, pytest=False, retsamples=False):
        """Render rays by `N_samples` intervals.

        Args: as those of `render_rays` in run_nerf.py.
        Returns:
          dict: rgb_map, disp_map, acc_map, depth_map, see `depth_map`; with retsamples s_vals, weights and
            z_vals, the middles of the intervals, and for each proposal grid proposal_s_vals0,
            proposal_weights0, ….
        Raises:
          ValueError: retraw, pytest or N_importance, which are not available.
        """
        if retraw or pytest or N_importance:
            raise ValueError('ProposalRenderer does not support retraw, pytest and N_importance')
        rays_o, rays_d, near, far, viewdirs = split_rays(ray_batch)
        length = torch.linalg.vector_norm(rays_d, dim=-1, keepdim=True)

        def intervals(s_vals):
            """Middles and lengths of intervals [N_rays, M], the latter in units of the scene, and the points
            in the middle [N_rays, M, 3]."""
            t = self.positions(s_vals, near, far, lindisp)
            mids = 0.5 * (t[:, 1:] + t[:, :-1])
            return mids, t.diff() * length, rays_o[:, None] + rays_d[:, None] * mids[..., None]

        counts, ret = [*(count for count, _ in PROPOSALS), N_samples], {}
        s_vals = even_edges(near, counts[0], perturb > 0)
        power = self.annealed_power() if retsamples else 1  # in training
        for index, grid in enumerate(self.grids):
            _, lengths, pts = (part.detach() for part in intervals(s_vals))  # they do not move cameras
            weights = weights_of(grid(pts.flatten(0, 1)).view(lengths.shape) * lengths)
            ret.update({f'proposal_s_vals{index}': s_vals, f'proposal_weights{index}': weights})
            s_vals = resample(s_vals, weights.detach() ** power,
                              even_edges(near, counts[index + 1], perturb > 0))
        mids, lengths, pts = intervals(s_vals)
        raw = network_query_fn(pts, viewdirs, network_fn)
        sigma = raw[..., 3]
        if raw_noise_std > 0:
            sigma = sigma + raw_noise_std * torch.randn_like(sigma)
        weights = weights_of(F.relu(sigma) * lengths)

        rgb_map = (weights[..., None] * torch.sigmoid(raw[..., :3])).sum(-2)
        acc_map, depth_map = weights.sum(-1), self.depth_map(weights, mids)
        if white_bkgd:
            rgb_map = rgb_map + (1.0 - acc_map[:, None])
        maps = {'rgb_map': rgb_map, 'disp_map': disparity(depth_map, acc_map), 'acc_map': acc_map,
                'depth_map': depth_map}
        if not retsamples:
            return maps
        return {**maps, **ret, 's_vals': s_vals, 'z_vals': mids, 'weights': weights}

    def positions(self, s_vals, near, far, lindisp):
        """The t [N_rays, M + 1] of edges of intervals; near and far are [N_rays, 1]."""
        if self.contract:
            first = to_disparity(near / self.unit())
            return self.unit() * from_disparity(first + s_vals * (1 - 0.5 / FAR - first))
        if lindisp:
            return 1 / (1 / near * (1 - s_vals) + 1 / far * s_vals)
        return near * (1 - s_vals) + far * s_vals

    def depth_map(self, weights, mids):
        """The sum of weights [N_rays, M] times middles of intervals. In contracted space, the opacity times
        the depth of the mean disparity: a little weight far away would dominate the mean of the depths."""
        if self.contract:
            mids = to_disparity(mids / self.unit())
        return self.depth_of((weights * mids).sum(-1), weights.sum(-1))

    def depth_of(self, total, acc):
        """`depth_map` from the sum of weights times depths or, in contracted space, disparities [N_rays], and
        the opacity [N_rays]."""
        return acc * self.unit() * from_disparity(total / acc.clamp(min=EPS)) if self.contract else total

    def unit(self):
        """Half the mean side of the box that is not contracted, a scalar tensor."""
        return self.grids[0].encoding.half_side()

    def annealed_power(self):
        """In training, intervals follow the weights to this power, which rises from 0 to 1."""
        progress = min(self.steps / ANNEAL_STEPS, 1.0)
        return ANNEAL_SLOPE * progress / ((ANNEAL_SLOPE - 1) * progress + 1)

    def spread(self, extras, t, near, far):
        if not self.contract:
            return super().spread(extras, t, near, far)
        z_vals, t = (to_disparity(part / self.unit()) for part in (extras['z_vals'], t))
        return super().spread({**extras, 'z_vals': z_vals}, t, 0, 1)

    def losses(self, extras, batch, **kwargs):
        s_vals, weights, losses = extras['s_vals'], extras['weights'], super().losses(extras, batch, **kwargs)
        if self.trains_grids:
            for index in range(len(self.grids)):
                losses[f'proposal{index}'] = histogram_loss(
                    s_vals, weights, extras[f'proposal_s_vals{index}'], extras[f'proposal_weights{index}'])
        if self.lambda_distortion > 0:
            losses['distortion'] = self.lambda_distortion * distortion_loss(s_vals, weights)
        return losses

    def update(self, step, **kwargs):
        self.set_steps(self.steps + 1)

    def reset(self):
        for grid in self.grids:
            grid.reset_parameters()
        self.set_steps(0)

    def max_rays(self, device, N_samples, N_importance=0, **kwargs):
        equivalent = RELATIVE_MEMORY * sum(count for count, _ in PROPOSALS)
        return super().max_rays(device, N_samples + int(equivalent))


# --- intervals ----------------------------------------------------------------------------------------------

def even_edges(near, count, random):
    """Edges of `count` intervals from 0 to 1 for each ray, [N_rays, count + 1]. If `random`, the inner ones
    are shifted, together, by up to half an interval."""
    edges = torch.linspace(0, 1, count + 1, device=near.device).expand(len(near), -1)
    if not random:
        return edges
    shift = (torch.rand(len(near), 1, device=near.device) - 0.5) / count
    return torch.cat([edges[:, :1], edges[:, 1:-1] + shift, edges[:, -1:]], -1)


def to_disparity(x):
    """Distances x > 0, in units of the box's half side, to numbers in (0, 1): x / 2 up to 1, and 1 - 1 / (2x)
    beyond."""
    return torch.where(x < 1, 0.5 * x, 1 - 0.5 / x.clamp(min=1))


def from_disparity(y):
    """The inverse of `to_disparity`."""
    return torch.where(y < 0.5, 2 * y, 0.5 / (1 - y).clamp(max=0.5))


def resample(s_vals, weights, quantiles):
    """The edges s [N_rays, K + 1] in front of which there are these `quantiles` [N_rays, K + 1], 0 to 1, of
    the weights [N_rays, M] over intervals with the edges s_vals [N_rays, M + 1]. The first and last are
    those of s_vals."""
    pdf = weights / weights.sum(-1, keepdim=True).clamp(min=EPS)
    pdf = (1 - EVEN_SHARE) * pdf + EVEN_SHARE * s_vals.diff()
    cdf = F.pad(torch.cumsum(pdf, -1), (1, 0))
    return invert_cdf(s_vals, cdf / cdf[:, -1:], quantiles)


# --- losses -------------------------------------------------------------------------------------------------

def histogram_loss(s_vals, weights, proposal_s_vals, proposal_weights):
    """How far the weights exceed those of the proposal's intervals that they overlap, Eq. 13 of mip-NeRF 360;
    the mean over rays. Only the proposal's weights get a gradient.

    Args:
      s_vals, weights: of the radiance field, [N_rays, M + 1] and [N_rays, M].
      proposal_s_vals, proposal_weights: of a proposal grid.
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
