"""The ray microscope: what rendering does along one ray, step by step, with its numbers."""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from run_nerf_helpers import ndc_rays, positions_from_ndc

# The last interval of `raw2outputs` is this long or longer: shown as infinity.
ENDLESS = 1e9


class Samples(NamedTuple):
    """Samples along a ray, NumPy arrays."""
    t: np.ndarray              # positions along the ray [S]; in NDC those of its ray
    lengths: np.ndarray        # of their intervals, delta_i, in units of the scene or of NDC [S]
    sigmas: np.ndarray         # densities [S]
    rgb: np.ndarray            # colours [S, 3]
    transmittance: np.ndarray  # T_i: the share of light that comes from behind the sample's front [S]
    weights: np.ndarray        # w_i = T_i (1 - exp(-sigma_i delta_i)) [S]
    points: np.ndarray         # in the scene [S, 3]

    def color(self):
        """sum_i w_i c_i [3] and opacity."""
        return self.weights @ self.rgb, self.weights.sum()


class Step(NamedTuple):
    """One step of rendering a ray."""
    title: str
    text: str         # what the step does
    samples: Samples  # where it does so
    shows: str        # what is known after it: 'positions', 'network' or 'weights'


class Ray(NamedTuple):
    """A ray in the scene, and as the networks see it: the same, or in NDC."""
    origin: torch.Tensor      # [3]
    direction: torch.Tensor   # [3]
    rays_o: torch.Tensor      # [1, 3]
    rays_d: torch.Tensor      # [1, 3]
    viewdirs: torch.Tensor | None  # [1, 3]
    ndc: bool

    def points_at(self, t):
        """Points [S, 3] in the scene at positions t [S] along `rays_d`."""
        if self.ndc:
            t = positions_from_ndc(1.0, self.origin, self.direction, t)
        return self.origin + t[:, None] * self.direction


@torch.no_grad()
def examine(frames, render_kwargs, origin, direction):
    """The `Step`s of rendering one ray.

    Args:
      frames: a `FrameRenderer`; render_kwargs: arguments of `render`, without white background.
      origin, direction: of the ray [3] in the scene; the direction has length 1 along the camera's axis.
    Returns:
      steps: a list of `Step`; color: the rendered colour [3] on black; acc: its opacity.
    """
    kwargs, device, (H, W, _) = dict(render_kwargs), frames.device, frames.hwf
    renderer = kwargs['renderer'] = kwargs['renderer'].without_shortcuts()
    origin, direction = (torch.as_tensor(part, dtype=torch.float32, device=device)
                         for part in (origin, direction))
    rays = rays_o, rays_d = origin[None], direction[None]
    with torch.enable_grad():  # then the renderer with an occupancy grid returns its samples
        rgb, _, acc, extras = frames.render_rays(H, W, frames.K, rays=torch.stack(rays), retsamples=True,
                                                 **kwargs)
    if kwargs['ndc']:
        rays_o, rays_d = ndc_rays(H, W, frames.K[0][0], 1.0, rays_o, rays_d)
    viewdirs = F.normalize(direction[None], dim=-1) if kwargs['use_viewdirs'] else None
    ray = Ray(origin, direction, rays_o, rays_d, viewdirs, kwargs['ndc'])
    describe = next(found for key, found in DESCRIPTIONS.items() if key in extras)
    return describe(ray, kwargs, renderer, extras), rgb[0].detach().cpu().numpy(), float(acc[0])


def samples_at(ray, t, lengths, network, query):
    """The `Samples` of a network at positions t [S], in intervals of `lengths` [S]."""
    pts = ray.rays_o + t[:, None] * ray.rays_d
    raw = query(pts[None], ray.viewdirs, network)[0]
    return make_samples(ray, t, lengths, torch.relu(raw[:, 3]), torch.sigmoid(raw[:, :3]))


def make_samples(ray, t, lengths, sigmas, rgb):
    """`Samples` from tensors [S]; rgb [S, 3]."""
    optical_depth = sigmas * lengths
    transmittance = torch.exp(-F.pad(optical_depth, (1, 0)).cumsum(0)[:-1])
    weights = transmittance * -torch.expm1(-optical_depth)
    parts = t, lengths, sigmas, rgb, transmittance, weights, ray.points_at(t)
    return Samples(*(part.detach().cpu().numpy() for part in parts))


# --- the steps of each renderer -----------------------------------------------------------------------------

def network_steps(name, samples):
    """The steps after the positions of samples are known."""
    color, acc = samples.color()
    return [
        Step(f'{name}: density and colour', f'The network gives a density σ and a colour c at each of the '
             f'{len(samples.t)} samples.', samples, 'network'),
        Step(f'{name}: weights', 'Transmittance T_i = exp(-Σ_j<i σ_j δ_j) is the light that passes '
             'everything in front; the weight of a sample is w_i = T_i (1 - exp(-σ_i δ_i)).'
             f' The pixel is C = Σ w_i c_i = ({color[0]:.3f}, {color[1]:.3f}, {color[2]:.3f}), its opacity '
             f'Σ w_i = {acc:.3f}.', samples, 'weights')]


def hierarchical_steps(ray, kwargs, renderer, extras):
    """Steps of `render_rays`, the paper's hierarchical sampling."""
    def samples(z_vals, network):
        lengths = F.pad(z_vals.diff(), (0, 1), value=1e10) * ray.rays_d.norm()
        return samples_at(ray, z_vals, lengths, network, kwargs['network_query_fn'])
    fine = kwargs['N_importance'] > 0
    coarse = samples(extras['z_vals0' if fine else 'z_vals'][0], kwargs['network_fn'])
    spacing = 'disparity' if kwargs['lindisp'] else 'depth'
    steps = [Step('Stratified samples', f'{len(coarse.t)} samples, evenly spaced in {spacing} between near '
                  'and far. In training each is moved at random within its interval.', coarse, 'positions'),
             *network_steps('Coarse network', coarse)]
    if not fine:
        return steps
    last = samples(extras['z_vals'][0], kwargs['network_fine'] or kwargs['network_fn'])
    importance = Step('Importance samples', 'The coarse weights are a distribution along the ray. '
                      f'{kwargs["N_importance"]} more samples are drawn from it; together with the first '
                      f'ones there are {len(last.t)}.', last, 'positions')
    return [*steps, importance, *network_steps('Fine network', last)]


def grid_steps(ray, kwargs, renderer, extras):
    """Steps of a `GridRenderer`."""
    packed = extras['packed']
    t = packed.t.detach()
    samples = samples_at(ray, t, packed.dt[0] * torch.ones_like(t), kwargs['network_fn'],
                         kwargs['network_query_fn'])
    return [Step('Samples in occupied cells', f'Steps of one length cross the box; the {len(t)} in cells of '
                 'the occupancy grid that may hold something are kept.', samples, 'positions'),
            *network_steps('Network', samples)]


def proposal_steps(ray, kwargs, renderer, extras):
    """Steps of a `ProposalRenderer`."""
    ones, steps = torch.ones_like(ray.rays_d[:, :1]), []

    def intervals(s_vals):
        t = renderer.positions(s_vals, kwargs['near'] * ones, kwargs['far'] * ones, kwargs['lindisp'])[0]
        return 0.5 * (t[1:] + t[:-1]), t.diff() * ray.rays_d.norm()
    for index, grid in enumerate(renderer.grids):
        t, lengths = intervals(extras[f'proposal_s_vals{index}'].detach())
        sigmas = grid(ray.rays_o + t[:, None] * ray.rays_d)
        samples = make_samples(ray, t, lengths, sigmas, torch.full([len(t), 3], 0.5, device=t.device))
        spread = 'evenly spaced' if index == 0 else 'which hold equal shares of the weights before'
        steps.append(Step(f'Proposal {index + 1}',
                          f'A small grid of densities in {len(t)} intervals, {spread}.', samples, 'weights'))
    samples = samples_at(ray, *intervals(extras['s_vals'].detach()), kwargs['network_fn'],
                         kwargs['network_query_fn'])
    positions = Step('Samples', f'{len(samples.t)} intervals, which hold equal shares of the weights of the '
                     'last proposal.', samples, 'positions')
    return [*steps, positions, *network_steps('Network', samples)]


# What the results of a renderer hold, and the steps that they tell of; the first that fits counts.
DESCRIPTIONS = {'packed': grid_steps, 'proposal_weights0': proposal_steps, 'z_vals': hierarchical_steps}


# --- as text ------------------------------------------------------------------------------------------------

HEADER = 'i,t,delta,sigma,alpha,T,w,r,g,b'


def rows(samples):
    """The numbers of `Samples` [S, 10], columns as in HEADER."""
    alpha = samples.weights / np.maximum(samples.transmittance, 1e-30)
    return np.column_stack([np.arange(len(samples.t)), samples.t, samples.lengths, samples.sigmas, alpha,
                            samples.transmittance, samples.weights, samples.rgb])


def table(samples, count):
    """The `count` samples of the most weight as a table in Markdown."""
    chosen = np.sort(np.argsort(-samples.weights)[:count])
    lines = ['| i | t | δ | σ | α | T | w | colour |', '|---|---|---|---|---|---|---|---|']
    for i, t, length, sigma, alpha, transmittance, weight, *rgb in rows(samples)[chosen]:
        length = '∞' if length > ENDLESS else f'{length:.4f}'
        color = ' '.join(f'{part:.2f}' for part in rgb)
        lines.append(f'| {int(i)} | {t:.3f} | {length} | {sigma:.4g} | {alpha:.3f} | {transmittance:.3f} | '
                     f'{weight:.3f} | {color} |')
    return '\n'.join(lines)


def csv(samples):
    """All numbers of `Samples` as a CSV file."""
    return '\n'.join([HEADER, *(','.join(f'{value:.8g}' for value in row) for row in rows(samples))]) + '\n'
