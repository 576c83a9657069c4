"""Poses of photos are estimates: a small rotation and shift of each camera is trained with the network (Lin
et al., "BARF: Bundle-Adjusting Neural Radiance Fields", ICCV 2021)."""
import torch
from torch import nn

from accel.appearance import MAX_VIEWS
from run_nerf_helpers import BoundedModule

# Below this angle, in radians, two terms of a series are as exact as sine and cosine.
SMALL_ANGLE = 1e-3


class PoseOffsets(BoundedModule):
    """Turns rays of the given cameras into those of the refined ones.

    An offset [6] is a rotation vector, in radians and the axes of the scene, and a shift in units of half the
    mean side of the box; in normalised device coordinates, where LLFF scenes have a side of about 2, the
    unit is one of the scene. The mean offset of the views is subtracted: a motion of all cameras would only
    move the scene.
    """

    def __init__(self):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(MAX_VIEWS, 6))

    def reset_parameters(self):
        nn.init.zeros_(self.offsets)

    def forward(self, rays, view):
        """Rays [2, N, 3] of the training views [N], counted from the first one."""
        trained = (self.offsets.detach() != 0).any(-1).sum()  # rows of views without rays stay zero
        mean = self.offsets.detach().sum(0) / trained.clamp(min=1)
        return self.move(rays, self.offsets.index_select(0, view) - mean)

    def move(self, rays, offsets):
        """Rays [2, N, 3] from cameras with the `offsets` [N or 1, 6]."""
        (rays_o, rays_d), (rotation, shift) = rays, offsets.split(3, -1)
        return torch.stack([rays_o + self.half_side() * shift, rotate(rays_d, rotation)])


def rotate(vectors, rotation):
    """Vectors [N, 3] turned by rotation vectors [N or 1, 3]: Rodrigues' formula, with a finite gradient at
    0."""
    square = rotation.square().sum(-1, keepdim=True)
    small = square < SMALL_ANGLE ** 2
    angle = torch.where(small, 1, square).sqrt()
    sine = torch.where(small, 1 - square / 6, angle.sin() / angle)                 # sin(angle) / angle
    # 1 - cos(angle) = 2 sin²(angle / 2), which loses no digits
    cosine = torch.where(small, 0.5 - square / 24, 2 * ((angle / 2).sin() / angle) ** 2)
    axis = rotation.expand_as(vectors)
    across = torch.linalg.cross(axis, vectors)
    return vectors + sine * across + cosine * torch.linalg.cross(axis, across)
