"""A trained scene whose geometry is known: a ball."""
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from tiny_photos import look_at, ring
from torch import nn

from accel.network_query import NetworkQuery
from run_nerf import EXACT, ImageRenderer
from run_nerf_helpers import RadianceField
from scenes.scene import Scene
from tools.trained import Trained

# The centre of the ball, and its radius.
CENTER, RADIUS = np.array([0.1, -0.2, 0.15]), 0.6
# The images are squares with sides of this many pixels, and show half of that at depth 1.
SIZE = 64
# The density inside, and how quickly it falls at the surface.
DENSITY, SHARPNESS = 400.0, 200.0


class Ball(RadianceField):
    """A ball whose colour is its position: 0.5 + half of x, y, z.

    Args:
      hollow: radius of an empty core.
      to_scene: function of points [N, 3], arrays, that returns those of the scene.
    """

    def __init__(self, hollow=0.0, to_scene=None):
        super().__init__()
        self.hollow, self.to_scene, self.scale = hollow, to_scene, nn.Parameter(torch.ones(1))

    def density(self, points):
        if self.to_scene:
            points = torch.from_numpy(self.to_scene(points.numpy())).float()
        r = torch.linalg.vector_norm(points - torch.from_numpy(CENTER).float(), dim=-1)
        inside = torch.minimum(RADIUS - r, r - self.hollow) if self.hollow else RADIUS - r
        return self.scale * DENSITY * torch.sigmoid(SHARPNESS * inside)

    def forward(self, points, viewdirs=None):
        colors = 0.5 + 0.5 * points.clamp(-0.99, 0.99)
        return torch.cat([torch.logit(colors), self.density(points)[:, None]], -1)


def cameras_around():
    """c2w [12, 3, 4] of cameras above, beside and below the ball that look at it."""
    positions = np.concatenate([ring(4, 2.5, 0), ring(4, 1.5, 2), ring(4, 1.5, -2)])
    return cameras_at(positions + [0.01, 0, 0])


def cameras_at(positions):
    """c2w [N, 3, 4] of cameras at `positions` [N, 3] relative to the ball that look at it."""
    return look_at(CENTER + positions, np.tile(CENTER, (len(positions), 1))).astype(np.float32)


def trained_ball(poses=None, network=None, renderer=EXACT, ndc=False, bounds=(1.0, 4.5), **fields):
    """A `Trained` ball seen from `poses`, c2w [N, 3, 4]; `fields` are those of the `Scene`."""
    poses = cameras_around() if poses is None else poses
    K, views = np.array([[SIZE, 0, SIZE / 2], [0, SIZE, SIZE / 2], [0, 0, 1.0]]), np.arange(len(poses))
    scene = Scene(None, SIZE, SIZE, poses, K, *bounds, poses, views, views[:0], views[:0], **fields)
    kwargs = {'network_fn': network or Ball(), 'network_fine': None, 'renderer': renderer, 'N_samples': 256,
              'network_query_fn': NetworkQuery(), 'N_importance': 0, 'perturb': 0.0, 'raw_noise_std': 0.0,
              'white_bkgd': True, 'use_viewdirs': True, 'ndc': ndc, 'lindisp': False, 'pixel_centers': True,
              'near': bounds[0], 'far': bounds[1]}
    args = Namespace(contract=False, datadir='data')
    return Trained(args, scene, kwargs, ImageRenderer(scene.hwf, K, 4096, kwargs), Path('ball/000001.tar'), 1)
