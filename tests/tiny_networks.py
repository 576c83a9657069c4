"""Small networks, the same at each call, and rays for them."""
import torch
from torch import nn

from accel.hash_grid import HashGrid
from accel.hash_nerf import HashNeRF
from run_nerf_helpers import EncodedNeRF, get_embedder

# A camera position from which rays go to the origin.
CAMERA = torch.tensor([0.0, 0.0, 4.0])


class LearnedEncoding(nn.Module):
    """Points [..., 3] to trained features [..., 7]."""
    out_dim = 7

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, self.out_dim)

    def forward(self, points):
        return torch.sin(self.linear(points))


def encoded_nerf(use_viewdirs=True, encoding=None, **options):
    """An `EncodedNeRF` of three narrow layers unless `options` say otherwise, positionally encoded
    unless given another `encoding`."""
    encoding = encoding or get_embedder(4)[0]
    encoding_views, input_ch_views = get_embedder(2) if use_viewdirs else (None, 0)
    sizes = {'D': 3, 'W': 32, 'skips': [1], 'output_ch': 5, **options}
    return EncodedNeRF(encoding, encoding_views, input_ch=encoding.out_dim, input_ch_views=input_ch_views,
                       use_viewdirs=use_viewdirs, **sizes)


def hash_nerf(use_viewdirs=True):
    """A `HashNeRF` with a small table."""
    grid = HashGrid(n_levels=4, finest_res=64, log2_hashmap_size=10, n_features=2)
    return HashNeRF(grid, *(get_embedder(0, 2) if use_viewdirs else ()))


def points_and_directions(N, use_viewdirs=True):
    """Points [N, 3] in [-1, 1]^3 and unit directions [N, 3] or None."""
    viewdirs = nn.functional.normalize(torch.randn(N, 3), dim=-1)
    return torch.rand(N, 3) * 2 - 1, viewdirs if use_viewdirs else None


def rays_to_origin(N, use_viewdirs=True):
    """A ray batch [N, 11 or 8] from CAMERA roughly towards the origin."""
    directions = torch.randn(N, 3) * 0.2 - CAMERA
    unit = directions / directions.norm(dim=-1, keepdim=True)
    bounds = torch.tensor([[2.0, 6.0]]).expand(N, 2)
    columns = [CAMERA.expand(N, 3), directions / 4, bounds] + ([unit] if use_viewdirs else [])
    return torch.cat(columns, -1)


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Each gradient is the expected one; None stands for zero in both."""
    for gradient, reference in zip(found, expected, strict=True):
        if reference is None:
            assert gradient is None or not gradient.any()
        else:
            assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-12
