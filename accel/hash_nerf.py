"""The small network behind a hash encoding (Müller et al., SIGGRAPH 2022): two short MLPs in place of one deep one."""
import torch
import torch.nn.functional as F
from torch import nn

from run_nerf_helpers import RadianceField, in_float32

# Channels of a hidden layer.
HIDDEN = 64
# Outputs of the density's MLP that the colour's MLP takes; the first of them is the density's logarithm.
FEATURES = 16
# Exponents are clamped to this, so that densities and gradients stay finite.
MAX_LOG_DENSITY = 15.0
# The logarithm of the density at the start. In thinner fog surfaces form later, and from frontal photos hardly at all.
INITIAL_LOG_DENSITY = 2.0


class TruncatedExp(torch.autograd.Function):
    """exp(x), whose gradient stays finite where x is large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=MAX_LOG_DENSITY))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * torch.exp(ctx.saved_tensors[0].clamp(-MAX_LOG_DENSITY, MAX_LOG_DENSITY))


class HashNeRF(RadianceField):
    """Positions and directions to raw colour and density. The density is the exponential of the first MLP's output: it is
    never negative, so that the ReLU in `raw2outputs` changes nothing.

    Args:
      encoding: a `HashGrid`.
      encoding_views: module that encodes directions; None for a colour that does not depend on them.
      input_ch_views: size of the encoded direction.
    """

    # An entry gets a gradient in few steps: a small eps lets each of them count. `fused` passes over the table once.
    adam_options = {'betas': (0.9, 0.99), 'eps': 1e-15, 'fused': True}  # noqa: RUF012 - read only
    relu_density = False

    def __init__(self, encoding, encoding_views=None, input_ch_views=0):
        super().__init__()
        self.encoding, self.encoding_views = encoding, encoding_views
        self.density_linears = nn.ModuleList([nn.Linear(encoding.out_dim, HIDDEN), nn.Linear(HIDDEN, FEATURES)])
        self.rgb_linears = nn.ModuleList([nn.Linear(FEATURES + input_ch_views, HIDDEN), nn.Linear(HIDDEN, HIDDEN),
                                          nn.Linear(HIDDEN, 3)])

    def features(self, points):
        """Points [N, 3] to the log density and what the colour depends on beside the direction, [N, FEATURES]."""
        h = F.relu(self.density_linears[0](self.encoding(points)), inplace=True)
        return in_float32(self.density_linears[1], h)

    def density(self, points):
        return TruncatedExp.apply(self.features(points)[:, 0] + INITIAL_LOG_DENSITY)

    def forward(self, points, viewdirs=None):
        h = self.features(points)
        density = TruncatedExp.apply(h[:, :1] + INITIAL_LOG_DENSITY)
        if self.encoding_views is not None:
            h = torch.cat([h, self.encoding_views(viewdirs)], -1)
        for layer in self.rgb_linears[:-1]:
            h = F.relu(layer(h), inplace=True)
        return torch.cat([in_float32(self.rgb_linears[-1], h), density], -1)
