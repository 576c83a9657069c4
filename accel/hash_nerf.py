"""The network behind a hash encoding (Müller et al., SIGGRAPH 2022): two short MLPs instead of a deep one."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from accel.hash_grid import encode_directions
from run_nerf_helpers import RadianceField, in_float32

# The hidden layers have this many channels.
HIDDEN_WIDTH = 64
# The density's MLP has this many outputs. The first plus INITIAL_LOG_DENSITY is the log density; the colour's
# MLP takes all of them.
DENSITY_OUTPUTS = 16
# Log densities are clamped to this, so that densities and gradients stay finite.
MAX_LOG_DENSITY = 15.0
# New networks have about this log density. In thinner fog surfaces form later, and from forward-facing photos
# hardly ever.
INITIAL_LOG_DENSITY = 2.0


class TruncatedExp(torch.autograd.Function):
    """exp(x), with x clamped to at most MAX_LOG_DENSITY. The gradient is exp of x clamped to
    ±MAX_LOG_DENSITY: it neither vanishes nor overflows."""

    @staticmethod
    def forward(ctx, x):
        density = torch.exp(x.clamp(max=MAX_LOG_DENSITY))
        ctx.save_for_backward(density)
        return density

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].clamp(min=math.exp(-MAX_LOG_DENSITY))


class HashNeRF(RadianceField):
    """Positions and directions to raw colour and density. The density is an exponential and never negative,
    so the ReLU in `raw2outputs` has no effect.

    Args:
      encoding: a `HashGrid`.
      encoding_views: module that encodes directions; None for a colour that does not depend on them.
      input_ch_views: size of the encoded direction.
    """

    # Table entries get rare and tiny gradients; a small eps keeps Adam from damping them. `fused` updates the
    # table in one pass.
    adam_options = {'betas': (0.9, 0.99), 'eps': 1e-15, 'fused': True}  # noqa: RUF012 - read only
    plain_on_gpu = True
    W = HIDDEN_WIDTH

    def __init__(self, encoding, encoding_views=None, input_ch_views=0):
        super().__init__()
        self.encoding, self.encoding_views, W = encoding, encoding_views, HIDDEN_WIDTH
        self.density_linears = nn.ModuleList([nn.Linear(encoding.out_dim, W), nn.Linear(W, DENSITY_OUTPUTS)])
        self.rgb_linears = nn.ModuleList([nn.Linear(DENSITY_OUTPUTS + input_ch_views, W), nn.Linear(W, W),
                                          nn.Linear(W, 3)])

    def features(self, points):
        """Points [N, 3] to the outputs of the density's MLP [N, DENSITY_OUTPUTS]."""
        h = F.relu(self.density_linears[0](self.encoding(points)), inplace=True)
        return in_float32(self.density_linears[1], h)

    def density(self, points):
        return TruncatedExp.apply(self.features(points)[:, 0] + INITIAL_LOG_DENSITY)

    def forward(self, points, viewdirs=None):
        h = self.features(points)
        density = TruncatedExp.apply(h[:, :1] + INITIAL_LOG_DENSITY)
        if self.encoding_views is not None:
            h = torch.cat([h, encode_directions(self.encoding_views, viewdirs)], -1)
        for layer in self.rgb_linears[:-1]:
            h = F.relu(layer(h), inplace=True)
        return torch.cat([in_float32(self.rgb_linears[-1], h), density], -1)
