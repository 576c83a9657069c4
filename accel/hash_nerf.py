"""The small network behind a hash encoding (Müller et al., SIGGRAPH 2022): two short MLPs in place of one deep one."""
import torch
import torch.nn.functional as F
from torch import nn

from run_nerf_helpers import in_float32

HIDDEN = 64         # channels of a layer
FEATURES = 16       # what the density's MLP hands on to the colour's; its first number is the density
MOST_LOG_DENSITY = 15.0
FIRST_LOG_DENSITY = 2.0  # at the start: a thin fog finds surfaces later, and on photos taken from the front hardly at all
# Entries get a gradient in few steps: a small eps lets each make its way. One pass over a large table in place of ten.
HASH_ADAM = {'betas': (0.9, 0.99), 'eps': 1e-15, 'fused': True}


class TruncatedExp(torch.autograd.Function):
    """exp(x), whose gradient stays finite where x is large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=MOST_LOG_DENSITY))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * torch.exp(ctx.saved_tensors[0].clamp(-MOST_LOG_DENSITY, MOST_LOG_DENSITY))


class HashNeRF(nn.Module):
    """Positions, which it encodes itself, and encoded directions to raw colour and density, as `NeRF` has them. The density
    is the exponential of what the first MLP gives: never negative, so that its ReLU in `raw2outputs` changes nothing.

    Args:
      encoding: a `HashGrid`.
      input_ch_views: size of the encoded direction, 0 for a colour that does not depend on it.
    """

    def __init__(self, encoding, input_ch_views=0):
        super().__init__()
        self.encoding = encoding
        self.density_linears = nn.ModuleList([nn.Linear(encoding.out_dim, HIDDEN), nn.Linear(HIDDEN, FEATURES)])
        self.rgb_linears = nn.ModuleList([nn.Linear(FEATURES + input_ch_views, HIDDEN), nn.Linear(HIDDEN, HIDDEN),
                                          nn.Linear(HIDDEN, 3)])

    def forward(self, x):
        """`x` [N, 3 + input_ch_views] to raw [N, 4]."""
        points, views = x[:, :3], x[:, 3:]
        h = F.relu(self.density_linears[0](self.encoding(points)), inplace=True)
        h = in_float32(self.density_linears[1], h)
        density = TruncatedExp.apply(h[:, :1] + FIRST_LOG_DENSITY)
        h = torch.cat([h, views], -1)
        for layer in self.rgb_linears[:-1]:
            h = F.relu(layer(h), inplace=True)
        return torch.cat([in_float32(self.rgb_linears[-1], h), density], -1)
